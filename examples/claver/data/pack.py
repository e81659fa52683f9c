"""The command that packs the videos of a list into WebDataset shards."""

from __future__ import annotations

from typing import Literal

from ..config import Config
from .lists import read_labels
from .shards import write_shards
from .videos import read_videos

__all__ = ["pack"]


def pack(
    config: Config,
    *,
    folder: str,
    which: Literal["train", "test"] = "train",
    per_shard: int = 1000,
    shuffle: bool | None = None,
) -> int:
    """Pack the videos of a list into WebDataset shards, as they are.

    Args:
        config: whose `data.train_list` or `data.test_list` is packed.
        folder: for the shards, which `data.train_list` or `data.test_list` may name from then on.
        which: of the two lists.
        per_shard: videos in each shard.
        shuffle: mix the list by the configuration's seed; by default that for training, which mixes near videos alone.

    Returns:
        The exit status, 0.

    Raises:
        DatasetError: a list or a video that cannot be read.
        ValueError: a folder that has shards already.
    """
    names = read_labels(config.data.labels)
    path = config.data.train_list if which == "train" else config.data.test_list
    source = read_videos(path, config.data.root, names)
    root = path if source.kind == "folder" else config.data.root
    mixed = which == "train" if shuffle is None else shuffle
    seed = config.seed if mixed else None
    shards = write_shards(source.samples, folder, root=root, per_shard=per_shard, seed=seed)
    packed = read_videos(folder, None, names)
    order = f", mixed by the seed {seed}" if mixed else ""
    print(
        f"{folder}: {len(packed.samples)} videos in {len(shards)} shards{order}, hash {packed.hash} (of {path}: {source.hash})"
    )
    return 0

"""Features of videos, computed once and kept in a file: for retrieval, clustering, or a classifier of one's own."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ..config import Config
from ..data.datasets import TestDataset
from ..data.lists import Sample
from ..files import replace_file
from ..model import Claver
from .predict import find_videos

__all__ = ["Features", "features", "model_digest", "read_features", "video_feature"]

FORMAT = "claver-features-1"
ENDINGS = (".safetensors", ".npz")


class Features(NamedTuple):
    """What a file of features holds.

    Attributes:
        paths: of the videos.
        values: float32 `(V, E)`, means over frames and test views; to be normalised before they are compared.
        model: the `model_digest` of the model that computed them.
    """

    paths: list[str]
    values: Tensor
    model: str


def features(videos: Sequence[str], out: str | Path, *, model: Claver, config: Config, overwrite: bool = False) -> int:
    """Write the features of videos, averaged over all test views, with their paths; files that cannot be read are named.

    Args:
        videos: files, folders (with all video files below) and patterns such as `clips/*.mp4`.
        out: a file that ends in .safetensors (`features`, and paths as JSON in its metadata) or .npz (`features`, `paths`).
        model: in evaluation mode.
        config: of the checkpoint: frames, preprocessing and test views.
        overwrite: replace a file that is there.

    Returns:
        The exit status: 1 if any file could not be read, else 0.

    Raises:
        ValueError: another ending, a file that is there, a folder or pattern without videos, or no video that can be read.
        OSError: a folder that cannot be written to.
    """
    out = Path(out)
    if out.suffix not in ENDINGS:
        raise ValueError(f"{out}: features are written to files that end in {' or '.join(ENDINGS)}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: is there already; pass --overwrite, or another name")
    paths = find_videos(videos)
    found: dict[str, Tensor] = {}
    for path in tqdm(paths, desc="features", unit="video", disable=None, leave=False):
        result = video_feature(model, path, config)
        if isinstance(result, str):
            tqdm.write(f"{path}: {result}", file=sys.stderr)
        else:
            found[path] = result
    if not found:
        raise ValueError(f"none of {len(paths)} videos could be read, so {out} was not written")
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, Features(list(found), torch.stack(list(found.values())), model_digest(model)))
    return int(len(found) < len(paths))


@torch.no_grad()
def video_feature(model: Claver, path: str, config: Config) -> Tensor | str:
    """The feature `(E,)` of one video on the CPU, or why it cannot be read."""
    clips, crops = config.test.clips, config.test.crops
    dataset = TestDataset([Sample(path, 0)], config.model.frames, config.augment, num_clips=clips, num_crops=crops)
    item = dataset[0]
    if item["error"]:
        return item["error"]
    return model.encode_video(item["video"].to(next(model.parameters()).device)).mean(0).cpu()


def read_features(path: str | Path) -> Features:
    """What `features` wrote.

    Raises:
        ValueError: no such file, or one of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of features")
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return Features(arrays["paths"].tolist(), torch.from_numpy(arrays["features"]), str(arrays["model"]))
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            return Features(json.loads(about["paths"]), file.get_tensor("features"), about["model"])
    except (SafetensorError, OSError, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: is not a file that `features` wrote, or is damaged ({error})") from error


def model_digest(model: Claver) -> str:
    """16 hexadecimal digits that tell weights apart, whatever their names and device."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _write(out: Path, content: Features) -> None:
    with replace_file(out) as partial:
        if out.suffix == ".npz":
            with partial.open("wb") as file:  # given a name, numpy would add its own ending
                np.savez(file, features=content.values.numpy(), paths=np.array(content.paths), model=content.model)
        else:
            about = {"format": FORMAT, "paths": json.dumps(content.paths), "model": content.model}
            partial.write_bytes(save({"features": content.values.contiguous()}, about))

"""The training and test sets made of labelled videos, and their loaders.

A video that is missing or broken is never blanked or passed over in silence: training stops with its name, or counts it and
names it in the `errors` of its batch, and evaluation collects all of them there.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

from .augment import AugmentConfig, crop_views, resize_short_side, train_clip
from .broken import broken_files
from .lists import Sample
from .sampling import segment_indices, view_indices
from .shard_stream import LANES, batches_of_lane, shard_bounds, stream_samples
from .tars import Member
from .video import Choose, VideoError, read_clip

__all__ = [
    "TestDataset",
    "TrainDataset",
    "eval_loader",
    "set_epoch",
    "train_loader",
]

_SUBSTITUTES = 16  # videos that are tried for a broken one


class TrainDataset(Dataset[dict[str, Any]]):
    """One augmented clip of each video.

    Item: `video` float32 `(T, 3, size, size)`, normalised; `label` and `index`, int; `errors`, empty. What is random about
    an item is a function of `(seed, epoch, index)` alone, whatever the number of workers; `set_epoch` reaches running
    workers. A video that cannot be read raises `VideoError`, which names it. With `skip_broken` it is named in the item's
    `errors`, `(name, reason)`, and another takes its place, drawn from the whole list by the same three numbers: so all
    processes keep their number of steps and the shape of their batches, and a run that is resumed meets the same clips.
    `index` is then that of the other. With `cache`, each file is decoded once and all of its frames stay in memory at
    `short_side`: for small sets, and `num_workers=0`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        frames: int,
        augment: AugmentConfig,
        *,
        seed: int = 0,
        cache: bool = False,
        skip_broken: bool = False,
    ) -> None:
        self.samples = list(samples)
        self.frames = frames
        self.augment = augment
        self.seed = seed
        self.skip_broken = skip_broken
        self.source = _FrameSource(augment.short_side, cache)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other clips and augmentations; to be called before the loader is iterated."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self.samples[index].path)

    def item(self, index: int, video: str | Member) -> dict[str, Any]:
        """The item of sample `index`, whose video may have been read into memory already."""
        errors: list[tuple[str, str]] = []
        for place, path in self._candidates(index, video):
            generator = _generator(self.seed, self.epoch, index)
            try:
                clip = self.source.read(path, _segments(self.frames, generator))
            except VideoError as error:
                if not self.skip_broken:
                    raise
                errors.append((str(path), _reason(path, error)))
                continue
            clip = train_clip(clip, self.augment, generator)
            return {"video": clip, "label": self.samples[place].label, "index": place, "errors": errors}
        raise broken_files(errors, len(errors))

    def _candidates(self, index: int, video: str | Member) -> Iterator[tuple[int, str | Member]]:
        yield index, video
        draws = np.random.default_rng([self.seed, self.epoch, index])
        for place in draws.integers(len(self.samples), size=_SUBSTITUTES).tolist():
            yield place, self.samples[place].path


class TestDataset(Dataset[dict[str, Any]]):
    """All test views of each video: `num_clips` in time by `num_crops` (1 or 3) in space.

    Item: `video` float32 `(V, T, 3, size, size)`, normalised, with `V = num_clips * num_crops` and the crops of a clip
    side by side; `label` and `index`, int; `error`, empty. For a file that cannot be read `error` says why and `video`
    is None; `collate` moves such items to the batch's `errors`, for `broken_files`.
    """

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(
        self,
        samples: Sequence[Sample],
        frames: int,
        augment: AugmentConfig,
        *,
        num_clips: int = 4,
        num_crops: int = 3,
        cache: bool = False,
    ) -> None:
        if num_crops not in (1, 3):
            raise ValueError(f"num_crops must be 1 (centre) or 3 (along the longer side), got {num_crops}")
        self.samples = list(samples)
        self.frames = frames
        self.augment = augment
        self.num_clips = num_clips
        self.num_crops = num_crops
        self.source = _FrameSource(augment.short_side if num_crops == 1 else augment.size, cache)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        item: dict[str, Any] = {"video": None, "label": label, "index": index, "error": ""}
        try:
            video = self.source.read(path, lambda count: view_indices(count, self.frames, self.num_clips).flatten())
        except VideoError as error:
            return item | {"error": _reason(path, error)}
        crops = crop_views(video, self.augment, self.num_crops)
        return item | {"video": rearrange(crops, "crop (clip t) c h w -> (clip crop) t c h w", clip=self.num_clips)}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: `video (B, V, T, 3, size, size)`, `label (B,)` and `index (B,)` of the items that could be read, and
        `errors`, a list of `(path, reason)` of those that could not; B may be 0."""
        good = [item for item in items if not item["error"]]
        views = self.num_clips * self.num_crops
        empty = torch.empty(0, views, self.frames, 3, self.augment.size, self.augment.size)
        return {
            "video": torch.stack([item["video"] for item in good]) if good else empty,
            "label": torch.tensor([item["label"] for item in good], dtype=torch.int64),
            "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
            "errors": [(str(self.samples[item["index"]].path), item["error"]) for item in items if item["error"]],
        }


def train_loader(
    dataset: TrainDataset,
    batch_size: int,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    stream: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Shuffled batches of `batch_size` clips for each of `world_size` processes; the incomplete last batch is dropped.

    A batch has the clips' `video`, `label` and `index`, stacked, and their `errors` in one list. The order is a function of
    the dataset's seed and the epoch: call `set_epoch(loader, epoch)` before each. With `stream` the samples are those of
    shards, which are read from start to end (see `shard_stream`); the order is another one, and a function of `world_size`
    too. All processes have equally many batches.

    Raises:
        ValueError: there is not one full batch, a cache with workers or a stream, or a stream with a number of workers that
            does not divide its lanes.
    """
    if len(dataset) // world_size < batch_size:
        raise ValueError(
            f"{len(dataset)} samples on {world_size} processes do not fill one batch of {batch_size} on each; "
            "use a smaller batch_size"
        )
    if not stream:
        sampler = _Shuffled(dataset, rank, world_size, batch_size)
        return _loader(dataset, dataset.source, batch_size, sampler, num_workers, pin_memory, _collate, drop_last=True)
    if dataset.source.cache is not None:
        raise ValueError("cache=True is for lists and folders: shards are read anew in each epoch")
    if num_workers and LANES % num_workers:
        numbers = ", ".join(str(n) for n in range(1, LANES + 1) if LANES % n == 0)
        raise ValueError(f"training from shards needs num_workers of 0 or one of {numbers}, got {num_workers}")
    batches = _ShardBatches(dataset, batch_size, rank, world_size)
    return _loader(batches, dataset.source, None, None, num_workers, pin_memory)


def eval_loader(
    dataset: TestDataset,
    batch_size: int,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Batches of `batch_size` videos in order, each video once on exactly one of `world_size` processes.

    Process `rank` has the videos `rank, rank + world_size, ...`, so the processes may differ by one video.
    Raises ValueError for a cache with workers.
    """
    shard = range(rank, len(dataset), world_size)
    return _loader(dataset, dataset.source, batch_size, shard, num_workers, pin_memory, dataset.collate)


def set_epoch(loader: DataLoader[dict[str, Any]], epoch: int, *, skip: int = 0) -> None:
    """Set the epoch of the order and the augmentation of a `train_loader`, also in its running workers.

    `skip` batches of the epoch, which were done before, are left out without being decoded.
    """
    order = loader.dataset if isinstance(loader.dataset, _ShardBatches) else loader.sampler
    assert isinstance(order, (_ShardBatches, _Shuffled))
    order.start(epoch, skip)


class _Shuffled(DistributedSampler[Any]):
    """The indices of one process in an epoch, shuffled, without the batches to skip; its length is that of the whole epoch."""

    def __init__(self, dataset: TrainDataset, rank: int, world_size: int, batch_size: int) -> None:
        super().__init__(dataset, world_size, rank, shuffle=True, seed=dataset.seed, drop_last=True)
        self.batch_size = batch_size
        self.skip = 0

    def start(self, epoch: int, skip: int) -> None:
        self.set_epoch(epoch)
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self.skip * self.batch_size, None)


class _ShardBatches(IterableDataset[dict[str, Any]]):
    """The batches of one process in an epoch, read from shards, without those to skip; its length is that of the whole epoch."""

    def __init__(self, clips: TrainDataset, batch_size: int, rank: int, world_size: int) -> None:
        self.clips = clips
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.bounds = shard_bounds(clips.samples)
        self._skip = torch.zeros((), dtype=torch.int64).share_memory_()

    def start(self, epoch: int, skip: int) -> None:
        self.clips.set_epoch(epoch)
        self._skip.fill_(skip)

    def __len__(self) -> int:
        return len(self.clips) // self.world_size // self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        skip = int(self._skip)
        lanes: dict[int, Iterator[tuple[int, Member]]] = {}
        for batch in range(skip + number, len(self), workers):
            lane = batch % LANES
            if lane not in lanes:
                lanes[lane] = self._lane(lane, skip)
            items = [self.clips.item(index, video) for index, video in islice(lanes[lane], self.batch_size)]
            yield _collate(items)

    def _lane(self, lane: int, skip: int) -> Iterator[tuple[int, Member]]:
        """The samples of one lane without those of the first `skip` batches of the process."""
        per_lane = [batches_of_lane(len(self), each) * self.batch_size for each in range(LANES)]
        start = self.rank * sum(per_lane) + sum(per_lane[:lane])
        key = (self.clips.seed, self.clips.epoch, self.rank * LANES + lane)
        samples = stream_samples(self.clips.samples, self.bounds, start, start + per_lane[lane], key)
        return islice(samples, batches_of_lane(skip, lane) * self.batch_size, None)


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    batch = default_collate([{key: value for key, value in item.items() if key != "errors"} for item in items])
    return batch | {"errors": [error for item in items for error in item["errors"]]}


class _FrameSource:
    """Frames of video files at a given short side, each file decoded once if it caches."""

    def __init__(self, short_side: int, cache: bool) -> None:
        self.short_side = short_side
        self.cache: dict[str | Member, torch.Tensor] | None = {} if cache else None

    def read(self, path: str | Member, choose: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The frames `choose(num_frames)` of a file, uint8 `(T, 3, h, w)`."""
        if self.cache is None:
            return self._decode(path, choose)
        if path not in self.cache:
            self.cache[path] = self._decode(path, range)
        return self.cache[path][choose(len(self.cache[path]))]

    def _decode(self, path: str | Member, choose: Choose) -> torch.Tensor:
        frames = rearrange(read_clip(path, choose), "t h w c -> t c h w")
        return resize_short_side(frames, self.short_side).contiguous()


def _loader(
    dataset: Dataset[dict[str, Any]],
    source: _FrameSource,
    batch_size: int | None,
    sampler: Iterable[int] | None,
    num_workers: int,
    pin_memory: bool,
    collate: Callable[[list[Any]], Any] | None = None,
    *,
    drop_last: bool = False,
) -> DataLoader[dict[str, Any]]:
    if source.cache is not None and num_workers > 0:
        raise ValueError(f"cache=True needs num_workers=0, got {num_workers}: each worker would keep all frames")
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_training,
        generator=torch.Generator(),  # leaves torch's global random state alone
    )


def _segments(frames: int, generator: torch.Generator) -> Callable[[int], torch.Tensor]:
    """`segment_indices` of any number of frames, drawn from where the generator is now however often it is asked."""
    state = generator.get_state()

    def choose(num_frames: int) -> torch.Tensor:
        generator.set_state(state)
        return segment_indices(num_frames, frames, generator=generator)

    return choose


def _leave_signals_to_the_training(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the workers go on, so that the training's step can come to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator whose stream is a function of the three numbers; neighbours are independent."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _reason(path: str | Member, error: VideoError) -> str:
    return str(error).removeprefix(f"{path}: ")

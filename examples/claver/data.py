"""Lists of labelled videos, the training and test sets made of them, and their loaders.

A file that is missing or broken is never skipped, replaced or blanked: `check_files` lists all of them before a run,
training stops with the name of the file, and evaluation collects them in the `errors` of its batches.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from tqdm import tqdm

from .augment import AugmentConfig, crop_views, resize_short_side, train_clip
from .sampling import segment_indices, view_indices
from .video import VideoError, probe, read_frames

__all__ = [
    "DatasetError",
    "Sample",
    "TestDataset",
    "TrainDataset",
    "broken_files",
    "check_files",
    "eval_loader",
    "list_hash",
    "read_labels",
    "read_list",
    "set_epoch",
    "train_loader",
]

_NAMED = 20  # problems that an error message names


class Sample(NamedTuple):
    """A video file and its class."""

    path: str
    label: int


class DatasetError(ValueError):
    """Faults of a list or of its files.

    The message names the first 20 with their reasons; `problems` holds all of them, as `(name, reason)`.
    """

    def __init__(self, message: str, problems: Sequence[tuple[str, str]] = ()) -> None:
        named = [f"\n  {name}: {reason}" for name, reason in problems[:_NAMED]]
        if len(problems) > _NAMED:
            named.append(f"\n  ... and {len(problems) - _NAMED} more")
        super().__init__(message + "".join(named))
        self.problems = list(problems)


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Class names in the order of their ids, from a CSV file whose first columns are `id,name`.

    Raises:
        DatasetError: another header, a malformed line, a repeated name, or ids that are not 0, 1, ... once each.
    """
    names: dict[int, str] = {}
    seen: dict[str, int] = {}
    problems = []
    for line, row in _csv_rows(path, ["id", "name"], further=True):
        number, name = _integer(row[0]), row[1].strip() if len(row) == 2 else ""
        if len(row) != 2:
            problems.append((f"line {line}", f"expected id,name, got {len(row)} fields (quote a name with a comma)"))
        elif number is None or number < 0:
            problems.append((f"line {line}", f"id {row[0]!r} is not a class number"))
        elif not name:
            problems.append((f"line {line}", "the name is empty"))
        elif number in names:
            problems.append((f"line {line}", f"id {number} was given before, to {names[number]!r}"))
        elif name in seen:
            problems.append((f"line {line}", f"name {name!r} was given before, on line {seen[name]}"))
        else:
            names[number], seen[name] = name, line
    if not problems:
        if not names:
            raise DatasetError(f"{path}: no classes")
        missing = sorted(set(range(max(names) + 1)) - names.keys())
        problems = [(f"id {number}", f"missing, ids must be 0 to {max(names)}") for number in missing]
    if problems:
        raise DatasetError(f"{path}: not a valid list of classes:", problems)
    return [names[number] for number in range(len(names))]


def read_list(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, num_classes: int | None = None
) -> list[Sample]:
    """Samples from a text file of `path label` lines, or from a `.csv` file with the columns `path,label`.

    A path may have spaces: the label is what follows the last one. Relative paths are under `root`. Blank lines are
    skipped. Files are not looked at: see `check_files`.

    Raises:
        DatasetError: an empty list, a malformed line, or a label that is not in `0 .. num_classes - 1`.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        rows = _csv_rows(path, ["path", "label"])
    else:
        rows = [(i, line.rsplit(maxsplit=1)) for i, line in enumerate(_lines(path), 1) if line.strip()]
    samples, problems = [], []
    for line, row in rows:
        label = _integer(row[-1]) if len(row) == 2 else None
        if len(row) != 2 or not row[0].strip():
            problems.append((f"line {line}", f"expected a path and a label, got {' '.join(row)!r}"))
        elif label is None:
            problems.append((f"line {line}", f"label {row[1]!r} is not a number"))
        elif label < 0 or (num_classes is not None and label >= num_classes):
            limit = "" if num_classes is None else f" to {num_classes - 1} ({num_classes} classes)"
            problems.append((f"line {line}", f"label {label} of {row[0].strip()!r} is out of range, expected 0{limit}"))
        else:
            samples.append(Sample(os.path.join(root or "", row[0].strip()), label))
    if problems:
        raise DatasetError(f"{path}: {len(problems)} of {len(rows)} lines are not valid:", problems)
    if not samples:
        raise DatasetError(f"{path}: the list is empty")
    return samples


def check_files(samples: Sequence[Sample], *, deep: bool = False, num_threads: int = 4, progress: bool = True) -> None:
    """Check that every file of a list is there and not empty; `deep` also opens each one and decodes its first frame.

    Raises:
        DatasetError: names the missing or broken files with the reasons, and counts found and expected ones.
    """
    paths = list(dict.fromkeys(sample.path for sample in samples))
    check = _probe_problem if deep else _file_problem
    with ThreadPoolExecutor(num_threads) as pool:
        reasons = list(
            tqdm(
                pool.map(check, paths),
                total=len(paths),
                desc="checking videos",
                unit="file",
                disable=not (deep and progress),
            )
        )
    problems = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
    if problems:
        raise broken_files(problems, len(paths))


def broken_files(problems: Sequence[tuple[str, str]], expected: int) -> DatasetError:
    """The error, to be raised, for `(path, reason)` of the broken ones of `expected` files."""
    found = expected - len(problems)
    return DatasetError(f"found {found} of {expected} videos, {len(problems)} missing or broken:", problems)


def list_hash(samples: Sequence[Sample], root: str | os.PathLike[str] | None = None) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a list, for logs; paths count relative to `root`."""
    digest = hashlib.sha256()
    for path, label in samples:
        name = os.path.relpath(path, root) if root else path
        digest.update(f"{Path(name).as_posix()}\0{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


class TrainDataset(Dataset[dict[str, Any]]):
    """One augmented clip of each video.

    Item: `video` float32 `(T, 3, size, size)`, normalised; `label` and `index`, int. What is random about an item is a
    function of `(seed, epoch, index)` alone, whatever the number of workers; `set_epoch` reaches running workers.
    A file that cannot be read raises `VideoError`, which names it. With `cache`, each file is decoded once and all of
    its frames stay in memory at `short_side`: for small sets, and `num_workers=0`.
    """

    def __init__(
        self, samples: Sequence[Sample], frames: int, augment: AugmentConfig, *, seed: int = 0, cache: bool = False
    ) -> None:
        self.samples = list(samples)
        self.frames = frames
        self.augment = augment
        self.seed = seed
        self.source = _FrameSource(augment.short_side, cache)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other clips and augmentations; to be called before the loader is iterated."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        generator = _generator(self.seed, int(self._epoch), index)
        video = self.source.read(path, lambda count: segment_indices(count, self.frames, generator=generator))
        return {"video": train_clip(video, self.augment, generator), "label": label, "index": index}


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
            "errors": [(self.samples[item["index"]].path, item["error"]) for item in items if item["error"]],
        }


def train_loader(
    dataset: TrainDataset,
    batch_size: int,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Shuffled batches of `batch_size` clips for each of `world_size` processes; the incomplete last batch is dropped.

    The order is a function of the dataset's seed and the epoch: call `set_epoch(loader, epoch)` before each.
    Raises ValueError if there is not one full batch, or for a cache with workers.
    """
    if len(dataset) // world_size < batch_size:
        raise ValueError(
            f"{len(dataset)} samples on {world_size} processes do not fill one batch of {batch_size} on each; "
            "use a smaller batch_size"
        )
    sampler = _ResumableSampler(
        dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=dataset.seed, drop_last=True
    )
    return _loader(dataset, batch_size, sampler, num_workers, pin_memory, drop_last=True, collate=default_collate)


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
    return _loader(dataset, batch_size, shard, num_workers, pin_memory, drop_last=False, collate=dataset.collate)


def set_epoch(loader: DataLoader[dict[str, Any]], epoch: int, *, skip: int = 0) -> None:
    """Set the epoch of the order and the augmentation of a `train_loader`, also in its running workers.

    `skip` batches of the epoch, which were done before, are left out without being read.
    """
    assert isinstance(loader.dataset, TrainDataset)
    assert isinstance(loader.sampler, _ResumableSampler)
    assert loader.batch_size is not None
    loader.dataset.set_epoch(epoch)
    loader.sampler.set_epoch(epoch)
    loader.sampler.skip = skip * loader.batch_size


class _ResumableSampler(DistributedSampler[Any]):
    """A DistributedSampler that leaves out the first `skip` samples of its process."""

    skip = 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), self.skip, None)


class _FrameSource:
    """Frames of video files at a given short side, each file decoded once if it caches."""

    def __init__(self, short_side: int, cache: bool) -> None:
        self.short_side = short_side
        self.cache: dict[str, torch.Tensor] | None = {} if cache else None

    def read(self, path: str, choose: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The frames `choose(num_frames)` of a file, uint8 `(T, 3, h, w)`."""
        if self.cache is None:
            info = probe(path)
            return self._decode(info, choose(info.num_frames))
        if path not in self.cache:
            info = probe(path)
            self.cache[path] = self._decode(info, range(info.num_frames))
        return self.cache[path][choose(len(self.cache[path]))]

    def _decode(self, video: Any, indices: Iterable[int]) -> torch.Tensor:
        frames = rearrange(read_frames(video, indices), "t h w c -> t c h w")
        return resize_short_side(frames, self.short_side).contiguous()


def _loader(
    dataset: TrainDataset | TestDataset,
    batch_size: int,
    sampler: Iterable[int],
    num_workers: int,
    pin_memory: bool,
    *,
    drop_last: bool,
    collate: Callable[[list[Any]], Any],
) -> DataLoader[dict[str, Any]]:
    if dataset.source.cache is not None and num_workers > 0:
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


def _leave_signals_to_the_training(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the workers go on, so that the training's step can come to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator whose stream is a function of the three numbers; neighbours are independent."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _lines(path: str | os.PathLike[str]) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error


def _csv_rows(
    path: str | os.PathLike[str], columns: list[str], *, further: bool = False
) -> list[tuple[int, list[str]]]:
    """The rows below the header, which must be `columns`, each with its line number.

    With `further` there may be more columns after these; they are cut off from the rows that have them all.
    """
    reader = csv.reader(_lines(path))
    header = [name.strip() for name in next(reader, [])]
    if (header[: len(columns)] if further else header) != columns:
        raise DatasetError(f"{path}: the first line must be {','.join(columns)}, got {','.join(header)!r}")
    return [(reader.line_num, row[: len(columns)] if len(row) == len(header) else row) for row in reader if row]


def _integer(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.removeprefix("-").isdecimal() and text.isascii() else None


def _file_problem(path: str) -> str:
    if not os.path.exists(path):
        return "no such file"
    if not os.path.isfile(path):
        return "not a file"
    return "" if os.path.getsize(path) else "the file is empty (0 bytes)"


def _probe_problem(path: str) -> str:
    try:
        probe(path)
    except VideoError as error:
        return _reason(path, error)
    return ""


def _reason(path: str, error: VideoError) -> str:
    return str(error).removeprefix(f"{path}: ")

"""Looks at all videos of a configuration before a run: what is missing, broken, short or there twice, and what there is."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..config import Config
from ..files import write_text
from .lists import Sample, read_labels
from .tars import Member
from .video import VideoError, iterate_frames, probe
from .videos import VideoList, read_videos

__all__ = ["ListReport", "Look", "ScanReport", "duplicates", "list_report", "look_at", "scan", "scan_lists", "table"]

_SHOWN = 20  # files and classes of each kind that the table names; the JSON file has all
_CHUNK = 1 << 20  # bytes read at once to compare contents

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Look:
    """What was found at one video.

    Attributes:
        size: in bytes; -1 if it is missing.
        frames: that it has; 0 if it is missing or broken.
        seconds: that it lasts.
        problem: why it cannot be read; empty if it can.
    """

    size: int = -1
    frames: int = 0
    seconds: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class ListReport:
    """What a list holds; videos are named as in error messages.

    Attributes:
        path: of the list, or folder, tar file or shards.
        kind: which of these it is.
        hash: `list_hash`.
        videos: entries of the list.
        seconds: that all videos last.
        missing: videos that are not there.
        broken: `(name, reason)` of those that are there and cannot be read.
        short: `(name, frames)` of those with fewer frames than a clip, which repeats some.
        histogram: videos of each class, by its name; 0 for a class without one.
    """

    path: str
    kind: str
    hash: str
    videos: int
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    short: list[tuple[str, int]] = field(default_factory=list)
    histogram: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ScanReport:
    """What the lists of a configuration hold; `lists` by the names "train" and "test".

    `duplicates` are groups of entries with the same content, each `(list, name, class)`: under two names, twice in a list, or
    in the training and the test list.
    """

    lists: dict[str, ListReport]
    duplicates: list[list[tuple[str, str, str]]]

    @property
    def faults(self) -> int:
        """How many videos are missing, broken or short, and groups of the same content."""
        return sum(len(r.missing) + len(r.broken) + len(r.short) for r in self.lists.values()) + len(self.duplicates)


def scan(
    config: Config,
    *,
    deep: bool = False,
    processes: int | None = None,
    output: str | None = None,
) -> int:
    """Look at every video of the training and the test list, and print what is wrong with them.

    Args:
        config: whose `data.train_list` and `data.test_list` are looked at, for clips of `model.frames`.
        deep: decode every frame; otherwise the packets of each file are counted and its first frame is decoded.
        processes: that decode; by default one for each processor.
        output: a JSON file for the whole report; by default `scan.json` in `run_dir`.

    Returns:
        The exit status: 1 if a video is missing, broken, short or there twice, else 0.

    Raises:
        DatasetError: a list that cannot be read.
    """
    names = read_labels(config.data.labels)
    sources = {
        name: read_videos(path, config.data.root, names)
        for name, path in (("train", config.data.train_list), ("test", config.data.test_list))
    }
    report = scan_lists(sources, names, config.model.frames, deep=deep, processes=processes)
    path = Path(output or Path(config.run_dir) / "scan.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(report) | {"faults": report.faults, "deep": deep}, indent=1))
    print(table(report))
    print(f"\n{report.faults or 'no'} faults; all of it is in {path}")
    return int(report.faults > 0)


def scan_lists(
    sources: dict[str, VideoList],
    classes: Sequence[str],
    frames: int,
    *,
    deep: bool = False,
    processes: int | None = None,
    progress: bool = True,
) -> ScanReport:
    """Look at all videos of some lists, each file once, on several processes; arguments as in `scan`."""
    paths = list(dict.fromkeys(sample.path for source in sources.values() for sample in source.samples))
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        bar = partial(_mapped, pool, progress)
        looks = dict(zip(paths, bar(partial(look_at, deep=deep), paths, "looking at videos"), strict=True))
        twins = [
            path for group in _same(paths, lambda path: looks[path].size) for path in group if looks[path].size > 0
        ]
        digests = dict(zip(twins, bar(_digest, twins, "comparing contents"), strict=True))
    return ScanReport(
        {name: list_report(source, looks, classes, frames) for name, source in sources.items()},
        duplicates({name: source.samples for name, source in sources.items()}, digests, classes),
    )


def look_at(path: str | Member, *, deep: bool = False) -> Look:
    """What is at one path: it is counted, and with `deep` decoded to its end."""
    if isinstance(path, str) and not os.path.exists(path):
        return Look(problem="no such file")
    size = os.path.getsize(path) if isinstance(path, str) else path.size
    try:
        info = probe(path)
        if deep:
            for _ in iterate_frames(info, every=info.num_frames):  # every frame is checked, and one converted
                pass
    except VideoError as error:
        return Look(size, problem=str(error).removeprefix(f"{path}: "))
    return Look(size, info.num_frames, info.duration)


def list_report(source: VideoList, looks: dict[str | Member, Look], classes: Sequence[str], frames: int) -> ListReport:
    """What one list holds, of which `looks` has every video."""
    found = {sample.path: looks[sample.path] for sample in source.samples}
    count = Counter(sample.label for sample in source.samples)
    return ListReport(
        source.path,
        source.kind,
        source.hash,
        len(source.samples),
        sum(looks[sample.path].seconds for sample in source.samples),
        [str(path) for path, look in found.items() if look.size < 0],
        [(str(path), look.problem) for path, look in found.items() if look.size >= 0 and look.problem],
        [(str(path), look.frames) for path, look in found.items() if 0 < look.frames < frames],
        {name: count[label] for label, name in enumerate(classes)},
    )


def duplicates(
    lists: dict[str, Sequence[Sample]], digests: dict[str | Member, str], classes: Sequence[str]
) -> list[list[tuple[str, str, str]]]:
    """Groups of entries `(list, name, class)` with one content; `digests` has those that may be equal."""
    entries = [
        (digests.get(path, str(path)), (name, str(path), classes[label]))
        for name, samples in lists.items()
        for path, label in samples
    ]
    return [[entry for _, entry in group] for group in _same(entries, lambda item: item[0])]


def table(report: ScanReport) -> str:
    """A report as text, with the first of each kind of fault."""
    lines = []
    for name, part in report.lists.items():
        hours, used = part.seconds / 3600, sum(count > 0 for count in part.histogram.values())
        lines += [
            f"{name}: {part.path} ({part.kind}), hash {part.hash}",
            f"  {part.videos} videos, {hours:.2f} hours, classes with videos: {used} of {len(part.histogram)}",
            *_histogram(part.histogram),
            *_section("classes without a video", [label for label, n in part.histogram.items() if not n]),
            *_section("missing", part.missing),
            *_section("broken", [f"{path}: {reason}" for path, reason in part.broken]),
            *_section("shorter than a clip", [f"{path}: {count} frames" for path, count in part.short]),
        ]
    groups = [
        f"in {' and '.join(dict.fromkeys(name for name, _, _ in group))}: "
        + " = ".join(f"{path} ({label})" for _, path, label in group)
        for group in report.duplicates
    ]
    return "\n".join([*lines, *_section("same content", groups, indent="")])


def _histogram(histogram: dict[str, int]) -> list[str]:
    """Videos of each class, the most first; of many classes those with the most and the fewest."""
    ranked = [
        f"    {count:6d}  {name}" for name, count in sorted(histogram.items(), key=lambda item: -item[1]) if count
    ]
    if len(ranked) <= _SHOWN:
        return ranked
    half = _SHOWN // 2
    return [*ranked[:half], f"    ... {len(ranked) - 2 * half} more", *ranked[-half:]]


def _section(title: str, entries: Sequence[str], indent: str = "  ") -> list[str]:
    if not entries:
        return []
    more = [f"{indent}  ... and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [f"{indent}{title}: {len(entries)}", *(f"{indent}  {entry}" for entry in entries[:_SHOWN]), *more]


def _same(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Groups of two or more items with an equal key, in the order of their first."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def _digest(path: str | Member) -> str:
    """The SHA-256 of a video's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") if isinstance(path, str) else path.open() as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _mapped(
    pool: ProcessPoolExecutor, progress: bool, function: Callable[[T], R], items: Sequence[T], title: str
) -> Iterable[R]:
    results = pool.map(function, items, chunksize=4)
    return tqdm(results, total=len(items), desc=title, unit="video", disable=not progress, leave=False)

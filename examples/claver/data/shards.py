"""WebDataset shards: tar files of `key.mp4` and `key.cls` or `key.json`, which are next to each other.

Evaluation reads their videos where they lie, by index; training reads each shard from its start to its end (`stream`).
"""

from __future__ import annotations

import glob
import io
import json
import os
import random
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import replace_file
from .lists import VIDEO_ENDINGS, DatasetError, Sample
from .tars import Member, read_members

__all__ = ["expand_shards", "is_shard", "read_shards", "shard_key", "write_shards"]

_LABELS = (".cls", ".json")


def shard_key(name: str) -> str:
    """What the files of one sample have in common: a member's name up to the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def expand_shards(pattern: str | os.PathLike[str]) -> list[str]:
    """The shards that a folder, a glob or a pattern such as `shards-{000000..000009}.tar` stands for, in order.

    Raises:
        DatasetError: a folder or a glob without any.
    """
    pattern = os.fspath(pattern)
    if os.path.exists(pattern) and not os.path.isdir(pattern):
        return [pattern]
    if os.path.isdir(pattern):
        found = sorted(str(path) for path in Path(pattern).glob("*.tar"))
    elif any(mark in pattern for mark in "{*?["):
        found = []
        for each in _braces(pattern):
            found += sorted(glob.glob(each)) if any(mark in each for mark in "*?[") else [each]
    else:
        return [pattern]
    if not found:
        raise DatasetError(f"{pattern}: no shards (tar files) there")
    return found


def is_shard(path: str | os.PathLike[str]) -> bool:
    """Whether a tar file has labels beside its videos, and not folders for classes."""
    return any(member.name.lower().endswith(_LABELS) for member in read_members(path))


def read_shards(pattern: str | os.PathLike[str], num_classes: int, *, num_threads: int = 8) -> list[Sample]:
    """The samples of shards in their order, from the headers and labels alone.

    A label is the number in `key.cls`, or that under "label" in `key.json`, where "path" is the name that `list_hash` takes.

    Raises:
        DatasetError: shards that are missing or damaged; samples without a video or a label of `0 .. num_classes - 1`,
            all of them named.
    """
    shards = expand_shards(pattern)
    missing = [(shard, "no such file") for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise DatasetError(f"{pattern}: {len(missing)} of {len(shards)} shards are missing:", missing)
    samples: list[Sample] = []
    problems: list[tuple[str, str]] = []
    with ThreadPoolExecutor(num_threads) as pool:
        contents = pool.map(read_members, shards)
        bar = tqdm(contents, total=len(shards), desc="reading shards", unit="shard", leave=False, delay=2)
        for shard, members in zip(shards, bar, strict=True):
            _read_shard(shard, members, num_classes, samples, problems)
    if problems:
        raise DatasetError(f"{pattern}: {len(problems)} samples are not valid:", problems)
    if not samples:
        raise DatasetError(f"{pattern}: no samples in {len(shards)} shards")
    return samples


def write_shards(
    samples: Sequence[Sample],
    folder: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    per_shard: int = 1000,
    seed: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Pack videos into shards `folder/shards-000000.tar`, ..., as they are; the paths of the shards.

    Each shard is written whole or not at all. The last one comes last: a folder with all of them is complete.

    Args:
        samples: labelled videos, of any source.
        folder: for the shards, made if it is not there.
        root: the names of the videos are kept relative to it, so that `list_hash` stays what it was.
        per_shard: videos in each.
        seed: of the order in which they are packed; None: as given. Training from shards mixes near videos alone, so a list
            that is sorted by class needs one.
        progress: show a progress bar.

    Raises:
        ValueError: `per_shard` below 1, no samples, or a folder that has shards already.
        DatasetError: videos that cannot be read, the first of them named.
        OSError: a folder that cannot be written to, or a full disk.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1 video, not {per_shard}")
    if not samples:
        raise ValueError("samples must be one or more videos, got none")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} has shards already; choose another folder, or remove them")
    order = list(samples)
    if seed is not None:
        random.Random(seed).shuffle(order)
    written = []
    with tqdm(total=len(order), desc="packing videos", unit="video", disable=not progress) as bar:
        for first in range(0, len(order), per_shard):
            path = folder / f"shards-{first // per_shard:06d}.tar"
            with replace_file(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
                for number, sample in enumerate(order[first : first + per_shard], first):
                    _pack(archive, f"{number:08d}", sample, root)
                    bar.update()
            written.append(path)
    return written


def _pack(archive: tarfile.TarFile, key: str, sample: Sample, root: str | os.PathLike[str] | None) -> None:
    path, label = sample
    if isinstance(path, Member):
        name = path.listed or path.name
    else:
        name = Path(os.path.relpath(path, root) if root else path).as_posix()
    try:
        with open(path, "rb") if isinstance(path, str) else path.open() as file:
            info = tarfile.TarInfo(f"{key}{_ending(name)}")
            info.size = file.seek(0, os.SEEK_END)
            file.seek(0)
            archive.addfile(info, file)
    except FileNotFoundError as error:
        raise DatasetError("a video cannot be packed:", [(str(path), "no such file")]) from error
    text = json.dumps({"label": label, "path": name}).encode()
    info = tarfile.TarInfo(f"{key}.json")
    info.size = len(text)
    archive.addfile(info, io.BytesIO(text))


def _ending(name: str) -> str:
    """Of a video's name; `.mp4` where it has none that is known, as FFmpeg looks at the content."""
    ending = os.path.splitext(name)[1].lower()
    return ending if ending in VIDEO_ENDINGS else VIDEO_ENDINGS[0]


def _braces(pattern: str) -> list[str]:
    try:
        from braceexpand import braceexpand  # comes with webdataset
    except ImportError as error:
        raise ImportError("patterns of shards need webdataset: pip install webdataset") from error
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DatasetError(f"{pattern}: no valid pattern of shards ({error})") from error


def _read_shard(
    shard: str, members: list[Member], num_classes: int, samples: list[Sample], problems: list[tuple[str, str]]
) -> None:
    """Add the samples of one shard, or what is wrong with them."""
    seen: set[str] = set()
    with open(shard, "rb") as archive:
        for key, group in groupby(members, lambda member: shard_key(member.name)):
            files = list(group)
            videos = [member for member in files if member.name.lower().endswith(VIDEO_ENDINGS)]
            labels = [member for member in files if member.name.lower().endswith(_LABELS)]
            label, listed, problem = None, "", ""
            if key in seen:
                problem = "its files do not lie next to each other"
            elif len(videos) != 1:
                problem = f"expected one video, found {len(videos)}"
            elif not labels:
                problem = "has no label, neither .cls nor .json"
            else:
                label, listed, problem = _label(archive, labels, num_classes)
            seen.add(key)
            if problem or label is None:
                problems.append((f"{shard}/{key}", problem))
            else:
                samples.append(Sample(replace(videos[0], listed=listed, start=files[0].start), label))


def _label(archive: Any, members: list[Member], num_classes: int) -> tuple[int | None, str, str]:
    """The label of one sample, the name of its video in the list it comes from, and what is wrong."""
    label, listed = None, ""
    for member in members:
        archive.seek(member.offset)
        text = archive.read(member.size).decode(errors="replace")
        value: Any = text.strip()
        if member.name.lower().endswith(".json"):
            try:
                content = json.loads(text)
            except ValueError:
                content = None
            if not isinstance(content, dict):
                return None, "", ".json holds no object"
            listed = str(content.get("path", ""))
            if "label" not in content and len(members) > 1:
                continue
            value = str(content.get("label", "nothing"))
        if not (value.isascii() and value.isdecimal() and int(value) < num_classes):
            return None, "", f"label {value!r} is not one of 0 to {num_classes - 1} ({num_classes} classes)"
        if label not in (None, int(value)):
            return None, "", f"has two labels, {label} and {value}"
        label = int(value)
    return label, listed, "" if label is not None else "has no label"

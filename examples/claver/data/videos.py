"""Where labelled videos are: a list, a folder for each class, a tar file, or WebDataset shards. All give the same samples."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..class_names import class_key
from .lists import VIDEO_ENDINGS, DatasetError, Sample, list_hash, read_list
from .shards import expand_shards, is_shard, read_shards
from .tars import read_members

__all__ = ["VideoList", "kind_of", "read_folder", "read_tar", "read_videos"]


@dataclass(frozen=True)
class VideoList:
    """The labelled videos of one source.

    Attributes:
        path: of the source, as given.
        kind: "list", "folder", "tar" or "shards".
        samples: in the order of the source; those of folders and tar files in the order of their names.
        hash: `list_hash`, which is equal for equal names, labels and order, whatever the kind.
    """

    path: str
    kind: str
    samples: list[Sample]
    hash: str


def read_videos(path: str | os.PathLike[str], root: str | os.PathLike[str] | None, classes: Sequence[str]) -> VideoList:
    """The videos of any kind of source.

    - A text file of `path label` lines or a CSV file with the columns `path,label`, of files under `root`.
    - A folder with a folder of videos for each class, or a plain tar file of such a folder. These are named as the classes
      are, but for spelling: `ApplyEyeMakeup`, `apply_eye_makeup` and `apply eye makeup` are one.
    - WebDataset shards, of `key.mp4` and `key.cls` or `key.json`: one tar file, a folder of them, a glob, or a pattern such
      as `shards-{000000..000009}.tar`.

    Raises:
        DatasetError: a source that is missing or damaged; lines, folders or members that are not valid, all of them named.
    """
    path = os.fspath(path)
    kind = kind_of(path)
    if kind == "shards":
        samples = read_shards(path, len(classes))
    elif kind == "folder":
        samples = read_folder(path, classes)
    elif kind == "tar":
        samples = read_tar(path, classes)
    else:
        samples = read_list(path, root, len(classes))
    return VideoList(path, kind, samples, list_hash(samples, path if kind == "folder" else root))


def kind_of(path: str | os.PathLike[str]) -> str:
    """What `read_videos` takes a path for: "list", "folder", "tar" or "shards".

    Raises:
        DatasetError: a tar file that cannot be read.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return "shards" if any(Path(path).glob("*.tar")) else "folder"
    if os.path.isfile(path):
        if path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            return "shards" if is_shard(path) else "tar"
        return "list"
    return "shards" if expand_shards(path) != [path] else "list"


def read_folder(path: str | os.PathLike[str], classes: Sequence[str]) -> list[Sample]:
    """The videos `class/name` below a folder, in the order of these names.

    Raises:
        DatasetError: no videos; folders that are no classes, or files that are no videos or elsewhere, all of them named.
    """
    root = Path(path)
    names = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += ["/".join(Path(folder, name).relative_to(root).parts) for name in files if not name.startswith(".")]
    labels = _labels(str(path), names, classes)
    return [Sample(os.path.join(path, name), label) for name, label in labels.items()]


def read_tar(path: str | os.PathLike[str], classes: Sequence[str]) -> list[Sample]:
    """The videos `class/name` in a tar file, in the order of these names; a folder about all of it is passed over.

    Raises:
        DatasetError: as `read_folder`, and a tar file that is not as `read_members` wants it.
    """
    members = {member.name: member for member in read_members(path)}
    outer = {name.partition("/")[0] for name in members}
    cut = ""
    if len(outer) == 1 and all(name.count("/") == 2 for name in members):
        cut = f"{outer.pop()}/"
    inside = {name.removeprefix(cut): member for name, member in members.items()}
    labels = _labels(str(path), list(inside), classes)
    return [Sample(replace(inside[name], listed=name), label) for name, label in labels.items()]


def _labels(source: str, names: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """The labels of the videos among names `class/file`, sorted; names without a folder that are no videos are not of the set."""
    known = {class_key(name): label for label, name in enumerate(classes)}
    labels: dict[str, int] = {}
    folders: dict[str, str] = {}  # by class
    problems: dict[str, str] = {}
    for name in sorted(names):
        folder, _, file = name.partition("/")
        video = file.lower().endswith(VIDEO_ENDINGS)
        if not file:
            if name.lower().endswith(VIDEO_ENDINGS):
                problems[name] = "is in no class's folder"
        elif "/" in file:
            problems[name] = "is too deep; videos are in their class's folder"
        elif class_key(folder) not in known:
            problems[folder] = f"is the name of no class{_nearest(folder, classes)}"
        elif folders.setdefault(class_key(folder), folder) != folder:
            problems[folder] = f"is the same class as {folders[class_key(folder)]}"
        elif not video:
            problems[name] = f"is no video by its ending ({' '.join(VIDEO_ENDINGS)})"
        else:
            labels[name] = known[class_key(folder)]
    if problems:
        raise DatasetError(
            f"{source}: not one folder of videos for each class ({len(problems)} faults):", list(problems.items())
        )
    if not labels:
        raise DatasetError(f"{source}: no videos in it; expected class/video{VIDEO_ENDINGS[0]}")
    return labels


def _refuse(error: OSError) -> None:
    raise DatasetError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _nearest(folder: str, classes: Sequence[str]) -> str:
    by_key = {class_key(name).lower(): name for name in classes}
    near = difflib.get_close_matches(class_key(folder).lower(), by_key, n=1, cutoff=0.0)
    return f"; the nearest is {by_key[near[0]]!r}" if near else ""

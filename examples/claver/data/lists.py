"""Lists of labelled videos and of classes: what they hold, and errors that name every fault in them."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .tars import Member

__all__ = ["VIDEO_ENDINGS", "DatasetError", "Sample", "csv_rows", "list_hash", "read_labels", "read_list"]

VIDEO_ENDINGS = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv",
)  # fmt: skip
"""Of the names of videos in folders and tar files; a list may name any file."""

_NAMED = 20  # problems that an error message names


class Sample(NamedTuple):
    """A video, which is a file or a member of a tar file, and its class."""

    path: str | Member
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
    """Class names in the order of their ids, from a CSV file whose first columns are `id,name`, or `id;name`.

    Raises:
        DatasetError: another header, a malformed line, a repeated name, or ids that are not 0, 1, ... once each.
    """
    names: dict[int, str] = {}
    seen: dict[str, int] = {}
    problems = []
    for line, row in csv_rows(path, ["id", "name"], further=True):
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
        rows = csv_rows(path, ["path", "label"])
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


def list_hash(samples: Sequence[Sample], root: str | os.PathLike[str] | None = None) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a list, for logs; paths count relative to `root`, or to the tar file."""
    digest = hashlib.sha256()
    for path, label in samples:
        if isinstance(path, str):
            name = os.path.relpath(path, root) if root else path
        else:
            name = path.listed or path.name
        digest.update(f"{Path(name).as_posix()}\0{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


def _lines(path: str | os.PathLike[str]) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error


def csv_rows(path: str | os.PathLike[str], columns: list[str], *, further: bool = False) -> list[tuple[int, list[str]]]:
    """The rows below the header, which must be `columns`, each with its line number.

    With `further` there may be more columns after these; they are cut off from the rows that have them all. Between columns is
    a comma, or a semicolon if the header has it.
    """
    lines = _lines(path)
    reader = csv.reader(lines, delimiter=";" if lines[0].replace(" ", "").startswith(";".join(columns)) else ",")
    header = [name.strip() for name in next(reader, [])]
    if (header[: len(columns)] if further else header) != columns:
        raise DatasetError(f"{path}: the first line must be {','.join(columns)}, got {','.join(header)!r}")
    return [(reader.line_num, row[: len(columns)] if len(row) == len(header) else row) for row in reader if row]


def _integer(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.removeprefix("-").isdecimal() and text.isascii() else None

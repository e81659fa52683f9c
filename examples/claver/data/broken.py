"""Videos that are missing or broken: found before a run, counted during it, and always named."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from .lists import DatasetError, Sample
from .tars import Member

__all__ = ["BrokenFiles", "broken_files", "check_files", "file_problems"]


class BrokenFiles:
    """The files of a list that a training passes over; `reasons` says why, by their names.

    `replaced` counts the clips of this epoch in whose place others came, in this process.

    Args:
        samples: of the list.
        share: of its files that may be missing or broken, 0 to 1; None: not one.
    """

    def __init__(self, samples: Sequence[Sample], share: float | None) -> None:
        self.names = list(dict.fromkeys(str(sample.path) for sample in samples))
        self.expected = len(self.names)
        self.share = share
        self.reasons: dict[str, str] = {}
        self.replaced = 0

    def add(self, problems: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Take note of `(name, reason)`; returns those of files that were not known to be broken.

        Raises:
            DatasetError: there are more of them than may be; it lists all.
        """
        new = {name: reason for name, reason in problems if name not in self.reasons}
        self.reasons |= new
        if len(self.reasons) > (self.share or 0) * self.expected:
            why = "" if self.share is None else f"more than data.max_broken = {self.share:g} of them"
            raise broken_files(sorted(self.reasons.items()), self.expected, why)
        return list(new.items())

    def places(self) -> dict[int, str]:
        """`reasons` by the places of the files in the list, which stay what they are where the folder of the videos is moved."""
        return {place: self.reasons[name] for place, name in enumerate(self.names) if name in self.reasons}


def check_files(samples: Sequence[Sample]) -> None:
    """Check that every file of a list is there and not empty; what is in them, `scan` looks at.

    Raises:
        DatasetError: names the missing or empty files with the reasons, and counts found and expected ones.
    """
    problems = file_problems(samples)
    if problems:
        raise broken_files(problems, len({sample.path for sample in samples}))


def file_problems(samples: Sequence[Sample], *, num_threads: int = 4) -> list[tuple[str, str]]:
    """`(name, reason)` of the files of a list that are missing or empty, each once."""
    paths = list(dict.fromkeys(sample.path for sample in samples))
    with ThreadPoolExecutor(num_threads) as pool:  # on a network a look at a file is a round trip
        reasons = list(pool.map(_problem, paths))
    return [(str(path), reason) for path, reason in zip(paths, reasons, strict=True) if reason]


def broken_files(problems: Sequence[tuple[str, str]], expected: int, why: str = "") -> DatasetError:
    """The error, to be raised, for `(name, reason)` of the broken ones of `expected` files."""
    found = expected - len(problems)
    remark = f", {why}" if why else ""
    return DatasetError(f"found {found} of {expected} videos, {len(problems)} missing or broken{remark}:", problems)


def _problem(path: str | Member) -> str:
    if isinstance(path, Member):
        return "" if path.size else "the file is empty (0 bytes)"
    if not os.path.exists(path):
        return "no such file"
    if not os.path.isfile(path):
        return "not a file"
    return "" if os.path.getsize(path) else "the file is empty (0 bytes)"

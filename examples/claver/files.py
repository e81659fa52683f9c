"""Writing files so that whoever reads them finds the old one or the new one, and never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["PARTIAL", "replace_file"]

PARTIAL = ".partial"  # ends the names of files that are being written; one that a killed process left is of no use


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """A context that gives a path to write to, and at its end gives what was written the name `path`.

    What is at `path` is whole at any moment, also if the process is killed or the machine stops. When the context ends with
    an error, or Ctrl-C, `path` is as it was and nothing else is left.

    Raises:
        OSError: a folder that cannot be written to, a full disk.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the error that is told is the first one
            partial.unlink()
        raise
    with suppress(OSError):  # some file systems, and Windows, open or flush no folders
        _to_disk(path.parent, os.O_RDONLY)


def _to_disk(path: Path, flags: int = os.O_RDWR) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

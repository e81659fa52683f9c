"""Writing files so that whoever reads them finds the old one or the new one, and never a part."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["PARTIAL", "give_name", "partial_of", "replace_file", "write_text"]

PARTIAL = ".partial"  # ends the names of files that are being written; one that a killed process left is of no use


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """A context that gives a path to write to, and at its end gives what was written the name `path`.

    What is at `path` is whole at any moment, also if the process is killed or the machine stops. When the context ends with
    an error, or Ctrl-C, `path` is as it was and nothing else is left; what a killed process left, the next one removes.

    Write to the file of that name itself: `safetensors.torch.save_file` writes to one of its own beside it, which a kill leaves.

    Raises:
        OSError: a folder that cannot be written to, a full disk.
    """
    partial = partial_of(path)
    try:
        yield partial
        give_name(partial, path)
    except BaseException:
        with suppress(OSError):  # the error that is told is the first one
            partial.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text as `replace_file` does, in UTF-8."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def partial_of(path: str | Path) -> Path:
    """Where this process writes what `give_name` will call `path`; those of processes that are gone are removed.

    It is in the same folder, as only within a disk a file gets another name at once.
    """
    path = Path(path)
    left = re.compile(rf"{re.escape(path.name)}\.(\d+){re.escape(PARTIAL)}")
    with suppress(OSError):  # a folder that is not there yet; and what cannot be removed does no harm
        for name in os.listdir(path.parent):
            if (match := left.fullmatch(name)) and not _is_running(int(match[1])):
                path.with_name(name).unlink(missing_ok=True)
    return path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")


def give_name(partial: Path, path: str | Path) -> None:
    """Give what was written to `partial` the name `path`, once it is on the disk."""
    _to_disk(partial)
    partial.replace(path)
    with suppress(OSError):  # some file systems, and Windows, open or flush no folders
        _to_disk(partial.parent, os.O_RDONLY)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere this signal is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user; no number of a process
        return True
    return True


def _to_disk(path: Path, flags: int = os.O_RDWR) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

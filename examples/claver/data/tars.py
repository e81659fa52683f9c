"""Videos inside plain tar files, read where they lie: nothing is extracted."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from .lists import DatasetError

__all__ = ["ByteRange", "Member", "read_members"]

_BLOCK = tarfile.BLOCKSIZE
_PADDING = 1 << 20  # bytes; the most zeros that a writer appends to the end mark of an archive


@dataclass(frozen=True)
class Member:
    """A file in a tar file.

    Attributes:
        archive: path of the tar file.
        name: of the member, with `/` and without `./`.
        offset: where its content begins, in bytes.
        size: of its content, in bytes.
        start: where its header begins, in bytes.
        listed: the name that it had in the list that was packed, where the archive says so.
        data: its content, if it has been read already.
    """

    archive: str
    name: str
    offset: int
    size: int
    start: int = 0
    listed: str = ""
    data: bytes | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def open(self) -> BinaryIO:
        """The content, as a file that can be sought in. Raises OSError if the archive cannot be opened."""
        if self.data is not None:
            return ByteRange(io.BytesIO(self.data), 0, self.size, self.name)  # type: ignore[return-value]
        archive = open(self.archive, "rb")  # noqa: SIM115
        return ByteRange(archive, self.offset, self.offset + self.size, self.name)  # type: ignore[return-value]


class ByteRange(io.RawIOBase):
    """The bytes `start .. stop` of a file, as a file of the name `name`; closing it closes the other."""

    def __init__(self, file: BinaryIO, start: int, stop: int, name: str = "") -> None:
        self.name = name
        self._file = file
        self._start, self._length = start, stop - start
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to byte {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(count)
        count = len(content)
        memoryview(buffer)[:count] = content
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def read_members(path: str | os.PathLike[str]) -> list[Member]:
    """The files in a tar file in their order, from its headers alone; hidden ones are other programs' and left out.

    Raises:
        DatasetError: no such file, compressed, damaged or cut off; or members, all of them named, that are links or
            devices, lie outside of the archive's folder or twice at the same place.
    """
    path = os.fspath(path)
    members: dict[str, Member] = {}
    problems: list[tuple[str, str]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                parts = PurePosixPath(info.name).parts
                name = "/".join(parts)
                problem = _problem(info, parts)
                if not problem and name in members:
                    problem = "is in the archive twice"
                if problem:
                    problems.append((info.name, problem))
                elif info.isreg() and not any(part.startswith(".") for part in parts):
                    members[name] = Member(path, name, info.offset_data, info.size, info.offset)
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            end = archive.offset
        _check_end(path, end)
    except tarfile.TarError as error:
        raise DatasetError(
            f"{path}: no plain tar file, or a damaged one ({error}); a compressed one must be unpacked and packed with tar cf"
        ) from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error
    if problems:
        raise DatasetError(f"{path}: {len(problems)} members are refused:", problems)
    return list(members.values())


def _problem(info: tarfile.TarInfo, parts: tuple[str, ...]) -> str:
    if info.issym() or info.islnk():
        return f"is a link (to {info.linkname})"
    if not info.isreg() and not info.isdir():
        return "is neither a file nor a folder"
    if info.issparse():
        return "is stored sparsely; pack it without --sparse"
    if info.name.startswith("/") or "\\" in info.name or ":" in info.name.partition("/")[0]:
        return "has an absolute path or one of another system"
    return "leaves the folder of the archive" if ".." in parts else ""


def _check_end(path: str, end: int) -> None:
    """Raise unless at byte `end`, where reading stopped, is the end mark and nothing after it.

    The tar reader takes a damaged header, or a cut between two members, for the end.
    """
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(_BLOCK)
        if len(mark) < _BLOCK:
            raise DatasetError(f"{path}: the file is truncated: it has no end mark at byte {end}")
        if any(mark):
            raise DatasetError(f"{path}: the file is damaged: no header at byte {end}")
        rest = file.read(_PADDING + 1)
        if any(rest) or len(rest) > _PADDING:
            raise DatasetError(
                f"{path}: goes on after its end mark at byte {end}; archives that were joined must be packed anew"
            )

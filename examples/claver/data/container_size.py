"""How long a video file says that it is: what tells a truncated one from a shorter one."""

from __future__ import annotations

import os
from typing import BinaryIO

__all__ = ["declared_size"]


def declared_size(file: BinaryIO) -> int:
    """The least number of bytes that the outermost structure of an MP4, Matroska or AVI file asks for; 0 if unknown."""
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        return size if size < 0xFFFFFFF0 else 0  # without its own header: some writers count that in
    if head[:4] == b"\x1aE\xdf\xa3":
        return _matroska_size(file)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return _mp4_size(file)
    return 0


def _mp4_size(file: BinaryIO) -> int:
    total = file.seek(0, os.SEEK_END)
    position = 0
    while position + 8 <= total:
        file.seek(position)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8:  # 0: up to the end of the file
            return 0
        if position + size > total:
            return (
                position + size if kind in (b"mdat", b"moov", b"moof", b"mfra") else 0
            )  # else: junk after the last box
        position += size
    return 0


def _matroska_size(file: BinaryIO) -> int:
    def size_field() -> int | None:
        first = file.read(1)
        if not first or first[0] == 0:
            return None
        extra = 8 - first[0].bit_length()
        bits = 7 * (extra + 1)
        value = int.from_bytes(first + file.read(extra), "big") & ((1 << bits) - 1)
        return None if value == (1 << bits) - 1 else value  # all ones: unknown, a live stream

    file.seek(4)
    header = size_field()
    if header is None:
        return 0
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != b"\x18S\x80g":
        return 0
    body = size_field()
    return 0 if body is None else file.tell() + body

"""Video decoding with PyAV: exact frame counts and exact frames by index, or an error that names the file.

Frame `i` of a file is the `i`-th frame in presentation order that a plain decode from start to end shows.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from operator import index as as_index

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from .container_size import declared_size
from .tars import Member

__all__ = ["VideoError", "VideoInfo", "iterate_frames", "probe", "read_clip", "read_frames"]

Choose = Callable[[int], Iterable[int] | torch.Tensor]
"""Which frames of so many are wanted; may be asked more than once, with other numbers."""

# Containers that store a presentation time with every packet and have an index to seek with.
_TIMED_CONTAINERS = ("mov", "matroska")
# Codecs whose every packet shows exactly one frame. Others (VP8 hides, MPEG-4 skips some) are counted by decoding.
_PACKET_IS_FRAME = ("h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg")
# FFmpeg renders text as video, or follows the addresses in a playlist; a data set holds neither.
_NOT_A_VIDEO = ("tty", "hls", "concat", "lavfi")
# Decoding this many frames costs about as much as one seek.
_SEEK_GAIN = 8


class VideoError(ValueError):
    """A video that cannot be read, or not to the frame asked for; the message names the file and what was wrong."""


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` found in a video, which is a file or a member of a tar file.

    `width` and `height` are pixels as displayed (after rotation), `duration` is seconds, the last frame's included, and
    `fps` is the mean frames per second, `num_frames / duration` (0 if the file gives no times).
    `timestamps[i]` is the presentation time of frame `i` in units of `time_base` seconds, strictly increasing, or None
    where the file does not give reliable ones and must be decoded from its start. `keyframes` are the indices at which
    decoding can start, increasing, empty if `timestamps` is None.
    """

    path: str | Member
    num_frames: int
    fps: float
    width: int
    height: int
    duration: float
    time_base: Fraction
    timestamps: tuple[int, ...] | None = field(repr=False)
    keyframes: tuple[int, ...] = field(repr=False)


@dataclass
class _Packets:
    """What demuxing a stream to its end showed, without decoding."""

    shown: list[int | None] = field(default_factory=list)  # presentation times of the packets that are to be displayed
    hidden: list[int | None] = field(default_factory=list)  # and of those outside the edit list
    keys: set[int | None] = field(default_factory=set)
    last_duration: int = 0
    cut: bool = False  # the end of the file cuts the last packet short

    @property
    def timed(self) -> bool:
        """Whether every packet has a presentation time of its own."""
        times = self.shown + self.hidden
        return None not in times and len(set(times)) == len(times)


def probe(path: str | os.PathLike[str] | Member) -> VideoInfo:
    """Count the frames of a video file, exactly, and learn where decoding can start.

    Reads all packets and decodes one frame. Headers that state a number of frames are not trusted. Codecs and
    containers that do not tell frames from their packets (MPEG-4 in AVI, VP8) are decoded to be counted.

    Raises:
        VideoError: the file is missing, empty, a directory, no video, damaged at its start, or truncated. A truncated
            MPEG transport stream, or an MP4 cut between two fragments, cannot be told from a shorter one.
    """
    return _survey(path)[0]


def read_clip(path: str | os.PathLike[str] | Member, choose: Choose) -> torch.Tensor:
    """Count the frames of a video and decode those at the indices `choose(num_frames)`: `probe` and `read_frames` in one.

    A video that must be decoded to be counted is decoded once: the frames are kept that would be chosen if every packet
    were one, which nearly always turns out so; if not, they are decoded anew.

    Raises:
        VideoError: all that `probe` and `read_frames` raise.
    """
    info, kept = _survey(path, choose)
    numbers = _integers(choose(info.num_frames))
    if kept is None or not kept.keys() >= set(numbers):
        return read_frames(info, numbers)
    return _stack(info, numbers, kept)


def _survey(
    path: str | os.PathLike[str] | Member, choose: Choose | None = None
) -> tuple[VideoInfo, dict[int, np.ndarray] | None]:
    """What `probe` tells, and the frames that were likely to be chosen, if the video was decoded on the way and is sound."""
    path = path if isinstance(path, Member) else os.fspath(path)
    with _open(path) as (container, stream):
        packets, first = _demux(container, stream)
        _check_complete(path, packets, max(stream.frames, len(stream.index_entries)))
        if first is None:
            raise VideoError(f"{path}: found no frame that can be decoded in {len(packets.shown)} packets")
        timed = _is(container, _TIMED_CONTAINERS) and packets.timed
        times = packets.shown
        if timed:
            times = [*sorted(time for time in packets.shown if time is not None)]
        counted = timed and stream.codec_context.name in _PACKET_IS_FRAME and first.pts == times[0]
        time_base, rate = stream.time_base or Fraction(1, 1000), stream.average_rate
    width, height = (first.height, first.width) if _quarter_turns(first) % 2 else (first.width, first.height)
    kept = None
    if not counted:
        likely = _integers(choose(len(packets.shown))) if choose and packets.shown else []
        times, kept = _count(path, set(likely), _RGB(path, width, height))
        timed = timed and _increasing(times) and set(times) <= set(packets.shown)

    span = _span(times) * time_base if timed else Fraction(0)
    frame_time = packets.last_duration * time_base or (1 / rate if rate else Fraction(0))
    duration = len(times) / rate if rate and not timed else span + frame_time
    info = VideoInfo(
        path=path,
        num_frames=len(times),
        fps=float(len(times) / duration) if duration else 0.0,
        width=width,
        height=height,
        duration=float(duration),
        time_base=time_base,
        timestamps=tuple(time for time in times if time is not None) if timed else None,
        keyframes=tuple(i for i, time in enumerate(times) if time in packets.keys) if timed else (),
    )
    return info, kept


def _count(path: str | Member, likely: set[int], to_rgb: _RGB) -> tuple[list[int | None], dict[int, np.ndarray] | None]:
    """The times of all frames in the order of a plain decode, and the `likely` ones, or None if not all frames are sound."""
    times: list[int | None] = []
    kept: dict[int, np.ndarray] | None = {}
    with _open(path) as (container, stream):
        for i, frame in enumerate(_decode(container, stream)):
            times.append(frame.pts)
            if kept is None or frame.is_corrupt:
                kept = None
            elif i in likely:
                try:
                    kept[i] = to_rgb(frame, i)
                except VideoError:  # `read_frames` says so if it is wanted in the end
                    kept = None
    return times, kept


def read_frames(
    video: str | os.PathLike[str] | Member | VideoInfo, indices: Iterable[int] | Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """Decode the frames at `indices`, in any order and with repeats, as uint8 RGB `(len(indices), H, W, 3)`.

    They are equal to those of a decode from start to end, and turned upright if the file says how. Seeks to the
    nearest keyframe where this saves decoding; a file that cannot be seeked exactly is decoded from its start.

    Raises:
        VideoError: an index out of range, a frame that is missing or that the decoder reports as damaged, and all
            that `probe` raises.
    """
    info = video if isinstance(video, VideoInfo) else probe(video)
    numbers = _integers(indices)
    for i in numbers:
        if not 0 <= i < info.num_frames:
            raise VideoError(f"{info.path}: frame {i} is out of range, the video has {info.num_frames} frames")

    wanted = sorted(set(numbers))
    found: dict[int, np.ndarray] = {}
    try:
        complete = _read_by_seeking(info, wanted, found)
    except VideoError:  # perhaps only because of the seek
        complete = False
    if not complete:
        found.clear()
        _read_in_sequence(info, wanted, found)
    missing = [i for i in wanted if i not in found]
    if missing:
        count = f"found {len(found)} of {len(wanted)} frames asked for"
        raise VideoError(
            f"{info.path}: {count}, frame {missing[0]} of {info.num_frames} is missing or cannot be decoded"
        )

    return _stack(info, numbers, found)


def iterate_frames(info: VideoInfo, *, every: int = 1, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Decode a file once from its start, a frame at a time: `(index, uint8 RGB (H, W, 3))` of each `every`-th from `start` on.

    They are those of `read_frames`, and memory is that of one frame however long the video is.

    Raises:
        VideoError: a frame that is missing or that the decoder reports as damaged, when it is reached.
    """
    position: dict[int | None, int] = {time: i for i, time in enumerate(info.timestamps or ())}
    to_rgb = _RGB(info.path, info.width, info.height)
    reached = 0
    with _open(info.path) as (container, stream):
        for count, frame in enumerate(_decode(container, stream)):
            i = position.get(frame.pts, -1) if position else count
            if i < 0:  # none of those that `probe` has counted; `read_frames` passes over it too
                continue
            if i != reached:
                break
            _check_frame(info, frame, i)
            reached += 1
            if i >= start and (i - start) % every == 0:
                yield i, to_rgb(frame, i)
    if reached < info.num_frames:
        raise VideoError(f"{info.path}: frame {reached} of {info.num_frames} is missing or cannot be decoded")


def _read_by_seeking(info: VideoInfo, wanted: Sequence[int], found: dict[int, np.ndarray]) -> bool:
    """Put the `wanted` (sorted) frames in `found`; False where only a decode from the start can tell."""
    if info.timestamps is None:
        return False
    position: dict[int | None, int] = {time: i for i, time in enumerate(info.timestamps)}
    to_rgb = _RGB(info.path, info.width, info.height)
    with _open(info.path) as (container, stream):
        frames = _decode(container, stream)
        start = reached = 0  # decoding began at frame `start`; all before `reached` were decoded or skipped
        for index in wanted:
            place = bisect.bisect_right(info.keyframes, index) - 1
            key = info.keyframes[place] if place >= 0 else 0
            if key - reached >= _SEEK_GAIN:
                container.seek(info.timestamps[key], stream=stream)
                frames, start, reached = _decode(container, stream), key, key
            for frame in frames:
                i = position.get(frame.pts, -1)
                if 0 <= i < start:  # a leading frame of an open group, whose references lie before the seek
                    continue
                if i != reached:
                    return False
                _check_frame(info, frame, i)
                reached = i + 1
                if i == index:
                    found[i] = to_rgb(frame, i)
                    break
            else:
                return False
    return True


def _read_in_sequence(info: VideoInfo, wanted: Sequence[int], found: dict[int, np.ndarray]) -> None:
    """Put the `wanted` (sorted) frames in `found`, decoding the file from its start."""
    position: dict[int | None, int] = {time: i for i, time in enumerate(info.timestamps or ())}
    remaining = set(wanted)
    to_rgb = _RGB(info.path, info.width, info.height)
    with _open(info.path) as (container, stream):
        for count, frame in enumerate(_decode(container, stream)):
            i = position.get(frame.pts, -1) if position else count
            _check_frame(info, frame, i)
            if i in remaining:
                remaining.remove(i)
                found[i] = to_rgb(frame, i)
            if not remaining:
                return


def _integers(indices: Iterable[int] | torch.Tensor) -> list[int]:
    return [as_index(i) for i in (indices.tolist() if isinstance(indices, torch.Tensor) else indices)]


def _stack(info: VideoInfo, numbers: Sequence[int], found: dict[int, np.ndarray]) -> torch.Tensor:
    out = np.empty((len(numbers), info.height, info.width, 3), dtype=np.uint8)
    for row, i in enumerate(numbers):
        out[row] = found[i]
    return torch.from_numpy(out)


def _check_frame(info: VideoInfo, frame: VideoFrame, index: int) -> None:
    """Refuse a frame that the decoder patched up."""
    if frame.is_corrupt:
        raise VideoError(f"{info.path}: frame {index} of {info.num_frames} is damaged")


class _RGB:
    """Conversion of the frames of one video to upright RGB arrays of one size."""

    def __init__(self, path: str | Member, width: int, height: int) -> None:
        self.path, self.width, self.height = path, width, height
        self.reformatter = VideoReformatter()  # one for all frames: it keeps its tables

    def __call__(self, frame: VideoFrame, index: int) -> np.ndarray:
        array = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        array = np.rot90(array, _quarter_turns(frame))
        if array.shape != (self.height, self.width, 3):
            raise VideoError(
                f"{self.path}: frame {index} is {array.shape[1]}x{array.shape[0]} pixels, "
                f"but the first is {self.width}x{self.height}; re-encode the file at one size"
            )
        return array


def _quarter_turns(frame: VideoFrame) -> int:
    """Counter-clockwise quarter turns that bring a frame upright."""
    return round(frame.rotation / 90) % 4


@contextmanager
def _open(path: str | Member) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the video stream of a file; everything that PyAV raises inside becomes a `VideoError`."""
    _check_file(path)
    container = file = None
    try:
        file = None if isinstance(path, str) else path.open()
        # The protocol is named, so that a path with a colon is not taken for an address.
        container = av.open(
            f"file:{path}" if file is None else file,
            options={"protocol_whitelist": "file"},
            metadata_errors="replace",
        )
        assert isinstance(container, InputContainer)
        if _is(container, _NOT_A_VIDEO):
            raise VideoError(f"{path}: is not a video file (format {container.format.name})")
        streams = [s for s in container.streams.video if Disposition.attached_pic not in s.disposition]
        if not streams:
            kinds = sorted({s.type for s in container.streams})
            raise VideoError(f"{path}: has no video stream (it has {', '.join(kinds) or 'no streams at all'})")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(f"{path}: this build of FFmpeg has no decoder for the video stream")
        stream.codec_context.thread_count = 1  # data loader workers are the parallelism; threads would outlive seeks
        yield container, stream
    except (av.FFmpegError, OSError) as error:
        _check_complete(path)
        what = "cannot be decoded" if container is not None else "is not a video file that FFmpeg can read"
        raise VideoError(f"{path}: {what} ({getattr(error, 'strerror', None) or error})") from error
    finally:
        if container is not None:
            container.close()
        if file is not None:
            file.close()


def _check_file(path: str | Member) -> None:
    if isinstance(path, Member):
        if path.data is None and not os.path.isfile(path.archive):
            raise VideoError(f"{path}: the tar file is not there any more")
        if path.size == 0:
            raise VideoError(f"{path}: the file is empty (0 bytes)")
        return
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise VideoError(f"{path}: is a {'directory' if os.path.isdir(path) else 'device or pipe'}, not a video file")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path}: no permission to read the file")
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes)")


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for packet in container.demux(stream):
        yield from _decode_packet(packet)


def _decode_packet(packet: Packet) -> Iterator[VideoFrame]:
    for frame in packet.decode():
        assert isinstance(frame, VideoFrame)
        yield frame


def _demux(container: InputContainer, stream: VideoStream) -> tuple[_Packets, VideoFrame | None]:
    """Go through all packets, and decode the first frame."""
    packets, first = _Packets(), None
    for packet in container.demux(stream):
        if first is None:
            first = next(_decode_packet(packet), None)
        if packet.size == 0:  # the flush packet at the end
            continue
        (packets.hidden if packet.is_discard else packets.shown).append(packet.pts)
        packets.cut = packet.is_corrupt
        packets.last_duration = packet.duration or packets.last_duration
        if packet.is_keyframe:
            packets.keys.add(packet.pts)
    return packets, first


def _is(container: InputContainer, formats: Iterable[str]) -> bool:
    return not set(container.format.name.split(",")).isdisjoint(formats)


def _increasing(times: Sequence[int | None]) -> bool:
    known = [time for time in times if time is not None]
    return len(known) == len(times) and all(a < b for a, b in pairwise(known))


def _span(times: Sequence[int | None]) -> int:
    known = [time for time in times if time is not None]
    return known[-1] - known[0] if known else 0


def _check_complete(path: str | Member, packets: _Packets | None = None, announced: int = 0) -> None:
    """Raise if the file ends before its container says that it does."""
    with open(path, "rb") if isinstance(path, str) else path.open() as file:
        size, declared = file.seek(0, os.SEEK_END), declared_size(file)
    cut = packets is not None and packets.cut
    if declared <= size and not cut:
        return
    what, reasons = "truncated or damaged", []
    if declared > size:
        what, reasons = "truncated", [f"{size} of {declared} bytes"]
    if packets is not None:
        whole = len(packets.shown) + len(packets.hidden) - packets.cut
        reasons.append(f"found {whole} of {announced} frames" if announced > whole else f"found {whole} whole frames")
    raise VideoError(f"{path}: the file is {what} ({', '.join(reasons)})")

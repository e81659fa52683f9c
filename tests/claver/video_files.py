"""Small video files whose every frame carries its own number, so that a test can tell which frames it was given."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8
SIZE = (96, 64)  # width and height in pixels


def numbered_frame(number: int, width: int, height: int) -> np.ndarray:
    """An RGB frame (H, W, 3): `number` in binary, low bit left, as black and white bars, over a band of grey."""
    bars = np.array([number >> bit & 1 for bit in range(BITS)], dtype=np.uint8) * 215 + 20
    frame = np.repeat(bars, -(-width // BITS))[:width][None, :, None].repeat(height, 0).repeat(3, 2)
    frame[height * 3 // 4 :] = 40 + number * 7 % 170
    return frame


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers on frames (T, H, W, 3)."""
    height, width = frames.shape[1:3]
    centres = (np.arange(BITS) + 0.5) * (-(-width // BITS))
    centres = np.minimum(centres.astype(int), width - 1)
    bits = frames[:, height // 3, centres].mean(-1) > 128
    return [int(value) for value in (bits << np.arange(BITS)).sum(-1)]


def write_video(
    path: Path,
    num_frames: int,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = SIZE,
    pixels: str = "yuv420p",
    gop: int = 12,
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
) -> Path:
    """Write frames numbered 0, 1, ... at 25 a second, or at `times` in milliseconds."""
    width, height = size
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, pixels, gop
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, width, height), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 25) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """Write a second of silence, with no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for _ in range(8):
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_from(source: Path, target: Path, *, seconds: float = 0, skip: int = 0) -> Path:
    """Copy the packets of a video without encoding, to be shown from `seconds` on (what `ffmpeg -ss -c copy` does),
    or without the first `skip` packets."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        shift = round(seconds / stream.time_base)
        for number, packet in enumerate(reader.demux(stream)):
            if packet.dts is not None and number >= skip:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = copy
                writer.mux(packet)
    return target


def keyframe_bytes(path: Path) -> list[tuple[int, int]]:
    """Position and size in the file of each keyframe, in bytes."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.is_keyframe and packet.size]


def decode_all(path: Path) -> np.ndarray:
    """All frames of a video, decoded from start to end: (T, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

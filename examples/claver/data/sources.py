"""Where the frames of a stream come from: a video file, a folder of images, a folder that images are dropped into, a camera.

Each source gives its frames in order as uint8 RGB `(H, W, 3)`, one at a time: none is held once the next is asked for.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from .video import VideoError, iterate_frames, probe

__all__ = ["Source", "natural_order", "open_source", "read_image"]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
POLL = 0.1  # seconds between two looks into a folder

# What Pillow raises for files that are cut off or no images.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)

Frames = Iterator[tuple[int | str, np.ndarray]]


@dataclass(frozen=True)
class Source:
    """Frames of one origin, to be taken once.

    Attributes:
        name: as the user gave it.
        description: what it is and which frames are taken, in words.
        frames: pairs of a frame's name (its number in a video, its file in a folder) and its pixels.
        rate: frames that it gives per second of its time; None if it has none of its own.
    """

    name: str
    description: str
    frames: Frames
    rate: float | None = None


def open_source(
    name: str,
    *,
    frames: int,
    every: int | None = None,
    watch: bool = False,
    idle: float | None = None,
    say: Callable[[str], None] = print,
) -> Source:
    """The source that a name stands for: `camera:0`, a folder, or a video file.

    Args:
        name: of the source.
        frames: that a training clip has.
        every: take each `every`-th frame, from the middle of the first so many on, as evaluation does; None: for a file as far
            apart as a clip of its whole length has them, else all.
        watch: a folder is looked into for new files, without an end.
        idle: seconds without a new file, or without a change of one that is waited for, after which watching ends.
        say: is told of a file that is waited for.

    Raises:
        ValueError: a name that stands for nothing, or a file, folder or camera that cannot be read. While frames are taken:
            one that cannot be read, or in a watched folder one that is still damaged when `idle` is over.
    """
    if name.startswith("camera:"):
        return Source(name, f"each {_ordinal(every or 1)}frame of {name}", _each(_camera(name), every or 1))
    if os.path.isdir(name):
        files = _watched_images(name, idle, say) if watch else _images(name)
        return Source(name, f"each {_ordinal(every or 1)}image of {name}", _each(files, every or 1))
    if watch:
        raise ValueError(f"{name}: --watch looks into a folder, and this is none")
    if not os.path.exists(name):
        raise VideoError(f"{name}: no such file or folder")
    info = probe(name)
    step = max(1, info.num_frames // frames) if every is None else every
    start = min(step // 2, info.num_frames - 1)
    pictures = iterate_frames(info, every=step, start=start)
    count = len(range(start, info.num_frames, step))
    reason = f": {count}, as in a training clip; --every 1 takes all" if every is None and step > 1 else ""
    described = f"each {_ordinal(step)}of {info.num_frames} frames of {name}{reason}"
    return Source(name, described, pictures, info.fps / step if info.fps else None)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """An image file as uint8 RGB `(H, W, 3)`, upright; the upper 8 of 16 bits.

    Raises:
        VideoError: a file that is missing, cut off or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I;16"):
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except _DAMAGED as error:
        raise VideoError(f"{os.fspath(path)}: is no image that can be read ({error})") from error


def natural_order(name: str) -> tuple[Any, ...]:
    """A key for sorting names so that frame2 comes before frame10."""
    parts = re.split(r"(\d+)", name)  # text and numbers by turns
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)], name


def _ordinal(number: int) -> str:
    if number == 1:
        return ""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending} "


def _each(frames: Frames, every: int) -> Frames:
    return (frame for i, frame in enumerate(frames) if i % every == every // 2)


def _image_names(folder: str) -> set[str]:
    """Image files in a folder; hidden ones are other programs' temporary files."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise VideoError(f"{folder}: the folder cannot be read ({error.strerror})") from error
    return {name for name in names if name.lower().endswith(IMAGES) and not name.startswith(".")}


def _images(folder: str) -> Frames:
    names = sorted(_image_names(folder), key=natural_order)
    if not names:
        raise VideoError(f"{folder}: no images in this folder ({', '.join(IMAGES)}); --watch waits for them")
    return ((name, read_image(Path(folder, name))) for name in names)


def _watched_images(folder: str, idle: float | None, say: Callable[[str], None]) -> Frames:
    taken: set[str] = set()
    before: dict[str, tuple[int, int]] = {}
    waiting, last = "", time.monotonic()
    while True:
        names = _image_names(folder)
        taken &= names  # what has been removed need not be remembered
        new = _states(folder, names - taken)
        last = last if new == before else time.monotonic()
        damaged = None
        for name in sorted(new, key=natural_order):
            if before.get(name) != new[name]:  # perhaps still being written; those after it wait, to keep the order
                break
            try:
                image = read_image(Path(folder, name))
            except VideoError as error:
                damaged = error
                if name != waiting:
                    say(f"waiting for {error}")
                waiting = name
                break
            taken.add(name)
            yield name, image
            last = time.monotonic()
        before = {name: state for name, state in new.items() if name not in taken}
        if idle is not None and time.monotonic() - last > idle:
            if damaged is not None:
                raise damaged
            return
        time.sleep(POLL)


def _states(folder: str, names: set[str]) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change of files, without those that have been removed meanwhile."""
    found = {}
    for name in names:
        with suppress(FileNotFoundError):
            stat = os.stat(Path(folder, name))
            found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def _camera(name: str) -> Frames:
    device = name.removeprefix("camera:")
    try:
        import cv2
    except ImportError:
        return _camera_of_av(name, device)
    return _camera_of_cv2(cv2, name, device)


def _camera_of_cv2(cv2: Any, name: str, device: str) -> Frames:
    capture = cv2.VideoCapture(int(device) if device.isdigit() else device)
    if not capture.isOpened():
        capture.release()
        raise VideoError(f"{name}: OpenCV cannot open this camera; is it there, and free?")

    def frames() -> Frames:
        try:
            number = 0
            while True:
                complete, image = capture.read()
                if not complete:
                    raise VideoError(f"{name}: the camera gives no more frames")
                yield number, np.ascontiguousarray(image[..., ::-1])  # OpenCV's are BGR
                number += 1
        finally:
            capture.release()

    return frames()


def _camera_of_av(name: str, device: str) -> Frames:
    if sys.platform == "darwin":
        form, file = "avfoundation", device
    elif sys.platform == "win32":
        form, file = "dshow", f"video={device}"  # DirectShow knows cameras by name
    else:
        form, file = "v4l2", f"/dev/video{device}" if device.isdigit() else device
    try:
        container = av.open(file, format=form)
    except (ValueError, OSError) as error:  # this build of FFmpeg has no such devices, or there is no such camera
        raise VideoError(
            f"{name}: FFmpeg cannot open {file} by {form} ({getattr(error, 'strerror', None) or error}); "
            "is the camera there, and free? pip install opencv-python opens more of them"
        ) from error

    def frames() -> Frames:
        try:
            with container:
                for number, frame in enumerate(container.decode(video=0)):
                    yield number, frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{name}: the camera gives no more frames ({error})") from error
        raise VideoError(f"{name}: the camera gives no more frames")

    return frames()

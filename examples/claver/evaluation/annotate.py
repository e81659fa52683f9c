"""Frames with what a model says of them below, and the mp4 file that they are written to one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import give_name, partial_of

__all__ = ["AnnotatedVideo", "annotate"]

SMALLEST, LARGEST = (
    256,
    1280,
)  # pixels: the height that a picture is enlarged to, and the longer side that it is reduced to
GROUND, BAR, BEST, INK, MUTED = "#16181d", "#3a4453", "#0072b2", "#ffffff", "#a9b1bd"

Prediction = Sequence[tuple[str, float]]


def annotate(image: np.ndarray, predicted: Prediction, caption: str = "") -> np.ndarray:
    """A picture over a panel with a bar for each predicted class: uint8 RGB `(H, W, 3)` to another size, with even sides.

    Small pictures are enlarged so that the text can be read, and large ones reduced.

    Args:
        image: uint8 RGB `(H, W, 3)`.
        predicted: names of classes and their probabilities, 0 to 1, from top to bottom.
        caption: a line above the bars.
    """
    height, width = image.shape[:2]
    scale = min(max(1.0, SMALLEST / height), LARGEST / max(height, width))
    picture = Image.fromarray(image)
    if scale != 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    size_of_text = max(13, min(picture.width, picture.height) // 22)
    row, margin = round(size_of_text * 1.6), size_of_text // 2
    canvas_width = _even(max(picture.width, SMALLEST))
    canvas = Image.new("RGB", (canvas_width, _even(picture.height + (len(predicted) + 1) * row + margin)), GROUND)
    canvas.paste(picture, ((canvas_width - picture.width) // 2, 0))

    draw = ImageDraw.Draw(canvas)
    font: Any = ImageFont.load_default(size_of_text)
    top, room = picture.height, canvas_width - 2 * margin
    draw.text((margin, top + row / 2), _shortened(caption, room, font), fill=MUTED, font=font, anchor="lm")
    for place, (name, probability) in enumerate(predicted):
        top += row
        end = margin + round(room * min(1.0, max(0.0, probability)))
        draw.rectangle((margin, top + 1, canvas_width - margin, top + row - 2), fill=BAR)
        if end > margin:
            draw.rectangle((margin, top + 1, end, top + row - 2), fill=BEST if place == 0 else "#5b7a96")
        value = f"{probability:.0%}"
        left = room - font.getlength(value) - 3 * margin
        middle = top + row / 2
        draw.text((2 * margin, middle), _shortened(name, left, font), fill=INK, font=font, anchor="lm")
        draw.text((canvas_width - 2 * margin, middle), value, fill=INK, font=font, anchor="rm")
    return np.asarray(canvas)


class AnnotatedVideo:
    """An mp4 file that grows by a picture at a time and gets its name at the end, also when the work before it was cut short.

    All pictures have the size of the first; others are fitted into it. Without a picture there is no file.

    Args:
        path: of the file, which ends in .mp4.
        overwrite: whether a file of this name may be replaced.

    Raises:
        ValueError: another ending, or a file that is there already.
        OSError: a folder that cannot be written to, a full disk.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path, self.overwrite = Path(path), overwrite
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"{path}: annotated videos are mp4 files; give it a name that ends in .mp4")
        self._refuse_existing()
        self.partial = partial_of(self.path)
        self.frames = 0
        self._container: Any = None
        self._stream: Any = None

    def add(self, picture: np.ndarray, rate: float) -> None:
        """Encode the next picture, uint8 RGB `(H, W, 3)` with even sides; the first one's rate, per second, is the file's."""
        with self._named_errors():
            if self._container is None:
                self._open(picture, rate)
            stream = self._stream
            if picture.shape[:2] != (stream.height, stream.width):
                picture = _fitted(picture, stream.width, stream.height)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = self.frames, stream.codec_context.time_base
            self._container.mux(stream.encode(frame))
        self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name.

        Raises:
            ValueError: a file of this name has come into being meanwhile; what was written stays beside it.
        """
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            with self._named_errors():
                container.mux(self._stream.encode(None))
                container.close()
        except BaseException:
            self.partial.unlink(missing_ok=True)
            raise
        self._refuse_existing(f"; the new one is {self.partial}")
        give_name(self.partial, self.path)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except av.FFmpegError as error:
            raise OSError(f"{self.path}: cannot be written ({error})") from error

    def _open(self, picture: np.ndarray, rate: float) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        container = av.open(str(self.partial), "w", format="mp4")
        stream: Any = container.add_stream("libx264", rate=_rate(rate), options={"crf": "20", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = picture.shape[0], picture.shape[1], "yuv420p"
        stream.codec_context.time_base = 1 / _rate(rate)
        self._container, self._stream = container, stream

    def _refuse_existing(self, more: str = "") -> None:
        if self.path.is_dir() or (self.path.exists() and not self.overwrite):
            raise ValueError(f"{self.path}: is there already{more}; pass --overwrite, or another name")


def _rate(rate: float) -> Fraction:
    """Frames per second that the file can state; slower than 1 no player shows well."""
    return Fraction(max(1.0, rate)).limit_denominator(1000)


def _even(size: int) -> int:
    return size + size % 2  # what yuv420p can hold


def _fitted(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    scale = min(width / picture.shape[1], height / picture.shape[0])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    canvas = Image.new("RGB", (width, height), GROUND)
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas)


def _shortened(text: str, room: float, font: Any) -> str:
    """The text, or as much of it as there is room for."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"

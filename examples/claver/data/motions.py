"""Writes a small action data set as real video files: one textured object that performs one of eight motions.

The classes are four pairs of opposites, and a clip of one class is a clip of its opposite played backwards: all
randomness (shape, texture, path, speed, distractors) is drawn for the pair, and the frames are put in reverse order for
its second member. So no frame alone and no unordered set of frames can tell opposites apart: a model that is blind to
the order of frames guesses within each pair and cannot be expected to exceed 50 % top-1. The property is exact for the
frames as drawn. Compression codes a frame from its neighbours, and the first frame by itself, which leaves faint traces
of direction in the noise.

A mirrored clip belongs to another class: train without horizontal flips.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from ..files import replace_file, write_text

__all__ = ["MOTIONS", "MotionClip", "MotionDataset", "draw_clip", "opposite", "write_motion_dataset", "write_video"]

MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "turning clockwise",
    "turning counter-clockwise",
    "growing",
    "shrinking",
)
"""Class names by label. Labels `2k` and `2k + 1` are each other's time reversal."""

CONTENT_VERSION = 1  # raise it when the pixels change, so that data sets on disk are written again
MANIFEST = "manifest.json"
NOISE_STD = 4.0  # of 255
FRAME_RATES = (12, 15, 20, 24)  # frames per second, drawn for each clip regardless of its class

FloatArray = npt.NDArray[np.float32]
Pattern = Callable[[FloatArray, FloatArray], FloatArray]  # object coordinates (u, v) -> value of the same shape


@dataclass(frozen=True)
class MotionClip:
    """A clip and where its object is.

    Attributes:
        video: uint8 `(T, size, size, 3)`, RGB.
        mask: float32 `(T, size, size)`, the share of each pixel that the object covers, 0 to 1.
    """

    video: npt.NDArray[np.uint8]
    mask: FloatArray


@dataclass(frozen=True)
class MotionDataset:
    """Where a data set lies: lists of `path label` relative to `root`, and a table of `id,name`."""

    root: Path
    train_list: Path
    test_list: Path
    labels: Path


@dataclass(frozen=True)
class _Path:
    """Poses over time, each float32 `(T,)`: centre and radius in units of the frame's side, angle in radians.

    x points right and y down, so a growing angle turns clockwise on screen.
    """

    x: FloatArray
    y: FloatArray
    angle: FloatArray
    radius: FloatArray


def opposite(label: int) -> int:
    """Returns the label of the motion that is the time reversal of `label`."""
    _check_label(label)
    return label ^ 1


def draw_clip(
    label: int, rng: np.random.Generator, *, size: int = 64, num_frames: int = 24, noise_std: float = NOISE_STD
) -> MotionClip:
    """Draws one clip of a motion.

    From generators in the same state, without noise, clips of opposite labels are exact time reversals of each other.

    Args:
        label: index into `MOTIONS`.
        rng: source of all randomness; the noise is drawn last.
        size: side of the square frames in pixels, 16 or more.
        num_frames: number of frames, 2 or more.
        noise_std: standard deviation of the Gaussian noise, drawn anew for each pixel and frame, in units of 1/255.

    Raises:
        ValueError: for a label, size, number of frames or noise out of range.
    """
    _check_label(label)
    if size < 16 or num_frames < 2 or noise_std < 0:
        raise ValueError(
            "expected size >= 16, num_frames >= 2 and noise_std >= 0, got "
            f"size={size}, num_frames={num_frames}, noise_std={noise_std}"
        )
    path = _draw_path(label // 2, num_frames, rng)
    grid = ((np.arange(size, dtype=np.float32) + 0.5) / size).astype(np.float32)
    xs: FloatArray = np.broadcast_to(grid[None, None, :], (1, size, size))
    ys: FloatArray = np.broadcast_to(grid[None, :, None], (1, size, size))
    background_colors = _draw_colors((0.12, 0.45), 0.5, rng)  # the object is bright, all else darker
    background = _paint(_draw_texture(rng, scale=6.0), xs - np.float32(0.5), ys - np.float32(0.5), background_colors)
    video = np.repeat(background, num_frames, axis=0)

    for _ in range(rng.integers(0, 3)):
        distractor = _draw_distractor_path(num_frames, rng)
        video, _ = _draw_object(video, xs, ys, distractor, _draw_colors((0.3, 0.75), 0.7, rng), rng)
    video, mask = _draw_object(video, xs, ys, path, _draw_colors((0.85, 1.0), 0.8, rng), rng)

    if label % 2:  # the second member of a pair is the first one backwards; everything below treats frames alike
        video, mask = video[::-1], mask[::-1]
    if noise_std:
        video = video + rng.normal(0.0, noise_std / 255.0, video.shape).astype(np.float32)
    pixels = np.clip(np.rint(video * 255.0), 0, 255).astype(np.uint8)
    return MotionClip(np.ascontiguousarray(pixels), np.ascontiguousarray(mask))


def write_video(path: Path, video: npt.NDArray[np.uint8], frame_rate: int) -> None:
    """Encodes RGB frames `(T, H, W, 3)` uint8 as H.264: yuv420p, groups of 12 frames with B-frames.

    The same frames give the same bytes on the same build of FFmpeg. The file gets its name when it is complete.

    Raises:
        ImportError: PyAV is missing.
        ValueError: a wrong shape or dtype, or an odd side, which yuv420p cannot hold.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("writing video files needs PyAV: pip install av") from error
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or video.shape[1] % 2 or video.shape[2] % 2:
        raise ValueError(
            f"video must be uint8 (frames, height, width, 3) with even sides, got {video.dtype} {video.shape}"
        )
    # Without macroblock trees: they look ahead in time, and with them x264's output varies from run to run.
    options = {"crf": "14", "preset": "veryfast", "g": "12", "bf": "2", "threads": "1", "x264-params": "mbtree=0"}
    with (
        replace_file(path) as partial,
        av.open(str(partial), "w", format="mp4", container_options={"fflags": "+bitexact"}) as container,
    ):
        stream: Any = container.add_stream("libx264", rate=Fraction(frame_rate), options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for image in video:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_motion_dataset(
    root: str | Path,
    *,
    num_train: int,
    num_test: int,
    size: int = 64,
    num_frames: int = 24,
    seed: int = 0,
    progress: bool = True,
) -> MotionDataset:
    """Writes `videos/*.mp4`, `train.txt`, `test.txt` and `labels.csv` under `root`, or finds them there.

    A complete data set of the same parameters is reused; anything else is written again. Classes are balanced to within
    one clip. Every clip has its own generator, so the first clips of a larger data set have the same pixels only if
    their labels agree; use the same counts to reproduce a run.

    Args:
        root: folder, made if it is absent.
        num_train: number of training clips, 1 or more.
        num_test: number of test clips, 1 or more.
        size: side of the frames in pixels, even, 16 or more.
        num_frames: frames of each clip, 2 or more.
        seed: of everything that is random.
        progress: shows a progress bar.

    Raises:
        ValueError: a parameter out of range.
        ImportError: PyAV is missing.
    """
    if num_train < 1 or num_test < 1 or size < 16 or size % 2 or num_frames < 2 or seed < 0:
        raise ValueError(
            "expected num_train >= 1, num_test >= 1, an even size >= 16, num_frames >= 2 and seed >= 0, got "
            f"num_train={num_train}, num_test={num_test}, size={size}, num_frames={num_frames}, seed={seed}"
        )
    root = Path(root)
    dataset = MotionDataset(root, root / "train.txt", root / "test.txt", root / "labels.csv")
    splits = [("train", num_train, dataset.train_list), ("test", num_test, dataset.test_list)]
    manifest = {
        "content_version": CONTENT_VERSION,
        "num_train": num_train,
        "num_test": num_test,
        "size": size,
        "num_frames": num_frames,
        "seed": seed,
    }
    if _is_complete(dataset, manifest, splits):
        return dataset

    (root / "videos").mkdir(parents=True, exist_ok=True)
    (root / MANIFEST).unlink(missing_ok=True)
    with tqdm(total=num_train + num_test, desc="writing clips", unit="clip", disable=not progress) as bar:
        for split_id, (split, count, list_path) in enumerate(splits):
            labels = np.random.default_rng([seed, split_id]).permutation(np.arange(count) % len(MOTIONS))
            for index, label in enumerate(labels):
                rng = np.random.default_rng([seed, split_id, index])
                frame_rate = int(rng.choice(FRAME_RATES))
                clip = draw_clip(int(label), rng, size=size, num_frames=num_frames)
                write_video(root / _video_name(split, index), clip.video, frame_rate)
                bar.update()
            lines = [f"{_video_name(split, index)} {label}\n" for index, label in enumerate(labels)]
            write_text(list_path, "".join(lines))
    with replace_file(dataset.labels) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("id", "name"), *enumerate(MOTIONS)])
    write_text(root / MANIFEST, json.dumps(manifest, indent=2) + "\n")  # last: it vouches for the rest
    return dataset


def _video_name(split: str, index: int) -> str:
    return f"videos/{split}_{index:05d}.mp4"


def _is_complete(dataset: MotionDataset, manifest: dict[str, int], splits: list[tuple[str, int, Path]]) -> bool:
    try:
        found = json.loads((dataset.root / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    names = [_video_name(split, index) for split, count, _ in splits for index in range(count)]
    files = [dataset.train_list, dataset.test_list, dataset.labels, *(dataset.root / name for name in names)]
    return found == manifest and all(file.is_file() for file in files)


def _check_label(label: int) -> None:
    if not 0 <= label < len(MOTIONS):
        raise ValueError(f"label must be 0 to {len(MOTIONS) - 1} (an index into MOTIONS), got {label}")


def _draw_path(pair: int, num_frames: int, rng: np.random.Generator) -> _Path:
    """Draws the path of a pair's first member (left, up, clockwise, growing); the object stays inside the frame."""
    progress = _draw_progress(num_frames, rng)  # (T,), 0 to 1
    angle = rng.uniform(0, 2 * math.pi) + math.radians(rng.uniform(-20, 20)) * progress
    if pair in (0, 1):
        radius = rng.uniform(0.15, 0.21)
        travel = rng.uniform(0.4, 0.97 - 2 * radius)
        drift = travel * math.tan(math.radians(rng.uniform(-10, 10)))
        along = _draw_middle(radius + travel / 2, rng) - travel * (progress - 0.5)
        across = _draw_middle(radius + abs(drift) / 2, rng) + drift * (progress - 0.5)
        x, y = (along, across) if pair == 0 else (across, along)
        return _path(x, y, angle, radius, num_frames)
    if pair == 2:
        radius = rng.uniform(0.15, 0.2)
        orbit = rng.uniform(0.2, 0.29)
        turn = math.radians(rng.uniform(170, 290)) * progress  # y points down: a growing angle is clockwise on screen
        start = rng.uniform(0, 2 * math.pi)
        center_x, center_y = _draw_middle(radius + orbit, rng), _draw_middle(radius + orbit, rng)
        x, y = center_x + orbit * np.cos(start + turn), center_y + orbit * np.sin(start + turn)
        return _path(x, y, angle[0] + turn, radius, num_frames)
    largest = rng.uniform(0.27, 0.4)
    factor = rng.uniform(2.2, 3.4)
    drifts = rng.uniform(-0.06, 0.06, 2)
    x, y = (_draw_middle(largest + abs(drift) / 2, rng) + drift * (progress - 0.5) for drift in drifts)
    return _path(x, y, angle, largest * factor ** (progress - 1.0), num_frames)


def _path(x: Any, y: Any, angle: Any, radius: Any, num_frames: int) -> _Path:
    return _Path(*(np.broadcast_to(np.asarray(value, np.float32), (num_frames,)) for value in (x, y, angle, radius)))


def _draw_middle(margin: float, rng: np.random.Generator) -> float:
    """A coordinate that is uniform over what leaves `margin` on both sides of the frame."""
    slack = max(0.0, 0.5 - margin)
    return float(0.5 + rng.uniform(-slack, slack))


def _draw_progress(num_frames: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A rising curve from 0 to 1 whose distribution is symmetric in time: slow in the middle or at either end."""
    time = np.linspace(0.0, 1.0, num_frames)
    ease, bend = rng.uniform(-0.4, 0.4, 2)
    return time + ease * np.sin(2 * np.pi * time) / (2 * np.pi) + bend * time * (1 - time)


def _draw_distractor_path(num_frames: int, rng: np.random.Generator) -> _Path:
    """A small object that stands still or jitters: independent offsets for each frame have no direction in time."""
    radius = rng.uniform(0.05, 0.09)
    jitter = rng.choice([0.0, 0.015])
    x, y = rng.uniform(radius, 1 - radius, (2, 1)) + rng.normal(0.0, 1.0, (2, num_frames)) * jitter
    return _path(x, y, rng.uniform(0, 2 * math.pi), radius, num_frames)


def _draw_object(
    video: FloatArray, xs: FloatArray, ys: FloatArray, path: _Path, colors: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Paints an object of random shape and texture over `video (T, H, W, 3)`; returns it and the cover `(T, H, W)`."""
    distance, texture = _draw_shape(rng), _draw_texture(rng, scale=1.0)
    x, y, radius = (value[:, None, None] for value in (path.x, path.y, path.radius))
    cos, sin = np.cos(path.angle)[:, None, None] / radius, np.sin(path.angle)[:, None, None] / radius
    dx, dy = xs - x, ys - y  # (T, H, W)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    cover = np.clip(0.5 - distance(u, v) * radius * video.shape[1], 0.0, 1.0)  # edges of one pixel
    painted = _paint(texture, u, v, colors)
    return video + (painted - video) * cover[..., None], cover


def _paint(texture: Pattern, u: FloatArray, v: FloatArray, colors: FloatArray) -> FloatArray:
    """Mixes two colours `(2, 3)` by a texture with values -1 to 1: `(...,) -> (..., 3)`."""
    weight = (0.5 + 0.5 * texture(u, v))[..., None]
    return (colors[0] + (colors[1] - colors[0]) * weight).astype(np.float32)


def _draw_shape(rng: np.random.Generator) -> Pattern:
    """A signed distance (in radii, negative inside) to a disc, a polygon or a bar of outer radius 1."""
    kind = int(rng.integers(0, 5))
    if kind == 0:
        return lambda u, v: np.hypot(u, v) - np.float32(1.0)
    if kind == 1:
        return lambda u, v: np.maximum(np.abs(u) - np.float32(0.9), np.abs(v) - np.float32(0.5))
    corners = kind + 1  # triangle, square, pentagon
    normals = 2 * np.pi * np.arange(corners, dtype=np.float32) / corners
    inner = np.float32(math.cos(math.pi / corners))

    def polygon(u: FloatArray, v: FloatArray) -> FloatArray:
        distance = np.full_like(u, -np.inf)
        for angle in normals:
            np.maximum(distance, u * np.cos(angle) + v * np.sin(angle), out=distance)
        return distance - inner

    return polygon


def _draw_texture(rng: np.random.Generator, scale: float) -> Pattern:
    """Stripes, a checkerboard or blobs with soft edges, values -1 to 1; `scale` times finer than an object needs."""
    kind = int(rng.integers(0, 3))
    angles = rng.uniform(0, 2 * np.pi, 4).astype(np.float32)
    phases = rng.uniform(0, 2 * np.pi, 4).astype(np.float32)
    waves = (scale * rng.uniform(2.5, 5.0, 4)).astype(np.float32)
    cos, sin = waves * np.cos(angles), waves * np.sin(angles)

    def texture(u: FloatArray, v: FloatArray) -> FloatArray:
        wave = np.sin(cos[0] * u + sin[0] * v + phases[0])
        if kind == 1:
            wave = wave * np.sin(cos[0] * v - sin[0] * u + phases[1])
        elif kind == 2:
            for index in (1, 2, 3):
                wave = wave + np.sin(cos[index] * u + sin[index] * v + phases[index])
        return np.clip(wave * np.float32(2.0), -1.0, 1.0)

    return texture


def _draw_colors(brightness: tuple[float, float], saturation: float, rng: np.random.Generator) -> FloatArray:
    """Two colours, float32 `(2, 3)`: the strongest channel lies in `brightness`, the grey share is `1 - saturation`."""
    hues = rng.uniform(0.0, 1.0, (2, 3))
    hues = (hues - hues.min(axis=1, keepdims=True)) / np.ptp(hues, axis=1, keepdims=True)  # (2, 3), 0 to 1
    tones = 1.0 - saturation + saturation * hues
    return (tones * rng.uniform(*brightness, (2, 1))).astype(np.float32)

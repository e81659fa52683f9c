"""What a model says of video files: printed as text or JSON lines, and drawn onto them."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Config
from ..data.augment import crop_views
from ..data.datasets import TestDataset
from ..data.lists import VIDEO_ENDINGS, Sample
from ..data.sampling import segment_indices
from ..data.sources import natural_order
from ..data.video import VideoError, iterate_frames, probe
from ..model import Claver
from ..prompts.build import tokenize
from ..text import encode_prompts
from .annotate import AnnotatedVideo, annotate
from .evaluate import class_probabilities, likeliest
from .streaming import StreamClassifier

__all__ = ["find_videos", "predict", "predictions"]


def predict(
    videos: Sequence[str],
    *,
    model: Claver,
    config: Config,
    classes: Sequence[str],
    prompts: Sequence[Sequence[str]],
    top: int = 5,
    json_lines: bool = False,
    annotated: str | None = None,
    overwrite: bool = False,
) -> int:
    """Print the likeliest classes of each video, over all test views; a file that cannot be read is named and the rest goes on.

    Args:
        videos: files, folders (with all video files below) and patterns such as `clips/*.mp4`.
        model: in evaluation mode.
        config: of the checkpoint: frames, preprocessing and test views.
        classes: names by label.
        prompts: `[A][C]`, the texts of the classes.
        top: classes to print for each video.
        json_lines: print a JSON object a line: `video`, and `top` (class and probability) or `error`.
        annotated: an mp4 file to write all frames to, over the likeliest classes of each video so far, by one view.
        overwrite: replace that file.

    Returns:
        The exit status: 1 if any file could not be read, else 0.

    Raises:
        ValueError: a folder or pattern without videos, `top` below 1, an mp4 file that is one of the videos or is there already.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1 class, not {top}")
    paths = find_videos(videos)
    if annotated is not None and any(os.path.realpath(annotated) == os.path.realpath(path) for path in paths):
        raise ValueError(f"{annotated}: is one of the videos, which is not to be written over; give another name")
    drawing = None if annotated is None else AnnotatedVideo(annotated, overwrite=overwrite)
    device = next(model.parameters()).device
    text_features = encode_prompts(model, tokenize(prompts, context_length=model.clip.context_length).to(device))
    status = 0
    bar = tqdm(total=len(paths), unit="video", disable=True if json_lines or len(paths) == 1 else None, leave=False)
    try:
        for path, result in predictions(model, paths, text_features, config):
            if isinstance(result, Tensor) and drawing is not None:
                result = _draw(drawing, path, model, text_features, config, classes, top) or result
            status |= isinstance(result, str)
            predicted = result if isinstance(result, str) else likeliest(result, classes, top)
            tqdm.write(_json(path, predicted) if json_lines else _text(path, predicted), file=sys.stdout)
            bar.update()
    finally:
        bar.close()
        if drawing is not None:
            drawing.close()
    return status


def predictions(
    model: Claver, paths: Sequence[str], text_features: Tensor, config: Config
) -> Iterator[tuple[str, Tensor | str]]:
    """Each path with its class probabilities `(C,)`, averaged over prompts and test views, or with why it cannot be read.

    `text_features (A, C, E)` are those of `text.encode_prompts`.
    """
    samples, test = [Sample(path, 0) for path in paths], config.test
    dataset = TestDataset(samples, config.model.frames, config.augment, num_clips=test.clips, num_crops=test.crops)
    for index, path in enumerate(paths):
        item = dataset[index]
        if item["error"]:
            yield path, item["error"]
        else:
            video = item["video"][None].to(text_features.device)
            yield path, class_probabilities(model, video, text_features)[0].cpu()


def find_videos(names: Sequence[str]) -> list[str]:
    """The files that names stand for, each once: itself, all video files below a folder, or those of a pattern, in natural order.

    A name of a file need not exist: whoever reads it says so.

    Raises:
        ValueError: a folder without video files, or a pattern that fits nothing.
    """
    found: dict[str, str] = {}
    for name in names:
        if os.path.isdir(name):
            files = [os.path.join(folder, file) for folder, _, all_files in os.walk(name) for file in all_files]
            paths = [path for path in files if _is_video(path)]
            if not paths:
                raise ValueError(f"{name}: no video files in this folder ({', '.join(VIDEO_ENDINGS)})")
        elif not os.path.exists(name) and glob.has_magic(name):
            paths = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
            if not paths:
                raise ValueError(f"{name}: no file fits this pattern")
        else:
            paths = [name]
        for path in sorted(paths, key=natural_order):
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_ENDINGS) and not os.path.basename(path).startswith(".")


def _text(path: str, predicted: list[tuple[str, float]] | str) -> str:
    if isinstance(predicted, str):
        return f"{path}\n  error: {predicted}"
    return "\n".join([path, *(f"  {probability:6.1%}  {name}" for name, probability in predicted)])


def _json(path: str, predicted: list[tuple[str, float]] | str) -> str:
    if isinstance(predicted, str):
        return json.dumps({"video": path, "error": predicted})
    top = [{"class": name, "probability": round(probability, 6)} for name, probability in predicted]
    return json.dumps({"video": path, "top": top})


# ---- drawing ------------------------------------------------------------------------------------------------------------


class _ClipSoFar:
    """As `StreamClassifier`, for masks that look ahead: the whole clip is computed anew for each frame."""

    def __init__(self, model: Claver, config: Config, text_features: Tensor) -> None:
        self.model, self.augment, self.text_features = model, config.augment, text_features
        self.frames: deque[Tensor] = deque(maxlen=config.model.frames)

    def __call__(self, image: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        self.frames.append(crop_views(pixels[None], self.augment, 1)[0, 0])
        clip = torch.stack(list(self.frames)).to(self.text_features.device)
        return class_probabilities(self.model, clip[None, None], self.text_features)[0].cpu()


def _classifier(model: Claver, config: Config, text_features: Tensor) -> StreamClassifier | _ClipSoFar:
    try:
        return StreamClassifier(model, config.model.frames, config.augment, text_features)
    except ValueError:  # frames see later ones
        return _ClipSoFar(model, config, text_features)


def _draw(
    drawing: AnnotatedVideo,
    path: str,
    model: Claver,
    text_features: Tensor,
    config: Config,
    classes: Sequence[str],
    top: int,
) -> str | None:
    """Draw all frames of a video with the likeliest classes so far; returns why it ended early, if it did.

    The model is given the frames of the middle view, so that the last picture shows what evaluation by one view says.
    """
    classifier = _classifier(model, config, text_features)
    predicted: list[tuple[str, float]] = [("", 0.0)] * min(top, len(classes))  # all pictures have one size
    try:
        info = probe(path)
        taken = segment_indices(info.num_frames, config.model.frames).tolist()  # a short video gives one several times
        for number, image in iterate_frames(info):
            for _ in range(taken.count(number)):
                predicted = likeliest(classifier(image), classes, top)
            drawing.add(annotate(image, predicted, f"{Path(path).name}  frame {number}"), info.fps)
    except VideoError as error:
        return str(error).removeprefix(f"{path}: ")
    return None

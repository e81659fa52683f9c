"""Videos that fit a text or another video best, out of a file of features."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..config import Config
from ..model import Claver
from ..prompts.build import tokenize
from .features import model_digest, read_features, video_feature
from .predict import find_videos

__all__ = ["nearest", "retrieve"]


def retrieve(
    collection: str | Path,
    *,
    model: Claver,
    config: Config,
    texts: Sequence[str] = (),
    videos: Sequence[str] = (),
    top: int = 5,
    json_lines: bool = False,
) -> int:
    """Print the videos of a collection that are nearest to each query, with their cosines; a video does not find itself.

    Args:
        collection: a file that `features` wrote with this model.
        model: in evaluation mode.
        config: of the checkpoint: how videos that are queries are read.
        texts: queries in words, such as "a person waves".
        videos: queries that are files, folders or patterns.
        top: videos to print for each query.
        json_lines: print a JSON object a line: `query`, and `top` (video and score) or `error`.

    Returns:
        The exit status: 1 if any query could not be read, else 0.

    Raises:
        ValueError: no query, `top` below 1, a file of features that is none or was written with other weights.
    """
    if not texts and not videos:
        raise ValueError("there is nothing to look for: give texts or videos")
    if top < 1:
        raise ValueError(f"top must be at least 1 video, not {top}")
    found = read_features(collection)
    if found.model != model_digest(model):
        raise ValueError(f"{collection}: was written with other weights than these, whose features cannot be compared")
    places: dict[str, list[int]] = {}
    for place, path in enumerate(found.paths):
        places.setdefault(os.path.realpath(path), []).append(place)
    status = 0
    queries: list[tuple[str, Tensor | str]] = list(zip(texts, _text_features(model, texts), strict=True))
    queries += [(path, video_feature(model, path, config)) for path in (find_videos(videos) if videos else ())]
    for number, (query, feature) in enumerate(queries):
        if isinstance(feature, str):
            status = 1
            line = json.dumps({"query": query, "error": feature}) if json_lines else f"{query}\n  error: {feature}"
        else:
            itself = places.get(os.path.realpath(query), []) if number >= len(texts) else []
            near = [(found.paths[place], score) for place, score in nearest(feature, found.values, top, without=itself)]
            line = _json(query, near) if json_lines else _text(query, near)
        tqdm.write(line, file=sys.stdout)
    return status


def nearest(query: Tensor, values: Tensor, count: int, *, without: Sequence[int] = ()) -> list[tuple[int, float]]:
    """The rows of `values (V, E)` that are nearest to `query (E,)` by cosine: pairs of row and cosine, the nearest first.

    Of equal ones the first row comes first; rows in `without` are passed over.
    """
    cosines = F.normalize(values.float(), dim=-1) @ F.normalize(query.float(), dim=-1)  # (V,)
    order = [row for row in cosines.argsort(descending=True, stable=True).tolist() if row not in without]
    return [(row, cosines[row].item()) for row in order[:count]]


@torch.no_grad()
def _text_features(model: Claver, texts: Sequence[str]) -> list[Tensor]:
    if not texts:
        return []
    tokens = tokenize([list(texts)], context_length=model.clip.context_length)
    return list(model.encode_text(tokens.to(next(model.parameters()).device))[0].cpu())


def _text(query: str, near: list[tuple[str, float]]) -> str:
    return "\n".join([query, *(f"  {score:6.3f}  {path}" for path, score in near)])


def _json(query: str, near: list[tuple[str, float]]) -> str:
    return json.dumps({"query": query, "top": [{"video": path, "score": round(score, 6)} for path, score in near]})

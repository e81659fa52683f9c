"""Lists for few-shot and base-to-novel experiments, drawn from a list of training videos."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ..files import replace_file, write_text
from .lists import DatasetError, Sample

__all__ = ["base_and_novel", "draw_few_shot", "of_classes", "write_classes", "write_list"]


def draw_few_shot(samples: Sequence[Sample], classes: Sequence[str], shots: int, seed: int) -> list[Sample]:
    """`shots` videos of each class, class after class; those of fewer shots are among those of more, under one seed.

    Raises:
        DatasetError: classes that have fewer videos; it names them.
    """
    by_class: list[list[Sample]] = [[] for _ in classes]
    for sample in samples:
        by_class[sample.label].append(sample)
    short = [(name, f"{len(own)} videos") for name, own in zip(classes, by_class, strict=True) if len(own) < shots]
    if short:
        raise DatasetError(f"{len(short)} of {len(classes)} classes have fewer than {shots} videos:", short)
    drawn = []
    for label, own in enumerate(by_class):
        generator = torch.Generator().manual_seed(seed * 100_003 + label)
        drawn += [own[i] for i in torch.randperm(len(own), generator=generator)[:shots].tolist()]
    return drawn


def base_and_novel(samples: Sequence[Sample], num_classes: int) -> tuple[list[int], list[int]]:
    """The labels of the half of the classes with most training videos, and of the others, each in order.

    So ViFi-CLIP divides them (Rasheed et al. 2023, arXiv 2212.03640, section 4.1); of equals the first are base, and of an odd
    number the larger half.
    """
    counts = Counter(sample.label for sample in samples)
    order = sorted(range(num_classes), key=lambda label: (-counts[label], label))
    half = -(-num_classes // 2)
    return sorted(order[:half]), sorted(order[half:])


def of_classes(samples: Sequence[Sample], labels: Sequence[int]) -> list[Sample]:
    """The samples of some classes, whose labels become their places in `labels`."""
    place = {label: i for i, label in enumerate(labels)}
    return [Sample(sample.path, place[sample.label]) for sample in samples if sample.label in place]


def write_list(path: str | Path, samples: Sequence[Sample], root: str | os.PathLike[str]) -> None:
    """Write lines of `path label`, relative to `root`."""
    lines = [f"{Path(os.path.relpath(str(sample.path), root)).as_posix()} {sample.label}\n" for sample in samples]
    write_text(path, "".join(lines))


def write_classes(path: str | Path, names: Sequence[str]) -> None:
    """Write a CSV of `id,name`."""
    with replace_file(path) as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "name"), *enumerate(names)])

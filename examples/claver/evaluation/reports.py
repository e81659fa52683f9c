"""What an evaluation leaves: numbers, accuracy by class, the confusion of classes, and what was said of each video."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..data.lists import Sample
from ..figures import plot_confusion
from ..files import replace_file, write_text
from .evaluate import Evaluation

__all__ = ["numbers", "over_splits", "write_report"]


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    """Top-1, top-5 and mean class accuracy, and how many videos they are of."""
    return {
        "top1": evaluation.top(1),
        "top5": evaluation.top(5),
        "mean_class": evaluation.mean_class(),
        "videos": len(evaluation.labels),
        "broken": len(evaluation.broken),
    }


def over_splits(results: Mapping[str, Mapping[str, Any]], summary: str) -> dict[str, Any]:
    """What several splits come to.

    Args:
        results: `numbers` of each split.
        summary: "mean" for mean and sample standard deviation, as of the three splits of HMDB-51; "harmonic" for the harmonic
            mean, as of base and novel classes.
    """
    top1 = [float(result["top1"]) for result in results.values()]
    if summary == "harmonic":
        return {"top1": statistics.harmonic_mean(top1), "summary": "harmonic mean of top-1"}
    spread = statistics.stdev(top1) if len(top1) > 1 else math.nan
    return {"top1": statistics.mean(top1), "top1_std": spread, "summary": "mean and sample standard deviation of top-1"}


def write_report(
    folder: str | Path,
    evaluation: Evaluation,
    classes: Sequence[str],
    samples: Sequence[Sample],
    about: Mapping[str, Any],
) -> None:
    """Write `results.json`, `classes.csv`, `confusion.png`, `predictions.csv` and `predictions.safetensors` into a folder.

    The last holds `probabilities` and `logits`, float32 `(videos, C)`, and `labels (videos,)`, in the order of the list.

    Args:
        folder: is made if it is not there; files of these names are replaced.
        evaluation: of the samples.
        classes: names by label.
        samples: of the list, in order.
        about: what else the results are to say.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps({**numbers(evaluation), **about}, indent=2) + "\n")
    _write_csv(folder / "classes.csv", _by_class(evaluation, classes))
    _write_csv(folder / "predictions.csv", _by_video(evaluation, classes, samples))
    tensors = {name: getattr(evaluation, name).contiguous() for name in ("probabilities", "logits", "labels")}
    with replace_file(folder / "predictions.safetensors") as partial:
        partial.write_bytes(save(tensors))
    plot_confusion(evaluation.confusion().numpy(), classes, folder / "confusion.png")


def _by_class(evaluation: Evaluation, classes: Sequence[str]) -> list[Sequence[Any]]:
    """Each class with its videos, how many of them were right, and the class that it was most often taken for."""
    rows: list[Sequence[Any]] = [("id", "name", "videos", "correct", "accuracy", "taken_for", "times")]
    confusion = evaluation.confusion()
    for label, name in enumerate(classes):
        videos, correct = int((evaluation.labels == label).sum()), int(confusion[label, label])
        others = confusion[label].clone()
        others[label] = 0
        other, times = int(others.argmax()), int(others.max())
        accuracy = f"{correct / videos:.4f}" if videos else ""
        rows.append((label, name, videos, correct, accuracy, classes[other] if times else "", times or ""))
    return rows


def _by_video(evaluation: Evaluation, classes: Sequence[str], samples: Sequence[Sample]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = [("path", "label", "name", "predicted", "probability", "error")]
    errors = dict(evaluation.broken)
    for sample, probabilities in zip(samples, evaluation.probabilities, strict=True):
        label, name = sample.label, classes[sample.label]
        if str(sample.path) in errors:
            rows.append((sample.path, label, name, "", "", errors[str(sample.path)]))
            continue
        likeliest = int(probabilities.argmax())
        rows.append((sample.path, label, name, classes[likeliest], f"{float(probabilities[likeliest]):.6f}", ""))
    return rows


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with replace_file(path) as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows(rows)

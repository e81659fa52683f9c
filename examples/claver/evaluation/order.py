"""Whether a model knows the order of frames: clips played backwards, and clips whose frames are shuffled."""

from __future__ import annotations

import dataclasses
import json
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig
from ..data.lists import DatasetError, csv_rows
from ..data.motions import MOTIONS, opposite
from ..files import write_text
from ..model import Claver
from ..prompts.choice import choose_prompts_of_checkpoint
from ..settings import from_dict
from ..text import tokens_of
from ..weights.checkpoint import load_model
from ..weights.hub import fetch
from .evaluate import Evaluation, run_evaluation

__all__ = [
    "MEASURES",
    "Order",
    "evaluate_order",
    "mean_and_interval",
    "opposites_of",
    "order",
    "read_opposites",
    "summarize",
    "with_interval",
]


@dataclass(frozen=True)
class Order:
    """What becomes of the classes when the frames of clips are put in another order; shares of videos, 0 to 1.

    Attributes:
        top1: of the clips as they are.
        reversed_opposite: clips played backwards that get the class that is the opposite of their own.
        reversed_same: clips played backwards that still get their own class.
        shuffled_same: clips in random order that still get their own class.
        videos: how many there are.
        opposites: how many of them have an opposite; the shares of reversed clips are of these.
    """

    top1: float
    reversed_opposite: float
    reversed_same: float
    shuffled_same: float
    videos: int
    opposites: int


MEASURES = ("top1", "reversed_opposite", "reversed_same", "shuffled_same")


def order(
    runs: Sequence[str],
    *,
    control: Sequence[str] = (),
    opposites: Mapping[str, str] | None = None,
    data: DataConfig | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate runs of several seeds on clips played forwards, backwards and shuffled, print a table and return its numbers.

    Args:
        runs: checkpoints, or folders of runs, whose best weights are taken.
        control: the same of runs that are blind to order, such as the demo's frame average.
        opposites: pairs of class names that are each other's time reversal; None: the motions of the demo.
        data: where the test list and the labels are; None: where they were in training.
        out: a JSON file for the numbers.

    Returns:
        `{"runs": {measure: {"mean", "interval", "values"}}, "control": ...}`; see `summarize`.

    Raises:
        CheckpointError, DatasetError: a checkpoint or a list that cannot be read.
        ValueError: no run, or no class that has an opposite.
    """
    if not runs:
        raise ValueError("there is nothing to evaluate: give the folder of a run, or several")
    groups = {"runs": runs} | ({"control": control} if control else {})
    found = {name: [_evaluate_checkpoint(path, opposites, data) for path in paths] for name, paths in groups.items()}
    summary = {name: summarize(orders) for name, orders in found.items()}
    print(_table(summary, {name: len(paths) for name, paths in groups.items()}))
    if out is not None:
        each = {
            name: [
                {"checkpoint": path, **dataclasses.asdict(one)} for path, one in zip(paths, found[name], strict=True)
            ]
            for name, paths in groups.items()
        }
        write_text(out, json.dumps({"summary": summary, "checkpoints": each}, indent=2) + "\n")
    return summary


def evaluate_order(
    model: Claver,
    evaluate: Callable[[Claver], Evaluation],
    opposites: Sequence[int | None],
    *,
    forwards: Evaluation | None = None,
) -> Order:
    """Evaluate a model on its test clips as they are, backwards, and shuffled.

    Args:
        model: in any mode.
        evaluate: how to evaluate it, such as `lambda model: run_evaluation(config, model, tokens)`.
        opposites: for each class the label of its time reversal, or None; see `opposites_of`.
        forwards: what `evaluate` gives for the model itself, where it is known already.

    Raises:
        ValueError: no test video has a class with an opposite.
    """
    forwards = evaluate(model) if forwards is None else forwards
    labels = forwards.labels
    reverse = torch.tensor([-1 if label is None else label for label in opposites])[labels]  # (videos,)
    paired = reverse >= 0
    if not paired.any():
        raise ValueError(
            "no test video is of a class that has an opposite; say which classes are each other's reversal"
        )
    training = model.training
    backwards, shuffled = (_classes(evaluate(_Reordered(model, change))) for change in (_reversed, _shuffled))
    model.train(training)
    return Order(
        top1=_share(_classes(forwards) == labels),
        reversed_opposite=_share(backwards[paired] == reverse[paired]),
        reversed_same=_share(backwards[paired] == labels[paired]),
        shuffled_same=_share(shuffled == labels),
        videos=len(labels),
        opposites=int(paired.sum()),
    )


def opposites_of(classes: Sequence[str], pairs: Mapping[str, str] | None = None) -> list[int | None]:
    """For each class the label of its time reversal, or None; `pairs` name them, by default those of `motions`.

    Raises:
        ValueError: a pair with a name that is no class.
    """
    given = pairs if pairs is not None else {name: MOTIONS[opposite(label)] for label, name in enumerate(MOTIONS)}
    unknown = [name for pair in (pairs or {}).items() for name in pair if name not in classes]
    if unknown:
        raise ValueError(f"opposites name {unknown[0]!r}, which is none of the {len(classes)} classes")
    both = {b: a for a, b in given.items()} | dict(given)
    return [classes.index(both[name]) if both.get(name) in classes else None for name in classes]


def read_opposites(path: str | Path) -> dict[str, str]:
    """Pairs of class names that are each other's time reversal, from a CSV file with the columns `class,opposite`.

    Raises:
        DatasetError: another header, or a line without two names.
    """
    rows = csv_rows(path, ["class", "opposite"])
    wrong = [(f"line {line}", f"expected two names, got {row}") for line, row in rows if len(row) != 2 or not all(row)]
    if wrong:
        raise DatasetError(f"{path}: not a valid list of opposites:", wrong)
    return {first.strip(): second.strip() for _, (first, second) in rows}


def summarize(orders: Sequence[Order]) -> dict[str, dict[str, Any]]:
    """For each measure the `values`, their `mean`, and half the width of its 95 % `interval` (Student's t; None of one run)."""
    summary: dict[str, dict[str, Any]] = {}
    for measure in MEASURES:
        values = [getattr(one, measure) for one in orders]
        mean, interval = mean_and_interval(values)
        summary[measure] = {"mean": mean, "interval": interval, "values": values}
    return summary


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of some runs, and half the width of its 95 % interval (Student's t; None of one run)."""
    count = len(values)
    return statistics.fmean(values), None if count < 2 else _t95(count - 1) * statistics.stdev(values) / count**0.5


class _Reordered(Claver):
    """The same model, given the frames of each clip in another order."""

    def __init__(self, model: Claver, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model.clip)
        self.model, self.order = model, order

    def encode_video(self, video: Tensor) -> Tensor:
        return self.model.encode_video(torch.stack([clip[self.order(clip)] for clip in video]))


def _reversed(clip: Tensor) -> Tensor:
    return torch.arange(len(clip) - 1, -1, -1)


def _shuffled(clip: Tensor) -> Tensor:
    """A random order that is not the clip's own; a function of its pixels, so that batches and processes change nothing."""
    seed = zlib.crc32(clip[:, :, ::8, ::8].float().cpu().contiguous().numpy().tobytes())
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(len(clip))
    drawn = own
    while len(clip) > 1 and torch.equal(drawn, own):
        drawn = torch.randperm(len(clip), generator=generator)
    return drawn


def _evaluate_checkpoint(name: str, pairs: Mapping[str, str] | None, data: DataConfig | None) -> Order:
    path = fetch(name)
    model, content = load_model(path)
    config = from_dict(content["config"], str(path))
    if data is not None:
        config = dataclasses.replace(config, data=data)
    choice = choose_prompts_of_checkpoint(config, content)
    tokens = tokens_of(choice.prompts, model)
    return evaluate_order(
        model,
        lambda changed: run_evaluation(config, changed, tokens, choice.classes),
        opposites_of(choice.classes, pairs),
    )


def _classes(evaluation: Evaluation) -> Tensor:
    """The likeliest class of each video, `(videos,)`; -1, no class, of one that could not be read."""
    return evaluation.probabilities.argmax(1).where(evaluation.readable, -1)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


# the 97.5 % quantiles of Student's distribution with 1 to 9 degrees of freedom
_T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def _t95(freedom: int) -> float:
    """The same for any number: from 10 on by its expansion about the normal quantile (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


def _table(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], counts: Mapping[str, int]) -> str:
    words = {
        "top1": "top-1",
        "reversed_opposite": "reversed: the opposite class",
        "reversed_same": "reversed: the same class",
        "shuffled_same": "shuffled: the same class",
    }
    lines = [" " * 30 + "".join(f"{f'{name} ({counts[name]})':>18}" for name in summary)]
    for measure, text in words.items():
        cells = [
            f"{with_interval(group[measure]['mean'], group[measure]['interval']):>18}" for group in summary.values()
        ]
        lines.append(f"{text:<30}" + "".join(cells))
    return "\n".join(lines)


def with_interval(mean: float, interval: float | None) -> str:
    """What `mean_and_interval` gives, as text."""
    return f"{mean:.3f}" + ("" if interval is None else f" ± {interval:.3f}")

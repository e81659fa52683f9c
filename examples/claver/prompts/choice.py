"""Which texts stand for the classes of a run: by its configuration and the names of its classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Config, DataConfig
from ..data.lists import read_labels
from ..settings import to_dict
from .build import build_prompts, choose_templates
from .files import DATASETS, known_dataset, load_prompts, read_prompt_file, shipped_classes, shipped_file

__all__ = ["Choice", "choose_prompts", "choose_prompts_of_checkpoint", "choose_prompts_of_others"]

TEXT_SETTINGS = ("prompts", "templates", "kinds", "per_kind")


class Choice(NamedTuple):
    """The texts of a run.

    Attributes:
        classes: names by label.
        prompts: `[A][C]`, A texts for each of C classes.
        per_step: how many of the A a training step draws.
        description: what they are, in words.
    """

    classes: list[str]
    prompts: list[list[str]]
    per_step: int
    description: str


def choose_prompts(config: Config, classes: Sequence[str]) -> Choice:
    """The texts that `config.data` asks for; with `prompts: auto` the shipped set if there is one for these classes.

    Raises:
        FileNotFoundError, ValueError: a prompt file that is missing or does not fit the classes and kinds, or nothing
            to build prompts from.
    """
    data, asked = config.data, config.data.prompts
    if asked == "names":
        _refuse_idle(data, "data.prompts = names", "templates", "kinds", "per_kind")
        return Choice(list(classes), build_prompts(classes, ["{}"]), 1, "the class names alone")
    templates, which = choose_templates(data.templates, classes)
    parts = [f"{len(templates)} templates" + (f" ({which})" if which else "")] if templates else []
    path: str | Path | None = None
    origin = ""
    if asked in DATASETS:
        path, origin = shipped_file(asked), f"the shipped set {_title(asked)}"
    elif asked == "auto":
        dataset = known_dataset(classes)
        if dataset is None:
            parts.append("no sentences, as none are shipped for these labels (data.prompts takes a file)")
        else:
            path = shipped_file(dataset)
            origin = f"the shipped set {_title(dataset)}, which has {_share(classes, dataset)}"
    elif asked not in (None, "templates"):
        path = asked
        origin = f"the folder {asked}" if Path(asked).is_dir() else f"{asked} ({read_prompt_file(asked).title})"
    if path is None:
        _refuse_idle(data, "there are no sentences", "kinds", "per_kind")
        prompts = build_prompts(classes, templates)
    else:
        interpretive = load_prompts(path, classes, data.kinds)
        kinds = list(next(iter(interpretive.values())))
        prompts = build_prompts(classes, templates, interpretive, kinds, data.per_kind)
        counts = {kind: min(len(entry[kind]) for entry in interpretive.values()) for kind in kinds}
        if data.per_kind is not None:
            counts = dict.fromkeys(kinds, data.per_kind)
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        parts.append(f"{sum(counts.values())} sentences ({listed}) of {origin}")
    return Choice(list(classes), prompts, config.train.prompts_per_step, " and ".join(parts))


def choose_prompts_of_checkpoint(config: Config, content: Mapping[str, Any], *, need_labels: bool = True) -> Choice:
    """The texts to evaluate a checkpoint with: those of its training, unless `config` asks for other texts or labels.

    Args:
        config: of the evaluation.
        content: of the checkpoint, as `checkpoint.load_checkpoint` returns it.
        need_labels: read the file of `config.data.labels` in any case, as whoever counts by its ids must; without,
            the classes of the checkpoint hold as long as `config` names the file of its training.

    Raises:
        as `choose_prompts`; DatasetError: the file of labels.
    """
    ours = to_dict(config)["data"]
    theirs = content.get("config", {}).get("data", {})
    stored: list[str] | None = content.get("classes") or None  # a converted one may have none
    same_file = ours["labels"] == theirs.get("labels")
    classes = read_labels(config.data.labels) if need_labels or stored is None or not same_file else stored
    other_texts = any(ours[key] != theirs.get(key) for key in TEXT_SETTINGS)
    if not content.get("prompts") or other_texts or classes != stored:  # the order counts: an id is a place in the list
        return choose_prompts(config, classes)
    prompts = content["prompts"]
    return Choice(classes, prompts, config.train.prompts_per_step, f"the {len(prompts)} of its training")


def choose_prompts_of_others(config: Config, classes: Sequence[str], *, keep: bool = False) -> Choice:
    """The texts of other classes than those of the training.

    Sentences of a file or a data set are of the training's classes, so "auto" takes their place, unless they are to be kept.
    Errors are those of `choose_prompts`.
    """
    kept = keep or config.data.prompts in ("names", "templates", None)
    data = config.data if kept else dataclasses.replace(config.data, prompts="auto")
    return choose_prompts(dataclasses.replace(config, data=data), classes)


def _refuse_idle(data: DataConfig, why: str, *names: str) -> None:
    """Raise for settings of texts that would have no effect."""
    idle = [f"data.{name}" for name in names if getattr(data, name) is not None]
    if idle:
        raise ValueError(f"{' and '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: {why}; leave out")


def _title(dataset: str) -> str:
    return read_prompt_file(shipped_file(dataset)).title


def _share(classes: Sequence[str], dataset: str) -> str:
    total = len(shipped_classes(dataset))
    return "exactly these classes" if len(classes) == total else f"these {len(classes)} among its {total} classes"

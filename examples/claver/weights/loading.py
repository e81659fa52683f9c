"""A checkpoint with the settings that a command is given, ready to be used."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from .. import check_demo_checkpoint
from ..command_line import Given
from ..config import Config
from ..data.lists import read_labels
from ..model import Claver
from ..processes import this_process
from ..prompts.choice import Choice, choose_prompts_of_checkpoint, choose_prompts_of_others
from ..settings import from_dict, merge
from .checkpoint import CheckpointError, load_checkpoint, model_of
from .hub import fetch

__all__ = ["Loaded", "open_checkpoint", "open_with_texts", "texts_of"]


class Loaded(NamedTuple):
    """A checkpoint that is ready: its model in evaluation mode, what else is in it, and the configuration that holds."""

    model: Claver
    content: dict[str, Any]
    config: Config


def open_checkpoint(name: str, given: Given, *, force: bool | None = None) -> Loaded:
    """The model of a checkpoint (see `hub.fetch`), under its own settings with those that are given laid over them.

    Args:
        name: of the checkpoint.
        given: settings.
        force: let them contradict the checkpoint; None: not, and the command has no --force that an error could name.

    Raises:
        CheckpointError: no checkpoint, or one whose model is another than the settings say.
        ValueError: settings that are wrong; or the demo's checkpoint, which is not there yet.
    """
    check_demo_checkpoint(name)
    path = fetch(name)
    content = load_checkpoint(path)
    settings = merge(content["config"], given.values)
    if "attention" not in settings["model"]:
        raise CheckpointError(
            f"{path}: an official checkpoint that does not say which mask it has; pass --model.attention"
        )
    config = from_dict(settings, str(path))
    remedy = "leave these settings out"
    if force is not None:
        remedy += ", or pass --force to have other numbers than it was trained for"
    model = model_of(content, path, config, force=bool(force), remedy=remedy)
    return Loaded(model.to("cuda" if torch.cuda.is_available() else "cpu"), content, config)


def open_with_texts(
    name: str, given: Given, classes: list[str] | None = None, *, force: bool | None = None
) -> dict[str, Any]:
    """`model`, `config`, `classes` and `prompts` of a checkpoint; the arguments are those of `open_checkpoint` and `texts_of`."""
    loaded = open_checkpoint(name, given, force=force)
    choice = texts_of(loaded, given, classes)
    return {"model": loaded.model, "config": loaded.config, "classes": choice.classes, "prompts": choice.prompts}


def texts_of(loaded: Loaded, given: Given, classes: list[str] | None = None, *, need_labels: bool = False) -> Choice:
    """The texts that a checkpoint's videos are compared with, which are said on stderr.

    Args:
        loaded: the checkpoint.
        given: settings; a file of labels among them gives the classes.
        classes: names in place of those of the training.
        need_labels: read the file of labels in any case, as whoever counts by its ids must.
    """
    if classes is None and "data.labels" in given.typed and not need_labels:
        classes = read_labels(loaded.config.data.labels)
    if classes is not None and classes != loaded.content.get("classes"):
        choice = choose_prompts_of_others(loaded.config, classes, keep="data.prompts" in given.typed)
    else:
        choice = choose_prompts_of_checkpoint(loaded.config, loaded.content, need_labels=need_labels)
    this_process().print(f"texts of {len(choice.classes)} classes: {choice.description}", file=sys.stderr)
    return choice

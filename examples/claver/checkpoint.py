"""Checkpoints: ours, which hold plain values, and the authors' (`official`); what one says of its model binds."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Config, ModelConfig
from .files import replace_file
from .model import Claver, build_model
from .official import describe_official, from_official, is_official, read_pickle
from .settings import from_dict, to_dict

__all__ = ["CheckpointError", "load_checkpoint", "load_model", "save_checkpoint"]

FORMAT = "kronmask-claver-1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the file."""


def save_checkpoint(
    path: str | Path, model: Claver, config: Config, classes: list[str], prompts: list[list[str]], **state: Any
) -> None:
    """Write a checkpoint; a run that is cut off while writing leaves the one before it whole."""
    content: dict[str, Any] = {"format": FORMAT, "model": model.state_dict(), "config": to_dict(config)}
    content |= {"classes": classes, "prompts": prompts}
    with replace_file(path) as partial:
        torch.save(content | state, partial)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a file of `save_checkpoint`, or an official CLAVER checkpoint, holds; tensors on the CPU.

    An official one is `{"model": state dict under our names, "config": what it says of the model}`, without
    `config["model"]["attention"]` if it does not say which mask it has.

    Raises:
        CheckpointError: no such file, not a checkpoint, a damaged one, or an official one that contradicts itself.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = read_pickle(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds {type(content).__name__}, not a dictionary")
    state = content.get("model", content)
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: no model in it; its entries are {', '.join(map(str, list(content)[:8]))}")
    if content.get("format") == FORMAT:
        return content
    if is_official(state):
        try:
            return {"model": from_official(state), "config": describe_official(state, content.get("config"))}
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    raise CheckpointError(f"{path}: neither a checkpoint of this program nor an official CLAVER checkpoint")


def load_model(path: str | Path, config: Config | None = None, *, force: bool = False) -> tuple[Claver, dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, and the checkpoint.

    Args:
        path: of a checkpoint, ours or the authors'.
        config: whose `model` section the model is built from; None: what the checkpoint says. It may not contradict the
            checkpoint.
        force: let it contradict the checkpoint; of another number of frames, to which a learned embedding is interpolated, a
            warning says so.

    Raises:
        CheckpointError: as `load_checkpoint`; a contradiction, with both values; an official checkpoint that does not say its
            mask, without a `config`; weights that do not fit the model.
    """
    content = load_checkpoint(path)
    stored = content["config"]
    if config is None:
        if "attention" not in stored["model"]:
            raise CheckpointError(f"{path}: an official checkpoint that does not say which mask it has; pass --config")
        config = from_dict(stored, f"{path}: config")
    elif not force:
        _check_agreement(path, stored["model"], config.model)
    there = stored["model"].get("frames", config.model.frames)
    if there != config.model.frames:
        how = (
            "its temporal embedding is interpolated" if config.model.temporal_embedding is True else "time is no weight"
        )
        warnings.warn(f"{path}: was trained on {there} frames and gets {config.model.frames}: {how}", stacklevel=2)
    # the weights are at hand: nothing is to be downloaded
    model = build_model(from_dict(to_dict(config) | {"model": to_dict(config)["model"] | {"pretrained": None}}).model)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the model {config.model.name}: {error}") from error
    return model.eval(), content


# what changes a model's outputs without a trace in the shapes of its weights, or had better be named than found there
BINDING = ("attention", "window", "sink", "placement", "layers", "temporal_embedding", "quick_gelu")


def _check_agreement(path: str | Path, stored: dict[str, Any], config: ModelConfig) -> None:
    """Raise for settings that contradict a checkpoint's `model` section."""
    theirs = to_dict(Config())["model"] | stored  # a setting that is newer than the checkpoint was at its default
    ours = to_dict(Config(model=config))["model"]
    binding = [name for name in BINDING if name != "attention" or name in stored]
    if config.placement == "append" and None in (theirs["layers"], ours["layers"]):
        binding.remove("layers")  # a default is found in the weights, and they must fit anyway
    pairs = [(name, theirs[name], ours[name]) for name in ("frames", *binding)]
    for section, name, default in (("vision", "head_width", 64), ("text", "heads", 8)):
        if theirs[section] is not None and ours[section] is not None:
            pairs += [(f"{section}.{name}", *(values[section].get(name, default) for values in (theirs, ours)))]
    different = [f"model.{name} is {there!r} there, {here!r} here" for name, there, here in pairs if there != here]
    if different:
        raise CheckpointError(
            f"{path}: is of another model than the configuration's: {'; '.join(different)}. Leave these settings out, or "
            "pass --force to have other numbers than it was trained for"
        )

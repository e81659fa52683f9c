"""Checkpoints: ours, safetensors that say what they are, and the authors' (`official`); what one says of its model binds."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..config import Config, ModelConfig
from ..files import replace_file
from ..model import Claver, build_model
from ..settings import from_dict, to_dict
from .official import describe_official, from_official, is_official, read_pickle

__all__ = ["BEST", "CheckpointError", "load_checkpoint", "load_model", "model_of", "save_checkpoint", "written"]

BEST = "best.safetensors"  # in the folder of a run
FORMAT = "kronmask-claver-2"  # safetensors
OLD_FORMAT = "kronmask-claver-1"  # a torch.save of the weights, the optimizer's state and all the rest


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the file."""


def save_checkpoint(
    path: str | Path,
    weights: nn.Module | Mapping[str, Tensor],
    config: Config,
    classes: list[str],
    prompts: list[list[str]],
    *,
    epoch: int = 0,
    step: int = 0,
) -> None:
    """Write a model, or its state dict, as safetensors whose metadata say what it is; `epoch` is the number of whole epochs.

    Whatever happens, what was at `path` is left whole, or the new file is.

    Raises:
        OSError: it cannot be written: a full disk, a folder that cannot be written to.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    metadata = {
        "format": FORMAT,
        "config": json.dumps(to_dict(config)),
        "classes": json.dumps(classes),
        "prompts": json.dumps(prompts),
        "epoch": str(epoch),
        "step": str(step),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with written(path) as partial:
        partial.write_bytes(save(tensors, metadata))


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """As `replace_file`, but all that the writers of torch and safetensors raise becomes an OSError that names `path`."""
    try:
        with replace_file(path) as partial:
            yield partial
    except (OSError, RuntimeError, SafetensorError) as error:
        free = (
            f"; {shutil.disk_usage(Path(path).parent).free / 2**30:.1f} GB are free there"
            if Path(path).parent.exists()
            else ""
        )
        raise OSError(f"{path}: cannot be written ({error}){free}") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a file of `save_checkpoint`, of its older format, or an official CLAVER checkpoint holds; tensors on the CPU.

    Ours is `{"model": state dict, "config", "classes", "prompts", "epoch", "step"}`.

    An official one is `{"model": state dict under our names, "config": what it says of the model}`, without
    `config["model"]["attention"]` if it does not say which mask it has.

    Raises:
        CheckpointError: no such file, not a checkpoint, a damaged one, or an official one that contradicts itself.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        content = read_pickle(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds {type(content).__name__}, not a dictionary")
    state = content.get("model", content)
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: no model in it; its entries are {', '.join(map(str, list(content)[:8]))}")
    if content.get("format") == OLD_FORMAT:
        return content
    if is_official(state):
        try:
            return {"model": from_official(state), "config": describe_official(state, content.get("config"))}
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    raise CheckpointError(f"{path}: neither a checkpoint of this program nor an official CLAVER checkpoint")


def _is_safetensors(path: str | Path) -> bool:
    """By its name, or by its start, the length of a header and the header, JSON; no pickle and no archive has that brace."""
    if Path(path).suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one ({error})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this program, which writes the format {FORMAT} into its files"
        )
    return {"format": FORMAT, "model": model} | {
        name: json.loads(metadata[name]) for name in ("config", "classes", "prompts", "epoch", "step")
    }


def load_model(
    path: str | Path, config: Config | None = None, *, force: bool = False, any_frames: bool = False
) -> tuple[Claver, dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, and the checkpoint.

    Args:
        path: of a checkpoint, ours or the authors'.
        config: whose `model` section the model is built from; None: what the checkpoint says. It may not contradict the
            checkpoint.
        force: let it contradict the checkpoint; of another number of frames, to which a learned embedding is interpolated, a
            warning says so.
        any_frames: let it have another number of frames.

    Raises:
        CheckpointError: as `load_checkpoint`; a contradiction, with both values; an official checkpoint that does not say its
            mask, without a `config`; weights that do not fit the model.
    """
    content = load_checkpoint(path)
    return model_of(content, path, config, force=force, any_frames=any_frames), content


def model_of(
    content: dict[str, Any],
    path: str | Path,
    config: Config | None = None,
    *,
    force: bool = False,
    any_frames: bool = False,
    remedy: str = "give these settings as they are there",
) -> Claver:
    """The model of what `load_checkpoint` gave for `path`, in evaluation mode; the rest is as in `load_model`.

    `remedy` says what can be done about a contradiction.
    """
    stored = content["config"]
    if config is None:
        if "attention" not in stored["model"]:
            raise CheckpointError(
                f"{path}: an official checkpoint that does not say which mask it has; write it "
                "anew with the mask, and use that: claver_k400.py convert FILE OUT --model.attention=kmt"
            )
        config = from_dict(stored, f"{path}: config")
    elif not force:
        there = {key: value for key, value in stored["model"].items() if not (any_frames and key == "frames")}
        _check_agreement(path, there, config.model, remedy)
    frames = stored["model"].get("frames", config.model.frames)
    if frames != config.model.frames:
        how = (
            "its temporal embedding is interpolated"
            if config.model.temporal_embedding is True
            else "no weight of it is of time"
        )
        warnings.warn(f"{path}: was trained on {frames} frames and gets {config.model.frames}: {how}", stacklevel=2)
    # the weights are at hand: nothing is to be downloaded
    model = build_model(replace(config.model, pretrained=None))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the model {config.model.name}: {error}") from error
    return model.eval()


# what changes a model's outputs without a trace in the shapes of its weights, or had better be named than found there
BINDING = ("name", "attention", "window", "sink", "placement", "layers", "temporal_embedding", "quick_gelu")


def _check_agreement(path: str | Path, stored: dict[str, Any], config: ModelConfig, remedy: str) -> None:
    """Raise for settings that contradict a checkpoint's `model` section."""
    # a setting that is newer than the checkpoint was at its default
    theirs = to_dict(Config())["model"] | {"frames": config.frames} | stored
    ours = to_dict(Config(model=config))["model"]
    binding = [name for name in BINDING if name != "attention" or name in stored]
    if theirs["name"] == "official":
        binding.remove("name")  # of an official one that does not say its architecture
    if config.placement == "append" and None in (theirs["layers"], ours["layers"]):
        binding.remove("layers")  # a default is found in the weights, and they must fit anyway
    pairs = [(name, theirs[name], ours[name]) for name in ("frames", *binding)]
    for section, name, default in (("vision", "head_width", 64), ("text", "heads", 8)):
        if theirs[section] is not None and ours[section] is not None:
            pairs += [(f"{section}.{name}", *(values[section].get(name, default) for values in (theirs, ours)))]
    different = [f"model.{name} is {there!r} there, {here!r} here" for name, there, here in pairs if there != here]
    if different:
        raise CheckpointError(f"{path}: is of another model than the configuration's: {'; '.join(different)}; {remedy}")

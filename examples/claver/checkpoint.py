"""Checkpoints: ours, which hold plain values, and the authors', whose pickles are read without being executed."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .config import Config, from_dict, to_dict
from .files import replace_file
from .model import Claver, build_model

__all__ = ["CheckpointError", "from_official", "load_checkpoint", "load_model", "save_checkpoint"]

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

    An official one is `{"model": state dict under our names}`: its configuration is a pickled object, which is passed over.

    Raises:
        CheckpointError: no such file, not a checkpoint, or a damaged one.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TENSORS_ONLY)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, AttributeError,
            TypeError, IndexError, UnicodeDecodeError) as error:  # fmt: skip
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds {type(content).__name__}, not a dictionary")
    state = content.get("model", content)
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: no model in it; its entries are {', '.join(map(str, list(content)[:8]))}")
    if content.get("format") == FORMAT:
        return content
    if any("transformer_t.resblocks" in key for key in state):
        return {"model": from_official(state)}
    raise CheckpointError(f"{path}: neither a checkpoint of this program nor an official CLAVER checkpoint")


def load_model(path: str | Path, config: Config | None = None) -> tuple[Claver, dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, and the checkpoint; `config` is needed for an official one.

    Raises:
        CheckpointError: as `load_checkpoint`, or the weights do not fit the model.
    """
    content = load_checkpoint(path)
    if config is None:
        if "config" not in content:
            raise CheckpointError(f"{path}: an official checkpoint does not say what it is; pass --config")
        config = from_dict(content["config"], f"{path}: config")
    # the weights are at hand: nothing is to be downloaded
    model = build_model(from_dict(to_dict(config) | {"model": to_dict(config)["model"] | {"pretrained": None}}).model)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the model {config.model.name}: {error}") from error
    return model.eval(), content


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of the authors' code, under ours."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        name = name.replace("visual.temporal_embedding", "visual.temporal_encoder.embedding.weight")
        name = re.sub(
            r"visual\.transformer_t\.resblocks\.(\d+)\.temporal_", r"visual.temporal_encoder.blocks.\1.", name
        )
        renamed[f"clip.{name}"] = (
            tensor.unsqueeze(2) if name.endswith("embedding.weight") and tensor.ndim == 3 else tensor
        )
    return renamed


# ---- reading tensors without executing a pickle ------------------------------------------------------------------------

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
}


class _Inert(dict):
    """Stands for an object of any other class: it takes what the pickle hands it and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or storage or dtype:
            return super().find_class(module, name)
        return _Inert


def _load(file: Any, **kwargs: Any) -> Any:
    return _TensorUnpickler(file, **kwargs).load()


_TENSORS_ONLY = SimpleNamespace(Unpickler=_TensorUnpickler, load=_load, __name__="tensors_only")

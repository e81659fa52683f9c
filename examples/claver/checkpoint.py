"""Checkpoints: ours, safetensors that say what they are, and the authors', whose pickles are read without being executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import Config, from_dict, to_dict
from .files import replace_file
from .model import Claver, build_model

__all__ = ["CheckpointError", "from_official", "load_checkpoint", "load_model", "save_checkpoint", "written"]

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
        save_file(tensors, partial, metadata)


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

    An official one is `{"model": state dict under our names}`: its configuration is a pickled object, which is passed over.

    Raises:
        CheckpointError: no such file, not a checkpoint, or a damaged one.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    if _is_safetensors(path):
        return _read_safetensors(path)
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
    if content.get("format") == OLD_FORMAT:
        return content
    if any("transformer_t.resblocks" in key for key in state):
        return {"model": from_official(state)}
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

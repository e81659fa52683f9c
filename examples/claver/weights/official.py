"""The authors' checkpoints: read without executing their pickles, under our names, with what they say of the model.

Such a file is `{"model": state dict, "config": a pickled yacs node, ...}`. The weights tell all sizes but not which frames see
which; the node does.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["describe_official", "find_settings", "from_official", "is_official", "read_pickle"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; what the authors normalise with, in place of CLIP's own
IMAGENET_STD = (0.229, 0.224, 0.225)
MASKS = ("kmt", "kmct")
HEAD_WIDTH = 64  # of OpenAI's models; not in the weights
PUBLISHED = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")  # what the authors trained, as open_clip calls them


def is_official(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of the authors' code."""
    return any("transformer_t.resblocks" in str(key) for key in state)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def describe_official(state: Mapping[str, Tensor], pickled: Any) -> dict[str, Any]:
    """The sections `model` and `augment` of a configuration for weights of the authors, as nested dictionaries.

    Sizes are read off the weights; ARCH and NUM_FRAMES of the pickled configuration must agree with them. `attention` is missing
    if the configuration has no MASK_MODE that is known. The pixels' statistics are those that the authors train with.

    Args:
        state: under the authors' names.
        pickled: the configuration as `read_pickle` gives it, or anything else.

    Raises:
        ValueError: weights that are not of a CLIP, a configuration that contradicts them or itself.
    """
    model: dict[str, Any] = _sizes({name.removeprefix("module."): tensor for name, tensor in state.items()})
    image = model["vision"]["image_size"]
    frames = find_settings(pickled, "NUM_FRAMES")
    if frames and frames != [model["frames"]]:
        raise ValueError(
            f"its configuration says NUM_FRAMES {_listed(frames)}, its temporal embedding has {model['frames']} frames"
        )
    model |= _architecture(find_settings(pickled, "ARCH"), model)
    modes = {str(mode).lower(): mode for mode in find_settings(pickled, "MASK_MODE")}
    if len(modes) > 1:
        raise ValueError(f"its configuration contradicts itself: MASK_MODE is {_listed(list(modes.values()))}")
    if modes and (mask := next(iter(modes))) in MASKS:
        model["attention"] = mask
    augment = {"size": image, "short_side": round(image * 256 / 224), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return {"model": model, "augment": augment}


def find_settings(node: Any, name: str) -> list[Any]:
    """The different plain values (text, numbers) that a key has anywhere in nested dictionaries and lists, in any case."""
    found: list[Any] = []
    parts, seen = [node], set()
    for part in parts:  # which grows; no recursion: a hostile node may be deep, contain itself, or one part many times
        if id(part) in seen or not isinstance(part, (dict, list, tuple)):
            continue
        seen.add(id(part))
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            plain = isinstance(value, (str, int, float))
            if plain and isinstance(key, str) and key.upper() == name and value not in found:
                found.append(value)
            parts.append(value)
    return found


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of the model that follow from the shapes of the authors' weights."""
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        vocabulary, text_width = state["token_embedding.weight"].shape
        embedding = state.get("visual.temporal_embedding")
        vision = {"layers": _blocks(state, "visual.transformer"), "width": width, "head_width": min(HEAD_WIDTH, width)}
        text: dict[str, Any] = {"context_length": len(state["positional_embedding"]), "vocab_size": vocabulary}
        text |= {"width": text_width, "heads": max(1, text_width // HEAD_WIDTH)}
        return {
            "pretrained": None,
            "quick_gelu": True,
            "embed_dim": state["visual.proj"].shape[1],
            "vision": vision | {"patch_size": patch, "image_size": side * patch},
            "text": text | {"layers": _blocks(state, "transformer")},
            "frames": 8 if embedding is None else embedding.shape[1],
            "temporal_embedding": embedding is not None,
            "placement": "append",
            "layers": _blocks(state, "visual.transformer_t"),
        }
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its weights are not of a CLIP with temporal blocks: {error!r}"[:300]) from error


def _blocks(state: Mapping[str, Tensor], tower: str) -> int:
    pattern = re.compile(rf"{re.escape(tower)}\.resblocks\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, state) if match})


def _architecture(given: list[Any], model: dict[str, Any]) -> dict[str, Any]:
    """The settings that name an open_clip architecture of exactly these sizes, or else a label for the sizes."""
    import open_clip

    named = {str(arch): open_clip.get_model_config(_open_clip_name(str(arch))) for arch in given}
    for arch, sizes in named.items():
        if sizes is not None and not _fits(sizes, model, but=("image_size",)):
            vision = model["vision"]
            raise ValueError(
                f"its configuration says ARCH {arch!r}, its weights are of another model: {vision['layers']} layers "
                f"of width {vision['width']}, patches of {vision['patch_size']} pixels"
            )
    for name in (*map(_open_clip_name, named), *PUBLISHED):
        sizes = open_clip.get_model_config(name)
        if sizes is not None and _fits(sizes, model):
            return {"name": name, "vision": None, "text": None}
    return {"name": next(iter(named), "official")}


def _open_clip_name(arch: str) -> str:
    """`ViT-L/14@336px` as `ViT-L-14-336`."""
    return arch.replace("/", "-").replace("@", "-").removesuffix("px")


def _fits(architecture: dict[str, Any], model: dict[str, Any], but: tuple[str, ...] = ()) -> bool:
    sections = ((architecture["vision_cfg"], model["vision"]), (architecture["text_cfg"], model["text"]))
    pairs = [(ours.get(key), value) for section, ours in sections for key, value in section.items() if key not in but]
    return all(ours == value for ours, value in pairs) and architecture["embed_dim"] == model["embed_dim"]


def _listed(values: list[Any]) -> str:
    return " and ".join(repr(value)[:60] for value in values)


# ---- reading tensors and plain values without executing a pickle --------------------------------------------------------

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
}


def read_pickle(path: str | Path) -> Any:
    """What a file of `torch.save` holds, tensors on the CPU; of any other class than a tensor's, the items and attributes alone.

    Raises:
        ValueError: not such a file, or a damaged one.
    """
    try:
        if zipfile.is_zipfile(path) and any(Path(n).name == "constants.pkl" for n in zipfile.ZipFile(path).namelist()):
            raise ValueError("it is a TorchScript program")  # which torch.load would run
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PLAIN)
    except OSError:
        raise
    except Exception as error:  # what bytes of any kind make of the unpickler: there is no list of it
        raise ValueError(f"not a checkpoint, or a damaged one ({str(error)[:300]})") from error


class _Inert(dict):
    """Stands for an object of any other class: it keeps the values that it is handed, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


def _build(unpickler: Any) -> None:
    """In place of what sets an object's state, which could change torch's own functions: keeps that of inert ones."""
    state = unpickler.stack.pop()
    if type(unpickler.stack[-1]) is _Inert and isinstance(state, dict):
        unpickler.stack[-1].update(state)


class _PlainUnpickler(pickle._Unpickler):  # in Python: the one in C reserves any memory that a file asks for
    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: _build}

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        return super().find_class(module, name) if (module, name) in _ALLOWED or dtype else _Inert


def _load(file: Any, **kwargs: Any) -> Any:
    return _PlainUnpickler(file, **kwargs).load()


_PLAIN = SimpleNamespace(Unpickler=_PlainUnpickler, load=_load, __name__="plain")

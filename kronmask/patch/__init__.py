"""Temporal attention for a pretrained image ViT: `patch_vit(model)` makes it a video model, in place.

The file of a library says where the ViT of a model is and states the facts about it (`Family`); it is imported when a
model of that library is met.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from kronmask.nn import AttentionOrGroups, TemporalEmbedding
from kronmask.patch.family import Entry, Family
from kronmask.patch.settings import Settings
from kronmask.patch.temporal import TemporalEncoder
from kronmask.patch.video import VideoEncoder, patch_encoder, unpatch_encoder

__all__ = ["Entry", "Family", "VideoEncoder", "param_groups", "patch_vit", "temporal_parameters", "unpatch_vit"]

Model = TypeVar("Model", bound=nn.Module)

LIBRARIES = ("timm", "open_clip", "clip", "transformers", "torchvision")
"""Libraries whose models can be patched; `kronmask.patch.<name>.find(model)` is the encoder in a model and its `Family`."""

_OWN_FRAME = (
    "placement='replace' with attention={0!r}: the tokens of a frame do not see each other, so a frame's class token learns "
    "nothing from its own patches (under 'kmct' those of the last frame reach no class token at all); 'joint', 'causal' and "
    "'axial' let a frame see itself"
)

_NO_DECAY = re.compile(
    r"pos_embed|position(al)?_embedding|class_embedding|(cls|class|reg|dist|distillation|mask)_token|register_tokens|"
    r"relative_position_bias_table|logit_(scale|bias)"
)


def patch_vit(
    model: Model,
    *,
    frames: int = 8,
    attention: AttentionOrGroups = "kmt",
    placement: str = "append",
    layers: int | Sequence[int] | None = None,
    init: str = "zero",
    temporal_embedding: bool | str = True,
    family: Family | None = None,
) -> Model:
    """Give an image ViT temporal attention, in place, so that it takes video `(B, T, C, H, W)`.

    The output is what the image model returns, per clip: its outputs for each frame, averaged. A batch of images is a
    batch of clips of one frame. T may differ from call to call. On the patched encoder (`model`, or `model.visual` of a
    CLIP): `forward_frames(video)` is the output for each frame `(B, T, ...)` and `forward_tokens(video)` the tokens
    `(B, T, N, D)` after the last temporal layer, before the final norm.

    A list of clips `(T, C, H, W)` of different lengths is a batch without padding: one sequence in which each clip sees itself
    alone, with its own temporal embedding and mean. What is `(B, T, ...)` for a batch is a list of a `(T, ...)` for each clip
    then, also where the lengths are equal. `torch.compile` makes a graph for each tuple of lengths, by default for eight at most.
    (The `encode_image` of OpenAI's clip casts its images and takes tensors alone: give lists to `model.visual`.)

    Pretrained keys of the `state_dict` keep their names and new keys contain `temporal_`. A checkpoint of the image
    model loads before and after patching (it then leaves the temporal weights as they are). Dropout and stochastic
    depth are the image blocks' own; the temporal layers have none. In `DistributedDataParallel` every temporal
    parameter is used in each forward.

    Args:
        model: a ViT of timm, open_clip, OpenAI's clip, Hugging Face transformers or torchvision, or a CLIP or classifier of
            these libraries around one; any other with `family`. Pass the model itself, not a wrapper around it. (SigLIP 2 pads
            the patches of a frame: its blocks ignore the padding, temporal attention does not.)
        frames: number of frames the temporal embedding is learned for; it is interpolated for other clips.
        attention: the mask: a name out of `kronmask.masks.NAMES`, a `KronMask` (then all clips have its size), or a
            callable `(frames, tokens) -> KronMask`. `tokens` counts a frame's class token and registers. A list of these,
            `["kmct", "axial"]`, divides the heads of each temporal attention into equal groups, each under its own mask.
        placement: "append" adds `layers` blocks over all T*N tokens after the image blocks (CLAVER, ICLR 2025, arXiv
            2502.03549); "interleave" adds an attention residual in front of image blocks (TimeSformer, arXiv
            2102.05095); "replace" runs the attention of image blocks over all T*N tokens under the mask, everything else
            in it as it is (rotations by the position in the frame also hold between frames). Under "kmt" and "kmct" the
            tokens of a frame do not see each other: with "replace" a class token then learns nothing from its own
            frame's patches, and under "kmct" those of the last frame reach no class token at all; "joint", "causal" and
            "axial" let a frame see itself.
        layers: with "append" the number of temporal blocks (a third of the depth by default); else the image blocks
            concerned, as a sequence of indices or as k for every k-th block (all by default).
        init: "zero" sets output projections and temporal embedding to zero, so that the patched model equals the image
            model averaged over frames (but for "replace"); "random" is CLIP's initialisation, with temporal embedding
            N(0, .02); "copy" takes the weights of the last image blocks ("append") or of the same block's attention
            ("interleave"), with temporal embedding N(0, .02).
        temporal_embedding: True adds a learned vector for each frame before the first temporal attention; "rotary" turns
            queries and keys of temporal attention by the time of their frame instead (RoFormer, arXiv 2104.09864), which
            has no parameters and holds for clips and streams of any length; False tells frames apart by the mask alone.
        family: the facts about the model's encoder, for a ViT of one's own: `Family(MyViT, "blocks")`.

    Returns:
        The same object.

    Raises:
        TypeError: a model that cannot be patched.
        ValueError: an argument that is none of the choices or does not fit the model, or a model that is patched
            already.
    """
    settings = Settings(frames, attention, placement, layers, init, temporal_embedding)
    if any(isinstance(module, VideoEncoder) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} is patched already; call unpatch_vit(model) first")
    encoder, family = _find(model) if family is None else _find_declared(model, family)
    patch_encoder(encoder, family, settings)
    encoder._on_patch(model, settings)
    if placement == "replace" and attention in ("kmt", "kmct"):
        warnings.warn(_OWN_FRAME.format(attention), stacklevel=2)
    return model


def unpatch_vit(model: Model) -> Model:
    """Undo `patch_vit` in place: classes, attributes and `state_dict` keys are the image model's again.

    The temporal weights are dropped; image weights stay as they are, also where training has changed them.

    Raises:
        ValueError: the model is not patched.
    """
    encoders = [module for module in model.modules() if isinstance(module, VideoEncoder)]
    if not encoders:
        raise ValueError(f"this {type(model).__name__} is not patched; call patch_vit(model) first")
    for encoder in encoders:
        encoder._on_unpatch(model)
        unpatch_encoder(encoder)
    return model


def temporal_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that patching has added, by their names in `state_dict` (each contains `temporal_`)."""
    temporal = _temporal_ids(model)
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in temporal}


def param_groups(
    model: nn.Module, *, lr: float, temporal_lr_mult: float = 10.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: temporal parameters learn faster, and some parameters have no weight decay.

    Without decay are one-dimensional parameters (biases, norms), `logit_scale`, and class, position and temporal
    embeddings. Each trainable parameter is in exactly one group; frozen ones are in none. CLAVER (arXiv 2502.03549)
    uses `lr=1.2e-5, temporal_lr_mult=10, weight_decay=1e-3` with AdamW.

    Args:
        model: a patched model, or one that contains it.
        lr: learning rate of the image model.
        temporal_lr_mult: factor on `lr` for temporal parameters.
        weight_decay: for the parameters that have any.

    Returns:
        Up to four dictionaries with `name` ("image", "image_no_decay", "temporal", "temporal_no_decay"), `params`, `lr`
        and `weight_decay`; empty groups are left out.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, TemporalEmbedding)}
    groups: dict[str, dict[str, Any]] = {}
    for part, factor in (("image", 1.0), ("temporal", temporal_lr_mult)):
        for suffix, decay in (("", weight_decay), ("_no_decay", 0.0)):
            name = f"{part}{suffix}"
            groups[name] = {"name": name, "params": [], "lr": lr * factor, "weight_decay": decay}
    temporal = _temporal_ids(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "temporal" if id(parameter) in temporal else "image"
            decays = parameter.ndim > 1 and id(parameter) not in embeddings and not _NO_DECAY.search(name)
            groups[part if decays else f"{part}_no_decay"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _temporal_ids(model: nn.Module) -> set[int]:
    """The parameters of the children that patching has added, whatever they and what is around them are called."""
    encoders = [module for module in model.modules() if isinstance(module, TemporalEncoder)]
    return {id(parameter) for encoder in encoders for parameter in encoder.parameters()}


def _find(model: nn.Module) -> tuple[Any, Family]:
    """The encoder in a model and its family, by the library that the model's class, or the first of its bases, comes from."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    library = _library(model)
    if library is not None:
        encoder, family = importlib.import_module(f"kronmask.patch.{library}").find(model)
        return encoder, family
    inner = next((path for path, module in model.named_modules() if path and _can_find(module)), None)
    if inner is not None:
        raise TypeError(f"patch_vit patches the ViT itself, not the {name} around it: pass model.{inner}")
    raise TypeError(
        f"patch_vit cannot patch {name}: it knows the vision transformers of {', '.join(LIBRARIES)}; declare another with "
        "family=kronmask.patch.Family(...)"
    )


def _can_find(module: nn.Module) -> bool:
    try:
        return _library(module) is not None and bool(_find(module))
    except TypeError:
        return False


def _library(model: nn.Module) -> str | None:
    packages = [cls.__module__.partition(".")[0] for cls in type(model).__mro__]
    return next((package for package in packages if package in LIBRARIES), None)


def _find_declared(model: nn.Module, family: Family) -> tuple[Any, Family]:
    if isinstance(model, family.encoder):
        return model, family
    found = [module for module in model.modules() if isinstance(module, family.encoder)]
    if len(found) != 1:
        raise TypeError(
            f"family declares {family.encoder.__qualname__}, of which this {type(model).__qualname__} has {len(found)}; pass the "
            "encoder itself"
        )
    return found[0], family

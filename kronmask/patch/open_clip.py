"""Image towers of open_clip: its own `VisionTransformer`, and timm's ViTs in its `TimmModel`; and the CLIP models around them."""

from __future__ import annotations

from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from kronmask.patch import timm
from kronmask.patch.family import NO_PRUNING, Entry, Family, available

__all__ = ["FAMILIES", "find"]


_ENTRIES = (Entry("forward"), Entry("forward_intermediates", "frames"))


def _is_sequence_first(encoder: Any) -> bool:
    return not encoder.transformer.batch_first


def _cannot_replace(encoder: Any, block: Any) -> str | None:
    if getattr(block.attn, "logit_scale", None) is not None:
        return "it scales the cosines of queries and keys (scaled_cosine_attn)"
    return None


def _trunk_cannot_replace(encoder: Any, block: Any) -> str | None:
    return timm.cannot_replace(encoder.trunk, block)


def _trunk_cannot_copy(encoder: Any, block: Any) -> str | None:
    return timm.cannot_copy(encoder.trunk, block)


FAMILIES = (
    Family(
        VisionTransformer,
        "transformer.resblocks",
        entries=available(VisionTransformer, _ENTRIES),
        sequence_first=_is_sequence_first,
        refused=NO_PRUNING,
        cannot_replace=_cannot_replace,
        cannot_copy=_cannot_replace,
    ),
    Family(
        TimmModel,
        "trunk.blocks",
        entries=available(TimmModel, _ENTRIES),
        refused=NO_PRUNING,
        cannot_replace=_trunk_cannot_replace,
        cannot_copy=_trunk_cannot_copy,
    ),
)


def find(model: nn.Module) -> tuple[nn.Module, Family]:
    """The image tower of a model of open_clip, and its family.

    Raises:
        TypeError: the image tower is no vision transformer, or there is none.
    """
    tower = model if isinstance(model, (VisionTransformer, TimmModel)) else getattr(model, "visual", None)
    if isinstance(tower, TimmModel):
        timm.find(tower.trunk)  # raises TypeError
    for family in FAMILIES:
        if isinstance(tower, family.encoder):
            return tower, family
    part = "" if tower is None else f", whose image tower is {type(tower).__name__}"
    raise TypeError(
        "patch_vit patches open_clip's VisionTransformer, TimmModel with a timm ViT, and CLIP models with one of these as image "
        f"tower, not {type(model).__module__}.{type(model).__qualname__}{part}"
    )

"""timm's vision transformers with one grid of tokens from the first block to the last."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from kronmask.patch.family import NO_PRUNING, Entry, Family, available
from kronmask.patch.temporal import heads_module

__all__ = ["FAMILIES", "cannot_copy", "cannot_replace", "find"]

_ENTRIES = (
    Entry("forward"),
    Entry("forward_features", "frames"),
    Entry("forward_head", ndim=3, features=True),
    Entry("forward_intermediates", "frames"),
    Entry("get_intermediate_layers", "frames"),
)


def cannot_replace(encoder: Any, block: Any) -> str | None:
    """Position terms and masks in the scores of attention, which no kernel here adds."""
    attn = heads_module(block)
    bias = "it adds a bias for the relative position in its frame to the scores of attention"
    if any(getattr(encoder, name, None) is not None for name in ("rel_pos_bias", "shared_rel_pos")):
        return bias
    if any(getattr(attn, name, None) is not None for name in ("relative_position_bias_table", "rel_pos", "rel_pos_h")):
        return bias
    if getattr(block, "window_size", 0):
        return f"it attends within windows of {block.window_size} patches"
    if type(attn).__name__ == "TalkingHeadAttn":
        return "it mixes the scores of its heads (talking heads)"
    return None


def cannot_copy(encoder: Any, block: Any) -> str | None:
    """Position terms that come from the encoder, or from a layout that a clip does not have."""
    if getattr(encoder, "rope", None) is not None:
        return "their attention rotates queries and keys by position"
    if getattr(block, "window_size", 0):
        return f"they attend within windows of {block.window_size} patches"
    return cannot_replace(encoder, block)


def _declare() -> Iterator[Family]:
    """The families of the installed release; not every release has all of them."""
    names = (
        ("vision_transformer", "VisionTransformer"),  # and DeiT, hybrid, ViTamin
        ("eva", "Eva"),  # EVA-02, DINOv3, PE, ViT-RoPE
        ("beit", "Beit"),
        ("vision_transformer_relpos", "VisionTransformerRelPos"),
        ("naflexvit", "NaFlexVit"),
        ("cait", "Cait"),
        ("vision_transformer_sam", "VisionTransformerSAM"),
    )
    for module, name in names:
        try:
            encoder = getattr(importlib.import_module(f"timm.models.{module}"), name)
        except (ImportError, AttributeError):
            continue
        head = Entry("forward_head", ndim=4, features=True) if name.endswith("SAM") else _ENTRIES[2]
        yield Family(
            encoder,
            "blocks",
            entries=available(encoder, (*_ENTRIES[:2], head, *_ENTRIES[3:])),
            refused=NO_PRUNING,
            cannot_replace=cannot_replace,
            cannot_copy=cannot_copy,
        )


FAMILIES = tuple(_declare())


def find(model: nn.Module) -> tuple[nn.Module, Family]:
    """The encoder in a model of timm, which is the model itself, and its family.

    Raises:
        TypeError: another architecture.
    """
    for family in FAMILIES:
        if isinstance(model, family.encoder):
            return model, family
    raise TypeError(
        f"patch_vit cannot patch timm's {type(model).__name__} ({type(model).__module__}): {_reason(model)}; choose a ViT "
        f"({', '.join(family.encoder.__name__ for family in FAMILIES)})"
    )


def _reason(model: Any) -> str:
    widths = {info["num_chs"] for info in getattr(model, "feature_info", None) or []}
    grids = {info["reduction"] for info in getattr(model, "feature_info", None) or []}
    if heads_module(model) is None:
        return "it has no multi-head attention (a convolutional, MLP or other network)"
    if len(widths) > 1 or len(grids) > 1:
        return "it is hierarchical: the grid or the width of its tokens changes between stages"
    return "it is no plain stack of transformer blocks on one grid of tokens"

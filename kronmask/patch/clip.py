"""OpenAI's `clip` package (sequence first, weights in half precision on a GPU)."""

from __future__ import annotations

from clip.model import VisionTransformer
from torch import nn

from kronmask.patch.family import Family

__all__ = ["FAMILY", "find"]

FAMILY = Family(VisionTransformer, "transformer.resblocks", sequence_first=True)


def find(model: nn.Module) -> tuple[nn.Module, Family]:
    """The image tower of a CLIP, and its family.

    Raises:
        TypeError: the image tower is a ResNet, or there is none.
    """
    tower = model if isinstance(model, VisionTransformer) else getattr(model, "visual", None)
    if isinstance(tower, VisionTransformer):
        return tower, FAMILY
    part = "" if tower is None else f", whose image tower is {type(tower).__name__}"
    raise TypeError(
        "patch_vit patches OpenAI's CLIP with a VisionTransformer as image tower, not "
        f"{type(model).__module__}.{type(model).__qualname__}{part}"
    )

"""torchvision's `VisionTransformer`."""

from __future__ import annotations

from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from kronmask.patch.family import Family

__all__ = ["FAMILY", "find"]

FAMILY = Family(VisionTransformer, "encoder.layers")


def find(model: nn.Module) -> tuple[nn.Module, Family]:
    """The encoder in a model of torchvision, which is the model itself, and its family.

    Raises:
        TypeError: another architecture.
    """
    if isinstance(model, VisionTransformer):
        return model, FAMILY
    raise TypeError(
        f"patch_vit patches torchvision's VisionTransformer (vit_b_16, ...), not {type(model).__name__}: it is convolutional, "
        "hierarchical, or no image model"
    )

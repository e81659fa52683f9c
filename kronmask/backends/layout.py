"""How the results of backends lie in memory."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_stored"]


def as_stored(tensor: Tensor) -> Tensor:
    """`(B, H, L, D)`, physically `(B, L, H, D)`."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)

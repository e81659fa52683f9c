"""Kronecker-structured attention for video transformers."""

from kronmask import masks, nn
from kronmask.attention import attention_backend, kron_attention
from kronmask.mask import KronMask, eye, kron, ones
from kronmask.patch import param_groups, patch_vit, temporal_parameters, unpatch_vit
from kronmask.stream import FrameStream

__version__ = "0.1.0"

__all__ = [
    "FrameStream",
    "KronMask",
    "attention_backend",
    "eye",
    "kron",
    "kron_attention",
    "masks",
    "nn",
    "ones",
    "param_groups",
    "patch_vit",
    "temporal_parameters",
    "unpatch_vit",
]

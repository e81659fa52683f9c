"""FlexAttention on the kernels of FlashAttention-4 (`kernel_options={"BACKEND": "FLASH"}`, package flash-attn-4)."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from torch import Tensor

from kronmask.backends import flex
from kronmask.mask import KronMask

__all__ = ["backward", "forward", "refusal"]

forward = partial(flex.forward, kernel="FLASH")
backward = partial(flex.backward, kernel="FLASH")


def refusal(query: Tensor, key: Tensor, mask: KronMask) -> str | None:
    if query.device.type != "cuda" or torch.version.hip:
        return "FlashAttention-4 runs on NVIDIA GPUs"
    if torch.cuda.get_device_capability(query.device) < (9, 0):
        return "FlashAttention-4 needs a GPU of compute capability 9.0 or more"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-4 takes float16 and bfloat16, not {query.dtype}"
    if not _is_installed():
        return "it needs torch 2.10 and FlashAttention-4; pip install flash-attn-4"
    return flex.refusal(query, key, mask)


def _is_installed() -> bool:
    try:
        from torch.nn.attention.flex_attention import FlexKernelOptions

        return (
            importlib.util.find_spec("flash_attn.cute") is not None and "BACKEND" in FlexKernelOptions.__annotations__
        )
    except ImportError:  # an older torch, or no package of that name at all
        return False

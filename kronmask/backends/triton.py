"""The fused Triton kernels (`kronmask.kernels`): no mask in memory, whatever the mask; forward and backward, deterministic."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from kronmask.mask import KronMask

__all__ = ["backward", "backward_groups", "forward", "forward_groups", "refusal"]

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(query: Tensor, key: Tensor, mask: KronMask) -> str | None:
    if query.dtype not in DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {query.dtype}"
    if query.shape[3] > MAX_HEAD_DIM:
        return f"the Triton kernels take a head_dim of at most {MAX_HEAD_DIM}, not {query.shape[3]}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if query.device.type not in ("cuda", "cpu"):
        return f"the Triton kernels run on NVIDIA and AMD GPUs, not on {query.device.type}"
    if query.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
            return (
                "Triton has no CPU; move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts to run the "
                "kernels in Triton's interpreter, which is slow and for checking"
            )
        from kronmask.kernels import forward as kernels
        from kronmask.kernels.primitives import is_interpreted

        if not is_interpreted(kernels.forward_kernel):
            return "TRITON_INTERPRET was set after Triton was imported; set it before Python starts"
    return None


def forward(query: Tensor, key: Tensor, value: Tensor, mask: KronMask, scale: float) -> tuple[Tensor, Tensor]:
    return forward_groups(query, key, value, (mask,), scale)


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: KronMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward_groups(grad_output, grad_lse, query, key, value, output, lse, (mask,), scale)


def forward_groups(
    query: Tensor, key: Tensor, value: Tensor, masks: tuple[KronMask, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` with a mask for each group of heads, in one launch."""
    from kronmask.kernels.forward import attention_forward

    return attention_forward(query.detach(), key.detach(), value.detach(), masks, scale)


def backward_groups(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    masks: tuple[KronMask, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` with a mask for each group of heads, in one launch for the queries and one for keys and values."""
    from kronmask.kernels.backward import attention_backward

    return attention_backward(grad_output, grad_lse, query, key, value, output, lse, masks, scale)

"""FlexAttention (`torch.nn.attention.flex_attention`) with the mask's analytic `BlockMask`.

On CUDA it is compiled to one kernel. On the CPU its kernel returns no log-sum-exp and has no backward, so there it runs unfused
and forward only: good for checking, not for speed (`mask.block_mask()` in your own compiled call is the way to time it).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kronmask.backends.layout import as_stored
from kronmask.device_cache import kept_on_device
from kronmask.mask import KronMask

__all__ = ["backward", "forward", "refusal"]

RECOMPILATIONS = 256


def refusal(query: Tensor, key: Tensor, mask: KronMask) -> str | None:
    if query.dtype == torch.float64:
        return "FlexAttention has no float64"
    if query.device.type not in ("cpu", "cuda"):
        return f"FlexAttention is used on CPU and CUDA here, not on {query.device.type}"
    if query.device.type == "cuda" and query.shape[3] < 16:
        return f"FlexAttention takes head_dim from 16 on CUDA, not {query.shape[3]}"
    return None


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: KronMask, scale: float, *, kernel: str = "AUTO"
) -> tuple[Tensor, Tensor]:
    """`kernel` is FlexAttention's own choice of a backend, "AUTO" (Triton) or "FLASH" (see `flex_flash`)."""
    if not query.numel():  # FlexAttention returns no log-sum-exp of nothing
        return _nothing_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    output, lse = _flex(query.detach(), key.detach(), value.detach(), mask, scale, kernel)
    return as_stored(output), lse.float().contiguous()


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
    *,
    kernel: str = "AUTO",
) -> tuple[Tensor, Tensor, Tensor]:
    if query.device.type == "cpu":
        raise NotImplementedError(
            f"backend 'flex' cannot train on the CPU: FlexAttention has no CPU backward. Got query {tuple(query.shape)} "
            f"{query.dtype}, {mask!s}. Backends that can: sdpa, dense."
        )
    if not query.numel():
        return _nothing_like(query), _nothing_like(key), _nothing_like(value)
    with _autograd():  # FlexAttention keeps its backward to itself: run it again under autograd
        query, key, value = inputs = tuple(x.detach().requires_grad_() for x in (query, key, value))
        outputs = _flex(query, key, value, mask, scale, kernel)
        if grad_lse is None:
            grads = torch.autograd.grad(outputs[0], inputs, grad_output)
        else:
            grads = torch.autograd.grad(outputs, inputs, (grad_output, grad_lse.to(outputs[1].dtype)))
    return tuple(as_stored(grad) for grad in grads)  # type: ignore[return-value]


def _nothing_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(
        1, 2
    )  # a tensor of its own, as a custom op must return


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside of a custom op, below which torch takes it out of the dispatcher."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: KronMask, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention import flex_attention as flex

    # torch 2.9 asks for the LSE in another way than those before it
    with_aux = hasattr(flex, "AuxRequest")
    arguments: dict[str, Any] = {
        "block_mask": _block_mask(mask, kernel, query.device),
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        **({"return_aux": flex.AuxRequest(lse=True)} if with_aux else {"return_lse": True}),
    }
    if query.device.type == "cpu":
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            output, extra = flex.flex_attention(query, key, value, **arguments)
    else:
        if kernel != "AUTO":
            arguments["kernel_options"] = {"BACKEND": kernel}
        # over the limit it would be compiled for no further mask and run unfused, without a word
        with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
            output, extra = _compiled(kernel)(query, key, value, **arguments)
    return output, extra.lse if with_aux else extra


@kept_on_device(maxsize=64)
def _block_mask(mask: KronMask, kernel: str, device: torch.device) -> Any:
    tall = kernel == "FLASH" and torch.cuda.get_device_capability(device) >= (
        10,
        0,
    )  # it takes two tiles of queries at once
    return mask.block_mask((256, 128) if tall else 128, device=device)


@lru_cache(maxsize=2)
def _compiled(kernel: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # FlashAttention-4 is made for one shape at a time
    return torch.compile(flex_attention, fullgraph=True, dynamic=False if kernel == "FLASH" else None)

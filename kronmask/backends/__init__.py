"""The ways to compute attention under a mask; each is one module with `refusal`, `forward` and `backward`.

`refusal(query, key, mask)` says in words why the backend cannot take these inputs, or returns None.
`forward(query, key, value, mask, scale)` returns the output, physically `(B, L, H, D)`, and the LSE `(B, H, L)`.
`backward(grad_output, grad_lse, query, key, value, output, lse, mask, scale)` returns the three gradients, physically
`(B, L, H, D)`; `grad_lse` may be None. A mask for each group of heads is `groups`, which calls these for each group, or `triton`
for all at once.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from kronmask.backends import dense, flex, sdpa, triton
from kronmask.mask import KronMask

__all__ = ["BACKENDS", "check_name", "get"]

BACKENDS: dict[str, ModuleType] = {"triton": triton, "sdpa": sdpa, "flex": flex, "dense": dense}


def check_name(backend: str) -> None:
    """Raises ValueError if there is no such backend."""
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)} and auto")


def get(backend: str, query: Tensor, key: Tensor, mask: KronMask) -> ModuleType:
    """The module that runs these inputs; `auto` takes `sdpa`, or `dense` where that cannot (float64, say).

    Raises:
        NotImplementedError: the backend cannot take them; says why and which backends can.
    """
    if backend == "auto":
        backend = next(
            (name for name in ("sdpa", "dense") if BACKENDS[name].refusal(query, key, mask) is None), "dense"
        )
    reason = BACKENDS[backend].refusal(query, key, mask)
    if reason is not None:
        able = [name for name, module in BACKENDS.items() if module.refusal(query, key, mask) is None]
        raise NotImplementedError(
            f"backend {backend!r} cannot compute this attention: {reason}. Got query {tuple(query.shape)} {query.dtype} on "
            f"{query.device}, key {tuple(key.shape)}, {mask!s}. Backends that can: {', '.join(able) or 'none'}."
        )
    return BACKENDS[backend]

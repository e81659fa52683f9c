"""A mask for each group of heads: in one launch where the fused kernels run all groups, group by group elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from kronmask.backends import triton
from kronmask.mask import KronMask

__all__ = ["backward", "check_heads", "forward", "head_groups"]


def check_heads(heads: int, key_heads: int, count: int) -> None:
    """Raises ValueError for heads that do not divide into so many equal groups."""
    if count < 1 or heads % count or (key_heads % count and count % key_heads):
        raise ValueError(
            f"{heads} heads of queries and {key_heads} of keys and values do not divide into {count} equal groups, one for each "
            "mask"
        )


def head_groups(query: Tensor, key: Tensor, value: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The heads of `query (B, H, L, D)` in `count` equal groups, in order, each with its heads of `key` and `value`.

    Raises:
        ValueError: heads that do not divide into so many groups.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    check_heads(heads, key_heads, count)
    for group in range(count):
        queries = query[:, group * heads // count : (group + 1) * heads // count]
        first = group * key_heads // count
        shared = slice(first, max(first + 1, (group + 1) * key_heads // count))  # one head may serve several groups
        yield queries, key[:, shared], value[:, shared]


def forward(
    modules: Sequence[ModuleType], query: Tensor, key: Tensor, value: Tensor, masks: tuple[KronMask, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """The backends' `forward`; `modules` are those that run each group."""
    if all(module is triton for module in modules):
        return triton.forward_groups(query, key, value, masks, scale)
    parts = zip(modules, head_groups(query, key, value, len(masks)), masks, strict=True)
    outputs, lses = zip(*(module.forward(*part, mask, scale) for module, part, mask in parts), strict=True)
    return _joined(outputs), torch.cat(lses, 1)


def backward(
    modules: Sequence[ModuleType],
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
    """The backends' `backward`; `modules` are those that run each group."""
    if all(module is triton for module in modules):
        return triton.backward_groups(grad_output, grad_lse, query, key, value, output, lse, masks, scale)
    count, grads = len(masks), []
    lses = [None] * count if grad_lse is None else grad_lse.chunk(count, 1)
    parts = zip(modules, head_groups(query, key, value, count), masks, strict=True)
    of_queries = zip(*(x.chunk(count, 1) for x in (grad_output, output, lse)), lses, strict=True)
    for (module, part, mask), (grad_of_group, *results, grad_of_lse) in zip(parts, of_queries, strict=True):
        grads.append(module.backward(grad_of_group, grad_of_lse, *part, *results, mask, scale))
    grad_query, grad_key, grad_value = (_joined(of_groups) for of_groups in zip(*grads, strict=True))
    sharing = count // key.shape[1]
    return grad_query, _sum_shared(grad_key, sharing), _sum_shared(grad_value, sharing)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Groups of heads `(B, h, L, D)` to all heads `(B, H, L, D)`, physically `(B, L, H, D)`."""
    return torch.cat([part.transpose(1, 2) for part in parts], 2).transpose(1, 2)


def _sum_shared(grad: Tensor, sharing: int) -> Tensor:
    """The sum over groups of heads that share a head of keys; each of them has a head in `grad (B, H, L, D)`."""
    if sharing <= 1:
        return grad
    return grad.transpose(1, 2).unflatten(2, (-1, sharing)).sum(3, dtype=torch.float32).to(grad.dtype).transpose(1, 2)

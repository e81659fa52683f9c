"""The plain reference: builds the mask and the scores. In float64 it is the specification of every other backend."""

from __future__ import annotations

import torch
from einops import reduce, repeat
from torch import Tensor

from kronmask.mask import KronMask

__all__ = ["backward", "forward", "refusal"]


def refusal(query: Tensor, key: Tensor, mask: KronMask) -> str | None:
    return None


def forward(query: Tensor, key: Tensor, value: Tensor, mask: KronMask, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _to_accumulator(query, key, value)
    scores = _scores(q, k, mask, scale)
    lse = scores.logsumexp(-1)
    probabilities = _probabilities(scores, lse)
    output = torch.einsum("bhqk,bhkd->bqhd", probabilities, v)
    return output.to(query.dtype).contiguous().transpose(1, 2), lse.contiguous()


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
    q, k, v = _to_accumulator(query, key, value)
    grad = grad_output.to(q.dtype)
    probabilities = _probabilities(_scores(q, k, mask, scale), lse)
    # dS = P * (dO.V - sum(dO * O) + dLSE); equal to the textbook softmax gradient plus that of the log-sum-exp
    delta = torch.einsum("bhqd,bhqd->bhq", grad, output.to(q.dtype))
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_scores = probabilities * (torch.einsum("bhqd,bhkd->bhqk", grad, v) - delta[..., None]) * scale
    grad_query = torch.einsum("bhqk,bhkd->bqhd", grad_scores, k)
    heads = key.shape[1]
    grad_key = reduce(torch.einsum("bhqk,bhqd->bkhd", grad_scores, q), "b l (h g) d -> b l h d", "sum", h=heads)
    grad_value = reduce(torch.einsum("bhqk,bhqd->bkhd", probabilities, grad), "b l (h g) d -> b l h d", "sum", h=heads)
    grads = (grad_query, grad_key, grad_value)
    return tuple(g.to(query.dtype).contiguous().transpose(1, 2) for g in grads)  # type: ignore[return-value]


def _to_accumulator(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in float32 (float64 stays), key and value repeated for each query head."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    key, value = (repeat(x.to(dtype), "b h l d -> b (h g) l d", g=group) for x in (key, value))
    return query.to(dtype), key, value


def _scores(query: Tensor, key: Tensor, mask: KronMask, scale: float) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", query * scale, key)
    return scores.masked_fill(~mask.dense(query.device), float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Softmax of the scores by their LSE; 0 in the row of a query that sees no key."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0)[..., None])

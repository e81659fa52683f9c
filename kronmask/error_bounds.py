"""Error bounds for attention, elementwise, from the absolute values that enter each sum.

A sum of n products computed in precision u errs by at most about `lambda * sqrt(n) * u` times the sum of absolute values, with
overwhelming probability (Higham and Mary 2019, SIAM J. Sci. Comput. 41(5), A2815; lambda = 8 here). Half-precision kernels also
round the probabilities, the score gradients, the output and each part's result once each, which is `ROUNDINGS` times u of the
input dtype, and torch's CPU kernel takes an exponential that is good to about 14 bits for them. Everything is computed in
float64 from the inputs as the kernel got them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kronmask.backends import dense
from kronmask.mask import KronMask

__all__ = ["Expected", "expect", "problem"]

LAMBDA = 8.0
ROUNDINGS = 6.0
UNIT_FLOAT32 = 2.0**-24
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-24}
FAST_EXP = {torch.float32: 0.0, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-14, torch.float64: 0.0}


@dataclass
class Expected:
    """Values in float64 by name, the bound of each element's error, and what of it is no rounding and does not average out."""

    values: dict[str, Tensor]
    bounds: dict[str, Tensor]
    systematic: dict[str, float]


def expect(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, grad_lse: Tensor | None, mask: KronMask
) -> Expected:
    """Output, LSE and gradients of attention with the default scale, from the inputs in their own dtype."""
    unit, scale = UNIT[query.dtype], query.shape[3] ** -0.5
    q, k, v, g = (x.detach().double() for x in (query, key, value, grad_output))
    output, lse = dense.forward(q, k, v, mask, scale)
    grads = dense.backward(g, grad_lse, q, k, v, output, lse, mask, scale)
    values = dict(zip(("output", "lse", "grad_query", "grad_key", "grad_value"), (output, lse, *grads), strict=True))

    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    probability = (q @ k.mT * scale).masked_fill(~mask.dense(q.device), float("-inf"))
    probability = torch.exp(probability - lse.masked_fill(lse.isinf(), 0)[..., None])
    magnitude = (q.abs() @ k.abs().mT).amax().item() * scale  # what rounding the scores is relative to
    length = max(q.shape[2], k.shape[2]) + q.shape[3]
    relative = ROUNDINGS * unit + LAMBDA * length**0.5 * UNIT_FLOAT32 * (1 + magnitude)
    tiny = 2.0**-24 if query.dtype == torch.float16 else 2.0**-60  # float16 has subnormals worth counting
    delta = (g.abs() * output.abs()).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta + grad_lse.double().abs()[..., None] * (1 if query.dtype == torch.float32 else 2)
    grad_score = probability * (g.abs() @ v.abs().mT + delta) * scale
    bounds = {
        "output": probability @ v.abs(),
        "lse": torch.ones_like(lse),
        "grad_query": grad_score @ k.abs(),
        "grad_key": _sum_groups(grad_score.mT @ q.abs(), group),
        "grad_value": _sum_groups(probability.mT @ g.abs(), group),
    }
    bounds = {name: bound * relative + tiny for name, bound in bounds.items()}
    exact_lse = LAMBDA * length**0.5 * UNIT_FLOAT32 * (1 + magnitude)  # accumulated in float32 in every dtype
    bounds["lse"] = exact_lse + FAST_EXP[query.dtype] + 2 * UNIT_FLOAT32 * lse.abs().masked_fill(lse.isinf(), 0)
    return Expected(values, bounds, {"lse": FAST_EXP[query.dtype]})


def _sum_groups(grad: Tensor, group: int) -> Tensor:
    return grad.unflatten(1, (-1, group)).sum(2)


def problem(actual: Mapping[str, Tensor], expected: Expected) -> str | None:
    """What is wrong, in words, or None.

    Each element must be finite (or -inf where the LSE is), within its bound, and by rounding off by a quarter of it on average.
    """
    for name, tensor in actual.items():
        want, bound = expected.values[name], expected.bounds[name]
        if tensor.shape != want.shape:
            return f"{name} has shape {tuple(tensor.shape)}, not {tuple(want.shape)}"
        if not torch.equal(tensor.isneginf(), want.isneginf()):
            return f"{name} is -inf at the wrong places"
        finite = ~want.isneginf()
        error, bound = (tensor.detach().double() - want)[finite].abs(), bound[finite]
        if error.numel():
            worst = (error / bound).max().item()
            if not worst <= 1:
                return f"{name} is off by {worst:.3g} x its bound"
            mean = ((error - expected.systematic.get(name, 0.0)).clamp(min=0) / bound).mean().item()
            if not mean <= 0.25:
                return f"{name} is off by {mean:.3g} x its bound on average"
    return None

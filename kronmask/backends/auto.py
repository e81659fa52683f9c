"""Which backend `auto` takes: on a GPU the fastest by measurement, elsewhere `sdpa`.

Forward and backward are chosen apart, since every backend's backward takes any backend's output and log-sum-exp. What is measured
runs on random numbers of the caller's shapes and memory layout, and must first agree with float64 on some frames, within the
bounds of the conformance suite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from kronmask import tuning
from kronmask.backends import dense, flex, flex_flash, sdpa, triton
from kronmask.mask import KronMask

__all__ = ["Step", "choose"]

Step = Literal["forward", "backward"]
UNMEASURED: dict[str, ModuleType] = {"sdpa": sdpa, "dense": dense}  # the first that can
CANDIDATES: dict[str, ModuleType] = {"triton": triton, "sdpa": sdpa, "flex": flex, "flex-flash": flex_flash}

REMEMBERED = 1024  # cases in memory; a mask of many frames is large

_chosen: dict[Hashable, str] = {}


def choose(step: Step, query: Tensor, key: Tensor, mask: KronMask) -> str:
    """The name of the backend that runs a pass on these inputs."""
    if not tuning.is_gpu(query.device) or not query.numel() or not key.numel():
        return _unmeasured(query, key, mask)
    settings = _settings()
    case = (step, mask, query.shape, key.shape, query.dtype, query.device, settings)
    name = _chosen.get(case)
    if name is None:
        name = _measured(step, query, key, mask, settings)
        if name is None and tuning.is_busy(query):
            return _unmeasured(query, key, mask)  # the next call may measure
        if len(_chosen) >= REMEMBERED:
            _chosen.clear()
        _chosen[case] = name = name or _unmeasured(query, key, mask)
    return name


def _unmeasured(query: Tensor, key: Tensor, mask: KronMask) -> str:
    return next((name for name, module in UNMEASURED.items() if module.refusal(query, key, mask) is None), "dense")


def _settings() -> str:
    """The process's settings that decide what runs: the flash kernels under `sdpa`, and whether all must be deterministic."""
    kernels = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()  # since torch 2.10
    return (kernels or "FA2") + (" deterministic" if torch.are_deterministic_algorithms_enabled() else "")


def _measured(step: Step, query: Tensor, key: Tensor, mask: KronMask, settings: str) -> str | None:
    """What was measured before, or is now; None if it may not be, or nothing could be."""
    able = {name: module for name, module in CANDIDATES.items() if module.refusal(query, key, mask) is None}
    if not able:
        return None
    digest = hashlib.sha256(mask.rule.encode()).hexdigest()[:16]
    sizes = f"{mask.query_frames}x{mask.key_frames} {mask.query_tokens}x{mask.key_tokens} {mask.prefix}"
    shapes = f"{tuple(query.shape)} {tuple(key.shape)} {query.dtype}"
    text = f"attention {step} {shapes} | mask {digest} {sizes} | {settings} | {tuning.environment(query.device)}"
    known = tuning.recall(text, list(able))
    if known is not None or not tuning.may_measure(query):
        return known
    try:
        trial = _Trial(step, able, query, key, mask)
    except torch.OutOfMemoryError as error:
        tuning.log.warning("%s: no memory to measure in (%s)", text, error)
        return None
    calls = {name: trial.call(name) for name in able}
    return tuning.fastest(text, calls, query.device, trial.check)


class _Trial:
    """Random inputs like the caller's, what a pass does to them, and what it should give in some places.

    What is looked at are the queries of two frames (and of the prefix) in the last clip and under the last head of the keys. A
    gradient of the output that is zero everywhere else makes these queries alone decide all gradients.
    """

    def __init__(self, step: Step, modules: dict[str, Any], query: Tensor, key: Tensor, mask: KronMask) -> None:
        from kronmask.error_bounds import expect

        generator = torch.Generator(query.device).manual_seed(0)
        self.step, self.modules, self.mask, self.scale = step, modules, mask, query.shape[3] ** -0.5
        self.query, self.key, self.value, self.grad_output = (
            torch.empty_like(x, requires_grad=False).normal_(generator=generator) for x in (query, key, key, query)
        )
        frames = sorted({mask.query_frames // 2, mask.query_frames - 1})
        first = [mask.prefix + frame * mask.query_tokens for frame in frames]
        rows = [*range(mask.prefix), *(row for start in first for row in range(start, start + mask.query_tokens))]
        self.rows = torch.tensor(rows, device=query.device)
        self.heads = slice(query.shape[1] - query.shape[1] // key.shape[1], None)
        self.few = torch.zeros_like(self.grad_output).index_copy_(2, self.rows, self.grad_output[:, :, self.rows])
        self.expected = expect(
            self._looked_at(self.query), self.key[-1:, -1:], self.value[-1:, -1:], self._looked_at(self.grad_output), None,
            mask.select(query=frames),
        )  # fmt: skip
        self.forwards: dict[str, tuple[Tensor, Tensor]] = {}

    def call(self, name: str) -> Callable[[], object]:
        """The pass as it is timed."""
        if self.step == "forward":
            return lambda: self._forward(name)
        return lambda: self._backward(name, self.grad_output)

    def check(self, name: str) -> str | None:
        from kronmask.error_bounds import problem

        output, lse = self._forward(name)
        actual = {"output": self._looked_at(output), "lse": self._looked_at(lse)}
        if self.step == "backward":
            self.forwards[name] = output, lse
            grad_query, grad_key, grad_value = self._backward(name, self.few)
            actual |= {"grad_query": self._looked_at(grad_query)}
            actual |= {"grad_key": grad_key[-1:, -1:], "grad_value": grad_value[-1:, -1:]}
        return problem(actual, self.expected)

    def _looked_at(self, tensor: Tensor) -> Tensor:
        return tensor[-1:, self.heads].index_select(2, self.rows)

    def _forward(self, name: str) -> tuple[Tensor, Tensor]:
        return self.modules[name].forward(self.query, self.key, self.value, self.mask, self.scale)

    def _backward(self, name: str, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, lse = self.forwards[name]
        inputs = (self.query, self.key, self.value)
        return self.modules[name].backward(grad_output, None, *inputs, output, lse, self.mask, self.scale)

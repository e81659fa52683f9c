"""Tensors that are made once for each device and then kept: the tables of a mask, the bias of a block."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode

__all__ = ["KeptOnDevice", "kept_on_device"]

P = ParamSpec("P")
R = TypeVar("R")

_captured: dict[int, Any] = {}  # what CUDA graphs read: no cache may drop it, since a graph does not own its inputs


class KeptOnDevice(Generic[P, R]):
    """A function with an LRU cache whose results hold tensors on its argument `device`, the last.

    What it makes outlives the call that asks for it, so it is made as if nothing was going on around: not as tensors of
    inference mode, which no later training step could save, and on CUDA by a thread of its own, whose memory does not come from
    the pool of a graph that `torch.compile(mode="reduce-overhead")` is warming up for, and complete when it is returned, so that
    any stream may read it.
    """

    def __init__(self, make: Callable[P, R], maxsize: int) -> None:
        update_wrapper(self, make)
        self._kept = lru_cache(maxsize)(lambda *arguments: _make(make, *arguments))
        self.cache_clear = self._kept.cache_clear

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        made: R = self._kept(*args, **kwargs)  # type: ignore[arg-type]
        device = args[-1]
        if isinstance(device, torch.device) and device.type == "cuda" and _is_capturing():
            _captured[id(made)] = made
        return made


def kept_on_device(maxsize: int) -> Callable[[Callable[P, R]], KeptOnDevice[P, R]]:
    """Decorates a function of positional hashable arguments, of which the last is the `torch.device` of what it makes."""
    return lambda make: KeptOnDevice(make, maxsize)


def _make(make: Callable[..., R], *arguments: Any) -> R:
    device: torch.device = arguments[-1]
    if not _needs_a_thread(device):
        with torch.inference_mode(False):
            return make(*arguments)

    def on_device() -> R:
        with torch.cuda.device(device):
            made = make(*arguments)
            torch.cuda.current_stream().synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:  # inference mode is a thread's own, too
        return thread.submit(on_device).result()


def _needs_a_thread(device: torch.device) -> bool:
    return device.type == "cuda" and detect_fake_mode() is None


def _is_capturing() -> bool:
    # there may be no GPU, but fake tensors of one
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

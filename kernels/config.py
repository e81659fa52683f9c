"""Which block sizes, warps and pipeline stages each kernel runs with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kronmask.kernels.tiles import Blocks, choose_tiling
from kronmask.mask import KronMask

__all__ = ["PASSES", "Config", "choose"]

PASSES = ("forward", "backward_query", "backward_key")


@dataclass(frozen=True)
class Config:
    """A layout of rows, block sizes and compilation options of one kernel."""

    kind: str
    blocks: Blocks
    num_warps: int = 4
    num_stages: int = 2


def choose(step: str, mask: KronMask, query: Tensor) -> Config:
    """The configuration of a pass (one of PASSES) on the query's device; `mask` is the transpose for `backward_key`."""
    return _choose(step, mask, query.shape[3], query.dtype)


@lru_cache(maxsize=1024)
def _choose(step: str, mask: KronMask, head_dim: int, dtype: torch.dtype) -> Config:
    kind, blocks = choose_tiling(mask, (Blocks(128, 64), Blocks(64, 64)))
    return Config(kind, blocks)

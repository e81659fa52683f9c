"""Which layout, block sizes, warps and pipeline stages each kernel runs with.

A table gives, for an architecture, head dimension and precision, one or two block sizes, the best of a search by modelled cost
(`python -m kronmask.kernels.search`). For head dimensions 64, 80, 96 and 128 in bfloat16 they compile without spilled registers
and fit in shared memory, which `python -m kronmask.kernels.report` shows and a test holds; other head dimensions are filled up to
a power of two, and some of their kernels spill. The cost model of `tiles` then picks among the options and the layouts for the
mask at hand. The table rests on compiled code, not on timings: on a GPU its options are timed once for each mask and shape, and
the fastest is kept on disk (see `kronmask.tuning`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from kronmask import tuning
from kronmask.kernels.tiles import Blocks, choose_tiling
from kronmask.mask import KronMask

__all__ = ["PASSES", "Config", "Option", "architecture", "choose", "options"]

PASSES = ("forward", "backward_query", "backward_key")


@dataclass(frozen=True)
class Option:
    """Block sizes and compilation options of one kernel."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """A layout of rows (one of `tiles.KINDS`), block sizes and compilation options of one kernel."""

    kind: str
    blocks: Blocks
    num_warps: int = 4
    num_stages: int = 2


Row = tuple[tuple[int, int, int, int], ...]  # rows, columns, warps, stages of each option

# For each architecture: pass, then for head dimensions up to 64, 128 and 256 the options in half precision.
TABLE: dict[str, dict[str, tuple[Row, Row, Row]]] = {
    "sm_80": {
        "forward": (((128, 32, 4, 2), (64, 64, 4, 2)), ((128, 32, 8, 2),), ((64, 32, 8, 2),)),
        "backward_query": (((128, 32, 4, 2), (64, 64, 4, 2)), ((64, 128, 8, 2),), ((32, 32, 8, 1),)),
        "backward_key": (((64, 32, 4, 2),), ((64, 64, 8, 2),), ((32, 32, 8, 1),)),
    },
    "sm_90": {
        "forward": (((128, 64, 4, 2), (64, 64, 4, 2)), ((128, 64, 8, 2), (64, 64, 4, 2)), ((64, 32, 8, 2),)),
        "backward_query": (((64, 64, 4, 2),), ((128, 64, 8, 2),), ((64, 32, 8, 1),)),
        "backward_key": (((64, 64, 4, 2),), ((128, 32, 8, 2),), ((64, 32, 8, 1),)),
    },
    "sm_100": {
        "forward": (((128, 128, 8, 2), (64, 64, 4, 2)), ((128, 64, 8, 2),), ((64, 32, 8, 2),)),
        "backward_query": (((128, 64, 4, 2),), ((128, 32, 8, 2),), ((64, 32, 8, 1),)),
        "backward_key": (((128, 32, 4, 2),), ((64, 64, 8, 2),), ((64, 32, 8, 1),)),
    },
    "gfx942": {
        "forward": (((128, 64, 4, 1), (64, 64, 4, 1)), ((64, 64, 4, 1),), ((64, 32, 4, 1),)),
        "backward_query": (((64, 64, 4, 1),), ((64, 32, 4, 1),), ((32, 32, 4, 1),)),
        "backward_key": (((64, 32, 4, 1),), ((64, 32, 4, 1),), ((32, 32, 4, 1),)),
    },
    # small enough for the 99 KiB of shared memory of the smallest GPUs
    "other": {
        "forward": (((64, 64, 4, 2),), ((64, 32, 4, 2),), ((32, 32, 4, 1),)),
        "backward_query": (((64, 32, 4, 2),), ((32, 32, 4, 2),), ((32, 32, 4, 1),)),
        "backward_key": (((64, 32, 4, 2),), ((32, 32, 4, 2),), ((32, 32, 4, 1),)),
    },
    "interpreter": dict.fromkeys(PASSES, (((64, 64, 4, 1), (32, 32, 4, 1)),) * 3),
}
# float32 has no matrix instruction of full precision: small blocks, for the registers, on every GPU
FLOAT32: tuple[Row, Row, Row] = (((32, 32, 4, 2),), ((32, 16, 4, 2),), ((16, 16, 4, 1),))


def architecture(device: torch.device) -> str:
    """The name in TABLE that stands for a device."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942" if "gfx94" in torch.cuda.get_device_properties(device).gcnArchName else "other"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, "other")


def options(step: str, arch: str, head_dim: int, dtype: torch.dtype) -> tuple[Option, ...]:
    """The options of a pass (one of PASSES) on an architecture of TABLE."""
    size = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    row = FLOAT32[size] if dtype == torch.float32 and arch != "interpreter" else TABLE[arch][step][size]
    return tuple(Option(*entry) for entry in row)


def choose(step: str, mask: KronMask, query: Tensor, run: Callable[[Config], object]) -> Config:
    """The configuration of a pass (one of PASSES) for the query's device.

    `mask` is the transpose for "backward_key". `run` launches the kernel with a configuration; it is called only where options
    are timed, on a GPU (see `kronmask.tuning`).
    """
    arch = architecture(query.device)
    case = (step, mask, query.shape, query.dtype, query.device)
    config = _chosen.get(case)
    if config is None:
        config = _fastest(step, mask, query, run, arch)
        if config is None and tuning.is_gpu(query.device) and tuning.is_busy(query):
            return _estimated(step, mask, query.shape[3], query.dtype, arch)  # the next call may measure
        if len(_chosen) >= REMEMBERED:
            _chosen.clear()
        _chosen[case] = config = config or _estimated(step, mask, query.shape[3], query.dtype, arch)
    return config


REMEMBERED = 1024  # cases in memory; a mask of many frames is large
_chosen: dict[Hashable, Config] = {}


def _fastest(step: str, mask: KronMask, query: Tensor, run: Callable[[Config], object], arch: str) -> Config | None:
    """By time, of the options each in its best layout; None where nothing was timed or may be."""
    entries = options(step, arch, query.shape[3], query.dtype)
    if len(entries) == 1 or not tuning.is_gpu(query.device):
        return None
    candidates: dict[str, Config] = {}
    for option in entries:
        kind, blocks = choose_tiling(mask, (Blocks(option.rows, option.columns),))
        config = Config(kind, blocks, option.num_warps, option.num_stages)
        candidates[f"{kind} {blocks.rows}x{blocks.columns}, {config.num_warps} warps, {config.num_stages} stages"] = (
            config
        )
    rule = hashlib.sha256(mask.rule.encode()).hexdigest()[:16]
    sizes = f"{mask.query_frames}x{mask.key_frames} {mask.query_tokens}x{mask.key_tokens} {mask.prefix}"
    key = f"kernel {step} {tuple(query.shape)} {query.dtype} | mask {rule} {sizes} | {tuning.environment(query.device)}"
    name = tuning.recall(key, list(candidates))
    if name is None and tuning.may_measure(query):
        calls = {name: partial(run, config) for name, config in candidates.items()}
        name = tuning.fastest(key, calls, query.device, level=logging.DEBUG)
    return candidates[name] if name else None


@lru_cache(maxsize=1024)
def _estimated(step: str, mask: KronMask, head_dim: int, dtype: torch.dtype, arch: str) -> Config:
    candidates = {Blocks(o.rows, o.columns): o for o in options(step, arch, head_dim, dtype)}
    kind, blocks = choose_tiling(mask, tuple(candidates))
    return Config(kind, blocks, candidates[blocks].num_warps, candidates[blocks].num_stages)

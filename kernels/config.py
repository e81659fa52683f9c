"""Which layout, block sizes, warps and pipeline stages each kernel runs with.

A table gives, for an architecture, head dimension and precision, one or two block sizes, the best of a search by modelled cost
(`python -m kronmask.kernels.search`), and other ways to load blocks. For head dimensions 64, 80, 96 and 128 in bfloat16 they fit
in shared memory and spill no registers in the loop over whole blocks, and most of them none at all; `python -m
kronmask.kernels.report` shows it and a test holds it. Other head dimensions are filled up to a power of two, and some of their
kernels spill. The cost model of `tiles` then picks among the options that load as the first
does and the layouts for the mask at hand. The table rests on compiled code, not on timings: on a GPU all options are timed once
for each mask and shape, and the fastest is kept on disk (see `kronmask.tuning`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import triton
from torch import Tensor

from kronmask import tuning
from kronmask.kernels.tiles import Blocks, choose_tiling
from kronmask.mask import KronMask

__all__ = ["LOADS", "PASSES", "Config", "Option", "architecture", "choose", "defaults", "options"]

PASSES = ("forward", "backward_query", "backward_key")
# How the loops over whole blocks load them: by pointers; through descriptors (sm_90 and newer); or through descriptors and in
# warps of their own, as others start the matrix products (the forward on sm_100 alone).
LOADS = ("pointers", "descriptors", "specialised")
# Triton 3.7 divides the loop among warps in another way, which the report does not model.
SPECIALISES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


@dataclass(frozen=True)
class Option:
    """Block sizes and compilation options of one kernel."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    loads: str = "pointers"  # one of LOADS

    def __str__(self) -> str:
        suffix = "" if self.loads == "pointers" else f" {self.loads}"
        return f"{self.rows}x{self.columns}w{self.num_warps}s{self.num_stages}{suffix}"


@dataclass(frozen=True)
class Config:
    """A layout of rows (one of `tiles.KINDS`), block sizes and compilation options of one kernel."""

    kind: str
    blocks: Blocks
    num_warps: int = 4
    num_stages: int = 2
    loads: str = "pointers"  # one of LOADS


Row = tuple[tuple[int, int, int, int] | tuple[int, int, int, int, str], ...]  # the fields of each option

# For each architecture: pass, then for head dimensions up to 64, 128 and 256 the options in half precision.
TABLE: dict[str, dict[str, tuple[Row, Row, Row]]] = {
    "sm_80": {
        "forward": (((128, 32, 4, 2), (64, 64, 4, 2)), ((128, 32, 4, 2), (64, 64, 4, 2)), ((64, 32, 8, 2),)),
        "backward_query": (((128, 32, 4, 2), (64, 64, 4, 2)), ((64, 64, 4, 2),), ((32, 32, 8, 1),)),
        "backward_key": (((128, 32, 4, 2),), ((64, 128, 8, 2),), ((32, 32, 8, 1),)),
    },
    "sm_90": {
        "forward": (
            ((128, 64, 4, 2), (64, 64, 4, 2), (128, 64, 4, 2, "descriptors")),
            ((128, 128, 8, 2, "descriptors"), (64, 64, 4, 2, "descriptors"), (128, 64, 8, 2), (64, 64, 4, 2)),
            ((64, 32, 8, 2),),
        ),
        "backward_query": (((64, 64, 4, 2),), ((64, 64, 4, 2, "descriptors"), (128, 64, 8, 2)), ((64, 32, 8, 1),)),
        "backward_key": (((64, 64, 4, 2),), ((64, 64, 4, 2, "descriptors"), (128, 32, 8, 2)), ((64, 32, 8, 1),)),
    },
    "sm_100": {
        "forward": (
            ((128, 64, 4, 2, "descriptors"), (128, 128, 4, 2, "specialised"), (128, 64, 4, 2)),
            ((128, 128, 8, 2, "specialised"), (128, 128, 8, 2, "descriptors"), (128, 64, 8, 2)),
            ((64, 32, 8, 2),),
        ),
        "backward_query": (((128, 64, 4, 2),), ((128, 128, 8, 2, "descriptors"), (128, 32, 8, 2)), ((64, 32, 8, 1),)),
        "backward_key": (
            ((128, 64, 4, 2, "descriptors"), (128, 32, 4, 2)),
            ((128, 64, 8, 2, "descriptors"), (64, 64, 8, 2)),
            ((64, 32, 8, 1),),
        ),
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


def defaults(step: str, arch: str, head_dim: int, dtype: torch.dtype, descriptors: bool = True) -> tuple[Option, ...]:
    """The options among which the cost model picks: those that the inputs can take and that load as the first of them."""
    offered = _offered(step, arch, head_dim, dtype, descriptors)
    return tuple(option for option in offered if option.loads == offered[0].loads)


def choose(
    step: str, mask: KronMask, query: Tensor, run: Callable[[Config], object], descriptors: bool = False
) -> Config:
    """The configuration of a pass (one of PASSES) for the query's device.

    `mask` is the transpose for "backward_key". `run` launches the kernel with a configuration; it is called only where options
    are timed, on a GPU (see `kronmask.tuning`). `descriptors` says whether keys and values can be loaded through such.
    """
    arch = architecture(query.device)
    case = (step, mask, query.shape, query.dtype, query.device, descriptors)
    config = _chosen.get(case)
    if config is None:
        config = _fastest(step, mask, query, run, arch, descriptors)
        if config is None and tuning.is_gpu(query.device) and tuning.is_busy(query):
            return _estimated(step, mask, query.shape[3], query.dtype, arch, descriptors)  # the next call may measure
        if len(_chosen) >= REMEMBERED:
            _chosen.clear()
        _chosen[case] = config = config or _estimated(step, mask, query.shape[3], query.dtype, arch, descriptors)
    return config


REMEMBERED = 1024  # cases in memory; a mask of many frames is large
_chosen: dict[Hashable, Config] = {}


def _offered(step: str, arch: str, head_dim: int, dtype: torch.dtype, descriptors: bool) -> list[Option]:
    """The options that the inputs can take; there is always one with pointers."""
    every = options(step, arch, head_dim, dtype)
    return [
        option
        for option in every
        if option.loads == "pointers" or (descriptors and (SPECIALISES or option.loads != "specialised"))
    ]


def _fastest(
    step: str, mask: KronMask, query: Tensor, run: Callable[[Config], object], arch: str, descriptors: bool
) -> Config | None:
    """By time, of the options each in its best layout; None where nothing was timed or may be."""
    entries = _offered(step, arch, query.shape[3], query.dtype, descriptors)
    if len(entries) == 1 or not tuning.is_gpu(query.device):
        return None
    candidates: dict[str, Config] = {}
    for option in entries:
        kind, blocks = choose_tiling(mask, (Blocks(option.rows, option.columns),))
        words = f"{kind} {blocks.rows}x{blocks.columns}, {option.num_warps} warps, {option.num_stages} stages"
        words += "" if option.loads == "pointers" else f", {option.loads}"
        candidates[words] = Config(kind, blocks, option.num_warps, option.num_stages, option.loads)
    rule = hashlib.sha256(mask.rule.encode()).hexdigest()[:16]
    sizes = f"{mask.query_frames}x{mask.key_frames} {mask.query_tokens}x{mask.key_tokens} {mask.prefix}"
    inputs = f"{tuple(query.shape)} {query.dtype}" + (" described" if descriptors else "")
    key = f"kernel {step} {inputs} | mask {rule} {sizes} | {tuning.environment(query.device)}"
    name = tuning.recall(key, list(candidates))
    if name is None and tuning.may_measure(query):
        calls = {name: partial(run, config) for name, config in candidates.items()}
        name = tuning.fastest(key, calls, query.device, level=logging.DEBUG)
    return candidates[name] if name else None


@lru_cache(maxsize=1024)
def _estimated(step: str, mask: KronMask, head_dim: int, dtype: torch.dtype, arch: str, descriptors: bool) -> Config:
    candidates = {Blocks(o.rows, o.columns): o for o in defaults(step, arch, head_dim, dtype, descriptors)}
    kind, blocks = choose_tiling(mask, tuple(candidates))
    option = candidates[blocks]
    return Config(kind, blocks, option.num_warps, option.num_stages, option.loads)

"""Which layout, block sizes, warps and pipeline stages each kernel runs with.

A table gives, for an architecture, head dimension and precision, one or two block sizes, the best of a search by modelled cost
(`python -m kronmask.kernels.search`). For head dimensions 64, 80, 96 and 128 in bfloat16 they compile without spilled registers
and fit in shared memory, which `python -m kronmask.kernels.report` shows and a test holds; other head dimensions are filled up to
a power of two, and some of their kernels spill. The cost model of `tiles` then picks among the options and the layouts for the
mask at hand. The table rests on compiled code, not on timings; with KRONMASK_AUTOTUNE=1 its candidates are timed on the user's
GPU, once for each mask and shape, and the fastest is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from kronmask.kernels.tiles import KINDS, Blocks, choose_tiling
from kronmask.mask import KronMask

__all__ = ["PASSES", "Config", "Option", "architecture", "cache_file", "choose", "options", "tune"]

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

    `mask` is the transpose for "backward_key". `run` launches the kernel with a configuration; it is called only where
    KRONMASK_AUTOTUNE=1 asks for timings on a GPU.
    """
    arch = architecture(query.device)
    if os.environ.get("KRONMASK_AUTOTUNE") == "1" and query.device.type != "cpu":
        return _tuned(step, mask, query, run, arch)
    return _estimated(step, mask, query.shape[3], query.dtype, arch)


@lru_cache(maxsize=1024)
def _estimated(step: str, mask: KronMask, head_dim: int, dtype: torch.dtype, arch: str) -> Config:
    candidates = {Blocks(o.rows, o.columns): o for o in options(step, arch, head_dim, dtype)}
    kind, blocks = choose_tiling(mask, tuple(candidates))
    return Config(kind, blocks, candidates[blocks].num_warps, candidates[blocks].num_stages)


# ---- tuning ---------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where timings are kept: `kronmask/autotune.json` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kronmask" / "autotune.json"


_tuned_configs: dict[str, Config] = {}


def _tuned(step: str, mask: KronMask, query: Tensor, run: Callable[[Config], object], arch: str) -> Config:
    sizes = f"{mask.query_frames}x{mask.key_frames} {mask.query_tokens}x{mask.key_tokens} {mask.prefix}"
    rule = hashlib.sha256(mask.rule.encode()).hexdigest()[:16]
    versions = f"{torch.cuda.get_device_name(query.device)} | torch {torch.__version__} | triton {triton.__version__}"
    key = f"{versions} | {step} {tuple(query.shape)} {query.dtype} | {rule} {sizes}"
    if key not in _tuned_configs:
        candidates = [
            Config(kind, Blocks(o.rows, o.columns), o.num_warps, o.num_stages)
            for o in options(step, arch, query.shape[3], query.dtype)
            for kind in KINDS
        ]
        _tuned_configs[key] = tune(key, candidates, run, cache_file())
    return _tuned_configs[key]


def tune(
    key: str,
    candidates: Sequence[Config],
    run: Callable[[Config], object],
    path: Path,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> Config:
    """The fastest candidate, from the file if it has one for this key, else by timing, and then kept in the file.

    Args:
        key: names all that the choice depends on: GPU, versions, pass, shape, mask.
        run: launches the kernel with a candidate.
        measure: milliseconds of a call; `triton.testing.do_bench` by default.

    A damaged file is ignored with a warning, and replaced; so is an entry that is none of the candidates.
    """
    known = _read(path)
    if key in known:
        for candidate in candidates:
            if json.loads(json.dumps(asdict(candidate))) == known[key]:
                return candidate
        warnings.warn(f"{path} has no candidate for {key!r}: {known[key]!r}; timing again", stacklevel=2)
    measure = measure or triton.testing.do_bench
    times = []
    for candidate in candidates:
        try:
            times.append(measure(partial(run, candidate)))
        except triton.runtime.errors.OutOfResources:
            times.append(float("inf"))
    best = candidates[min(range(len(times)), key=times.__getitem__)]
    _write(path, {**_read(path, quiet=True), key: asdict(best)})
    return best


def _read(path: Path, quiet: bool = False) -> dict[str, object]:
    try:
        known = json.loads(path.read_text())
        if not isinstance(known, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if not quiet:
            warnings.warn(f"ignoring the timings in {path}, which cannot be read ({error}); timing again", stacklevel=3)
        return {}
    return known


def _write(path: Path, known: dict[str, object]) -> None:
    """Replaces the file in one step, so that processes side by side never read half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"could not keep the timings in {path}: {error}", stacklevel=3)

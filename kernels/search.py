"""Searches the defaults of `config.TABLE`: compiles a wide space of options and ranks them by the modelled cost of masks.

    python -m kronmask.kernels.search [--arch sm_90] [--head-dim 64] [--step forward] [--json FILE]

Options that spill registers in the loop over whole blocks or do not fit in shared memory are out, and so are those of one stage,
which wait for each copy. The others are ranked by the share of the GPU's peak that a mask's own pairs would reach, averaged over
KMT and KMCT and several sizes of clips, with the overlap that the blocks on an SM allow; what they spill in other loops costs
what reading and writing it takes. A search takes minutes for each pass, the second time less: Triton keeps what it has compiled.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
import triton

from kronmask import masks
from kronmask.kernels.compiled import CompiledKernel, compile_kernel
from kronmask.kernels.config import LOADS, PASSES, Option
from kronmask.kernels.cost import mask_cost
from kronmask.kernels.machine import GPUS
from kronmask.kernels.primitives import block_dim

__all__ = ["SIZES", "ranked", "score", "space"]

MOST_SPILLED = 512  # bytes of all a kernel: with more, other stages spill in whole blocks too
LATENCY = 800  # cycles that a copy from memory may take: H100, Luo et al. 2024, arXiv 2402.13499, and some of load
SPECIALISED = ("sm_100", "forward")  # the GPU and the pass that have loops of specialised warps
SIZES = ((8, 50), (8, 197), (8, 257), (32, 197))  # frames and tokens of the clips for which options are ranked


def space(step: str, arch: str, head_dim: int) -> Iterator[tuple[int, int, int, str]]:
    """The rows, columns, warps and loads worth compiling."""
    depth = block_dim(head_dim)
    for rows, columns, warps in product((64, 128), (32, 64, 128), (4, 8)):
        if rows == 64 and warps == 8 and arch == "sm_90":
            continue  # two groups of warps would share 64 rows, and compute some of their products twice
        accumulators = 2 if step == "backward_key" else 1
        scores = 1 if step == "forward" else 2
        held = rows * (scores * columns + (0 if arch == "sm_100" else accumulators * depth)) / (32 * warps)
        if held <= 224:  # float32 values a thread, of 255 registers
            for loads in LOADS:
                if loads == "pointers" or (arch != "sm_80" and (loads == "descriptors" or (arch, step) == SPECIALISED)):
                    yield rows, columns, warps, loads


def score(kernel: CompiledKernel) -> float:
    """Modelled share of the peak for the pairs of KMT and KMCT, the geometric mean over both and over SIZES."""
    shares = []
    for name, size in product(("kmt", "kmct"), SIZES):
        cost = mask_cost(kernel, masks.NAMES[name](*size))
        shares.append(cost.ideal / cost.estimated)
    return math.exp(sum(map(math.log, shares)) / len(shares))


def ranked(step: str, arch: str, head_dim: int) -> list[tuple[float, CompiledKernel]]:
    """Every option that spills nothing in whole blocks, the best first; of each tile with as few stages as hide the copies."""
    found = []
    for rows, columns, warps, loads in space(step, arch, head_dim):
        for stages in (2, 3, 4):
            kernel = _compiled(step, Option(rows, columns, warps, stages, loads), head_dim, arch)
            if kernel is None or kernel.spilled_bytes > MOST_SPILLED or kernel.shared_bytes > kernel.shared_limit:
                break
            if kernel.loops["whole"].counts.get("stack") or not kernel.blocks:
                continue  # the compiler allocates a few registers more or less for other stages
            found.append((score(kernel), kernel))
            turn = kernel.blocks * kernel.loops["whole"].estimated(kernel.streams("whole"))
            if (stages - 1) * turn >= LATENCY:
                break
    return sorted(found, key=lambda pair: -pair[0])


def _compiled(step: str, option: Option, head_dim: int, arch: str) -> CompiledKernel | None:
    """The kernel for KMT and KMCT, None if it does not compile."""
    try:
        return compile_kernel(step, option, "kmt", head_dim, torch.bfloat16, arch)
    except Exception as error:  # the compiler's own failures have no common class
        warnings.warn(f"{arch} {step} D={head_dim} {option} does not compile: {str(error)[:200]}", stacklevel=2)
        return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kronmask.kernels.search", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--step", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--keep", type=int, default=6, help="how many of the best to print")
    parser.add_argument("--json", type=Path, help="also write them to this file")
    chosen = parser.parse_args(arguments)
    rows = []
    for arch, head_dim, step in product(chosen.arch, chosen.head_dim, chosen.step):
        best = ranked(step, arch, head_dim)
        print(f"{arch} D={head_dim} {step}: {len(best)} options without spills in whole blocks", flush=True)
        for value, kernel in best[: chosen.keep]:
            whole = kernel.loops["whole"]
            row = {
                "arch": arch,
                "head_dim": head_dim,
                "step": step,
                "option": str(kernel.option),
                "registers": kernel.registers,
                "spilled_bytes": kernel.spilled_bytes,
                "blocks": kernel.blocks,
                "score": round(value, 3),
                "overlapped": round(kernel.share(whole.overlapped), 3),
                "in_turn": round(kernel.share(whole.in_turn), 3),
                "estimated": round(kernel.share(whole.estimated(kernel.streams("whole"))), 3),
                "bound": max(whole.cycles, key=whole.cycles.__getitem__),
                "matrix": whole.shapes,
            }
            rows.append(row)
            print("  " + "  ".join(f"{key} {value}" for key, value in list(row.items())[3:]), flush=True)
    if chosen.json:
        content = {
            "command": " ".join(["python -m kronmask.kernels.search", *(arguments or sys.argv[1:])]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}; compiled here for GPUs that need not be, and not run",
            "versions": {"triton": triton.__version__},
            "rows": rows,
        }
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

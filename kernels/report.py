"""What the kernels would use on GPUs that are not there: compiles each, reads the machine code and models its cost.

    python -m kronmask.kernels.report [--arch sm_80 sm_90 sm_100 gfx942] [--head-dim 64 128] [--json FILE]
    python -m kronmask.kernels.report --loops --arch sm_90 --head-dim 64 --step forward [--option 128x64w4s2]

For each architecture, pass and default configuration, and for the variants that joint attention and KMT need (KMCT runs KMT's):
registers, spilled bytes, shared memory against the limit, the kind of matrix instruction, and in the hot loop (one turn is one
block of keys) the instructions and asynchronous copies. Then, for clips of several sizes, the blocks that the chosen tiling
visits relative to a dense grid and to the mask's exact area. `--loops` tells of every loop the cycles of each pipe of an SM, by
the model of `machine`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from kronmask import masks
from kronmask.kernels.compiled import ARCHITECTURES, TYPES, CompiledKernel, compile_kernel
from kronmask.kernels.config import PASSES, Option, options
from kronmask.kernels.machine import GPUS, PIPES
from kronmask.kernels.tiles import Blocks, choose_tiling, dense_visits, make_tiling, transposed

__all__ = ["VisitedTiles", "kernel_reports", "loop_table", "main", "tile_reports"]


@dataclass(frozen=True)
class VisitedTiles:
    """What a pass visits for a clip: relative to a dense grid of the same blocks, and to the mask's own area."""

    step: str
    mask: str
    frames: int
    tokens: int
    kind: str
    rows: int
    columns: int
    of_dense: float
    of_area: float


# ---- reports --------------------------------------------------------------------------------------------------------


def kernel_reports(
    architectures: list[str], head_dims: list[int], dtype: torch.dtype = torch.bfloat16
) -> Iterator[CompiledKernel]:
    """Every default configuration, in the variants of joint attention and of KMT and KMCT."""
    for arch in architectures:
        for head_dim in head_dims:
            for step in PASSES:
                for option in options(step, arch, head_dim, dtype):
                    for mask in ("joint", "kmt"):
                        yield compile_kernel(step, option, mask, head_dim, dtype, arch)


def loop_table(kernel: CompiledKernel) -> str:
    """The work of each loop of a kernel as text: cycles of an SM for one turn by pipe, and the share of the peak."""
    lines = [
        f"{kernel.arch} {kernel.step} D={kernel.head_dim} {kernel.mask} {kernel.rows}x{kernel.columns} w{kernel.num_warps} "
        f"s{kernel.num_stages}: {kernel.registers} registers, {kernel.spilled_bytes} bytes spilled, {kernel.shared_bytes} bytes "
        f"of shared memory, {kernel.blocks} blocks an SM",
        f"  {'loop':10}{'issued':>7}"
        + "".join(f"{pipe:>9}" for pipe in PIPES)
        + f"{'overlap':>9}{'in turn':>9}{'estimate':>9}"
        f"{'share: overlap':>16}{'in turn':>9}{'estimate':>9}  matrix instructions",
    ]
    whole = kernel.loops["whole"]
    for name, w in {**kernel.loops, "diagonal": kernel.diagonal, "tile": kernel.tile}.items():
        if w is None:
            continue
        times = (w.overlapped, w.in_turn, w.estimated(kernel.blocks))
        line = f"  {name:10}{w.instructions:7}" + "".join(f"{w.cycles[pipe]:9.0f}" for pipe in PIPES)
        line += "".join(f"{cycles:9.0f}" for cycles in times)
        if name in kernel.loops:
            line += "".join(
                f"{kernel.share(cycles):{width}.2f}" for cycles, width in zip(times, (16, 9, 9), strict=True)
            )
            line += "  " + ", ".join(f"{count} {shape}" for shape, count in w.shapes.items())
        else:
            line += f"{'':34}"
        lines.append(f"{line}   {w.overlapped / whole.overlapped:.2f} x whole")
    return "\n".join(lines)


def tile_reports(arch: str, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[VisitedTiles]:
    """What the chosen tilings visit, forward and backward."""
    for step in PASSES:
        candidates = tuple(Blocks(o.rows, o.columns) for o in options(step, arch, head_dim, dtype))
        for name in ("kmt", "kmct"):
            for frames in (8, 16, 32):
                for tokens in (50, 197, 257, 577):
                    mask = masks.NAMES[name](frames, tokens)
                    mask = transposed(mask) if step == "backward_key" else mask
                    kind, blocks = choose_tiling(mask, candidates)
                    visits = make_tiling(mask, blocks, kind).visits
                    yield VisitedTiles(
                        step=step,
                        mask=name,
                        frames=frames,
                        tokens=tokens,
                        kind=kind,
                        rows=blocks.rows,
                        columns=blocks.columns,
                        of_dense=visits / dense_visits(mask, blocks),
                        of_area=visits * blocks.rows * blocks.columns / mask.num_pairs,
                    )


def _option(text: str) -> Option:
    found = re.fullmatch(r"(\d+)x(\d+)w(\d+)s(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 128x64w4s2")
    return Option(*map(int, found.groups()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kronmask.kernels.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=list(TYPES.values()), default="bf16")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--loops", action="store_true", help="tell the work of every loop, and nothing else")
    parser.add_argument(
        "--step", nargs="+", choices=PASSES, default=list(PASSES), help="with --loops: these passes alone"
    )
    parser.add_argument(
        "--option", type=_option, help="with --loops: 128x64w4s2 (rows, columns, warps, stages) for the defaults"
    )
    options_ = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("the report compiles the kernels; run it without TRITON_INTERPRET")
    dtype = next(dtype for dtype, name in TYPES.items() if name == options_.dtype)

    if options_.loops:
        for arch in (arch for arch in options_.arch if arch in GPUS):
            for head_dim in options_.head_dim:
                for step in options_.step:
                    chosen = (options_.option,) if options_.option else options(step, arch, head_dim, dtype)
                    for option in chosen:
                        for mask in ("joint", "kmt"):
                            print(loop_table(compile_kernel(step, option, mask, head_dim, dtype, arch)), flush=True)
        return
    print(f"triton {triton.__version__}, {options_.dtype}")
    print(
        f"{'arch':8}{'pass':16}{'D':>4} {'mask':6}{'tile':>9}{'warps':>6}{'stages':>7}{'registers':>10}{'spilled':>8}"
        f"{'shared memory':>18} {'matrix':8}{'hot loop':>9}{'copies':>7}"
    )
    compiled = []
    for r in kernel_reports(options_.arch, options_.head_dim, dtype):
        compiled.append(r)
        print(
            f"{r.arch:8}{r.step:16}{r.head_dim:4} {r.mask:6}{f'{r.rows}x{r.columns}':>9}{r.num_warps:6}{r.num_stages:7}"
            f"{r.registers:10}{r.spilled_bytes:8}{f'{r.shared_bytes} of {r.shared_limit}':>18} {r.matrix:8}"
            f"{r.instructions:9}{r.async_copies:7}",
            flush=True,
        )
    print("\nblocks visited relative to a dense grid, and relative to the mask's area")
    visited = {}
    for arch in options_.arch:
        for head_dim in options_.head_dim:
            rows = list(tile_reports(arch, head_dim, dtype))
            visited[f"{arch} {head_dim}"] = [asdict(row) for row in rows]
            for v in rows:
                print(
                    f"{arch:8}{v.step:16}{head_dim:4} {v.mask:6}T={v.frames:<3} N={v.tokens:<4} {v.kind:7}"
                    f"{f'{v.rows}x{v.columns}':>8}{v.of_dense:7.3f}{v.of_area:7.3f}"
                )
    if options_.json:
        content = {
            "command": " ".join(["python -m kronmask.kernels.report", *(arguments or sys.argv[1:])]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}; compiled here for GPUs that need not be, and not run",
            "versions": {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "kernels": [asdict(r) for r in compiled],
            "tiles": visited,
        }
        options_.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

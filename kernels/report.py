"""What the kernels would use on GPUs that are not there: compiles each, reads the machine code and models its cost.

    python -m kronmask.kernels.report [--arch sm_80 sm_90 sm_100 gfx942] [--head-dim 64 128] [--json FILE]
    python -m kronmask.kernels.report --loops --arch sm_90 --head-dim 64 --step forward [--option "128x64w4s2 descriptors"]

For each architecture, pass and default configuration, and for the variants that joint attention and KMT need (KMCT runs KMT's):
registers, spilled bytes, shared memory against the limit, the kind of matrix instruction, how many blocks an SM holds, and what
share of the GPU's peak a whole block of keys reaches by the model of `machine`: with all pipes overlapped, with matrix products
and all else in turn, and an estimate between the two, for the blocks of scores that an SM works on at once: as many as it holds
blocks of threads, times those of a warp-specialised loop. Then, for clips of several sizes, what the chosen tilings visit and
cost.
`--loops` tells of every loop the cycles of each pipe.
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
from pathlib import Path
from typing import Any

import torch
import triton

from kronmask import masks
from kronmask.kernels.compiled import ARCHITECTURES, TYPES, CompiledKernel, compile_kernel
from kronmask.kernels.config import LOADS, PASSES, Option, options
from kronmask.kernels.cost import mask_cost
from kronmask.kernels.machine import GPUS, PIPES
from kronmask.kernels.tiles import Blocks, choose_tiling, dense_visits, make_tiling, transposed

__all__ = ["kernel_reports", "kernel_row", "loop_table", "main", "mask_rows"]

SIZES = ((8, 50), (8, 197), (8, 257), (8, 577), (32, 197))  # frames and tokens of the clips that are costed


# ---- kernels --------------------------------------------------------------------------------------------------------


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


def kernel_row(kernel: CompiledKernel) -> dict[str, Any]:
    """What of a kernel is stored.

    Shares are of the peak, for whole blocks; `stack` counts the instructions of each loop that save or load spilled registers.
    """
    row: dict[str, Any] = {
        "arch": kernel.arch,
        "step": kernel.step,
        "head_dim": kernel.head_dim,
        "dtype": kernel.dtype,
        "mask": kernel.mask,
        "option": str(kernel.option),
        "registers": kernel.registers,
        "spilled_bytes": kernel.spilled_bytes,
        "shared_bytes": kernel.shared_bytes,
        "shared_limit": kernel.shared_limit,
        "matrix": kernel.matrix,
        "instructions": kernel.instructions,
        "matrix_instructions": kernel.matrix_instructions,
        "async_copies": kernel.async_copies,
    }
    if kernel.tile is None:  # no model of this GPU
        return row
    whole = kernel.loops["whole"]
    shares = {
        name: round(kernel.share(cycles), 3)
        for name, cycles in (
            ("overlapped", whole.overlapped),
            ("in_turn", whole.in_turn),
            ("estimated", whole.estimated(kernel.streams("whole"))),
        )
    }
    row |= {
        "blocks": kernel.blocks,
        "share": shares,
        "shapes": whole.shapes,
        "width": round(whole.ideal / whole.cycles["tensor"], 3),
        "loops": {
            name: {pipe: round(cycles) for pipe, cycles in work.cycles.items()} for name, work in kernel.loops.items()
        },
        "stack": {name: work.counts.get("stack", 0) for name, work in kernel.loops.items()},
        "diagonal": round(kernel.diagonal.overlapped) if kernel.diagonal else 0,
        "tile": round(kernel.tile.overlapped),
    }
    if kernel.partitions:
        row |= {"partitions": [list(partition) for partition in kernel.partitions], "buffers": kernel.buffers}
    return row


def loop_table(kernel: CompiledKernel) -> str:
    """The work of each loop of a kernel as text: cycles of an SM for one turn by pipe, and the share of the peak."""
    lines = [
        f"{kernel.arch} {kernel.step} D={kernel.head_dim} {kernel.mask} {kernel.option}: "
        f"{kernel.registers} registers, {kernel.spilled_bytes} bytes spilled, {kernel.shared_bytes} bytes of shared memory, "
        f"{kernel.blocks} blocks an SM"
        + "".join(f", {warps} warps of {registers} registers" for warps, registers in kernel.partitions),
        f"  {'loop':10}{'issued':>7}"
        + "".join(f"{pipe:>9}" for pipe in PIPES)
        + f"{'overlap':>9}{'in turn':>9}{'estimate':>9}"
        f"{'share: overlap':>16}{'in turn':>9}{'estimate':>9}  matrix instructions",
    ]
    whole = kernel.loops["whole"]
    for name, w in {**kernel.loops, "diagonal": kernel.diagonal, "tile": kernel.tile}.items():
        if w is None:
            continue
        times = (w.overlapped, w.in_turn, w.estimated(kernel.streams(name)))
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


# ---- masks ----------------------------------------------------------------------------------------------------------


def mask_rows(kernels: list[CompiledKernel]) -> Iterator[dict[str, Any]]:
    """What KMT and KMCT visit and cost in the kernels of one architecture, head dimension and pass, relative to joint attention.

    `kernels` are pairs: compiled for joint attention, and for such masks. The tiling chooses among those that load as the first
    does, as on the GPU. Costs are those of the loops over blocks, with all pipes overlapped in each; of all that a tile does; and
    of the latter with the overlap that the blocks on an SM allow. `share` is the share of the GPU's peak for the mask's own pairs
    by the last.
    """
    kernels = [kernel for kernel in kernels if kernel.loads == kernels[0].loads]
    pairs = {Blocks(k.rows, k.columns): (joint, k) for joint, k in zip(kernels[::2], kernels[1::2], strict=True)}
    for name in ("kmt", "kmct"):
        for frames, tokens in SIZES:
            mask, whole = masks.NAMES[name](frames, tokens), masks.joint(frames, tokens)
            walked = transposed(mask) if kernels[0].step == "backward_key" else mask
            kind, blocks = choose_tiling(walked, tuple(pairs))
            visits = make_tiling(walked, blocks, kind).visits
            joint, kernel = pairs[blocks]
            row: dict[str, Any] = {
                "arch": kernel.arch,
                "step": kernel.step,
                "head_dim": kernel.head_dim,
                "mask": name,
                "frames": frames,
                "tokens": tokens,
                "kind": kind,
                "rows": blocks.rows,
                "columns": blocks.columns,
                "of_dense": visits / dense_visits(walked, blocks),
                "of_area": visits * blocks.rows * blocks.columns / mask.num_pairs,
            }
            if kernel.tile is not None:
                cost, all_pairs = mask_cost(kernel, mask), mask_cost(joint, whole)
                row["loops"] = cost.loops / all_pairs.loops
                row["with_tiles"] = (cost.loops + cost.tiles) / (all_pairs.loops + all_pairs.tiles)
                row["estimated"] = cost.estimated / all_pairs.estimated
                row["share"] = cost.ideal / cost.estimated
            yield {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


# ---- command --------------------------------------------------------------------------------------------------------


def _option(text: str) -> Option:
    found = re.fullmatch(rf"(\d+)x(\d+)w(\d+)s(\d+)(?: ({'|'.join(LOADS)}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 128x64w4s2 or '128x64w4s2 descriptors'")
    rows, columns, warps, stages = map(int, found.groups()[:4])
    return Option(rows, columns, warps, stages, found[5] or "pointers")


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
        "--option",
        type=_option,
        help="with --loops: 128x64w4s2 (rows, columns, warps, stages; how it loads) for the defaults",
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
        f"{'arch':8}{'pass':16}{'D':>4} {'mask':6}{'option':>25}{'registers':>10}{'spilled':>8}{'shared memory':>18} "
        f"{'matrix':8}{'hot loop':>9}{'copies':>7}{'blocks':>7}{'overlapped':>11}{'in turn':>8}{'estimated':>10}"
    )
    stored: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    for arch in options_.arch:
        for head_dim in options_.head_dim:
            compiled = list(kernel_reports([arch], [head_dim], dtype))
            for r in map(kernel_row, compiled):
                stored.append(r)
                print(
                    f"{r['arch']:8}{r['step']:16}{r['head_dim']:4} {r['mask']:6}{r['option']:>25}{r['registers']:10}"
                    f"{r['spilled_bytes']:8}{r['shared_bytes']:9} of {r['shared_limit']:6} {r['matrix']:8}"
                    f"{r['instructions']:9}{r['async_copies']:7}{r.get('blocks', ''):7}"
                    + "".join(f"{share:10.2f}" for share in r.get("share", {}).values()),
                    flush=True,
                )
            for step in PASSES:
                costs += mask_rows([kernel for kernel in compiled if kernel.step == step])
    print("\nblocks visited relative to a dense grid; cost relative to joint attention; share of the peak")
    for c in costs:
        print(
            f"{c['arch']:8}{c['step']:16}{c['head_dim']:4} {c['mask']:6}T={c['frames']:<3} N={c['tokens']:<4} {c['kind']:7}"
            f"{c['rows']:4}x{c['columns']:<3}{c['of_dense']:7.3f}"
            + "".join(f"{c[key]:7.3f}" for key in ("loops", "with_tiles", "estimated", "share") if key in c)
        )
    if options_.json:
        content = {
            "command": " ".join(["python -m kronmask.kernels.report", *(arguments or sys.argv[1:])]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}; compiled here for GPUs that need not be, and not run",
            "versions": {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        for key, rows in (("kernels", stored), ("masks", costs)):
            lines.append(f' "{key}": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]")
        options_.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

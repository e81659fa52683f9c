"""What the kernels would use on GPUs that are not there: compiles each and reads the machine code.

    python -m kronmask.kernels.report [--arch sm_80 sm_90 sm_100 gfx942] [--head-dim 64 128] [--json FILE]

For each architecture, pass and default configuration, and for the variants that joint attention and KMT need (KMCT runs KMT's):
registers, spilled bytes, shared memory against the limit, the kind of matrix instruction, and in the hot loop (one turn is one
block of keys) the instructions and asynchronous copies. Then, for clips of several sizes, the blocks that the chosen tiling
visits relative to a dense grid and to the mask's exact area. Arguments are specialised as the JIT would: without the knowledge
that pointers and strides are multiples of 16 there would be no asynchronous copies.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kronmask import masks
from kronmask.kernels import backward, forward, primitives
from kronmask.kernels.config import PASSES, Option, options
from kronmask.kernels.tiles import Blocks, choose_tiling, dense_visits, make_tiling, transposed

__all__ = [
    "ARCHITECTURES",
    "CompiledKernel",
    "VisitedTiles",
    "compile_kernel",
    "kernel_reports",
    "main",
    "tile_reports",
]

# Target, and shared memory that a block may use: CUDA C++ Programming Guide, table of compute capabilities; CDNA 3 has 64 KiB.
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
KERNELS = {
    "forward": forward.forward_kernel,
    "backward_query": backward.backward_query_kernel,
    "backward_key": backward.backward_key_kernel,
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Machine instructions that stand for each kind of matrix instruction, the newest kind first.
MATRIX = {"tcgen05": r"^UTC\w*MMA", "wgmma": r"^[HQI]GMMA", "mma": r"^[HIQ]MMA", "mfma": r"^v_mfma"}
COPIES = r"^(LDGSTS|UTMALDG|UBLKCP|(buffer|global)_load\S* .*\blds\b)"


@dataclass(frozen=True)
class CompiledKernel:
    """What one compiled kernel uses. The last three are of the hot loop; one turn computes `rows x columns` scores."""

    arch: str
    step: str
    head_dim: int
    dtype: str
    mask: str
    rows: int
    columns: int
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix: str
    instructions: int
    matrix_instructions: int
    async_copies: int


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


def compile_kernel(
    step: str, option: Option, mask: str, head_dim: int, dtype: torch.dtype, arch: str, **variant: int
) -> CompiledKernel:
    """Compiles the variant of a pass that a mask needs ("joint", or "kmt") and reads what it uses.

    `variant` sets compile-time constants of the kernel to other values (`PATTERNS=True`).

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where there is nothing to compile.
    """
    kernel: Any = KERNELS[step]
    if primitives.is_interpreted(kernel):
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1; the report compiles, so unset it")
    structured = mask != "joint"
    constants = {
        "HAS_GRAD_LSE": False,
        "GROUP": 1,
        "HEAD_DIM": head_dim,
        "BLOCK_D": primitives.block_dim(head_dim),
        "BLOCK_M": option.rows,
        "BLOCK_N": option.columns,
        "DIAGONALS": int(structured),
        "TESTED": structured,
        "PRECISION": "ieee",
        **variant,
    }
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], list] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constexprs[(index,)] = constants[name]
            continue
        signature[name] = _argument_type(name, TYPES[dtype])
        if signature[name].startswith("*") or (signature[name] == "i32" and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    target, shared_limit = ARCHITECTURES[arch]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=target,
        options={"num_warps": option.num_warps, "num_stages": option.num_stages},
    )
    usage = _amd_usage(compiled) if target.backend == "hip" else _nvidia_usage(compiled)
    registers, spilled, lines = usage
    loop = hot_loop(lines)
    matrix = next((kind for kind, pattern in MATRIX.items() if any(re.match(pattern, line) for line in loop)), "none")
    return CompiledKernel(
        arch=arch,
        step=step,
        head_dim=head_dim,
        dtype=TYPES[dtype],
        mask=mask,
        rows=option.rows,
        columns=option.columns,
        num_warps=option.num_warps,
        num_stages=option.num_stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        shared_limit=shared_limit,
        matrix=matrix,
        instructions=sum(not line.endswith(":") for line in loop),
        matrix_instructions=sum(bool(re.match(MATRIX.get(matrix, "$^"), line)) for line in loop),
        async_copies=sum(bool(re.match(COPIES, line)) for line in loop),
    )


def _argument_type(name: str, dtype: str) -> str:
    if name in ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value"):
        return f"*{dtype}"
    if name in ("lse", "grad_lse", "delta"):
        return "*fp32"
    if name == "patterns":
        return "*u8"
    if name.endswith("_table") or name == "diagonals":
        return "*i32"
    return "fp32" if name in ("scale", "log2_scale") else "i32"


# ---- machine code ---------------------------------------------------------------------------------------------------


def _nvidia_usage(compiled: Any) -> tuple[int, int, list[str]]:
    """Registers, stack bytes and the lines (labels and instructions) of a CUDA kernel, by the tools in Triton's wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output_of(tools / "cuobjdump", "-res-usage", file.name)
        assembly = _output_of(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers:\n{usage}")
    lines = []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(.*?)\s*;", line)
        if label:
            lines.append(label[1] + ":")
        elif instruction:
            lines.append(instruction[1])
    return int(found[1]), int(found[2]), lines


def _amd_usage(compiled: Any) -> tuple[int, int, list[str]]:
    assembly = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{field}:\s+(\d+)", assembly)), default=0)

    lines = []
    for line in assembly.splitlines():
        text = line.split(";")[0].strip()
        if re.match(r"\.LBB\w+:", text) or (text and not text.startswith(".") and not text.endswith(":")):
            lines.append(re.sub(r"\s+", " ", text))
    return number("vgpr_count"), 4 * number("vgpr_spill_count"), lines


def _output_of(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def hot_loop(lines: list[str]) -> list[str]:
    """The lines of the first innermost loop that multiplies matrices: the whole blocks' loop stands first in each kernel."""
    at = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    spans = []
    for i, line in enumerate(lines):
        branch = re.match(r"(?:BRA\S*|s_c?branch\S*)\s.*?(\.L\w+)", line)
        if branch and at.get(branch[1], i) < i:
            spans.append((at[branch[1]], i + 1))
    loops = [s for s in spans if any(re.match(p, line) for p in MATRIX.values() for line in lines[slice(*s)])]
    inner = [s for s in loops if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in loops)]
    if not inner:
        return []
    first, last = min(inner)
    return lines[first:last]


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kronmask.kernels.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=list(TYPES.values()), default="bf16")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options_ = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("the report compiles the kernels; run it without TRITON_INTERPRET")
    dtype = next(dtype for dtype, name in TYPES.items() if name == options_.dtype)

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

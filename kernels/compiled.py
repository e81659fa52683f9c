"""Compiles a kernel for a GPU that need not be there, and reads what its machine code uses.

Arguments are specialised as the JIT would: without the knowledge that pointers and strides are multiples of 16 there would be no
asynchronous copies.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kronmask.kernels import backward, forward, primitives
from kronmask.kernels.config import Option
from kronmask.kernels.machine import (
    GPUS,
    MATRIX,
    Gpu,
    Work,
    blocks_per_sm,
    is_instruction,
    matrix_loops,
    other_loops,
    partitions,
    work,
)
from kronmask.kernels.tiles import LOOPS

__all__ = ["ARCHITECTURES", "TYPES", "Code", "CompiledKernel", "compile_kernel", "read_code"]

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
COPIES = r"(LDGSTS|UTMALDG|UBLKCP|(buffer|global)_load\S* .*\blds\b)"
PRODUCTS = {"forward": 2, "backward_query": 3, "backward_key": 4}  # matrix products of a block


@dataclass(frozen=True)
class CompiledKernel:
    """What one compiled kernel uses.

    Attributes:
        instructions, matrix_instructions, async_copies: of the hot loop; one turn computes `rows x columns` scores.
        blocks: how many an SM holds (0 where there is no model of the GPU, as for those below).
        partitions: warps, and the registers of each, of the partitions of a warp-specialised hot loop; empty where it is none.
        buffers: blocks of scores that such a loop works on at once.
        ideal: cycles of an SM for the products of one turn with the head's own dimensions, at the full rate.
        loops: the work of one turn of each loop that multiplies matrices, named as in `tiles.LOOPS`.
        diagonal: the work of one turn of the loop over diagonals, None where there is none.
        tile: the work of the code in no loop, once a tile (of branches, both sides).
    """

    arch: str
    step: str
    head_dim: int
    dtype: str
    mask: str
    rows: int
    columns: int
    num_warps: int
    num_stages: int
    loads: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix: str
    instructions: int
    matrix_instructions: int
    async_copies: int
    blocks: int
    partitions: tuple[tuple[int, int], ...]
    buffers: int
    ideal: float
    loops: dict[str, Work]
    diagonal: Work | None
    tile: Work | None

    @property
    def option(self) -> Option:
        return Option(self.rows, self.columns, self.num_warps, self.num_stages, self.loads)

    def streams(self, loop: str) -> int:
        """How many blocks of scores an SM works on in one of `tiles.LOOPS` without waiting for each other."""
        return self.blocks * (self.buffers if loop == "whole" else 1)

    def share(self, cycles: float) -> float:
        """Share of the GPU's peak for matrix products when a whole block takes so many cycles."""
        return self.ideal / cycles


def compile_kernel(
    step: str, option: Option, mask: str, head_dim: int, dtype: torch.dtype, arch: str, **variant: int
) -> CompiledKernel:
    """Compiles the variant of a pass that a mask needs ("joint", or "kmt") and reads what it uses.

    `variant` sets compile-time constants of the kernel to other values (`DIAGONALS=2`).

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
        "LOADS": option.loads,
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
        if name.endswith("_blocks"):
            if option.loads == "pointers":
                signature[name], constexprs[(index,)] = "constexpr", None
            else:
                signature[name] = (
                    f"tensordesc<{TYPES[dtype]}[1, 1, {option.columns}, {primitives.block_dim(head_dim)}]>"
                )
            continue
        signature[name] = _argument_type(name, TYPES[dtype])
        if signature[name].startswith("*") or (signature[name] == "i32" and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    target, shared_limit = ARCHITECTURES[arch]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=target,
        options={"num_warps": option.num_warps, "num_stages": option.num_stages, **primitives.COMPILED},
    )
    row_bytes = primitives.block_dim(head_dim) * dtype.itemsize  # boxes are of at most 128 bytes a row
    boxes = -(-row_bytes // 128)
    code = read_code(compiled, arch, option.num_warps, option.columns * row_bytes // boxes, boxes)
    hot = code.hot_loop
    matrix = next(
        (kind for kind, pattern in MATRIX.items() if any(is_instruction(line, pattern) for line in hot)), "none"
    )
    ideal = PRODUCTS[step] * 2 * option.rows * option.columns * head_dim
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
        loads=option.loads,
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit=shared_limit,
        matrix=matrix,
        instructions=sum(not line.endswith(":") for line in hot),
        matrix_instructions=sum(is_instruction(line, MATRIX.get(matrix, "$^")) for line in hot),
        async_copies=sum(is_instruction(line, COPIES) for line in hot),
        blocks=code.blocks,
        partitions=code.partitions,
        buffers=code.buffers,
        ideal=ideal / GPUS[arch].flop if arch in GPUS else 0.0,
        loops=dict(zip(LOOPS, code.loops, strict=False)),
        diagonal=code.others[0] if code.others else None,
        tile=code.tile,
    )


def _argument_type(name: str, dtype: str) -> str:
    if name in ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value"):
        return f"*{dtype}"
    if name in ("lse", "grad_lse", "delta"):
        return "*fp32"
    if name.endswith("_table") or name == "diagonals":
        return "*i32"
    return "fp32" if name in ("scale", "log2_scale") else "i32"


# ---- machine code ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """What machine code uses: of each loop that multiplies matrices, of the other loops, and of the code in no loop.

    Where there is no model of the GPU, there is no work and no number of blocks. `partitions` and `buffers` as of a kernel.
    """

    registers: int
    spilled_bytes: int
    blocks: int
    hot_loop: list[str]
    loops: list[Work]
    others: list[Work]
    tile: Work | None
    partitions: tuple[tuple[int, int], ...] = ()
    buffers: int = 1


def read_code(compiled: Any, arch: str, num_warps: int, box_bytes: int, boxes: int = 1) -> Code:
    """Reads a kernel that Triton compiled; the tensor memory accelerator copies blocks as so many boxes of so many bytes.

    Of a box that reaches beyond the head dimension all counts, as do the lanes of pointers that do.
    """
    gpu = GPUS.get(arch)
    registers, spilled, lines = _nvidia_usage(compiled) if gpu else _amd_usage(compiled)
    if gpu and "ttg.warp_specialize(" in compiled.asm["ttgir"]:
        return _specialised(compiled, gpu, num_warps, (box_bytes, boxes), registers, spilled, lines)
    loops = matrix_loops(lines)
    hot = loops[0] if loops else []
    if gpu is None:
        return Code(registers, spilled, 0, hot, [], [], None)
    others, outside = other_loops(lines)
    works = [work(loop, gpu, num_warps, box_bytes, boxes) for loop in loops]
    tile = work(outside, gpu, num_warps, box_bytes, boxes)
    if works and works[0].cycles["exp2"]:  # turns that were peeled off the loops (sm_100): the loops turn as much less
        tile = tile.without(works[0], int(tile.cycles["exp2"] / works[0].cycles["exp2"]))
    tensor_columns = getattr(compiled.metadata, "tmem_size", 0)
    blocks = blocks_per_sm(gpu, registers, num_warps, compiled.metadata.shared, tensor_columns)
    plain = [work(loop, gpu, num_warps, box_bytes, boxes) for loop in others]
    return Code(registers, spilled, blocks, hot, works, plain, tile)


def _specialised(
    compiled: Any, gpu: Gpu, num_warps: int, copies: tuple[int, int], registers: int, spilled: int, lines: list[str]
) -> Code:
    """Reads a kernel whose first loop over blocks is divided among partitions of warps (sm_100).

    Its first warps compute the softmax, and all else that the kernel does; others start copies, start matrix products, or rescale
    the output. A turn of the loop is one of each partition. How many warps each has, and how many blocks of scores lie in tensor
    memory, Triton's own code says; registers say the instructions that move them between warps. What the partitions wait for each
    other is not modelled, nor is what reading and writing tensor memory takes.
    """
    text = compiled.asm["ttgir"]
    warps = [num_warps, *map(int, re.findall(r"^\s*partition\d+\(.* num_warps\((\d+)\)", text, re.MULTILINE))]
    depths = re.findall(r"ttng\.tmem_alloc .*memdesc<(\d+)x\d+x\d+xf32", text)
    own, *workers = partitions(lines, len(warps) - 1)
    others, outside = other_loops(own)
    softmax = [loop for loop in others if any(is_instruction(line, "LDTM") for line in loop)]
    if len(softmax) != 1:
        raise ValueError(
            f"{len(softmax)} loops of the first warps read tensor memory and multiply no matrices, not one"
        )
    turn, once, held = [work(softmax[0], gpu, num_warps, *copies)], [], [_held(own[: _index(own, softmax[0])])]
    hot = list(softmax[0])
    for number, code in zip(warps[1:], workers, strict=True):
        plain, rest = other_loops(code)
        (loop,) = matrix_loops(code) + plain
        # products that are started ahead count as do such copies: the last turns start none
        rest = [line for line in rest if not is_instruction(line, MATRIX["tcgen05"])]
        turn.append(work(loop, gpu, number, *copies))
        once.append(work(rest, gpu, number, *copies))
        held.append(_held(code[: _index(code, loop)]))
        hot += loop
    works = [reduce(add, turn), *(work(loop, gpu, num_warps, *copies) for loop in matrix_loops(own))]
    return Code(
        registers=registers,
        spilled_bytes=spilled,
        blocks=blocks_per_sm(
            gpu, registers, compiled.metadata.num_warps, compiled.metadata.shared, compiled.metadata.tmem_size
        ),
        hot_loop=hot,
        loops=works,
        others=[work(loop, gpu, num_warps, *copies) for loop in others if loop not in softmax],
        tile=reduce(add, once, work(outside, gpu, num_warps, *copies)),
        partitions=tuple(zip(warps, held, strict=True)),
        buffers=max(map(int, depths)),
    )


def _held(lines: list[str]) -> int:
    """The registers that a warp has taken or kept last."""
    return int(next(line for line in reversed(lines) if "SETMAXREG" in line).split()[-1], 16)


def _index(lines: list[str], part: list[str]) -> int:
    """Where a loop begins, whose first line is its label."""
    return lines.index(part[0])


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
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
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

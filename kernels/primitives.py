"""What the forward and backward kernels share: addresses, the rows of a tile, and the tests of its tails."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LN2", "LOG2E", "SUPPORTED", "block_dim", "empty", "is_interpreted", "precision", "unit_stride"]

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)


# ---- on the host ----------------------------------------------------------------------------------------------------


def block_dim(head_dim: int) -> int:
    """The power of two, at least 16, to which a head dimension is filled up with zeros in registers."""
    return max(16, triton.next_power_of_2(head_dim))


def precision(dtype: torch.dtype) -> str:
    """How a dot is computed: exactly for float32, as the hardware does for half precision."""
    return "ieee" if dtype == torch.float32 else "tf32"


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the kernels write to; every element is written."""
    return torch.empty(shape, dtype=dtype, device=device)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous (the kernels load whole rows)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def is_interpreted(kernel: object) -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on the CPU."""
    return not isinstance(kernel, triton.runtime.JITFunction)


# ---- in the kernels -------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(base, rows, row_stride, allowed, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """`(rows, BLOCK_D)`; zeros beyond HEAD_DIM and, if MASKED, in rows that are not allowed."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    if MASKED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers, mask=allowed[:, None], other=0.0)
        return tl.load(pointers, mask=allowed[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def store_rows(base, rows, row_stride, values, allowed, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store `(rows, HEAD_DIM)` where allowed."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=allowed[:, None] & (dims[None, :] < HEAD_DIM))


@triton.jit
def tile_rows(rows_table, tile, prefix, tokens, num_frames, BLOCK_M: tl.constexpr):
    """Rows of a tile `(BLOCK_M)`: which (0 where there is none), whether there is one, key list, position in the frame."""
    rows = tl.load(rows_table + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    exists = rows >= 0
    rows = tl.maximum(rows, 0)
    in_frames = tl.maximum(rows - prefix, 0)
    lists = tl.where(rows < prefix, num_frames, in_frames // tokens)
    return rows, exists, lists, in_frames % tokens


@triton.jit
def run_keys(start, columns, hole_at, hole, HOLES: tl.constexpr):
    """The other sequence's rows that a run shows in these columns: the virtual row with a hole."""
    keys = start + columns
    if HOLES:
        keys += tl.where(columns >= hole_at, hole, 0)
    return keys


@triton.jit
def load_intervals(intervals, lists):
    """Start, hole start, hole stop and stop of what each row of a tile sees, each `(BLOCK_M)`."""
    base = intervals + lists * 4
    return tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 3)


@triton.jit
def within_intervals(keys, start, hole, resume, stop):
    """`(BLOCK_M, BLOCK_N)`: which of the keys each row sees."""
    keys = keys[None, :]
    seen = (keys >= start[:, None]) & (keys < stop[:, None])
    return seen & ((keys < hole[:, None]) | (keys >= resume[:, None]))


@triton.jit
def pattern_bits(patterns, pattern, positions, columns, exists, valid, tokens, other_tokens):
    """`(BLOCK_M, BLOCK_N)`: the bits of an explicit `(Nq, Nk)` pattern at the rows' positions and the columns'."""
    offsets = (pattern * tokens + positions[:, None]) * other_tokens + (columns % other_tokens)[None, :]
    return tl.load(patterns + offsets, mask=exists[:, None] & valid[None, :], other=0) != 0

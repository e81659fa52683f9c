"""What the forward and backward kernels share: addresses, the rows of a tile, and the tests of its tails."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.3
    TensorDescriptor = None

__all__ = [
    "COMPILED",
    "LN2",
    "LOG2E",
    "SUPPORTED",
    "addressable",
    "block_dim",
    "describable",
    "described",
    "empty",
    "is_interpreted",
    "precision",
]

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Of every kernel: `a * b + c` in one instruction, for which Triton 3.10 wants to be asked.
COMPILED = {"enable_fp_fusion": True}
SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)


# ---- on the host ----------------------------------------------------------------------------------------------------


def block_dim(head_dim: int) -> int:
    """The power of two, at least 16, to which a head dimension is filled up with zeros in registers."""
    return max(16, 1 << (head_dim - 1).bit_length())


def precision(dtype: torch.dtype, kernel: object) -> str:
    """How `dot` and `narrow` compute: without TF32, and in the interpreter around its want of bfloat16 arithmetic."""
    return "emulated" if dtype == torch.bfloat16 and is_interpreted(kernel) else "ieee"


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the kernels write to; every element is written."""
    return torch.empty(shape, dtype=dtype, device=device)


def addressable(tensor: Tensor) -> Tensor:
    """The tensor `(B, H, L, D)`, copied if its last dimension is not contiguous or 32-bit offsets do not span a head."""
    contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if contiguous and tensor.shape[2] * tensor.stride(2) < 2**31 else tensor.contiguous()


def describable(tensor: Tensor) -> bool:
    """Whether the tensor memory accelerator can copy from a tensor `(B, H, L, D)`.

    It wants sm_90 or newer, contiguous rows, an address and strides of multiples of 16 bytes, and a Triton that knows it (3.4).
    Strides of 0, which NVIDIA does not describe, are left to pointers. The CPU stands for the interpreter, which copies likewise.
    """
    if TensorDescriptor is None or torch.version.hip or not tensor.numel():
        return False
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (9, 0):
        return False
    *strides, last = tensor.stride()
    size = tensor.element_size()
    return last == 1 and tensor.data_ptr() % 16 == 0 and all(stride and stride * size % 16 == 0 for stride in strides)


def described(tensor: Tensor, rows: int) -> Any:
    """A describable tensor `(B, H, L, D)` for `load_described`, which takes so many of its rows at once."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, block_dim(tensor.shape[3])])


def is_interpreted(kernel: object) -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on the CPU."""
    return not isinstance(kernel, triton.runtime.JITFunction)


# ---- in the kernels -------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` accumulated in float32; without the sum if `acc` is None, which Triton 3.3 does not take as an argument.

    Triton's interpreter multiplies the bits of bfloat16: there, widen them first.
    """
    if PRECISION == "emulated":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if acc is None:
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b, acc, input_precision="ieee")
    return product


@triton.jit
def narrow(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Float32 to `dtype`, to nearest even. Triton's interpreter truncates to bfloat16: there, round the bits first."""
    if PRECISION == "emulated":
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def load_rows(base, rows, row_stride, allowed, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """`(rows, BLOCK_D)`; zeros beyond HEAD_DIM and, if MASKED, in rows that are not allowed. Offsets fit in 32 bits."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base + (rows * row_stride)[:, None] + dims[None, :]
    if MASKED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers, mask=allowed[:, None], other=0.0)
        return tl.load(pointers, mask=allowed[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def store_rows(
    base, rows, row_stride, values, allowed, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """Store `(rows, HEAD_DIM)` where allowed."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    values = narrow(values, base.dtype.element_ty, PRECISION)
    tl.store(pointers, values, mask=allowed[:, None] & (dims[None, :] < HEAD_DIM))


@triton.jit
def batch_and_head(extent, num_tiles, group_heads):
    """Which batch and head a program has: its tile says the group of heads."""
    rest = tl.program_id(0) // num_tiles
    head = tl.load(extent + 9) * group_heads + rest % group_heads
    return (rest // group_heads).to(tl.int64), head.to(tl.int64)


@triton.jit
def tile_rows(rows_table, tile, BLOCK_M: tl.constexpr):
    """Rows of a tile `(BLOCK_M)`: which (0 where there is none), and whether there is one."""
    rows = tl.load(rows_table + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    return tl.maximum(rows, 0), rows >= 0


@triton.jit
def tile_rows_again(rows_table, tile, BLOCK_M: tl.constexpr):
    """`tile_rows` for what follows the loops, which then hold none of it in registers: a plain load would be the first one's."""
    rows = tl.load(rows_table + tile * BLOCK_M + tl.arange(0, BLOCK_M), volatile=True)
    return tl.maximum(rows, 0), rows >= 0


@triton.jit
def load_run(runs_table, run):
    """Start, length, hole_at and hole of a run."""
    base = runs_table + run * 4
    return tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 3)


@triton.jit
def load_block(base, first, row_stride, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`(BLOCK_N, BLOCK_D)`: the rows from `first` on, none of them masked."""
    return load_rows(
        base + first.to(tl.int64) * row_stride, tl.arange(0, BLOCK_N), row_stride, None, HEAD_DIM, BLOCK_D, False
    )


@triton.jit
def load_described(blocks, batch, head, first, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load_block` through a descriptor: one copy by the tensor memory accelerator, which fills up the columns with zeros."""
    return blocks.load([tl.cast(batch, tl.int32), tl.cast(head, tl.int32), first, 0]).reshape(BLOCK_N, BLOCK_D)


@triton.jit
def load_pair(
    base, other_base, blocks, other_blocks, row_stride, other_row_stride, batch, head, first,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """Two blocks `(BLOCK_N, BLOCK_D)` of the rows from `first` on: of keys and values, or of queries and gradients."""
    if LOADS == "pointers":
        x = load_block(base, first, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
        y = load_block(other_base, first, other_row_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
    else:
        x = load_described(blocks, batch, head, first, BLOCK_N, BLOCK_D)
        y = load_described(other_blocks, batch, head, first, BLOCK_N, BLOCK_D)
    return x, y


@triton.jit
def gather_block(keys_table, block, BLOCK_N: tl.constexpr):
    """The rows of the other sequence `(BLOCK_N)` in a gathered block. What fills up a block repeats its last row."""
    return tl.load(keys_table + block * BLOCK_N + tl.arange(0, BLOCK_N))


@triton.jit
def seen_bits(bits_table, first, num_classes, classes, BLOCK_N: tl.constexpr):
    """`(BLOCK_M, BLOCK_N)`: which rows of a gathered block each row of the tile sees, by the words of its class."""
    columns = tl.arange(0, BLOCK_N)
    pointers = bits_table + first + classes
    words = tl.load(pointers)[:, None]
    for part in tl.static_range(1, BLOCK_N // 32):  # 32 columns have one word; which one is known when compiling
        words = tl.where((columns >= 32 * part)[None, :], tl.load(pointers + part * num_classes)[:, None], words)
    return (words & (1 << (columns & 31))[None, :]) != 0


@triton.jit
def diagonal_rows(diagonals, lists_table, tile, index, num_diagonals, rows, exists, BLOCK_M: tl.constexpr):
    """Rows `(BLOCK_M)` of the other sequence that lie at the tile's own positions, 0 where there is none; and where there is."""
    lists = tl.load(lists_table + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    partners = rows + tl.load(diagonals + lists * num_diagonals + index)
    return tl.maximum(partners, 0), exists & (partners >= 0)

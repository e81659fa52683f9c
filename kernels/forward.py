"""The forward kernel: attention under any Kronecker mask, output and log-sum-exp, with an online softmax in base 2.

A program takes one tile of query rows of one head. It starts from the tile's diagonals (KMT's and KMCT's own token: `m = q.k`,
`l = 1`, `acc = v`), then walks the plain runs, where nothing is masked but the tail, then runs whose keys are tested row by row,
then runs seen through explicit patterns. After FlashAttention-2 (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kronmask.kernels import primitives
from kronmask.kernels.config import Config, choose
from kronmask.kernels.primitives import (
    LN2,
    LOG2E,
    load_intervals,
    load_rows,
    pattern_bits,
    run_keys,
    store_rows,
    tile_rows,
    unit_stride,
    within_intervals,
)
from kronmask.kernels.tiles import TileTables, make_tables
from kronmask.mask import KronMask

__all__ = ["attention_forward", "forward_kernel", "mask_arguments"]


@triton.jit
def softmax_step(q, k, v, maximum, total, acc, scale, allowed, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys; `scale` is that of the scores times log2(e). MASKED blocks may hide all keys from a row."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(allowed, scores * scale, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(maximum - shift)
    else:
        highest = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - highest[:, None])
        decay = tl.exp2(maximum - highest)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return highest, total, acc


@triton.jit(do_not_specialize=["num_tiles", "heads", "group", "query_length", "prefix", "num_frames", "tokens", "key_tokens", "num_diagonals"])  # fmt: skip # noqa: E501
def forward_kernel(
    query, key, value, output, lse,
    rows_table, tiles_table, runs_table, intervals, diagonals, patterns,
    scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row,
    num_tiles, heads, group, query_length, prefix, num_frames, tokens, key_tokens, num_diagonals,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HOLES: tl.constexpr, DIAGONALS: tl.constexpr, TESTED: tl.constexpr, PATTERNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M query rows of one head; grid `(num_tiles * B * Hq)`, tiles fastest."""
    tile = tl.program_id(0) % num_tiles
    batch = (tl.program_id(0) // num_tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // num_tiles % heads).to(tl.int64)
    key_base = key + batch * key_batch + head // group * key_head
    value_base = value + batch * value_batch + head // group * value_head

    rows, exists, lists, positions = tile_rows(rows_table, tile, prefix, tokens, num_frames, BLOCK_M)
    q = load_rows(query + batch * query_batch + head * query_head, rows, query_row, exists, HEAD_DIM, BLOCK_D, True)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if DIAGONALS:
        for i in range(num_diagonals):
            first = tl.load(diagonals + lists * num_diagonals + i, mask=exists & (lists < num_frames), other=-1)
            seen = first >= 0
            keys = tl.where(seen, first + positions, 0)
            k = load_rows(key_base, keys, key_row, seen, HEAD_DIM, BLOCK_D, True)
            v = load_rows(value_base, keys, value_row, seen, HEAD_DIM, BLOCK_D, True)
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
            score = tl.where(seen, score, float("-inf"))
            highest = tl.maximum(maximum, score)
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            weight = tl.exp2(score - shift)
            decay = tl.exp2(maximum - shift)
            total = total * decay + weight
            acc = acc * decay[:, None] + weight[:, None] * v.to(tl.float32)
            maximum = highest

    offsets = tl.arange(0, BLOCK_N)
    plain_first = tl.load(tiles_table + tile * 4)
    plain_last = tl.load(tiles_table + tile * 4 + 1)
    for run in range(plain_first, plain_last):
        start = tl.load(runs_table + run * 5)
        length = tl.load(runs_table + run * 5 + 1)
        hole_at = tl.load(runs_table + run * 5 + 2)
        hole = tl.load(runs_table + run * 5 + 3)
        whole = length // BLOCK_N * BLOCK_N
        for column in range(0, whole, BLOCK_N):
            keys = run_keys(start, column + offsets, hole_at, hole, HOLES)
            k = load_rows(key_base, keys, key_row, None, HEAD_DIM, BLOCK_D, False)
            v = load_rows(value_base, keys, value_row, None, HEAD_DIM, BLOCK_D, False)
            maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, None, False, PRECISION)
        if whole < length:
            valid = whole + offsets < length
            keys = run_keys(start, whole + offsets, hole_at, hole, HOLES)
            k = load_rows(key_base, keys, key_row, valid, HEAD_DIM, BLOCK_D, True)
            v = load_rows(value_base, keys, value_row, valid, HEAD_DIM, BLOCK_D, True)
            maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, valid[None, :], True, PRECISION)

    if TESTED:
        seen_start, seen_hole, seen_resume, seen_stop = load_intervals(intervals, lists)
        for run in range(plain_last, tl.load(tiles_table + tile * 4 + 2)):
            start = tl.load(runs_table + run * 5)
            length = tl.load(runs_table + run * 5 + 1)
            hole_at = tl.load(runs_table + run * 5 + 2)
            hole = tl.load(runs_table + run * 5 + 3)
            for column in range(0, length, BLOCK_N):
                valid = column + offsets < length
                keys = run_keys(start, column + offsets, hole_at, hole, HOLES)
                k = load_rows(key_base, keys, key_row, valid, HEAD_DIM, BLOCK_D, True)
                v = load_rows(value_base, keys, value_row, valid, HEAD_DIM, BLOCK_D, True)
                allowed = within_intervals(keys, seen_start, seen_hole, seen_resume, seen_stop) & valid[None, :]
                maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, allowed, True, PRECISION)

    if PATTERNS:
        for run in range(tl.load(tiles_table + tile * 4 + 2), tl.load(tiles_table + tile * 4 + 3)):
            start = tl.load(runs_table + run * 5)
            length = tl.load(runs_table + run * 5 + 1)
            pattern = tl.load(runs_table + run * 5 + 4)
            for column in range(0, length, BLOCK_N):
                valid = column + offsets < length
                keys = start + column + offsets
                k = load_rows(key_base, keys, key_row, valid, HEAD_DIM, BLOCK_D, True)
                v = load_rows(value_base, keys, value_row, valid, HEAD_DIM, BLOCK_D, True)
                allowed = pattern_bits(patterns, pattern, positions, column + offsets, exists, valid, tokens, key_tokens)
                maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, allowed, True, PRECISION)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    log_sum = tl.where(empty, float("-inf"), (maximum + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    store_rows(output + batch * output_batch + head * output_head, rows, output_row, acc, exists, HEAD_DIM, BLOCK_D)
    tl.store(lse + (batch * heads + head) * query_length + rows, log_sum, mask=exists)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: KronMask, scale: float, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Attention under a mask.

    Args:
        query: `(B, Hq, Lq, D)` float32, float16 or bfloat16, D up to 256, any strides.
        key, value: `(B, Hkv, Lk, D)`.
        scale: factor on the scores.
        config: the configuration to run instead of the one chosen for the device.

    Returns:
        The output `(B, Hq, Lq, D)`, physically `(B, Lq, Hq, D)`, and the LSE `(B, Hq, Lq)`, natural log, float32.
    """
    batch, heads, length, head_dim = query.shape
    output = primitives.empty(batch, length, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = primitives.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    if not output.numel():
        return output, lse
    query, key, value = (unit_stride(x) for x in (query, key, value))
    if scale < 0:  # the running maximum is that of the scores before they are scaled
        query, scale = -query, -scale
    config = config or choose("forward", mask, query)
    tables = make_tables(mask, config.blocks, config.kind, query.device)
    forward_kernel[(tables.num_tiles * batch * heads,)](
        query, key, value, output, lse, *mask_tables(tables), scale * LOG2E,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        tables.num_tiles, heads, heads // key.shape[1], length, *mask_arguments(mask, tables),
        **constants(query, config, tables),
    )  # fmt: skip
    return output, lse


def mask_tables(tables: TileTables) -> tuple[Tensor, ...]:
    """The tables in the order in which every kernel takes them."""
    return (tables.rows, tables.tiles, tables.runs, tables.intervals, tables.diagonals, tables.patterns)


def mask_arguments(mask: KronMask, tables: TileTables) -> tuple[int, ...]:
    """The mask's sizes in the order in which every kernel takes them."""
    return (mask.prefix, mask.query_frames, mask.query_tokens, mask.key_tokens, tables.num_diagonals)


def constants(query: Tensor, config: Config, tables: TileTables) -> dict[str, object]:
    """What every kernel is compiled for."""
    return {
        "HEAD_DIM": query.shape[3],
        "BLOCK_D": primitives.block_dim(query.shape[3]),
        "BLOCK_M": tables.blocks.rows,
        "BLOCK_N": tables.blocks.columns,
        "HOLES": tables.holes,
        "DIAGONALS": tables.num_diagonals > 0,
        "TESTED": tables.tested,
        "PATTERNS": tables.read_patterns,
        "PRECISION": primitives.precision(query.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

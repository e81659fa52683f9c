"""The forward kernel: attention under any Kronecker mask, output and log-sum-exp, with an online softmax in base 2.

A program takes one tile of query rows of one head. It starts from the tile's diagonals (KMT's and KMCT's own token: `m = q.k`,
`l = 1`, `acc = v`), then walks the runs of whole blocks, where nothing is masked, then the gathered edges, which all rows see,
then the whole blocks that some rows see and others do not, and last the gathered blocks of which each row sees what the bits of
its class say. After FlashAttention-2 (Dao 2023, arXiv 2307.08691).

Whole blocks are consecutive rows: on sm_90 and newer the tensor memory accelerator can copy them through descriptors of key and
value, and on sm_100 warps of their own can start the copies and the matrix products of that loop (warp specialisation).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kronmask.kernels import primitives
from kronmask.kernels.config import Config, choose
from kronmask.kernels.primitives import (
    LOG2E,
    addressable,
    batch_and_head,
    describable,
    described,
    diagonal_rows,
    dot,
    gather_block,
    load_pair,
    load_rows,
    load_run,
    narrow,
    seen_bits,
    store_rows,
    tile_rows,
    tile_rows_again,
)
from kronmask.kernels.tiles import TileTables, make_tables
from kronmask.mask import KronMask

__all__ = ["attention_forward", "block_loads", "constants", "forward_kernel", "mask_tables", "widest"]


@triton.jit
def softmax_step(q, k, v, maximum, total, acc, scale, seen, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys; `scale`, positive, is that of the scores times log2(e).

    MASK "columns": `seen (BLOCK_N)` is 0.0 for columns that repeat another and whose values are zero, and 1.0 for the others;
    "rows": `seen (BLOCK_M)`, all of the block or nothing; "pairs": `seen (BLOCK_M, BLOCK_N)`. The latter two may hide all keys
    from a row.
    """
    scores = dot(q, tl.trans(k), None, PRECISION)
    if MASK == "pairs":
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.max(scores, 1) * scale
    if MASK == "rows":
        highest = tl.where(seen, highest, float("-inf"))
    highest = tl.maximum(maximum, highest)
    shift = highest
    if MASK == "rows" or MASK == "pairs":
        shift = tl.where(highest == float("-inf"), 0.0, highest)
    decay = tl.exp2(maximum - shift)
    if MASK == "rows":
        shift = tl.where(seen, shift, float("inf"))
    weights = tl.exp2(scores * scale - shift[:, None])
    total = total * decay + tl.sum(weights * seen[None, :] if MASK == "columns" else weights, 1)
    acc = acc * decay[:, None]
    acc = dot(narrow(weights, v.dtype, PRECISION), v, acc, PRECISION)
    return highest, total, acc


@triton.jit(do_not_specialize=["num_tiles", "heads", "group_heads", "group", "query_length", "num_diagonals"])  # fmt: skip
def forward_kernel(
    query, key, value, key_blocks, value_blocks, output, lse,
    rows_table, lists_table, classes_table, tiles_table, runs_table, keys_table, bits_table, diagonals,
    scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row,
    num_tiles, heads, group_heads, group, query_length, num_diagonals,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIAGONALS: tl.constexpr, TESTED: tl.constexpr, LOADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M query rows of one head; grid `(num_tiles * B * group_heads)`, tiles (of all groups) fastest.

    `key_blocks` and `value_blocks` are descriptors of key and value for blocks of BLOCK_N rows, None if LOADS is "pointers".
    """
    tile = tl.program_id(0) % num_tiles
    extent = tiles_table + tile * 10
    batch, head = batch_and_head(extent, num_tiles, group_heads)
    shared = head // group
    key_base = key + batch * key_batch + shared * key_head
    value_base = value + batch * value_batch + shared * value_head

    rows, exists = tile_rows(rows_table, tile, BLOCK_M)
    q = load_rows(query + batch * query_batch + head * query_head, rows, query_row, exists, HEAD_DIM, BLOCK_D, True)
    if DIAGONALS == 1:  # the first key of each row
        partners, present = diagonal_rows(diagonals, lists_table, tile, 0, 1, rows, exists, BLOCK_M)
        own = load_rows(key_base, partners, key_row, present, HEAD_DIM, BLOCK_D, True)
        maximum = tl.where(present, tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * scale, float("-inf"))
        total = present.to(tl.float32)
        acc = load_rows(value_base, partners, value_row, present, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    else:
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DIAGONALS > 1:
        for i in range(num_diagonals):
            keys, seen = diagonal_rows(diagonals, lists_table, tile, i, num_diagonals, rows, exists, BLOCK_M)
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

    for run in range(tl.load(extent), tl.load(extent + 1)):
        start, length, hole_at, hole = load_run(runs_table, run)
        if LOADS == "specialised":
            for column in tl.range(0, length, BLOCK_N, warp_specialize=True):
                first = start + column + tl.where(column >= hole_at, hole, 0)
                k, v = load_pair(
                    key_base, value_base, key_blocks, value_blocks, key_row, value_row, batch, shared, first,
                    HEAD_DIM, BLOCK_D, BLOCK_N, LOADS,
                )  # fmt: skip
                maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, None, "none", PRECISION)
        else:  # Triton 3.3 has no such argument
            for column in range(0, length, BLOCK_N):
                first = start + column + tl.where(column >= hole_at, hole, 0)
                k, v = load_pair(
                    key_base, value_base, key_blocks, value_blocks, key_row, value_row, batch, shared, first,
                    HEAD_DIM, BLOCK_D, BLOCK_N, LOADS,
                )  # fmt: skip
                maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, None, "none", PRECISION)

    block = tl.load(extent + 2)
    number = tl.load(extent + 3)
    for done in tl.range(0, number, BLOCK_N, num_stages=1):  # seldom more than two turns
        keys = gather_block(keys_table, block, BLOCK_N)
        valid = tl.arange(0, BLOCK_N) < number - done
        k = load_rows(key_base, keys, key_row, None, HEAD_DIM, BLOCK_D, False)
        v = load_rows(value_base, keys, value_row, valid, HEAD_DIM, BLOCK_D, True)
        valid = valid.to(tl.float32)
        maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, valid, "columns", PRECISION)
        block += 1

    if TESTED:
        classes = tl.load(classes_table + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        for run in range(tl.load(extent + 1), tl.load(extent + 4)):
            start, length, word, _ = load_run(runs_table, run)
            seen = tl.load(bits_table + word + classes) != 0
            for column in tl.range(0, length, BLOCK_N, num_stages=1):
                k, v = load_pair(
                    key_base, value_base, key_blocks, value_blocks, key_row, value_row, batch, shared, start + column,
                    HEAD_DIM, BLOCK_D, BLOCK_N, LOADS,
                )  # fmt: skip
                maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, seen, "rows", PRECISION)

        word = tl.load(extent + 7)
        num_classes = tl.load(extent + 8)
        for block in tl.range(tl.load(extent + 5), tl.load(extent + 6), num_stages=1):
            keys = gather_block(keys_table, block, BLOCK_N)
            k = load_rows(key_base, keys, key_row, None, HEAD_DIM, BLOCK_D, False)
            v = load_rows(value_base, keys, value_row, None, HEAD_DIM, BLOCK_D, False)
            seen = seen_bits(bits_table, word, num_classes, classes, BLOCK_N)
            maximum, total, acc = softmax_step(q, k, v, maximum, total, acc, scale, seen, "pairs", PRECISION)
            word += num_classes * ((BLOCK_N + 31) // 32)

    rows, exists = tile_rows_again(rows_table, tile, BLOCK_M)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc * (1.0 / total)[:, None]
    log_sum = tl.where(empty, float("-inf"), (maximum + tl.log2(total)) * 0.6931471805599453)
    store_rows(
        output + batch * output_batch + head * output_head, rows, output_row, acc, exists, HEAD_DIM, BLOCK_D, PRECISION
    )
    tl.store(lse + (batch * heads + head) * query_length + rows, log_sum, mask=exists)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, masks: tuple[KronMask, ...], scale: float, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Attention under a mask, or under one for each of several equal groups of heads.

    Args:
        query: `(B, Hq, Lq, D)` float32, float16 or bfloat16, D up to 256, any strides.
        key, value: `(B, Hkv, Lk, D)`.
        masks: one, or one for each group of heads in order; of one number of frames, tokens and prefix.
        scale: factor on the scores.
        config: the configuration to run instead of the one chosen for the device. Key and value that the tensor memory
            accelerator cannot copy are loaded by pointers, whatever it says.

    Returns:
        The output `(B, Hq, Lq, D)`, physically `(B, Lq, Hq, D)`, and the LSE `(B, Hq, Lq)`, natural log, float32.
    """
    batch, heads, length, head_dim = query.shape
    output = primitives.empty(batch, length, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = primitives.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    if not output.numel():
        return output, lse
    query, key, value = (addressable(x) for x in (query, key, value))
    if scale < 0:  # the running maximum is that of the scores before they are scaled
        query, scale = -query, -scale
    elif not scale:  # and -inf times 0 is no number
        query, scale = torch.zeros_like(query), 1.0
    group_heads = heads // len(masks)

    def launch(config: Config) -> None:
        tables = make_tables(masks, config.blocks, config.kind, query.device)
        loads, blocks = block_loads(config, key, value)
        forward_kernel[(tables.num_tiles * batch * group_heads,)](
            query, key, value, *blocks, output, lse, *mask_tables(tables), scale * LOG2E,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
            tables.num_tiles, heads, group_heads, heads // key.shape[1], length, tables.num_diagonals,
            LOADS=loads, **constants(query, config, tables),
        )  # fmt: skip

    with torch.cuda.device_of(query):  # Triton launches on the current device
        descriptors = describable(key) and describable(value)
        launch(config or choose("forward", widest(masks), query[:, :group_heads], launch, descriptors))
    return output, lse


def widest(masks: tuple[KronMask, ...]) -> KronMask:
    """The mask with most pairs: it decides the configuration for all groups of heads."""
    return max(masks, key=lambda mask: mask.num_pairs) if len(masks) > 1 else masks[0]


def block_loads(config: Config, *tensors: Tensor) -> tuple[str, list[Any]]:
    """How blocks of these tensors are loaded, by pointers if descriptors cannot say where they are, and the descriptors."""
    if config.loads == "pointers" or not all(map(describable, tensors)):
        return "pointers", [None] * len(tensors)
    return config.loads, [described(tensor, config.blocks.columns) for tensor in tensors]


def mask_tables(tables: TileTables) -> tuple[Tensor, ...]:
    """The tables in the order in which every kernel takes them."""
    return (
        tables.rows,
        tables.lists,
        tables.classes,
        tables.tiles,
        tables.runs,
        tables.keys,
        tables.bits,
        tables.diagonals,
    )


def constants(query: Tensor, config: Config, tables: TileTables, group: int = 1) -> dict[str, object]:
    """What every kernel is compiled for; `group` is how many heads a program walks."""
    return {
        "HEAD_DIM": query.shape[3],
        "BLOCK_D": primitives.block_dim(query.shape[3]),
        "BLOCK_M": tables.blocks.rows,
        "BLOCK_N": tables.blocks.columns,
        "DIAGONALS": min(tables.num_diagonals * group, 2),  # none, one, or a loop
        "TESTED": tables.tested,
        "PRECISION": primitives.precision(query.dtype, forward_kernel),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **primitives.COMPILED,
    }

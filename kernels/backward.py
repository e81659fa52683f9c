"""The backward kernels: one pass for the gradient of the queries, one for those of keys and values; no atomics.

Both walk tiles as the forward does. The query pass has the forward's tiles and also writes `delta = sum(dO * O) - dLSE`, through
which the gradient of the log-sum-exp enters. The key pass has the tiles of the transposed mask, so that each key row belongs to
one program, which adds up its query heads in order: equal inputs give equal bits. Whole blocks come through pointers or
descriptors, as in the forward. Probabilities are recomputed as
`exp(score - lse)`, `dS = P * (dO V^T - delta)`. After FlashAttention-2 (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kronmask.kernels import primitives
from kronmask.kernels.config import Config, choose
from kronmask.kernels.forward import block_loads, constants, mask_tables, widest
from kronmask.kernels.primitives import (
    LOG2E,
    addressable,
    batch_and_head,
    describable,
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
from kronmask.kernels.tiles import make_tables, transposed
from kronmask.mask import KronMask

__all__ = ["attention_backward", "backward_key_kernel", "backward_query_kernel"]


# ---- gradient of the queries ----------------------------------------------------------------------------------------


@triton.jit
def query_step(q, grad, k, v, lse, delta, acc, scale, seen, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the share of one block of keys to `acc (BLOCK_M, BLOCK_D)`; `lse` in base 2; `seen` as in the forward."""
    weights = tl.exp2(dot(q, tl.trans(k), None, PRECISION) * scale - lse[:, None])
    if MASK == "columns":
        weights *= seen[None, :]
    elif MASK == "pairs":
        weights = tl.where(seen, weights, 0.0)
    grad_scores = weights * (dot(grad, tl.trans(v), None, PRECISION) - delta[:, None])
    return dot(narrow(grad_scores, k.dtype, PRECISION), k, acc, PRECISION)


@triton.jit
def query_diagonal(
    query_base, grad_base, key_base, value_base, rows, keys, query_row, grad_row, key_row, value_row, seen, lse, delta, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The share of one key for each row. It loads all it needs, so that the loops hold none of it in registers."""
    q = load_rows(query_base, rows, query_row, seen, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    k = load_rows(key_base, keys, key_row, seen, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    weight = tl.where(seen, tl.exp2(tl.sum(q * k, 1) * scale - lse), 0.0)
    grad = load_rows(grad_base, rows, grad_row, seen, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    v = load_rows(value_base, keys, value_row, seen, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    return (weight * (tl.sum(grad * v, 1) - delta))[:, None] * k


@triton.jit(do_not_specialize=["num_tiles", "heads", "group_heads", "group", "length", "num_diagonals"])  # fmt: skip
def backward_query_kernel(
    query, key, value, key_blocks, value_blocks, output, grad_output, lse, grad_lse, delta, grad_query,
    rows_table, lists_table, classes_table, tiles_table, runs_table, keys_table, bits_table, diagonals,
    scale, log2_scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    output_batch, output_head, output_row, grad_batch, grad_head, grad_row, grad_query_batch, grad_query_head, grad_query_row,
    num_tiles, heads, group_heads, group, length, num_diagonals,
    HAS_GRAD_LSE: tl.constexpr,
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
    query_base = query + batch * query_batch + head * query_head
    grad_base = grad_output + batch * grad_batch + head * grad_head
    q = load_rows(query_base, rows, query_row, exists, HEAD_DIM, BLOCK_D, True)
    grad = load_rows(grad_base, rows, grad_row, exists, HEAD_DIM, BLOCK_D, True)
    o = load_rows(output + batch * output_batch + head * output_head, rows, output_row, exists, HEAD_DIM, BLOCK_D, True)
    flat = (batch * heads + head) * length + rows
    log_sum = tl.load(lse + flat, mask=exists, other=float("-inf"))
    change = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        change -= tl.load(grad_lse + flat, mask=exists, other=0.0)
    # a query that sees no key has probabilities exp(score - inf) = 0, and no gradient of its LSE passes
    empty = log_sum == float("-inf")
    change = tl.where(empty, 0.0, change)
    log_sum = tl.where(empty, float("inf"), log_sum * 1.4426950408889634)
    tl.store(delta + flat, change, mask=exists)

    if DIAGONALS == 1:
        partners, present = diagonal_rows(diagonals, lists_table, tile, 0, 1, rows, exists, BLOCK_M)
        acc = query_diagonal(
            query_base, grad_base, key_base, value_base, rows, partners, query_row, grad_row, key_row, value_row, present,
            log_sum, change, log2_scale, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DIAGONALS > 1:
        for i in range(num_diagonals):
            partners, present = diagonal_rows(diagonals, lists_table, tile, i, num_diagonals, rows, exists, BLOCK_M)
            acc += query_diagonal(
                query_base, grad_base, key_base, value_base, rows, partners, query_row, grad_row, key_row, value_row, present,
                log_sum, change, log2_scale, HEAD_DIM, BLOCK_D,
            )  # fmt: skip

    for run in range(tl.load(extent), tl.load(extent + 1)):
        start, run_length, hole_at, hole = load_run(runs_table, run)
        for column in range(0, run_length, BLOCK_N):
            first_key = start + column + tl.where(column >= hole_at, hole, 0)
            k, v = load_pair(
                key_base, value_base, key_blocks, value_blocks, key_row, value_row, batch, shared, first_key,
                HEAD_DIM, BLOCK_D, BLOCK_N, LOADS,
            )  # fmt: skip
            acc = query_step(q, grad, k, v, log_sum, change, acc, log2_scale, None, "none", PRECISION)

    block = tl.load(extent + 2)
    number = tl.load(extent + 3)
    for done in tl.range(0, number, BLOCK_N, num_stages=1):  # seldom more than two turns
        keys = gather_block(keys_table, block, BLOCK_N)
        k = load_rows(key_base, keys, key_row, None, HEAD_DIM, BLOCK_D, False)
        v = load_rows(value_base, keys, value_row, None, HEAD_DIM, BLOCK_D, False)
        valid = (tl.arange(0, BLOCK_N) < number - done).to(tl.float32)
        acc = query_step(q, grad, k, v, log_sum, change, acc, log2_scale, valid, "columns", PRECISION)
        block += 1

    if TESTED:
        classes = tl.load(classes_table + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        for run in range(tl.load(extent + 1), tl.load(extent + 4)):
            start, run_length, word, _ = load_run(runs_table, run)
            seen = tl.load(bits_table + word + classes) != 0
            hidden = tl.where(seen, log_sum, float("inf"))
            for column in tl.range(0, run_length, BLOCK_N, num_stages=1):
                k, v = load_pair(
                    key_base, value_base, key_blocks, value_blocks, key_row, value_row, batch, shared, start + column,
                    HEAD_DIM, BLOCK_D, BLOCK_N, LOADS,
                )  # fmt: skip
                acc = query_step(q, grad, k, v, hidden, change, acc, log2_scale, None, "none", PRECISION)

        word = tl.load(extent + 7)
        num_classes = tl.load(extent + 8)
        for block in tl.range(tl.load(extent + 5), tl.load(extent + 6), num_stages=1):
            keys = gather_block(keys_table, block, BLOCK_N)
            k = load_rows(key_base, keys, key_row, None, HEAD_DIM, BLOCK_D, False)
            v = load_rows(value_base, keys, value_row, None, HEAD_DIM, BLOCK_D, False)
            seen = seen_bits(bits_table, word, num_classes, classes, BLOCK_N)
            acc = query_step(q, grad, k, v, log_sum, change, acc, log2_scale, seen, "pairs", PRECISION)
            word += num_classes * ((BLOCK_N + 31) // 32)

    rows, exists = tile_rows_again(rows_table, tile, BLOCK_M)
    grad_query += batch * grad_query_batch + head * grad_query_head
    store_rows(grad_query, rows, grad_query_row, acc * scale, exists, HEAD_DIM, BLOCK_D, PRECISION)


# ---- gradients of keys and values -----------------------------------------------------------------------------------


@triton.jit
def key_step(k, v, q, grad, lse, delta, grad_k, grad_v, scale, seen, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the share of one block of queries to the gradients `(BLOCK_M, BLOCK_D)` of a tile's keys and values.

    An `lse` of infinity hides a query from all keys, which no mask needs to do.
    """
    weights = tl.exp2(dot(k, tl.trans(q), None, PRECISION) * scale - (lse * 1.4426950408889634)[None, :])
    if MASK == "pairs":
        weights = tl.where(seen, weights, 0.0)
    grad_v = dot(narrow(weights, grad.dtype, PRECISION), grad, grad_v, PRECISION)
    grad_scores = weights * (dot(v, tl.trans(grad), None, PRECISION) - delta[None, :])
    grad_k = dot(narrow(grad_scores, q.dtype, PRECISION), q, grad_k, PRECISION)
    return grad_k, grad_v


@triton.jit
def key_diagonal(
    query_base, grad_base, key_base, value_base, lse, delta, queries, rows, query_row, grad_row, key_row, value_row, seen, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The share of one query for each row. It loads all it needs, so that the loops hold none of it in registers."""
    log_sum = tl.load(lse + queries, mask=seen, other=0.0) * 1.4426950408889634
    change = tl.load(delta + queries, mask=seen, other=0.0)
    q = load_rows(query_base, queries, query_row, seen, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    k = load_rows(key_base, rows, key_row, seen, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    weight = tl.where(seen, tl.exp2(tl.sum(q * k, 1) * scale - log_sum), 0.0)
    grad = load_rows(grad_base, queries, grad_row, seen, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    v = load_rows(value_base, rows, value_row, seen, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    return (weight * (tl.sum(grad * v, 1) - change))[:, None] * q, weight[:, None] * grad


@triton.jit(do_not_specialize=["num_tiles", "heads", "group_heads", "sharing", "length", "num_diagonals"])  # fmt: skip
def backward_key_kernel(
    query, key, value, query_blocks, grad_blocks, grad_output, lse, delta, grad_key, grad_value,
    rows_table, lists_table, classes_table, tiles_table, runs_table, keys_table, bits_table, diagonals,
    scale, log2_scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row,
    grad_key_batch, grad_key_head, grad_key_row, grad_value_batch, grad_value_head, grad_value_row,
    num_tiles, heads, group_heads, sharing, length, num_diagonals,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIAGONALS: tl.constexpr, TESTED: tl.constexpr, LOADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M key rows of one key head; grid `(num_tiles * B * group_heads)`. The tables are the transposed masks'.

    `heads` counts a head of keys once for each of the `sharing` groups of heads that share it, and each has gradients of its own.
    `query_blocks` and `grad_blocks` are descriptors of query and grad_output for blocks of BLOCK_N rows, None if LOADS is
    "pointers".
    """
    tile = tl.program_id(0) % num_tiles
    extent = tiles_table + tile * 10
    batch, head = batch_and_head(extent, num_tiles, group_heads)

    rows, exists = tile_rows(rows_table, tile, BLOCK_M)
    key_base = key + batch * key_batch + head // sharing * key_head
    value_base = value + batch * value_batch + head // sharing * value_head
    k = load_rows(key_base, rows, key_row, exists, HEAD_DIM, BLOCK_D, True)
    v = load_rows(value_base, rows, value_row, exists, HEAD_DIM, BLOCK_D, True)

    if DIAGONALS == 1:
        partners, present = diagonal_rows(diagonals, lists_table, tile, 0, 1, rows, exists, BLOCK_M)
        flat = (batch * heads + head) * length
        grad_k, grad_v = key_diagonal(
            query + batch * query_batch + head * query_head, grad_output + batch * grad_batch + head * grad_head,
            key_base, value_base, lse + flat, delta + flat, partners, rows, query_row, grad_row, key_row, value_row, present,
            log2_scale, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    else:
        grad_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        grad_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DIAGONALS > 1:
        for step in range(GROUP * num_diagonals):
            query_head_index = head * GROUP + step // num_diagonals
            index = step % num_diagonals
            partners, present = diagonal_rows(diagonals, lists_table, tile, index, num_diagonals, rows, exists, BLOCK_M)
            flat = (batch * heads * GROUP + query_head_index) * length
            share_k, share_v = key_diagonal(
                query + batch * query_batch + query_head_index * query_head,
                grad_output + batch * grad_batch + query_head_index * grad_head,
                key_base, value_base, lse + flat, delta + flat, partners, rows, query_row, grad_row, key_row, value_row, present,
                log2_scale, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            grad_k += share_k
            grad_v += share_v

    offsets = tl.arange(0, BLOCK_N)
    for query_head_index in range(head * GROUP, (head + 1) * GROUP):
        query_base = query + batch * query_batch + query_head_index * query_head
        grad_base = grad_output + batch * grad_batch + query_head_index * grad_head
        lse_base = lse + (batch * heads * GROUP + query_head_index) * length
        delta_base = delta + (batch * heads * GROUP + query_head_index) * length

        for run in range(tl.load(extent), tl.load(extent + 1)):
            start, run_length, hole_at, hole = load_run(runs_table, run)
            for column in range(0, run_length, BLOCK_N):
                first_query = start + column + tl.where(column >= hole_at, hole, 0)
                q, grad = load_pair(
                    query_base, grad_base, query_blocks, grad_blocks, query_row, grad_row, batch, query_head_index, first_query,
                    HEAD_DIM, BLOCK_D, BLOCK_N, LOADS,
                )  # fmt: skip
                log_sum = tl.load(lse_base + first_query + offsets)
                change = tl.load(delta_base + first_query + offsets)
                grad_k, grad_v = key_step(
                    k, v, q, grad, log_sum, change, grad_k, grad_v, log2_scale, None, "none", PRECISION
                )

        block = tl.load(extent + 2)
        number = tl.load(extent + 3)
        for done in tl.range(0, number, BLOCK_N, num_stages=1):  # seldom more than two turns
            queries = gather_block(keys_table, block, BLOCK_N)
            q = load_rows(query_base, queries, query_row, None, HEAD_DIM, BLOCK_D, False)
            grad = load_rows(grad_base, queries, grad_row, None, HEAD_DIM, BLOCK_D, False)
            log_sum = tl.where(offsets < number - done, tl.load(lse_base + queries), float("inf"))
            change = tl.load(delta_base + queries)
            grad_k, grad_v = key_step(
                k, v, q, grad, log_sum, change, grad_k, grad_v, log2_scale, None, "none", PRECISION
            )
            block += 1

        if TESTED:
            classes = tl.load(classes_table + tile * BLOCK_M + tl.arange(0, BLOCK_M))
            for run in range(tl.load(extent + 1), tl.load(extent + 4)):
                start, run_length, word, _ = load_run(runs_table, run)
                seen = (tl.load(bits_table + word + classes) != 0)[:, None]
                for column in tl.range(0, run_length, BLOCK_N, num_stages=1):
                    first_query = start + column
                    q, grad = load_pair(
                        query_base, grad_base, query_blocks, grad_blocks, query_row, grad_row, batch, query_head_index,
                        first_query, HEAD_DIM, BLOCK_D, BLOCK_N, LOADS,
                    )  # fmt: skip
                    log_sum = tl.load(lse_base + first_query + offsets)
                    change = tl.load(delta_base + first_query + offsets)
                    grad_k, grad_v = key_step(
                        k, v, q, grad, log_sum, change, grad_k, grad_v, log2_scale, seen, "pairs", PRECISION
                    )

            word = tl.load(extent + 7)
            num_classes = tl.load(extent + 8)
            for block in tl.range(tl.load(extent + 5), tl.load(extent + 6), num_stages=1):
                queries = gather_block(keys_table, block, BLOCK_N)
                q = load_rows(query_base, queries, query_row, None, HEAD_DIM, BLOCK_D, False)
                grad = load_rows(grad_base, queries, grad_row, None, HEAD_DIM, BLOCK_D, False)
                log_sum = tl.load(lse_base + queries)
                change = tl.load(delta_base + queries)
                seen = seen_bits(bits_table, word, num_classes, classes, BLOCK_N)
                grad_k, grad_v = key_step(
                    k, v, q, grad, log_sum, change, grad_k, grad_v, log2_scale, seen, "pairs", PRECISION
                )
                word += num_classes * ((BLOCK_N + 31) // 32)

    rows, exists = tile_rows_again(rows_table, tile, BLOCK_M)
    grad_key += batch * grad_key_batch + head * grad_key_head
    grad_value += batch * grad_value_batch + head * grad_value_head
    store_rows(grad_key, rows, grad_key_row, grad_k * scale, exists, HEAD_DIM, BLOCK_D, PRECISION)
    store_rows(grad_value, rows, grad_value_row, grad_v, exists, HEAD_DIM, BLOCK_D, PRECISION)


# ---- launching ------------------------------------------------------------------------------------------------------


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    masks: tuple[KronMask, ...],
    scale: float,
    query_config: Config | None = None,
    key_config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention under a mask, or under one for each group of heads, equal to the bit from run to run.

    Args:
        grad_output: `(B, Hq, Lq, D)`, any strides.
        grad_lse: `(B, Hq, Lq)` or None.
        query, key, value, masks, scale: those of the forward; `output` and `lse`: its results.
        query_config, key_config: the configurations to run instead of those chosen for the device.

    Returns:
        The gradients of query `(B, Hq, Lq, D)`, key and value `(B, Hkv, Lk, D)`, physically `(B, L, H, D)`.
    """
    batch, heads, length, head_dim = query.shape
    key_heads, device = key.shape[1], query.device
    owners = max(
        key_heads, len(masks)
    )  # of gradients of keys: groups of heads that share a head of keys have their own
    sharing = owners // key_heads
    sizes = (
        (query, heads, query.dtype),
        *[(x, owners, torch.float32 if sharing > 1 else x.dtype) for x in (key, value)],
    )
    grad_query, grad_key, grad_value = (
        primitives.empty(batch, x.shape[2], number, head_dim, dtype=dtype, device=device).transpose(1, 2)
        for x, number, dtype in sizes
    )
    if query.numel():
        delta = primitives.empty(batch, heads, length, dtype=torch.float32, device=device)
        query, key, value, output = (addressable(x) for x in (query, key, value, output))
        grad_output, lse = addressable(grad_output.to(query.dtype)), lse.contiguous()
        given_lse = lse if grad_lse is None else grad_lse.float().contiguous()
    reverse = tuple(transposed(mask) for mask in masks)
    group_heads, group_owners = heads // len(masks), owners // len(masks)

    def launch_query(config: Config) -> None:
        tables = make_tables(masks, config.blocks, config.kind, device)
        loads, blocks = block_loads(config, key, value)
        backward_query_kernel[(tables.num_tiles * batch * group_heads,)](
            query, key, value, *blocks, output, grad_output, lse, given_lse, delta, grad_query, *mask_tables(tables),
            scale, scale * LOG2E,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3], *grad_output.stride()[:3],
            *grad_query.stride()[:3],
            tables.num_tiles, heads, group_heads, heads // key_heads, length, tables.num_diagonals,
            HAS_GRAD_LSE=grad_lse is not None, LOADS=loads, **constants(query, config, tables),
        )  # fmt: skip

    def launch_key(config: Config) -> None:
        tables = make_tables(reverse, config.blocks, config.kind, device)
        loads, blocks = block_loads(config, query, grad_output)
        backward_key_kernel[(tables.num_tiles * batch * group_owners,)](
            query, key, value, *blocks, grad_output, lse, delta, grad_key, grad_value, *mask_tables(tables),
            scale, scale * LOG2E,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_output.stride()[:3],
            *grad_key.stride()[:3], *grad_value.stride()[:3],
            tables.num_tiles, owners, group_owners, sharing, length, tables.num_diagonals,
            GROUP=heads // owners, LOADS=loads, **constants(query, config, tables, heads // owners),
        )  # fmt: skip

    if query.numel():
        with torch.cuda.device_of(query):  # Triton launches on the current device
            # the query pass first: it writes the delta that the key pass reads
            of_group = query[:, :group_heads]
            loaded = describable(key) and describable(value)
            launch_query(query_config or choose("backward_query", widest(masks), of_group, launch_query, loaded))
            loaded = describable(query) and describable(grad_output)
            launch_key(key_config or choose("backward_key", widest(reverse), of_group, launch_key, loaded))
    if sharing > 1:
        grad_key, grad_value = (
            x.transpose(1, 2).unflatten(2, (key_heads, sharing)).sum(3).to(key.dtype).transpose(1, 2)
            for x in (grad_key, grad_value)
        )
    return grad_query, grad_key, grad_value

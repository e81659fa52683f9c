"""Exact attention over the mask's own area through torch's flash kernels, on CPU and CUDA.

Each part of the plan is a call of a kernel that returns its log-sum-exp; parts of the same query merge by it, and the self token
of KMT and KMCT is the initial state of the merge. The kernels' backwards take the merged output and LSE, which makes the gradient
of each part exact. The backward has no atomics of its own. A mask is made for explicit patterns, and on the CPU for blocks of at
most 2**20 pairs where `plan` finds one masked call cheaper than several; it is kept for the next call. Of a sparse pattern the
rows and keys of each tile are gathered, and those of equal tiles go through one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from kronmask.backends.layout import as_stored
from kronmask.device_cache import kept_on_device
from kronmask.mask import KronMask
from kronmask.plan import Plan, Rectangles, make_plan

__all__ = ["backward", "forward", "refusal"]

aten = torch.ops.aten


def refusal(query: Tensor, key: Tensor, mask: KronMask) -> str | None:
    if query.device.type not in ("cpu", "cuda"):
        return f"torch has no flash kernel that returns its log-sum-exp on {query.device.type}"
    if query.dtype == torch.float64:
        return "torch's flash kernels on CUDA have no float64, and results must not depend on the device"
    if query.device.type == "cuda" and query.shape[3] > 248:
        return f"torch's CUDA kernels take head_dim up to 248 here, not {query.shape[3]}"
    if query.device.type == "cuda" and query.dtype == torch.bfloat16 and not _is_ampere_or_newer(query.device):
        return "torch's CUDA kernels take bfloat16 from compute capability 8.0 on"
    return None


def forward(query: Tensor, key: Tensor, value: Tensor, mask: KronMask, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = (_loadable(x) for x in (query, *_repeat_heads(query, key, value)))
    batch, heads, length, head_dim = query.shape
    plan = _plan(mask, query)
    if plan.is_one_call and query.numel():
        ((_, bias, empty),) = _calls(plan, query)
        output, lse = _flash(query, key, value, scale, bias, empty)
        return as_stored(output), lse.contiguous()
    # half-precision parts are merged in float32, so that the merge rounds once
    output = query.new_empty(batch, length, heads, head_dim, dtype=torch.float32).transpose(1, 2)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    if not plan.complete or plan.gathered:
        output.zero_()
        lse.fill_(float("-inf"))
    if not query.numel():
        return output.to(query.dtype), lse

    for part in plan.own:
        for q, k, v, o, s in _pieces(part, "qkkqq", query, key, value, output, lse[..., None]):
            torch.mul(q.float(), k, out=o)  # nothing is in these rows yet: they hold the products
            own_lse = o.sum(-1).mul_(scale)
            _merge(o, s[..., 0], v, own_lse, first=True)
    for frames, *corner in plan.positions:
        bias, empty = _bias(frames, query.dtype, query.device)
        for q, k, v, o, s in _position_views(mask, frames, corner, "qkkqq", query, key, value, output, lse[..., None]):
            _merge(o, s[..., 0], *_flash(q, k, v, scale, bias, empty), first=True)
    for part, bias, empty in _calls(plan, query):
        for q, k, v, o, s in _pieces(part, "qkkqq", query, key, value, output, lse[..., None]):
            _merge(o, s[..., 0], *_flash(q, k, v, scale, bias, empty), part.first, empty is not None)
    if plan.gathered:
        query, key, value = (as_stored(x) for x in (query, key, value))
    for tiles in _tiles(mask, query.dtype, query.device) if plan.gathered else ():
        q, k, v = (_gather(x, i) for x, i in ((query, tiles.queries), (key, tiles.keys), (value, tiles.keys)))
        part_output, part_lse = _flash(q, k, v, scale, tiles.bias, None)
        if tiles.first:  # these rows of the output hold zeros
            _add(output, tiles.queries, part_output)
        else:
            o, s = (_gather(x, tiles.queries) for x in (output, lse[..., None]))
            _merge(o, s[..., 0], part_output, part_lse, first=False)
            _put(output, tiles.queries, o)
            part_lse = s[..., 0]
        _put(lse[..., None], tiles.queries, part_lse[..., None])
    return output.to(query.dtype), lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: KronMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    key_heads, head_dim, dtype = key.shape[1], query.shape[3], query.dtype
    query, key, value, grad_output = (_loadable(x) for x in (query, *_repeat_heads(query, key, value), grad_output))
    plan = _plan(mask, query)
    # the probabilities exp(score - lse) of a query that sees no key are 0
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]
    if plan.is_one_call and query.numel() and grad_lse is None:
        ((_, bias, _),) = _calls(plan, query)
        part_grads = _flash_backward(grad_output, query, key, value, output, lse[..., 0], scale, bias)
        grad_query, grad_key, grad_value = (as_stored(grad) for grad in part_grads)
        return grad_query, _sum_heads(grad_key, key_heads), _sum_heads(grad_value, key_heads)

    grads: tuple[Tensor, ...] = tuple(
        torch.zeros(x.shape[0], x.shape[2], x.shape[1], head_dim, dtype=torch.float32, device=x.device).transpose(1, 2)
        for x in (query, key, value)
    )
    grad_query, grad_key, grad_value = grads
    for part in plan.own:
        tensors: tuple[Tensor, ...] = (query, key, value, grad_output, output, lse, *grads)
        if grad_lse is not None:
            tensors += (grad_lse[..., None],)
        for q, k, v, g, o, s, dq, dk, dv, *ds in _pieces(part, "qkkqqqqkkq"[: len(tensors)], *tensors):
            q, g = q.float(), g.float()
            # nothing is in these rows of dq yet: they hold the products
            delta = torch.mul(g, o, out=dq).sum(-1, keepdim=True)
            if ds:
                delta -= ds[0]
            probability = (torch.mul(q, k, out=dq).sum(-1, keepdim=True).mul_(scale) - s).exp_()
            grad_score = (torch.mul(g, v, out=dq).sum(-1, keepdim=True) - delta).mul_(probability).mul_(scale)
            torch.mul(grad_score, k, out=dq)
            dk.addcmul_(grad_score, q)
            dv.addcmul_(probability, g)

    if grad_lse is not None:
        # The kernels know no gradient of the LSE, but they subtract sum(dO * O): one more column, dO = 1 and O = -dLSE, adds it.
        query, key, value = (torch.nn.functional.pad(x, (0, 8)) for x in (query, key, value))
        grad_output = torch.nn.functional.pad(torch.nn.functional.pad(grad_output, (0, 1), value=1.0), (0, 7))
        output = torch.nn.functional.pad(torch.cat([output, -grad_lse[..., None].to(dtype)], -1), (0, 7))
    tensors = (query, key, value, grad_output, output, lse, *grads)
    roles = "qkkqqqqkk"

    def accumulate(views: Iterator[tuple[Tensor, ...]], bias: Tensor | None) -> None:
        for q, k, v, g, o, s, *totals in views:
            for total, part_grad in zip(totals, _flash_backward(g, q, k, v, o, s[..., 0], scale, bias), strict=True):
                total += part_grad[..., :head_dim]

    for frames, *corner in plan.positions if query.numel() else ():
        accumulate(_position_views(mask, frames, corner, roles, *tensors), _bias(frames, dtype, query.device)[0])
    for part, bias, _ in _calls(plan, query) if query.numel() else ():
        accumulate(_pieces(part, roles, *tensors), bias)
    if plan.gathered:
        tensors = (*(as_stored(x) for x in tensors[:6]), *grads)
    for tiles in _tiles(mask, dtype, query.device) if plan.gathered and query.numel() else ():
        indices = [tiles.keys if role == "k" else tiles.queries for role in roles]
        q, k, v, g, o, s = (_gather(x, i) for x, i in zip(tensors[:6], indices[:6], strict=True))
        part_grads = _flash_backward(g, q, k, v, o, s[..., 0], scale, tiles.bias)
        for total, index, part_grad, apart in zip(
            grads, indices[6:], part_grads, (None, tiles.apart, tiles.apart), strict=True
        ):
            _add(total, index, part_grad[..., :head_dim], apart)

    grad_key, grad_value = (_sum_heads(g, key_heads) for g in (grad_key, grad_value))
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype)


def _plan(mask: KronMask, query: Tensor) -> Plan:
    """On CUDA only explicit patterns are computed under a mask: the kernel that takes one is not the fast one there."""
    return make_plan(mask, masked_blocks=query.device.type == "cpu")


def _calls(plan: Plan, query: Tensor) -> Iterator[tuple[Rectangles, Tensor | None, Tensor | None]]:
    """The rectangles, each with its bias and its queries that see no key if it has a mask."""
    for part in plan.rectangles:
        yield part, None, None
    for block, part in plan.masked:
        yield part, *_bias(block, query.dtype, query.device)


# ---- merging --------------------------------------------------------------------------------------------------------


def _merge(
    output: Tensor, lse: Tensor, part_output: Tensor, part_lse: Tensor, first: bool, masked: bool = False
) -> None:
    """Add a part's share to `output (B, H, rows, D)` and `lse (B, H, rows)`, in place.

    The weights are those of one softmax over both: `w = exp(part_lse) / (exp(lse) + exp(part_lse))`. In a `masked` part a row
    may have seen no key.
    """
    if first:
        output.copy_(part_output)
        lse.copy_(part_lse)
        return
    weight = torch.sigmoid(part_lse - lse)
    if masked:  # there the weight is 0, also if nothing before has seen a key (-inf - -inf); other NaNs stay NaN
        weight.masked_fill_(part_lse.isneginf(), 0.0)
    output.lerp_(part_output.to(output.dtype), weight[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


# ---- views ----------------------------------------------------------------------------------------------------------


def _pieces(part: Rectangles, roles: str, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views `(B', H, rows, D)` of each tensor `(B, H, L, D)` that cover the part, in as few batches as strides allow.

    `roles` says for each tensor whether its rows are queries ("q") or keys ("k").
    """
    spans = [
        (tensor, part.query, part.query_rows) if role == "q" else (tensor, part.key, part.key_rows)
        for role, tensor in zip(roles, tensors, strict=True)
    ]
    batch, count, step = tensors[0].shape[0], part.count, part.step
    if count == 1:
        yield tuple(tensor[:, :, start : start + rows] for tensor, start, rows in spans)
    elif all(batch == 1 or tensor.stride(0) == count * step * tensor.stride(2) for tensor in tensors):
        yield tuple(_stacked(tensor, start, rows, batch * count, step) for tensor, start, rows in spans)
    elif batch <= count:
        for b in range(batch):
            yield tuple(_stacked(tensor[b : b + 1], start, rows, count, step) for tensor, start, rows in spans)
    else:
        for i in range(count):
            yield tuple(tensor[:, :, start + i * step : start + i * step + rows] for tensor, start, rows in spans)


def _stacked(tensor: Tensor, start: int, rows: int, count: int, step: int) -> Tensor:
    """`(count, H, rows, D)`: the rows from `start`, `start + step`, ... of `tensor (1, H, L, D)`."""
    _, by_head, by_row, by_column = tensor.stride()
    size = (count, tensor.shape[1], rows, tensor.shape[3])
    return tensor.as_strided(
        size, (step * by_row, by_head, by_row, by_column), tensor.storage_offset() + start * by_row
    )


def _position_views(
    mask: KronMask, over_frames: KronMask, corner: Sequence[int], roles: str, *tensors: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """For each clip, views `(N, H, T, D)`: each position as a sequence over the frames of `over_frames`.

    `corner` is the first query frame and the first key frame.
    """
    sizes = {
        "q": (corner[0], over_frames.query_frames, mask.query_tokens),
        "k": (corner[1], over_frames.key_frames, mask.key_tokens),
    }
    for b in range(tensors[0].shape[0]):
        views = []
        for role, tensor in zip(roles, tensors, strict=True):
            first, frames, tokens = sizes[role]
            _, by_head, by_row, by_column = tensor.stride()
            size = (tokens, tensor.shape[1], frames, tensor.shape[3])
            offset = tensor.storage_offset() + b * tensor.stride(0) + (mask.prefix + first * tokens) * by_row
            views.append(tensor.as_strided(size, (by_row, by_head, tokens * by_row, by_column), offset))
        yield tuple(views)


def _loadable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if torch's kernels would not load it: its columns lie side by side, and on CUDA its rows start at
    multiples of 16 bytes, which the kernels load at once."""
    if tensor.stride(-1) != 1:
        return tensor.contiguous()
    if tensor.device.type == "cuda":
        at_once = 16 // tensor.element_size()
        steps = [by for by, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
        if any(step % at_once for step in (tensor.storage_offset(), *steps)):
            return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    return (key, value) if group == 1 else (key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))


def _sum_heads(grad: Tensor, heads: int) -> Tensor:
    if grad.shape[1] == heads:
        return grad
    return reduce(grad.transpose(1, 2), "b l (h g) d -> b l h d", "sum", h=heads).transpose(1, 2)


# ---- tiles ----------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """Equal tiles: the tokens of each, `(tiles, rows)` and `(tiles, keys)`, and what is added to the scores of all."""

    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    first: bool
    apart: tuple[int, ...]  # how many tiles, one behind the other, have no key in common with each other


@kept_on_device(maxsize=16)
def _tiles(mask: KronMask, dtype: torch.dtype, device: torch.device) -> list[_Tiles]:
    """The gathered tiles of the mask's plan, those that share no key one behind the other."""
    found = []
    for part in make_plan(mask, masked_blocks=device.type == "cpu").gathered:
        groups: list[tuple[set[int], list[int]]] = []
        for i, tile in enumerate(part.keys):
            used, members = next((group for group in groups if group[0].isdisjoint(tile)), (set[int](), list[int]()))
            if not members:
                groups.append((used, members))
            used.update(tile)
            members.append(i)
        order = [i for _, members in groups for i in members]
        queries = torch.tensor([part.queries[i] for i in order]).to(device)
        keys = torch.tensor([part.keys[i] for i in order]).to(device)
        bias = None if part.mask.density == 1 else _masked_scores(part.mask, dtype, device)
        found.append(_Tiles(queries, keys, bias, part.first, tuple(len(members) for _, members in groups)))
    return found


def _gather(tensor: Tensor, tokens: Tensor) -> Tensor:
    """`(B * tiles, H, rows, D)`: the tokens `(tiles, rows)` of `tensor (B, H, L, D)`."""
    batch, heads, _, head_dim = tensor.shape
    rows = tensor.transpose(1, 2).index_select(1, tokens.flatten())
    return rows.view(batch * len(tokens), -1, heads, head_dim).transpose(1, 2)


def _put(tensor: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Write what `_gather` would return; no token may stand in `tokens` twice."""
    tensor.transpose(1, 2).index_copy_(1, tokens.flatten(), _ungathered(tensor, values).to(tensor.dtype))


def _add(tensor: Tensor, tokens: Tensor, values: Tensor, apart: Sequence[int] | None = None) -> None:
    """Add to what `_gather` would return.

    No token may stand in `tokens` twice, or not within each `apart` tiles one behind the other: those are calls of their own, so
    that the order of a sum is always the same.
    """
    sizes = [tokens.shape[1] * number for number in apart or (len(tokens),)]
    values = _ungathered(tensor, values).to(tensor.dtype)
    for index, value in zip(tokens.flatten().split(sizes), values.split(sizes, dim=1), strict=True):
        tensor.transpose(1, 2).index_add_(1, index, value)


def _ungathered(tensor: Tensor, values: Tensor) -> Tensor:
    """`(B, tiles * rows, H, D)` of `values (B * tiles, H, rows, D)`."""
    return values.transpose(1, 2).reshape(tensor.shape[0], -1, tensor.shape[1], values.shape[3])


# ---- masked blocks --------------------------------------------------------------------------------------------------


@kept_on_device(maxsize=32)  # packed clips need one for each length
def _bias(block: KronMask, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernels add to the scores, and the rows that see no key: the kernels' LSE of these is not -inf."""
    bias = _masked_scores(block, dtype, device)
    return bias, bias.isneginf().all(1)


def _masked_scores(block: KronMask, dtype: torch.dtype, device: torch.device) -> Tensor:
    allowed = block.dense(device)
    rows, columns = allowed.shape
    # CUDA's kernel wants rows that start at multiples of 16 bytes
    storage = torch.zeros(rows, -(-columns // 16) * 16, dtype=dtype, device=allowed.device)
    return storage[:, :columns].masked_fill_(~allowed, float("-inf"))


# ---- torch's kernels ------------------------------------------------------------------------------------------------


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, Lq, D)` and LSE `(B, H, Lq)` float32 of plain attention with a bias; rows that are `empty` have LSE -inf."""
    output, lse = _flash_forward(query, key, value, scale, bias)
    if empty is None:
        return output, lse
    if output.device.type == "cuda":  # the CPU's kernel gives 0 to a query that sees no key; CUDA's promises nothing
        output = output.masked_fill(empty[:, None], 0.0)
    return output, lse.masked_fill(empty, float("-inf"))


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
    if _takes_flash(query, bias):
        padded = [_to_multiple_of_8(x) for x in (query, key, value)]
        output, lse, *_ = aten._scaled_dot_product_flash_attention(*padded, scale=scale)
        return output[..., : query.shape[3]], lse
    padded = [_to_multiple_of_8(x) for x in (query, key, value)]
    output, lse, *_ = aten._scaled_dot_product_efficient_attention(
        *padded, _expanded(bias, query, key), True, scale=scale
    )
    return output[..., : query.shape[3]], lse[..., : query.shape[2]]


def _flash_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given the output and LSE of the whole softmax of which this is a part."""
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    head_dim, rows = query.shape[3], query.shape[2]
    grad_output, query, key, value, output = (_to_multiple_of_8(x) for x in (grad_output, query, key, value, output))
    seed = torch.zeros((), dtype=torch.int64, device=query.device)  # of the dropout, which there is none of
    if _takes_flash(query, bias):
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad_output, query, key, value, output, lse.contiguous(), None, None, rows, key.shape[2], 0.0, False, seed, seed,
            scale=scale,
        )  # fmt: skip
    else:
        # the kernel takes rows one behind the other for granted, and padding by nothing keeps the strides
        lse = torch.nn.functional.pad(lse.contiguous(), (0, -rows % 32), value=float("inf"))
        if output.stride(2) != output.shape[1] * output.shape[3]:
            output = as_stored(output)  # in half precision the kernel reads it itself, and never asks for this stride
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad_output, query, key, value, _expanded(bias, query, key), output, lse, seed, seed, 0.0,
            [True, True, True, False], scale=scale,
        )[:3]  # fmt: skip
    return tuple(grad[..., :head_dim] for grad in grads)  # type: ignore[return-value]


def _takes_flash(query: Tensor, bias: Tensor | None) -> bool:
    """Whether FlashAttention-2 runs a call on CUDA; else the memory-efficient kernel does, which takes all."""
    return bias is None and query.dtype != torch.float32 and _is_ampere_or_newer(query.device)


@lru_cache(maxsize=64)
def _is_ampere_or_newer(device: torch.device) -> bool:
    # where torch sees no GPU, shapes alone pass through here
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def _expanded(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _to_multiple_of_8(tensor: Tensor) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % 8)) if tensor.shape[-1] % 8 else tensor

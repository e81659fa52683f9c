"""The operator: attention under a Kronecker mask, as the `torch.library` op `kronmask::attention`.

Data flows one way: mask -> plan -> backend -> output. The op takes the mask as its rule (text) and sizes (ints, symbolic when
traced), so it is opaque to `torch.compile` and `torch.export` and a graph holds for clips of any length. Several rules in one
text, those of masks of one size, are a mask for each group of heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kronmask import backends
from kronmask.backends import groups
from kronmask.mask import KronMask

__all__ = ["attention_backend", "join_rules", "kron_attention", "rule_attention", "split_rules"]

_forced: str | None = None


@contextmanager
def attention_backend(backend: str) -> Iterator[None]:
    """Use one backend for every `kron_attention` in the block, whatever its `backend` argument says.

    Like `torch.nn.attention.sdpa_kernel` it holds for the whole process. The backward of a forward in the block keeps the
    backend, wherever it is called.

    Raises:
        ValueError: unknown backend.
    """
    global _forced
    backends.check_name(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@overload
def kron_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: KronMask | Sequence[KronMask], *,
    scale: float | None = None, backend: str = "auto", return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def kron_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: KronMask | Sequence[KronMask], *,
    scale: float | None = None, backend: str = "auto", return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def kron_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: KronMask | Sequence[KronMask],
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention in which each query sees the keys that `mask` allows.

    Args:
        query: `(B, Hq, Lq, D)`, float32, float16 or bfloat16 (float64 in `dense`), any strides.
        key, value: `(B, Hkv, Lk, D)`, Hq a multiple of Hkv (grouped-query attention), same dtype and device.
        mask: of shape `(Lq, Lk)`; or several of that shape, which divide the heads into equal groups in order, each under its
            own mask: one call of the operator, and in "triton" one launch, if they are of the same frames and tokens.
        scale: factor on the scores, `D ** -0.5` by default.
        backend: "triton" (the fused kernels), "sdpa" (torch's flash kernels on the mask's rectangles, merged by log-sum-exp),
            "flex" (FlexAttention), "dense" (the plain reference), or "auto".
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        The output `(B, Hq, Lq, D)` in the dtype of `query`, and with `return_lse` the LSE `(B, Hq, Lq)`, natural log, float32
        (float64 for float64 inputs). Both are differentiable. A query that sees no key has output 0, LSE -inf and gradient 0.

    Raises:
        TypeError: `mask` is no `KronMask`, or the dtypes do not agree.
        ValueError: shapes or devices that do not fit, or an unknown backend.
        NotImplementedError: what the backend cannot do; the message names one that can.

    There is no second derivative and no forward-mode or `vmap` rule. Masks are best built outside of a compiled region.
    """
    if isinstance(mask, KronMask):
        output, lse = _attend(query, key, value, mask.rule, *_sizes(mask), scale, backend)
        return (output, lse) if return_lse else output
    several = _checked(mask)
    if all(_sizes(mask) == _sizes(several[0]) for mask in several):
        rule = join_rules([mask.rule for mask in several])
        output, lse = _attend(query, key, value, rule, *_sizes(several[0]), scale, backend)
    else:  # of one shape, but of other frames: a call for each
        _check_tensors(query, key, value)
        results = [
            kron_attention(*parts, mask, scale=scale, backend=backend, return_lse=True)
            for mask, parts in zip(several, groups.head_groups(query, key, value, len(several)), strict=True)
        ]
        output, lse = (torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
    return (output, lse) if return_lse else output


def _sizes(mask: KronMask) -> tuple[tuple[int, int], tuple[int, int], int]:
    return (mask.query_frames, mask.key_frames), (mask.query_tokens, mask.key_tokens), mask.prefix


def _checked(masks: Any) -> list[KronMask]:
    """The masks of groups of heads."""
    several = list(masks) if isinstance(masks, (list, tuple)) else [masks]
    if not several:
        raise ValueError(
            "mask is an empty list, and heads do not divide into 0 equal groups; name a mask for each group"
        )
    for mask in several:
        if not isinstance(mask, KronMask):
            raise TypeError(
                f"mask must be a KronMask, or a list of them, not {type(mask).__name__}; see kronmask.masks and kronmask.kron"
            )
        if mask.shape != several[0].shape:
            raise ValueError(f"the masks of groups of heads must have one shape, not {several[0]!s} and {mask!s}")
    return several


# A rule is text without this character.
_BETWEEN = "|"


def join_rules(rules: Sequence[str]) -> str:
    """The rules of masks of one size, one for each group of heads, as one text."""
    return _BETWEEN.join(rules)


def split_rules(text: str) -> list[str]:
    """The rules that `join_rules` joined."""
    return text.split(_BETWEEN)


def rule_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: str,
    *,
    frames: int | tuple[int, int],
    tokens: int,
    prefix: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`kron_attention` under the mask that `rule` describes for `frames` frames (or query and key frames) of `tokens` tokens.

    `rule` may be several, one for each group of heads (see `join_rules`).

    What a model calls in its forward: the sizes may be symbolic, so that a compiled model needs no new graph for a longer clip.
    See `KronMask.rule` and `masks.mask_rule`.
    """
    frames = frames if isinstance(frames, tuple) else (frames, frames)
    return _attend(query, key, value, rule, frames, (tokens, tokens), prefix, scale, backend)[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: str,
    frames: tuple[int, int],
    tokens: tuple[int, int],
    prefix: int,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = _forced or backend
    backends.check_name(backend)
    query, key, value = _autocast(query, key, value)
    _check_tensors(query, key, value)
    for name, tensor, size in (("query", query, 0), ("key", key, 1), ("value", value, 1)):
        if tensor.shape[2] != prefix + frames[size] * tokens[size]:
            raise ValueError(
                f"the mask has {f'{prefix} prefix tokens + ' if prefix else ''}frames * tokens = {frames[size]} * "
                f"{tokens[size]} = {prefix + frames[size] * tokens[size]}, but {name} has {tensor.shape[2]} tokens; "
                "is the class token included in tokens?"
            )
    groups.check_heads(query.shape[1], key.shape[1], rule.count(_BETWEEN) + 1)
    if scale is None:
        scale = query.shape[3] ** -0.5
    return torch.ops.kronmask.attention(query, key, value, rule, *frames, *tokens, prefix, scale, backend)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to `scaled_dot_product_attention`: everything but float64 to the autocast dtype."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, head_dim), not of shape {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise TypeError(
                f"{name} is {tensor.dtype}; attention takes float32, float16 and bfloat16 (float64 in dense)"
            )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"query is {query.dtype} but {name} is {tensor.dtype}; they must have one dtype")
        if tensor.device != query.device:
            raise ValueError(f"query is on {query.device} but {name} is on {tensor.device}; they must be on one device")
        if tensor.shape[0] != query.shape[0] or tensor.shape[3] != query.shape[3]:
            raise ValueError(
                f"query {tuple(query.shape)} and {name} {tuple(tensor.shape)} must agree in batch and head_dim"
            )
    if value.shape != key.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same shape")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads, which is no multiple of the {key.shape[1]} heads of key and value"
        )


# ---- the op ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("kronmask::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: str,
    query_frames: int,
    key_frames: int,
    query_tokens: int,
    key_tokens: int,
    prefix: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    masks = _masks(rule, query_frames, key_frames, query_tokens, key_tokens, prefix)
    modules = _modules(backend, query, key, masks)
    if len(masks) == 1:
        return modules[0].forward(query, key, value, masks[0], scale)
    return groups.forward(modules, query, key, value, masks, scale)


def _masks(rule: str, *sizes: int) -> tuple[KronMask, ...]:
    query_frames, key_frames, query_tokens, key_tokens, prefix = sizes
    frames, tokens = (query_frames, key_frames), (query_tokens, key_tokens)
    return tuple(KronMask.from_rule(part, frames=frames, tokens=tokens, prefix=prefix) for part in split_rules(rule))


def _modules(backend: str, query: Tensor, key: Tensor, masks: tuple[KronMask, ...]) -> list[ModuleType]:
    """The backend of each group of heads."""
    if len(masks) == 1:
        return [backends.get(backend, query, key, masks[0])]
    parts = groups.head_groups(query, key, key, len(masks))
    return [backends.get(backend, q, k, mask) for (q, k, _), mask in zip(parts, masks, strict=True)]


@_attention_op.register_fake
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = query.shape
    output = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty(batch, heads, length, dtype=lse_dtype)


@torch.library.custom_op("kronmask::attention_backward", mutates_args=())
def _attention_backward_op(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    rule: str,
    query_frames: int,
    key_frames: int,
    query_tokens: int,
    key_tokens: int,
    prefix: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    masks = _masks(rule, query_frames, key_frames, query_tokens, key_tokens, prefix)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_lse is not None:  # of a query that sees no key: 0, whatever a merge by logaddexp hands back for -inf
        grad_lse = grad_lse.masked_fill(lse.isneginf(), 0.0)
    modules, given = _modules(backend, query, key, masks), (grad_output, grad_lse, query, key, value, output, lse)
    if len(masks) == 1:
        return modules[0].backward(*given, masks[0], scale)
    return groups.backward(modules, *given, masks, scale)


@_attention_backward_op.register_fake
def _(
    grad_output: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.arguments = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.arguments)
    if grad_output is None and grad_lse is None:
        return (None, None, None, *nothing)
    grads = torch.ops.kronmask.attention_backward(grad_output, grad_lse, *ctx.saved_tensors, *ctx.arguments)
    return (*grads, *nothing)


_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _flops(query: Any, rule: str, *sizes: int) -> int:
    """Useful multiply-adds of the forward, `4 * B * H * D` for each allowed pair."""
    batch, heads, _, head_dim = query
    masks = _masks(rule, *sizes)
    return 4 * batch * heads // len(masks) * head_dim * sum(mask.num_pairs for mask in masks)


@register_flop_formula(torch.ops.kronmask.attention)
def _attention_flops(
    query: Any, key: Any, value: Any, rule: str, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return _flops(query, rule, *args[:5])


@register_flop_formula(torch.ops.kronmask.attention_backward)
def _attention_backward_flops(
    grad_output: Any, grad_lse: Any, query: Any, key: Any, value: Any, output: Any, lse: Any, rule: str, *args: Any,
    out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """The backward recomputes the scores and has four more products: 2.5 x the forward."""
    return _flops(query, rule, *args[:5]) * 5 // 2

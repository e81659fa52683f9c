"""Named masks. Each takes `(frames, tokens)`, so each is also a value for `patch_vit(attention=...)`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from operator import index

import torch

from kronmask.mask import EMPTY, FULL, IDENTITY, KronMask, kron, ones

__all__ = [
    "NAMES",
    "axial",
    "causal",
    "dilated",
    "frame_window",
    "joint",
    "kmct",
    "kmt",
    "mask_rule",
    "neighborhood",
    "spatial",
    "temporal",
]


def joint(frames: int, tokens: int, *, prefix: int = 0) -> KronMask:
    """J (x) J: every token sees every token. Joint space-time attention of ViViT (Arnab et al. 2021, arXiv 2103.15691)."""
    return _by_distance(frames, tokens, prefix, lambda distance: FULL)


def spatial(frames: int, tokens: int, *, prefix: int = 0) -> KronMask:
    """I (x) J: every token sees its own frame; the image model (the space half of TimeSformer, arXiv 2102.05095)."""
    return _by_distance(frames, tokens, prefix, lambda distance: FULL if distance == 0 else EMPTY)


def temporal(frames: int, tokens: int, *, prefix: int = 0) -> KronMask:
    """J (x) I: every token sees its own position in all frames (the time half of TimeSformer, arXiv 2102.05095)."""
    return _by_distance(frames, tokens, prefix, lambda distance: IDENTITY)


def causal(frames: int, tokens: int, *, window: int | None = None, sink: int = 0, prefix: int = 0) -> KronMask:
    """tril (x) J: every token sees its own and all earlier frames (block-causal attention).

    With `window`, of these only the last `window` frames, its own among them (sliding-window attention of Longformer, arXiv
    2004.05150, over frames); the first `sink` frames are always seen (attention sinks of StreamingLLM, arXiv 2309.17453).
    """
    return _causal(frames, tokens, prefix, FULL, window, sink)


def kmt(frames: int, tokens: int, *, prefix: int = 0) -> KronMask:
    """The Kronecker mask of CLAVER (ICLR 2025, arXiv 2502.03549): other frames at any position, own frame only itself.

    `(t, n)` sees `(t', n')` iff `t != t' or n == n'`.
    """
    return _by_distance(frames, tokens, prefix, lambda distance: IDENTITY if distance == 0 else FULL)


def kmct(frames: int, tokens: int, *, window: int | None = None, sink: int = 0, prefix: int = 0) -> KronMask:
    """The causal Kronecker mask of CLAVER (ICLR 2025, arXiv 2502.03549): earlier frames at any position, and itself.

    `(t, n)` sees `(t', n')` iff `t' < t or (t, n) == (t', n')`. With `window`, of the earlier frames only the last
    `window - 1`; the first `sink` frames are always seen, as in `causal`.
    """
    return _causal(frames, tokens, prefix, IDENTITY, window, sink)


def frame_window(frames: int, tokens: int, *, radius: int = 1, prefix: int = 0) -> KronMask:
    """Banded A (x) J: frames at most `radius` apart (local attention of Longformer, arXiv 2004.05150, over frames)."""
    _at_least(radius, 0, "radius")
    return _by_distance(frames, tokens, prefix, lambda distance: FULL if abs(distance) <= radius else EMPTY)


def dilated(frames: int, tokens: int, *, stride: int = 2, prefix: int = 0) -> KronMask:
    """Strided A (x) J: frames a multiple of `stride` apart (Sparse Transformer, arXiv 1904.10509, over frames)."""
    _at_least(stride, 1, "stride")
    return _by_distance(frames, tokens, prefix, lambda distance: FULL if distance % stride == 0 else EMPTY)


def axial(frames: int, tokens: int, *, prefix: int = 0) -> KronMask:
    """I (x) J | J (x) I: own frame, and own position in all frames, under one softmax.

    The space and time axes of axial attention (Ho et al. 2019, arXiv 1912.12180) attended to together, as criss-cross attention
    (Huang et al. 2019, arXiv 1811.11721) does for rows and columns.
    """
    return _by_distance(frames, tokens, prefix, lambda distance: FULL if distance == 0 else IDENTITY)


def neighborhood(
    frames: int, tokens: int, *, radius: int = 1, grid: tuple[int, int] | None = None, prefix: int = 0
) -> KronMask:
    """J (x) B: in all frames, the positions within `radius` rows and columns on the patch grid.

    `grid` is `(rows, columns)`; the `tokens - rows * columns` tokens before the patches (class token, registers) see and are
    seen by their whole frame and all others. By default the grid is the square that leaves at most one such token. Intersect
    with `frame_window` for a local space-time window. After neighborhood attention (Hassani et al. 2023, arXiv 2204.07143); at
    the border the window is cut, not shifted.
    """
    _at_least(radius, 0, "radius")
    _at_least(tokens, 1, "tokens")
    if grid is None:
        side = math.isqrt(tokens)
        if tokens - side * side > 1:
            raise ValueError(
                f"{tokens} tokens are no square patch grid with at most one class token; pass grid=(rows, columns)"
            )
        grid = (side, side)
    rows, columns = grid
    extra = tokens - rows * columns
    if rows < 1 or columns < 1 or extra < 0:
        raise ValueError(
            f"a grid of {rows} x {columns} = {rows * columns} patches does not fit {tokens} tokens per frame"
        )
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    near = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
    space = ones(tokens)
    space[extra:, extra:] = near
    return kron(ones(_at_least(frames, 1, "frames")), space, prefix=prefix)


NAMES: dict[str, Callable[..., KronMask]] = {
    mask.__name__: mask
    for mask in (joint, spatial, temporal, causal, kmt, kmct, frame_window, dilated, axial, neighborhood)
}


def mask_rule(attention: str | KronMask | Callable[[int, int], KronMask], frames: int, tokens: int) -> str:
    """The rule (see `KronMask.rule`) of what `patch_vit(attention=...)` was given, for clips of this size.

    The rule of most names holds for every size, so that nothing here depends on `frames` or `tokens`; a compiled model then
    needs no new graph for longer clips. A callable, and the names `dilated` and `neighborhood`, have one rule for each size.

    Raises:
        ValueError: unknown name, or a mask that does not fit `frames` and `tokens`.
    """
    if isinstance(attention, KronMask):
        sizes = (
            attention.query_frames,
            attention.key_frames,
            attention.query_tokens,
            attention.key_tokens,
            attention.prefix,
        )
        if sizes != (frames, frames, tokens, tokens, 0):
            raise ValueError(
                f"attention is {attention!s}, but the clip has {frames} frames of {tokens} tokens and no prefix; "
                "pass a name or a callable (frames, tokens) -> KronMask for clips of any size"
            )
        return attention.rule
    if isinstance(attention, str):
        if attention not in NAMES:
            hint = did_you_mean(attention, NAMES)
            raise ValueError(f"unknown attention {attention!r}{hint}; the named masks are {', '.join(NAMES)}")
        rule = _free_rule(attention)
        return _sized_rule(NAMES[attention], index(frames), index(tokens)) if rule is None else rule
    if not callable(attention):
        raise ValueError(
            f"attention must be a name, a KronMask or a callable (frames, tokens) -> KronMask, not {attention!r}"
        )
    return _sized_rule(attention, index(frames), index(tokens))


# The two below are constants of a traced graph; `index` has made ints of symbolic sizes.


@torch.compiler.assume_constant_result
def _free_rule(name: str) -> str | None:
    """The rule of a named mask if it is the same at every size."""
    small, large = _rule_at(NAMES[name], 8, 5), _rule_at(NAMES[name], 11, 10)
    return small if small == large else None


@torch.compiler.assume_constant_result
def _sized_rule(attention: Callable[[int, int], KronMask], frames: int, tokens: int) -> str:
    return _rule_at(attention, frames, tokens)


@lru_cache(maxsize=256)
def _rule_at(attention: Callable[[int, int], KronMask], frames: int, tokens: int) -> str:
    mask = attention(frames, tokens)
    if not isinstance(mask, KronMask):
        raise ValueError(f"attention {attention!r} returned {type(mask).__name__}, not a KronMask")
    return mask_rule(mask, frames, tokens)


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """`, did you mean 'kmt'?` if `value` resembles one of the choices, else nothing: the end of an error message."""
    nearest = difflib.get_close_matches(str(value), list(choices), n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def _by_distance(frames: int, tokens: int, prefix: int, code: Callable[[int], int]) -> KronMask:
    """The mask whose factor depends on the frame distance `t' - t` alone."""
    _at_least(frames, 1, "frames")
    return KronMask([[code(k - q) for k in range(frames)] for q in range(frames)], tokens=tokens, prefix=prefix)


def _causal(frames: int, tokens: int, prefix: int, own: int, window: int | None, sink: int) -> KronMask:
    """Earlier frames, or those of them in the window and the sinks, at any position; the own frame as `own` says."""
    _at_least(frames, 1, "frames")
    _at_least(sink, 0, "sink")
    reach = frames if window is None else _at_least(window, 1, "window")

    def code(query: int, key: int) -> int:
        if key >= query:
            return own if key == query else EMPTY
        return FULL if query - key < reach or key < sink else EMPTY

    return KronMask([[code(q, k) for k in range(frames)] for q in range(frames)], tokens=tokens, prefix=prefix)


def _at_least(value: int, minimum: int, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < minimum:
        raise ValueError(f"{name} must be an int of at least {minimum}, not {value!r}")
    return index(value)

"""`KronMask`: every union, intersection and complement of Kronecker-product masks, in one normal form.

A video sequence has `prefix + frames * tokens` positions, frame-major: token `(t, n)` sits at `prefix + t * tokens + n`.
The mask is a small table `codes` that names, for each pair of frames, one space factor: 0 empty, 1 all-ones, 2 the identity,
3 and up the explicit patterns of the palette. Each pair of frames has one code, so the terms are disjoint and one softmax serves
them all. Nothing of size L x L is built except by `dense()`, which is the specification.
"""

from __future__ import annotations

import base64
import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import index
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["EMPTY", "FULL", "IDENTITY", "KronMask", "eye", "kron", "ones"]

EMPTY, FULL, IDENTITY = 0, 1, 2
FIRST_PATTERN = 3


@dataclass(frozen=True, repr=False)
class KronMask:
    """A boolean attention mask (True = may attend) made of one space factor for each pair of frames.

    Args:
        codes: `(Tq, Tk)` table of ints, the factor of each (query frame, key frame): 0 empty, 1 all-ones, 2 identity,
            `3 + i` the pattern `palette[i]`.
        palette: explicit `(Nq, Nk)` boolean patterns.
        tokens: tokens per frame (the per-frame class token included), one int or `(Nq, Nk)`.
        prefix: number of tokens before the frames; they see and are seen by all, and no operation changes that.

    Masks are immutable, hashable, and equal exactly when their dense forms and their factorisation into frames are equal:
    patterns that are empty, full or the identity become codes, and the palette is ordered by first use.

    Raises:
        ValueError: a table, pattern or size that does not fit; the message names it.
    """

    codes: tuple[tuple[int, ...], ...]
    palette: tuple[bytes, ...]  # one byte for each entry, row-major: hashable and immutable, unlike a tensor
    query_frames: int
    key_frames: int
    query_tokens: int
    key_tokens: int
    prefix: int
    rule: str = field(compare=False)  # the same mask as text; free of the number of frames where the table is Toeplitz

    def __init__(
        self,
        codes: Sequence[Sequence[int]] | Tensor,
        palette: Sequence[Tensor | Sequence[Sequence[bool]]] = (),
        *,
        tokens: int | tuple[int, int],
        prefix: int = 0,
    ) -> None:
        query_tokens, key_tokens = _pair(tokens, "tokens", minimum=1)
        if isinstance(prefix, bool) or int(prefix) != prefix or prefix < 0:
            raise ValueError(f"prefix must be a whole number of tokens, 0 or more, not {prefix!r}")
        table = [list(map(int, row)) for row in (codes.tolist() if isinstance(codes, Tensor) else codes)]
        if not table or not table[0] or any(len(row) != len(table[0]) for row in table):
            raise ValueError(f"codes must be a (Tq, Tk) table with at least one frame each way, not {codes!r}")
        factors = _canonical_factors(palette, query_tokens, key_tokens)
        used = dict.fromkeys(itertools.chain.from_iterable(table))
        for code in used:
            if not 0 <= code < FIRST_PATTERN + len(factors):
                raise ValueError(
                    f"code {code} names no factor: the palette has {len(factors)} patterns (codes 0 to {2 + len(factors)})"
                )
            if code == IDENTITY and query_tokens != key_tokens:
                raise ValueError(
                    f"code 2 (identity) needs as many query as key tokens, not {query_tokens} and {key_tokens}"
                )
        canonical: dict[int, int] = {}
        kept: dict[bytes, int] = {}
        for code in used:
            factor = factors[code - FIRST_PATTERN] if code >= FIRST_PATTERN else code
            if isinstance(factor, bytes):
                factor = kept.setdefault(factor, FIRST_PATTERN + len(kept))
            canonical[code] = FULL if factor == IDENTITY and query_tokens == 1 else factor
        set_field = object.__setattr__
        set_field(self, "codes", tuple(tuple(map(canonical.__getitem__, row)) for row in table))
        set_field(self, "palette", tuple(kept))
        set_field(self, "query_frames", len(table))
        set_field(self, "key_frames", len(table[0]))
        set_field(self, "query_tokens", query_tokens)
        set_field(self, "key_tokens", key_tokens)
        set_field(self, "prefix", int(prefix))
        set_field(self, "rule", _write_rule(self.codes, self.palette))

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """`(Lq, Lk)`, prefix included."""
        return (
            self.prefix + self.query_frames * self.query_tokens,
            self.prefix + self.key_frames * self.key_tokens,
        )

    @property
    def num_frames(self) -> int:
        """Frames of the clip that is attended to; of a rectangular mask, its key frames."""
        return self.key_frames

    @property
    def num_tokens(self) -> int:
        """Tokens per frame of the clip that is attended to; of a rectangular mask, its key tokens."""
        return self.key_tokens

    @property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs that may attend, counted from the table."""
        area = {EMPTY: 0, FULL: self.query_tokens * self.key_tokens, IDENTITY: self.query_tokens}
        area |= {FIRST_PATTERN + i: sum(pattern) for i, pattern in enumerate(self.palette)}
        frames = sum(area[code] for row in self.codes for code in row)
        rows, columns = self.shape
        return frames + self.prefix * (rows + columns - self.prefix)

    @property
    def density(self) -> float:
        """Share of the `Lq * Lk` pairs that may attend: the ideal time relative to joint attention."""
        rows, columns = self.shape
        return self.num_pairs / (rows * columns)

    @property
    def looks_ahead(self) -> tuple[int, int] | None:
        """The first (query frame, key frame) in which a frame sees a later one; None for a mask that is causal over frames."""
        return next(
            ((q, k) for q, row in enumerate(self.codes) for k in range(q + 1, len(row)) if row[k] != EMPTY), None
        )

    # ---- algebra ----------------------------------------------------------------------------------------------------

    def factor(self, code: int) -> Tensor:
        """The `(Nq, Nk)` boolean space factor that `code` names, as a new tensor."""
        shape = (self.query_tokens, self.key_tokens)
        if code == EMPTY:
            return torch.zeros(shape, dtype=torch.bool)
        if code == FULL:
            return torch.ones(shape, dtype=torch.bool)
        if code == IDENTITY and shape[0] == shape[1]:
            return torch.eye(shape[0], dtype=torch.bool)
        if not FIRST_PATTERN <= code < FIRST_PATTERN + len(self.palette):
            raise ValueError(f"code {code} names no factor of {self!s}")
        return torch.frombuffer(bytearray(self.palette[code - FIRST_PATTERN]), dtype=torch.bool).view(shape)

    def __and__(self, other: KronMask) -> KronMask:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: KronMask) -> KronMask:
        return self._combine(other, torch.logical_or)

    def __invert__(self) -> KronMask:
        """The complement between frames; prefix tokens still see and are seen by all."""
        codes = range(FIRST_PATTERN + len(self.palette))
        patterns = [~self.factor(code) if self._has(code) else self.factor(EMPTY) for code in codes]
        return self._with([[FIRST_PATTERN + code for code in row] for row in self.codes], patterns)

    @property
    def T(self) -> KronMask:  # noqa: N802 - the field's name for a transpose
        """The transpose: key `(t', n')` sees query `(t, n)`."""
        patterns = [self.factor(FIRST_PATTERN + i).T for i in range(len(self.palette))]
        return KronMask(
            list(zip(*self.codes, strict=True)),
            patterns,
            tokens=(self.key_tokens, self.query_tokens),
            prefix=self.prefix,
        )

    def select(
        self, *, query: slice | Sequence[int] = slice(None), key: slice | Sequence[int] = slice(None)
    ) -> KronMask:
        """The rectangular mask of some query frames against some key frames (streaming, frame-parallel).

        `masks.kmct(8, 197).select(query=slice(6, 8))` is the mask of the last two frames against all eight, and so is
        `select(query=[6, 7])`: the frames are a slice of all, or their numbers, in any order.

        Raises:
            ValueError: no frame is selected, or a number is not that of a frame.
        """
        queries, keys = _frames(query, self.query_frames, "query"), _frames(key, self.key_frames, "key")
        codes = [[self.codes[q][k] for k in keys] for q in queries]
        if not codes or not codes[0]:
            raise ValueError(f"query={query} and key={key} select no frames of {self!s}")
        return self._with(codes, [self.factor(FIRST_PATTERN + i) for i in range(len(self.palette))])

    @staticmethod
    def block_diagonal(masks: Sequence[KronMask]) -> KronMask:
        """The mask of clips one behind the other, of one length or not: each sees itself alone, under its own mask.

        `block_diagonal([masks.kmct(t, 197) for t in (8, 5, 16)])` serves a sequence of `29 * 197` tokens. The masks may differ
        and may be rectangular, which packs the query frames and the key frames of streams.

        Raises:
            ValueError: no mask, masks of other numbers of tokens than the first, or a mask with a prefix.
        """
        masks = list(masks)
        if not masks:
            raise ValueError("block_diagonal needs at least one mask, and got none")
        tokens, key_frames = (masks[0].query_tokens, masks[0].key_tokens), sum(mask.key_frames for mask in masks)
        patterns: dict[bytes, Tensor] = {}
        table: list[list[int]] = []
        before = 0  # key frames of the clips before this one
        for number, mask in enumerate(masks):
            if (mask.query_tokens, mask.key_tokens) != tokens:
                raise ValueError(
                    f"masks of different tokens cannot be packed: {masks[0]!s}, but mask {number} is {mask!s}"
                )
            if mask.prefix:
                raise ValueError(
                    f"mask {number} has {mask.prefix} prefix tokens, which would be seen by all clips; packed clips have none: "
                    "count class tokens and registers in tokens"
                )
            codes = list(range(FIRST_PATTERN))
            for i, pattern in enumerate(mask.palette):
                patterns.setdefault(pattern, mask.factor(FIRST_PATTERN + i))
                codes.append(FIRST_PATTERN + list(patterns).index(pattern))
            after = [EMPTY] * (key_frames - before - mask.key_frames)
            table += [[EMPTY] * before + [codes[code] for code in row] + after for row in mask.codes]
            before += mask.key_frames
        return KronMask(table, list(patterns.values()), tokens=tokens)

    def _has(self, code: int) -> bool:
        return code != IDENTITY or self.query_tokens == self.key_tokens

    def _with(self, codes: Sequence[Sequence[int]], patterns: Sequence[Tensor]) -> KronMask:
        return KronMask(codes, patterns, tokens=(self.query_tokens, self.key_tokens), prefix=self.prefix)

    def _combine(self, other: KronMask, operation: Callable[[Tensor, Tensor], Tensor]) -> KronMask:
        if not isinstance(other, KronMask):
            return NotImplemented
        if self._sizes() != other._sizes():
            raise ValueError(f"masks of different sizes cannot be combined: {self!s} and {other!s}")
        pairs = [list(zip(*rows, strict=True)) for rows in zip(self.codes, other.codes, strict=True)]
        distinct = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
        patterns = [operation(self.factor(a), other.factor(b)) for a, b in distinct]
        return self._with([[FIRST_PATTERN + distinct.index(pair) for pair in row] for row in pairs], patterns)

    def _sizes(self) -> tuple[int, ...]:
        return (self.query_frames, self.key_frames, self.query_tokens, self.key_tokens, self.prefix)

    def __hash__(self) -> int:
        """Of the rule, which equal masks share: a string remembers its hash, a table of many frames is walked each time."""
        return hash((self.rule, *self._sizes()))

    # ---- other forms ------------------------------------------------------------------------------------------------

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """The `(Lq, Lk)` boolean mask itself, True = may attend: the specification of every backend."""
        codes = range(FIRST_PATTERN + len(self.palette))
        factors = torch.stack([self.factor(code if self._has(code) else EMPTY) for code in codes])
        frames = rearrange(factors[torch.tensor(self.codes)], "tq tk nq nk -> (tq nq) (tk nk)")
        pad = (self.prefix, 0, self.prefix, 0)
        return torch.nn.functional.pad(frames, pad, value=True).to(device)

    def mask_mod(self, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as FlexAttention's `mask_mod(batch, head, query_index, key_index)`; its tables live on `device`."""
        codes = torch.tensor(self.codes, dtype=torch.int32, device=device)
        patterns = None
        if self.palette:
            indices = range(FIRST_PATTERN, FIRST_PATTERN + len(self.palette))
            patterns = torch.stack([self.factor(code) for code in indices]).to(device)
        prefix, query_tokens, key_tokens = self.prefix, self.query_tokens, self.key_tokens

        def mask_mod(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
            q = (query_index - prefix).clamp(min=0) if prefix else query_index
            k = (key_index - prefix).clamp(min=0) if prefix else key_index
            code = codes[q // query_tokens, k // key_tokens]
            allowed = (code == FULL) | ((code == IDENTITY) & (q % query_tokens == k % key_tokens))
            if patterns is not None:
                pattern = patterns[(code - FIRST_PATTERN).clamp(min=0), q % query_tokens, k % key_tokens]
                allowed = allowed | ((code >= FIRST_PATTERN) & pattern)
            if prefix:
                allowed = allowed | (query_index < prefix) | (key_index < prefix)
            return allowed

        return mask_mod

    def block_counts(self, block_size: int | tuple[int, int] = 128) -> Tensor:
        """Allowed pairs in each `(query block, key block)`, int64 `(ceil(Lq / BQ), ceil(Lk / BK))`.

        Arithmetic on the frame table: each sequence is cut where a frame or a block ends, and the area of a piece follows from
        its code alone. Time and memory grow with the number of pieces, never with `L^2`.
        """
        block = _pair(block_size, "block_size", minimum=1)
        rows = _segments(self.shape[0], self.prefix, self.query_tokens, block[0])
        columns = _segments(self.shape[1], self.prefix, self.key_tokens, block[1])
        codes = torch.tensor(self.codes)
        # (R, C) code of each piece; a prefix piece (frame -1) is all-ones
        table = codes[rows.frame.clamp(min=0)[:, None], columns.frame.clamp(min=0)[None]]
        table = table.masked_fill((rows.frame < 0)[:, None] | (columns.frame < 0)[None], FULL)
        area = (table == FULL) * (rows.stop - rows.start)[:, None] * (columns.stop - columns.start)[None]
        overlap = torch.minimum(rows.stop[:, None], columns.stop) - torch.maximum(rows.start[:, None], columns.start)
        area += (table == IDENTITY) * overlap.clamp(min=0)
        for i in range(len(self.palette)):
            sums = torch.nn.functional.pad(self.factor(FIRST_PATTERN + i).long().cumsum(0).cumsum(1), (1, 0, 1, 0))
            top, bottom = rows.start.clamp(max=self.query_tokens), rows.stop.clamp(max=self.query_tokens)
            left, right = columns.start.clamp(max=self.key_tokens), columns.stop.clamp(max=self.key_tokens)
            inside = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
            area += (table == FIRST_PATTERN + i) * inside
        counts = torch.zeros(int(rows.block[-1]) + 1, len(columns.block), dtype=torch.long).index_add_(
            0, rows.block, area
        )
        return torch.zeros(len(counts), int(columns.block[-1]) + 1, dtype=torch.long).index_add_(
            1, columns.block, counts
        )

    def block_mask(self, block_size: int | tuple[int, int] = 128, device: torch.device | str = "cpu") -> Any:
        """FlexAttention's `BlockMask`, equal to `create_block_mask(self.mask_mod(), ...)` but computed from the frame table."""
        from torch.nn.attention.flex_attention import BlockMask

        block = _pair(block_size, "block_size", minimum=1)
        counts = self.block_counts(block)
        full = counts == block[0] * block[1]
        partial = (counts > 0) & ~full

        def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
            """How many blocks each row has, and which they are, first in each row; `(1, 1, rows)` and `(1, 1, rows, columns)`."""
            indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
            return blocks.sum(-1, dtype=torch.int32)[None, None].to(device), indices[None, None].to(device)

        return BlockMask.from_kv_blocks(
            *ordered(partial), *ordered(full), BLOCK_SIZE=block, mask_mod=self.mask_mod(device), seq_lengths=self.shape
        )

    @staticmethod
    def from_rule(rule: str, *, frames: tuple[int, int], tokens: tuple[int, int], prefix: int = 0) -> KronMask:
        """The mask that `rule` (of another mask, perhaps of other sizes) describes for these sizes."""
        return _read_rule(rule, frames, tokens, prefix)

    # ---- display ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        def size(query: int, key: int) -> str:
            return f"{query}" if query == key else f"({query}, {key})"

        frames, tokens = size(self.query_frames, self.key_frames), size(self.query_tokens, self.key_tokens)
        prefix = f", prefix={self.prefix}" if self.prefix else ""
        return f"KronMask(frames={frames}, tokens={tokens}{prefix}, density={self.density:.3f})"

    def __repr__(self) -> str:
        from kronmask import viz

        return f"{self!s}\n{viz.text(self)}"

    def _repr_svg_(self) -> str:
        from kronmask import viz

        return viz.svg(self)

    def plot(self, ax: Any = None, *, tokens: bool = False) -> Any:
        """Draw the frame table (or, with `tokens=True`, the dense mask) with matplotlib; returns the axes."""
        from kronmask import viz

        return viz.plot(self, ax, tokens=tokens)


def kron(time: Any, space: Any, *, prefix: int = 0) -> KronMask:
    """The Kronecker product: query `(t, n)` sees key `(t', n')` iff `time[t, t'] and space[n, n']`.

    Args:
        time: boolean `(Tq, Tk)`; a tensor, or anything `torch.as_tensor` takes.
        space: boolean `(Nq, Nk)`.
        prefix: tokens before the frames that see and are seen by all.
    """
    factors = []
    for name, value in (("time", time), ("space", space)):
        tensor = torch.as_tensor(value)
        if tensor.dtype != torch.bool or tensor.ndim != 2 or not tensor.numel():
            raise ValueError(
                f"{name} must be a boolean matrix, not {tensor.dtype} of shape {tuple(tensor.shape)}; True = may attend"
            )
        factors.append(tensor.cpu())
    time, space = factors
    return KronMask(time.int() * FIRST_PATTERN, [space], tokens=tuple(space.shape), prefix=prefix)


def eye(size: int) -> Tensor:
    """The boolean identity `(size, size)`: the same frame, or the same position."""
    return torch.eye(size, dtype=torch.bool)


def ones(rows: int, columns: int | None = None) -> Tensor:
    """The boolean all-ones `(rows, columns)`, square by default: any frame, or any position."""
    return torch.ones(rows, rows if columns is None else columns, dtype=torch.bool)


# ---- helpers --------------------------------------------------------------------------------------------------------


def _pair(value: int | tuple[int, int], name: str, minimum: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value, value)
    if len(pair) != 2 or any(isinstance(v, bool) or not hasattr(v, "__index__") or v < minimum for v in pair):
        raise ValueError(f"{name} must be an int of at least {minimum}, or a (query, key) pair of them, not {value!r}")
    return index(pair[0]), index(pair[1])


def _frames(selected: slice | Sequence[int], frames: int, name: str) -> Sequence[int]:
    """The numbers of the selected frames."""
    if isinstance(selected, slice):
        return range(frames)[selected]
    numbers = [index(number) for number in selected]
    if wrong := [number for number in numbers if not 0 <= number < frames]:
        raise ValueError(f"{name}={selected} selects frame {wrong[0]}, but the {name} frames are 0 to {frames - 1}")
    return numbers


def _canonical_factors(palette: Sequence[Any], query_tokens: int, key_tokens: int) -> list[bytes | int]:
    """Each pattern as bytes, or as the code that it equals."""
    factors: list[bytes | int] = []
    for number, pattern in enumerate(palette):
        tensor = torch.as_tensor(pattern)
        if tensor.dtype != torch.bool or tuple(tensor.shape) != (query_tokens, key_tokens):
            raise ValueError(
                f"palette[{number}] must be boolean ({query_tokens}, {key_tokens}), "
                f"not {tensor.dtype} {tuple(tensor.shape)}"
            )
        tensor = tensor.cpu().contiguous()
        if not tensor.any():
            factors.append(EMPTY)
        elif tensor.all():
            factors.append(FULL)
        elif query_tokens == key_tokens and torch.equal(tensor, eye(query_tokens)):
            factors.append(IDENTITY)
        else:
            factors.append(bytes(tensor.view(torch.uint8).flatten().tolist()))
    return factors


@dataclass(frozen=True)
class _Segments:
    """Pieces of a sequence that lie in one frame and in one block; all `(pieces,)` int64."""

    frame: Tensor  # -1: prefix
    start: Tensor  # first token within the frame
    stop: Tensor
    block: Tensor


def _segments(length: int, prefix: int, tokens: int, block: int) -> _Segments:
    cuts = torch.cat(
        [torch.arange(0, length, block), torch.arange(prefix, length, tokens), torch.tensor([length])]
    ).unique()
    first, last = cuts[:-1], cuts[1:]
    frame = torch.where(first < prefix, -1, (first - prefix).div(tokens, rounding_mode="floor"))
    offset = torch.where(first < prefix, 0, prefix + frame * tokens)
    return _Segments(frame, first - offset, last - offset, first.div(block, rounding_mode="floor"))


# A rule is the mask as text: it crosses the operator's boundary, where an object cannot, and it is what a compiled or exported
# graph stores. "diagonals" says the code of each frame distance t' - t and holds for any number of frames, so a compiled model
# needs no new graph when the clip gets longer; "table" lists the codes.


def _write_rule(codes: tuple[tuple[int, ...], ...], palette: tuple[bytes, ...]) -> str:
    query_frames, key_frames = len(codes), len(codes[0])
    by_distance: dict[int, int] = {}
    toeplitz = all(
        by_distance.setdefault(k - q, codes[q][k]) == codes[q][k]
        for q in range(query_frames)
        for k in range(key_frames)
    )
    if toeplitz:
        distances = range(1 - query_frames, key_frames)
        runs = [
            (code, list(group)[-1] + 1) for code, group in itertools.groupby(distances, key=lambda d: by_distance[d])
        ]
        text = "diagonals:" + ",".join([f"{code}<{stop}" for code, stop in runs[:-1]] + [str(runs[-1][0])])
    else:
        flat = itertools.chain.from_iterable(codes)
        text = "table:" + ",".join(f"{code}x{len(list(group))}" for code, group in itertools.groupby(flat))
    return ";".join([text] + [base64.b64encode(zlib.compress(pattern)).decode() for pattern in palette])


_BOUND = re.compile(r"(\d{1,9})<(-?\d{1,9}),", re.ASCII)
_DIAGONALS = re.compile(r"diagonals:((?:\d{1,9}<-?\d{1,9},)*)(\d{1,9})", re.ASCII)
_RUN = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)
_TABLE = re.compile(r"table:(\d{1,9}x\d{1,9}(?:,\d{1,9}x\d{1,9})*)", re.ASCII)


@lru_cache(maxsize=256)  # a pack of 640 frames is a table of 3 MB
def _read_rule(rule: str, frames: tuple[int, int], tokens: tuple[int, int], prefix: int) -> KronMask:
    text, *patterns = rule.split(";")
    query_frames, key_frames = frames
    if match := _DIAGONALS.fullmatch(text):
        bounds = [(int(code), int(stop)) for code, stop in _BOUND.findall(match[1])]
        last = int(match[2])

        def at(distance: int) -> int:
            return next((code for code, stop in bounds if distance < stop), last)

        line = {d: at(d) for d in range(1 - query_frames, key_frames)}
        codes = [[line[k - q] for k in range(key_frames)] for q in range(query_frames)]
    elif match := _TABLE.fullmatch(text):
        runs = [(int(code), int(number)) for code, number in _RUN.findall(match[1])]
        pairs = sum(number for _, number in runs)
        if pairs != query_frames * key_frames:
            raise ValueError(
                f"the mask is a table of {pairs} pairs of frames and does not fit {query_frames} x {key_frames}"
            )
        flat = [code for code, number in runs for _ in range(number)]
        codes = [flat[q * key_frames : (q + 1) * key_frames] for q in range(query_frames)]
    else:
        raise ValueError(f"not the rule of a mask: {rule[:80]!r}")
    palette = [_read_pattern(pattern, tokens) for pattern in patterns]
    return KronMask(codes, palette, tokens=tokens, prefix=prefix)


def _read_pattern(text: str, tokens: tuple[int, int]) -> Tensor:
    """A pattern of a rule; text that is more than one, or would inflate to more, is refused before it does."""
    size = tokens[0] * tokens[1]
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"not a pattern of a mask: {text[:80]!r} ({error})") from None
    if len(raw) != size:
        many = f"more than {size}" if len(raw) > size else str(len(raw))
        raise ValueError(f"the mask has a pattern of {many} entries, which does not fit tokens={tokens}")
    if not inflate.eof or inflate.unused_data or raw.translate(None, b"\0\1"):
        raise ValueError(f"not a pattern of a mask: {text[:80]!r}")
    return torch.frombuffer(bytearray(raw), dtype=torch.bool).view(tokens)

"""From a mask to what a backend executes: rectangles of tokens, own positions, and explicit patterns.

The frame table is cut into squares that halve until each holds one code (a quadtree). For KMT and KMCT these are the rectangles
of the butterfly: at each level one half of the frames attends to its sibling, so log2(T) batched calls cover exactly the pairs
of different frames. Equal rectangles at equal distances are one batched call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from kronmask.mask import FIRST_PATTERN, FULL, IDENTITY, KronMask

__all__ = ["Plan", "Rectangles", "make_plan"]


@dataclass(frozen=True)
class Rectangles:
    """`count` equal rectangles of the mask, in tokens: the i-th has its corner at `(query + i * step, key + i * step)`."""

    query: int
    key: int
    query_rows: int
    key_rows: int
    count: int = 1
    step: int = 0
    first: bool = False  # nothing before it in the plan has reached these query rows


@dataclass(frozen=True)
class Plan:
    """The disjoint parts of a mask, in the order in which a backend merges them by log-sum-exp.

    Attributes:
        own: rectangles of which only the diagonal may attend (each query one key), where a query frame sees its own position in
            at most one frame.
        positions: `(Tq, Tk)` table of the frames in which each position sees itself, where there are several; else None.
        rectangles: all pairs may attend.
        patterns: for each explicit pattern its code and rectangles of one query frame by whole key frames.
        complete: each query row is written by a part that is the `first` to reach it.
    """

    own: tuple[Rectangles, ...]
    positions: tuple[tuple[bool, ...], ...] | None
    rectangles: tuple[Rectangles, ...]
    patterns: tuple[tuple[int, tuple[Rectangles, ...]], ...]
    complete: bool


@lru_cache(maxsize=1024)
def make_plan(mask: KronMask) -> Plan:
    """The plan of a mask; pure, and remembered for each mask."""
    table, prefix = mask.codes, mask.prefix
    length, key_length = mask.shape

    identity = [[k for k, code in enumerate(row) if code == IDENTITY] for row in table]
    own: tuple[Rectangles, ...] = ()
    positions = None
    if all(len(keys) <= 1 for keys in identity):
        cells = [(q, 1, keys[0], 1) for q, keys in enumerate(identity) if keys]
        own = tuple(_joined(group) for group in _batched(cells, mask))
    else:
        positions = tuple(tuple(code == IDENTITY for code in row) for row in table)

    whole = Rectangles(prefix, prefix, length - prefix, key_length - prefix)
    full = [_square(0, len(table), 0, len(table[0]), lambda q, k: table[q][k] == FULL)]
    rectangles = _batched([cell for cells in full for cell in cells], mask)
    if prefix:
        rectangles += [
            Rectangles(0, 0, prefix, key_length),
            replace(whole, key=0, key_rows=prefix),
        ]
    rectangles.sort(key=lambda r: -r.query_rows * r.key_rows * r.count)

    patterns = []
    for code in range(FIRST_PATTERN, FIRST_PATTERN + len(mask.palette)):
        runs = [(q, 1, start, stop - start) for q, row in enumerate(table) for start, stop in _runs(row, code)]
        patterns.append((code, tuple(_batched(runs, mask))))

    reached = [False] * length
    if positions is not None:
        reached[prefix:] = [True] * (length - prefix)
    own = tuple(_reach(part, reached) for part in own)
    rectangles = [_reach(part, reached) for part in rectangles]
    patterns = [(code, tuple(_reach(part, reached) for part in parts)) for code, parts in patterns]
    written = [False] * length
    if positions is not None:
        written[prefix:] = [True] * (length - prefix)
    for part in (*own, *rectangles, *(part for _, parts in patterns for part in parts)):
        if part.first:
            _reach(part, written)
    return Plan(own, positions, tuple(rectangles), tuple(patterns), all(written))


Cell = tuple[int, int, int, int]  # first query frame, query frames, first key frame, key frames


def _square(q: int, q_size: int, k: int, k_size: int, inside: Callable[[int, int], bool]) -> Iterator[Cell]:
    """The maximal squares of the quadtree over the frame table that lie wholly inside."""
    hits = sum(inside(i, j) for i in range(q, q + q_size) for j in range(k, k + k_size))
    if hits == q_size * k_size:
        yield q, q_size, k, k_size
    elif hits:
        for i, i_size in _halves(q, q_size):
            for j, j_size in _halves(k, k_size):
                yield from _square(i, i_size, j, j_size, inside)


def _halves(start: int, size: int) -> list[tuple[int, int]]:
    half = size // 2
    return [(start, half), (start + half, size - half)] if half else [(start, size)]


def _runs(row: tuple[int, ...], code: int) -> Iterator[tuple[int, int]]:
    """The maximal ranges `[start, stop)` of key frames with this code."""
    start = None
    for k, current in enumerate((*row, -1)):
        if current == code and start is None:
            start = k
        elif current != code and start is not None:
            yield start, k
            start = None


def _batched(cells: list[Cell], mask: KronMask) -> list[Rectangles]:
    """Cells of equal size and equal distance from the diagonal, at equal steps, as one batch; frames become tokens."""
    families: dict[tuple[int, int, int], list[int]] = {}
    for q, q_size, k, k_size in cells:
        families.setdefault((q_size, k_size, k - q), []).append(q)
    batches = []
    for (q_size, k_size, distance), starts in families.items():
        starts.sort()
        while starts:
            step = starts[1] - starts[0] if len(starts) > 1 else 0
            count = 1
            while count < len(starts) and starts[count] - starts[count - 1] == step:
                count += 1
            # a batch moves by whole frames, which are as many tokens in queries as in keys only if these are equal
            if mask.query_tokens != mask.key_tokens:
                count = 1
            batches.append(
                Rectangles(
                    query=mask.prefix + starts[0] * mask.query_tokens,
                    key=mask.prefix + (starts[0] + distance) * mask.key_tokens,
                    query_rows=q_size * mask.query_tokens,
                    key_rows=k_size * mask.key_tokens,
                    count=count,
                    step=step * mask.query_tokens if count > 1 else 0,
                )
            )
            starts = starts[count:]
    return batches


def _joined(batch: Rectangles) -> Rectangles:
    """Diagonal cells one behind the other are one longer diagonal."""
    if batch.step != batch.query_rows:
        return batch
    rows = batch.count * batch.query_rows
    return replace(batch, query_rows=rows, key_rows=rows, count=1, step=0)


def _reach(part: Rectangles, reached: list[bool]) -> Rectangles:
    """The part with `first` set if no earlier part reached any of its query rows; marks them as reached."""
    first = True
    for i in range(part.count):
        rows = slice(part.query + i * part.step, part.query + i * part.step + part.query_rows)
        first &= not any(reached[rows])
        reached[rows] = [True] * part.query_rows
    return replace(part, first=first)

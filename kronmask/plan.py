"""From a mask to what a backend executes: rectangles of tokens, own positions, and small masked blocks.

The frame table is cut recursively. A block-diagonal table (packed clips, own frames) falls apart between its blocks first, so
that clips one behind the other are cut as each is alone. A block of one code is a rectangle in which all pairs may attend. Any
other block is cut into halves both ways, or into its query frames with their runs of key frames, or, where that is cheaper,
computed whole under a mask of its own size. Halves make the butterfly for KMT and KMCT: at each level one half of the frames
attends to its sibling, so log2(T) batched calls cover exactly the pairs of different frames. Short frames are cheaper in fewer,
masked calls. Which cut is least work is estimated by `_call_cost`. Equal blocks at equal distances are one batched call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from kronmask.mask import EMPTY, FIRST_PATTERN, FULL, IDENTITY, KronMask

__all__ = ["Plan", "Rectangles", "make_plan"]

# The cost model, in units of one query by one key. It was fitted to torch's CPU flash kernel, float32, D = 64, in calls of 50 to
# 1576 rows by 50 to 1576 keys: a block of rows has a fixed cost that few keys do not pay for, and calls of fewer than 768 rows
# run in smaller blocks.
KEY_OVERHEAD = 55  # keys' worth of work that a row costs whatever it sees
ROW_OVERHEAD = 12  # rows' worth of work that a key costs
SMALL_BLOCKS = 1.06
MASKED = 1.12  # adding a bias
CALL = 1500  # pairs' worth of work, for each head, to start a call and merge its LSE
OWN = 50  # a row-wise product, and its merge
LARGEST_MASK = 2**20  # pairs of a masked block of several query frames
LARGEST_PATTERN = 2**22  # pairs of a masked block of one query frame; longer runs of frames are cut


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
        positions: where query frames see their own position in several frames, masks over frames alone (of one token a frame)
            under which each position sees itself; each with its first query frame and its first key frame.
        rectangles: all pairs may attend.
        masked: masks of blocks, and the rectangles that attend under them.
        complete: each query row is written by a part that is the `first` to reach it.
        is_one_call: one rectangle or masked block, of all queries and all keys, is all there is.
    """

    own: tuple[Rectangles, ...]
    positions: tuple[tuple[KronMask, int, int], ...]
    rectangles: tuple[Rectangles, ...]
    masked: tuple[tuple[KronMask, Rectangles], ...]
    complete: bool
    is_one_call: bool


Table = tuple[tuple[int, ...], ...]


class Cell(NamedTuple):
    """A block of the frame table that is one rectangle; `codes` are None where all pairs may attend.

    Of a cell of `positions` only the identities count, and they are computed as attention over frames.
    """

    query: int
    query_frames: int
    key: int
    key_frames: int
    codes: Table | None
    positions: bool = False


@lru_cache(maxsize=256)
def make_plan(mask: KronMask, masked_blocks: bool = True) -> Plan:
    """The plan of a mask; pure, and remembered for each mask.

    `masked_blocks` says whether blocks of several query frames may be computed under a mask; one query frame under an explicit
    pattern always is.
    """
    table, prefix = mask.codes, mask.prefix
    length, key_length = mask.shape

    whole = Rectangles(0, 0, length, key_length, first=True)
    if all(code == FULL for row in table for code in row):
        return Plan((), (), (whole,), (), complete=True, is_one_call=True)

    cost, cells = _Cutter(mask, masked_blocks).cut(table)
    if masked_blocks and length * key_length <= LARGEST_MASK:
        if prefix:
            cost += _call_cost(prefix, key_length) + _call_cost(length - prefix, prefix)
        if _call_cost(length, key_length, MASKED) < cost:
            return Plan((), (), (), ((mask, whole),), complete=True, is_one_call=True)

    positions = [
        (KronMask([[code == IDENTITY for code in row] for row in cell.codes], tokens=1), cell.query, cell.key)
        for cell in cells
        if cell.positions and cell.codes is not None
    ]
    cells = [cell for cell in cells if not cell.positions]
    own = _batched([cell for cell in cells if cell.codes == ((IDENTITY,),)], mask)
    full = _batched([cell for cell in cells if cell.codes is None], mask)
    if prefix:
        full.append(Rectangles(0, 0, prefix, key_length))
        full.append(Rectangles(prefix, 0, length - prefix, prefix))
    full.sort(key=lambda part: -part.query_rows * part.key_rows * part.count)
    under: dict[Table, list[Cell]] = {}
    for cell in cells:
        if cell.codes is not None and cell.codes != ((IDENTITY,),):
            under.setdefault(cell.codes, []).append(cell)
    palette = [mask.factor(FIRST_PATTERN + i) for i in range(len(mask.palette))]
    masked = []
    for codes, group in under.items():
        block = KronMask(codes, palette, tokens=(mask.query_tokens, mask.key_tokens))
        masked += [(block, part) for part in _batched(group, mask)]

    # by units that parts never cut: first the prefix, then the query frames
    reached = [not prefix] + [False] * mask.query_frames
    for over_frames, query, _ in positions:
        reached[query + 1 : query + 1 + over_frames.query_frames] = [True] * over_frames.query_frames
    written = reached.copy()

    def reach(part: Rectangles) -> Rectangles:
        spans = []
        for row in range(part.query, part.query + part.count * max(part.step, 1), max(part.step, 1)):
            first, last = ((q - prefix) // mask.query_tokens + 1 for q in (row, row + part.query_rows - 1))
            spans.append(slice(max(0, first), max(0, last) + 1))
        is_first = not any(any(reached[span]) for span in spans)
        for span in spans:
            units = [True] * (span.stop - span.start)
            reached[span] = units
            if is_first:
                written[span] = units
        return replace(part, first=is_first)

    own = [reach(_joined(part)) for part in own]
    full = [reach(part) for part in full]
    masked = [(block, reach(part)) for block, part in masked]
    calls = [*full, *(part for _, part in masked)]
    is_one_call = not own and not positions and [(c.query_rows, c.key_rows) for c in calls] == [mask.shape]
    return Plan(tuple(own), tuple(positions), tuple(full), tuple(masked), all(written), is_one_call)


def _call_cost(rows: int, keys: int, weight: float = 1.0) -> float:
    block = 1.0 if rows >= 768 else SMALL_BLOCKS
    return weight * block * (rows + ROW_OVERHEAD) * (keys + KEY_OVERHEAD) + CALL


class _Cutter:
    """Cuts a table into cells of least estimated cost; what equal tables cost is remembered."""

    def __init__(self, mask: KronMask, masked_blocks: bool) -> None:
        self.query_tokens, self.key_tokens, self.masked_blocks = mask.query_tokens, mask.key_tokens, masked_blocks
        self.known: dict[Table, tuple[float, list[Cell]]] = {}

    def cut(self, table: Table) -> tuple[float, list[Cell]]:
        if table not in self.known:
            self.known[table] = self._cut(table)
        return self.known[table]

    def _cut(self, table: Table) -> tuple[float, list[Cell]]:
        query_frames, key_frames = len(table), len(table[0])
        codes = set().union(*table)
        if codes == {EMPTY}:
            return 0.0, []
        if codes == {FULL}:
            return self._cell(0, query_frames, 0, key_frames, None)
        cut = _diagonal_cut(table)
        if cut is not None:
            q, k = cut
            first, second = tuple(row[:k] for row in table[:q]), tuple(row[k:] for row in table[q:])
            options = [self._joint([(first, 0, 0), (second, q, k)])]
        elif any(row.count(IDENTITY) > 1 for row in table):
            options = [self._over_frames(table)]
        elif query_frames == 1:
            return self._frame(table[0])
        else:
            options = [self._joint([((row,), q, 0) for q, row in enumerate(table)])]
            if key_frames > 1:
                rows, columns = _halves(query_frames), _halves(key_frames)
                parts = [(tuple(row[c:d] for row in table[a:b]), a, c) for a, b in rows for c, d in columns]
                options.append(self._joint(parts))
        if self.masked_blocks and query_frames * self.query_tokens * key_frames * self.key_tokens <= LARGEST_MASK:
            options.append(self._cell(0, query_frames, 0, key_frames, table))
        return min(options, key=lambda option: option[0])

    def _over_frames(self, table: Table) -> tuple[float, list[Cell]]:
        """The identities as attention of each position over frames, and the rest."""
        query_frames, key_frames = len(table), len(table[0])
        rest = tuple(tuple(EMPTY if code == IDENTITY else code for code in row) for row in table)
        cost, cells = self.cut(rest)
        cost += self.query_tokens * (_call_cost(query_frames, key_frames, MASKED) - CALL) + CALL
        return cost, [Cell(0, query_frames, 0, key_frames, table, positions=True), *cells]

    def _frame(self, row: tuple[int, ...]) -> tuple[float, list[Cell]]:
        """One query frame: each run of one code is a cell, and each identity."""
        longest = max(1, LARGEST_PATTERN // (self.query_tokens * self.key_tokens))
        total, cells = 0.0, list[Cell]()
        for code, start, stop in _runs(row):
            step = 1 if code == IDENTITY else stop - start if code == FULL else longest
            for k in range(start, stop, step) if code != EMPTY else ():
                size = min(step, stop - k)
                cost, cell = self._cell(0, 1, k, size, None if code == FULL else ((code,) * size,))
                total, cells = total + cost, cells + cell
        return total, cells

    def _joint(self, parts: list[tuple[Table, int, int]]) -> tuple[float, list[Cell]]:
        total, cells = 0.0, list[Cell]()
        for table, q, k in parts:
            cost, inner = self.cut(table)
            total += cost
            cells += [cell._replace(query=q + cell.query, key=k + cell.key) for cell in inner]
        return total, cells

    def _cell(self, q: int, q_size: int, k: int, k_size: int, codes: Table | None) -> tuple[float, list[Cell]]:
        rows, keys = q_size * self.query_tokens, k_size * self.key_tokens
        if codes == ((IDENTITY,),):
            cost = float(OWN * rows)
        else:
            cost = _call_cost(rows, keys, MASKED if codes else 1.0)
        return cost, [Cell(q, q_size, k, k_size, codes)]


def _diagonal_cut(table: Table) -> tuple[int, int] | None:
    """Where a block-diagonal table falls in two, `(query frame, key frame)`: no pair joins the sides, and both have pairs.

    Of several cuts, one on the diagonal of the table and nearest to the middle, as halves are; None if there is none.
    """
    rows, columns = len(table), len(table[0])
    starts = [next((k for k, code in enumerate(row) if code != EMPTY), columns) for row in table]
    stops = [
        next((k for k in range(columns, start, -1) if row[k - 1] != EMPTY), 0)
        for start, row in zip(starts, table, strict=True)
    ]
    reach = list(accumulate(stops, max))  # where the keys end that a query frame or one before it sees
    begin = list(accumulate(reversed(starts), min))[::-1]  # where those begin that it or one behind it sees
    cuts = [
        (q, min(max(q * columns // rows, low), high))
        for q, low, high in zip(range(1, rows), reach, begin[1:], strict=False)
        if 0 < low <= high < columns
    ]
    return min(cuts, key=lambda cut: (cut[0] * columns != cut[1] * rows, abs(2 * cut[0] - rows)), default=None)


def _halves(size: int) -> list[tuple[int, int]]:
    half = size // 2
    return [(0, half), (half, size)] if half else [(0, size)]


def _runs(row: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """The maximal runs of one code: code, start and stop."""
    start = 0
    for k in range(1, len(row) + 1):
        if k == len(row) or row[k] != row[start]:
            yield row[start], start, k
            start = k


def _batched(cells: list[Cell], mask: KronMask) -> list[Rectangles]:
    """Cells of equal size and equal distance from the diagonal, at equal steps, as one batch; frames become tokens."""
    families: dict[tuple[int, int, int], list[int]] = {}
    for cell in cells:
        families.setdefault((cell.query_frames, cell.key_frames, cell.key - cell.query), []).append(cell.query)
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

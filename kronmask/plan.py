"""From a mask to what a backend executes: rectangles of tokens, own positions, small masked blocks, and tiles of patterns.

The frame table is cut recursively. A block-diagonal table (packed clips, own frames) falls apart between its blocks first, so
that clips one behind the other are cut as each is alone. A block of one code is a rectangle in which all pairs may attend. Any
other block is cut into halves both ways, or into its query frames with their runs of key frames, or, where that is cheaper,
computed whole under a mask of its own size. Halves make the butterfly for KMT and KMCT: at each level one half of the frames
attends to its sibling, so log2(T) batched calls cover exactly the pairs of different frames. Short frames are cheaper in fewer,
masked calls. Which cut is least work is estimated by `_call_cost`. Equal blocks at equal distances are one batched call.

A block of one explicit pattern may instead be cut into tiles: runs of the pattern's rows, each with the keys that they see, of
all its frames together. Rows and keys of a tile lie apart, so a backend gathers them; of a sparse pattern little else is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, product
from typing import NamedTuple

from kronmask.mask import EMPTY, FIRST_PATTERN, FULL, IDENTITY, KronMask

__all__ = ["Gathered", "Plan", "Rectangles", "make_plan"]

# The cost model, in units of one query by one key. It was fitted to torch's CPU flash kernel, float32, D = 64, in calls of 50 to
# 1576 rows by 50 to 1576 keys: a block of rows has a fixed cost that few keys do not pay for, and calls of fewer than 768 rows
# run in smaller blocks.
KEY_OVERHEAD = 55  # keys' worth of work that a row costs whatever it sees
ROW_OVERHEAD = 12  # rows' worth of work that a key costs
SMALL_BLOCKS = 1.06
MASKED = 1.12  # adding a bias
CALL = 1500  # pairs' worth of work, for each head, to start a call and merge its LSE
GATHER = 25  # to gather a row, or to put it back
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
class Gathered:
    """Tiles of one mask whose tokens lie apart: in the i-th, the tokens `queries[i]` attend to the tokens `keys[i]` under `mask`.

    No query stands in two tiles, and each sees a key.
    """

    mask: KronMask
    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    first: bool  # nothing before it in the plan has reached these query rows


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
        gathered: tiles of explicit patterns.
        complete: each query row is written by a part that is the `first` to reach it.
        is_one_call: one rectangle or masked block, of all queries and all keys, is all there is.
    """

    own: tuple[Rectangles, ...]
    positions: tuple[tuple[KronMask, int, int], ...]
    rectangles: tuple[Rectangles, ...]
    masked: tuple[tuple[KronMask, Rectangles], ...]
    gathered: tuple[Gathered, ...]
    complete: bool
    is_one_call: bool


Table = tuple[tuple[int, ...], ...]


class Cell(NamedTuple):
    """A block of the frame table that is one rectangle; `codes` are None where all pairs may attend.

    Of a cell of `positions` only the identities count, and they are computed as attention over frames. A cell of one pattern may
    be computed `in_tiles`.
    """

    query: int
    query_frames: int
    key: int
    key_frames: int
    codes: Table | None
    positions: bool = False
    in_tiles: bool = False


class Tile(NamedTuple):
    """Positions of a frame that attend to positions of a frame, each in the order of the pattern."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]


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
        return Plan((), (), (whole,), (), (), complete=True, is_one_call=True)

    cutter = _Cutter(mask, masked_blocks)
    cost, cells = cutter.cut(table)
    if masked_blocks and length * key_length <= LARGEST_MASK:
        if prefix:
            cost += _call_cost(prefix, key_length) + _call_cost(length - prefix, prefix)
        if _call_cost(length, key_length, MASKED) < cost:
            return Plan((), (), (), ((mask, whole),), (), complete=True, is_one_call=True)

    positions = [
        (KronMask([[code == IDENTITY for code in row] for row in cell.codes], tokens=1), cell.query, cell.key)
        for cell in cells
        if cell.positions and cell.codes is not None
    ]
    tiled = [cell for cell in cells if cell.in_tiles]
    cells = [cell for cell in cells if not cell.positions and not cell.in_tiles]
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

    def reach(spans: list[slice], every_row: bool = True) -> bool:
        is_first = not any(any(reached[span]) for span in spans)
        for span in spans:
            units = [True] * (span.stop - span.start)
            reached[span] = units
            if is_first and every_row:
                written[span] = units
        return is_first

    def reached_by(part: Rectangles) -> Rectangles:
        spans = []
        for row in range(part.query, part.query + part.count * max(part.step, 1), max(part.step, 1)):
            first, last = ((q - prefix) // mask.query_tokens + 1 for q in (row, row + part.query_rows - 1))
            spans.append(slice(max(0, first), max(0, last) + 1))
        return replace(part, first=reach(spans))

    own = [reached_by(_joined(part)) for part in own]
    full = [reached_by(part) for part in full]
    masked = [(block, reached_by(part)) for block, part in masked]
    gathered = list[Gathered]()
    for block, tiles, corners in _tiled(tiled, mask, cutter):
        spans = [slice(q + 1, q + 1 + block.query_frames) for q, _ in corners]
        first = reach(spans, every_row=sum(len(tile.rows) for tile in tiles) == mask.query_tokens)
        gathered += _gathered(block, tiles, corners, mask.prefix, first)
    calls = [*full, *(part for _, part in masked)]
    is_one_call = not own and not positions and not gathered
    is_one_call = is_one_call and [(c.query_rows, c.key_rows) for c in calls] == [mask.shape]
    return Plan(tuple(own), tuple(positions), tuple(full), tuple(masked), tuple(gathered), all(written), is_one_call)


def _call_cost(rows: int, keys: int, weight: float = 1.0) -> float:
    block = 1.0 if rows >= 768 else SMALL_BLOCKS
    return weight * block * (rows + ROW_OVERHEAD) * (keys + KEY_OVERHEAD) + CALL


class _Cutter:
    """Cuts a table into cells of least estimated cost; what equal tables cost is remembered."""

    def __init__(self, mask: KronMask, masked_blocks: bool) -> None:
        self.query_tokens, self.key_tokens, self.masked_blocks = mask.query_tokens, mask.key_tokens, masked_blocks
        self.palette = mask.palette
        self.known: dict[Table, tuple[float, list[Cell]]] = {}
        self.known_tiles: dict[Table, tuple[float, list[Tile]]] = {}

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
            if len(codes) == 1 and min(codes) >= FIRST_PATTERN:
                options.append(self._in_tiles(table))
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
                options = [self._cell(0, 1, k, size, None if code == FULL else ((code,) * size,))]
                if code >= FIRST_PATTERN:
                    options.append(self._in_tiles(((code,) * size,), k))
                cost, cell = min(options, key=lambda option: option[0])
                total, cells = total + cost, cells + cell
        return total, cells

    def _in_tiles(self, table: Table, k: int = 0) -> tuple[float, list[Cell]]:
        return self.tiles(table)[0], [Cell(0, len(table), k, len(table[0]), table, in_tiles=True)]

    def tiles(self, table: Table) -> tuple[float, list[Tile]]:
        """The cheapest tiles of a table of one pattern, and what they cost; infinity if a mask would be too large."""
        if table not in self.known_tiles:
            pattern = self.palette[table[0][0] - FIRST_PATTERN]
            rows = [pattern[start : start + self.key_tokens] for start in range(0, len(pattern), self.key_tokens)]
            self.known_tiles[table] = _cheapest_tiles(rows, len(table), len(table[0]))
        return self.known_tiles[table]

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


def _cheapest_tiles(pattern: list[bytes], query_frames: int, key_frames: int) -> tuple[float, list[Tile]]:
    """The cut of a pattern's rows into runs of least cost, by dynamic programming; equal rows count as neighbours."""
    seen = [int.from_bytes(row, "little") for row in pattern]  # as sets of keys: a bit in each byte
    alike = {keys: row for row, keys in reversed(list(enumerate(seen)))}  # the first row that sees these keys
    order = sorted((row for row, keys in enumerate(seen) if keys), key=lambda row: (alike[seen[row]], row))
    best, begin = [0.0], [0]
    for stop in range(1, len(order) + 1):
        least, at, union, pairs = math.inf, stop - 1, 0, 0
        for start in range(stop - 1, -1, -1):
            union |= seen[order[start]]
            pairs += seen[order[start]].bit_count()
            rows, keys = stop - start, union.bit_count()
            cost = _tile_cost(rows * query_frames, keys * key_frames, is_masked=pairs < rows * keys)
            if cost >= least:
                break  # and so do all longer runs
            if best[start] + cost < least:
                least, at = best[start] + cost, start
        best.append(least)
        begin.append(at)
    tiles, stop = list[Tile](), len(order)
    while stop:
        run = tuple(sorted(order[begin[stop] : stop]))
        tiles.append(Tile(run, tuple(key for key in range(len(pattern[0])) if any(pattern[row][key] for row in run))))
        stop = begin[stop]
    return best[-1], tiles[::-1]


def _tile_cost(rows: int, keys: int, is_masked: bool) -> float:
    if is_masked and rows * keys > LARGEST_MASK:
        return math.inf
    return _call_cost(rows, keys, MASKED if is_masked else 1.0) + GATHER * (rows + keys)


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


def _tiled(
    cells: list[Cell], mask: KronMask, cutter: _Cutter
) -> Iterator[tuple[KronMask, list[Tile], list[tuple[int, int]]]]:
    """Cells of one pattern, of equal size and equal distance from the diagonal: their mask, its tiles, and their corners."""
    families: dict[tuple[Table, int], list[tuple[int, int]]] = {}
    for cell in cells:
        assert cell.codes is not None
        families.setdefault((cell.codes, cell.key - cell.query), []).append((cell.query, cell.key))
    for (codes, _), corners in families.items():
        pattern = mask.factor(codes[0][0])
        one = [[FIRST_PATTERN] * len(codes[0])] * len(codes)
        yield KronMask(one, [pattern], tokens=(mask.query_tokens, mask.key_tokens)), cutter.tiles(codes)[1], corners


def _gathered(
    block: KronMask, tiles: list[Tile], corners: list[tuple[int, int]], prefix: int, first: bool
) -> Iterator[Gathered]:
    """The tiles of blocks of one pattern at their corners `(query frame, key frame)`, those of one mask together."""
    alike: dict[KronMask, list[Tile]] = {}
    for tile in tiles:
        inner = block.factor(FIRST_PATTERN)[list(tile.rows)][:, list(tile.keys)]
        alike.setdefault(KronMask(block.codes, [inner], tokens=(len(tile.rows), len(tile.keys))), []).append(tile)

    def tokens(frame: int, frames: int, size: int, positions: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(prefix + t * size + position for t in range(frame, frame + frames) for position in positions)

    for inner_mask, group in alike.items():
        placed = list(product(corners, group))
        queries = [tokens(q, block.query_frames, block.query_tokens, tile.rows) for (q, _), tile in placed]
        keys = [tokens(k, block.key_frames, block.key_tokens, tile.keys) for (_, k), tile in placed]
        yield Gathered(inner_mask, tuple(queries), tuple(keys), first)


def _joined(batch: Rectangles) -> Rectangles:
    """Diagonal cells one behind the other are one longer diagonal."""
    if batch.step != batch.query_rows:
        return batch
    rows = batch.count * batch.query_rows
    return replace(batch, query_rows=rows, key_rows=rows, count=1, step=0)

"""From a mask to tiles: which query rows a program takes, and which keys it visits for them.

Rows of one query frame see the same keys, so a mask is one key list for each query frame (and one for the prefix): ranges of keys
that are seen whole, diagonals (own position in another or the own frame), and explicit patterns. The whole blocks of two ranges
are one loop over a *virtual row with a hole*: column `c` is key `start + c + hole * (c >= hole_at)`, where length and hole_at are
multiples of the block, so the hot loop masks nothing and knows of the hole by one scalar. What the blocks leave over of all
ranges is packed into blocks of gathered keys, one or two a tile. A tile whose rows have different key lists gathers what only
some of them see and tests it row by row against intervals; only explicit patterns read bits. Three layouts of rows compete, by a
static cost model:

- `token`: consecutive rows, whatever frames they lie in; rows with equal key lists are brought together first.
- `frame`: tiles never cross a frame; the last tile of each frame is partly empty.
- `packed`: whole tiles within frames, and the remainders of all frames share tiles.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kronmask.mask import FIRST_PATTERN, FULL, IDENTITY, KronMask

__all__ = [
    "KINDS",
    "Blocks",
    "KeyList",
    "Run",
    "Tile",
    "TileTables",
    "Tiling",
    "choose_tiling",
    "dense_visits",
    "key_lists",
    "make_tables",
    "make_tiling",
    "transposed",
]

KINDS = ("token", "frame", "packed")
Range = tuple[int, int]  # [start, stop) of key rows

# The cost model, in units of one query row by one key column of matrix product.
ROW_OVERHEAD = (
    6  # loading a key and value column costs as much as this many rows of products, so taller tiles are cheaper
)
TILE_OVERHEAD = 32  # columns' worth of work to load a tile's queries and store its output
TESTED_WEIGHT = 1.15  # of a column whose visibility is tested row by row
PATTERN_WEIGHT = 1.5  # of a column whose bits are read
DIAGONAL_COLUMNS = 4  # columns' worth of work of one row-wise product


@dataclass(frozen=True)
class Blocks:
    """Rows of a tile and columns of one step of its loop."""

    rows: int
    columns: int


@dataclass(frozen=True)
class KeyList:
    """What each query of a frame sees: disjoint, in ascending order, key rows of the sequence (prefix included).

    Attributes:
        ranges: `[start, stop)` of keys that are seen whole.
        diagonals: first key row of each frame in which a query sees its own position alone.
        patterns: `(palette index, first key row, columns)` of runs of frames seen through one explicit pattern.
    """

    ranges: tuple[Range, ...] = ()
    diagonals: tuple[int, ...] = ()
    patterns: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_simple(self) -> bool:
        """Whether a few integers say which keys a row sees, so that it may share a tile with other frames' rows."""
        return not self.patterns and len(self.ranges) <= 2

    @property
    def intervals(self) -> tuple[int, int, int, int]:
        """`(start, hole start, hole stop, stop)`: the ranges of a simple list as one range with a hole."""
        if not self.ranges:
            return (0, 0, 0, 0)
        (start, middle), (resume, stop) = self.ranges[0], self.ranges[-1]
        return (start, middle, resume, stop) if len(self.ranges) == 2 else (start, stop, stop, stop)


@dataclass(frozen=True)
class Run:
    """A loop over `length` columns, a multiple of the block; column `c` is key row `start + c + hole * (c >= hole_at)`."""

    start: int
    length: int
    hole_at: int
    hole: int


@dataclass(frozen=True)
class Tile:
    """Query rows that one program takes, and the keys that it visits.

    Attributes:
        rows: runs of rows of the sequence, `(first, count)`.
        runs: whole blocks of keys that all of its rows see.
        edges: ranges of the other keys that all of its rows see; gathered into blocks.
        tested: ranges of keys of which each row sees its own intervals; gathered into blocks.
        patterns: `(palette index, first key row, columns)` of what is read through an explicit pattern.
    """

    rows: tuple[Range, ...]
    runs: tuple[Run, ...]
    edges: tuple[Range, ...]
    tested: tuple[Range, ...]
    patterns: tuple[tuple[int, int, int], ...]

    def visits(self, columns: int) -> int:
        """Number of blocks of that many columns that are computed."""
        whole = sum(run.length for run in self.runs) // columns
        gathered = -(-_total(self.edges) // columns) - (-_total(self.tested) // columns)
        return whole + gathered + sum(-(-length // columns) for _, _, length in self.patterns)


@dataclass(frozen=True)
class Tiling:
    """All tiles of a mask, those with most work first (of a causal mask, the late frames)."""

    kind: str
    blocks: Blocks
    tiles: tuple[Tile, ...]

    @property
    def visits(self) -> int:
        """Number of (rows x columns) blocks that are computed."""
        return sum(tile.visits(self.blocks.columns) for tile in self.tiles)


def dense_visits(mask: KronMask, blocks: Blocks) -> int:
    """Blocks of a dense grid that starts at token 0: what attention without a mask visits."""
    rows, columns = mask.shape
    return -(-rows // blocks.rows) * -(-columns // blocks.columns)


@lru_cache(maxsize=256)
def key_lists(mask: KronMask) -> tuple[KeyList, ...]:
    """The key list of each query frame, and last, if there is a prefix, that of its tokens."""
    size, prefix = mask.key_tokens, mask.prefix
    lists = []
    for row in mask.codes:
        ranges: list[list[int]] = [[0, prefix]] if prefix else []
        diagonals: list[int] = []
        patterns = []
        frame, number = 0, len(row)
        while frame < number:
            code, first = row[frame], frame
            while frame < number and row[frame] == code:
                frame += 1
            start, stop = prefix + first * size, prefix + frame * size
            if code == FULL:
                if ranges and ranges[-1][1] == start:
                    ranges[-1][1] = stop
                else:
                    ranges.append([start, stop])
            elif code == IDENTITY:
                diagonals += range(start, stop, size)
            elif code >= FIRST_PATTERN:
                patterns.append((code - FIRST_PATTERN, start, stop - start))
        lists.append(KeyList(tuple((a, b) for a, b in ranges), tuple(diagonals), tuple(patterns)))
    if prefix:
        lists.append(KeyList(((0, mask.shape[1]),)))
    return tuple(lists)


@lru_cache(maxsize=256)
def transposed(mask: KronMask) -> KronMask:
    """The mask as keys see queries, remembered: what the gradients of keys and values walk."""
    return mask.T


# ---- layouts of rows ------------------------------------------------------------------------------------------------

Layout = list[tuple[tuple[Range, ...], tuple[int, ...]]]  # for each tile its runs of rows and its key lists


@lru_cache(maxsize=1024)
def _layout(mask: KronMask, rows: int, kind: str) -> Layout:
    """Tiles of at most `rows` rows. Rows share a tile if their key lists are equal, or simple."""
    lists = key_lists(mask)
    first_like: dict[tuple, int] = {}
    order = sorted(
        range(len(lists)), key=lambda i: first_like.setdefault((lists[i].ranges, lists[i].patterns), len(first_like))
    )
    spans = []  # (key list, first row, rows), in the order in which tiles are filled
    tiles: Layout = []
    for i in order:
        first, count = (
            (mask.prefix + i * mask.query_tokens, mask.query_tokens) if i < len(mask.codes) else (0, mask.prefix)
        )
        whole = count // rows * rows if kind == "packed" else 0
        tiles += [(((first + start, rows),), (i,)) for start in range(0, whole, rows)]
        if count > whole:
            spans.append((i, first + whole, count - whole))

    pending: list[tuple[int, int]] = []
    members: list[int] = []
    room = rows

    def close() -> None:
        nonlocal room
        if pending:
            tiles.append((tuple(pending), tuple(members)))
        pending.clear()
        members.clear()
        room = rows

    for i, first, count in spans:
        if members and (kind == "frame" or not _compatible(lists[members[-1]], lists[i])):
            close()
        while count:
            if room == rows and count >= rows:
                whole = count // rows * rows
                tiles += [(((first + start, rows),), (i,)) for start in range(0, whole, rows)]
                first, count = first + whole, count - whole
                continue
            taken = min(room, count)
            pending.append((first, taken))
            members.append(i)
            first, count, room = first + taken, count - taken, room - taken
            if not room:
                close()
    close()
    return tiles


def _compatible(a: KeyList, b: KeyList) -> bool:
    return (a.is_simple and b.is_simple) or (a.ranges, a.patterns) == (b.ranges, b.patterns)


# ---- keys of a tile -------------------------------------------------------------------------------------------------


def _keys(lists: Sequence[KeyList], columns: int) -> tuple:
    """The runs, edges, tested ranges and patterns of a tile with rows of these key lists."""
    if _is_pure(lists):
        blocks, edges = _split(lists[0].ranges, columns)
        return _holed(blocks), tuple(edges), (), lists[0].patterns
    common: Sequence[Range] = lists[0].ranges
    for other in lists[1:]:
        common = _intersection(common, other.ranges)
    blocks, _ = _split(common, columns)
    return _holed(blocks), (), tuple(_without(_union(lists), blocks)), ()


def _is_pure(lists: Sequence[KeyList]) -> bool:
    """Whether all rows of a tile see the same keys, diagonals apart (each row has its own)."""
    first = lists[0]
    return all(keys.ranges == first.ranges and keys.patterns == first.patterns for keys in lists[1:])


def _split(ranges: Iterable[Range], columns: int) -> tuple[list[Range], list[Range]]:
    """The whole blocks of each range, and what they leave over."""
    blocks, rest = [], []
    for start, stop in ranges:
        middle = start + (stop - start) // columns * columns
        if start < middle:
            blocks.append((start, middle))
        if middle < stop:
            rest.append((middle, stop))
    return blocks, rest


def _union(lists: Iterable[KeyList]) -> list[Range]:
    merged: list[Range] = []
    for start, stop in sorted(key_range for keys in lists for key_range in keys.ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _intersection(a: Sequence[Range], b: Sequence[Range]) -> list[Range]:
    spans = [(max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b]
    return sorted(span for span in spans if span[0] < span[1])


def _without(ranges: Sequence[Range], holes: Sequence[Range]) -> list[Range]:
    """What of the ranges is in none of the holes; both ascending, each hole within one range."""
    rest = []
    for start, stop in ranges:
        for first, last in holes:
            if start <= first < stop:
                if start < first:
                    rest.append((start, first))
                start = last
        if start < stop:
            rest.append((start, stop))
    return rest


def _holed(ranges: Sequence[Range]) -> tuple[Run, ...]:
    """Ranges of whole blocks, two at a time, as runs with a hole."""
    runs = []
    for i in range(0, len(ranges), 2):
        start, middle = ranges[i]
        resume, stop = ranges[i + 1] if i + 1 < len(ranges) else (middle, middle)
        runs.append(Run(start, middle - start + stop - resume, middle - start, resume - middle))
    return tuple(runs)


def _total(ranges: Iterable[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


# ---- choosing -------------------------------------------------------------------------------------------------------


def _cost(mask: KronMask, blocks: Blocks, kind: str, known: dict[tuple, float]) -> float:
    """Estimated work of a tiling, without building it; `known` holds that of tiles that other layouts have too."""
    every = key_lists(mask)
    total = 0.0
    for members, count in Counter(members for _, members in _layout(mask, blocks.rows, kind)).items():
        key = (members, blocks.columns)
        if key not in known:
            lists = [every[i] for i in members]
            weight = 1.0 if _is_pure(lists) else TESTED_WEIGHT
            ranges = _union(lists) if len(lists) > 1 else lists[0].ranges
            seen = weight * (-(-_total(ranges) // blocks.columns))
            seen += PATTERN_WEIGHT * sum(-(-length // blocks.columns) for _, _, length in lists[0].patterns)
            seen *= blocks.columns
            seen += DIAGONAL_COLUMNS * max(len(keys.diagonals) for keys in lists)
            known[key] = seen + TILE_OVERHEAD
        total += count * known[key]
    return total * (blocks.rows + ROW_OVERHEAD)


@lru_cache(maxsize=1024)
def choose_tiling(mask: KronMask, candidates: tuple[Blocks, ...]) -> tuple[str, Blocks]:
    """The layout and blocks of least estimated cost; the first of equals."""
    options = [(kind, blocks) for blocks in candidates for kind in KINDS]
    known: dict[tuple, float] = {}
    return min(options, key=lambda option: _cost(mask, option[1], option[0], known))


@lru_cache(maxsize=256)
def make_tiling(mask: KronMask, blocks: Blocks, kind: str) -> Tiling:
    """The tiles of a mask under one layout; they cover each query row once and each allowed pair once."""
    lists, layout = key_lists(mask), _layout(mask, blocks.rows, kind)
    keys = {members: _keys([lists[i] for i in members], blocks.columns) for members in {m for _, m in layout}}
    tiles = [Tile(rows, *keys[members]) for rows, members in layout]
    tiles.sort(key=lambda tile: -tile.visits(blocks.columns))
    return Tiling(kind, blocks, tuple(tiles))


# ---- tables for a kernel --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileTables:
    """A tiling as the small tables that a kernel reads; int32, on the device.

    Attributes:
        rows: `(tiles * BM)`, the row of the sequence, or -1.
        tiles: `(tiles * 7)`: where the tile's runs begin and end; where its blocks of gathered keys begin, those begin that are
            tested, and end; where its patterns begin and end.
        runs: `(runs * 4)`: start, length, hole_at, hole.
        keys: `(gathered blocks * BN)`, the key row, or -1.
        intervals: `(lists * 4)`: start, hole start, hole stop and stop of what the rows of a key list see.
        diagonals: `(lists * num_diagonals)`: first key row of each diagonal's frame, or -1.
        pattern_runs: `(pattern runs * 3)`: palette index, first key row, columns.
        patterns: `(palette, Nq, Nk)` uint8.
        tested, read_patterns: whether any tile needs that code.
    """

    blocks: Blocks
    num_tiles: int
    num_diagonals: int
    tested: bool
    read_patterns: bool
    rows: Tensor
    tiles: Tensor
    runs: Tensor
    keys: Tensor
    intervals: Tensor
    diagonals: Tensor
    pattern_runs: Tensor
    patterns: Tensor


@lru_cache(maxsize=256)
def make_tables(mask: KronMask, blocks: Blocks, kind: str, device: torch.device) -> TileTables:
    """The tables of a mask under one layout, made once for each device: O(L) ints and the explicit patterns, nothing else."""
    tiling = make_tiling(mask, blocks, kind)
    rows, tiles, runs, gathered, pattern_runs = (array("i") for _ in range(5))
    counting = _counting(max(mask.shape))
    gathered_at: dict[tuple[Range, ...], tuple[int, int]] = {}

    def gather(ranges: tuple[Range, ...]) -> tuple[int, int]:
        """The blocks of gathered keys, `[first, last)`, which tiles with equal keys share."""
        if ranges not in gathered_at:
            first = len(gathered) // blocks.columns
            for start, stop in ranges:
                gathered.extend(counting[start:stop])
            gathered.extend([-1] * (-len(gathered) % blocks.columns))
            gathered_at[ranges] = (first, len(gathered) // blocks.columns)
        return gathered_at[ranges]

    for tile in tiling.tiles:
        for first, count in tile.rows:
            rows.extend(counting[first : first + count])
        if missing := -len(rows) % blocks.rows:
            rows.extend([-1] * missing)
        run, pattern = len(runs) // 4, len(pattern_runs) // 3
        for r in tile.runs:
            runs.extend((r.start, r.length, r.hole_at, r.hole))
        for values in tile.patterns:
            pattern_runs.extend(values)
        first, last = gather(tile.edges or tile.tested)
        whole = first if tile.tested else last
        tiles.extend((run, run + len(tile.runs), first, whole, last, pattern, pattern + len(tile.patterns)))
    lists = key_lists(mask)
    number = max(len(keys.diagonals) for keys in lists)
    diagonals = array("i")
    for keys in lists:
        diagonals.extend(keys.diagonals)
        diagonals.extend([-1] * (number - len(keys.diagonals)))
    intervals = array("i", [bound for keys in lists for bound in keys.intervals])
    palette = [mask.factor(FIRST_PATTERN + i) for i in range(len(mask.palette))]
    patterns = torch.stack(palette).to(torch.uint8) if palette else torch.zeros(1, 1, 1, dtype=torch.uint8)

    def table(values: array) -> Tensor:
        if not values:  # a pointer to nothing is no argument
            return torch.zeros(1, dtype=torch.int32, device=device)
        return torch.frombuffer(values, dtype=torch.int32).clone().to(device)

    return TileTables(
        blocks=blocks,
        num_tiles=len(tiling.tiles),
        num_diagonals=number,
        tested=any(tile.tested for tile in tiling.tiles),
        read_patterns=any(tile.patterns for tile in tiling.tiles),
        rows=table(rows),
        tiles=table(tiles),
        runs=table(runs),
        keys=table(gathered),
        intervals=table(intervals),
        diagonals=table(diagonals),
        pattern_runs=table(pattern_runs),
        patterns=patterns.to(device),
    )


@lru_cache(maxsize=8)
def _counting(length: int) -> array:
    """0, 1, 2, ...: slices of it are copied much faster than ranges are."""
    return array("i", range(length))

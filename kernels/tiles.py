"""From a mask to tiles: which query rows a program takes, and which keys it visits for them.

Rows of one query frame see the same keys, so a mask is one key list for each query frame (and one for the prefix): ranges of keys
that are seen whole, diagonals (own position in another or the own frame), and explicit patterns. The whole blocks of two ranges
are one loop over a *virtual row with a hole*: column `c` is key `start + c + hole * (c >= hole_at)`, where length and hole_at are
multiples of the block, so the hot loop masks nothing and knows of the hole by one scalar. What the blocks leave over of all
ranges is packed into blocks of gathered keys, one or two a tile: edges, which all rows of the tile see. A tile whose rows see
different keys gathers those that only some of them see and tests them, by one bit for each class of rows that see the same. Rows
that see through an explicit pattern go by position, equal positions of all frames with equal key lists together, so that a tile
visits the few keys that its positions see. For the other rows three layouts compete, by a static cost model:

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
from itertools import pairwise

import torch
from torch import Tensor

from kronmask.device_cache import kept_on_device
from kronmask.mask import FIRST_PATTERN, FULL, IDENTITY, KronMask

__all__ = [
    "KINDS",
    "LOOPS",
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
LOOPS = (
    "whole",
    "edges",
    "partial",
    "tested",
)  # the loops over blocks of keys, in the order in which every kernel has them
Range = tuple[int, int]  # [start, stop) of key rows
RowClass = tuple[int, int]  # a key list, and the position in the frame where it has patterns, else -1
Partial = tuple[int, int, tuple[int, ...]]  # first key row, keys, and the key lists that see them

# The cost model, in units of one query row by one key column of matrix product: what the report of the compiled kernels says on
# average of the three passes on sm_80 and sm_90, head dimension 64; a test compares them.
# loading a key and value column costs as much as this many rows of products, so taller tiles are cheaper
ROW_OVERHEAD = 6
TILE_OVERHEAD = 85  # columns' worth of work to load a tile's queries and store its output
WEIGHTS = (1.0, 1.02, 1.01, 1.06)  # of a column in each of LOOPS
DIAGONAL_COLUMNS = 65  # columns' worth of work of one row-wise product


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
        classes: the class of each run of rows; rows of one class see the same keys, diagonals apart.
        runs: whole blocks of keys that all of its rows see.
        edges: ranges of the other keys that all of its rows see; gathered into blocks.
        partial: whole blocks of keys of which each row sees all or nothing, `(first, keys, the key lists that see them)`.
        tested: ranges of the other keys that some of its rows see; gathered into blocks.
    """

    rows: tuple[Range, ...]
    classes: tuple[RowClass, ...]
    runs: tuple[Run, ...]
    edges: tuple[Range, ...]
    partial: tuple[Partial, ...]
    tested: tuple[Range, ...]

    @property
    def keys(self) -> Keys:
        return self.runs, self.edges, self.partial, self.tested

    def visits_by_loop(self, columns: int) -> dict[str, int]:
        """Number of blocks of that many columns that each loop of a kernel computes."""
        return dict(zip(LOOPS, _visits(self.keys, columns), strict=True))

    def visits(self, columns: int) -> int:
        """Number of blocks of that many columns that are computed."""
        return sum(_visits(self.keys, columns))


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

Layout = list[tuple[tuple[Range, ...], tuple[RowClass, ...]]]  # for each tile its runs of rows and their classes


@lru_cache(maxsize=1024)
def _layout(mask: KronMask, rows: int, kind: str) -> Layout:
    """Tiles of at most `rows` rows."""
    lists, size = key_lists(mask), mask.query_tokens
    alike: dict[tuple, list[int]] = {}
    for i, keys in enumerate(lists):
        alike.setdefault((keys.ranges, keys.patterns), []).append(i)
    spans = []  # (class, first row, rows), in the order in which tiles are filled
    tiles: Layout = []
    for members in alike.values():
        if lists[members[0]].patterns:
            tiles += _by_position(mask, members, rows)
            continue
        for i in members:
            first, count = (mask.prefix + i * size, size) if i < len(mask.codes) else (0, mask.prefix)
            whole = count // rows * rows if kind == "packed" else 0
            tiles += [(((first + start, rows),), ((members[0], -1),)) for start in range(0, whole, rows)]
            if count > whole:
                spans.append(((members[0], -1), first + whole, count - whole))

    pending: list[Range] = []
    classes: list[RowClass] = []
    room = rows

    def close() -> None:
        nonlocal room
        if pending:
            tiles.append((tuple(pending), tuple(classes)))
        pending.clear()
        classes.clear()
        room = rows

    for row_class, first, count in spans:
        if kind == "frame" and classes and classes[-1] != row_class:
            close()
        while count:
            if room == rows and count >= rows:
                whole = count // rows * rows
                tiles += [(((first + start, rows),), (row_class,)) for start in range(0, whole, rows)]
                first, count = first + whole, count - whole
                continue
            taken = min(room, count)
            pending.append((first, taken))
            classes.append(row_class)
            first, count, room = first + taken, count - taken, room - taken
            if not room:
                close()
    close()
    return tiles


def _by_position(mask: KronMask, members: Sequence[int], rows: int) -> Layout:
    """Tiles of the rows of frames with equal key lists that have patterns: position 0 of all these frames, position 1, ..."""
    every = [
        (mask.prefix + i * mask.query_tokens + position, position)
        for position in range(mask.query_tokens)
        for i in members
    ]
    pieces = (every[start : start + rows] for start in range(0, len(every), rows))
    return [
        (tuple((row, 1) for row, _ in piece), tuple((members[0], position) for _, position in piece))
        for piece in pieces
    ]


# ---- keys of a tile -------------------------------------------------------------------------------------------------

Keys = tuple[
    tuple[Run, ...], tuple[Range, ...], tuple[Partial, ...], tuple[Range, ...]
]  # of a tile, in the order of LOOPS


def _keys(mask: KronMask, classes: Sequence[RowClass], columns: int) -> Keys:
    """What a tile visits whose rows are of these classes."""
    every = key_lists(mask)
    members = list(dict.fromkeys(i for i, _ in classes))
    if len(members) == 1 and not every[members[0]].patterns:
        blocks, edges = _split(every[members[0]].ranges, columns)
        return _holed(blocks), tuple(edges), (), ()
    common, partial, rest = [], [], []
    for start, stop, seen_by in _pieces({i: every[i].ranges for i in members}):
        middle = start + (stop - start) // columns * columns
        if len(seen_by) == len(members):
            common.append((start, middle))
        elif start < middle:
            partial.append((start, middle - start, seen_by))
        rest.append((middle, stop))
    if every[members[0]].patterns:  # then there is one list
        seen = torch.stack([_seen(mask, row_class) for row_class in dict.fromkeys(classes)]).any(0)
        for start, stop in common:
            seen[start:stop] = False
        rest = _ranges(seen)
    runs = _holed([piece for piece in common if piece[0] < piece[1]])
    left = tuple(piece for piece in rest if piece[0] < piece[1])
    return (runs, left, (), ()) if len(set(classes)) == 1 else (runs, (), tuple(partial), left)


def _pieces(lists: dict[int, tuple[Range, ...]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """The keys that any of the lists has, cut wherever one of them begins or ends: `(start, stop, the lists that have it)`."""
    bounds: dict[int, tuple[set[int], set[int]]] = {}  # which lists begin and end at a key
    for i, ranges in lists.items():
        for start, stop in ranges:
            bounds.setdefault(start, (set(), set()))[0].add(i)
            bounds.setdefault(stop, (set(), set()))[1].add(i)
    pieces: list[tuple[int, int, tuple[int, ...]]] = []
    inside: set[int] = set()
    cuts = sorted(bounds)
    for start, stop in pairwise(cuts):
        begin, end = bounds[start]
        inside = (inside - end) | begin
        if inside:
            pieces.append((start, stop, tuple(sorted(inside))))
    return pieces


def _seen(mask: KronMask, row_class: RowClass) -> Tensor:
    """Which keys the rows of a class see, diagonals apart; boolean `(Lk)`."""
    number, position = row_class
    keys = key_lists(mask)[number]
    seen = torch.zeros(mask.shape[1], dtype=torch.bool)
    for start, stop in keys.ranges:
        seen[start:stop] = True
    for pattern, start, length in keys.patterns:
        row = _factor(mask, FIRST_PATTERN + pattern)[position]
        seen[start : start + length] = row.repeat(length // mask.key_tokens)
    return seen


@lru_cache(maxsize=64)
def _factor(mask: KronMask, code: int) -> Tensor:
    return mask.factor(code)


def _ranges(seen: Tensor) -> list[Range]:
    """Where a boolean vector is true."""
    steps = torch.nn.functional.pad(seen.int(), (1, 1)).diff()
    return list(zip((steps == 1).nonzero()[:, 0].tolist(), (steps == -1).nonzero()[:, 0].tolist(), strict=True))


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


def _holed(ranges: Sequence[Range]) -> tuple[Run, ...]:
    """Ranges of whole blocks, two at a time, as runs with a hole."""
    runs = []
    for i in range(0, len(ranges), 2):
        start, middle = ranges[i]
        resume, stop = ranges[i + 1] if i + 1 < len(ranges) else (middle, middle)
        runs.append(Run(start, middle - start + stop - resume, middle - start, resume - middle))
    return tuple(runs)


def _total(ranges: Iterable[Range]) -> int:
    return sum([stop - start for start, stop in ranges])


# ---- choosing -------------------------------------------------------------------------------------------------------


def _visits(keys: Keys, columns: int) -> list[int]:
    """Numbers of blocks that each of LOOPS computes."""
    runs, edges, partial, tested = keys
    whole, some = sum([run.length for run in runs]), sum([length for _, length, _ in partial])
    return [-(-number // columns) for number in (whole, _total(edges), some, _total(tested))]


def _cost(mask: KronMask, blocks: Blocks, kind: str, known: dict[tuple, float]) -> float:
    """Estimated work of a tiling, without building it; `known` holds that of tiles that other layouts have too."""
    overhead = TILE_OVERHEAD + DIAGONAL_COLUMNS * max([len(keys.diagonals) for keys in key_lists(mask)])
    total = 0.0
    for classes, count in Counter([classes for _, classes in _layout(mask, blocks.rows, kind)]).items():
        key = (classes, blocks.columns)
        if key not in known:
            visits = _visits(_keys(mask, classes, blocks.columns), blocks.columns)
            known[key] = blocks.columns * sum([w * n for w, n in zip(WEIGHTS, visits, strict=True)])
        total += count * (known[key] + overhead)
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
    layout = _layout(mask, blocks.rows, kind)
    keys = {classes: _keys(mask, classes, blocks.columns) for classes in {classes for _, classes in layout}}
    tiles = [Tile(rows, classes, *keys[classes]) for rows, classes in layout]
    tiles.sort(key=lambda tile: -tile.visits(blocks.columns))
    return Tiling(kind, blocks, tuple(tiles))


# ---- tables for a kernel --------------------------------------------------------------------------------------------

ABSENT = -(1 << 30)  # farther behind than any row is


@dataclass(frozen=True)
class TileTables:
    """The tilings of one or several masks as the small tables that a kernel reads; int32, on the device.

    Attributes:
        rows: `(tiles * BM)`, the row of the sequence, or -1.
        lists: `(tiles * BM)`, the row's key list, of those of all masks.
        classes: `(tiles * BM)`, the row's class in its tile.
        tiles: `(tiles * 10)`: where the tile's runs of whole blocks begin and end, where its partial ones begin; the block at
            which its edges begin, and how many keys they are; where its partial runs end; where its tested blocks begin and end;
            where their bits begin, and how many classes the tile has; the tile's mask, which is its group of heads.
        runs: `(runs * 4)`: start, length, hole_at, hole; of a partial one start, length and where its bits begin: a word for each
            class of the tile, which is 1 if its rows see the run, and 0 if not.
        keys: `(gathered blocks * BN)`, the key row; what fills up a block repeats the last one.
        bits: for each tested block, each 32 of its columns and each class of its tile one word: bit `c` says whether rows of
            that class see column `c`.
        diagonals: `(lists * num_diagonals)`: how far behind a row its own position in each diagonal's frame lies, or ABSENT.
        tested: whether any tile has partial or tested blocks.
    """

    blocks: Blocks
    num_tiles: int
    num_diagonals: int
    tested: bool
    rows: Tensor
    lists: Tensor
    classes: Tensor
    tiles: Tensor
    runs: Tensor
    keys: Tensor
    bits: Tensor
    diagonals: Tensor


@kept_on_device(maxsize=256)
def make_tables(masks: tuple[KronMask, ...], blocks: Blocks, kind: str, device: torch.device) -> TileTables:
    """The tables of a mask, or of one for each group of heads, made once for each device.

    They are O(L) ints and the bits of what is tested. Several masks have as many query tokens and one prefix. `kind` is the
    layout of a mask alone; several have the best of each.
    """
    kinds = [kind] if len(masks) == 1 else [choose_tiling(mask, (blocks,))[0] for mask in masks]
    tiles_of = [make_tiling(mask, blocks, layout).tiles for mask, layout in zip(masks, kinds, strict=True)]
    every = [(group, tile) for group, tiles in enumerate(tiles_of) for tile in tiles]
    if len(masks) > 1:
        every.sort(key=lambda pair: -pair[1].visits(blocks.columns))
    rows, row_lists, row_classes, tiles, runs, gathered, bits = (array("i") for _ in range(7))
    counting = _counting(max(masks[0].shape))
    gathered_at: dict[tuple[Range, ...], tuple[int, int]] = {}
    bits_at: dict[bytes, int] = {}
    words_at: dict[tuple, int] = {}

    def gather(ranges: tuple[Range, ...]) -> tuple[int, int]:
        """The blocks of gathered keys, `[first, last)`, which tiles with equal keys share."""
        if ranges not in gathered_at:
            first = len(gathered) // blocks.columns
            for start, stop in ranges:
                gathered.extend(counting[start:stop])
            gathered.extend(gathered[-1:] * (-len(gathered) % blocks.columns))
            gathered_at[ranges] = (first, len(gathered) // blocks.columns)
        return gathered_at[ranges]

    def place(content: bytes) -> int:
        """Where words stand among the bits; equal ones stand there once."""
        first = bits_at.setdefault(content, len(bits))
        if first == len(bits):
            bits.frombytes(content)
        return first

    number = max([len(keys.diagonals) for mask in masks for keys in key_lists(mask)])
    diagonals = array("i")
    first_list = []  # of each mask
    for mask in masks:
        first_list.append(len(diagonals) // max(number, 1))
        for i, keys in enumerate(key_lists(mask)):
            first = mask.prefix + i * mask.query_tokens
            diagonals.extend([start - first for start in keys.diagonals] + [ABSENT] * (number - len(keys.diagonals)))
    for group, tile in every:
        for first, count in tile.rows:
            rows.extend(counting[first : first + count])
        rows.extend([-1] * (-len(rows) % blocks.rows))
        classes = tuple(dict.fromkeys(tile.classes))
        if len(classes) > 1:
            for (_, count), row_class in zip(tile.rows, tile.classes, strict=True):
                row_classes.extend([classes.index(row_class)] * count)
        row_classes.extend([0] * (len(rows) - len(row_classes)))
        row_lists.extend([first_list[group]] * blocks.rows)
        run = len(runs) // 4
        for r in tile.runs:
            runs.extend((r.start, r.length, r.hole_at, r.hole))
        for start, length, seen_by in tile.partial:
            words = array("i", [i in seen_by for i, _ in classes])
            runs.extend((start, length, place(words.tobytes()), 0))
        first_edge, _ = gather(tile.edges)
        first, last = gather(tile.tested)
        if tile.tested and (group, classes, tile.tested) not in words_at:
            words_at[group, classes, tile.tested] = place(_bits(masks[group], classes, tile.tested, blocks.columns))
        word = words_at.get((group, classes, tile.tested), 0)
        partial, end = run + len(tile.runs), len(runs) // 4
        tiles.extend((run, partial, first_edge, _total(tile.edges), end, first, last, word, len(classes), group))

    def table(values: array) -> Tensor:
        if not values:  # a pointer to nothing is no argument
            return torch.zeros(1, dtype=torch.int32, device=device)
        return torch.frombuffer(values, dtype=torch.int32).clone().to(device)

    of_rows = table(rows)
    in_frames = of_rows.clamp(min=0) - masks[0].prefix
    of_mask = in_frames.div(masks[0].query_tokens, rounding_mode="floor").where(in_frames >= 0, masks[0].query_frames)
    return TileTables(
        blocks=blocks,
        num_tiles=len(every),
        num_diagonals=number,
        tested=any(tile.partial or tile.tested for _, tile in every),
        rows=of_rows,
        lists=(table(row_lists) + of_mask).int(),
        classes=table(row_classes),
        tiles=table(tiles),
        runs=table(runs),
        keys=table(gathered),
        bits=table(bits),
        diagonals=table(diagonals),
    )


def _bits(mask: KronMask, classes: Sequence[RowClass], ranges: Sequence[Range], columns: int) -> bytes:
    """The words of a tile's tested blocks: `(blocks, words of a block, classes)` int32."""
    seen = torch.stack([_seen(mask, row_class) for row_class in classes])
    seen = torch.cat([seen[:, start:stop] for start, stop in ranges], 1)
    seen = torch.nn.functional.pad(seen, (0, -seen.shape[1] % columns)).unflatten(1, (-1, columns))
    seen = torch.nn.functional.pad(seen, (0, -columns % 32)).unflatten(2, (-1, 32))  # (classes, blocks, words, 32)
    values = (seen * (1 << torch.arange(32))).sum(-1) - (seen[..., 31].long() << 32)
    return values.int().permute(1, 2, 0).numpy().tobytes()


@lru_cache(maxsize=8)
def _counting(length: int) -> array:
    """0, 1, 2, ...: slices of it are copied much faster than ranges are."""
    return array("i", range(length))

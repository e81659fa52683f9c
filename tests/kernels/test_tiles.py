"""Tiles cover each query row once and each allowed pair once, and visit little more than the mask's area."""

import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import kron_masks

from kronmask import masks
from kronmask.kernels import tiles
from kronmask.kernels.tiles import KINDS, Blocks, choose_tiling, dense_visits, key_lists, make_tables, make_tiling

BLOCKS = (Blocks(128, 64), Blocks(64, 64))


def coverage(mask, blocks, kind):
    """How often each pair is computed, `(Lq, Lk)`, and how often each row is taken, `(Lq)`, as the tables say it."""
    tables = make_tables((mask,), blocks, kind, torch.device("cpu"))
    visits, taken = torch.zeros(mask.shape, dtype=torch.int), torch.zeros(mask.shape[0], dtype=torch.int)
    columns, words = torch.arange(blocks.columns), -(-blocks.columns // 32)
    for tile in range(tables.num_tiles):
        members = slice(tile * blocks.rows, (tile + 1) * blocks.rows)
        exists = tables.rows[members] >= 0
        rows, classes = tables.rows[members][exists], tables.classes[members][exists]
        taken[rows] += 1
        run, partial, edge, edges, end, first, last, word, num_classes, group = tables.tiles[tile * 10 :][:10].tolist()
        for start, length, hole_at, hole in tables.runs[run * 4 : partial * 4].view(-1, 4).tolist():
            assert length % blocks.columns == hole_at % blocks.columns == 0
            column = torch.arange(length)
            visits[rows[:, None], start + column + hole * (column >= hole_at)] += 1
        for key in tables.keys[edge * blocks.columns :][:edges].tolist():
            visits[rows, key] += 1
        for start, length, of_classes, _ in tables.runs[partial * 4 : end * 4].view(-1, 4).tolist():
            assert length % blocks.columns == 0
            visits[rows, start : start + length] += tables.bits[of_classes + classes][:, None]
        assert group == 0
        assert not (edges and last > first)
        for block in range(first, last):
            of_block = tables.bits[word:][: words * num_classes].unflatten(0, (words, num_classes))
            seen = of_block[columns // 32][:, classes] >> (columns % 32)[:, None] & 1  # (columns, rows)
            keys = tables.keys[block * blocks.columns :][: blocks.columns]
            visits.index_put_((rows[None], keys[:, None]), seen.int(), accumulate=True)
            word += words * num_classes
        lists = tables.lists[members][exists]
        for i in range(tables.num_diagonals):
            partners = rows + tables.diagonals[lists * tables.num_diagonals + i]
            visits[rows[partners >= 0], partners[partners >= 0]] += 1
    return visits, taken


@given(
    mask=kron_masks(frames=(1, 6), tokens=(1, 7)),
    kind=st.sampled_from(KINDS),
    blocks=st.builds(Blocks, st.integers(1, 9), st.sampled_from([1, 3, 8, 16, 32, 40, 64])),
)
def test_each_allowed_pair_is_computed_once_and_no_other(mask, kind, blocks):
    visits, taken = coverage(mask, blocks, kind)
    assert torch.equal(visits, mask.dense().int())
    assert (taken == 1).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", masks.NAMES)
def test_named_masks_are_covered(name, kind, prefix, transposed):
    mask = masks.NAMES[name](6, 10, prefix=prefix)
    mask = mask.T if transposed else mask
    visits, taken = coverage(mask, Blocks(8, 8), kind)
    assert torch.equal(visits, mask.dense().int())
    assert (taken == 1).all()


def relative_visits(mask, candidates=BLOCKS):
    kind, blocks = choose_tiling(mask, candidates)
    return make_tiling(mask, blocks, kind).visits / dense_visits(mask, blocks)


@pytest.mark.parametrize(
    ("name", "tokens", "most"),
    [
        ("kmt", 197, 0.92),
        ("kmct", 197, 0.48),
        ("kmt", 257, 0.89),
        ("kmct", 257, 0.47),
        ("kmt", 50, 1.0),
        ("kmct", 50, 1.0),
        ("kmt", 256, 0.875),
        ("kmct", 256, 0.438),
        ("joint", 197, 1.0),
        ("spatial", 197, 0.35),
        ("temporal", 197, 0.0),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_visited_relative_to_a_dense_grid(name, tokens, most, transposed):
    mask = masks.NAMES[name](8, tokens)
    assert relative_visits(mask.T if transposed else mask) <= most


@pytest.mark.parametrize("name", sorted(set(masks.NAMES) - {"neighborhood"}))  # which reads bits in frame-aligned tiles
@pytest.mark.parametrize("frames", [1, 2, 8, 16, 32])
def test_no_mask_of_50_tokens_visits_more_than_the_dense_grid(name, frames):
    assert relative_visits(masks.NAMES[name](frames, 50)) <= 1.0


def test_the_numbers_of_the_design():
    """Counts by hand: frame-aligned tiles alone are slower than dense, packing the remainders is what helps."""
    tall, square = BLOCKS

    def visits(name, tokens, blocks, kind):
        mask = masks.NAMES[name](8, tokens)
        return make_tiling(mask, blocks, kind).visits / dense_visits(mask, blocks)

    assert visits("kmt", 197, tall, "packed") == pytest.approx(0.917, abs=5e-4)
    assert visits("kmt", 197, square, "packed") == pytest.approx(0.885, abs=5e-4)
    assert visits("kmct", 197, square, "packed") == pytest.approx(0.472, abs=5e-4)
    assert visits("kmt", 197, tall, "frame") > 1.08
    assert visits("kmt", 257, tall, "frame") > 1.2


@pytest.mark.parametrize(("blocks", "most"), [(Blocks(32, 32), 2.5), (Blocks(64, 64), 4.0)])
def test_a_neighborhood_visits_a_few_times_its_area(blocks, most):
    """Rows of 8 frames share 64 rows of a tile at 8 positions, which see 3 rows of 10 patches: 3.7 x what each of them sees."""
    mask = masks.neighborhood(8, 196)
    assert mask.density < 0.05
    visits = make_tiling(mask, blocks, choose_tiling(mask, (blocks,))[0]).visits
    assert visits * blocks.rows * blocks.columns <= most * mask.num_pairs


def test_few_blocks_are_tested_pair_by_pair():
    """Of KMT at 128 rows a tile, those with what the whole blocks of the frames that share a tile leave over."""
    tiling = make_tiling(masks.kmt(8, 197), Blocks(128, 64), "packed")
    visits = Counter()
    for tile in tiling.tiles:
        visits.update(tile.visits_by_loop(64))
    assert sum(visits.values()) == tiling.visits
    assert visits["tested"] <= 0.04 * tiling.visits
    assert visits["edges"] <= 0.05 * tiling.visits


def test_tables_of_several_masks_are_those_of_each_with_its_group():
    several, blocks = (masks.kmct(3, 10), masks.axial(3, 10), masks.kmt(3, 10)), Blocks(8, 8)
    together = make_tables(several, blocks, "packed", torch.device("cpu"))
    groups = together.tiles.view(-1, 10)[:, 9]
    for group, mask in enumerate(several):
        alone = make_tables((mask,), blocks, choose_tiling(mask, (blocks,))[0], torch.device("cpu"))
        of_group = together.rows.view(-1, 8)[groups == group]
        assert torch.equal(of_group, alone.rows.view(-1, 8))
        shifts = [
            tables.diagonals.view(-1, tables.num_diagonals)[tables.lists.view(-1, 8)[tiles]]
            for tables, tiles in ((together, groups == group), (alone, slice(None)))
        ]
        assert torch.equal(shifts[0][..., : alone.num_diagonals], shifts[1])
        assert (shifts[0][..., alone.num_diagonals :] == tiles.ABSENT).all()


def test_late_frames_come_first():
    tiling = make_tiling(masks.kmct(8, 256), Blocks(128, 64), "packed")
    assert [tile.rows[0][0] // 256 for tile in tiling.tiles] == sorted([*range(8), *range(8)], reverse=True)


def test_the_transpose_of_kmct_is_one_range_for_each_frame():
    lists = key_lists(masks.kmct(8, 197).T)
    assert [keys.ranges for keys in lists[:-1]] == [(((t + 1) * 197, 8 * 197),) for t in range(7)]
    assert all(len(keys.diagonals) == 1 for keys in lists)


def test_kmt_is_one_run_with_a_hole():
    tiling = make_tiling(masks.kmt(8, 256), Blocks(128, 64), "packed")
    assert all(len(tile.runs) == 1 and not tile.tested and not tile.edges for tile in tiling.tiles)
    assert sum(tile.runs[0].hole == 256 for tile in tiling.tiles) == 2 * 6  # the first and last frame have one range


@pytest.mark.parametrize("name", ["kmt", "kmct", "temporal", "axial"])
def test_tables_are_made_in_milliseconds_and_kept(name):
    """Counted in calls of functions, which a busy machine does not change: 18,000 took 7 ms of a core."""
    for function in (key_lists, tiles._layout, tiles._counting, choose_tiling, make_tiling, make_tables):
        function.cache_clear()
    mask, calls = masks.NAMES[name](32, 577), 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        kind, blocks = choose_tiling(mask, BLOCKS)
        tables = make_tables((mask,), blocks, kind, torch.device("cpu"))
    finally:
        sys.setprofile(None)
    assert calls < 20_000
    assert make_tables((masks.NAMES[name](32, 577),), blocks, kind, torch.device("cpu")) is tables
    assert max(t.numel() for t in (tables.rows, tables.runs, tables.keys, tables.diagonals)) <= 2 * 32 * 577

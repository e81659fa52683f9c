"""A plan covers each allowed pair exactly once."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import kron_masks

from kronmask import KronMask, eye, kron, masks, ones
from kronmask.plan import Plan, make_plan


def coverage(mask, plan: Plan) -> torch.Tensor:
    """How often each pair is visited, `(Lq, Lk)`."""
    visits = torch.zeros(mask.shape, dtype=torch.int)

    def blocks(part):
        for i in range(part.count):
            q, k = part.query + i * part.step, part.key + i * part.step
            yield visits[q : q + part.query_rows, k : k + part.key_rows]

    for part in plan.own:
        for block in blocks(part):
            block += torch.eye(part.query_rows, dtype=torch.int)
    for part in plan.rectangles:
        for block in blocks(part):
            block += 1
    for inner, part in plan.masked:
        for block in blocks(part):
            block += inner.dense()
    for part in plan.gathered:
        for queries, keys in zip(part.queries, part.keys, strict=True):
            q, k = torch.meshgrid(torch.tensor(queries), torch.tensor(keys), indexing="ij")
            visits.index_put_((q, k), part.mask.dense().int(), accumulate=True)
    for frames, query, key in plan.positions:
        block = torch.kron(frames.dense().int(), torch.eye(mask.query_tokens, dtype=torch.int))
        q, k = mask.prefix + query * mask.query_tokens, mask.prefix + key * mask.key_tokens
        visits[q : q + len(block), k : k + block.shape[1]] += block
    return visits


@given(kron_masks(frames=(1, 7)))
def test_each_allowed_pair_is_visited_once_and_no_other(mask):
    assert torch.equal(coverage(mask, make_plan(mask)), mask.dense().int())


def neighborhood_with_blind_rows() -> KronMask:
    pattern = masks.neighborhood(1, 196).dense()
    pattern[20:40] = False
    return kron(ones(8), pattern)


@example(masks.kmct(8, 196) | masks.neighborhood(8, 196))  # tiles beside rectangles
@example(neighborhood_with_blind_rows())  # tiles that leave rows out
@given(kron_masks(frames=(1, 7)))
def test_only_the_first_part_to_reach_a_row_may_overwrite_it(mask):
    plan = make_plan(mask)
    reached = torch.zeros(mask.shape[0], dtype=torch.bool)
    written = torch.zeros(mask.shape[0], dtype=torch.bool)
    for frames, query, _ in plan.positions:
        first, last = (mask.prefix + q * mask.query_tokens for q in (query, query + frames.query_frames))
        reached[first:last] = written[first:last] = True
    for part in (*plan.own, *plan.rectangles, *(p for _, p in plan.masked)):
        rows = torch.cat([torch.arange(part.query_rows) + part.query + i * part.step for i in range(part.count)])
        if part.first:
            assert not reached[rows].any()
            written[rows] = True
        reached[rows] = True
    for part in plan.gathered:  # whose tiles share no query
        rows = torch.tensor(part.queries).flatten()
        assert not (part.first and (reached[rows].any() or written[rows].any()))
        written[rows] |= part.first
    assert plan.complete == bool(written.all())


@pytest.mark.parametrize("frames", [2, 4, 8, 16, 32])
def test_kmt_and_kmct_take_calls_in_the_logarithm_of_the_frames(frames):
    levels = frames.bit_length() - 1
    assert len(make_plan(masks.kmt(frames, 577)).rectangles) == 2 * levels
    assert len(make_plan(masks.kmct(frames, 577)).rectangles) == levels
    assert len(make_plan(masks.joint(frames, 577)).rectangles) == 1
    assert len(make_plan(masks.spatial(frames, 577)).rectangles) == 1


@pytest.mark.parametrize("name", ["kmt", "kmct", "causal", "frame_window", "dilated"])
@pytest.mark.parametrize(("frames", "tokens"), [(8, 197), (16, 257), (7, 197), (128, 257)])
def test_long_frames_are_never_computed_under_a_mask(name, frames, tokens):
    mask = masks.NAMES[name](frames, tokens)
    plan = make_plan(mask)
    assert not plan.masked
    pairs = sum(part.query_rows * part.key_rows * part.count for part in plan.rectangles)
    assert pairs + sum(part.query_rows for part in plan.own) == mask.num_pairs


def test_short_frames_are_computed_in_one_masked_call():
    plan = make_plan(masks.kmt(8, 50))
    assert plan.is_one_call
    assert plan.masked[0][0] == masks.kmt(8, 50)
    assert len(make_plan(masks.kmct(8, 50)).rectangles) == 7  # half of it is empty: cheaper frame by frame


@given(kron_masks(frames=(1, 7)))
def test_without_masked_blocks_only_patterns_of_one_query_frame_are_masked(mask):
    plan = make_plan(mask, masked_blocks=False)
    assert torch.equal(coverage(mask, plan), mask.dense().int())
    assert all(block.query_frames == 1 and len(block.palette) == 1 for block, _ in plan.masked)


@pytest.mark.parametrize("frames", [8, 64])
def test_masks_of_blocks_stay_small(frames):
    for name in ("kmt", "neighborhood"):
        for block, _ in make_plan(masks.NAMES[name](frames, 197)).masked:
            assert block.shape[0] * block.shape[1] <= (2**20 if block.query_frames > 1 else 2**22)


def test_the_own_tokens_of_all_frames_are_one_part():
    (own,) = make_plan(masks.kmt(8, 197)).own
    assert (own.query, own.key, own.query_rows, own.count, own.first) == (0, 0, 1576, 1, True)


@st.composite
def sparse_patterns(draw):
    """Masks of a few frames, of which most pairs stand under one sparse pattern: the kind that is cut into tiles."""
    tokens = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    width, share, seed = draw(st.integers(1, 12)), draw(st.floats(0.0, 0.3)), draw(st.integers(0, 2**31))
    random = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < share
    row, column = torch.arange(tokens[0])[:, None], torch.arange(tokens[1])
    near = ((row // width - column // width).abs() <= 1) & ((row % width - column % width).abs() <= 1)
    pattern = draw(st.sampled_from([random, near, near & ~random, row % width == column % width]))
    table = draw(st.lists(st.lists(st.sampled_from([0, 1, 3, 3, 3]), min_size=4, max_size=4), min_size=1, max_size=5))
    return KronMask(table, [pattern], tokens=tokens, prefix=draw(st.integers(0, 2)))


@pytest.mark.parametrize("masked_blocks", [True, False])
@given(mask=sparse_patterns())
def test_tiles_of_a_pattern_visit_each_allowed_pair_once_and_no_query_twice(masked_blocks, mask):
    plan = make_plan(mask, masked_blocks)
    assert torch.equal(coverage(mask, plan), mask.dense().int())
    for part in plan.gathered:
        queries = [token for tile in part.queries for token in tile]
        assert len(queries) == len(set(queries))
        assert part.mask.dense().any(1).all()
        assert all(len(set(tile)) == len(tile) for tile in part.keys)


def visited(plan: Plan) -> int:
    """Pairs that a backend computes."""
    rectangles = [*plan.rectangles, *(part for _, part in plan.masked)]
    area = sum(part.query_rows * part.key_rows * part.count for part in rectangles)
    return area + sum(len(q) * len(k) for part in plan.gathered for q, k in zip(part.queries, part.keys, strict=True))


@pytest.mark.parametrize(
    ("frames", "tokens", "radius"), [(8, 196, 1), (8, 197, 1), (8, 196, 2), (16, 196, 1), (8, 577, 1)]
)
def test_a_neighborhood_is_visited_within_two_and_a_half_times_its_area(frames, tokens, radius):
    mask = masks.neighborhood(frames, tokens, radius=radius)
    plan = make_plan(mask)
    assert visited(plan) <= 2.5 * mask.num_pairs
    assert len(plan.gathered) <= 10  # equal tiles are one call


def test_windows_are_tiles_without_a_mask_whatever_the_order_of_their_tokens():
    window = torch.arange(14).repeat_interleave(14) // 7 * 2 + torch.arange(14).repeat(14) // 7
    (part,) = make_plan(kron(ones(8), window[:, None] == window)).gathered
    assert part.mask.density == 1
    assert [len(tile) for tile in part.queries] == [8 * 49] * 4
    assert part.queries == part.keys


def test_frames_of_one_pattern_that_are_apart_are_tiles_of_one_call():
    (*plans,) = (make_plan(masks.neighborhood(frames, 196) & masks.spatial(frames, 196)) for frames in (1, 6))
    assert [len(part.queries) * 6 for part in plans[0].gathered] == [len(part.queries) for part in plans[1].gathered]


def test_a_dense_pattern_is_computed_whole():
    pattern = torch.rand(196, 196, generator=torch.Generator().manual_seed(0)) < 0.5
    assert not make_plan(kron(eye(4), pattern)).gathered

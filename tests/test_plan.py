"""A plan covers each allowed pair exactly once."""

import pytest
import torch
from hypothesis import given
from strategies import kron_masks

from kronmask import masks
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
    for frames, query, key in plan.positions:
        block = torch.kron(frames.dense().int(), torch.eye(mask.query_tokens, dtype=torch.int))
        q, k = mask.prefix + query * mask.query_tokens, mask.prefix + key * mask.key_tokens
        visits[q : q + len(block), k : k + block.shape[1]] += block
    return visits


@given(kron_masks(frames=(1, 7)))
def test_each_allowed_pair_is_visited_once_and_no_other(mask):
    assert torch.equal(coverage(mask, make_plan(mask)), mask.dense().int())


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

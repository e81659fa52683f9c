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
    for code, parts in plan.patterns:
        for part in parts:
            for block in blocks(part):
                block += mask.factor(code).repeat(1, part.key_rows // mask.key_tokens)
    if plan.positions is not None:
        table = torch.tensor(plan.positions).int()
        visits[mask.prefix :, mask.prefix :] += torch.kron(table, torch.eye(mask.query_tokens, dtype=torch.int))
    return visits


@given(kron_masks(frames=(1, 7)))
def test_each_allowed_pair_is_visited_once_and_no_other(mask):
    assert torch.equal(coverage(mask, make_plan(mask)), mask.dense().int())


@given(kron_masks(frames=(1, 7)))
def test_only_the_first_part_to_reach_a_row_may_overwrite_it(mask):
    plan = make_plan(mask)
    reached = torch.zeros(mask.shape[0], dtype=torch.bool)
    written = torch.zeros(mask.shape[0], dtype=torch.bool)
    if plan.positions is not None:
        reached[mask.prefix :] = written[mask.prefix :] = True
    for part in (*plan.own, *plan.rectangles, *(p for _, parts in plan.patterns for p in parts)):
        rows = torch.cat([torch.arange(part.query_rows) + part.query + i * part.step for i in range(part.count)])
        if part.first:
            assert not reached[rows].any()
            written[rows] = True
        reached[rows] = True
    assert plan.complete == bool(written.all())


@pytest.mark.parametrize("frames", [2, 4, 8, 16, 32])
def test_kmt_and_kmct_take_calls_in_the_logarithm_of_the_frames(frames):
    levels = frames.bit_length() - 1
    assert len(make_plan(masks.kmt(frames, 197)).rectangles) == 2 * levels
    assert len(make_plan(masks.kmct(frames, 197)).rectangles) == levels
    assert len(make_plan(masks.joint(frames, 197)).rectangles) == 1
    assert len(make_plan(masks.spatial(frames, 197)).rectangles) == 1


def test_the_own_tokens_of_all_frames_are_one_part():
    (own,) = make_plan(masks.kmt(8, 50)).own
    assert (own.query, own.key, own.query_rows, own.count, own.first) == (0, 0, 400, 1, True)

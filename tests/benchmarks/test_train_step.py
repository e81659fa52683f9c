"""The benchmark of a training step: its ways compute the same, and what the stored result says."""

import json
from pathlib import Path

import pytest
from train_step import CUT, FROZEN_ONCE, FROZEN_WHOLE, SHARED, WHOLE, Step, _parse, count

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "train_step.json"


@pytest.fixture(scope="module")
def step():
    return Step(_parse(["--quick", "--classes", "4", "--depth", "1", "--clips", "1"]), ranks=1, rank=0)


def test_all_ways_have_the_same_losses_and_gradients(step):
    losses = {way: [step(way, seed) for seed in range(2)] for way in (WHOLE, CUT, FROZEN_WHOLE, FROZEN_ONCE)}
    assert losses[WHOLE][0] != losses[WHOLE][1]  # other prompts
    for way in losses:
        assert losses[way] == pytest.approx(losses[WHOLE], abs=1e-5)
    assert step.gradient_difference(CUT, WHOLE) < 1e-4
    assert step.gradient_difference(FROZEN_ONCE, FROZEN_WHOLE) < 1e-4


def test_the_share_of_the_texts_falls(step):
    whole, cut, frozen, once = (step.text_share(way) for way in (WHOLE, CUT, FROZEN_WHOLE, FROZEN_ONCE))
    assert 0 == once < cut < whole < 1
    assert frozen > 0


def test_a_stored_step_costs_less_and_is_the_same():
    stored = json.loads(STORED.read_text())
    rows = {(row["way"], row["processes"]): row for row in stored["rows"]}
    assert rows.keys() == {(way, 1) for way in (WHOLE, CUT, FROZEN_WHOLE, FROZEN_ONCE)} | {
        (way, 2) for way in (WHOLE, CUT, SHARED)
    }
    for row in rows.values():
        assert row["loss_difference"] < 1e-5
        assert row["gradient_difference"] < 1e-4
        assert row["over_whole"] == 1 or row["over_whole"] < 0.7
    assert rows[SHARED, 2]["text_share"] < rows[CUT, 2]["text_share"] < rows[WHOLE, 2]["text_share"]
    shares = {row["model"]: row["text_share_whole"] for row in stored["counted"]}
    assert shares == pytest.approx({"ViT-B-32": 0.94, "ViT-B-16": 0.79, "ViT-L-14": 0.64}, abs=0.02)


def test_the_share_is_counted_for_any_model_of_open_clip():
    (row,) = count({"ViT-S-32": 224}, frames=2, clips=1)
    assert row["texts"] == 2000
    assert row["text_share_whole"] > row["text_share_cut"] > row["text_share_cut and shared"] > 0.5

"""The accuracy benchmark compares equals: its models differ in their masks alone, and what it measures is written down."""

import csv
import json
from pathlib import Path

import accuracy
import pytest
import torch
from claver.data.motions import MotionDataset

from kronmask import KronMask

SIX = ("spatial", "temporal", "divided", "joint", "kmt", "kmct")
CONTROLS = ("kmt, no embedding", "spatial, no embedding")


@pytest.fixture(scope="module")
def models():
    nowhere = MotionDataset(Path(), Path(), Path(), Path())
    found = {}
    for name in accuracy.VARIANTS:
        torch.manual_seed(0)
        found[name] = accuracy.variant_model(name, accuracy.variant_config(name, Path(), nowhere, seed=0, epochs=1))
    return found


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_variants_are_the_six_attentions_and_two_controls():
    assert tuple(accuracy.VARIANTS) == SIX + CONTROLS


def test_the_six_models_start_from_the_same_parameters(models):
    first = models["spatial"].state_dict()
    for name in SIX[1:]:
        other = models[name].state_dict()
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first), name


def test_the_controls_lack_nothing_but_the_temporal_embedding(models):
    embedding = models["kmt"].clip.visual.temporal_encoder.embedding.weight.numel()
    assert {size(models[name]) for name in CONTROLS} == {size(models["kmt"]) - embedding}


def test_each_block_has_the_mask_of_its_name(models):
    frames, tokens = 3, 5
    t, n = torch.arange(frames * tokens) // tokens, torch.arange(frames * tokens) % tokens
    same_frame, same_position, earlier = t[:, None] == t, n[:, None] == n, t[:, None] > t
    dense = {
        "spatial": same_frame,
        "temporal": same_position,
        "joint": torch.ones_like(same_frame),
        "kmt": ~same_frame | same_position,
        "kmct": earlier | (same_frame & same_position),
    }
    expected = {name: [mask, mask] for name, mask in dense.items()}
    expected["divided"] = [dense["temporal"], dense["spatial"]]
    expected |= {name: expected[name.partition(",")[0]] for name in CONTROLS}
    for name, model in models.items():
        rules = [block.attn.mask(frames, tokens) for block in model.clip.visual.temporal_encoder.blocks]
        masks = [KronMask.from_rule(rule, frames=(frames,) * 2, tokens=(tokens,) * 2).dense() for rule in rules]
        assert len(masks) == 2
        assert all(torch.equal(mask, right) for mask, right in zip(masks, expected[name], strict=True)), name


@pytest.mark.parametrize("name", SIX + CONTROLS)
def test_only_the_controls_are_blind_to_the_order_of_frames(models, name):
    video = torch.randn(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forwards, backwards = models[name].encode_video(video), models[name].encode_video(video.flip(1))
    difference = (forwards - backwards).abs().max()
    assert difference < 1e-5 if name in CONTROLS else difference > 1e-3


def test_flops_follow_the_allowed_pairs(models):
    flops = {name: accuracy.count_flops(model) for name, model in models.items()}
    order = ["temporal", "divided", "spatial", "kmct", "kmt", "joint"]
    assert sorted(SIX, key=flops.__getitem__) == order
    assert flops["kmt, no embedding"] == flops["kmt"]
    pairs = 8 * 17 * 16  # those within frames but for the token itself, which joint attention has and KMT lacks
    assert flops["joint"] - flops["kmt"] == 2 * pairs * 2 * 2 * 96  # blocks, multiply and add, two products, channels


def test_a_benchmark_writes_its_results_and_a_failed_run_is_a_row_with_its_error(tmp_path, capsys):
    sizes = ["--epochs", "1", "--num-train", "32", "--num-test", "8", "--workers", "1"]
    places = ["--out", str(tmp_path / "out"), "--name", "tiny", "--folder", str(tmp_path / "runs")]
    wrong_seed = -1  # which no random generator of the clips takes
    rows = accuracy.main(["--attentions", "kmct", "divided", "--seeds", "0", str(wrong_seed), *sizes, *places])
    assert [(row["attention"], row["seed"]) for row in rows] == [
        ("kmct", 0), ("divided", 0), ("kmct", wrong_seed), ("divided", wrong_seed)
    ]  # fmt: skip
    for row in rows[:2]:
        columns = "top1 top5 steps seconds parameters temporal_parameters gflops note"
        assert set(columns.split()) < row.keys()
        assert "error" not in row
        assert row["steps"] == 1
        assert 0 <= row["top1"] <= row["top5"] <= 1
    for row in rows[2:]:
        assert "ValueError" in row["error"]
        assert "top1" not in row

    stored = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert stored["rows"] == rows
    assert [item["attention"] for item in stored["summary"]] == ["kmct", "divided"]
    assert stored["settings"] == {"epochs": 1, "num_train": 32, "num_test": 8, "workers": 1}
    assert {"command", "date", "machine", "versions"} < stored.keys()
    with (tmp_path / "out" / "tiny.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert (tmp_path / "out" / "tiny.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "failed: kmct, seed -1" in printed
    assert not list(tmp_path.rglob("*.pt"))


def test_the_summary_is_of_the_finished_runs():
    done = {
        "top5": 1.0,
        "seconds": 2.0,
        "steps": 1,
        "parameters": 1,
        "temporal_parameters": 1,
        "gflops": 1.0,
        "note": "",
    }
    rows = [{"attention": "kmt", "seed": seed, "top1": top1, **done} for seed, top1 in enumerate((0.5, 0.6, 0.7))]
    rows += [{"attention": "kmt", "seed": 3, "error": "broken"}, {"attention": "joint", "seed": 0, "top1": 0.4, **done}]
    kmt, joint = accuracy.summarize(rows)
    assert (kmt["runs"], kmt["top1_min"], kmt["top1_max"]) == (3, 0.5, 0.7)
    assert (kmt["top1_mean"], kmt["top1_std"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert joint["top1_std"] is None


def test_a_quick_run_writes_elsewhere_and_yields_to_what_is_given():
    quick = accuracy._options(["--quick", "--epochs", "5"])
    assert (quick.epochs, quick.seeds) == (5, [0])
    assert Path("runs") in quick.out.parents
    assert accuracy._options([]).out == Path(accuracy.__file__).parent / "results"

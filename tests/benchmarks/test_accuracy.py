"""The accuracy benchmark compares equals: its models differ in their masks alone, and what it measures is written down."""

import csv
import json
from concurrent.futures import Future
from pathlib import Path

import accuracy
import pytest
import torch
from claver.data.motions import MotionDataset

from kronmask import KronMask

SIX = ("spatial", "temporal", "divided", "joint", "kmt", "kmct")
BLIND = ("spatial, no embedding", "kmt, no embedding")  # to the order of frames
OTHERS = ("kmct, no embedding", "kmct, rotary", "kmct, 1 layer", "kmct, 4 layers", "kmct, interleave", "joint, replace")


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


def test_the_variants_are_the_masks_and_what_time_depth_and_placement_do():
    assert set(accuracy.VARIANTS) == {*SIX, *BLIND, *OTHERS}
    assert accuracy.MASKS == SIX


def test_the_six_models_start_from_the_same_parameters(models):
    first = models["spatial"].state_dict()
    for name in SIX[1:]:
        other = models[name].state_dict()
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first), name


def test_without_the_embedding_nothing_else_is_missing(models):
    embedding = models["kmt"].clip.visual.temporal_encoder.embedding.weight.numel()
    for name in (*BLIND, "kmct, no embedding", "kmct, rotary"):
        assert size(models[name]) == size(models["kmt"]) - embedding


def test_layers_and_placements_are_those_of_their_names(models):
    sizes = {name: size(model) for name, model in models.items()}
    block = sizes["kmct"] - sizes["kmct, 1 layer"]
    assert block > 0
    assert sizes["kmct, 4 layers"] == sizes["kmct"] + 2 * block
    # an attention without the rest of a block before each image block; and nothing but the embedding
    assert sizes["joint, replace"] < sizes["kmct, interleave"] < sizes["kmct"]
    assert sizes["joint, replace"] == sizes["kmct"] - 2 * block


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
    for name, model in models.items():
        if accuracy.VARIANTS[name].placement != "append":
            continue
        blocks = model.clip.visual.temporal_encoder.blocks
        expected = (
            [dense[name.partition(",")[0]]] * len(blocks)
            if name != "divided"
            else [dense["temporal"], dense["spatial"]]
        )
        rules = [block.attn.mask(frames, tokens) for block in blocks]
        masks = [KronMask.from_rule(rule, frames=(frames,) * 2, tokens=(tokens,) * 2).dense() for rule in rules]
        assert all(torch.equal(mask, right) for mask, right in zip(masks, expected, strict=True)), name


@pytest.mark.parametrize("name", SIX + BLIND + OTHERS)
def test_only_two_are_blind_to_the_order_of_frames(models, name):
    video = torch.randn(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forwards, backwards = models[name].encode_video(video), models[name].encode_video(video.flip(1))
    difference = (forwards - backwards).abs().max()
    assert difference < 1e-5 if name in BLIND else difference > 1e-3


def test_flops_follow_the_allowed_pairs(models):
    flops = {name: accuracy.count_flops(model) for name, model in models.items()}
    order = ["temporal", "divided", "spatial", "kmct", "kmt", "joint"]
    assert sorted(SIX, key=flops.__getitem__) == order
    assert flops["kmt, no embedding"] == flops["kmt"]
    pairs = 8 * 17 * 16  # those within frames but for the token itself, which joint attention has and KMT lacks
    assert flops["joint"] - flops["kmt"] == 2 * pairs * 2 * 2 * accuracy.WIDTH  # blocks, multiply and add, two products


def test_a_benchmark_writes_its_results_and_a_failed_run_is_a_row_with_its_error(tmp_path, capsys):
    sizes = ["--epochs", "1", "--num-train", "32", "--num-test", "8", "--workers", "1"]
    places = ["--out", str(tmp_path / "out"), "--name", "tiny", "--folder", str(tmp_path / "runs")]
    wrong_seed = -1  # which no random generator of the clips takes
    rows = accuracy.main(["--attentions", "kmct", "divided", "--seeds", "0", str(wrong_seed), *sizes, *places])
    assert [(row["attention"], row["seed"]) for row in rows] == [
        ("divided", wrong_seed), ("kmct", wrong_seed), ("divided", 0), ("kmct", 0)
    ]  # fmt: skip
    for row in rows[2:]:
        columns = (
            "top1 top5 reversed_opposite shuffled_same steps seconds parameters temporal_parameters gflops curve note"
        )
        assert set(columns.split()) < row.keys()
        assert "error" not in row
        assert row["steps"] == 1
        assert 0 <= row["top1"] <= row["top5"] <= 1
    for row in rows[:2]:
        assert "ValueError" in row["error"]
        assert "top1" not in row

    stored = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert [{**row, "curve": None} for row in stored["rows"]] == [{**row, "curve": None} for row in rows]
    assert stored["curves"]["kmct"] == {"0": rows[3]["curve"]}
    assert [item["attention"] for item in stored["summary"]] == ["divided", "kmct"]
    assert stored["settings"] == {"epochs": 1, "num_train": 32, "num_test": 8, "width": accuracy.WIDTH}
    assert {"command", "date", "machine", "versions"} < stored.keys()
    with (tmp_path / "out" / "tiny.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    for picture in ("tiny.png", "tiny_curves.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 0
    printed = capsys.readouterr().out
    assert "failed: kmct, seed -1" in printed
    assert not list(tmp_path.rglob("*.pt"))


def result(**changed):
    """A finished run."""
    measures = dict.fromkeys(("top1", "reversed_opposite", "reversed_same", "shuffled_same", "top5"), 1.0)
    sizes = {"seconds": 2.0, "steps": 8, "parameters": 1, "temporal_parameters": 1, "gflops": 1.0, "note": ""}
    return {**measures, **sizes, "curve": [[2, 0.1], [6, 0.4], [8, 0.5]], **changed}


def test_the_summary_is_of_the_finished_runs():
    rows = [{"attention": "kmt", "seed": i, **result(top1=top1)} for i, top1 in enumerate((0.5, 0.6, 0.7))]
    rows += [{"attention": "kmt", "seed": 3, "error": "broken"}, {"attention": "joint", "seed": 0, **result(top1=0.4)}]
    kmt, joint = accuracy.summarize(rows)
    assert (kmt["runs"], kmt["top1_min"], kmt["top1_max"]) == (3, 0.5, 0.7)
    # Student's t with 2 degrees of freedom times the standard error
    assert (kmt["top1_mean"], kmt["top1_interval"]) == (pytest.approx(0.6), pytest.approx(4.3027 * 0.1 / 3**0.5))
    assert joint["top1_interval"] is None
    assert kmt["last_gain"] == pytest.approx(0.1)  # since three quarters of the steps


def test_resuming_keeps_what_is_finished_and_runs_the_rest(tmp_path, monkeypatch):
    ran = []

    class Now:
        def __init__(self, *args):
            pass

        def submit(self, run, name, folder, dataset, seed, epochs):
            future = Future()
            ran.append((name, seed))
            if (name, seed) == broken:
                future.set_exception(ValueError("broken"))
            else:
                future.set_result(result(top1=0.25 + seed / 8))
            return future

        def shutdown(self, **kwargs):
            pass

    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", Now)
    common = ["--num-train", "8", "--num-test", "8", "--out", str(tmp_path), "--folder", str(tmp_path / "runs")]
    broken = ("kmct", 1)
    accuracy.main([*common, "--attentions", "kmt", "kmct", "--seeds", "0", "1"])
    assert len(ran) == 4
    ran.clear()
    broken = None
    rows = accuracy.main([*common, "--attentions", "kmct", "joint", "--seeds", "0", "1", "2", "--resume"])
    assert sorted(ran) == [("joint", 0), ("joint", 1), ("joint", 2), ("kmct", 1), ("kmct", 2)]
    assert {(row["attention"], row["seed"]) for row in rows} == {*ran, ("kmt", 0), ("kmt", 1), ("kmct", 0)}
    assert all(row["top1"] == 0.25 + row["seed"] / 8 and row["curve"] == result()["curve"] for row in rows)
    with pytest.raises(ValueError, match="other settings.*leave out --resume"):
        accuracy.main([*common, "--epochs", "7", "--resume"])


def test_a_quick_run_writes_elsewhere_and_yields_to_what_is_given():
    quick = accuracy._options(["--quick", "--epochs", "5"])
    assert (quick.epochs, quick.seeds) == (5, [0])
    assert Path("runs") in quick.out.parents
    assert accuracy._options([]).out == Path(accuracy.__file__).parent / "results"

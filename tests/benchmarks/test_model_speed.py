"""The comparison of video models: what is built, what is counted, what is written."""

import csv
import dataclasses
import json

import model_speed
import pytest
import torch
from model_speed import MODELS, Encoder, build, flops, logits_of, main
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("transformers")

TINY = Encoder(image=32, width=48, depth=3, heads=3, classes=400)
FRAMES, TOKENS = 4, 5
ARGUMENTS = ("--size", "32", "--rounds", "2", "--threads", "1", "--no-memory")
MEASURED = [
    "seconds",
    "spread",
    "rounds",
    "clips_per_second",
    "gflops",
    "parameters",
    "peak_bytes",
    "over_frame_average",
]
COLUMNS = ["model", "attention", "placement", "frames", "batch", "size", "pass", *MEASURED, "note", "error"]


def video(batch=1, frames=FRAMES):
    return torch.randn(batch, frames, 3, 32, 32)


def vit_flops(encoder, frames):
    """2 x the multiply-adds of a ViT on each frame, written down by hand."""
    patches, width = (encoder.image // 16) ** 2, encoder.width
    tokens = patches + 1
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return 2 * frames * (patches * 3 * 16 * 16 * width + encoder.depth * block + width * encoder.classes)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_classifies_clips_also_after_its_flops_were_counted(name):
    model = build(name, TINY, FRAMES)
    assert flops(model, video()) > 0
    logits = logits_of(model, video(batch=2))
    assert logits.shape == (2, 400)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_run_and_has_a_gradient(name):
    model = build(name, TINY, FRAMES).train()
    logits_of(model, video()).square().sum().backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused


@pytest.mark.parametrize(("encoder", "frames"), [(Encoder(), 1), (TINY, FRAMES)])
def test_flops_of_the_image_model_are_those_of_the_formula(encoder, frames):
    clip = torch.empty(1, frames, 3, encoder.image, encoder.image)
    assert flops(build("frame_average", encoder, frames), clip) == pytest.approx(vit_flops(encoder, frames), rel=1e-3)


def test_vit_b_16_has_35_gflops_a_frame():
    assert vit_flops(Encoder(), 1) == pytest.approx(35.1e9, rel=0.01)  # 17.6 G multiply-adds


def test_flops_of_masks_differ_by_the_pairs_that_they_allow():
    kmct, kmt, joint = (flops(build(name, TINY, FRAMES), video()) for name in ("kmct", "kmt", "joint"))
    a_pair = 4 * TINY.width  # in the one block that is appended
    earlier = FRAMES * (FRAMES - 1) // 2 * TOKENS**2
    assert joint - kmt == a_pair * FRAMES * TOKENS * (TOKENS - 1)
    assert kmt - kmct == a_pair * earlier


def test_flops_count_a_batch_and_are_per_clip_in_the_rows(tmp_path):
    model = build("kmct", TINY, FRAMES)
    assert flops(model, video(batch=3)) == 3 * flops(model, video())
    run = ("--models", "kmct", "--frames", "4", "--batch", "3", "--passes", "forward")
    rows = main([*ARGUMENTS, *run, "--out", str(tmp_path)], TINY)
    assert rows[1]["gflops"] == pytest.approx(flops(model, video()) / 1e9)
    assert rows[1]["clips_per_second"] == pytest.approx(3 / rows[1]["seconds"])


def test_replaced_attention_adds_a_temporal_embedding_alone():
    count = {name: sum(p.numel() for p in build(name, TINY, FRAMES).parameters()) for name in MODELS}
    assert count["kmt_replace"] == count["frame_average"] + FRAMES * TINY.width
    assert count["kmt"] == count["kmct"] == count["joint"] > count["kmt_replace"]


def test_all_models_and_passes_are_written(tmp_path):
    rows = main([*ARGUMENTS, "--frames", "4", "--out", str(tmp_path)], TINY)

    written = json.loads((tmp_path / "model_speed.json").read_text())
    assert written["rows"] == rows
    assert written["encoder"] == dataclasses.asdict(TINY)
    assert {"command", "date", "machine", "versions", "dtype"} < set(written)
    assert len(rows) == 2 * len(MODELS)
    assert all(list(row) == COLUMNS and not row["error"] for row in rows)
    for row in rows:
        name = next(name for name, entry in MODELS.items() if entry.model == row["model"])
        model = build(name, TINY, row["frames"])
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert row["seconds"] > 0
        assert row["over_frame_average"] > 0
    assert {row["over_frame_average"] for row in rows if row["model"] == "frame average"} == {1.0}
    with (tmp_path / "model_speed.csv").open() as file:
        assert next(csv.reader(file)) == COLUMNS
    assert (tmp_path / "model_speed.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_is_that_of_a_call(tmp_path):
    run = ("--models", "frame_average", "--frames", "8", "--batch", "64", "--size", "32", "--rounds", "1")
    (row,) = main([*run, "--passes", "forward+backward", "--out", str(tmp_path)], TINY)
    assert not row["error"]
    kept = 64 * 8 * TOKENS * 4 * TINY.width * 4 * TINY.depth  # the input of GELU in each block, float32
    assert 2 * kept < row["peak_bytes"] < 50 * kept


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward\nhere")


class FailsInBackward(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(400))

    def forward(self, video):
        return Broken.apply(self.weight).expand(len(video), 400)


def test_a_model_that_fails_is_a_row_that_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    def not_installed(encoder, frames):
        raise ModuleNotFoundError("No module named 'transformers'")

    def fails_in_backward(encoder, frames):
        return FailsInBackward()

    for name, make in (("vivit", not_installed), ("kmt", fails_in_backward)):
        monkeypatch.setitem(model_speed.MODELS, name, dataclasses.replace(MODELS[name], build=make))
    run = ("--models", "vivit", "kmt", "kmct", "--frames", "2")
    rows = main([*ARGUMENTS, *run, "--out", str(tmp_path)], TINY)

    errors = {(row["model"], row["pass"]): row["error"] for row in rows}
    missing, failed = "ModuleNotFoundError: No module named 'transformers'", "RuntimeError: no backward here"
    for which in ("forward", "forward+backward"):
        assert errors["ViViT (HF)", which] == missing
        assert errors["KMCT (append)", which] == errors["frame average", which] == ""
    assert errors["KMT (append)", "forward"] == ""
    assert errors["KMT (append)", "forward+backward"] == failed
    assert all((row["seconds"] is None) == bool(row["error"]) for row in rows)
    assert json.loads((tmp_path / "model_speed.json").read_text())["rows"] == rows


def test_what_is_finished_is_on_disk_before_the_next_pass(tmp_path, monkeypatch):
    shown = []

    def interrupt(rows):
        shown.append(rows)
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(model_speed, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main([*ARGUMENTS, "--frames", "2", "4", "--models", "kmt", "--out", str(tmp_path)], TINY)
    assert json.loads((tmp_path / "model_speed.json").read_text())["rows"] == [*shown[0], *shown[1]]


def test_quick_never_writes_where_committed_numbers_are():
    options = model_speed._parse(["--quick"])
    assert options.out.parts[0] == "runs"
    assert (options.frames, options.size, options.no_memory) == ([8], 112, True)

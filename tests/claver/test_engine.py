"""What a setting of the training does: which weights move, at which rates, which are evaluated, and what is said and logged."""

import dataclasses
import json
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from claver.config import Config, TrainConfig
from claver.evaluation.evaluate import run_evaluation
from claver.model import build_model, freeze
from claver.text import encode_prompts, tokens_of
from claver.training.optimizer import AverageWeights, parameter_groups, place_in_tower
from claver.training.run_folder import load_pair, saved_steps, weights_of
from claver.training.step import NonFiniteError
from claver.training.train import train
from claver.weights.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from official_files import official_names
from small import TEXT, VISION, small_config, small_model
from test_run_folder import full_disk
from torch import nn


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two steps of four videos, and what they start from."""
    return small_config(
        tmp_path_factory.mktemp("engine"), num_train=8, num_test=3, epochs=1, batch_size=4, warmup_epochs=0.0
    )


def run_with(config, folder, *, model=None, resume=False, init_from=None, **settings):
    changed = dataclasses.replace(config, run_dir=str(folder), train=dataclasses.replace(config.train, **settings))
    if model is not None:
        changed = dataclasses.replace(changed, model=dataclasses.replace(config.model, **model))
    return train(changed, resume=resume, init_from=init_from)


def initial_weights(config):
    torch.manual_seed(config.seed)
    return build_model(config.model).state_dict()


# ---- which weights are trained, and how --------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["full", "vision", "temporal"])
def test_what_is_tuned_moves_and_nothing_else(base, tmp_path, tune):
    after = run_with(base, tmp_path, tune=tune, weight_decay=0.0, lr=1e-3).model.state_dict()
    before = initial_weights(base)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    parameters = dict(build_model(base.model).named_parameters())
    expected = {
        name
        for name in parameters
        if tune == "full" or "temporal_" in name or (tune == "vision" and name.startswith("clip.visual."))
    }
    assert moved == expected
    assert {"full", "vision"} >= {tune} or len(moved) < len(parameters) / 2


def test_under_layer_decay_each_block_learns_slower_than_the_one_above(base):
    model = build_model(small_model(vision=VISION | {"layers": 3}))
    settings = TrainConfig(lr=1.0, temporal_lr_mult=10.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in parameter_groups(model, settings) for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    for name, rate in (
        ("visual.conv1.weight", 1 / 8),
        ("visual.positional_embedding", 1 / 8),
        ("visual.ln_pre.weight", 1 / 8),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", 1 / 4),
        ("visual.transformer.resblocks.1.mlp.c_fc.bias", 1 / 2),
        ("visual.transformer.resblocks.2.ln_1.weight", 1),
        ("visual.ln_post.weight", 1),
        ("visual.proj", 1),
        ("visual.temporal_encoder.blocks.0.attn.in_proj_weight", 10),
        ("visual.temporal_encoder.embedding.weight", 10),
        ("token_embedding.weight", 1 / 2),
        ("positional_embedding", 1 / 2),
        ("transformer.resblocks.0.ln_1.weight", 1),
        ("text_projection", 1),
        ("logit_scale", 1),
    ):
        assert found[f"clip.{name}"] == rate, name
    plain = parameter_groups(model, TrainConfig(lr=1.0))
    assert {group["name"]: group["weight_decay"] for group in plain} == {
        "image": 1e-3,
        "image_no_decay": 0,
        "temporal": 1e-3,
        "temporal_no_decay": 0,
    }
    for group in parameter_groups(model, settings):
        assert group["weight_decay"] == (0 if "no_decay" in group["name"] else 1e-3)


def test_layer_decay_needs_blocks_that_are_trained(base):
    model = build_model(base.model)
    freeze(model, "temporal")
    with pytest.raises(ValueError, match=r"train\.layer_decay needs numbered blocks"):
        parameter_groups(model, TrainConfig(layer_decay=0.5))
    assert place_in_tower("clip.visual.trunk.blocks.7.attn.qkv.weight") == ("vision", 7)
    assert place_in_tower("clip.text.transformer.resblocks.2.ln_1.bias") == ("text", 2)


def test_the_lowest_rate_of_a_block_is_in_proportion(base, tmp_path):
    """So a block far below does not end with a higher rate than it began with."""
    run = run_with(base, tmp_path, layer_decay=0.001, min_lr_ratio=0.5, lr=1e-3)
    state = load_pair(run.folder, 2)[1]["optimizer"]
    rates = {group["name"]: group["lr"] for group in state["param_groups"]}
    assert rates["image_1"] == pytest.approx(rates["image"] * 0.001)


def test_the_average_of_the_weights_is_what_is_evaluated_kept_as_the_best_and_returned(base, tmp_path):
    run = run_with(base, tmp_path / "run", ema=0.75, save_every=1, keep=3)
    start, *steps = (load_checkpoint(weights_of(run.folder, step))["model"] for step in (0, 1, 2))
    average = dict(start)
    for weights in steps:
        average = {name: 0.75 * average[name] + 0.25 * weights[name] for name in average}
    best = load_checkpoint(run.folder / "best.safetensors")["model"]
    for name, tensor in run.model.state_dict().items():
        torch.testing.assert_close(tensor, average[name], atol=1e-7, rtol=1e-5)
        assert torch.equal(tensor, best[name])
    plain = run_with(base, tmp_path / "plain")
    assert all(torch.equal(plain.model.state_dict()[name], tensor) for name, tensor in steps[-1].items())


def test_the_average_moves_by_its_formula_and_leaves_what_is_frozen():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    average = AverageWeights(model, 0.9)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update()
    assert average.weights.keys() == {"weight"}
    torch.testing.assert_close(average.weights["weight"], before + 0.1)


@pytest.mark.parametrize("name", ["compile", "gradient_checkpointing"])
def test_what_saves_time_or_memory_changes_nothing(base, tmp_path, monkeypatch, name):
    compiled = []

    def compile_without_code(self, *args, call=nn.Module.compile, **kwargs):
        compiled.append(type(self).__name__)
        return call(self, *args, backend="eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compile_without_code)
    plain, other = run_with(base, tmp_path / "plain"), run_with(base, tmp_path / "other", **{name: True})
    assert compiled == (["Claver"] if name == "compile" else [])
    for a, b in zip(plain.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert [r["loss"] for r in plain.history if "loss" in r] == pytest.approx(
        [r["loss"] for r in other.history if "loss" in r], abs=1e-4
    )


def test_a_run_in_bfloat16_keeps_its_weights_in_float32(base, tmp_path):
    run, exact = run_with(base, tmp_path / "bf16", precision="bf16"), run_with(base, tmp_path / "exact")
    losses = [[record["loss"] for record in r.history if "loss" in record] for r in (run, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    assert {tensor.dtype for tensor in run.model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": True}, r"train\.fsdp shares a model over several processes, and this is one"),
        ({"trackers": ("nowhere",)}, r"train\.trackers: nowhere not installed, or unknown to Accelerate"),
        ({"precision": "fp16"}, r"train\.precision fp16 needs a GPU"),
    ],
)
def test_an_engine_that_is_not_there_is_refused_by_name(base, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_with(base, tmp_path, **settings)
    with pytest.raises(ValueError, match=r"train\.fsdp is for train\.precision no or bf16"):
        TrainConfig(fsdp=True, precision="fp16")


# ---- where it starts ---------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_of_another_to_the_bit_at_epoch_0(base, tmp_path):
    source = run_with(base, tmp_path / "source")
    run = run_with(base, tmp_path / "run", init_from=source.folder / "best.safetensors", keep=2, save_every=1, epochs=2)
    kept = run_with(base, tmp_path / "kept", init_from=source.folder / "best.safetensors", keep=9)
    start = load_checkpoint(weights_of(kept.folder, 0))
    assert (start["epoch"], start["step"]) == (0, 0)
    best = load_checkpoint(source.folder / "best.safetensors")["model"]
    assert all(torch.equal(start["model"][name], tensor) for name, tensor in best.items())
    assert run.history[0]["step"] == 2  # the end of the first epoch: a schedule of its own
    assert saved_steps(run.folder) == [3, 4]
    again = run_with(
        base, tmp_path / "run", resume=True, keep=2, save_every=1, epochs=2
    )  # init_from is not needed again
    assert again.history == run.history


def test_official_weights_and_those_of_another_number_of_frames_are_a_start(base, tmp_path):
    heads = small_model(vision=VISION | {"head_width": 32}, text=TEXT | {"heads": 1})  # those of the authors' sizes
    base = dataclasses.replace(base, model=heads)
    config = Config(model=base.model)
    torch.manual_seed(5)
    model = build_model(base.model).eval()
    torch.save({"model": official_names(model.state_dict()), "epoch": 59}, tmp_path / "official.pth")
    save_checkpoint(tmp_path / "ours.safetensors", model, config, ["x"], [["an x"]], epoch=7)
    for source in ("official.pth", "ours.safetensors"):
        run = run_with(base, tmp_path / source.split(".")[0], init_from=tmp_path / source, keep=3)
        start = load_checkpoint(weights_of(run.folder, 0))["model"]
        assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())

    frames = {"frames": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it interpolates
        run = run_with(base, tmp_path / "longer", model=frames, init_from=tmp_path / "ours.safetensors", keep=3)
    longer, _ = load_model(weights_of(run.folder, 0))
    video = torch.randn(1, 6, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(longer.encode_video(video), model.encode_video(video))  # which interpolates as it runs
    with pytest.raises(CheckpointError, match=r"model\.attention is 'kmt' there, 'kmct' here"):
        run_with(base, tmp_path / "other", model={"attention": "kmct"}, init_from=tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such checkpoint"):
        run_with(base, tmp_path / "none", init_from=tmp_path / "nowhere.pt")


# ---- when it fails -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_at_that_step_and_names_the_files(base, tmp_path, monkeypatch):
    import claver.training.step

    losses = iter([1.0, 1.0, float("inf")])
    original = claver.training.step.contrastive_loss
    monkeypatch.setattr(claver.training.step, "contrastive_loss", lambda *args: original(*args) * next(losses))
    with pytest.raises(
        NonFiniteError, match=r"the loss is inf at step 3; the files of its batch are in .*nonfinite_step_00000003"
    ):
        run_with(base, tmp_path, epochs=2)
    assert saved_steps(tmp_path) == [2]
    (batch,) = json.loads((tmp_path / "nonfinite_step_00000003.json").read_text())["batches"]
    assert len(batch["files"]) == 4
    assert all(Path(name).name.startswith("train_") for name in batch["files"])


def test_weights_that_are_no_numbers_are_not_kept(base, tmp_path, monkeypatch):
    original = torch.optim.AdamW.step

    def spoil(self, *args, **kwargs):
        original(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(
        NonFiniteError, match=r"after step 1 these weights are not finite: clip\..*keeps the checkpoint of step 0"
    ):
        run_with(base, tmp_path, save_every=1)
    assert saved_steps(tmp_path) == [0]


def test_a_full_disk_stops_a_run_with_its_last_checkpoint_whole_and_it_goes_on_when_there_is_room(base, tmp_path):
    whole = run_with(base, tmp_path / "whole", epochs=2)
    run_with(base, tmp_path / "run", epochs=2, save_every=1, keep=4)
    folder = tmp_path / "run"
    for step in (2, 3, 4):
        weights_of(folder, step).unlink()
        weights_of(folder, step).with_suffix(".state.pt").unlink()
    (folder / "best.safetensors").unlink()
    before = sorted(os.listdir(folder))
    with full_disk(5_000_000), pytest.raises(OSError, match=r"cannot be written .* GB are free there"):
        run_with(base, folder, epochs=2, resume=True)
    assert sorted(os.listdir(folder)) == before
    resumed = run_with(base, folder, epochs=2, resume=True)
    for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(base, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        run_with(base, tmp_path / "file" / "run")


# ---- what it says ------------------------------------------------------------------------------------------------------


def test_the_header_and_the_bar_say_what_is_done(base, tmp_path, capsys):
    run_with(base, tmp_path, accumulate=2, tune="vision", temporal_lr_mult=4.0)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("train: found 8 of 8 videos of 8 classes, list ")
    assert lines[1].startswith("test: found 3 of 3 videos of 8 classes, list ")
    assert any("text 0.0M of 1.6M" in line for line in lines)
    assert any(line.startswith("kmt over 4 frames of 32 pixels, mean 0.481/0.458/0.408, std 0.269/") for line in lines)
    expected = "a batch of 4 clips is 1 processes * 2 accumulated * 2; 1 epochs of 2 steps; lr 0.001, temporal 0.004"
    assert any(line.startswith(expected) for line in lines)
    bar = printed.err.splitlines()[-1]
    assert "clips/s" in bar
    assert "waiting for data" in bar


def test_losses_are_in_tensorboard(base, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_with(base, tmp_path, trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "claver")).Reload()
    assert {"loss", "lr", "top1"} <= set(events.Tags()["scalars"])
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({r["step"]: r["loss"] for r in run.history if "loss" in r})


def test_the_best_checkpoint_evaluates_as_the_run_said(base, tmp_path):
    run = run_with(base, tmp_path)
    model, content = load_model(run.folder / "best.safetensors")
    config = dataclasses.replace(base, test=dataclasses.replace(base.test, clips=1))
    tokens = tokens_of(content["prompts"], model)
    assert torch.equal(encode_prompts(model, tokens), encode_prompts(run.model.eval(), tokens))
    assert run_evaluation(config, model, tokens).top(1) == run.history[-1]["top1"]

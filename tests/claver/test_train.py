"""Training follows its schedule, resumes exactly, and stops at broken data with all the names."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from claver.data.datasets import TrainDataset
from claver.data.lists import DatasetError, read_labels
from claver.evaluation.evaluate import run_evaluation
from claver.training.optimizer import learning_rate
from claver.training.run_folder import saved_steps, weights_of
from claver.training.step import contrastive_loss
from claver.training.train import Stopped, train
from claver.weights.checkpoint import CheckpointError, load_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import small_config
from torch.nn import functional as F


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1))
def test_the_learning_rate_warms_up_from_zero_and_falls_to_its_minimum(total, warmup, minimum):
    total += warmup
    rates = [learning_rate(step, total, warmup, 2.0, minimum) for step in range(total + 1)]
    assert all(0 <= rate <= 2 for rate in rates)
    assert rates[-1] == pytest.approx(minimum)
    assert rates[:warmup] == pytest.approx([2 * step / warmup for step in range(warmup)])
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_the_learning_rate_is_the_authors():
    """timm's CosineLRScheduler(t_initial=6000, lr_min=.01, warmup_t=500), whose warm-up does not shift the cosine."""
    rates = [learning_rate(step, 6000, 500, 1.0, 0.01) for step in (250, 500, 2000, 4000)]
    assert rates == pytest.approx([0.5, 0.983, 0.7525, 0.2575], abs=1e-3)


def test_the_target_holds_for_each_prompt():
    logits, target = torch.randn(3, 4, 5), torch.randn(3, 5).softmax(-1)
    expected = torch.stack([F.cross_entropy(logits[:, a], target) for a in range(4)]).mean()
    torch.testing.assert_close(contrastive_loss(logits, target), expected)


def stopped_in_step(step: int, config, **options) -> None:
    """Train until Ctrl-C comes in the middle of a step, the first being 1."""
    original, calls = torch.Tensor.backward, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", stop)
        with pytest.raises(Stopped, match=r"stopped after step \d of \d+; go on with the same command and --resume"):
            train(config, **options)


def assert_same(run, other) -> None:
    """The same history and the same weights, to the bit."""
    assert run.history == other.history
    for a, b in zip(run.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_ends_exactly_as_one_that_never_stopped(tmp_path):
    whole = train(small_config(tmp_path, run="whole", epochs=3))
    config = small_config(tmp_path, run="parts", epochs=3)
    stopped_in_step(6, config)
    assert saved_steps(config.run_dir) == [4]  # the end of the second epoch
    assert load_checkpoint(weights_of(config.run_dir, 4))["epoch"] == 2
    assert_same(train(config, resume=True), whole)
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=3))
    assert train(moved, resume=True).history == whole.history
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=0.5))
    with pytest.raises(CheckpointError, match="train.lr = 0.001 there, 0.5 here"):
        train(changed, resume=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_inside_an_epoch_without_reading_what_was_done(tmp_path, workers):
    """With all that a step may draw or carry over: mixed clips, dropout, accumulated steps, an average of the weights."""
    config = small_config(tmp_path, num_train=32, epochs=2, save_every=3, accumulate=2, ema=0.5, max_grad_norm=1.0)
    vision = config.model.vision | {"patch_dropout": 0.5}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vision=vision),
        data=dataclasses.replace(config.data, num_workers=workers),
    )
    whole = train(dataclasses.replace(config, run_dir=str(tmp_path / "whole")))
    stopped_in_step(2 * 4, config)  # of two batches each
    assert saved_steps(config.run_dir) == [3]
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TrainDataset, "__getitem__", lambda self, i, get=TrainDataset.__getitem__: read.append(i) or get(self, i)
        )
        resumed = train(config, resume=True)
    assert_same(resumed, whole)
    assert len(read) == (0 if workers else 8 + 32)  # workers read in processes of their own


def test_a_run_of_before_a_setting_was_there_is_resumed(tmp_path):
    config = small_config(tmp_path, epochs=1)
    history = train(config).history
    path = weights_of(config.run_dir, 2)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["config"])
    for setting in ("window", "sink"):
        del settings["model"][setting]
    save_file(load_file(path), path, metadata | {"config": json.dumps(settings)})
    assert train(config, resume=True).history == history


def test_a_run_is_not_resumed_with_other_classes_or_texts_under_the_same_names(tmp_path):
    config = small_config(tmp_path, epochs=1)
    labels, file = Path(config.data.labels), tmp_path / "p.json"
    text = labels.read_text()
    sentences = {name: {"scene": [f"It is {name} here."]} for name in read_labels(labels)}
    file.write_text(json.dumps(sentences))
    data = dataclasses.replace(config.data, prompts=str(file), kinds=("scene",))
    config = dataclasses.replace(config, data=data)
    train(config)
    train(config, resume=True)
    file.write_text(json.dumps({name: {"scene": [f"It was {name} here."]} for name in sentences}))
    with pytest.raises(CheckpointError, match="its prompts are not those of now"):
        train(config, resume=True)
    file.write_text(json.dumps(sentences))
    labels.write_text("id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(reversed(sentences))))
    with pytest.raises(CheckpointError, match="its classes are not those of now"):
        train(config, resume=True)
    labels.write_text(text)
    train(config, resume=True)


def test_a_run_leaves_its_configuration_history_and_checkpoints_in_its_folder_alone(tmp_path):
    config = small_config(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    run = train(config)
    new = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and path not in before}
    step = {"run/step_00000004.safetensors", "run/step_00000004.state.pt"}
    assert new == {"run/config.json", "run/history.jsonl", "run/best.safetensors"} | step
    with pytest.raises(ValueError, match="holds a run already"):
        train(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert records == run.history
    assert {"step", "loss", "lr"} <= records[0].keys()
    assert "top1" in records[-1]


def test_accumulated_steps_have_the_gradient_of_the_whole_batch(tmp_path):
    plain = small_config(tmp_path, epochs=1, eps=1.0)  # so large that AdamW steps in proportion to the gradient
    no_mix = dataclasses.replace(plain.augment, mixup=0.0, cutmix=0.0)
    states = []
    for accumulate in (1, 2):
        settings = dataclasses.replace(plain.train, accumulate=accumulate, lr=0.1)
        run_dir = str(tmp_path / f"accumulate{accumulate}")
        states.append(
            train(dataclasses.replace(plain, run_dir=run_dir, augment=no_mix, train=settings)).model.state_dict()
        )
    for a, b in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_logit_scale_has_a_bound_or_none(tmp_path):
    config = small_config(tmp_path, epochs=1)
    scales = {}
    for bound in (100.0, 2.0, None):
        settings = dataclasses.replace(config.train, max_logit_scale=bound)
        model = dataclasses.replace(config.model, logit_scale=1000.0)
        run = train(dataclasses.replace(config, run_dir=str(tmp_path / str(bound)), model=model, train=settings))
        scales[bound] = run.model.clip.logit_scale.exp().item()
    assert 99 < scales[100.0] <= 100.001
    assert 1.9 < scales[2.0] <= 2.001
    assert scales[None] > 900


def test_evaluation_sees_each_video_once_in_the_order_of_the_list(tmp_path):
    config = small_config(tmp_path, num_test=8)
    run = train(config)
    result = run_evaluation(config, run.model, run.tokens)
    lines = Path(config.data.test_list).read_text().splitlines()
    labels = [int(line.rsplit(" ", 1)[1]) for line in lines]
    assert result.labels.tolist() == labels
    torch.testing.assert_close(result.probabilities.sum(1), torch.ones(8))
    assert int(result.confusion().sum()) == 8
    assert result.confusion().diagonal().sum().item() / 8 == pytest.approx(result.top(1))
    assert result.top(8) == 1


def test_broken_files_are_all_named_with_counts(tmp_path):
    config = small_config(tmp_path)
    videos = tmp_path / "data" / "videos"
    (videos / "train_00003.mp4").unlink()
    (videos / "train_00005.mp4").write_bytes(b"")
    with pytest.raises(DatasetError, match="found 14 of 16 videos, 2 missing or broken") as raised:
        train(config)
    assert "train_00003.mp4" in str(raised.value)
    assert "train_00005.mp4" in str(raised.value)


def test_an_evaluation_with_broken_files_gives_no_number(tmp_path):
    config = small_config(tmp_path)
    run = train(config)
    for name in ("test_00001.mp4", "test_00006.mp4"):
        (tmp_path / "data" / "videos" / name).write_text("this is no video")
    with pytest.raises(DatasetError, match="found 6 of 8 videos, 2 missing or broken") as raised:
        run_evaluation(config, run.model, run.tokens)
    assert "test_00001.mp4" in str(raised.value)
    assert "test_00006.mp4" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9, "accumulate": 2}, "no multiple"),
        ({"prompts_per_step": 4}, "3 prompts"),
        ({"batch_size": 64}, "do not fill"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(small_config(tmp_path, **change))

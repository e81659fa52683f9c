"""Several processes train and evaluate as one does, end together, and leave checkpoints that one can go on from."""

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from claver.evaluation.evaluate import run_evaluation
from claver.text import tokens_of
from claver.training.run_folder import load_pair, saved_steps, weights_of
from claver.training.train import train
from claver.weights.checkpoint import load_model
from small import small_config

RANKS = 2


def settings(folder: Path, run: str = "run", **train_settings):
    """A run without mixed clips: what is mixed with what depends on the processes."""
    fixed = {"epochs": 2, "eps": 1e-3, "max_grad_norm": 1.0, "timeout": 60.0}
    config = small_config(folder, num_train=24, num_test=7, run=run, **(fixed | train_settings))
    return dataclasses.replace(config, augment=dataclasses.replace(config.augment, mixup=0.0, cutmix=0.0))


def logs(folder, ranks=RANKS):
    return [(folder / f"log.txt{rank}").read_text() for rank in range(ranks)]


def assert_close_pairs(folder, other, step, *, atol=1e-5):
    """Checkpoints of the same names, shapes and, but for rounding, values."""
    (content, state), (content2, state2) = (load_pair(path, step) for path in (folder, other))
    assert_close_trees(content["model"], content2["model"], atol)
    for name in ("optimizer", "average", "best"):
        assert_close_trees(state[name], state2[name], atol)
    losses = [[record.get("loss", record.get("top1")) for record in s["history"]] for s in (state, state2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def assert_close_trees(a, b, atol):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close_trees(a[key], b[key], atol)
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_close_trees(x, y, atol)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)
    else:
        assert a == b


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("single")
    config = settings(folder, ema=0.5, keep=2, save_every=2)
    train(config)
    return folder, config


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_and_evaluate_what_one_does(server, single, tmp_path, fsdp):
    """24 videos of training are 12 each, 7 of the test are 4 and 3."""
    _, config = single
    changed = dataclasses.replace(config.train, fsdp=fsdp, accumulate=2)
    shared = dataclasses.replace(config, run_dir=str(tmp_path / "run"), train=changed)
    found = tmp_path / "probabilities.pt"
    assert server.run(shared, tmp_path / "log.txt", ranks=RANKS, evaluate=str(found)) == [0, 0], logs(tmp_path)
    assert "8 clips is 2 processes * 2 accumulated * 2" in logs(tmp_path)[0]
    assert saved_steps(shared.run_dir) == saved_steps(config.run_dir) == [4, 6]
    assert_close_pairs(shared.run_dir, config.run_dir, 6)

    probabilities, labels = torch.load(found)
    model, content = load_model(weights_of(shared.run_dir, 6))
    model.load_state_dict(content["model"] | load_pair(shared.run_dir, 6)[1]["average"])
    alone = run_evaluation(shared, model, tokens_of(content["prompts"], model))
    assert labels.tolist() == alone.labels.tolist()
    assert len(labels) == 7
    torch.testing.assert_close(probabilities, alone.probabilities, atol=1e-6, rtol=0)


def test_a_run_of_two_processes_with_shared_weights_goes_on_alone_and_says_so(server, single, tmp_path, capsys):
    _, config = single
    changed = dataclasses.replace(config.train, fsdp=True, epochs=2)
    shared = dataclasses.replace(config, run_dir=str(tmp_path / "run"), train=changed)
    server.run(shared, tmp_path / "log.txt", ranks=RANKS, nan_at=6)
    assert saved_steps(shared.run_dir)[-1] == 4
    capsys.readouterr()
    train(dataclasses.replace(shared, train=dataclasses.replace(changed, fsdp=False)), resume=True)
    assert "it ran on 2 processes and goes on with 1: the same videos in each step" in capsys.readouterr().out
    assert_close_pairs(shared.run_dir, config.run_dir, 6)


def test_a_loss_that_is_no_number_stops_all_processes_and_names_the_files(server, tmp_path):
    config = settings(tmp_path, save_every=2)
    log = tmp_path / "log.txt"
    assert server.run(config, log, ranks=RANKS, nan_at=4) == [1, 1]
    for text in logs(tmp_path):
        assert "NonFiniteError: the loss is nan at step 4; the files of its batch are in" in text
    written = json.loads((tmp_path / "run" / "nonfinite_step_00000004.json").read_text())
    assert [batch["loss"] for batch in written["batches"]] == ["nan", "nan"]
    files = [name for batch in written["batches"] for name in batch["files"]]
    assert len(set(files)) == 8
    assert all(Path(name).exists() for name in files)
    assert saved_steps(config.run_dir) == [3]  # the end of the first epoch
    assert server.run(config, log, ranks=RANKS, resume=True) == [0, 0], logs(tmp_path)


def test_a_process_that_fails_ends_the_others_with_its_error(server, tmp_path):
    config = settings(tmp_path)
    (tmp_path / "data" / "videos" / "train_00005.mp4").write_text("no video")  # of one process in each epoch
    start = time.perf_counter()
    assert server.run(config, tmp_path / "log.txt", ranks=RANKS) == [1, 1]
    assert time.perf_counter() - start < config.train.timeout
    own, other = sorted((text.splitlines()[-1] for text in logs(tmp_path)), key=lambda line: "ProcessError" in line)
    told = r"VideoError: .*train_00005\.mp4"
    assert re.search(told, own)
    assert re.search(rf"ProcessError: another process failed, so this one stops\. process \d of 2: {told}", other)


def test_a_process_that_is_killed_ends_the_others(server, tmp_path):
    config = settings(tmp_path, timeout=20.0, epochs=200)
    numbers = server.start_ranks(config, tmp_path / "log.txt", RANKS)
    wait_for_step(tmp_path)
    start = time.perf_counter()
    os.kill(numbers[1], signal.SIGKILL)
    assert [server.wait(number) for number in numbers] == [1, -signal.SIGKILL]
    assert time.perf_counter() - start < 20 + 10
    assert "ProcessError: another process is gone" in logs(tmp_path)[0].splitlines()[-1]
    assert saved_steps(config.run_dir)


def test_one_process_that_is_asked_to_stop_stops_all_of_them_after_the_same_step(server, tmp_path):
    config = settings(tmp_path, epochs=200)
    numbers = server.start_ranks(config, tmp_path / "log.txt", RANKS)
    wait_for_step(tmp_path)
    os.kill(numbers[1], signal.SIGTERM)
    assert [server.wait(number) for number in numbers] == [130, 130], logs(tmp_path)
    (step,) = saved_steps(config.run_dir)
    assert all(f"stopped after step {step} of 600" in text.splitlines()[-1] for text in logs(tmp_path))
    assert weights_of(config.run_dir, step).exists()


def wait_for_step(folder):
    while not (folder / "log.txt0").exists() or "clips/s" not in logs(folder, 1)[0]:
        time.sleep(0.02)

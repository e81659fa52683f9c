"""A training that is killed again and again ends as one that never was; one that is asked to stop says how to go on."""

import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from claver.training.run_folder import load_pair, saved_steps, weights_of
from claver.weights.checkpoint import load_checkpoint
from small import small_config

KILLS, STEPS, EPOCH = 20, 24, 12


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run of 2 epochs of 12 steps, with all that must be carried from one step to the next, and how long it takes."""
    folder = tmp_path_factory.mktemp("killed")
    config = small_config(folder, num_train=24, num_test=4, run="whole", batch_size=2, ema=0.9, save_every=2)
    start = time.perf_counter()
    assert server.wait(server.start(config, folder / "log.txt")) == 0, log_of(folder)
    return config, time.perf_counter() - start


def log_of(folder):
    return (folder / "log.txt").read_text()


def assert_same_ends(folder, whole):
    """The same files with the same weights and history, to the bit."""
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))
    assert (folder / "history.jsonl").read_text() == (whole / "history.jsonl").read_text()
    for name in (weights_of(folder, STEPS).name, "best.safetensors"):
        ends = [load_checkpoint(path / name) for path in (folder, whole)]
        assert ends[0]["step"] == ends[1]["step"]
        assert ends[0]["model"].keys() == ends[1]["model"].keys()
        assert all(torch.equal(tensor, ends[1]["model"][key]) for key, tensor in ends[0]["model"].items()), name


def test_a_run_that_is_killed_twenty_times_ends_with_the_weights_of_one_that_was_not(server, whole, tmp_path):
    """Half of the kills come at random moments, half while a checkpoint is being written. A run that reaches its end is
    followed by another, until there were twenty."""
    config, seconds = whole
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    moments = [("time", draw.uniform(0.15, 0.9) * seconds) for _ in range(KILLS // 2)]
    moments += [("write", number) for number in draw.sample(range(2, 40), KILLS // 2)]
    draw.shuffle(moments)
    runs, left_behind, inside = 0, 0, 0
    while True:
        folder = tmp_path / f"run{runs}"
        resume, status = False, -signal.SIGKILL
        while status:
            kind, moment = moments[-1] if moments else ("never", None)
            settings = dataclasses.replace(config, run_dir=str(folder))
            write = moment if kind == "write" else None
            number = server.start(settings, tmp_path / "log.txt", resume=resume, die_in_write=write)
            if kind == "time":
                time.sleep(moment)
                os.kill(number, signal.SIGKILL)
            status = server.wait(number)
            assert status in (0, -signal.SIGKILL), log_of(tmp_path)
            if status:
                moments.pop()
                left_behind += any(name.endswith(".partial") for name in os.listdir(folder))
                inside += any(step % EPOCH for step in saved_steps(folder))
            elif kind == "time":
                moments[-1] = (kind, moment / 2)  # it came too late
            resume = resume or folder.exists()
        assert_same_ends(folder, Path(config.run_dir))
        runs += 1
        if not moments:
            break
    print(f"{runs} runs, {inside} kills inside of an epoch, {left_behind} that left parts of files")
    assert inside >= 5
    assert left_behind >= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_asked_to_stop_keeps_its_last_step_and_says_how_to_go_on(server, whole, tmp_path, number):
    config, _ = whole
    train = dataclasses.replace(config.train, save_every=None)
    folder, data = tmp_path / "run", dataclasses.replace(config.data, num_workers=1)
    settings = dataclasses.replace(config, run_dir=str(folder), train=train, data=data)
    process = server.start(settings, tmp_path / "log.txt")
    while "clips/s" not in (log_of(tmp_path) if (tmp_path / "log.txt").exists() else ""):  # step 10
        time.sleep(0.01)
    os.killpg(process, number)  # as a terminal does: the workers of the data are asked, too
    assert server.wait(process) == 130, log_of(tmp_path)
    (step,) = saved_steps(folder)
    assert 0 < step < STEPS
    last = log_of(tmp_path).splitlines()[-1]
    assert last == f"stopped after step {step} of {STEPS}; go on with the same command and --resume"
    assert "Traceback" not in log_of(tmp_path)
    assert load_pair(folder, step)[1]["step"] == step
    assert server.wait(server.start(settings, tmp_path / "log.txt", resume=True)) == 0, log_of(tmp_path)
    assert_same_ends(folder, Path(config.run_dir))

"""A checkpoint of a run is a whole pair of files at any moment, or it is not there."""

import os
import resource
import shutil
import signal
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from claver.config import Config
from claver.training import run_folder
from claver.training.run_folder import clean, load_pair, save_pair, saved_steps, weights_of
from claver.weights.checkpoint import CheckpointError
from small import small_model

WEIGHTS = {"a": torch.arange(1000.0)}


def save(folder, step, *, keep=2, weights=WEIGHTS, **state):
    config = Config(model=small_model())
    save_pair(folder, weights, config, ["x"], [["an x"]], epoch=step // 10, step=step, state=state, keep=keep)


def names(folder):
    return sorted(os.listdir(folder))


def pair(*steps):
    return sorted(f"step_{step:08d}.{kind}" for step in steps for kind in ("safetensors", "state.pt"))


def test_the_last_checkpoints_are_kept(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, value=step, optimizer={"x": torch.ones(2)})
    assert saved_steps(tmp_path) == [10, 100]
    assert names(tmp_path) == pair(10, 100)
    content, state = load_pair(tmp_path, 10)
    assert torch.equal(content["model"]["a"], WEIGHTS["a"])
    assert (content["step"], content["epoch"], state["value"]) == (10, 1, 10)
    assert torch.equal(state["optimizer"]["x"], torch.ones(2))


def test_the_state_comes_after_its_weights_and_goes_before_them(tmp_path, monkeypatch):
    """So whatever is killed where, a state has its weights beside it."""
    seen = []

    def watch(name, call):
        def watched(*args, **kwargs):
            result = call(*args, **kwargs)
            seen.append((names(tmp_path), saved_steps(tmp_path)))
            return result

        monkeypatch.setattr(os, name, watched)

    save(tmp_path, 1)
    for name in ("replace", "unlink"):
        watch(name, getattr(os, name))
    save(tmp_path, 2, keep=1)
    assert len(seen) >= 4
    for found, whole in seen:
        assert whole
        assert [n for n in found if n.endswith(".pt")] == [n for n in pair(*whole) if n.endswith(".pt")]


def test_weights_without_a_state_and_parts_of_files_are_no_checkpoint_and_go_at_the_next_start(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / pair(2)[1]).unlink()
    (tmp_path / "step_00000003.safetensors.77.partial").write_bytes(b"half")
    (tmp_path / "history.jsonl").write_text("")
    assert saved_steps(tmp_path) == [1]
    clean(tmp_path, keep=1)
    assert names(tmp_path) == sorted(["history.jsonl", *pair(1)])
    save(tmp_path, 4)
    clean(tmp_path, keep=2)
    assert saved_steps(tmp_path) == [1, 4]
    clean(tmp_path, keep=1)  # of a process that was killed before it removed the other
    assert names(tmp_path) == sorted(["history.jsonl", *pair(4)])
    (tmp_path / "best.safetensors").write_bytes(b"")
    clean(tmp_path, keep=0)
    assert names(tmp_path) == ["history.jsonl"]


@contextmanager
def full_disk(room: int):
    """No file may become larger than `room` bytes: writes fail in the middle of a file as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [100, 3000, 8000])
def test_a_full_disk_is_named_and_leaves_the_checkpoints_before_and_nothing_else(tmp_path, room):
    """It fails in the header of the weights, in the weights, and in the state, which is larger."""
    save(tmp_path, 1)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    failing = "state.pt" if room == 8000 else "safetensors"
    with (
        full_disk(room),
        pytest.raises(OSError, match=rf"step_00000002\.{failing}: cannot be written .* GB are free there"),
    ):
        save(tmp_path, 2, optimizer=torch.ones(10_000))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_folder_that_cannot_be_written_to_is_named_and_left_as_it_was():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        check_a_closed_folder(folder)
    finally:
        folder.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)


def check_a_closed_folder(folder):
    save(folder, 1)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    child = os.fork()
    if child == 0:  # root may write anywhere
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            save(folder, 2)
        except OSError as error:
            os._exit(0 if "step_00000002.safetensors: cannot be written" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(folder) == pair(1)


def test_a_damaged_or_foreign_state_is_refused_by_name(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    states = [tmp_path / name for name in names(tmp_path) if name.endswith(".pt")]
    whole = states[0].read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], states[1].read_bytes(), b"no state"):
        states[0].write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step_00000001\.state\.pt: not the state"):
            load_pair(tmp_path, 1)
    torch.save([1], states[0])
    with pytest.raises(CheckpointError, match=r"step_00000001\.state\.pt: not the state"):
        load_pair(tmp_path, 1)
    weights_of(tmp_path, 2).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"step_00000002\.safetensors: not a checkpoint"):
        load_pair(tmp_path, 2)


def test_a_state_runs_no_code(tmp_path):
    class Command:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'executed'}",))

    save(tmp_path, 1)
    torch.save({"format": run_folder.STATE_FORMAT, "step": 1, "x": Command()}, tmp_path / pair(1)[1])
    with pytest.raises(CheckpointError, match="not the state"):
        load_pair(tmp_path, 1)
    assert not (tmp_path / "executed").exists()

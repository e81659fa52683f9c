"""The choice of a configuration, and the file in which timings are kept."""

import json
import warnings
from dataclasses import asdict

import pytest
import torch

from kronmask import masks
from kronmask.kernels.config import TABLE, Config, architecture, cache_file, choose, options, tune
from kronmask.kernels.tiles import Blocks

CANDIDATES = [Config(kind, Blocks(64, 64), 4, stages) for kind in ("token", "packed") for stages in (2, 3)]


def timed(run):
    """Takes the candidate itself for the time of a call."""
    return run()


def time_of(config):
    return {("token", 2): 4.0, ("token", 3): 3.0, ("packed", 2): 1.0, ("packed", 3): 2.0}[
        config.kind, config.num_stages
    ]


def test_the_fastest_candidate_is_chosen_and_kept(tmp_path):
    path = tmp_path / "folder" / "autotune.json"
    assert tune("a", CANDIDATES, time_of, path, timed) == CANDIDATES[2]
    assert tune("b", CANDIDATES[:2], time_of, path, timed) == CANDIDATES[1]

    def fail(config):
        raise AssertionError("timed again")

    assert tune("a", CANDIDATES, fail, path, timed) == CANDIDATES[2]
    assert set(json.loads(path.read_text())) == {"a", "b"}
    assert [file.name for file in path.parent.iterdir()] == ["autotune.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff", '{"a": 5}', '{"a": {"kind": "token"}}'])
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(content, tmp_path):
    path = tmp_path / "autotune.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match="timing again"):
        assert tune("a", CANDIDATES, time_of, path, timed) == CANDIDATES[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tune("a", CANDIDATES, time_of, path, timed) == CANDIDATES[2]
    assert json.loads(path.read_text())["a"] == asdict(CANDIDATES[2])


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not keep the timings"):
        assert tune("a", CANDIDATES, time_of, tmp_path / "file" / "autotune.json", timed) == CANDIDATES[2]


def test_the_file_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "kronmask" / "autotune.json"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("arch", TABLE)
def test_every_architecture_has_options_for_every_head_dimension(arch, head_dim, dtype):
    for step in ("forward", "backward_query", "backward_key"):
        assert options(step, arch, head_dim, dtype)


def test_the_cpu_is_the_interpreter_and_is_never_timed(monkeypatch):
    monkeypatch.setenv("KRONMASK_AUTOTUNE", "1")
    assert architecture(torch.device("cpu")) == "interpreter"

    def fail(config):
        raise AssertionError("timed on the CPU")

    config = choose("forward", masks.kmt(8, 197), torch.empty(1, 1, 8 * 197, 64), fail)
    assert config.blocks in {Blocks(64, 64), Blocks(32, 32)}

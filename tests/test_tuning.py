"""Measured choices: which candidate is taken, what is kept and where, and when nothing may be measured.

The GPU is a fake: its name, the timer and whether it is busy are set; everything else runs.
"""

import json
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kronmask import tuning

GPU = torch.device("cpu")  # which the fixture says to be one


@pytest.fixture(autouse=True)
def _fake_gpu(monkeypatch, tmp_path):
    """A candidate returns the milliseconds that it takes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KRONMASK_AUTOTUNE", raising=False)
    monkeypatch.delenv("KRONMASK_AUTOTUNE_FILE", raising=False)
    monkeypatch.setattr(tuning, "measure", lambda calls, device: {name: float(call()) for name, call in calls.items()})
    monkeypatch.setattr(tuning, "_measured", {})


def taking(**milliseconds):
    return {name: (lambda value=value: value) for name, value in milliseconds.items()}


def forget(monkeypatch):
    """As in another process."""
    monkeypatch.setattr(tuning, "_measured", {})


def kept():
    return json.loads(tuning.cache_file().read_text())


def fail():
    raise RuntimeError("out of registers")


def test_the_fastest_is_taken_and_kept_for_the_next_process(monkeypatch):
    assert tuning.recall("a", ["slow", "fast"]) is None
    assert tuning.fastest("a", taking(slow=3, fast=1, middle=2), GPU) == "fast"
    assert tuning.fastest("b", taking(slow=3, middle=2), GPU) == "middle"
    forget(monkeypatch)
    assert tuning.recall("a", ["slow", "fast"]) == "fast"
    assert tuning.recall("b", ["slow", "middle"]) == "middle"
    assert tuning.recall("c", ["slow", "fast"]) is None
    assert kept()["a"] == {"choice": "fast", "milliseconds": {"slow": 3, "fast": 1, "middle": 2}}
    assert {file.name for file in tuning.cache_file().parent.iterdir()} == {"autotune.json", "autotune.lock"}


def test_one_line_says_what_was_chosen_and_by_how_much(caplog):
    caplog.set_level(logging.INFO, "kronmask")
    tuning.fastest("the case", {**taking(slow=3, fast=1.5), "broken": fail}, GPU, lambda name: None)
    (record,) = caplog.records
    assert record.name == "kronmask"
    assert record.getMessage() == (
        "the case: fast, 1.500 ms, slow 3.000 ms (2.00 x); not broken: RuntimeError: out of registers"
    )


def test_who_raises_or_is_wrong_is_left_out(caplog):
    def check(name):
        return "output is off by 7 x its bound" if name == "wrong" else None

    caplog.set_level(logging.INFO, "kronmask")
    assert tuning.fastest("a", {"broken": fail, **taking(wrong=1, right=2)}, GPU, check) == "right"
    assert set(kept()["a"]["milliseconds"]) == {"right"}
    assert "not wrong: output is off by 7 x its bound" in caplog.text


def test_where_all_fail_nothing_is_chosen_or_kept(caplog):
    assert tuning.fastest("a", {"broken": fail}, GPU) is None
    assert tuning.fastest("b", taking(wrong=1), GPU, lambda name: "wrong") is None
    assert not tuning.cache_file().exists()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "out of registers" in caplog.text


def test_a_timer_that_fails_ends_nothing(monkeypatch, caplog):
    def out_of_memory(calls, device):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(tuning, "measure", out_of_memory)
    assert tuning.fastest("a", taking(one=1), GPU) is None
    assert "timing failed: OutOfMemoryError: tried to allocate" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff", '{"a": 5}', '{"a": {"choice": "gone"}}'])
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(content, monkeypatch):
    path = tuning.cache_file()
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match="timing again"):
        assert tuning.recall("a", ["one"]) is None
    assert tuning.fastest("a", taking(one=1), GPU) == "one"
    forget(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.recall("a", ["one"]) == "one"


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not keep the choice"):
        assert tuning.fastest("a", taking(one=1), GPU) == "one"
    assert tuning.recall("a", ["one"]) == "one"  # in this process


def test_the_file_lies_in_the_users_cache(tmp_path):
    assert tuning.cache_file() == tmp_path / "kronmask" / "autotune.json"


def test_writers_side_by_side_lose_nothing_of_each_other():
    def write(writer):
        for i in range(20):
            tuning._keep(f"{writer} {i}", {"choice": "one"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(kept()) == 160


def test_choices_are_exported_and_shipped(monkeypatch, tmp_path):
    tuning.fastest("a", taking(one=1, two=2), GPU)
    assert tuning.export(tmp_path / "shipped.json") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    forget(monkeypatch)
    assert tuning.recall("a", ["one", "two"]) is None
    monkeypatch.setenv("KRONMASK_AUTOTUNE_FILE", str(tmp_path / "shipped.json"))
    assert tuning.recall("a", ["one", "two"]) == "one"
    before = (tmp_path / "shipped.json").read_text()
    tuning.fastest("b", taking(one=1, two=2), GPU)
    assert (tmp_path / "shipped.json").read_text() == before
    assert set(kept()) == {"b"}
    assert tuning.export(tmp_path / "both.json") == 2
    assert set(json.loads((tmp_path / "both.json").read_text())) == {"a", "b"}


def test_what_is_shipped_goes_before_what_was_measured(monkeypatch, tmp_path):
    tuning.fastest("a", taking(one=1, two=2), GPU)
    (tmp_path / "shipped.json").write_text('{"a": {"choice": "two"}}')
    monkeypatch.setenv("KRONMASK_AUTOTUNE_FILE", str(tmp_path / "shipped.json"))
    forget(monkeypatch)
    assert tuning.recall("a", ["one", "two"]) == "two"


# ---- when nothing may be measured -----------------------------------------------------------------------------------


@pytest.fixture
def _ready_gpu(monkeypatch):
    monkeypatch.setattr(tuning, "is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())  # any context will do


def test_the_cpu_is_never_measured():
    assert not tuning.may_measure(torch.empty(1))


@pytest.mark.usefixtures("_ready_gpu")
def test_a_gpu_is_measured_unless_forbidden(monkeypatch):
    assert tuning.may_measure(torch.empty(1))
    monkeypatch.setenv("KRONMASK_AUTOTUNE", "0")
    assert not tuning.may_measure(torch.empty(1))


@pytest.mark.usefixtures("_ready_gpu")
def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tuning.may_measure(torch.empty(1))


@pytest.mark.usefixtures("_ready_gpu")
def test_nothing_is_measured_while_tracing(monkeypatch):
    with FakeTensorMode():
        assert not tuning.may_measure(torch.empty(1))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not tuning.may_measure(torch.empty(1))


@pytest.mark.usefixtures("_ready_gpu")
def test_a_process_measures_a_bounded_number_of_cases(monkeypatch, caplog):
    monkeypatch.setattr(tuning, "MOST", 2)
    tuning.fastest("a", taking(one=1), GPU)
    assert tuning.may_measure(torch.empty(1))
    tuning.fastest("b", taking(one=1), GPU)
    assert not tuning.may_measure(torch.empty(1))
    assert "2 cases were measured" in caplog.text

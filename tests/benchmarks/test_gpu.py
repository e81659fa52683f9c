"""`make gpu` on a machine without a GPU, and its reading of what pytest reports."""

import subprocess
import sys

import gpu
import pytest
import torch

from kronmask import masks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("something was run"))
    with pytest.raises(SystemExit, match="sees none here; nothing was run"):
        gpu.main([])


def test_a_report_is_read(tmp_path):
    tests = """
import pytest
@pytest.mark.parametrize("x", [1, 2, 3])
def test_small(x):
    assert x < 3, "x is three"
def test_skipped():
    pytest.skip("why")
"""
    (tmp_path / "test_it.py").write_text(tests)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        f"--junitxml={tmp_path / 'report.xml'}",
        tmp_path,
    ]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    rows, failed = gpu.read_report(tmp_path / "report.xml")
    counts = [(row["test"], row["passed"], row["failed"], row["skipped"]) for row in rows]
    assert counts == [("test_it.test_small", 2, 1, 0), ("test_it.test_skipped", 0, 0, 1)]
    assert [case["case"] for case in failed] == ["test_small[3]"]
    assert "x is three" in failed[0]["message"]


def test_the_suites_exist():
    assert all((gpu.ROOT / suite).exists() for suite in gpu.SUITES)


def test_the_model_is_compared_to_what_is_measured_on_this_gpu(monkeypatch):
    def row(arch, step, estimated):
        return {
            "arch": arch, "step": step, "head_dim": 16, "mask": "kmct", "frames": 3, "tokens": 5, "estimated": estimated
        }  # fmt: skip

    report = {
        "masks": [row("sm_90", "forward", 0.5), row("sm_90", "backward_query", 0.25), row("sm_80", "forward", 0.75)]
    }
    report["masks"] += [
        row("sm_90", "backward_key", 0.75),
        {**row("sm_90", "forward", 0), "mask": "kmt", "estimated": 0.9},
    ]
    passes = gpu._passes
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(gpu, "_passes", lambda mask, head_dim, backend, device: passes(mask, head_dim, "sdpa", device))
    rows = list(gpu.compare_to_model(report, torch.device("cpu")))
    assert [(row["mask"], row["pass"], row["modelled"]) for row in rows] == [
        ("kmct", "forward", 0.5), ("kmct", "backward", 0.5), ("kmt", "forward", 0.9), ("kmt", "backward", None)
    ]  # fmt: skip
    assert all(row["measured"] > 0 for row in rows)
    assert not list(gpu.compare_to_model({"kernels": []}, torch.device("cpu")))  # a report without masks


def test_the_passes_are_those_of_attention():
    calls = gpu._passes(masks.kmt(2, 3), 16, "sdpa", torch.device("cpu"))
    assert calls["forward"]().shape == (4, 12, 6, 16)
    assert [grad.shape for grad in calls["backward"]()] == [(4, 12, 6, 16)] * 3

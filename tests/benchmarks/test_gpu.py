"""`make gpu` on a machine without a GPU, and its reading of what pytest reports."""

import subprocess
import sys

import gpu
import pytest
import torch


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

"""A file that is replaced is whole at any moment, and a failure leaves nothing beside it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import claver
import pytest
from claver.figures import save_figure
from claver.files import replace_file, write_text
from matplotlib.figure import Figure

FOLDER = Path(claver.__file__).parent


def test_a_file_has_its_old_content_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    for old, new in ((None, "one"), ("one", "two")):
        with replace_file(path) as partial:
            partial.write_text(new)
            assert (path.read_text() if path.exists() else None) == old
            assert partial.parent == path.parent  # on the same disk: a rename and no copy
        assert path.read_text() == new
        assert os.listdir(tmp_path) == ["a.txt"]


def write_half(path, error):
    with replace_file(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_content_and_name_are_on_the_disk_before_it_is_done(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with replace_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert synced == [str(partial), str(tmp_path)]


def test_a_writer_that_wrote_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "a.txt"):
        pass


def test_what_a_killed_process_left_goes_and_what_one_still_writes_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, other, alive = (
        tmp_path / f"{name}.{process}.partial"
        for name, process in (("a.txt", gone.pid), ("b.txt", gone.pid), ("a.txt", os.getppid()))
    )
    for path in (left, other, alive):
        path.write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.txt", other, alive])


def test_a_process_that_is_killed_again_and_again_leaves_one_file(tmp_path):
    program = f"""
import os, signal
from claver.files import replace_file
with replace_file({str(tmp_path / "a.txt")!r}) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == -signal.SIGKILL
        assert len(os.listdir(tmp_path)) == 1
    write_text(tmp_path / "a.txt", "whole")
    assert os.listdir(tmp_path) == ["a.txt"]


WRITES = re.compile(r"save_file\(|\.write_(text|bytes)\(|savefig\(|open\(.*[\"'][wax]b?[\"']")


def test_every_file_is_written_under_another_name_first():
    lines = [
        (path.name, line.strip())
        for path in [*FOLDER.rglob("*.py"), FOLDER.with_name("stream.py")]
        for line in path.read_text().splitlines()
        if WRITES.search(line.split("#")[0]) and "`" not in line
    ]
    assert len(lines) > 10
    assert not [(name, line) for name, line in lines if "partial" not in line]


def test_a_figure_has_the_format_of_its_name_and_a_failure_leaves_nothing(tmp_path):
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a", b"\x89PNG")):
        save_figure(Figure(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(Figure(), tmp_path / "a.nonsense")
    assert sorted(os.listdir(tmp_path)) == ["a", "a.pdf", "a.png"]

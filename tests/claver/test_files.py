"""A file that is replaced is whole at any moment, and a failure leaves nothing beside it."""

import os

import pytest
from claver.files import replace_file


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

"""A scan finds what is missing, broken, short or there twice, says how much there is, and tells by its status."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from claver.config import Config, DataConfig
from claver.data.lists import DatasetError
from claver.data.scan import Look, look_at, scan, scan_lists, table
from claver.data.shards import write_shards
from claver.data.videos import read_videos
from small import small_model
from video_files import keyframe_bytes, write_video

CLASSES = ["waving", "running", "archery"]
TRAIN = "a.mp4 0\nb.avi 1\ngone.mp4 0\nempty.mp4 1\ncut.mp4 0\nshort.mp4 1\ntwin.mp4 0\ndamaged.mp4 0\n"
TEST = "copy of a.mp4 1\nb.avi 1\nc.mp4 0\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """H.264 and MPEG-4 files, some of them faulty, in a training and a test list."""
    root = tmp_path_factory.mktemp("videos")
    a = write_video(root / "a.mp4", 20).read_bytes()
    write_video(root / "b.avi", 15, codec="mpeg4")
    write_video(root / "c.mp4", 25)
    write_video(root / "short.mp4", 3)
    damaged = write_video(root / "damaged.mp4", 50, size=(320, 192))
    position, size = keyframe_bytes(damaged)[2]
    data = bytearray(damaged.read_bytes())
    data[position + size // 2 : position + size // 2 + 8] = b"\xaa\x55" * 4
    damaged.write_bytes(data)
    for name in ("twin.mp4", "copy of a.mp4"):
        (root / name).write_bytes(a)
    (root / "cut.mp4").write_bytes(a[: len(a) // 2])
    (root / "empty.mp4").touch()
    (root / "train.txt").write_text(TRAIN)
    (root / "test.txt").write_text(TEST)
    (root / "labels.csv").write_text("id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(CLASSES)))
    data_config = DataConfig(str(root), str(root / "train.txt"), str(root / "test.txt"), str(root / "labels.csv"))
    return Config(run_dir=str(root / "run"), data=data_config, model=small_model())  # clips of 4 frames


def read(config: Config) -> dict:
    data = config.data
    return {
        name: read_videos(path, data.root, CLASSES)
        for name, path in (("train", data.train_list), ("test", data.test_list))
    }


def short(entry: str | list) -> str | list:
    return os.path.basename(entry) if isinstance(entry, str) else [short(each) for each in entry]


@pytest.mark.parametrize("deep", [False, True])
def test_every_fault_is_found_and_named(config: Config, deep: bool, tmp_path: Path, capsys) -> None:
    output = tmp_path / "folder" / "report.json"
    assert scan(config, deep=deep, processes=2, output=str(output)) == 1
    report = json.loads(output.read_text())
    train, test = report["lists"]["train"], report["lists"]["test"]
    assert (train["videos"], test["videos"], report["deep"]) == (8, 3, deep)
    assert short(train["missing"]) == ["gone.mp4"]
    assert [short(path) for path, _ in train["broken"]] == ["empty.mp4", "cut.mp4", *(["damaged.mp4"] if deep else [])]
    reasons = [reason for _, reason in train["broken"]]
    assert reasons[0] == "the file is empty (0 bytes)"
    assert "truncated" in reasons[1] or "not a video" in reasons[1]
    assert not deep or reasons[2].endswith("of 50 is damaged")
    assert [(short(path), frames) for path, frames in train["short"]] == [("short.mp4", 3)]
    assert test["missing"] == test["broken"] == test["short"] == []
    groups = [[(name, short(path), label) for name, path, label in group] for group in report["duplicates"]]
    assert groups == [
        [("train", "a.mp4", "waving"), ("train", "twin.mp4", "waving"), ("test", "copy of a.mp4", "running")],
        [("train", "b.avi", "running"), ("test", "b.avi", "running")],
    ]
    assert train["histogram"] == {"waving": 5, "running": 3, "archery": 0}
    assert test["seconds"] == pytest.approx((20 + 15 + 25) / 25, abs=0.01)
    assert train["hash"] == read(config)["train"].hash
    assert report["faults"] == 6 + deep
    printed = capsys.readouterr().out
    for text in ("gone.mp4", "empty.mp4: the file is empty", "short.mp4: 3 frames", "in train and test: ", "archery"):
        assert text in printed
    assert str(output) in printed


def test_a_clean_configuration_has_status_0(config: Config, tmp_path: Path, capsys) -> None:
    root = Path(config.data.root)
    (tmp_path / "train.txt").write_text("c.mp4 0\n")
    (tmp_path / "test.txt").write_text("a.mp4 1\n")
    data = dataclasses.replace(
        config.data, train_list=str(tmp_path / "train.txt"), test_list=str(tmp_path / "test.txt")
    )
    assert scan(dataclasses.replace(config, data=data, run_dir=str(tmp_path / "run")), deep=True, processes=1) == 0
    assert json.loads((tmp_path / "run" / "scan.json").read_text())["faults"] == 0
    assert "no faults" in capsys.readouterr().out
    assert root.is_dir()
    with pytest.raises(DatasetError, match=r"nowhere\.csv"):
        scan(dataclasses.replace(config, data=dataclasses.replace(config.data, labels="nowhere.csv")))


def test_a_line_that_stands_twice_is_a_duplicate_also_of_a_broken_file(config: Config, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone.mp4 0\ngone.mp4 1\nempty.mp4 0\nc.mp4 0\nc.mp4 0\n")
    source = read_videos(tmp_path / "list.txt", config.data.root, CLASSES)
    report = scan_lists({"train": source}, CLASSES, 4, processes=1, progress=False)
    assert [[short(name) for _, name, _ in group] for group in report.duplicates] == [["gone.mp4"] * 2, ["c.mp4"] * 2]
    assert (len(report.lists["train"].missing), len(report.lists["train"].broken)) == (1, 1)
    assert report.lists["train"].seconds == pytest.approx(2, abs=0.01)


def test_shards_are_scanned_as_the_list_they_hold(config: Config, tmp_path: Path) -> None:
    source = read(config)["test"]
    write_shards([*source.samples, source.samples[0]], tmp_path, root=config.data.root, progress=False)
    shards = read_videos(tmp_path, None, CLASSES)
    report = scan_lists({"test": shards}, CLASSES, 21, deep=True, processes=1, progress=False)
    (group,) = report.duplicates
    assert [short(name) for _, name, _ in group] == ["00000000.mp4", "00000003.mp4"]
    assert [frames for _, frames in report.lists["test"].short] == [20, 15, 20]


def test_equal_sizes_alone_are_no_duplicates(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.mp4").write_bytes(bytes([i]) * 100)
    (tmp_path / "list.txt").write_text("0.mp4 0\n1.mp4 0\n")
    source = read_videos(tmp_path / "list.txt", tmp_path, CLASSES)
    assert scan_lists({"train": source}, CLASSES, 4, processes=1, progress=False).duplicates == []


def test_one_look(config: Config) -> None:
    root = Path(config.data.root)
    assert look_at(str(root / "gone.mp4")) == Look(problem="no such file")
    assert look_at(str(root / "c.mp4")) == Look((root / "c.mp4").stat().st_size, 25, 1.0)
    assert look_at(str(root)).problem.startswith("is a directory")


def test_the_table_names_a_few_of_many(config: Config, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4 {i % 3}\n" for i in range(50)))
    source = read_videos(tmp_path / "list.txt", tmp_path, CLASSES)
    report = scan_lists({"train": source}, CLASSES, 4, processes=1, progress=False)
    text = table(report)
    assert "missing: 50" in text
    assert "... and 30 more" in text
    assert text.count(".mp4") == 20
    many = dataclasses.replace(report.lists["train"], histogram={f"class {i}": i for i in range(1, 101)}, missing=[])
    text = table(dataclasses.replace(report, lists={"train": many}))
    assert [line.split()[-1] for line in text.splitlines() if "class " in line][:10] == [
        str(100 - i) for i in range(10)
    ]
    assert "... 80 more" in text

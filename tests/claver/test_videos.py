"""A list, a folder of classes, a tar file and shards give the same samples, and the same evaluation to the bit."""

from __future__ import annotations

import dataclasses
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from claver.config import Config, DataConfig
from claver.data.few_shot import write_classes
from claver.data.lists import DatasetError, list_hash
from claver.data.motions import MOTIONS
from claver.data.pack import pack
from claver.data.shards import write_shards
from claver.data.video import read_frames
from claver.data.videos import kind_of, read_videos
from claver.evaluation.evaluate import run_evaluation
from claver.model import build_model
from claver.prompts.build import build_prompts
from claver.text import tokens_of
from claver.training.run_folder import load_pair
from claver.training.step import TrainStep
from claver.training.train import Stopped, train
from claver.weights.checkpoint import CheckpointError
from small import small_config, small_model
from video_files import write_video

CLASSES = ["apply eye makeup", "BMX riding", "tai chi", "archery"]
FOLDERS = {"ApplyEyeMakeup": 0, "BMX riding": 1, "tai_chi": 2}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ten videos in three folders of classes, and the same in each other form, in the same order."""
    base = tmp_path_factory.mktemp("sources")
    names = ["tai_chi/b.avi", *(f"{folder}/{i}.v{i}.mp4" for folder in FOLDERS for i in range(3))]
    folder = base / "my videos"
    for number, name in enumerate(sorted(names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, 8 + number, size=(48, 32), codec="mpeg4" if name.endswith("avi") else "libx264")
    lines = [f"{name} {FOLDERS[name.partition('/')[0]]}" for name in sorted(names)]
    (base / "list.txt").write_text("\n".join(lines))
    with tarfile.open(base / "a.tar", "w") as archive:
        archive.add(folder, "outer")
    listed = read_videos(base / "list.txt", folder, CLASSES)
    write_shards(listed.samples, base / "shards", root=folder, per_shard=4, progress=False)
    return {"list": base / "list.txt", "folder": folder, "tar": base / "a.tar", "shards": base / "shards"}


def test_all_forms_give_the_same_samples(sources: dict[str, Path]) -> None:
    found = {kind: read_videos(path, sources["folder"], CLASSES) for kind, path in sources.items()}
    assert [videos.kind for videos in found.values()] == list(found)
    expected = found["list"].samples
    assert [sample.label for sample in expected] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    frames = [read_frames(sample.path, [0, 7]).numpy() for sample in expected]
    for videos in found.values():
        assert [sample.label for sample in videos.samples] == [sample.label for sample in expected]
        for sample, frame in zip(videos.samples, frames, strict=True):
            assert np.array_equal(read_frames(sample.path, [0, 7]).numpy(), frame)


def test_equal_content_has_an_equal_hash_whatever_its_form(sources: dict[str, Path], tmp_path: Path) -> None:
    root = sources["folder"]
    hashes = {read_videos(path, root, CLASSES).hash for path in sources.values()}
    assert hashes == {list_hash(read_videos(sources["list"], root, CLASSES).samples, root)}
    assert {read_videos(sources[kind], tmp_path, CLASSES).hash for kind in ("folder", "tar", "shards")} == hashes
    samples = read_videos(sources["tar"], None, CLASSES).samples
    write_shards(samples, tmp_path / "from tar", progress=False)
    assert read_videos(tmp_path / "from tar", None, CLASSES).hash in hashes
    write_shards(samples[:-1], tmp_path / "fewer", progress=False)
    assert read_videos(tmp_path / "fewer", None, CLASSES).hash not in hashes


def test_all_forms_give_the_same_evaluation_to_the_bit(sources: dict[str, Path], tmp_path: Path) -> None:
    config = small_config(tmp_path, num_train=8)
    torch.manual_seed(0)
    model = build_model(small_model()).eval()
    tokens = tokens_of(build_prompts(CLASSES, ["a video of {}.", "{}."]), model)
    results = []
    for path in sources.values():
        data = dataclasses.replace(config.data, root=str(sources["folder"]), test_list=str(path))
        results.append(run_evaluation(dataclasses.replace(config, data=data), model, tokens, CLASSES))
    for result in results[1:]:
        assert torch.equal(result.probabilities, results[0].probabilities)
        assert torch.equal(result.labels, results[0].labels)
    assert len(results[0].probabilities.unique(dim=0)) == 10  # the videos are told apart


def test_texts_of_other_classes_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    config = small_config(tmp_path, num_train=8)
    model = build_model(small_model())
    with pytest.raises(ValueError, match="8 classes, but texts of 4"):
        run_evaluation(config, model, tokens_of(build_prompts(CLASSES, ["{}"]), model))


@pytest.mark.parametrize("kind", ["folder", "tar", "shards"])
def test_training_takes_each_form(kind: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, num_train=16, epochs=1)
    classes = [line.split(",")[1] for line in Path(config.data.labels).read_text().splitlines()[1:]]
    samples = read_videos(config.data.train_list, config.data.root, classes).samples
    forms = {"folder": tmp_path / "classes", "tar": tmp_path / "a.tar", "shards": tmp_path / "shards"}
    for path, label in samples:
        target = tmp_path / "classes" / classes[label].replace(" ", "_") / Path(str(path)).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(str(path)).read_bytes())
    with tarfile.open(forms["tar"], "w") as archive:
        archive.add(forms["folder"], ".")
    write_shards(samples, forms["shards"], per_shard=5, progress=False)
    data = dataclasses.replace(config.data, train_list=str(forms[kind]))
    run = train(dataclasses.replace(config, data=data))
    assert [record["step"] for record in run.history] == [2, 2]


def test_which_form_a_path_has(sources: dict[str, Path], tmp_path: Path) -> None:
    assert {kind: kind_of(path) for kind, path in sources.items()} == {kind: kind for kind in sources}
    shards = sources["shards"]
    for pattern in (shards / "shards-000001.tar", shards / "shards-{000000..000002}.tar", shards / "*.tar"):
        assert kind_of(pattern) == "shards"
    (tmp_path / "list [1].txt").write_text("a.mp4 0")
    assert kind_of(tmp_path / "list [1].txt") == "list"
    with pytest.raises(DatasetError, match=r"absent\.txt: cannot be read"):
        read_videos(tmp_path / "absent.txt", None, CLASSES)
    with pytest.raises(DatasetError, match=r"absent\.tar: cannot be read"):
        read_videos(tmp_path / "absent.tar", None, CLASSES)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ApplyEyeMake/a.mp4", "ApplyEyeMake: is the name of no class; the nearest is 'apply eye makeup'"),
        ("bmx_riding/a.mp4", "bmx_riding: is the name of no class; the nearest is 'BMX riding'"),
        ("apply_eye_makeup/a.mp4", "apply_eye_makeup: is the same class as ApplyEyeMakeup"),
        ("archery/deep/a.mp4", "archery/deep/a.mp4: is too deep"),
        ("archery/notes.txt", "archery/notes.txt: is no video by its ending"),
        ("a.mp4", "a.mp4: is in no class's folder"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_is_not_a_class_or_a_video_is_refused_by_name(kind: str, name: str, reason: str, tmp_path: Path) -> None:
    names = ["ApplyEyeMakeup/a.mp4", "tai chi/b.mp4", name]
    folder = tmp_path / "folder"
    for each in names:
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).write_bytes(b"x")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for each in names:
            archive.add(folder / each, each)
    with pytest.raises(DatasetError, match=re.escape(reason)):
        read_videos(folder if kind == "folder" else tmp_path / "a.tar", None, CLASSES)


def test_files_beside_the_classes_and_hidden_ones_are_passed_over(tmp_path: Path) -> None:
    for name in ("archery/a.mp4", "archery/.DS_Store", ".cache/a.mp4", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert read_videos(tmp_path, None, CLASSES).samples == [(str(tmp_path / "archery/a.mp4"), 3)]
    (tmp_path / "archery/a.mp4").unlink()
    with pytest.raises(DatasetError, match="no videos in it"):
        read_videos(tmp_path, None, CLASSES)


@pytest.mark.parametrize("kind", ["list", "folder", "tar"])
def test_the_command_packs_either_list_and_keeps_the_hash_where_it_keeps_the_order(
    kind: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(sources[kind])
    root = str(sources["folder"] if kind == "list" else tmp_path)
    write_classes(tmp_path / "labels.csv", CLASSES)
    data = DataConfig(root=root, train_list=path, test_list=path, labels=str(tmp_path / "labels.csv"))
    source = read_videos(path, data.root, CLASSES)
    assert pack(Config(data=data), folder=str(tmp_path / "test"), which="test", per_shard=3) == 0
    assert f"10 videos in 4 shards, hash {source.hash} (of {path}: {source.hash})" in capsys.readouterr().out
    pack(Config(data=data), folder=str(tmp_path / "train"))
    mixed = read_videos(tmp_path / "train", None, CLASSES)
    assert "mixed by the seed 3047" in capsys.readouterr().out
    assert mixed.hash != source.hash
    assert sorted(sample.label for sample in mixed.samples) == [sample.label for sample in source.samples]


def test_a_run_on_shards_goes_on_exactly_and_with_no_other_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, num_train=24, epochs=2)
    samples = read_videos(config.data.train_list, config.data.root, MOTIONS).samples
    write_shards(samples, tmp_path / "shards", per_shard=5, progress=False)
    data = dataclasses.replace(config.data, train_list=str(tmp_path / "shards"))
    whole = train(dataclasses.replace(config, data=data, run_dir=str(tmp_path / "whole")))
    config = dataclasses.replace(config, data=data)
    step, steps = TrainStep.__call__, []

    def stop_in_the_second_epoch(self: TrainStep, *args: object, **options: object) -> object:
        steps.append(1)
        return step(self, *args, **{**options, "stop": len(steps) == 4})

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stop_in_the_second_epoch)
        with pytest.raises(Stopped, match="stopped after step 4 of 6"):
            train(config)
    with monkeypatch.context() as patch:
        patch.setattr(
            "claver.training.prepare.load_pair",
            lambda *args: (lambda a, b: (a, b | {"processes": 2}))(*load_pair(*args)),
        )
        with pytest.raises(CheckpointError, match="the run had 2 processes, and this is 1: which videos of shards"):
            train(config, resume=True)
    resumed = train(config, resume=True)
    for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)

"""Videos that cannot be read stop a run, or are counted, named and bounded; in an evaluation they are wrong at best."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from claver.config import DataConfig, TestConfig
from claver.data.augment import AugmentConfig
from claver.data.broken import BrokenFiles
from claver.data.datasets import TrainDataset, set_epoch, train_loader
from claver.data.lists import DatasetError, Sample
from claver.data.motions import MOTIONS
from claver.data.shards import read_shards, write_shards
from claver.data.video import VideoError
from claver.data.videos import read_videos
from claver.evaluation.evaluate import run_evaluation
from claver.training.step import TrainStep
from claver.training.train import Stopped, train
from small import small_config
from video_files import write_video

SMALL = AugmentConfig(size=16, short_side=16)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Twelve videos, of which 2 is missing and 7 is no video."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(12):
        write_video(root / f"{i}.mp4", 6 + i % 3, size=(32, 32))
    (root / "2.mp4").unlink()
    (root / "7.mp4").write_bytes(b"no video" * 50)
    return [Sample(str(root / f"{i}.mp4"), i % 5) for i in range(12)]


def skipping(samples: list[Sample]) -> TrainDataset:
    return TrainDataset(samples, 2, SMALL, seed=3, skip_broken=True)


def names(errors: list[tuple[str, str]]) -> list[str]:
    return [Path(name).name for name, _ in errors]


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["video"], b["video"]) and torch.equal(a["index"], b["index"]) and a["errors"] == b["errors"]


# Training


def test_another_video_takes_the_place_of_a_broken_one_and_the_item_names_it(samples: list[Sample]) -> None:
    dataset, plain = skipping(samples), TrainDataset(samples, 2, SMALL, seed=3)
    for i in range(12):
        item = dataset[i]
        if i not in (2, 7):
            assert (item["index"], item["errors"]) == (i, [])
            assert torch.equal(item["video"], plain[i]["video"])
            continue
        assert names(item["errors"])[0] == f"{i}.mp4"
        assert item["index"] not in (2, 7)
        assert item["label"] == samples[item["index"]].label
        assert torch.equal(item["video"], skipping(samples)[i]["video"])
        assert not torch.equal(item["video"], plain[item["index"]]["video"])  # no clip comes twice
        with pytest.raises(VideoError, match=rf"{i}\.mp4: "):
            plain[i]
    assert dataset[7]["errors"][0][1].startswith("is not a video file")
    substitutes = {dataset[2]["index"] for epoch in range(20) if dataset.set_epoch(epoch) is None}
    assert len(substitutes) > 4


@pytest.mark.parametrize("form", ["list", "shards"])
def test_batches_stay_whole_and_resume_exactly_on_any_number_of_processes_and_workers(
    form: str, samples: list[Sample], tmp_path: Path
) -> None:
    if form == "shards":
        (present := list(samples)).pop(2)
        write_shards(present, tmp_path, per_shard=4, progress=False)
        samples = read_shards(tmp_path, 5)
    for world_size in (1, 2):
        seen = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "stream": form == "shards"}
            loader = train_loader(skipping(samples), 2, **options)
            set_epoch(loader, 1)
            whole = list(loader)
            assert [len(batch["video"]) for batch in whole] == [2] * (len(samples) // world_size // 2)
            set_epoch(loader, 1, skip=1)
            assert all(map(same, list(loader), whole[1:]))
            shared = train_loader(skipping(samples), 2, num_workers=2, **options)
            set_epoch(shared, 1)
            assert all(map(same, list(shared), whole))
            seen += [error for batch in whole for error in batch["errors"]]
        broken = set(names(seen))
        assert broken <= {"2.mp4", "7.mp4", "00000006.mp4"}
        assert broken


def test_where_nothing_can_be_read_the_search_ends_with_names(tmp_path: Path) -> None:
    absent = [Sample(str(tmp_path / f"{i}.mp4"), 0) for i in range(3)]
    with pytest.raises(DatasetError, match=r"found 0 of 17 videos.*\n  .*0\.mp4: no such file"):
        skipping(absent)[0]


def test_a_share_of_the_files_may_be_broken_and_not_one_more() -> None:
    many = [Sample(f"{i}.mp4", 0) for i in range(200)]
    broken = BrokenFiles(many, 0.01)
    assert broken.add([("3.mp4", "empty"), ("3.mp4", "empty")]) == [("3.mp4", "empty")]
    assert broken.add([("3.mp4", "empty")]) == []
    assert broken.add([("5.mp4", "cut")]) == [("5.mp4", "cut")]
    with pytest.raises(
        DatasetError, match="found 197 of 200 videos, 3 missing or broken, more than data.max_broken = 0.01"
    ):
        broken.add([("9.mp4", "cut"), ("3.mp4", "empty")])
    with pytest.raises(DatasetError, match="found 199 of 200 videos, 1 missing or broken:\n  0.mp4: cut"):
        BrokenFiles(many, None).add([("0.mp4", "cut")])


def test_a_training_that_skips_says_what_and_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, epochs=2)
    videos = tmp_path / "data" / "videos"
    (videos / "train_00003.mp4").write_text("no video")
    (videos / "train_00005.mp4").unlink()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, broken="skip", max_broken=0.13))
    run = train(config)
    said = re.sub(r"\S*/", "", "".join(capsys.readouterr()))
    assert said.count("skipping train_00005.mp4: no such file") == 1
    assert said.count("skipping train_00003.mp4: is not a video file") == 1
    for epoch in (1, 2):
        assert re.search(
            rf"epoch {epoch}: \d clips of broken videos were replaced; 2 of 16 videos are missing or broken", said
        )
    assert [record["step"] for record in run.history if "loss" in record] == [2, 4]
    less = dataclasses.replace(config, run_dir=str(tmp_path / "less"))
    less = dataclasses.replace(less, data=dataclasses.replace(less.data, max_broken=0.07))
    with pytest.raises(
        DatasetError, match=r"found 14 of 16.*max_broken = 0.07 of them:\n.*train_00003.*\n.*train_00005"
    ):
        train(less)


@pytest.mark.parametrize("most", [0.07, 0.13])
def test_a_restart_gives_no_new_allowance(most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, epochs=1)
    data = dataclasses.replace(config.data, broken="skip", max_broken=most)
    config = dataclasses.replace(config, data=data)
    samples = read_videos(data.train_list, data.root, MOTIONS).samples
    loader = train_loader(TrainDataset(samples, 4, config.augment, seed=config.seed), 8)
    set_epoch(loader, 0)
    first, second = (samples[batch["index"].tolist()[0]].path for batch in loader)
    Path(str(first)).write_text("no video")
    step = TrainStep.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", lambda self, batches, stop: step(self, batches, stop=True))
        with pytest.raises(Stopped):
            train(config)
    Path(str(second)).write_text("no video")
    moved = shutil.copytree(data.root, tmp_path / "moved")
    config = dataclasses.replace(config, data=dataclasses.replace(data, root=str(moved)))
    capsys.readouterr()
    if most < 2 / 16:
        with pytest.raises(DatasetError, match="found 14 of 16 videos, 2 missing or broken, more than data.max_broken"):
            train(config, resume=True)
        return
    train(config, resume=True)
    said = "".join(capsys.readouterr())
    assert f"passed over before: {moved}/{Path(str(first)).relative_to(data.root)}: is not a video file" in said
    assert re.search(r"epoch 1: [23] clips of broken videos were replaced; 2 of 16 videos are missing or broken", said)


# Evaluation


def test_a_broken_video_counts_as_wrong_and_is_listed(tmp_path: Path) -> None:
    config = small_config(tmp_path, epochs=1)
    run = train(config)
    whole = run_evaluation(config, run.model, run.tokens)
    correct = (whole.probabilities.argmax(1) == whole.labels).nonzero().flatten().tolist()
    first = correct[0] if correct else 0
    paths = [tmp_path / "data" / "videos" / f"test_{i:05d}.mp4" for i in range(8)]
    paths[first].write_text("no video")
    paths[first - 1].unlink()
    with pytest.raises(DatasetError, match="found 7 of 8 videos"):
        run_evaluation(config, run.model, run.tokens)
    config = dataclasses.replace(config, test=dataclasses.replace(config.test, broken="wrong"))
    result = run_evaluation(config, run.model, run.tokens)
    lost = sorted({first, (first - 1) % 8})
    assert [Path(name).name for name, _ in result.broken] == [paths[i].name for i in lost]
    assert {reason.partition(" (")[0] for _, reason in result.broken} == {
        "no such file",
        "is not a video file that FFmpeg can read",
    }
    kept = [i for i in range(8) if i not in lost]
    assert torch.equal(result.labels, whole.labels)
    torch.testing.assert_close(result.probabilities[kept], whole.probabilities[kept])  # in batches of other sizes
    assert result.top(1) == pytest.approx(len(set(correct) - set(lost)) / 8)
    assert result.top(8) == 6 / 8
    assert result.confusion().sum() == 6
    for path in paths:
        path.unlink(missing_ok=True)
    with pytest.raises(DatasetError, match="found 0 of 8 videos"):
        run_evaluation(config, run.model, run.tokens)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"broken": "ignore"}, "data.broken must be one of refuse, skip, not 'ignore'"),
        ({"broken": "skip", "max_broken": 1.0}, "data.max_broken must be a share from 0 to less than 1, not 1.0"),
        ({"broken": "skip", "max_broken": -0.1}, "data.max_broken must be a share"),
        ({"max_broken": 0.2}, "data.max_broken is of data.broken = skip"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_an_unknown_policy_for_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match="test.broken must be one of refuse, wrong, not 'skip'"):
        TestConfig(broken="skip")

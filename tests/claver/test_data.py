"""Lists, file checks, data sets and loaders: exact, reproducible, and no broken file passes unnamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from claver.data.augment import AugmentConfig, crop_views, resize_short_side, train_clip
from claver.data.broken import broken_files, check_files
from claver.data.datasets import (
    TestDataset,
    TrainDataset,
    _generator,
    eval_loader,
    set_epoch,
    train_loader,
)
from claver.data.lists import DatasetError, Sample, list_hash, read_labels, read_list
from claver.data.sampling import segment_indices, view_indices
from claver.data.video import VideoError, probe, read_clip, read_frames
from torch._utils import ExceptionWrapper
from video_files import copy_from, read_numbers, write_video

SMALL = AugmentConfig(size=32, short_side=40)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Seven videos of 20 to 26 frames, in a folder with a space in its name."""
    root = tmp_path_factory.mktemp("the videos")
    return [Sample(str(write_video(root / f"{i}.mp4", 20 + i)), i % 3) for i in range(7)]


@pytest.fixture
def with_broken(samples: list[Sample], tmp_path: Path) -> list[Sample]:
    """The same with a missing, an empty and a truncated file among them."""
    empty, cut = tmp_path / "empty.mp4", tmp_path / "cut.mp4"
    empty.touch()
    cut.write_bytes(Path(samples[0].path).read_bytes()[:1500])
    missing = str(tmp_path / "missing.mp4")
    return [samples[0], Sample(missing, 1), samples[1], Sample(str(empty), 0), Sample(str(cut), 2), samples[2]]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Lists


def test_labels_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", 'id,name\n1,"rolling down, then up"\n0,abseiling\n\n2,été\n')
    assert read_labels(path) == ["abseiling", "rolling down, then up", "été"]
    windows = tmp_path / "windows.csv"
    windows.write_bytes(b"\xef\xbb\xbfid,name\r\n0,a b\r\n1,c\r\n")
    assert read_labels(windows) == ["a b", "c"]
    authors = write(tmp_path / "authors.csv", 'id;name\n0;hugging, not the baby\n1;"a; b"\n')
    assert read_labels(authors) == ["hugging, not the baby", "a; b"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "first line must be id,name"),
        ("name,id\na,0\n", "first line must be id,name, got 'name,id'"),
        ("id,name\n", "no classes"),
        ("id,name\n0,a\n2,c\n", "id 1: missing"),
        ("id,name\n1,a\n2,b\n", "id 0: missing"),
        ("id,name\n0,a\n0,b\n", "line 3: id 0 was given before, to 'a'"),
        ("id,name\n0,a\n1,a\n", "line 3: name 'a' was given before, on line 2"),
        ("id,name\n0,a\nx,b\n", "line 3: id 'x' is not a class number"),
        ("id,name\n-1,a\n", "line 2: id '-1' is not a class number"),
        ("id,name\n0,a,b\n", "line 2: expected id,name, got 3 fields"),
        ("id,name\n0\n", "line 2: expected id,name, got 1 fields"),
        ("id,name\n0,\n", "line 2: the name is empty"),
        ("id;name\n0,a\n", "line 2: expected id,name, got 1 fields"),
    ],
)
def test_a_wrong_label_file_is_an_error_with_the_line(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=reason) as error:
        read_labels(write(tmp_path / "labels.csv", text))
    assert "labels.csv" in str(error.value)


def test_a_list_has_paths_with_spaces_under_its_root(tmp_path: Path) -> None:
    text = "a/clip.mp4 0\nmy videos/clip  1 of 2.mp4 2\n\n/else where/x.mp4\t1\r\n"
    expected = [("/data/a/clip.mp4", 0), ("/data/my videos/clip  1 of 2.mp4", 2), ("/else where/x.mp4", 1)]
    assert read_list(write(tmp_path / "list.txt", text), "/data", 3) == expected
    csv = 'path,label\na/clip.mp4,0\n"my videos/clip  1 of 2.mp4",2\n/else where/x.mp4,1\n'
    assert read_list(write(tmp_path / "list.csv", csv), "/data", 3) == expected
    assert read_list(write(tmp_path / "list.txt", "a b.mp4 5"))[0] == Sample("a b.mp4", 5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the list is empty"),
        ("\n  \n", "the list is empty"),
        ("a.mp4\n", "line 1: expected a path and a label, got 'a.mp4'"),
        ("a.mp4 0\nb.mp4 one\n", "line 2: label 'one' is not a number"),
        ("a.mp4 0\nb.mp4 1.5\n", "line 2: label '1.5' is not a number"),
        ("a.mp4 0\n\nb c.mp4 3\n", r"line 3: label 3 of 'b c.mp4' is out of range, expected 0 to 2 \(3 classes\)"),
        ("a.mp4 -1\n", "line 1: label -1 of 'a.mp4' is out of range"),
    ],
)
def test_a_wrong_list_is_an_error_with_the_line(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=reason) as error:
        read_list(write(tmp_path / "list.txt", text), tmp_path, 3)
    assert "list.txt" in str(error.value)


def test_all_wrong_lines_are_kept_and_twenty_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "good.mp4 0\n" + "bad.mp4 9\n" * 30)
    with pytest.raises(DatasetError, match="30 of 31 lines are not valid") as error:
        read_list(path, None, 3)
    assert len(error.value.problems) == 30
    assert str(error.value).count("bad.mp4") == 20
    assert "and 10 more" in str(error.value)
    with pytest.raises(DatasetError, match="first line must be path,label"):
        read_list(write(tmp_path / "list.csv", "a.mp4,0\n"))
    with pytest.raises(DatasetError, match=r"absent\.txt: cannot be read"):
        read_list(tmp_path / "absent.txt")


def test_the_hash_of_a_list_tells_order_labels_and_paths_but_not_the_root() -> None:
    here = [Sample("/a/x.mp4", 0), Sample("/a/y.mp4", 1)]
    there = [Sample("/b/c/x.mp4", 0), Sample("/b/c/y.mp4", 1)]
    assert list_hash(here, "/a") == list_hash(there, "/b/c") == list_hash([Sample("x.mp4", 0), Sample("y.mp4", 1)])
    assert len(list_hash(here)) == 12
    others = [here[::-1], here[:1], [here[0], Sample("/a/y.mp4", 2)], [here[0], Sample("/a/z.mp4", 1)]]
    assert len({list_hash(each, "/a") for each in [here, *others]}) == 5


# Files


def test_check_files_names_all_that_are_missing_or_empty(samples: list[Sample], with_broken: list[Sample]) -> None:
    check_files(samples)
    with pytest.raises(DatasetError, match=r"found 4 of 6 videos, 2 missing or broken") as error:
        check_files(with_broken)
    assert [Path(name).name for name, _ in error.value.problems] == ["missing.mp4", "empty.mp4"]
    assert [reason for _, reason in error.value.problems] == ["no such file", "the file is empty (0 bytes)"]


# Training


def test_a_training_item_is_a_function_of_seed_epoch_and_index(samples: list[Sample]) -> None:
    dataset = TrainDataset(samples, 8, SMALL, seed=1)
    assert len(dataset) == 7
    item = dataset[2]
    assert (item["label"], item["index"]) == (2, 2)
    assert item["video"].shape == (8, 3, 32, 32)
    assert item["video"].dtype == torch.float32
    torch.rand(3)
    _ = dataset[3]
    assert torch.equal(item["video"], dataset[2]["video"])
    assert torch.equal(item["video"], TrainDataset(samples, 8, SMALL, seed=1)[2]["video"])
    assert not torch.equal(item["video"], TrainDataset(samples, 8, SMALL, seed=2)[2]["video"])
    twice = TrainDataset([samples[2], samples[2]], 8, SMALL, seed=1)
    assert not torch.equal(twice[0]["video"], twice[1]["video"])
    dataset.set_epoch(1)
    other = dataset[2]["video"]
    assert not torch.equal(item["video"], other)
    dataset.set_epoch(0)
    assert torch.equal(item["video"], dataset[2]["video"])


def test_an_item_has_the_frames_of_the_exact_count_also_where_packets_are_no_frames(tmp_path: Path) -> None:
    path = copy_from(write_video(tmp_path / "source.ts", 50), tmp_path / "headless.ts", skip=5)
    item = TrainDataset([Sample(str(path), 0)], 8, SMALL, seed=4)[0]
    count, generator = probe(path).num_frames, _generator(4, 0, 0)
    assert count < 45  # packets
    frames = read_frames(path, segment_indices(count, 8, generator=generator)).permute(0, 3, 1, 2)
    assert torch.equal(item["video"], train_clip(resize_short_side(frames, 40), SMALL, generator))


def test_the_cache_changes_nothing_but_the_number_of_decodes(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    monkeypatch.setattr("claver.data.datasets.read_clip", lambda *args: reads.append(args) or read_clip(*args))
    plain, cached = TrainDataset(samples, 8, SMALL), TrainDataset(samples, 8, SMALL, cache=True)
    expected = [[plain[i]["video"] for i in range(7) if plain.set_epoch(epoch) is None] for epoch in range(3)]
    reads.clear()
    for epoch in range(3):
        cached.set_epoch(epoch)
        for i in range(7):
            assert torch.equal(cached[i]["video"], expected[epoch][i])
    assert len(reads) == 7


def epochs(loader: torch.utils.data.DataLoader, count: int) -> list[dict[str, torch.Tensor]]:
    batches = []
    for epoch in range(count):
        set_epoch(loader, epoch)
        batches += list(loader)
    return batches


def test_workers_change_nothing_and_hear_of_the_epoch(samples: list[Sample]) -> None:
    alone = epochs(train_loader(TrainDataset(samples, 4, SMALL, seed=5), 3), 3)
    shared = epochs(train_loader(TrainDataset(samples, 4, SMALL, seed=5), 3, num_workers=2), 3)
    assert len(alone) == len(shared) == 6
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("video", "label", "index"))
    assert len({tuple(batch["index"].tolist()) for batch in alone}) > 2


def test_the_order_depends_on_the_epoch_and_no_sample_comes_twice(samples: list[Sample]) -> None:
    loader = train_loader(TrainDataset(samples, 4, SMALL), 2)
    orders = []
    for epoch in range(3):
        set_epoch(loader, epoch)
        orders.append([i for batch in loader for i in batch["index"].tolist()])
    assert all(len(order) == len(set(order)) == 6 for order in orders)
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_can_begin_at_any_batch_without_decoding_those_before(samples: list[Sample], num_workers: int) -> None:
    loader = train_loader(TrainDataset(samples, 4, SMALL), 2, num_workers=num_workers, rank=0, world_size=1)
    set_epoch(loader, 5)
    whole = list(loader)
    set_epoch(loader, 5, skip=1)
    rest = list(loader)
    assert len(whole) == len(rest) + 1 == len(loader) == 3
    for one, other in zip(rest, whole[1:], strict=True):
        assert torch.equal(one["video"], other["video"])
        assert torch.equal(one["index"], other["index"])


def test_processes_share_the_training_set_without_overlap(samples: list[Sample]) -> None:
    dataset = TrainDataset(samples, 4, SMALL)
    indices = [
        i for rank in range(3) for b in train_loader(dataset, 2, rank=rank, world_size=3) for i in b["index"].tolist()
    ]
    assert len(indices) == len(set(indices)) == 6


def test_a_set_smaller_than_a_batch_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="7 samples on 2 processes do not fill one batch of 4"):
        train_loader(TrainDataset(samples, 4, SMALL), 4, world_size=2)


def test_a_broken_file_stops_training_with_its_name(with_broken: list[Sample]) -> None:
    dataset = TrainDataset(with_broken, 4, SMALL)
    with pytest.raises(VideoError, match=r"(missing|empty|cut)\.mp4: "):
        list(train_loader(dataset, 2))
    for index, name in [(1, "missing"), (3, "empty"), (4, "cut")]:
        with pytest.raises(VideoError, match=rf"{name}\.mp4: ") as error:
            dataset[index]
        with pytest.raises(VideoError, match=rf"{name}\.mp4: "):  # how a loader hands on an error of its worker
            ExceptionWrapper((error.type, error.value, error.tb)).reraise()


# Testing


def test_views_are_all_clips_by_all_crops(samples: list[Sample]) -> None:
    dataset = TestDataset(samples, 4, SMALL, num_clips=2, num_crops=3)
    item = dataset[6]
    assert item["video"].shape == (6, 4, 3, 32, 32)
    assert (item["label"], item["index"], item["error"]) == (0, 6, "")
    for clip, indices in enumerate(view_indices(26, 4, 2)):
        frames = read_frames(samples[6].path, indices)
        assert read_numbers(frames.numpy()) == indices.tolist()
        crops = crop_views(frames.permute(0, 3, 1, 2), SMALL, 3)
        assert torch.equal(item["video"][3 * clip : 3 * clip + 3], crops)
    cached = TestDataset(samples, 4, SMALL, num_clips=2, num_crops=3, cache=True)
    assert torch.equal(cached[6]["video"], item["video"])
    assert torch.equal(cached[6]["video"], item["video"])
    with pytest.raises(ValueError, match="num_crops must be 1"):
        TestDataset(samples, 4, SMALL, num_crops=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_each_video_is_evaluated_once_on_one_process(samples: list[Sample], world_size: int) -> None:
    dataset = TestDataset(samples, 2, SMALL, num_clips=1, num_crops=1)
    loaders = [eval_loader(dataset, 2, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [(int(i), int(label)) for loader in loaders for b in loader for i, label in zip(b["index"], b["label"])]  # noqa: B905
    assert sorted(seen) == [(i, i % 3) for i in range(7)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_are_collected_and_the_rest_is_evaluated(with_broken: list[Sample], num_workers: int) -> None:
    dataset = TestDataset(with_broken, 2, SMALL, num_clips=1, num_crops=3)
    batches = list(eval_loader(dataset, 2, num_workers=num_workers))
    assert [batch["index"].tolist() for batch in batches] == [[0], [2], [5]]
    assert [tuple(batch["video"].shape) for batch in batches] == [(1, 3, 2, 3, 32, 32)] * 3
    problems = [problem for batch in batches for problem in batch["errors"]]
    assert [Path(path).name for path, _ in problems] == ["missing.mp4", "empty.mp4", "cut.mp4"]
    assert str(broken_files(problems, len(dataset))).startswith("found 3 of 6 videos, 3 missing or broken:")
    assert "missing.mp4: no such file" in str(broken_files(problems, len(dataset)))


def test_a_batch_of_broken_files_is_empty_but_well_formed(with_broken: list[Sample]) -> None:
    dataset = TestDataset(with_broken[3:5], 2, SMALL, num_clips=2, num_crops=1)
    (batch,) = eval_loader(dataset, 2)
    assert batch["video"].shape == (0, 2, 2, 3, 32, 32)
    assert batch["label"].shape == batch["index"].shape == (0,)
    assert len(batch["errors"]) == 2


def test_a_cache_with_workers_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="cache=True needs num_workers=0, got 2"):
        train_loader(TrainDataset(samples, 4, SMALL, cache=True), 2, num_workers=2)
    with pytest.raises(ValueError, match="cache=True needs num_workers=0, got 1"):
        eval_loader(TestDataset(samples, 4, SMALL, cache=True), 2, num_workers=1)

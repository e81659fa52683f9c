"""Shards are written whole, hold what their list held, and are read for training in an order that resumes exactly."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from claver.data import shard_stream
from claver.data.augment import AugmentConfig
from claver.data.datasets import TrainDataset, set_epoch, train_loader
from claver.data.lists import DatasetError, Sample
from claver.data.shard_stream import LANES, batches_of_lane, shard_ranges
from claver.data.shards import expand_shards, read_shards, write_shards
from hypothesis import given
from hypothesis import strategies as st
from video_files import write_video

SMALL = AugmentConfig(size=16, short_side=16)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Sixty names of three videos of 6 to 8 frames."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(3):
        write_video(root / f"{i}.mp4", 6 + i, size=(32, 32))
    for i in range(3, 60):
        (root / f"{i}.mp4").symlink_to(root / f"{i % 3}.mp4")
    return [Sample(str(root / f"{i}.mp4"), i % 7) for i in range(60)]


@pytest.fixture(scope="module")
def shards(videos: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """The same in shards of 11, the last one of 5."""
    folder = tmp_path_factory.mktemp("shards")
    assert len(write_shards(videos, folder, per_shard=11, progress=False)) == 6
    return read_shards(folder, 7)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the index of each sample that would be decoded; none is."""
    seen: list[int] = []

    def item(self: TrainDataset, index: int, video: object) -> dict[str, object]:
        assert video.size == len(video.data)
        seen.append(index)
        return {"index": index, "errors": []}

    monkeypatch.setattr(TrainDataset, "item", item)
    return seen


def write_samples(path: Path, *files: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def loader_of(samples: list[Sample], batch_size: int = 3, *, workers: int = 0, seed: int = 0, **processes: int):
    return train_loader(
        TrainDataset(samples, 2, SMALL, seed=seed), batch_size, num_workers=workers, stream=True, **processes
    )


def indices(loader, epoch: int = 0, skip: int = 0) -> list[list[int]]:
    set_epoch(loader, epoch, skip=skip)
    return [batch["index"].tolist() for batch in loader]


# Reading and writing


def test_shards_hold_what_their_list_held(videos: list[Sample], shards: list[Sample]) -> None:
    assert [sample.label for sample in shards] == [sample.label for sample in videos]
    assert [sample.path.listed for sample in shards] == [str(path) for path, _ in videos]
    for shard, video in zip(shards, videos, strict=True):
        with shard.path.open() as file:
            assert file.read() == Path(video.path).read_bytes()


def test_webdataset_reads_our_shards_and_we_read_its(
    videos: list[Sample], shards: list[Sample], tmp_path: Path, decoded: list[int]
) -> None:
    ours = sorted({sample.path.archive for sample in shards})
    read = list(webdataset.WebDataset(ours, shardshuffle=False))
    assert [json.loads(sample["json"])["label"] for sample in read] == [label for _, label in videos]
    assert len({sample["__key__"] for sample in read}) == 60
    assert read[5]["mp4"] == Path(videos[5].path).read_bytes()
    with webdataset.ShardWriter(str(tmp_path / "s-%06d.tar"), maxcount=25, verbose=0) as writer:
        for i, (path, label) in enumerate(videos):
            writer.write({"__key__": f"some/{i:03d}", "mp4": Path(path).read_bytes(), "cls": label, "txt": "of no use"})
    theirs = read_shards(tmp_path / "s-{000000..000002}.tar", 7)
    assert [sample.label for sample in theirs] == [label for _, label in videos]
    assert sorted(i for batch in indices(loader_of(theirs)) for i in batch) == list(range(60))


def test_a_seed_mixes_the_list_and_nothing_is_lost(videos: list[Sample], tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shards(videos, tmp_path / folder, per_shard=40, seed=seed, progress=False)
    a, b, c = ([(s.path.listed, s.label) for s in read_shards(tmp_path / folder, 7)] for folder in "abc")
    assert a == b != c
    assert sorted(a) == sorted(c) == sorted((str(path), label) for path, label in videos)
    assert a != [(str(path), label) for path, label in videos]


def test_a_shard_is_written_whole_or_not_at_all(videos: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.mp4: no such file"):
        write_shards([*videos[:7], Sample("nowhere.mp4", 0)], tmp_path, per_shard=5, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["shards-000000.tar"]
    assert len(read_shards(tmp_path, 7)) == 5
    with pytest.raises(ValueError, match="has shards already"):
        write_shards(videos, tmp_path)
    with pytest.raises(ValueError, match="per_shard must be at least 1"):
        write_shards(videos, tmp_path / "new", per_shard=0)
    with pytest.raises(ValueError, match="got none"):
        write_shards([], tmp_path / "new")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("0.mp4", b"v")], "0: has no label"),
        ([("0.cls", b"1")], "0: expected one video, found 0"),
        ([("0.mp4", b"v"), ("0.avi", b"v"), ("0.cls", b"1")], "0: expected one video, found 2"),
        ([("0.mp4", b"v"), ("0.cls", b"waving")], "label 'waving' is not one of 0 to 6"),
        ([("0.mp4", b"v"), ("0.cls", b"7")], r"label '7' is not one of 0 to 6 \(7 classes\)"),
        ([("0.mp4", b"v"), ("0.cls", b"-1")], "label '-1' is not one of 0 to 6"),
        ([("0.mp4", b"v"), ("0.json", b"{")], "0: .json holds no object"),
        ([("0.mp4", b"v"), ("0.json", b"{}")], "label 'nothing' is not one of"),
        ([("0.mp4", b"v"), ("0.json", b'{"label": true}')], "label 'True' is not one of"),
        ([("0.mp4", b"v"), ("0.cls", b"1"), ("0.json", b'{"label": 2}')], "0: has two labels, 1 and 2"),
        ([("0.mp4", b"v"), ("1.mp4", b"v"), ("0.cls", b"1"), ("1.cls", b"1")], "0: its files do not lie next to each"),
    ],
)
def test_a_sample_that_is_not_valid_is_refused_by_name(
    files: list[tuple[str, bytes]], reason: str, tmp_path: Path
) -> None:
    path = write_samples(tmp_path / "s.tar", ("good.mp4", b"v"), ("good.cls", b"0\n"), *files)
    with pytest.raises(DatasetError, match=reason) as error:
        read_shards(path, 7)
    assert "s.tar/" in str(error.value)
    assert "good" not in str(error.value)


def test_json_may_stand_beside_cls(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "s.tar", ("a/0.mp4", b"v"), ("a/0.cls", b"3"), ("a/0.json", b'{"path": "x y.mp4"}'))
    ((member, label),) = read_shards(path, 7)
    assert (member.name, member.listed, label) == ("a/0.mp4", "x y.mp4", 3)


def test_shards_are_named_by_folder_glob_or_braces(tmp_path: Path) -> None:
    names = [f"s-{i:06d}.tar" for i in (0, 1, 2, 10)]
    for name in names:
        write_samples(tmp_path / name, (f"{name[:-4]}.mp4", b"v"), (f"{name[:-4]}.cls", b"0"))
    everything = [str(tmp_path / name) for name in names]
    assert expand_shards(tmp_path) == expand_shards(tmp_path / "*.tar") == everything
    assert expand_shards(tmp_path / "s-{000001..000002}.tar") == everything[1:3]
    with pytest.raises(DatasetError, match="1 of 4 shards are missing:\n.*s-000003.tar: no such file"):
        read_shards(tmp_path / "s-{000000..000003}.tar", 7)
    for pattern in (tmp_path / "t-*.tar", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DatasetError, match="no shards"):
            expand_shards(pattern)


# The order of training


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_parts_of_an_epoch_are_disjoint_and_leave_nothing_out(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=5)))
    seen = []
    for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
        part = shard_ranges(lengths, start, stop, "seed")
        assert sum(last - first for _, first, last in part) == stop - start
        seen += [(shard, i) for shard, first, last in part for i in range(first, last)]
    assert sorted(seen) == [(shard, i) for shard, length in enumerate(lengths) for i in range(length)]


@given(st.integers(0, 200))
def test_lanes_share_all_batches(batches: int) -> None:
    assert [batches_of_lane(batches, lane) for lane in range(LANES)] == [
        len([b for b in range(batches) if b % LANES == lane]) for lane in range(LANES)
    ]


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_take_equally_many_steps_and_no_sample_twice(shards: list[Sample], world_size: int) -> None:
    loaders = [loader_of(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(3):
        orders = [indices(loader, epoch) for loader in loaders]
        assert {len(order) for order in orders} == {60 // world_size // 3} == {len(loader) for loader in loaders}
        seen = [i for order in orders for batch in order for i in batch]
        assert len(seen) == len(set(seen)) == world_size * (60 // world_size // 3) * 3


@pytest.mark.usefixtures("decoded")
def test_the_order_is_a_function_of_seed_and_epoch_and_mixes(shards: list[Sample]) -> None:
    loader = loader_of(shards)
    first, second = indices(loader, 0), indices(loader, 1)
    assert first != second
    assert first == indices(loader, 0) == indices(loader_of(shards), 0)
    assert first != indices(loader_of(shards, seed=1), 0)
    halves = [{i for batch in indices(loader_of(shards, world_size=2), epoch) for i in batch} for epoch in range(3)]
    assert halves[0] != halves[1]  # other shards come to a process
    one = [sample for sample in shards if sample.path.archive == shards[0].path.archive]
    orders = [indices(loader_of(one, 11, seed=seed), epoch)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert [sorted(order) for order in orders] == [list(range(11))] * 3
    assert len(set(map(tuple, orders))) == 3  # and those of one shard in another order
    big = indices(loader_of(shards, 20))  # three lanes of a batch, each mixed in its buffer
    assert all(batch != sorted(batch) for batch in big)


def test_items_are_those_of_the_list(videos: list[Sample], shards: list[Sample]) -> None:
    dataset = TrainDataset(videos, 2, SMALL)
    for batch in loader_of(shards):
        for row, index in enumerate(batch["index"].tolist()):
            assert torch.equal(batch["video"][row], dataset[index]["video"])
            assert batch["label"][row] == videos[index].label


@pytest.mark.usefixtures("decoded")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing_in_the_order_also_after_a_resume(shards: list[Sample], workers: int) -> None:
    alone, shared = loader_of(shards, 1), loader_of(shards, 1, workers=workers)
    for epoch in range(2):
        whole = indices(alone, epoch)
        assert indices(shared, epoch) == whole
        assert indices(shared, epoch, 29) == indices(alone, epoch, 29) == whole[29:]
    assert indices(shared, 0, 60) == []


def test_a_resume_decodes_nothing_that_was_trained_on(shards: list[Sample], decoded: list[int]) -> None:
    rest = indices(loader_of(shards), 0, 15)
    assert decoded == [i for batch in rest for i in batch]
    assert len(decoded) == 15


@pytest.mark.usefixtures("decoded")
def test_a_shard_is_read_once_and_without_seeking(shards: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    read = shard_stream._read
    monkeypatch.setattr(shard_stream, "_read", lambda s, part, end: parts.append(part) or read(s, part, end))
    indices(loader_of(shards, 1))
    assert sum(map(len, parts)) == 60
    assert len(parts) <= LANES + 6  # a part ends with its lane or with its shard


@pytest.mark.usefixtures("decoded")
def test_a_shard_that_changes_meanwhile_is_an_error(shards: list[Sample], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(Path(shards[0].path.archive).parent, folder)
    samples = read_shards(folder, 7)
    for change in (lambda path: path.write_bytes(path.read_bytes()[:5000]), lambda path: path.unlink()):
        change(folder / "shards-000001.tar")
        with pytest.raises(DatasetError, match=r"shards-000001\.tar: is not what it was when the run began"):
            indices(loader_of(samples))
    swapped = [shards[1], shards[0], *shards[2:]]
    with pytest.raises(DatasetError, match="lies in the place of"):
        indices(loader_of(swapped))


def test_workers_that_do_not_divide_the_lanes_and_a_cache_are_refused(shards: list[Sample]) -> None:
    with pytest.raises(ValueError, match="needs num_workers of 0 or one of 1, 2, 3, 4, 6, 8, 12, 24, got 5"):
        loader_of(shards, workers=5)
    with pytest.raises(ValueError, match="cache=True is for lists and folders"):
        train_loader(TrainDataset(shards, 2, SMALL, cache=True), 2, stream=True)

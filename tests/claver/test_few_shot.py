"""Few-shot lists have so many videos of each class, in the form of the published ones."""

from collections import Counter

import claver_k400
import pytest
from claver.data.few_shot import base_and_novel, draw_few_shot, of_classes
from claver.data.lists import DatasetError, Sample, read_labels, read_list

CLASSES = ["a", "b", "c"]
SAMPLES = [Sample(f"v/{name}_{i}.avi", label) for i in range(6) for label, name in enumerate(CLASSES)]


def test_each_class_has_so_many_different_videos_class_after_class():
    for shots in (2, 4, 6):
        drawn = draw_few_shot(SAMPLES, CLASSES, shots, seed=0)
        assert [sample.label for sample in drawn] == [label for label in range(3) for _ in range(shots)]
        assert set(drawn) <= set(SAMPLES)
        assert len(set(drawn)) == len(drawn)
    assert draw_few_shot(SAMPLES, CLASSES, 2, seed=0) == draw_few_shot(SAMPLES, CLASSES, 2, seed=0)
    assert draw_few_shot(SAMPLES, CLASSES, 2, seed=0) != draw_few_shot(SAMPLES, CLASSES, 2, seed=1)


def test_fewer_shots_are_among_more():
    few, more = (set(draw_few_shot(SAMPLES, CLASSES, shots, seed=3)) for shots in (2, 4))
    assert few < more


def test_classes_that_are_too_small_are_named():
    with pytest.raises(DatasetError, match=r"1 of 3 classes have fewer than 6 videos:\n  b: 5 videos"):
        draw_few_shot([sample for sample in SAMPLES if sample.path != "v/b_0.avi"], CLASSES, 6, seed=0)


def test_base_classes_are_those_with_most_videos_and_all_are_numbered_anew():
    samples = [Sample(f"{i}", label) for i, label in enumerate([2, 2, 2, 0, 3, 3, 1, 4, 4])]
    base, novel = base_and_novel(samples, 5)
    assert (base, novel) == ([2, 3, 4], [0, 1])
    assert Counter(sample.label for sample in of_classes(samples, base)) == {0: 3, 1: 2, 2: 2}
    assert [sample.path for sample in of_classes(samples, novel)] == ["3", "6"]


def test_the_command_writes_lists_that_training_reads(tmp_path):
    (tmp_path / "labels.csv").write_text("id,name\n0,a\n1,b\n2,c\n")
    for name in ("train1", "test1"):
        (tmp_path / f"{name}.txt").write_text("".join(f"v/{s.path[2:]} {s.label}\n" for s in SAMPLES))
    settings = {"labels": "labels.csv", "train_list": "train1.txt", "test_list": "test1.txt"}
    options = [f"--data.{key}={tmp_path / value}" for key, value in settings.items()]
    command = ["few-shot-list", *options, "--data.root=/videos", "--out", str(tmp_path / "out")]
    assert claver_k400.main([*command, "--shots", "2", "4", "--base-to-novel"]) == 0
    text = (tmp_path / "out" / "train1_few_shot_2.txt").read_text()
    assert all(line.startswith("v/") for line in text.splitlines())
    assert Counter(s.label for s in read_list(tmp_path / "out" / "train1_few_shot_4.txt")) == {0: 4, 1: 4, 2: 4}
    assert read_labels(tmp_path / "out" / "labels_base.csv") == ["a", "b"]
    assert read_labels(tmp_path / "out" / "labels_novel.csv") == ["c"]
    assert Counter(s.label for s in read_list(tmp_path / "out" / "train_base_few_shot_2.txt")) == {0: 2, 1: 2}
    assert Counter(s.label for s in read_list(tmp_path / "out" / "test_novel.txt")) == {0: 6}
    again = (tmp_path / "out" / "train1_few_shot_2.txt").read_bytes()
    assert claver_k400.main([*command, "--shots", "2"]) == 0
    assert (tmp_path / "out" / "train1_few_shot_2.txt").read_bytes() == again

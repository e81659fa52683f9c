"""A report says of each class and each video what the evaluation found."""

import csv
import json
import math

import pytest
import torch
from claver.data.lists import Sample
from claver.evaluation.evaluate import Evaluation
from claver.evaluation.reports import numbers, over_splits, write_report
from safetensors.torch import load_file

CLASSES = ["left", "right", "up", "never seen"]
SAMPLES = [Sample(f"{i}.mp4", label) for i, label in enumerate([0, 0, 1, 1, 1, 2])]
PREDICTED = [0, 1, 1, 1, 0, 0]


def evaluation():
    logits = torch.full((6, 4), -1.0)
    logits[torch.arange(6), torch.tensor(PREDICTED)] = 3.0
    probabilities = logits.softmax(1)
    probabilities[5], logits[5] = 0, 0  # could not be read
    return Evaluation(
        probabilities, logits, torch.tensor([s.label for s in SAMPLES]), (("5.mp4", "the file is empty"),)
    )


def test_mean_class_accuracy_is_over_the_classes_that_have_videos():
    found = numbers(evaluation())
    assert found["mean_class"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert (found["top1"], found["top5"]) == (pytest.approx(3 / 6), pytest.approx(5 / 6))
    assert (found["videos"], found["broken"]) == (6, 1)


def test_the_files_say_what_was_found(tmp_path):
    write_report(tmp_path / "new", evaluation(), CLASSES, SAMPLES, {"mask": "kmct"})
    folder = tmp_path / "new"
    assert json.loads((folder / "results.json").read_text()) == {**numbers(evaluation()), "mask": "kmct"}
    with (folder / "classes.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows["right"] == {
        "id": "1", "name": "right", "videos": "3", "correct": "2", "accuracy": "0.6667", "taken_for": "left", "times": "1",
    }  # fmt: skip
    assert (rows["up"]["accuracy"], rows["up"]["taken_for"]) == ("0.0000", "")
    assert (rows["never seen"]["videos"], rows["never seen"]["accuracy"]) == ("0", "")
    with (folder / "predictions.csv").open() as file:
        videos = list(csv.DictReader(file))
    assert [video["path"] for video in videos] == [sample.path for sample in SAMPLES]
    assert [video["predicted"] for video in videos] == [*(CLASSES[i] for i in PREDICTED[:5]), ""]
    assert videos[5]["error"] == "the file is empty"
    stored = load_file(folder / "predictions.safetensors")
    for name in ("probabilities", "logits", "labels"):
        assert torch.equal(stored[name], getattr(evaluation(), name))
    assert (folder / "confusion.png").stat().st_size > 5_000
    assert sorted(path.name for path in folder.iterdir()) == [
        "classes.csv", "confusion.png", "predictions.csv", "predictions.safetensors", "results.json",
    ]  # fmt: skip


def test_splits_come_to_their_mean_and_spread_or_to_the_harmonic_mean():
    results = {"1": {"top1": 0.5}, "2": {"top1": 0.6}, "3": {"top1": 0.7}}
    found = over_splits(results, "mean")
    assert (found["top1"], found["top1_std"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert math.isnan(over_splits({"1": {"top1": 0.5}}, "mean")["top1_std"])
    assert over_splits({"base": {"top1": 0.8}, "novel": {"top1": 0.4}}, "harmonic")["top1"] == pytest.approx(
        2 * 0.8 * 0.4 / 1.2
    )

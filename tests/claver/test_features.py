"""Features are those that evaluation compares with texts, and a query finds what is nearest to it by cosine."""

import json
import os

import numpy as np
import pytest
import torch
from claver.config import Config, TestConfig
from claver.data.augment import AugmentConfig
from claver.data.datasets import TestDataset
from claver.data.lists import Sample
from claver.evaluation.features import features, model_digest, read_features
from claver.evaluation.retrieve import nearest, retrieve
from claver.model import build_model
from claver.prompts.build import tokenize
from safetensors import safe_open
from small import small_model
from torch.nn import functional as F
from video_files import write_video


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    settings = small_model(token_std=0.1, position_std=1.0)
    config = Config(model=settings, augment=AugmentConfig(size=32, short_side=40), test=TestConfig(clips=2, crops=3))
    return {"model": build_model(settings).eval(), "config": config}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [str(write_video(folder / f"clip{number}.mp4", number)) for number in (6, 9, 14)]


@pytest.fixture
def collection(run, videos, tmp_path):
    assert features(videos, tmp_path / "f.safetensors", **run) == 0
    return tmp_path / "f.safetensors"


def cosines(query, values):
    return F.cosine_similarity(query[None], values, dim=-1)


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_a_feature_is_the_mean_over_views_of_what_the_model_says(run, videos, tmp_path, ending):
    out = tmp_path / f"f{ending}"
    assert features(videos, out, **run) == 0
    found = read_features(out)
    assert (found.paths, found.values.shape, found.model) == (videos, (3, 16), model_digest(run["model"]))
    config = run["config"]
    dataset = TestDataset([Sample(path, 0) for path in videos], 4, config.augment, num_clips=2, num_crops=3)
    with torch.no_grad():
        for i in range(3):
            expected = run["model"].encode_video(dataset[i]["video"]).mean(0)
            torch.testing.assert_close(found.values[i], expected, atol=1e-6, rtol=0)


def test_the_files_open_with_their_own_libraries_alone(run, videos, tmp_path, collection):
    with safe_open(collection, "np") as file:
        assert json.loads(file.metadata()["paths"]) == videos
        assert file.get_tensor("features").shape == (3, 16)
    features(videos, tmp_path / "f.npz", **run)
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        assert arrays["paths"].tolist() == videos
        assert arrays["features"].dtype == np.float32


def test_a_file_that_cannot_be_read_is_named_and_left_out(run, videos, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_text("no video")
    assert features([videos[0], str(tmp_path / "bad.mp4")], tmp_path / "f.npz", **run) == 1
    assert read_features(tmp_path / "f.npz").paths == videos[:1]
    assert "bad.mp4: is not a video file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of 1 videos could be read"):
        features([str(tmp_path / "bad.mp4")], tmp_path / "g.npz", **run)
    assert not (tmp_path / "g.npz").exists()


def test_a_text_finds_the_videos_nearest_to_it(run, collection, capsys):
    values = read_features(collection).values
    with torch.no_grad():
        query = run["model"].encode_text(tokenize([["a person waves"]], context_length=16))[0, 0]
    expected = cosines(query, values)
    assert retrieve(collection, **run, texts=["a person waves", "juggling"], top=2, json_lines=True) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["query"] for record in records] == ["a person waves", "juggling"]
    names = read_features(collection).paths
    order = expected.argsort(descending=True)[:2]
    assert [item["video"] for item in records[0]["top"]] == [names[i] for i in order]
    assert [item["score"] for item in records[0]["top"]] == pytest.approx(expected[order].tolist(), abs=1e-5)


def test_a_video_finds_the_nearest_others_and_not_itself(run, videos, collection, capsys, monkeypatch):
    values = read_features(collection).values
    expected = cosines(values[1], values)
    monkeypatch.chdir(os.path.dirname(videos[1]))
    assert retrieve(collection, **run, videos=[os.path.basename(videos[1])]) == 0  # by another name
    lines = capsys.readouterr().out.splitlines()
    ordered = [i for i in expected.argsort(descending=True).tolist() if i != 1]
    assert lines == ["clip9.mp4", *(f"  {expected[i]:6.3f}  {videos[i]}" for i in ordered)]


def test_a_broken_query_is_named_and_the_rest_goes_on(run, videos, collection, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_text("no video")
    queries = [str(tmp_path / "bad.mp4"), videos[0]]
    assert retrieve(collection, **run, texts=["x"], videos=queries, json_lines=True) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in record for record in records] == [False, True, False]


def test_the_nearest_are_sorted_by_cosine_and_equal_ones_by_their_place():
    values = torch.tensor([[0.0, 1.0], [3.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    found = nearest(torch.tensor([2.0, 0.0]), values, 3)
    assert [row for row, _ in found] == [1, 3, 2]
    assert [score for _, score in found] == pytest.approx([1, 1, 0.5**0.5])
    assert [row for row, _ in nearest(torch.tensor([2.0, 0.0]), values, 9, without=[1])] == [3, 2, 0]


def test_features_of_other_weights_and_foreign_files_are_refused(run, videos, collection, tmp_path):
    torch.manual_seed(1)
    other = build_model(run["config"].model).eval()
    with pytest.raises(ValueError, match="was written with other weights"):
        retrieve(collection, model=other, config=run["config"], texts=["x"])
    for name in ("f.npz", "g.safetensors"):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(ValueError, match=f"{name}: is not a file that `features` wrote"):
            read_features(tmp_path / name)
    with pytest.raises(ValueError, match=r"gone\.npz: no such file"):
        read_features(tmp_path / "gone.npz")


def test_arguments_that_make_no_sense_are_refused(run, videos, collection, tmp_path):
    with pytest.raises(ValueError, match="is there already"):
        features(videos, collection, **run)
    with pytest.raises(ValueError, match=r"end in \.safetensors or \.npz"):
        features(videos, tmp_path / "f.pt", **run)
    with pytest.raises(ValueError, match="nothing to look for"):
        retrieve(collection, **run)
    with pytest.raises(ValueError, match="top must be at least 1 video, not 0"):
        retrieve(collection, **run, texts=["x"], top=0)

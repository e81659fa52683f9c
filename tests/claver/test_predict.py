"""Prediction reads files, folders and patterns, says what evaluation says, names what is broken, and draws what it saw so far."""

import dataclasses
import json
import os

import pytest
import torch
from claver import check_demo_checkpoint
from claver.config import Config, TestConfig
from claver.data.augment import AugmentConfig, crop_views
from claver.data.sampling import segment_indices, view_indices
from claver.data.video import probe, read_frames
from claver.evaluation.evaluate import class_probabilities
from claver.evaluation.predict import find_videos, predict, predictions
from claver.model import build_model
from claver.prompts.build import tokenize
from claver.text import encode_prompts
from small import small_model
from video_files import write_video

CLASSES = ["left", "right", "up"]
PROMPTS = [["a left", "a right", "an up"], ["left", "right", "up"]]


def build(**changes):
    """A random model whose outputs differ from frame to frame and from class to class."""
    torch.manual_seed(0)
    large = {"logit_scale": 30.0, "token_std": 0.1, "position_std": 1.0, "attention": "kmct"}
    settings = small_model(**(large | changes))
    config = Config(model=settings, augment=AugmentConfig(size=32, short_side=40), test=TestConfig(clips=2, crops=3))
    return {"model": build_model(settings).eval(), "config": config, "classes": CLASSES, "prompts": PROMPTS}


@pytest.fixture(scope="module")
def run():
    return build()


@pytest.fixture
def videos(tmp_path):
    """Ten frames each: clip2, clip10 and, in a folder below, clip1; two files that are no videos."""
    (tmp_path / "v" / "below").mkdir(parents=True)
    for number, name in enumerate(["clip10.mp4", "clip2.mp4", "below/clip1.avi"]):
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        write_video(tmp_path / "v" / name, 10 + number, codec=codec)
    (tmp_path / "v" / "notes.txt").write_text("no video")
    (tmp_path / "v" / ".hidden.mp4").write_text("no video")
    return tmp_path / "v"


def text_features(run):
    return encode_prompts(run["model"], tokenize(PROMPTS, context_length=16))


def test_names_stand_for_files_in_natural_order_each_once(videos):
    short = [os.path.relpath(path, videos) for path in find_videos([str(videos)])]
    assert short == ["below/clip1.avi", "clip2.mp4", "clip10.mp4"]
    pattern = find_videos([f"{videos}/*.mp4", f"{videos}/clip10.mp4", "gone.mp4"])
    assert [os.path.basename(path) for path in pattern] == ["clip2.mp4", "clip10.mp4", "gone.mp4"]
    assert len(find_videos([f"{videos}/**/*.*i", str(videos)])) == 3
    assert len(find_videos([str(videos), f"{videos}/below/../clip2.mp4"])) == 3  # one file by two names
    for name, message in ((f"{videos}/*.mov", "no file fits this pattern"), (str(videos / "empty"), "no video files")):
        (videos / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            find_videos([name])
    odd = videos / "what[1].mp4"  # a file with signs of patterns in its name is itself
    odd.write_bytes(b"")
    assert find_videos([str(odd)]) == [str(odd)]


def test_its_probabilities_are_those_of_all_test_views(run, videos):
    path = str(videos / "clip2.mp4")
    ((name, result),) = predictions(run["model"], [path], text_features(run), run["config"])
    info = probe(path)
    views = []
    for indices in view_indices(info.num_frames, 4, 2):
        frames = read_frames(info, indices).permute(0, 3, 1, 2)
        views += list(crop_views(frames, run["config"].augment, 3))
    expected = class_probabilities(run["model"], torch.stack(views)[None], text_features(run))[0]
    assert name == path
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_each_file_has_its_likeliest_classes_as_text_or_json(run, videos, capsys):
    assert predict([str(videos)], **run, top=2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [os.path.basename(line) for line in lines[::3]] == ["clip1.avi", "clip2.mp4", "clip10.mp4"]
    assert all("%" in line for i, line in enumerate(lines) if i % 3)
    assert predict([str(videos)], **run, top=2, json_lines=True) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["video"] for record in records] == lines[::3]
    for i, record in enumerate(records):
        assert f"{record['top'][0]['probability']:6.1%}  {record['top'][0]['class']}" in lines[3 * i + 1]
        assert len(record["top"]) == 2


def test_a_broken_file_is_named_and_the_rest_goes_on(run, videos, capsys):
    whole = (videos / "clip10.mp4").read_bytes()
    (videos / "clip10.mp4").write_bytes(whole[: len(whole) // 2])
    names = [str(videos / name) for name in ("gone.mp4", "clip10.mp4", "notes.txt", "clip2.mp4")]
    assert predict(names, **run, json_lines=True) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [("error" in record, record["video"]) for record in records] == [
        (i < 3, name) for i, name in enumerate(names)
    ]
    assert predict(names, **run) == 1
    assert capsys.readouterr().out.count("  error: ") == 3


@pytest.mark.parametrize("attention", ["kmct", "kmt"])
def test_the_drawn_video_has_every_frame_over_what_was_said_so_far(videos, tmp_path, capsys, monkeypatch, attention):
    run, drawn = build(attention=attention), []
    monkeypatch.setattr(
        "claver.evaluation.predict.annotate", lambda image, top, caption: drawn.append((top, caption)) or image.copy()
    )
    path, out = str(videos / "clip2.mp4"), str(tmp_path / "out.mp4")  # 11 frames
    assert predict([path], **run, annotated=out) == 0
    assert probe(out).num_frames == len(drawn) == 11
    assert [caption for _, caption in drawn] == [f"clip2.mp4  frame {i}" for i in range(11)]
    taken = segment_indices(11, 4)
    assert [i for i in range(1, 11) if drawn[i][0] != drawn[i - 1][0]] == taken.tolist()
    assert drawn[0][0] == [("", 0.0)] * 3
    frames = read_frames(path, taken).permute(0, 3, 1, 2)
    for seen in (1, 3, 4):  # of KMCT the frames so far are what the whole clip has there; of KMT they are a clip
        views = crop_views(frames, run["config"].augment, 1)[None]
        if attention == "kmct":
            features = run["model"].frame_features(views[0])[:, :seen]
            mean = torch.nn.functional.normalize(features, dim=-1).mean(1)
            expected = run["model"].logits(mean, text_features(run)).softmax(-1).mean(1)[0]
        else:
            expected = class_probabilities(run["model"], views[:, :, :seen], text_features(run))[0]
        found = dict(drawn[taken[seen - 1]][0])
        assert [found[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_video_with_fewer_frames_than_a_clip_is_drawn_as_it_is_evaluated(run, tmp_path, monkeypatch):
    path, drawn = str(write_video(tmp_path / "short.mp4", 3)), []
    monkeypatch.setattr(
        "claver.evaluation.predict.annotate", lambda image, top, caption: drawn.append(top) or image.copy()
    )
    predict([path], **run, annotated=str(tmp_path / "out.mp4"))
    one_view = dataclasses.replace(run["config"], test=TestConfig(clips=1, crops=1))
    ((_, expected),) = predictions(run["model"], [path], text_features(run), one_view)
    assert [dict(drawn[-1])[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)


def test_several_videos_follow_each_other_and_broken_ones_are_left_out(run, videos, tmp_path, capsys):
    (videos / "clip5.mp4").write_text("no video")
    out = str(tmp_path / "out.mp4")
    assert predict([str(videos)], **run, annotated=out) == 1
    assert probe(out).num_frames == 10 + 11 + 12
    assert "clip5.mp4\n  error:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is there already"):
        predict([str(videos)], **run, annotated=out)
    assert predict([str(videos / "clip2.mp4")], **run, annotated=out, overwrite=True) == 0
    assert probe(out).num_frames == 11


def test_a_video_is_not_drawn_over_itself(run, videos):
    path = str(videos / "clip2.mp4")
    before = (videos / "clip2.mp4").read_bytes()
    with pytest.raises(ValueError, match="is one of the videos"):
        predict([path], **run, annotated=os.path.join(videos, "below", "..", "clip2.mp4"), overwrite=True)
    assert (videos / "clip2.mp4").read_bytes() == before
    with pytest.raises(ValueError, match="top must be at least 1 class, not 0"):
        predict([path], **run, top=0)


def test_the_demos_checkpoint_is_asked_for_only_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("claver.DEMO_CHECKPOINT", "demo/claver.pt")
    with pytest.raises(ValueError, match=r"demo/claver\.pt: not there yet; run the demo first"):
        check_demo_checkpoint("demo/claver.pt")
    check_demo_checkpoint("other.pt")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "claver.pt").write_bytes(b"")
    check_demo_checkpoint("demo/claver.pt")

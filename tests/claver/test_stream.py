"""A stream of frames through a checkpoint says what evaluation says of the same frames, and ends well however it ends."""

import json
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import stream
import torch
from claver.config import Config, TestConfig
from claver.data import sources
from claver.data.augment import AugmentConfig, crop_views
from claver.data.sources import Source, natural_order, open_source, read_image
from claver.data.video import VideoError, iterate_frames, probe, read_frames
from claver.evaluation.annotate import AnnotatedVideo, annotate
from claver.evaluation.evaluate import class_probabilities
from claver.evaluation.predict import predictions
from claver.evaluation.streaming import StreamClassifier
from claver.model import build_model
from claver.text import encode_prompts, tokens_of
from claver.weights.checkpoint import BEST, load_model, save_checkpoint
from PIL import Image
from small import small_model
from video_files import copy_from, decode_all, numbered_frame, read_numbers, write_video

CLASSES = ["moving left", "moving right", "growing", "turning", "falling"]
PROMPTS = [[f"a video of {name}." for name in CLASSES], CLASSES]
FRAMES = 4
AUGMENT = AugmentConfig(size=32, short_side=40)


def write_checkpoint(path: Path, **changes) -> str:
    """A random model; its temporal blocks and its logits are as large as those of a trained one, so that frames matter."""
    torch.manual_seed(0)
    model_config = small_model(
        **({"frames": FRAMES, "logit_scale": 30.0, "token_std": 0.1, "position_std": 1.0} | changes)
    )
    config = Config(model=model_config, augment=AUGMENT)
    save_checkpoint(path, build_model(model_config).eval(), config, CLASSES, PROMPTS)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "windowed.pt"
    return write_checkpoint(path, attention="kmct", window=FRAMES, temporal_embedding="rotary")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("video") / "twelve.mp4", 12))


def write_images(folder: Path, names: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(numbered_frame(number, 96, 64)).save(folder / name)
    return str(folder)


def stream_json(capsys, *arguments: str, status: int = 0) -> list[dict]:
    assert stream.main([*arguments, "--json"]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def probabilities_in(record: dict) -> list[float]:
    found = {item["class"]: item["probability"] for item in record["top"]}
    return [found[name] for name in CLASSES]


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_a_folder_of_a_run_stands_for_its_best_weights(checkpoint, video, tmp_path, capsys):
    (tmp_path / BEST).write_bytes(Path(checkpoint).read_bytes())
    rows, expected = (stream_json(capsys, video, "--checkpoint", name) for name in (str(tmp_path), checkpoint))
    assert [row["top"] for row in rows] == [row["top"] for row in expected]
    assert stream.main([video, "--checkpoint", str(tmp_path / "none.pt")]) == 1
    assert "none.pt" in capsys.readouterr().err


def test_a_streamed_clip_has_the_probabilities_of_the_whole_clip(checkpoint):
    model, content = load_model(checkpoint)
    text = encode_prompts(model, tokens_of(PROMPTS, model))
    clip = np.random.default_rng(0).integers(0, 256, (FRAMES, 50, 70, 3), dtype=np.uint8)
    whole = crop_views(torch.from_numpy(clip).permute(0, 3, 1, 2), AUGMENT, 1)
    expected = class_probabilities(model, whole[None], text)[0]

    classifier = StreamClassifier(model, FRAMES, AUGMENT, text)
    running = [classifier(image) for image in clip]
    torch.testing.assert_close(running[-1], expected, atol=1e-5, rtol=0)
    assert (running[0] - expected).abs().max() > 1e-3  # the frames before the last matter

    classifier.reset()
    torch.testing.assert_close(torch.stack([classifier(image) for image in clip]), torch.stack(running))
    assert content["classes"] == CLASSES


def test_a_streamed_file_has_the_probabilities_of_its_evaluation(checkpoint, video, capsys):
    model, _ = load_model(checkpoint)
    config = Config(model=small_model(frames=FRAMES), augment=AUGMENT, test=TestConfig(clips=1, crops=1))
    text = encode_prompts(model, tokens_of(PROMPTS, model))
    [(_, expected)] = predictions(model, [video], text, config)
    records = stream_json(capsys, video, "--checkpoint", checkpoint, "--top", "9")
    assert [record["frame"] for record in records] == [1, 4, 7, 10]  # the middles of four quarters
    assert probabilities_in(records[-1]) == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_mean_is_over_the_last_frames_and_the_memory_does_not_grow(checkpoint):
    model, _ = load_model(checkpoint)
    text = encode_prompts(model, tokens_of(PROMPTS, model))
    images = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), dtype=np.uint8)
    classifier = StreamClassifier(model, FRAMES, AUGMENT, text, average=2)
    for image in images:
        found = classifier(image)
    frames = crop_views(torch.from_numpy(images).permute(0, 3, 1, 2), AUGMENT, 1)
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.frame_features(frames), dim=-1)[0, -2:].mean(0)
        expected = model.logits(features[None], text).softmax(-1).mean(1)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    first = classifier.cache_bytes
    for image in images:
        classifier(image)
    assert classifier.cache_bytes == first > 0
    assert classifier.frames == 18


def test_a_stream_is_reset_between_videos(checkpoint, video, tmp_path, capsys):
    other = str(write_video(tmp_path / "other.mp4", 20, size=(64, 64)))
    together = stream_json(capsys, video, other, "--checkpoint", checkpoint, "--every", "2")
    alone = stream_json(capsys, other, "--checkpoint", checkpoint, "--every", "2")
    assert [record["source"] for record in together] == [video] * 6 + [other] * 10
    assert [record["top"] for record in together[6:]] == [record["top"] for record in alone]
    assert [record["seen"] for record in together] == [*range(1, 17)]


def test_other_classes_by_name_or_by_file(checkpoint, video, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    labels.write_text("id,name\n0,cat\n1,dog\n")
    by_file = stream_json(capsys, video, "--checkpoint", checkpoint, "--labels", str(labels))
    by_name = stream_json(capsys, video, "--checkpoint", checkpoint, "--classes", "cat", "dog")
    assert [record["top"] for record in by_file] == [record["top"] for record in by_name]
    assert {item["class"] for item in by_name[-1]["top"]} == {"cat", "dog"}


def test_lines_are_few_if_asked_and_the_summary_says_what_it_cost(checkpoint, video, capsys):
    assert stream.main([video, "--checkpoint", checkpoint, "--every", "1", "--print-every", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["4", "9"]
    assert all(line.count("%") == 3 for line in lines[:2])
    assert re.match(r"12 frames, [\d.]+ a second in the model, at most [\d,]+ bytes of keys and values", lines[2])
    assert lines[3].startswith("the last 4: ")
    assert len(lines) == 4
    assert "\r" not in "".join(lines)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {"attention": "kmct", "temporal_embedding": True},
        {"attention": "causal", "window": 2, "temporal_embedding": True},
        {"attention": "kmct", "temporal_embedding": "rotary"},
    ],
)
def test_a_model_of_clips_alone_begins_anew_and_says_so(model, video, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "c.pt", **model)
    assert stream.main([video, "--checkpoint", path, "--every", "1", "--json", "--top", "9"]) == 0
    printed = capsys.readouterr()
    assert "after each 4 it begins anew" in printed.err
    records = [json.loads(line) for line in printed.out.splitlines()]
    assert len(records) == 12
    loaded, _ = load_model(path)
    text = encode_prompts(loaded, tokens_of(PROMPTS, loaded))
    for last in (3, 7, 11):  # the ends of whole clips
        clip = read_frames(video, range(last - 3, last + 1)).permute(0, 3, 1, 2)
        whole = crop_views(clip, AUGMENT, 1)
        expected = class_probabilities(loaded, whole[None], text)[0]
        assert probabilities_in(records[last]) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_model_without_an_end_does_not_begin_anew(checkpoint, video, capsys):
    assert stream.main([video, "--checkpoint", checkpoint]) == 0
    assert "anew" not in capsys.readouterr().err


@pytest.mark.parametrize("embedding", [True, "rotary"])
def test_a_mask_that_looks_ahead_is_refused(embedding, video, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "kmt.pt", attention="kmt", temporal_embedding=embedding)
    out = tmp_path / "out.mp4"
    assert stream.main([video, "--checkpoint", path, "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a stream's mask must be causal over frames, but under kmt")
    assert not out.exists()


# ---- sources --------------------------------------------------------------------------------------------------------


def test_images_of_a_folder_come_in_natural_order(checkpoint, tmp_path, capsys):
    folder = write_images(tmp_path / "images", ["f10.png", "f9.png", "F1.png", "f2.jpg", ".f3.png"])
    (tmp_path / "images" / "notes.txt").write_text("no image")
    records = stream_json(capsys, folder, "--checkpoint", checkpoint)
    assert [record["frame"] for record in records] == ["F1.png", "f2.jpg", "f9.png", "f10.png"]
    records = stream_json(capsys, folder, "--checkpoint", checkpoint, "--every", "2")
    assert [record["frame"] for record in records] == ["f2.jpg", "f10.png"]
    assert sorted(["a", "1", "a1", "1a", "a01", ""], key=natural_order) == ["", "1", "1a", "a", "a01", "a1"]


def test_images_are_upright_rgb_of_eight_bits(tmp_path):
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4) * 4096
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png"), np.repeat((grey // 256).astype(np.uint8)[..., None], 3, 2))
    turned = Image.new("RGBA", (4, 2), (255, 0, 0, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape == (4, 2, 3)


def test_dropped_images_are_taken_in_order_and_waited_for_while_they_are_written(
    checkpoint, tmp_path, capsys, monkeypatch
):
    whole, folder, tried = tmp_path / "whole", tmp_path / "dropped", []
    write_images(whole, [f"{i}.png" for i in range(5)])
    write_images(folder, ["0.png"])
    monkeypatch.setattr(sources, "POLL", 0.01)
    monkeypatch.setattr(sources, "read_image", lambda path: tried.append(path.name) or read_image(path))

    def until_tried(name):
        end = time.monotonic() + 30
        while name not in tried and time.monotonic() < end:
            time.sleep(0.005)

    def drop():
        until_tried("0.png")
        (folder / "1.png").write_bytes((whole / "1.png").read_bytes())
        content = (whole / "2.png").read_bytes()
        with open(folder / "2.png", "wb") as file:
            file.write(content[:-50])
            file.flush()
            until_tried("2.png")
            (folder / "3.png").write_bytes((whole / "3.png").read_bytes())  # comes later, but is whole first
            time.sleep(0.1)
            file.write(content[-50:])
        until_tried("3.png")
        (folder / "4.png").write_bytes((whole / "4.png").read_bytes())

    thread = threading.Thread(target=drop)
    thread.start()
    assert stream.main([str(folder), "--watch", "--idle", "2", "--checkpoint", checkpoint, "--json", "--top", "9"]) == 0
    thread.join()
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    assert [record["frame"] for record in records] == [f"{i}.png" for i in range(5)]
    assert f"waiting for {folder}/2.png" in printed.err
    same = stream_json(capsys, str(whole), "--checkpoint", checkpoint, "--top", "9")
    assert [record["top"] for record in records] == [record["top"] for record in same]


def test_a_file_is_read_once_it_has_stopped_changing_and_idle_time_begins_anew_with_each_change(tmp_path, monkeypatch):
    """Each look into the folder, a second of its clock apart, finds what the step before it has left."""
    content = Path(write_images(tmp_path / "whole", ["a.png"]), "a.png").read_bytes()
    folder, tried, said = tmp_path / "dropped", [], []
    folder.mkdir()
    steps = {2: content[:100], 3: content[:150], 6: content}  # by the number of the look that finds it
    look = 0

    def sleep(seconds):
        nonlocal look
        look += 1
        if look in steps:
            (folder / "a.png").write_bytes(steps[look])

    monkeypatch.setattr(sources, "time", types.SimpleNamespace(monotonic=lambda: look, sleep=sleep))
    monkeypatch.setattr(sources, "read_image", lambda path: tried.append(look) or read_image(path))
    frames = open_source(str(folder), frames=4, watch=True, idle=4, say=said.append).frames
    assert next(frames)[0] == "a.png"
    assert tried == [4, 5, 7]
    assert len(said) == 1
    assert [*frames] == []
    assert look == 12  # more than four seconds after the seventh
    assert tried == [4, 5, 7]


def test_a_file_that_stays_damaged_ends_the_watch_with_its_name(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "POLL", 0.01)
    folder = write_images(tmp_path / "dropped", ["0.png", "1.png", "2.png"])
    content = Path(folder, "1.png").read_bytes()
    Path(folder, "1.png").write_bytes(content[:-40])
    out = tmp_path / "out.mp4"
    arguments = [folder, "--watch", "--idle", "0.2", "--checkpoint", checkpoint, "--json", "--out", str(out)]
    assert stream.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.count(f"waiting for {folder}/1.png") == 1
    assert printed.err.splitlines()[-1].startswith(f"error: {folder}/1.png: is no image that can be read")
    assert [json.loads(line)["frame"] for line in printed.out.splitlines()] == ["0.png"]
    assert len(decode_all(out)) == 1  # what was seen before is kept


def test_a_watch_without_images_ends_without_a_file(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "POLL", 0.01)
    (tmp_path / "empty").mkdir()
    out, plot = tmp_path / "out.mp4", tmp_path / "plot.png"
    arguments = ["--watch", "--idle", "0.05", "--out", str(out), "--plot", str(plot)]
    assert stream.main([str(tmp_path / "empty"), "--checkpoint", checkpoint, *arguments]) == 0
    assert "no frames" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_camera_without_opencv_says_what_to_install(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert stream.main(["camera:97", "--checkpoint", checkpoint]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: camera:97: FFmpeg cannot open")
    assert "pip install opencv-python" in error


def test_a_camera_of_opencv_gives_rgb_until_it_ends(monkeypatch):
    class Capture:
        def __init__(self, device):
            self.device, self.left, self.released = device, 2, False

        def isOpened(self):  # noqa: N802
            return self.device == 0

        def read(self):
            self.left -= 1
            return self.left >= 0, np.array([[[1, 2, 3]]], np.uint8)

        def release(self):
            self.released = True

    made = []
    cv2 = types.SimpleNamespace(VideoCapture=lambda device: made.append(Capture(device)) or made[-1])
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    frames = open_source("camera:0", frames=4).frames
    assert [next(frames)[1].tolist() for _ in range(2)] == [[[[3, 2, 1]]]] * 2
    with pytest.raises(VideoError, match="camera:0: the camera gives no more frames"):
        next(frames)
    assert made[0].released
    with pytest.raises(VideoError, match="camera:1: OpenCV cannot open"):
        open_source("camera:1", frames=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere.mp4", r"nowhere\.mp4: no such file or folder"),
        (lambda folder: _written(folder / "text.mp4", b"no video"), r"text\.mp4: is not a video file"),
        (lambda folder: _cut(write_video(folder / "cut.mp4", 30)), r"cut\.mp4: the file is truncated"),
        (lambda folder: Path(write_images(folder / "none", [])), "none: no images in this folder"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_before_anything_is_streamed(
    checkpoint, video, make, message, tmp_path, capsys
):
    out = tmp_path / "out.mp4"
    assert stream.main([video, str(make(tmp_path)), "--checkpoint", checkpoint, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert re.match(f"error: .*{message}", printed.err.splitlines()[-1])
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not out.exists()


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _cut(path: Path) -> Path:
    return _written(path, path.read_bytes()[:-300])


@pytest.mark.parametrize("watch", [["--watch"], []])
def test_a_broken_image_in_a_folder_is_named(checkpoint, tmp_path, capsys, watch, monkeypatch):
    monkeypatch.setattr(sources, "POLL", 0.01)
    folder = write_images(tmp_path / "images", ["0.png", "1.png"])
    _written(Path(folder, "1.png"), b"")
    assert stream.main([folder, "--checkpoint", checkpoint, *watch, "--idle", "0.1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {folder}/1.png: is no image")


def test_errors_that_come_before_the_model_is_loaded(tmp_path, video, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ([video], "runs/demo/claver.safetensors: not there yet"),
        ([video, "--checkpoint", "no.pt"], "no.pt: no such checkpoint"),
        ([video, "--checkpoint", "no.pt", "--out", "x.avi"], "x.avi: annotated videos are mp4 files"),
        ([video, "--checkpoint", "no.pt", "--out", video, "--overwrite"], "is a source"),
        ([video, "--checkpoint", "no.pt", "--plot", "x.mp4"], "x.mp4: give the picture a name that ends in .png"),
    ):
        assert stream.main(arguments) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert message in error[0]
    for arguments in (["--every", "0"], ["--average", "x"], ["--idle", "0"], ["--labels", "a", "--classes", "b"]):
        with pytest.raises(SystemExit):
            stream.main([video, *arguments])


# ---- decoding in sequence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"options": {"bf": "2"}},
        {"codec": "mpeg4", "name": "video.avi"},
        {"rotation": 90},
        {"times": [0, 10, 50, 60, 200, 210, 220, 300, 310, 400]},
    ],
)
def test_frames_in_sequence_are_those_by_number(tmp_path, settings):
    path = write_video(tmp_path / settings.pop("name", "video.mp4"), 10, **settings)
    info = probe(path)
    for every, start in ((1, 0), (3, 1), (4, 9)):
        found = [*iterate_frames(info, every=every, start=start)]
        numbers = [*range(start, 10, every)]
        assert [i for i, _ in found] == numbers
        assert np.array_equal(np.stack([image for _, image in found]), read_frames(info, numbers).numpy())


def test_frames_outside_the_edit_list_are_not_streamed(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 20, gop=20)
    info = probe(copy_from(whole, tmp_path / "edited.mp4", seconds=0.2))
    found = [*iterate_frames(info)]
    assert info.num_frames == 15
    assert [i for i, _ in found] == [*range(15)]
    assert read_numbers(np.stack([image for _, image in found])) == [*range(5, 20)]


def test_a_file_that_has_become_shorter_ends_with_an_error(tmp_path):
    info = probe(write_video(tmp_path / "video.mp4", 10))
    write_video(tmp_path / "video.mp4", 7)
    with pytest.raises(VideoError, match=r"video\.mp4: frame 7 of 10 is missing"):
        [*iterate_frames(info)]


# ---- what it writes -------------------------------------------------------------------------------------------------


def test_the_annotated_video_has_each_frame_taken_over_its_bars(checkpoint, video, tmp_path, capsys):
    out, plot = tmp_path / "new" / "out.mp4", tmp_path / "new" / "plot.png"
    arguments = [video, "--checkpoint", checkpoint, "--every", "2", "--out", str(out), "--plot", str(plot)]
    assert stream.main(arguments) == 0
    assert str(out) in capsys.readouterr().out
    pictures = decode_all(out)
    assert len(pictures) == 6
    assert pictures.shape[2] == 384  # 96 x 64 pixels are enlarged
    assert pictures.shape[1] > 256
    assert read_numbers(pictures[:, :256]) == [1, 3, 5, 7, 9, 11]
    assert probe(out).fps == pytest.approx(12.5)
    assert read_image(plot).std() > 5
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.mp4", "plot.png"]


def test_files_are_not_overwritten_unless_asked(checkpoint, video, tmp_path, capsys):
    for option, name in (("--out", "out.mp4"), ("--plot", "plot.png")):
        path = _written(tmp_path / name, b"mine")
        assert stream.main([video, "--checkpoint", checkpoint, option, str(path)]) == 1
        assert f"{path}: is there already; pass --overwrite" in capsys.readouterr().err
        assert path.read_bytes() == b"mine"
        assert stream.main([video, "--checkpoint", checkpoint, option, str(path), "--overwrite"]) == 0
        assert path.stat().st_size > 100
    late = AnnotatedVideo(tmp_path / "late.mp4")
    late.add(np.zeros((64, 64, 3), np.uint8), 10)
    _written(tmp_path / "late.mp4", b"mine")
    with pytest.raises(ValueError, match=r"late\.mp4: is there already; the new"):
        late.close()
    assert (tmp_path / "late.mp4").read_bytes() == b"mine"
    assert len(decode_all(late.partial)) == 1


def test_ctrl_c_finishes_the_file_and_prints_the_summary(checkpoint, tmp_path, capsys, monkeypatch):
    def frames():
        for number in range(3):
            yield number, numbered_frame(number, 96, 64)
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "open_source", lambda name, **_: Source(name, "three frames", frames(), 5.0))
    out, plot = tmp_path / "out.mp4", tmp_path / "plot.png"
    assert stream.main(["x", "--checkpoint", checkpoint, "--out", str(out), "--plot", str(plot)]) == 0
    assert "3 frames" in capsys.readouterr().out
    assert read_numbers(decode_all(out)[:, :256]) == [0, 1, 2]
    assert plot.exists()


def test_ctrl_c_while_a_picture_is_written_waits_until_it_is_there():
    before, done = signal.signal(signal.SIGINT, signal.default_int_handler), []

    def write():
        with stream._whole():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            write()
        assert done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_videos_of_other_sizes_are_fitted_into_the_first(checkpoint, video, tmp_path):
    other = str(write_video(tmp_path / "other.mp4", 8, size=(64, 128)))
    out = tmp_path / "out.mp4"
    assert stream.main([video, other, "--checkpoint", checkpoint, "--out", str(out)]) == 0
    pictures = decode_all(out)
    assert len(pictures) == 8
    assert pictures[-1, :, :20].std() < 3  # bars at the side
    assert pictures[-1].std() > 20


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (301, 333), (33, 501), (900, 31), (1080, 1920)])
def test_annotated_pictures_have_room_for_text_and_sides_that_can_be_encoded(size):
    image = np.full((*size, 3), 200, np.uint8)
    predicted = [("turning counter-clockwise " * 5, 0.5), ("growing", 0.25), ("none", 0.0)]
    picture = annotate(image, predicted, "frame 3")
    height, width = picture.shape[:2]
    assert height % 2 == width % 2 == 0
    assert 256 <= width <= 1280
    assert height < 1600
    blue = (np.abs(picture.astype(int) - (0, 0x72, 0xB2)).sum(-1) < 12).any(0)
    assert blue.mean() == pytest.approx(0.5, abs=0.06)  # the bar of the likeliest class


def test_curves_of_a_long_stream_stay_bounded_and_evenly_apart():
    curves = stream._Curves(most=10)
    for frame in range(1000):
        curves.add(frame, torch.tensor([frame / 1000]))
    assert 5 <= len(curves.times) <= 10
    assert len(set(np.diff(curves.times))) == 1
    assert [row[0] for row in curves.rows] == pytest.approx([frame / 1000 for frame in curves.times])

"""Frames by index are the frames of a plain decode, counts are exact, and what cannot be read is an error by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from claver.data import video
from claver.data.video import VideoError, probe, read_clip, read_frames
from video_files import copy_from, decode_all, keyframe_bytes, read_numbers, write_audio, write_video

B_FRAMES = {"bf": "3", "sc_threshold": "0"}
VARIABLE = np.cumsum(np.random.default_rng(7).integers(10, 90, 50)).tolist()
FILES = {
    "b-frames": ("a.mp4", {"options": B_FRAMES}),
    "every frame a keyframe": ("keys.mp4", {"gop": 1}),
    "two frames a group": ("pairs.mp4", {"gop": 2, "options": B_FRAMES}),
    "open groups": ("open.mp4", {"options": {"bf": "3", "x264-params": "open-gop=1:scenecut=0:keyint=12"}}),
    "no keyframes but the first": ("refresh.mp4", {"options": {"x264-params": "intra-refresh=1:keyint=20"}}),
    "fragments, no count in the header": (
        "fragments.mp4",
        {"options": B_FRAMES, "muxing": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "variable rate": ("variable.mp4", {"options": B_FRAMES, "times": VARIABLE}),
    "variable rate, matroska": ("variable.mkv", {"options": B_FRAMES, "times": VARIABLE}),
    "odd size": ("odd.mp4", {"size": (97, 65), "pixels": "yuv444p", "options": B_FRAMES}),
    "mpeg-4": ("part2.mp4", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "mpeg-4 in avi": ("part2.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "transport stream": ("stream.ts", {"options": B_FRAMES}),
    "vp8": ("hidden.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10"}}),
    "a path that looks like an address": ("http: a%03d [b]?.mp4", {"options": B_FRAMES}),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 frames in groups of 12, with B-frames and the index at the start."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    return write_video(path, 50, options=B_FRAMES, muxing={"movflags": "faststart"})


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number for each frame that `claver.data.video` decodes."""
    seen: list[int] = []
    decode = video._decode_packet

    def counted(packet):
        for frame in decode(packet):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decode_packet", counted)
    return seen


@pytest.mark.parametrize("kind", FILES)
def test_frames_by_index_are_those_of_a_plain_decode(kind: str, tmp_path: Path) -> None:
    name, options = FILES[kind]
    path = write_video(tmp_path / name, 50, **options)
    expected = decode_all(path)
    info = probe(path)
    assert info.num_frames == len(expected) == 50
    assert (info.height, info.width) == expected.shape[1:3]
    assert read_numbers(read_frames(info, range(50)).numpy()) == list(range(50))
    for i in range(50):  # each alone, so that each is sought
        assert np.array_equal(read_frames(info, [i])[0].numpy(), expected[i])
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 8):
        indices = random.integers(0, 50, size)
        assert np.array_equal(read_frames(info, torch.from_numpy(indices)).numpy(), expected[indices])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_outside_an_edit_list_are_neither_counted_nor_returned(
    codec: str, tmp_path: Path, decoded: list[int]
) -> None:
    source = write_video(tmp_path / "source.mp4", 50, codec=codec, options={"bf": "2"})
    path = copy_from(source, tmp_path / "cut.mp4", seconds=0.6)
    expected = decode_all(path)
    info = probe(path)
    assert info.num_frames == len(expected) < 50
    assert read_numbers(expected)[0] > 12
    decoded.clear()
    probe(path)
    assert codec == "mpeg4" or len(decoded) == 1
    assert np.array_equal(read_frames(info, range(info.num_frames)).numpy(), expected)
    for i in range(info.num_frames):
        assert np.array_equal(read_frames(info, [i])[0].numpy(), expected[i])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_packets_before_the_first_keyframe_are_not_counted(suffix: str, tmp_path: Path) -> None:
    source = write_video(tmp_path / f"source.{suffix}", 50, options=B_FRAMES)
    path = copy_from(source, tmp_path / f"headless.{suffix}", skip=5)
    expected = decode_all(path)
    assert read_numbers(expected)[0] == 12
    assert probe(path).num_frames == len(expected) == 38
    assert np.array_equal(read_frames(path, [0, 37, 20]).numpy(), expected[[0, 37, 20]])


def test_a_relative_path_with_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "clip.mp4", 3).rename(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe("12:30.mp4").num_frames == 3


@pytest.mark.parametrize("kind", FILES)
def test_a_clip_is_the_frames_that_are_chosen_of_the_exact_count(kind: str, tmp_path: Path) -> None:
    name, options = FILES[kind]
    path = write_video(tmp_path / name, 50, **options)
    expected = decode_all(path)
    for seed in range(5):

        def choose(count: int, seed: int = seed) -> np.ndarray:
            return np.random.default_rng(seed).integers(0, count, 6)

        assert np.array_equal(read_clip(path, choose).numpy(), expected[choose(50)])
    assert np.array_equal(read_clip(path, range).numpy(), expected)


@pytest.mark.parametrize("kind", ["mpeg-4", "mpeg-4 in avi", "transport stream"])
def test_what_must_be_decoded_to_be_counted_is_decoded_once(kind: str, tmp_path: Path, decoded: list[int]) -> None:
    name, options = FILES[kind]
    path = write_video(tmp_path / name, 50, **options)
    assert read_numbers(read_clip(path, lambda count: range(3, count, 7)).numpy()) == list(range(3, 50, 7))
    assert len(decoded) == 1 + 50  # the first one tells size and rotation


def test_where_packets_are_no_frames_the_clip_is_read_again(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.ts", 50, options=B_FRAMES)
    path = copy_from(source, tmp_path / "headless.ts", skip=5)
    asked: list[int] = []
    frames = read_clip(path, lambda count: asked.append(count) or [0, count - 1])
    assert asked == [45, 38]  # the others are not decodable without a keyframe
    assert read_numbers(frames.numpy()) == [12, 49]
    with pytest.raises(VideoError, match="frame 38 is out of range, the video has 38 frames"):
        read_clip(path, lambda count: [38])


def test_order_and_repeats_are_kept(clip: Path) -> None:
    indices = [49, 0, 0, 30, 7, 49]
    frames = read_frames(clip, indices)
    assert frames.dtype == torch.uint8
    assert frames.shape == (6, 64, 96, 3)
    assert read_numbers(frames.numpy()) == indices
    assert read_frames(clip, []).shape == (0, 64, 96, 3)


def test_rate_duration_and_keyframes(clip: Path, tmp_path: Path) -> None:
    info = probe(clip)
    assert info.fps == pytest.approx(25)
    assert info.duration == pytest.approx(2)
    assert info.keyframes == (0, 12, 24, 36, 48)
    assert info.timestamps is not None
    assert len(info.timestamps) == 50

    path = write_video(tmp_path / "variable.mkv", 50, times=VARIABLE)
    seconds = (VARIABLE[-1] - VARIABLE[0]) / 1000
    assert probe(path).fps == pytest.approx(50 / seconds, rel=0.05)
    assert probe(write_video(tmp_path / "one.mp4", 1)).num_frames == 1


def test_a_late_frame_is_sought_and_a_near_one_is_reached_by_decoding_on(clip: Path, decoded: list[int]) -> None:
    info = probe(clip)
    decoded.clear()
    read_frames(info, [47])
    assert len(decoded) <= 12  # of its group alone
    decoded.clear()
    read_frames(info, [0, 47])
    assert len(decoded) <= 13
    decoded.clear()
    read_frames(info, [10, 13])
    assert len(decoded) == len(set(decoded)) == 14
    decoded.clear()
    read_frames(info, [3, 3, 2, 1])
    assert len(decoded) == 4


def test_the_count_needs_no_decoding(clip: Path, decoded: list[int]) -> None:
    assert probe(clip).num_frames == 50
    assert len(decoded) == 1


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_frames_are_turned_upright(rotation: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "turned.mp4", 3, rotation=rotation)
    info = probe(path)
    assert (info.width, info.height) == ((96, 64) if rotation == 180 else (64, 96))
    upright = np.rot90(decode_all(path), rotation // 90, axes=(1, 2))
    assert np.array_equal(read_frames(info, [0, 1, 2]).numpy(), upright)


@pytest.mark.parametrize("index", [50, -1, 10**9])
def test_an_index_out_of_range_is_an_error(clip: Path, index: int) -> None:
    with pytest.raises(VideoError, match=rf"clip\.mp4: frame {index} is out of range, the video has 50 frames"):
        read_frames(clip, [0, index])


def test_an_index_that_is_no_integer_is_an_error(clip: Path) -> None:
    with pytest.raises(TypeError):
        read_frames(clip, [0.5])  # type: ignore[list-item]


def bad(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad one.mp4"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a video\n" * 100)
    elif kind == "text by its name":
        path = tmp_path / "bad one.txt"
        path.write_text("not a video\n" * 100)
    elif kind == "playlist":
        path.write_text("#EXTM3U\n#EXTINF:2\nclip.ts\n#EXT-X-ENDLIST\n")
    elif kind == "audio":
        write_audio(path)
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "zeros":
        path.write_bytes(bytes(5000))
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("directory", "is a directory"),
        ("empty", "empty"),
        ("text", "not a video file"),
        ("text by its name", "not a video file"),
        ("playlist", "not a video file"),
        ("audio", "no video stream.*audio"),
        ("noise", "not a video file"),
        ("zeros", "not a video file"),
    ],
)
def test_what_is_no_video_is_an_error_with_its_name_and_the_reason(kind: str, reason: str, tmp_path: Path) -> None:
    path = bad(tmp_path, kind)
    for attempt in (probe, lambda path: read_frames(path, [0])):
        with pytest.raises(VideoError, match=rf"bad one\.\w+: .*{reason}"):
            attempt(path)


@pytest.mark.parametrize("kept", [0.01, 0.1, 0.5, 0.9, 0.98, 0.999])
@pytest.mark.parametrize("name", ["index first.mp4", "index last.mp4", "fragments.mp4", "a.mkv", "a.avi"])
def test_a_truncated_file_is_an_error(name: str, kept: float, tmp_path: Path) -> None:
    muxing = {"index first.mp4": "faststart", "fragments.mp4": "frag_keyframe+empty_moov"}.get(name)
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = write_video(tmp_path / name, 50, codec=codec, muxing={"movflags": muxing} if muxing else {})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(VideoError, match=r"truncated|not a video file that FFmpeg can read"):
        probe(path)


def test_the_error_of_a_truncated_file_counts_the_frames(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size * 3 // 4])
    with pytest.raises(VideoError, match=r"cut\.mp4: the file is truncated \(\d+ of \d+ bytes, found \d+ of 50 frames"):
        read_frames(path, [0])


def test_a_file_that_loses_its_end_after_the_probe_is_an_error(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "shrinking.mp4"
    path.write_bytes(clip.read_bytes())
    info = probe(path)
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size * 3 // 4])
    with pytest.raises(VideoError, match=r"shrinking\.mp4"):
        read_frames(info, [49])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_frame_that_the_decoder_patched_up_is_an_error(codec: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "patched.mp4", 50, codec=codec, size=(320, 192), options=B_FRAMES)
    expected = decode_all(path)
    keyframes = probe(path).keyframes
    position, size = keyframe_bytes(path)[2]
    data = bytearray(path.read_bytes())
    data[position + size // 2 : position + size // 2 + 8] = b"\xaa\x55" * 4
    path.write_bytes(data)
    assert len(decode_all(path)) == 50  # FFmpeg itself goes on
    info = probe(path)
    for i in range(50):
        if keyframes[2] <= i < keyframes[3]:
            for read in (lambda i: read_frames(info, [i]), lambda i: read_clip(path, lambda count: [i])):
                with pytest.raises(VideoError, match=r"patched\.mp4: frame \d+ of 50 is damaged"):
                    read(i)
        elif i >= keyframes[3] or i < keyframes[2] - 3:  # B-frames may refer to the damaged one
            assert np.array_equal(read_frames(info, [i])[0].numpy(), expected[i])
            assert np.array_equal(read_clip(path, lambda count, i=i: [i])[0].numpy(), expected[i])


def test_damage_in_the_middle_is_an_error_and_not_a_picture(clip: Path, tmp_path: Path) -> None:
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat") + 4
    middle = (start + len(data)) // 2
    data[middle : middle + len(data) // 6] = bytes(len(data) // 6)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    info = probe(path)
    expected = decode_all(clip)
    refused = 0
    for i in range(50):
        try:
            frame = read_frames(info, [i])[0].numpy()
        except VideoError as error:
            assert "damaged.mp4" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert np.array_equal(frame, expected[i])
    assert 0 < refused < 50


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_file_stays_open(clip: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:3000])
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(100):
        read_frames(clip, [1, 40])
        with pytest.raises(VideoError):
            probe(broken)
    assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before

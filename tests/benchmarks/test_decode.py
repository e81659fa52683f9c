"""The benchmark of reading videos: it knows a wrong frame from a right one, and what the stored result says."""

import json
import os
from pathlib import Path

import decode
import numpy as np
import pytest

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "decode.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    decode.write_video(folder / "plain.mp4", 40)
    decode.write_cut(folder / "plain.mp4", folder / "cut.mp4", skipped=0.4)
    return folder


def test_our_reader_gives_the_frames_of_a_plain_decode_and_refuses_broken_files(files):
    plain, cut = (decode.plain_decode(str(files / f"{name}.mp4")) for name in ("plain", "cut"))
    assert (len(plain), len(cut)) == (40, 30)
    np.testing.assert_array_equal(cut, plain[10:])
    for name, truth in (("plain", plain), ("cut", cut)):
        assert decode.compare(decode.READERS["kronmask"], str(files / f"{name}.mp4"), truth) == (1.0, 0)
    for path in decode.write_broken(files / "plain.mp4", files).values():
        with pytest.raises(ValueError, match=path.name):
            decode.READERS["kronmask"](str(path), decode.indices_of(40))


def test_frames_that_are_not_the_ones_asked_for_are_counted(files):
    truth = decode.plain_decode(str(files / "plain.mp4"))

    def late(path, indices):
        return truth[[min(i + (i > 20), 39) for i in indices]]

    def pale(path, indices):
        return truth[list(indices)] // 2 + 3

    assert decode.compare(late, "", truth) == (0.5, 0)
    share, difference = decode.compare(pale, "", truth)
    assert share < 1 or difference > 50


def test_pyavs_ffmpeg_is_lent_under_its_usual_names(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    decode.lend_ffmpeg(tmp_path / "ffmpeg")
    names = {path.name.partition(".so.")[0] for path in (tmp_path / "ffmpeg").iterdir()}
    assert {"libavcodec", "libavformat", "libavutil", "libswscale"} <= names
    assert os.environ["LD_LIBRARY_PATH"].split(os.pathsep)[0::2] == [str(tmp_path / "ffmpeg"), "/elsewhere"]


def test_the_stored_readers_were_compared_and_ours_was_right(tmp_path):
    stored = json.loads(STORED.read_text())
    rows = {row["reader"]: row for row in stored["rows"]}
    assert rows.keys() == decode.READERS.keys()
    ours = rows["kronmask"]
    assert [ours[key] for key in ("right_frames_plain", "right_frames_cut", "difference_plain", "difference_cut")] == [
        1,
        1,
        0,
        0,
    ]
    assert all(ours[f"refused_{kind}"] for kind in ("truncated", "damaged", "no_video"))
    assert ours["over_ours_1"] == ours["over_ours_2"] == 1
    resident = dict(ours["resident_bytes"])
    assert resident[stored["decodes"]] <= 1.01 * resident[500]  # by then it has what every read needs
    decode.plot(stored["rows"], tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 10_000

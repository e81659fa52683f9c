"""The benchmark of streams: what it measures on a small model, and what the stored result says."""

import json
from pathlib import Path

import pytest
from model_speed import Encoder
from stream_speed import SLIDING, STREAM, WHOLE, YOUNG, main

pytest.importorskip("timm")

TINY = Encoder(image=32, width=48, depth=3, heads=3, classes=4)
STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "stream_speed.json"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream_speed")
    arguments = ["--frames", "12", "30", "--window", "4", "--rounds", "2", "--longest", "12", "--out", str(folder)]
    return main(arguments, TINY), folder


def test_every_way_is_timed_at_every_number_of_frames_and_the_whole_clip_while_it_is_short(measured):
    rows, _ = measured
    assert [(row["way"], row["frames_seen"]) for row in rows] == [
        *((way, 12) for way in (STREAM, YOUNG, SLIDING, WHOLE)),
        *((way, 30) for way in (STREAM, YOUNG, SLIDING)),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    assert {row["cache_bytes"] for row in rows if row["way"] == STREAM} == {
        1 * 2 * 3 * 5 * 48 * 4
    }  # 3 frames of 5 tokens


def test_files_are_written_with_their_origin(measured):
    rows, folder = measured
    stored = json.loads((folder / "stream_speed.json").read_text())
    assert stored["rows"] == rows
    assert stored["window"] == 4
    assert {"command", "machine", "date", "versions"} <= stored.keys()
    assert (folder / "stream_speed.png").stat().st_size > 0


def test_too_few_frames_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--frames", "10", "--window", "8", "--rounds", "9"], TINY)
    assert "must be more than the window and the rounds" in capsys.readouterr().err


def test_a_frame_of_a_stored_stream_costs_the_same_after_a_thousand():
    stored = json.loads(STORED.read_text())
    rows = {(row["way"], row["frames_seen"]): row for row in stored["rows"]}
    first, last = rows[STREAM, 50], rows[STREAM, 1000]  # by then the other ways have allocated what they need
    assert 0.9 <= last["over_begun"] <= 1.1
    assert last["cache_bytes"] == first["cache_bytes"]
    assert last["resident_bytes"] <= 1.02 * first["resident_bytes"]
    assert rows[SLIDING, 1000]["over_stream"] >= 3

"""The attention benchmark: what it reports follows from its definitions, and it never times a wrong result."""

from __future__ import annotations

import csv
import json
import math
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attn_contenders
import attn_speed
import pytest
import torch
from attn_contenders import CONTENDERS, Case, Contender
from attn_figures import draw
from attn_speed import main, run_case, useful_flops
from torch.nn import functional as F

from kronmask import kron_attention, masks

COLUMNS = {
    "mask", "contender", "pass", "frames", "tokens", "batch", "heads", "head_dim", "dtype", "device", "seconds", "spread",
    "rounds", "density", "useful_flops", "tflops", "over_joint", "over_sdpa_mask", "over_flex_128", "ideal",
    "realised_over_ideal", "peak_bytes", "peak_over_q", "mask_seconds", "error", "note",
}  # fmt: skip
SIZES = ["--heads", "2", "--head-dim", "8", "--batch", "2", "--device", "cpu"]
TINY = [*SIZES, "--tokens", "5", "--rounds", "2", "--no-memory"]
PEERS = ["--peers", "joint", "divided", "sdpa_mask", "mha"]  # without FlexAttention, whose compilation takes long


def case(passes: str = "forward+backward", **sizes: Any) -> Case:
    sizes = {"frames": 3, "tokens": 5, "batch": 2, "heads": 2, "head_dim": 8, "dtype": "float32"} | sizes
    return Case(**sizes, device="cpu", passes=passes)


def measure(case: Case, *entries: tuple[str, str], rounds: int = 1, limit: float = 60) -> list[dict[str, Any]]:
    return run_case(case, entries, rounds=rounds, limit=limit, memory=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """A small run of the whole command."""
    folder = tmp_path_factory.mktemp("results")
    return main([*TINY, *PEERS, "--frames", "2", "3", "--backends", "triton", "sdpa", "--out", str(folder)]), folder


def test_a_run_writes_json_csv_and_pictures(run):
    rows, folder = run
    stored = json.loads((folder / "attn_speed.json").read_text())
    assert stored["rows"] == rows
    assert {"command", "date", "machine", "versions"} <= set(stored)
    assert stored["peaks"]["float32"]["tflops"] > 0
    with (folder / "attn_speed.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) == 2 * 2 * (2 + 2 * (2 + 2))  # frames, passes; 2 peers, and for both masks 4 more
    assert all(set(row) == COLUMNS for row in [*rows, *written])
    pictures = {path.name: path.stat().st_size for path in folder.glob("*.png")}
    assert set(pictures) == {f"attn_speed_{what}.png" for what in ("frames", "tokens", "roofline")}
    assert min(pictures.values()) > 10_000


@pytest.mark.parametrize(
    ("kept", "pictures"),
    [
        (lambda row: row["contender"] in ("joint", "divided"), ["roofline"]),
        (lambda row: row["contender"] == "divided" or row["pass"] == "forward", ["roofline", "frames", "tokens"]),
        (lambda row: row["mask"] == "kmct", ["roofline", "frames", "tokens"]),
        (lambda row: row["error"] is not None, []),
    ],
)
def test_what_can_be_drawn_of_a_part_of_the_rows_is_drawn(run, kept, pictures, tmp_path):
    rows, folder = run
    peaks = json.loads((folder / "attn_speed.json").read_text())["peaks"]
    drawn = draw([row for row in rows if kept(row)], peaks, tmp_path, "part")
    assert drawn == [tmp_path / f"part_{picture}.png" for picture in pictures]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_what_a_backend_refuses_is_a_row_that_says_so_and_the_others_go_on(run):
    rows, _ = run
    refused = [row for row in rows if row["error"] is not None]
    assert {row["contender"] for row in refused} == {"kronmask triton"}
    assert all("Triton has no CPU" in row["error"] and row["seconds"] is None for row in refused)
    assert all(row["seconds"] > 0 and row["rounds"] == 2 for row in rows if row["error"] is None)


def test_the_ratios_follow_from_times_and_density(run):
    rows, _ = run
    for row in rows:
        if row["error"] is None:
            assert row["realised_over_ideal"] == row["ideal"] / row["over_joint"]
            assert row["tflops"] == row["useful_flops"] / row["seconds"] / 1e12
        if row["contender"] == "joint":
            assert (row["over_joint"], row["density"], row["mask"]) == (1.0, 1.0, "joint")
        if row["contender"] == "sdpa_mask":
            assert row["over_sdpa_mask"] == 1.0
            assert row["mask_seconds"] > 0
            assert row["density"] == masks.NAMES[row["mask"]](row["frames"], row["tokens"]).density


@pytest.mark.parametrize("name", masks.NAMES)
def test_useful_work_is_four_flops_for_each_allowed_pair_head_and_feature(name):
    forward, both = case("forward"), case()
    pairs = int(masks.NAMES[name](3, 5).dense().sum())
    assert useful_flops(forward, pairs) == 4 * 2 * 2 * 8 * pairs
    assert useful_flops(both, pairs) == 3.5 * useful_flops(forward, pairs)
    (row,) = measure(forward, (name, "kronmask sdpa"))
    assert row["useful_flops"] == useful_flops(forward, pairs)


def test_the_work_of_divided_attention_is_that_of_its_two_steps():
    (row,) = measure(case("forward"), (attn_speed.MASK_FREE["divided"], "divided"))
    pairs = masks.temporal(3, 5).num_pairs + masks.spatial(3, 5).num_pairs
    assert row["useful_flops"] == useful_flops(case("forward"), pairs)


def test_divided_attention_is_temporal_then_spatial_attention():
    query, key, value = attn_contenders.qkv(case("forward"))
    over_frames = kron_attention(query, key, value, masks.temporal(3, 5), backend="dense")
    expected = kron_attention(query, key, over_frames, masks.spatial(3, 5), backend="dense")
    torch.testing.assert_close(CONTENDERS["divided"](case("forward"), "").forward(), expected)


@pytest.mark.parametrize("name", masks.NAMES)
def test_the_masks_that_flex_attention_is_given_are_the_masks(name):
    positions = torch.arange(15)
    allowed = attn_contenders._mask_mod(name, case())(0, 0, positions[:, None], positions)
    assert torch.equal(allowed, masks.NAMES[name](3, 5).dense())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_results_pass_the_check_in_every_dtype(dtype):
    names = ("kronmask sdpa", "kronmask dense", "sdpa_mask", "mha")
    rows = measure(case(dtype=dtype, frames=4, tokens=17), ("joint", "joint"), *(("kmct", name) for name in names))
    assert [row["error"] for row in rows] == [None] * 5


def without_mask(case: Case, mask_name: str) -> Contender:
    return CONTENDERS["joint"](case, "joint")


def without_gradient_of_value(case: Case, mask_name: str) -> Contender:
    query, key, value = attn_contenders.qkv(case)
    mask = masks.NAMES[mask_name](case.frames, case.tokens).dense()
    return Contender(
        lambda: F.scaled_dot_product_attention(query, key, value.detach(), attn_mask=mask) + 0 * value,
        (query, key, value),
    )


def without_luck(case: Case, mask_name: str) -> Contender:
    raise ImportError("no module named peer")


@pytest.mark.parametrize(
    ("contender", "message"),
    [
        (without_mask, "wrong result: output is"),
        (without_gradient_of_value, "wrong result: grad value is"),
        (without_luck, "ImportError: no module named peer"),
    ],
)
def test_a_wrong_or_failing_contender_is_not_timed_and_the_others_go_on(monkeypatch, contender, message):
    monkeypatch.setitem(CONTENDERS, "peer", contender)
    peer, joint = measure(case(), ("kmt", "peer"), ("joint", "joint"))
    assert message in peer["error"]
    assert peer["seconds"] is None
    assert joint["seconds"] > 0


def test_a_contender_that_fails_while_it_is_timed_says_so(monkeypatch):
    def fails_later(case: Case, mask_name: str) -> Contender:
        sound, calls = CONTENDERS["joint"](case, mask_name), iter(range(2))
        return Contender(lambda: (next(calls), sound.forward())[1], sound.inputs)

    monkeypatch.setitem(CONTENDERS, "peer", fails_later)
    peer, joint = measure(case(), ("joint", "peer"), ("joint", "joint"), rounds=3)
    assert peer["error"].startswith("StopIteration")
    assert peer["seconds"] is None
    assert joint["rounds"] == 3


def test_scores_that_do_not_fit_into_memory_are_not_tried(monkeypatch):
    monkeypatch.setattr(attn_speed, "available_memory", lambda device: 2**20)
    names = ("kronmask dense", "kronmask flex", "kronmask sdpa")
    *unfused, fused = measure(case(frames=8, tokens=50), *(("kmt", name) for name in names))
    assert all("skipped: would need 0.0 GiB, 0.0 available" in row["error"] for row in unfused)
    assert fused["error"] is None


def test_a_slow_contender_is_timed_once(monkeypatch):
    monkeypatch.setattr(attn_speed, "SLOW", 0.0)
    rows = measure(case("forward"), ("joint", "joint"), ("kmt", "kronmask dense"), rounds=2, limit=0)
    assert [row["rounds"] for row in rows] == [1, 1]
    assert all(row["error"] is None and row["over_joint"] > 0 for row in rows)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process is read from Linux's /proc"
)
def test_peak_memory_counts_the_output_and_what_is_held_for_it(tmp_path):
    sizes = [*SIZES, "--frames", "8", "--tokens", "50", "--passes", "forward", "--rounds", "1", "--out", str(tmp_path)]
    joint, dense = main([*sizes, "--peers", "joint", "--backends", "dense", "--masks", "kmt", "--no-plots"])
    output = 2 * 2 * 400 * 8 * 4
    scores = 2 * 2 * 400 * 400 * 4
    assert output <= joint["peak_bytes"] < scores < dense["peak_bytes"] < 8 * scores
    assert joint["peak_over_q"] == (joint["peak_bytes"] - output) / output


def test_a_run_that_is_stopped_leaves_the_cases_that_were_done(monkeypatch, tmp_path):
    def stopped(case: Case, *args: Any, **options: Any) -> list[dict[str, Any]]:
        if case.frames == 3:
            raise KeyboardInterrupt
        return run_case(case, *args, **options)

    monkeypatch.setattr(attn_speed, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        main([*TINY, "--peers", "joint", "--backends", "--frames", "2", "3", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "attn_speed.json").read_text())["rows"]
    assert [(row["frames"], row["pass"]) for row in rows] == [(2, "forward"), (2, "forward+backward")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masks", "kmtt"], "invalid choice: 'kmtt'"),
        (["--backends", "cudnn"], "invalid choice: 'cudnn'"),
        (["--peers", "natten"], "invalid choice: 'natten'"),
        (["--frames", "0"], "argument --frames: must be at least 1, not 0"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_quick_run_does_not_touch_the_stored_results():
    quick, default = attn_speed._parse(["--quick"]), attn_speed._parse([])
    assert quick.out != default.out == attn_speed.RESULTS
    assert len(quick.shapes) < len(default.shapes)
    assert default.rounds >= 9
    assert math.prod(max(default.shapes)) >= 32 * 197


def test_kernels_that_cannot_run_here_are_contenders_only_when_asked_for():
    default, asked = (
        attn_speed._parse(["--device", "cpu"]),
        attn_speed._parse(["--device", "cpu", "--peers", "sdpa-fa4"]),
    )
    assert not {"flex-flash", "sdpa-fa3", "sdpa-fa4"} & {*default.peers, *default.backends}
    assert {"joint", "mha", "flex_128"} < set(default.peers)
    assert {"triton", "sdpa", "flex", "dense"} == set(default.backends)
    assert asked.peers == ["sdpa-fa4"]
    (row,) = measure(case("forward"), ("kmt", "sdpa-fa4"))
    assert row["error"]
    assert row["seconds"] is None


def test_all_calls_of_a_contender_and_no_others_run_inside_of_what_is_around_it(monkeypatch):
    inside, seen = [], {"around": [], "beside": []}

    @contextmanager
    def around():
        inside.append(True)
        yield
        inside.pop()

    def peer(name, where):
        def contender(case, mask_name):
            sound = CONTENDERS["joint"](case, mask_name)
            return Contender(lambda: seen[name].append(bool(inside)) or sound.forward(), sound.inputs, around=where)

        return contender

    monkeypatch.setitem(CONTENDERS, "around", peer("around", around))
    monkeypatch.setitem(CONTENDERS, "beside", peer("beside", nullcontext))
    measure(case("forward"), ("joint", "around"), ("joint", "beside"), rounds=3)
    assert len(seen["around"]) >= 5  # the check, a warm-up and each round
    assert all(seen["around"])
    assert not any(seen["beside"])


def test_flash_kernels_are_active_inside_and_those_before_are_again_after(monkeypatch):
    active = ["mine"]
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active[0], raising=False)
    monkeypatch.setattr(
        torch.nn.attention, "restore_flash_attention_impl", lambda: active.__setitem__(0, None), raising=False
    )
    activate = lambda name: active.__setitem__(0, name)  # noqa: E731
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
    with attn_contenders._flash_kernels("FA4"):
        assert active == ["FA4"]
    assert active == ["mine"]

"""Facts about the compiled kernels on their default configurations, for GPUs that are not there.

The stored report has all of them; a few are compiled again, to see that it still tells of these kernels, in a process of its own:
where the tests run in Triton's interpreter, nothing can be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
import triton

from kronmask import masks
from kronmask.kernels import tiles
from kronmask.kernels.config import PASSES, defaults, options
from kronmask.kernels.machine import PIPES
from kronmask.kernels.tiles import Blocks, choose_tiling, dense_visits, make_tiling, transposed

STORED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "kernel_report.json").read_text())
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
MODELLED = ("sm_80", "sm_90", "sm_100")


def run(code_or_module: list[str]) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *code_or_module], env=environment, capture_output=True, text=True, timeout=900
    )


def stored(arch: str, head_dim: int, mask: str = "kmt") -> list[dict]:
    """The rows of the default kernels, in the order of the passes and their options."""
    keys = ("arch", "head_dim", "mask")
    return [row for row in STORED["kernels"] if tuple(row[key] for key in keys) == (arch, head_dim, mask)]


def name_of(row: dict) -> str:
    return f"{row['arch']} {row['step']} D={row['head_dim']} {row['mask']} {row['option']}"


def overlapped(row: dict, loop: str) -> float:
    assert set(row["loops"][loop]) == set(PIPES)
    return max(row["loops"][loop].values())


# ---- the stored report is of these kernels --------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_90", 64), ("sm_100", 64)])
def test_the_stored_report_is_what_the_kernels_compile_to(arch, head_dim):
    code = f"""
import json, torch
from kronmask.kernels.compiled import compile_kernel
from kronmask.kernels.config import PASSES, options
from kronmask.kernels.report import kernel_row
for step in PASSES:
    for option in options(step, {arch!r}, {head_dim}, torch.bfloat16):
        print(json.dumps(kernel_row(compile_kernel(step, option, "kmt", {head_dim}, torch.bfloat16, {arch!r}))))
"""
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    if STORED["versions"]["triton"] == triton.__version__:
        assert compiled == stored(arch, head_dim), (
            "run python -m kronmask.kernels.report --json (see benchmarks/README.md)"
        )


def test_the_kernels_compile_for_amd():
    code = """
import torch
from kronmask.kernels.compiled import compile_kernel
from kronmask.kernels.config import PASSES, options
for step in PASSES:
    kernel = compile_kernel(step, options(step, "gfx942", 64, torch.bfloat16)[0], "kmt", 64, torch.bfloat16, "gfx942")
    print(kernel.matrix, kernel.spilled_bytes, kernel.shared_bytes <= kernel.shared_limit)
"""
    done = run(["-c", code])
    assert done.stdout.splitlines() == ["mfma 0 True"] * 3, done.stderr


def test_every_variant_compiles():
    """What the interpreter forgives (it has no types of loop-carried values), the compiler does not."""
    code = """
import torch
from kronmask.kernels.compiled import compile_kernel
from kronmask.kernels.config import PASSES, Option
option = Option(32, 32, 4, 2)
for step in PASSES:
    for head_dim, dtype, extra in [
        (80, torch.float16, {"GROUP": 2, "HAS_GRAD_LSE": True}),
        (16, torch.float32, {"DIAGONALS": 2, "TESTED": True}),
    ]:
        compile_kernel(step, option, "joint", head_dim, dtype, "sm_90", **extra)
print("compiled")
"""
    done = run(["-c", code])
    assert done.stdout == "compiled\n", done.stderr


def test_descriptors_and_warp_specialisation_are_in_the_machine_code():
    """Of hot loops: copies of blocks by the tensor memory accelerator and none by threads, and nothing spilled."""
    code = """
import json, torch
from kronmask.kernels import compiled
from kronmask.kernels.config import Option
from kronmask.kernels.report import kernel_row
read = compiled.read_code
def counted(*arguments):
    global code
    code = read(*arguments)
    return code
compiled.read_code = counted
for arch, step, option in [
    ("sm_90", "forward", Option(128, 64, 4, 2, "descriptors")),
    ("sm_90", "backward_query", Option(64, 64, 4, 2, "descriptors")),
    ("sm_100", "forward", Option(128, 128, 8, 2, "descriptors")),
    ("sm_100", "forward", Option(128, 128, 4, 2, "specialised")),
]:
    row = kernel_row(compiled.compile_kernel(step, option, "kmt", 64, torch.bfloat16, arch))
    names = ("UTMALDG", "LDGSTS", "LDL", "STL")
    print(json.dumps(row | {name: sum(name in line for line in code.hot_loop) for name in names}))
"""
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["UTMALDG"] == 2
        assert row["LDGSTS"] == row["LDL"] == row["STL"] == 0
    assert [row["spilled_bytes"] for row in rows[:3]] == [0, 0, 0]
    warps = [[warps for warps, _ in row.get("partitions", [])] for row in rows]
    assert warps == [[], [], [], [4, 4, 1, 2]]  # softmax; rescaling, products, copies
    assert rows[3]["buffers"] == 2


# ---- what it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", STORED["kernels"], ids=name_of)
def test_default_configurations_use_the_hardware(row):
    assert row["stack"]["whole"] == 0, "registers are spilled in the loop over whole blocks"
    assert row["spilled_bytes"] <= 256
    assert row["shared_bytes"] <= row["shared_limit"]
    assert row["matrix"] == MATRIX[row["arch"]]
    assert row["matrix_instructions"] > 0
    assert row["async_copies"] > 0


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("arch", MODELLED)
def test_every_default_is_stored_for_both_kinds_of_mask(arch, head_dim):
    expected = [(step, str(o)) for step in PASSES for o in options(step, arch, head_dim, torch.bfloat16)]
    for mask in ("joint", "kmt"):
        assert [(row["step"], row["option"]) for row in stored(arch, head_dim, mask)] == expected


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", MODELLED)
def test_the_hot_loop_of_structured_masks_is_that_of_joint_attention(arch, head_dim):
    for joint, kmt in zip(stored(arch, head_dim, "joint"), stored(arch, head_dim), strict=True):
        assert kmt["instructions"] <= 1.03 * joint["instructions"], name_of(kmt)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tails_cost_at_most_1_4_times_a_whole_block(arch, head_dim):
    for row in stored(arch, head_dim):
        for loop in set(row["loops"]) - {"whole"}:
            assert overlapped(row, loop) <= 1.4 * overlapped(row, "whole"), (name_of(row), loop)


@pytest.mark.parametrize(
    ("arch", "head_dim", "step", "blocks", "share"),
    [
        ("sm_90", 64, "forward", 2, 0.92),
        ("sm_90", 128, "forward", 1, 0.95),
        ("sm_90", 64, "backward_query", 2, 0.85),
        (
            "sm_90",
            64,
            "backward_key",
            2,
            0.79,
        ),  # its columns' log-sum-exp and delta take the rest of shared memory's time
        ("sm_90", 128, "backward_query", 2, 0.85),
        ("sm_90", 128, "backward_key", 2, 0.88),
        ("sm_80", 64, "forward", 2, 0.72),
    ],
)
def test_the_first_default_leaves_the_tensor_cores_little_idle(arch, head_dim, step, blocks, share):
    row = next(row for row in stored(arch, head_dim) if row["step"] == step)
    assert row["blocks"] >= blocks
    assert row["share"]["overlapped"] >= share
    assert row["share"]["in_turn"] <= row["share"]["estimated"] <= row["share"]["overlapped"]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_matrix_instructions_are_of_full_width_on_sm_90(head_dim):
    rows = {row["step"]: row for row in reversed(stored("sm_90", head_dim))}  # the first option of each pass
    assert {step: row["width"] for step, row in rows.items()} == dict.fromkeys(PASSES, 1.0)


MOST = {  # of joint attention's cycles in the same kernel, in the loops over blocks: KMT, KMCT
    (8, 50): (1.0, 0.55),
    (8, 197): (0.92, 0.50),
    (8, 257): (0.92, 0.50),
    (32, 197): (0.985, 0.51),
}


@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_masks_cost_little_more_than_their_share_of_joint_attention(arch, step):
    rows = [row for row in STORED["masks"] if (row["arch"], row["head_dim"], row["step"]) == (arch, 64, step)]
    costs = {(row["mask"], row["frames"], row["tokens"]): row["loops"] for row in rows}
    for size, most in MOST.items():
        for name, limit in zip(("kmt", "kmct"), most, strict=True):
            assert costs[(name, *size)] <= limit, (name, size)


def test_the_weights_of_the_choice_are_those_of_the_compiled_kernels():
    """Of the forward and backward on two GPUs; the tiling is chosen by one set for all."""
    found: dict[str, list[float]] = {loop: [] for loop in (*tiles.LOOPS, "tile", "diagonal")}
    for arch in ("sm_80", "sm_90"):
        for joint, kmt in zip(stored(arch, 64, "joint"), stored(arch, 64), strict=True):
            whole = overlapped(kmt, "whole")
            columns = int(kmt["option"].split("x")[1].split("w")[0]) / whole
            for loop in tiles.LOOPS:
                found[loop].append(overlapped(kmt, loop) / whole)
            found["tile"].append(joint["tile"] * columns)
            found["diagonal"].append((kmt["tile"] + kmt["diagonal"] - joint["tile"]) * columns)
    for loop, weight in zip(tiles.LOOPS, tiles.WEIGHTS, strict=True):
        assert weight == pytest.approx(mean(found[loop]), rel=0.1), loop
    assert pytest.approx(mean(found["tile"]), rel=0.25) == tiles.TILE_OVERHEAD
    assert pytest.approx(mean(found["diagonal"]), rel=0.25) == tiles.DIAGONAL_COLUMNS


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("name", "tokens", "most"),
    [
        ("kmt", 197, 0.92),
        ("kmct", 197, 0.51),
        ("kmt", 257, 0.89),
        ("kmct", 257, 0.48),
        ("kmt", 50, 1.0),
        ("kmct", 50, 1.0),
        ("kmt", 256, 0.875),
        ("kmct", 256, 0.438),
    ],
)
def test_the_default_forward_visits_few_tiles(name, tokens, most, head_dim, arch):
    mask = masks.NAMES[name](8, tokens)
    candidates = tuple(Blocks(o.rows, o.columns) for o in defaults("forward", arch, head_dim, torch.bfloat16))
    kind, blocks = choose_tiling(mask, candidates)
    coarse = 0.01 if blocks == Blocks(128, 128) else 0.0  # fewer, larger blocks: each counts for more
    assert make_tiling(mask, blocks, kind).visits / dense_visits(mask, blocks) <= most + coarse


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("tokens", [50, 197, 257, 577])
@pytest.mark.parametrize("name", ["kmt", "kmct"])
def test_no_pass_visits_more_than_the_dense_grid(name, tokens, arch):
    for step in PASSES:
        mask = masks.NAMES[name](8, tokens)
        mask = transposed(mask) if step == "backward_key" else mask
        candidates = tuple(Blocks(o.rows, o.columns) for o in defaults(step, arch, 64, torch.bfloat16))
        kind, blocks = choose_tiling(mask, candidates)
        assert make_tiling(mask, blocks, kind).visits <= dense_visits(mask, blocks)

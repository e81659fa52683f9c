"""Facts about the compiled kernels on their default configurations, for GPUs that are not there.

The report compiles in a process of its own: where the tests run in Triton's interpreter, nothing can be compiled.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache

import pytest
import torch

from kronmask import masks
from kronmask.kernels.config import PASSES, options
from kronmask.kernels.tiles import Blocks, choose_tiling, dense_visits, make_tiling, transposed

MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def run(code_or_module: list[str]) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *code_or_module], env=environment, capture_output=True, text=True, timeout=900
    )


@lru_cache
def report(arch: str, head_dim: int, folder: str) -> dict:
    file = f"{folder}/{arch}-{head_dim}.json"
    arguments = ["--arch", arch, "--head-dim", str(head_dim), "--json", file]
    done = run(["-m", "kronmask.kernels.report", *arguments])
    assert done.returncode == 0, done.stderr
    return json.load(open(file))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_default_configurations_use_the_hardware(arch, head_dim, tmp_path_factory):
    kernels = report(arch, head_dim, str(tmp_path_factory.getbasetemp()))["kernels"]
    assert {kernel["step"] for kernel in kernels} == set(PASSES)
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= kernel["shared_limit"], kernel
        assert kernel["matrix"] == MATRIX[arch], kernel
        assert kernel["matrix_instructions"] > 0, kernel
        assert kernel["async_copies"] > 0, kernel
    for joint, kmt in zip(kernels[::2], kernels[1::2], strict=True):
        assert (joint["mask"], kmt["mask"]) == ("joint", "kmt")
        assert kmt["instructions"] <= 1.02 * joint["instructions"], (joint, kmt)


def test_the_kernels_compile_for_amd(tmp_path_factory):
    kernels = report("gfx942", 64, str(tmp_path_factory.getbasetemp()))["kernels"]
    for kernel in kernels:
        assert kernel["matrix"] == "mfma", kernel
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= kernel["shared_limit"], kernel


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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("name", "tokens", "most"),
    [
        ("kmt", 197, 0.92),
        ("kmct", 197, 0.48),
        ("kmt", 257, 0.89),
        ("kmct", 257, 0.47),
        ("kmt", 50, 1.0),
        ("kmct", 50, 1.0),
        ("kmt", 256, 0.875),
        ("kmct", 256, 0.438),
    ],
)
def test_the_default_forward_visits_few_tiles(name, tokens, most, head_dim, arch):
    mask = masks.NAMES[name](8, tokens)
    candidates = tuple(Blocks(o.rows, o.columns) for o in options("forward", arch, head_dim, torch.bfloat16))
    kind, blocks = choose_tiling(mask, candidates)
    assert make_tiling(mask, blocks, kind).visits / dense_visits(mask, blocks) <= most


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("tokens", [50, 197, 257, 577])
@pytest.mark.parametrize("name", ["kmt", "kmct"])
def test_no_pass_visits_more_than_the_dense_grid(name, tokens, arch):
    for step in PASSES:
        mask = masks.NAMES[name](8, tokens)
        mask = transposed(mask) if step == "backward_key" else mask
        candidates = tuple(Blocks(o.rows, o.columns) for o in options(step, arch, 64, torch.bfloat16))
        kind, blocks = choose_tiling(mask, candidates)
        assert make_tiling(mask, blocks, kind).visits <= dense_visits(mask, blocks)

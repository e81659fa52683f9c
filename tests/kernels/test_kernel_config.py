"""The choice of a configuration; `tests/test_auto.py` has its timing."""

import pytest
import torch

from kronmask import masks
from kronmask.kernels import config as config_module
from kronmask.kernels.config import PASSES, TABLE, architecture, choose, defaults, options
from kronmask.kernels.tiles import Blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("arch", TABLE)
def test_every_architecture_has_options_for_every_head_dimension(arch, head_dim, dtype):
    for step in ("forward", "backward_query", "backward_key"):
        assert options(step, arch, head_dim, dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", TABLE)
def test_without_descriptors_only_pointers_are_offered(arch, head_dim):
    for step in PASSES:
        assert {o.loads for o in defaults(step, arch, head_dim, torch.bfloat16, descriptors=False)} == {"pointers"}
        if arch not in ("sm_90", "sm_100"):
            assert {o.loads for o in options(step, arch, head_dim, torch.bfloat16)} == {"pointers"}


def test_warps_are_specialised_on_sm_100_alone():
    for arch in set(TABLE) - {"sm_100"}:
        for head_dim in (64, 128, 256):
            assert all(o.loads != "specialised" for o in options("forward", arch, head_dim, torch.bfloat16))
    for step in ("backward_query", "backward_key"):
        assert all(o.loads != "specialised" for o in options(step, "sm_100", 64, torch.bfloat16))


def test_a_triton_that_specialises_in_another_way_gets_what_comes_next(monkeypatch):
    first = [defaults("forward", "sm_100", 128, torch.bfloat16)[0].loads]
    monkeypatch.setattr(config_module, "SPECIALISES", False)
    first.append(defaults("forward", "sm_100", 128, torch.bfloat16)[0].loads)
    assert first == ["specialised", "descriptors"]


def test_the_cpu_is_the_interpreter_and_is_never_timed():
    assert architecture(torch.device("cpu")) == "interpreter"

    def fail(config):
        raise AssertionError("timed on the CPU")

    config = choose("forward", masks.kmt(8, 197), torch.empty(1, 1, 8 * 197, 64), fail)
    assert config.blocks in {Blocks(64, 64), Blocks(32, 32)}

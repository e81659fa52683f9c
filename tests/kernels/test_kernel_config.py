"""The choice of a configuration; `tests/test_auto.py` has its timing."""

import pytest
import torch

from kronmask import masks
from kronmask.kernels.config import TABLE, architecture, choose, options
from kronmask.kernels.tiles import Blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("arch", TABLE)
def test_every_architecture_has_options_for_every_head_dimension(arch, head_dim, dtype):
    for step in ("forward", "backward_query", "backward_key"):
        assert options(step, arch, head_dim, dtype)


def test_the_cpu_is_the_interpreter_and_is_never_timed():
    assert architecture(torch.device("cpu")) == "interpreter"

    def fail(config):
        raise AssertionError("timed on the CPU")

    config = choose("forward", masks.kmt(8, 197), torch.empty(1, 1, 8 * 197, 64), fail)
    assert config.blocks in {Blocks(64, 64), Blocks(32, 32)}

"""Without a GPU: the CUDA path of `sdpa` calls torch's kernels with arguments that they take, and returns what it says.

Fake tensors carry a device, a dtype and a shape, and go through the kernels' own shape functions; they compute nothing.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kronmask import masks
from kronmask.backends import sdpa
from kronmask.plan import make_plan


@pytest.fixture(autouse=True)
def _no_kept_masks():
    """A fake mask must not be kept for real calls, nor a real one for fake calls."""
    for kept in (sdpa._bias, sdpa._tiles):
        kept.cache_clear()
    yield
    for kept in (sdpa._bias, sdpa._tiles):
        kept.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["kmt", "kmct", "axial", "temporal", "neighborhood"])
@pytest.mark.parametrize("head_dim", [64, 84])
def test_shapes_on_a_fake_gpu(dtype, name, head_dim):
    mask = masks.NAMES[name](4, 37, prefix=1)
    plan = make_plan(mask, masked_blocks=False)  # of a real mask, and remembered
    assert bool(plan.gathered) == (name == "neighborhood")
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(2, 4, mask.shape[0], head_dim, device="cuda", dtype=dtype)
        key = torch.empty(2, 2, mask.shape[1], head_dim, device="cuda", dtype=dtype)
        assert sdpa.refusal(query, key, mask) is None
        output, lse = sdpa.forward(query, key, key, mask, 0.125)
        assert (output.shape, output.dtype, output.device.type) == (query.shape, dtype, "cuda")
        assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
        for grad_lse in (None, lse):
            grads = sdpa.backward(output, grad_lse, query, key, key, output, lse, mask, 0.125)
            assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
            assert {(grad.dtype, grad.device.type) for grad in grads} == {(dtype, "cuda")}


@pytest.mark.parametrize("name", ["temporal", "neighborhood"])
def test_the_kernel_with_a_mask_gets_each_log_sum_exp_behind_the_one_before(monkeypatch, name):
    """It never reads that stride. 32 rows are not padded, and padding by nothing would keep what strides there are."""
    kernel, strides = torch.ops.aten._scaled_dot_product_efficient_attention_backward, []

    class Aten:
        def __getattr__(self, operator):
            return getattr(torch.ops.aten, operator)

        def _scaled_dot_product_efficient_attention_backward(self, *args, **kwargs):
            strides.append(args[6].stride()[-1])
            return kernel(*args, **kwargs)

    mask = {"temporal": masks.temporal(32, 3), "neighborhood": masks.neighborhood(8, 196)}[name]
    make_plan(mask, masked_blocks=False)
    monkeypatch.setattr(sdpa, "aten", Aten())
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(1, 2, mask.shape[0], 16, device="cuda")
        output, lse = sdpa.forward(query, query, query, mask, 0.25)
        sdpa.backward(output, None, query, query, query, output, lse, mask, 0.25)
    assert set(strides) == {1}


@pytest.mark.parametrize("tokens", [196, 197])
def test_tiles_whose_gradients_are_added_in_one_call_share_no_key(tokens):
    """A GPU adds in any order: the backward would not be equal from run to run."""
    for tiles in sdpa._tiles(masks.neighborhood(8, tokens), torch.float32, torch.device("cpu")):
        assert len(set(tiles.queries.flatten().tolist())) == tiles.queries.numel()
        assert sum(tiles.apart) == len(tiles.keys)
        for part in tiles.keys.split(list(tiles.apart)):
            assert len(set(part.flatten().tolist())) == part.numel()

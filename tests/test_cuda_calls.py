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

"""Without a GPU: the CUDA path of `sdpa` calls torch's kernels with arguments that they take, and returns what it says.

Fake tensors carry a device, a dtype and a shape, and go through the kernels' own shape functions; they compute nothing.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kronmask import masks
from kronmask.backends import groups as head_groups
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


class Recorder:
    """torch's operators; of those that are recorded, the arguments of all calls."""

    def __init__(self, *recorded: str) -> None:
        self.recorded, self.calls = recorded, []

    def __getattr__(self, operator):
        def call(*args, **kwargs):
            if operator in self.recorded:
                self.calls.append(args)
            return getattr(torch.ops.aten, operator)(*args, **kwargs)

        return call


EFFICIENT = "_scaled_dot_product_efficient_attention"
FLASH = "_scaled_dot_product_flash_attention"


def run(mask, recorder, *, dtype=torch.float32, grad_lse=False, query=None, groups=1, head_dim=16):
    """Forward and backward on a fake GPU; a mask for each of several equal groups of heads."""
    make_plan(mask, masked_blocks=False)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "aten", recorder)
        shape = (2, 4, mask.shape[0], head_dim)
        query = torch.empty(shape, device="cuda", dtype=dtype) if query is None else query()
        several, modules = (mask,) * groups, (sdpa,) * groups
        output, lse = head_groups.forward(modules, query, query, query, several, 0.25)
        given = (query, query, query, output, lse, several, 0.25)
        head_groups.backward(modules, output, lse if grad_lse else None, *given)
    return recorder.calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["temporal", "axial", "neighborhood"])
@pytest.mark.parametrize(
    ("grad_lse", "groups", "head_dim"), [(False, 1, 16), (True, 1, 16), (False, 2, 16), (False, 1, 20)]
)
def test_the_kernel_with_a_mask_gets_the_rows_of_all_heads_side_by_side(name, dtype, grad_lse, groups, head_dim):
    """Of the output it asks for the strides of clips and heads alone."""
    mask = masks.NAMES[name](8, 49)
    calls = run(
        mask, Recorder(f"{EFFICIENT}_backward"), dtype=dtype, grad_lse=grad_lse, groups=groups, head_dim=head_dim
    )
    assert calls
    for call in calls:
        output = call[5]
        assert output.stride()[2:] == (output.shape[1] * output.shape[3], 1)


HALF = {"device": "cuda", "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "query",
    [
        lambda: torch.empty(2, 4, 8, 65, **HALF)[..., :64],
        lambda: torch.empty(2, 4, 8, 72, **HALF)[..., 1:65],
        lambda: torch.empty(2 * 4 * 8 * 64 + 4, **HALF)[4:].view(2, 4, 8, 64),
        lambda: torch.empty(2, 8, 4 * 64 + 4, **HALF)[..., :256].view(2, 8, 4, 64).transpose(1, 2),
    ],
    ids=["rows of 65", "from the second column", "from the fifth number", "heads of a wider row"],
)
@pytest.mark.parametrize("name", ["kmt", "temporal"])
def test_no_kernel_gets_rows_that_do_not_start_at_multiples_of_16_bytes(query, name):
    calls = run(masks.NAMES[name](4, 2), Recorder(EFFICIENT, FLASH), query=query)
    assert calls
    for call in calls:
        for tensor in call[:3]:
            assert tensor.storage_offset() % 8 == 0
            assert all(by % 8 == 0 for by in tensor.stride()[:-1])


def test_what_is_aligned_is_not_copied():
    query = torch.empty(0)

    def made():
        nonlocal query
        query = torch.empty(2, 8, 3, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 3)[:, :, 1]
        return query

    run(masks.joint(4, 2), recorder := Recorder(FLASH), query=made)
    assert recorder.calls[0][0].untyped_storage()._cdata == query.untyped_storage()._cdata


def test_before_ampere_half_precision_takes_the_kernel_that_is_there(monkeypatch):
    monkeypatch.setattr(sdpa, "_is_ampere_or_newer", lambda device: False)
    mask = masks.kmt(4, 5)
    assert not run(mask, Recorder(FLASH, f"{FLASH}_backward"), dtype=torch.float16)
    assert run(mask, Recorder(EFFICIENT), dtype=torch.float16)
    with FakeTensorMode():
        query = torch.empty(1, 2, 20, 16, device="cuda", dtype=torch.bfloat16)
        assert "8.0" in sdpa.refusal(query, query, mask)


@pytest.mark.parametrize("name", ["temporal", "neighborhood"])
def test_the_kernel_with_a_mask_gets_each_log_sum_exp_behind_the_one_before(name):
    """It never reads that stride. 32 rows are not padded, and padding by nothing would keep what strides there are."""
    mask = {"temporal": masks.temporal(32, 3), "neighborhood": masks.neighborhood(8, 196)}[name]
    calls = run(mask, Recorder(f"{EFFICIENT}_backward"))
    assert {call[6].stride()[-1] for call in calls} == {1}


@pytest.mark.parametrize("tokens", [196, 197])
def test_tiles_whose_gradients_are_added_in_one_call_share_no_key(tokens):
    """A GPU adds in any order: the backward would not be equal from run to run."""
    for tiles in sdpa._tiles(masks.neighborhood(8, tokens), torch.float32, torch.device("cpu")):
        assert len(set(tiles.queries.flatten().tolist())) == tiles.queries.numel()
        assert sum(tiles.apart) == len(tiles.keys)
        for part in tiles.keys.split(list(tiles.apart)):
            assert len(set(part.flatten().tolist())) == part.numel()

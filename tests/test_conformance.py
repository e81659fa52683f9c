"""The one suite that every backend passes: all masks, over pairs of sizes, dtypes and layouts, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import all_pairs, assert_within, expect
from strategies import kron_masks
from torch import Tensor

from kronmask import KronMask, kron, kron_attention, masks, ones
from kronmask.backends import BACKENDS
from kronmask.plan import make_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAINS = {"sdpa": True, "dense": True, "flex": False}  # FlexAttention has no backward on the CPU
# on a GPU FlexAttention compiles for each case, which would take hours: it has a few cases of its own there
GRID = TRAINS if DEVICE == "cpu" else {"sdpa": True, "dense": True}


def neighborhood(frames: int, tokens: int, *, prefix: int = 0) -> KronMask:
    side = int(tokens**0.5)
    return masks.neighborhood(frames, tokens, grid=(side, tokens // side), prefix=prefix)


MASKS = {
    **masks.NAMES,
    "neighborhood": neighborhood,
    "not_kmt": lambda t, n, prefix: ~masks.kmt(t, n, prefix=prefix),
    "empty": lambda t, n, prefix: ~masks.joint(t, n, prefix=prefix),
    "local_window": lambda t, n, prefix: neighborhood(t, n, prefix=prefix) & masks.frame_window(t, n, prefix=prefix),
    "kmct_or_neighbors": lambda t, n, prefix: masks.kmct(t, n, prefix=prefix) | neighborhood(t, n, prefix=prefix),
    "last_frames_of_kmct": lambda t, n, prefix: masks.kmct(t, n, prefix=prefix).select(query=slice(t // 2, None)),
    "first_frames_of_kmt": lambda t, n, prefix: masks.kmt(t, n, prefix=prefix).select(key=slice(0, t - t // 2)),
}
ROWS = all_pairs(
    frames=[1, 2, 3, 5, 8, 16],
    tokens=[1, 7, 50, 197],
    prefix=[0, 1, 4],
    head_dim=[64, 16, 80],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    layout=["heads first", "tokens first", "packed", "last stride 2"],
    heads=[(1, 1), (2, 2), (4, 2)],
    batch=[1, 2, 3],
    grad_lse=[True, False],
)


def make(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> Tensor:
    """`(B, H, L, D)` normal numbers in memory as asked."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if layout == "heads first":
        return normal(batch, heads, length, head_dim)
    if layout == "tokens first":
        return normal(batch, length, heads, head_dim).transpose(1, 2)
    if layout == "packed":
        return normal(batch, length, 3, heads, head_dim)[:, :, 1].transpose(1, 2)
    return normal(batch, heads, length, 2 * head_dim)[..., ::2]


def check(mask: KronMask, row: dict, backends: dict[str, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, (query_heads, key_heads) = row["batch"], row["heads"]
    if mask.shape[0] > 1000:  # a float64 reference of 3156 x 3156
        batch, query_heads, key_heads = 1, query_heads // key_heads, 1
    sizes, dtype = (row["head_dim"], row["dtype"], row["layout"], generator), row["dtype"]
    query = make(batch, query_heads, mask.shape[0], *sizes)
    key, value = (make(batch, key_heads, mask.shape[1], *sizes) for _ in range(2))
    grad_output = make(batch, query_heads, mask.shape[0], *sizes)
    grad_lse = torch.randn(batch, query_heads, mask.shape[0], generator=generator) if row["grad_lse"] else None
    expected = expect(query, key, value, grad_output, grad_lse, mask)
    for backend, trains in backends.items():
        inputs = [x.detach().to(DEVICE).requires_grad_(trains) for x in (query, key, value)]
        output, lse = kron_attention(*inputs, mask, backend=backend, return_lse=True)
        assert output.dtype == dtype
        assert lse.dtype == torch.float32
        actual = {"output": output, "lse": lse}
        if trains:
            outputs, grads = ([output], [grad_output]) if grad_lse is None else ([output, lse], [grad_output, grad_lse])
            names = ("grad_query", "grad_key", "grad_value")
            grads = torch.autograd.grad(outputs, inputs, [grad.to(DEVICE) for grad in grads])
            actual |= dict(zip(names, grads, strict=True))
        assert_within({name: tensor.cpu() for name, tensor in actual.items()}, expected, backend)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(v).removeprefix("torch.") for v in row.values()))
@pytest.mark.parametrize("name", MASKS)
def test_backends_agree_with_float64(name, row):
    check(MASKS[name](row["frames"], row["tokens"], prefix=row["prefix"]), row, GRID)


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU FlexAttention runs the whole grid")
@pytest.mark.parametrize("name", ["kmt", "kmct", "axial", "neighborhood"])
@pytest.mark.parametrize("backend", ["flex", "flex-flash", "auto"])
def test_what_compiles_for_each_case_agrees_with_float64_on_a_gpu(backend, name):
    row = {"head_dim": 64, "dtype": torch.bfloat16, "layout": "packed", "heads": (4, 2), "batch": 2, "grad_lse": True}
    mask, shape = MASKS[name](4, 50, prefix=1), (2, 4, 201, 64)
    query = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    if backend == "flex-flash" and (reason := BACKENDS[backend].refusal(query, query, mask)):
        pytest.skip(reason)
    check(mask, row, {backend: True})


def test_every_backend_is_in_the_suite():
    # tests/kernels runs "triton", where Triton is in its interpreter; "flex-flash" is `flex` on kernels of a few GPUs
    assert set(TRAINS) | {"triton", "flex-flash"} == set(BACKENDS)


@settings(max_examples=150)
@given(mask=kron_masks(frames=(1, 6), tokens=(1, 9)), row=st.sampled_from(ROWS))
def test_backends_agree_with_float64_on_random_masks(mask, row):
    check(mask, row, GRID)


@settings(max_examples=50)
@given(mask=kron_masks(frames=(1, 4), tokens=(1, 5)), seed=st.integers(0, 2**31))
def test_the_reference_is_softmax_attention_with_the_dense_mask(mask, seed):
    """The specification itself, against torch's own autograd of the textbook formula."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 2, mask.shape[0], 8, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, 2, mask.shape[1], 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    scores = (query @ key.mT / 8**0.5).masked_fill(~mask.dense(), -1e30)
    seen = mask.dense().any(1)
    lse = scores.logsumexp(-1)
    output = scores.softmax(-1) @ value * seen[:, None]
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    loss = (output * weights).sum() + (lse[..., seen] * weights[..., seen, 0]).sum()
    expected = torch.autograd.grad(loss, (query, key, value))

    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    actual, actual_lse = kron_attention(*inputs, mask, backend="dense", return_lse=True)
    torch.testing.assert_close(actual, output, atol=1e-12, rtol=0)
    torch.testing.assert_close(actual_lse[..., seen], lse[..., seen], atol=1e-12, rtol=0)
    assert actual_lse[..., ~seen].isneginf().all()
    loss = (actual * weights).sum() + (actual_lse[..., seen] * weights[..., seen, 0]).sum()
    for mine, theirs in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_backward_is_equal_to_the_bit_when_run_again(backend):
    query = torch.randn(2, 2, 8 * 20, 16)
    runs = []
    for _ in range(2):
        inputs = [query.clone().requires_grad_() for _ in range(3)]
        kron_attention(*inputs, masks.kmt(8, 20), backend=backend).square().sum().backward()
        runs.append([x.grad for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["kmt", "kmct", "axial", "temporal", "spatial"])
def test_sdpa_allocates_no_length_by_length_tensor(name):
    """The largest allocation of forward and backward stays far below L x L (1600 x 1600 here)."""
    mask = masks.NAMES[name](16, 100)
    query = torch.randn(1, 1, mask.shape[0], 16, requires_grad=True)
    kron_attention(query, query, query, mask, backend="sdpa").sum().backward()  # plans and tables are made once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kron_attention(query, query, query, mask, backend="sdpa").sum().backward()
    allocations = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocations) < mask.shape[0] ** 2  # bytes: a boolean L x L would be that many


def test_the_bounds_notice_one_wrong_key():
    """A suite whose bounds forgive a mask that is off by one key would prove nothing."""
    mask = masks.kmt(4, 50)
    query = torch.randn(1, 1, 200, 64)
    expected = expect(query, query, query, query, None, mask)
    wrong = mask.dense()
    wrong[:, 60] = False
    scores = (query @ query.mT * 64**-0.5).masked_fill(~wrong, float("-inf"))
    with pytest.raises(AssertionError, match="off by"):
        assert_within({"output": scores.softmax(-1) @ query}, expected, "off by one")


@pytest.mark.parametrize("grad_lse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_no_tile_of_a_pattern_holds_see_nothing(dtype, grad_lse):
    pattern = masks.neighborhood(1, 196).dense()
    pattern[20:40] = False
    mask = kron(ones(4), pattern)
    assert make_plan(mask).gathered
    row = {"head_dim": 16, "dtype": dtype, "layout": "packed", "heads": (4, 2), "batch": 2, "grad_lse": grad_lse}
    check(mask, row, {"sdpa": True})

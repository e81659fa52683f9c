"""The conformance suite for the Triton kernels: in Triton's interpreter on the CPU, on the GPU where there is one.

The kernels write to memory that is poisoned with NaN and surrounded by canaries, so a row that is never written and a store
outside of the tensors both show. In the interpreter, cases are small and every layout of tiles is forced on some of them.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import all_pairs, assert_within, expect
from strategies import kron_masks, masks_of_size
from test_conformance import MASKS, make
from torch.utils._python_dispatch import TorchDispatchMode

from kronmask import KronMask, kron_attention, masks
from kronmask.backends import triton as triton_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and TRITON_INTERPRET=1 was not set before Python started"
)
GUARD = 64  # elements on each side of a tensor

ROWS = all_pairs(
    name=list(MASKS),
    frames=[1, 2, 3, 4, 5, 6, 7, 8, 9],
    tokens=[1, 7, 31, 50, 65, 100],
    prefix=[0, 1, 4],
    head_dim=[64, 16, 80],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    layout=["heads first", "tokens first", "packed", "last stride 2"],
    heads=[(1, 1), (2, 2), (4, 2)],
    batch=[1, 2],
    grad_lse=[True, False],
    blocks=[(16, 16), (32, 16), (16, 32), (32, 32)],
    kind=["token", "frame", "packed", None],
    loads=["pointers", "descriptors"],
)


class Guards:
    """Allocates what the kernels write to: NaN inside, canaries around."""

    def __init__(self):
        self.buffers = []

    def empty(self, *shape, dtype, device):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        buffer[:GUARD] = buffer[-GUARD:] = 1.5
        self.buffers.append(buffer)
        return buffer[GUARD:-GUARD].view(shape)

    def check(self):
        for buffer in self.buffers:
            assert (buffer[:GUARD] == 1.5).all(), "a store before the tensor"
            assert (buffer[-GUARD:] == 1.5).all(), "a store behind the tensor"
            assert not buffer.isnan().any(), "an element was not written"


def forced(kind, blocks, loads="pointers"):
    """A `choose` that takes this layout, these blocks and, where the kernel and its inputs can, this way to load them."""
    from kronmask.kernels.config import Config
    from kronmask.kernels.tiles import Blocks, choose_tiling

    def choose(step, mask, query, run, descriptors=False):
        layout = kind or choose_tiling(mask, (Blocks(*blocks),))[0]
        return Config(layout, Blocks(*blocks), num_warps=4, num_stages=2, loads=loads)

    return choose


def check(mask, row, monkeypatch, blocks=None):
    """Output, LSE and gradients under the mask are those of float64, within the derived bounds."""
    from kronmask.kernels import backward, forward, primitives

    guards = Guards()
    generator = torch.Generator().manual_seed(0)
    batch, (query_heads, key_heads) = row["batch"], row["heads"]
    blocks = blocks or row["blocks"]
    area = mask.shape[0] * mask.shape[1] if DEVICE == "cpu" else 0  # the interpreter takes milliseconds a block
    if area > 150**2:
        batch, query_heads, key_heads, blocks = 1, query_heads // key_heads, 1, (64, 64)
    if area > 300**2:
        query_heads, blocks = 1, (128, 64) if row["kind"] == "packed" else (128, 128)
    sizes, dtype = (row["head_dim"], row["dtype"], row["layout"], generator), row["dtype"]
    query = make(batch, query_heads, mask.shape[0], *sizes)
    key, value = (make(batch, key_heads, mask.shape[1], *sizes) for _ in range(2))
    grad_output = make(batch, query_heads, mask.shape[0], *sizes)
    grad_lse = torch.randn(batch, query_heads, mask.shape[0], generator=generator) if row["grad_lse"] else None
    expected = expect(query, key, value, grad_output, grad_lse, mask)

    with monkeypatch.context() as patch:
        patch.setattr(primitives, "empty", guards.empty)
        if DEVICE == "cpu" or row["kind"]:  # on a GPU the other rows run what users run
            patch.setattr(forward, "choose", forced(row["kind"], blocks, row.get("loads", "descriptors")))
            patch.setattr(backward, "choose", forced(row["kind"], blocks, row.get("loads", "descriptors")))
        inputs = [x.detach().to(DEVICE).requires_grad_() for x in (query, key, value)]
        output, lse = kron_attention(*inputs, mask, backend="triton", return_lse=True)
        outputs, grads = ([output], [grad_output]) if grad_lse is None else ([output, lse], [grad_output, grad_lse])
        gradients = torch.autograd.grad(outputs, inputs, [g.to(DEVICE) for g in grads])
    guards.check()
    assert len(guards.buffers) == 6  # output, LSE, three gradients, delta
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    for passed, original in zip(inputs, (query, key, value), strict=True):
        assert torch.equal(passed.cpu(), original), "an input was changed"
    names = ("output", "lse", "grad_query", "grad_key", "grad_value")
    actual = dict(zip(names, (x.cpu() for x in (output, lse, *gradients)), strict=True))
    assert_within(actual, expected, "triton")


@needs_kernels
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(v).removeprefix("torch.") for v in row.values()))
def test_the_kernels_agree_with_float64(row, monkeypatch):
    check(MASKS[row["name"]](row["frames"], row["tokens"], prefix=row["prefix"]), row, monkeypatch)


LARGE = [("kmt", 2, 0), ("kmct", 3, 0), ("joint", 2, 1), ("temporal", 3, 0), ("axial", 2, 1), ("neighborhood", 2, 0)]


@needs_kernels
@pytest.mark.parametrize(("name", "frames", "prefix"), LARGE)
def test_the_kernels_agree_with_float64_at_197_tokens(name, frames, prefix, monkeypatch):
    row = {"head_dim": 64, "dtype": torch.bfloat16, "layout": "tokens first", "heads": (1, 1), "batch": 1}
    row |= {"grad_lse": True, "kind": None, "blocks": (64, 64)}
    check(MASKS[name](frames, 197, prefix=prefix), row, monkeypatch)


@needs_kernels
@settings(max_examples=60)
@given(mask=kron_masks(frames=(1, 9), tokens=(1, 9)), row=st.sampled_from(ROWS))
def test_the_kernels_agree_with_float64_on_random_masks(mask, row):
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(mask, row | {"heads": (2, 1), "batch": 1}, monkeypatch, blocks=(16, 16))


@needs_kernels
@pytest.mark.parametrize("name", ["kmt", "kmct"])
def test_the_kernels_agree_with_float64_where_frames_share_a_tile(name, monkeypatch):
    """Of 20 rows of keys that one frame of the tile sees and another does not, 16 are a block and 4 are tested."""
    row = {"head_dim": 16, "dtype": torch.float32, "layout": "packed", "heads": (1, 1), "batch": 1}
    row |= {"grad_lse": True, "kind": "packed", "blocks": (32, 16)}
    check(masks.NAMES[name](4, 20), row, monkeypatch)


@needs_kernels
@pytest.mark.parametrize("kind", ["token", "frame", "packed"])
def test_the_kernels_agree_with_float64_on_packed_clips(kind, monkeypatch):
    clips = [masks.kmt(3, 7), masks.axial(2, 7), masks.neighborhood(1, 7, grid=(2, 3)), masks.kmct(4, 7)]
    row = {"head_dim": 16, "dtype": torch.float32, "layout": "packed", "heads": (2, 1), "batch": 2}
    row |= {"grad_lse": True, "kind": kind, "blocks": (16, 16)}
    check(KronMask.block_diagonal(clips), row, monkeypatch)


@needs_kernels
@pytest.mark.parametrize("head_dim", [1, 24, 72, 88, 256])
def test_any_head_dimension(head_dim, monkeypatch):
    row = {"head_dim": head_dim, "dtype": torch.float16, "layout": "packed", "heads": (1, 1), "batch": 1}
    row |= {"grad_lse": True, "kind": None, "blocks": (16, 16)}
    check(masks.kmt(3, 20, prefix=1), row, monkeypatch)


def keys_and_values(kind):
    """Of 2 x 2 heads of 60 tokens and 16 dimensions, and whether descriptors can copy from them."""
    data = torch.randn(2, 2, 60, 32, device=DEVICE).half()
    return {
        "contiguous": (data[..., :16].contiguous(), True),
        "tokens first": (data[..., :16].transpose(1, 2).contiguous().transpose(1, 2), True),
        "columns of a wider tensor": (data[..., 16:], True),
        "not aligned": (data[..., 1:17], False),
        "rows of an odd number of bytes": (torch.nn.functional.pad(data[..., :16], (0, 1))[..., :16], False),
        "expanded over the batch": (data[:1, ..., :16].expand(2, -1, -1, -1), False),
        "expanded over heads": (data[:, :1, :, :16].expand(-1, 2, -1, -1), False),
        "last stride 2": (data[..., ::2], True),  # copied, as for pointers
    }[kind]


KINDS_OF_KEYS = (
    "contiguous",
    "tokens first",
    "columns of a wider tensor",
    "not aligned",
    "rows of an odd number of bytes",
    "expanded over the batch",
    "expanded over heads",
    "last stride 2",
)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS_OF_KEYS)
def test_descriptors_agree_with_pointers_or_give_way_to_them(kind, monkeypatch):
    from kronmask.kernels import forward
    from kronmask.kernels.backward import attention_backward
    from kronmask.kernels.config import Config
    from kronmask.kernels.tiles import Blocks

    mask = masks.kmt(3, 20)
    query, (keys, can) = torch.randn(2, 2, 60, 16, device=DEVICE).half(), keys_and_values(kind)
    described, made = forward.described, []

    def counted(tensor, rows):
        made.append(tensor)
        return described(tensor, rows)

    monkeypatch.setattr(forward, "described", counted)
    pair = 2 if can else 0
    for inputs, passes in (((query, keys, keys), [pair, pair, 2]), ((keys, query, query), [2, 2, pair])):
        results = []
        for loads in ("pointers", "descriptors"):
            made.clear()
            config = Config("packed", Blocks(16, 16), loads=loads)
            output, lse = forward.attention_forward(*inputs, (mask,), 0.25, config)
            grads = attention_backward(output, None, *inputs, output, lse, (mask,), 0.25, config, config)
            results.append((output, lse, *grads))
            # the forward and the query pass load keys and values, the key pass queries and the output's gradient
            assert len(made) == (sum(passes) if loads == "descriptors" else 0)
        for mine, theirs in zip(*results, strict=True):
            assert torch.equal(mine, theirs)


@needs_kernels
@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.0])
def test_any_scale(scale):
    mask = masks.kmct(3, 10)
    inputs = [torch.randn(1, 2, 30, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    results = []
    for backend in ("triton", "dense"):
        output, lse = kron_attention(*inputs, mask, scale=scale, backend=backend, return_lse=True)
        results.append([output, lse, *torch.autograd.grad(output.square().sum() + lse.sum(), inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("name", ["kmt", "kmct", "axial", "neighborhood", "not_kmt"])
def test_backward_is_equal_to_the_bit_when_run_again(name):
    mask = MASKS[name](4, 20, prefix=1)
    query = torch.randn(1, 4, mask.shape[0], 16, device=DEVICE).half()
    runs = []
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for x in (query, query[:, :2], query[:, 2:])]
        kron_attention(*inputs, mask, backend="triton").float().square().sum().backward()
        runs.append([x.grad for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_kernels
def test_rows_that_see_nothing_take_and_give_no_gradient():
    """Whatever the gradient of their LSE (-inf) is."""
    mask = masks.kmct(3, 9) & ~masks.spatial(3, 9)  # the first frame sees nothing
    inputs = [torch.randn(1, 1, 27, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    output, lse = kron_attention(*inputs, mask, backend="triton", return_lse=True)
    assert (output[:, :, :9] == 0).all()
    assert lse[:, :, :9].isneginf().all()
    grad_lse = torch.full_like(lse, float("inf"))
    grad_lse[:, :, 9:] = 1.0
    grads = torch.autograd.grad([output, lse], inputs, [torch.ones_like(output), grad_lse])
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, :9] == 0).all()


@st.composite
def mask_groups(draw):
    """Masks of one size, one for each of two or three groups of heads."""
    tokens = draw(st.integers(1, 7))
    sizes = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), tokens, tokens, draw(st.integers(0, 2)))
    return [draw(masks_of_size(*sizes)) for _ in range(draw(st.integers(2, 3)))]


@needs_kernels
@settings(max_examples=12)
@given(
    several=mask_groups(),
    of_group=st.integers(1, 2),
    key_heads=st.sampled_from(["as many", "one for each group", "one"]),
)
def test_groups_of_heads_agree_with_the_reference(several, of_group, key_heads):
    heads = of_group * len(several)
    shared = {"as many": heads, "one for each group": len(several), "one": 1}[key_heads]
    generator = torch.Generator().manual_seed(0)
    lengths = ((heads, several[0].shape[0]), (shared, several[0].shape[1]), (shared, several[0].shape[1]))
    inputs = [torch.randn(1, h, n, 16, generator=generator).to(DEVICE).requires_grad_() for h, n in lengths]
    results = []
    for backend in ("triton", "dense"):
        output, lse = kron_attention(*inputs, several, backend=backend, return_lse=True)
        weights = [torch.linspace(-1, 1, x.numel(), device=DEVICE).view(x.shape) for x in (output, lse)]
        grads = torch.autograd.grad([output, lse], inputs, weights)
        results.append([output, lse, *grads])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_groups_of_heads_are_one_launch_of_each_kernel(key_heads, monkeypatch):
    from kronmask.kernels import backward, forward

    grids = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    with monkeypatch.context() as patch:
        for module, name in (
            (forward, "forward_kernel"),
            (backward, "backward_query_kernel"),
            (backward, "backward_key_kernel"),
        ):
            patch.setattr(module, name, Counted(getattr(module, name)))
        patch.setattr(forward.primitives, "is_interpreted", lambda kernel: INTERPRETED)
        several = [masks.kmct(3, 7), masks.axial(3, 7), masks.kmt(3, 7), masks.joint(3, 7)]
        inputs = [
            torch.randn(1, heads, 21, 16, device=DEVICE, requires_grad=True) for heads in (4, key_heads, key_heads)
        ]
        kron_attention(*inputs, several, backend="triton").sum().backward()
    assert len(grids) == 3


@needs_kernels
def test_hidden_keys_with_large_scores_change_nothing(monkeypatch):
    """Each frame's own keys, which it does not see, have scores 225 higher than all that it sees."""
    from kronmask.kernels import backward, forward

    for module in (forward, backward):
        monkeypatch.setattr(module, "choose", forced("packed", (32, 16)))
    mask = ~masks.spatial(4, 20)
    frames = 30 * torch.eye(16)[:4].repeat_interleave(20, 0)
    inputs = [x[None, None].to(DEVICE).requires_grad_() for x in (frames, frames.clone(), torch.randn(80, 16))]
    results = []
    for backend in ("triton", "dense"):
        output, lse = kron_attention(*inputs, mask, backend=backend, return_lse=True)
        results.append([output, lse, *torch.autograd.grad(output.square().sum() + lse.sum(), inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@needs_kernels
@pytest.mark.parametrize("name", sorted(set(masks.NAMES) - {"neighborhood"}))
def test_no_tensor_of_the_size_of_a_mask_is_made(name):
    """A boolean N x N is 22500 bytes here and L x L 90000; the inputs have 19200 each, and no tensor is larger."""
    mask = masks.NAMES[name](2, 150)
    inputs = [torch.randn(1, 1, 300, 16, device=DEVICE) for _ in range(3)]
    with LargestTensor() as largest:
        output, lse = triton_backend.forward(*inputs, mask, 0.25)
        triton_backend.backward(output, lse, *inputs, output, lse, mask, 0.25)
    assert largest.bytes == 300 * 16 * 4


def test_float64_is_refused():
    query = torch.randn(1, 1, 6, 16, dtype=torch.float64)
    with pytest.raises(
        NotImplementedError, match=r"float32, float16 and bfloat16, not torch.float64.*Backends that can: .*dense"
    ):
        kron_attention(query, query, query, masks.kmt(2, 3), backend="triton")


def test_large_head_dimensions_are_refused():
    query = torch.randn(1, 1, 6, 512)
    with pytest.raises(NotImplementedError, match=r"head_dim of at most 256, not 512.*Backends that can: .*dense"):
        kron_attention(query, query, query, masks.kmt(2, 3), backend="triton")


def test_the_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.randn(1, 1, 6, 16)
    with pytest.raises(NotImplementedError, match=r"TRITON_INTERPRET=1 before Python starts.*Backends that can: sdpa"):
        kron_attention(query, query, query, masks.kmt(2, 3), backend="triton")


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in triton_backend.refusal(torch.randn(1, 1, 6, 16), None, masks.kmt(2, 3))

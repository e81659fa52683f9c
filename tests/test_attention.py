"""The operator as a citizen of PyTorch: op checks, compile, export, autocast, FLOPs, and errors that name the culprit."""

import io
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from kronmask import attention_backend, kron, kron_attention, masks, ones
from kronmask.attention import rule_attention
from kronmask.backends import flex


def qkv(mask, heads=2, batch=1, head_dim=16, dtype=torch.float32, requires_grad=False):
    def normal(length):
        return torch.randn(batch, heads, length, head_dim, dtype=dtype, requires_grad=requires_grad)

    return normal(mask.shape[0]), normal(mask.shape[1]), normal(mask.shape[1])


MIXED = masks.axial(3, 6, prefix=1) | masks.neighborhood(3, 6, grid=(2, 3), prefix=1)


@pytest.mark.parametrize("backend", ["sdpa", "dense", "auto"])
@pytest.mark.parametrize("mask", [masks.kmt(3, 5), MIXED, MIXED.select(query=slice(1, 3))], ids=str)
def test_opcheck(mask, backend):
    arguments = (*qkv(mask, requires_grad=True), mask.rule, mask.query_frames, mask.key_frames)
    arguments += (mask.query_tokens, mask.key_tokens, mask.prefix, 0.25, backend)
    torch.library.opcheck(torch.ops.kronmask.attention, arguments)


@pytest.mark.parametrize("mask", [masks.kmt(3, 5), MIXED], ids=str)
def test_opcheck_of_the_backward(mask):
    query, key, value = qkv(mask)
    output, lse = kron_attention(query, key, value, mask, return_lse=True)
    arguments = (output, lse, query, key, value, output, lse, mask.rule, mask.query_frames, mask.key_frames)
    arguments += (mask.query_tokens, mask.key_tokens, mask.prefix, 0.25, "sdpa")
    torch.library.opcheck(torch.ops.kronmask.attention_backward, arguments)
    torch.library.opcheck(torch.ops.kronmask.attention_backward, (output, None, *arguments[2:]))


@pytest.mark.parametrize("how", ["a mask as argument", "a rule and sizes from the shape"])
def test_compile_has_no_graph_break_and_one_recompilation_for_frames_and_one_for_batch(how):
    def by_mask(query, mask):
        output, lse = kron_attention(query, query, query, mask, return_lse=True)
        return output.sin() + lse[..., None]

    def by_rule(query, mask):
        frames = query.shape[2] // 7
        return rule_attention(query, query, query, masks.mask_rule("kmt", frames, 7), frames=frames, tokens=7).sin()

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(by_mask if how.startswith("a mask") else by_rule, backend=graphs, fullgraph=True)
    seen = []
    for frames, batch in [(3, 2), (5, 2), (8, 2), (16, 2), (4, 3), (6, 4), (7, 5)]:
        mask = masks.kmt(frames, 7)
        query = torch.randn(batch, 2, 7 * frames, 16, requires_grad=True)
        compiled(query, mask).sum().backward()
        seen.append(graphs.frame_count)
    one_for_each = how.startswith("a mask") and torch.__version__.startswith("2.7.")  # it looks at masks by identity
    assert seen == ([1, 2, 3, 4, 5, 6, 7] if one_for_each else [1, 2, 2, 2, 3, 3, 3])


@pytest.mark.parametrize("attention", ["dilated", masks.dilated, lambda t, n: masks.kmct(t, n) | masks.dilated(t, n)])
def test_a_mask_with_a_rule_for_each_size_compiles_once_for_each(attention):
    def attend(query):
        frames = query.shape[2] // 7
        rule = masks.mask_rule(attention, frames, 7)
        return rule_attention(query, query, query, rule, frames=frames, tokens=7)

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(attend, backend=graphs, fullgraph=True)
    for frames in (3, 5, 8, 3, 5):
        query = torch.randn(2, 2, 7 * frames, 16)
        torch.testing.assert_close(compiled(query), attend(query))
    assert graphs.frame_count == 3


def test_compiled_by_inductor_equals_eager_with_gradients():
    mask = masks.kmct(4, 5)

    def attend(query, key, value):
        return kron_attention(query * 2, key, value, mask).relu()

    torch._dynamo.reset()
    inputs = qkv(mask, requires_grad=True)
    expected = torch.autograd.grad(attend(*inputs).sum(), inputs)
    actual = torch.autograd.grad(torch.compile(attend, fullgraph=True)(*inputs).sum(), inputs)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_export_round_trip_with_a_free_batch():
    class Attend(torch.nn.Module):
        def forward(self, query):
            return kron_attention(query, query, query, masks.kmct(3, 5))

    program = torch.export.export(
        Attend(), (torch.randn(2, 2, 15, 16),), dynamic_shapes={"query": {0: torch.export.Dim("batch")}}
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    query = torch.randn(5, 2, 15, 16)
    torch.testing.assert_close(loaded(query), Attend()(query))


def test_autocast_runs_in_its_dtype_and_gradients_return_in_the_inputs():
    mask = masks.kmt(3, 5)
    inputs = qkv(mask, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, lse = kron_attention(*inputs, mask, return_lse=True)
    assert output.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_flop_counter_counts_the_allowed_pairs():
    mask = masks.kmct(4, 5, prefix=2)
    with FlopCounterMode(display=False) as counter:
        kron_attention(*qkv(mask, heads=3, batch=2, requires_grad=True), mask).sum().backward()
    counts = {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}
    forward = 4 * 2 * 3 * 16 * mask.num_pairs
    assert counts == {"kronmask.attention": forward, "kronmask.attention_backward": forward * 5 // 2}


def test_attention_backend_forces_a_backend_and_ends_with_its_block():
    mask = masks.kmt(3, 5)
    inputs = qkv(mask, dtype=torch.float64)
    with attention_backend("sdpa"), pytest.raises(NotImplementedError, match="float64"):
        kron_attention(*inputs, mask, backend="dense")
    assert kron_attention(*inputs, mask).dtype == torch.float64
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), attention_backend("cuda"):
        pass


@pytest.mark.parametrize("name", ["kmt", "kmct", "axial", "neighborhood"])
def test_what_is_not_finite_stays_not_finite(name):
    """A query of NaN, or a key that is seen, must not come out as a number: a run that has diverged would be hidden."""
    mask = masks.NAMES[name](4, 5)
    query, key, value = qkv(mask)
    query[:, :, 12] = float("nan")
    value[:, :, 3] = float("nan")
    sdpa, dense = (kron_attention(query, key, value, mask, backend=backend) for backend in ("sdpa", "dense"))
    assert dense[:, :, 12].isnan().all()
    assert sdpa[:, :, 12].isnan().all()
    seen = mask.dense()[:, 3]
    assert sdpa[:, :, seen].isnan().all()


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_a_merge_by_logaddexp_over_rows_that_see_nothing_has_gradients(backend):
    """Two parts of the keys, merged as a user would: where neither has a key, the gradient of logaddexp is NaN."""
    empty_row = ones(4)
    empty_row[1] = False
    mask = kron(ones(3), empty_row)
    query, key, value = qkv(mask, requires_grad=True)
    _, lse = kron_attention(query, key, value, mask, backend=backend, return_lse=True)
    merged = torch.logaddexp(lse, lse * 1.0)
    torch.where(merged.isneginf(), 0.0, merged).sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad.isfinite().all()


def test_auto_falls_back_to_a_backend_that_can():
    mask = masks.kmt(3, 5)
    assert kron_attention(*qkv(mask, dtype=torch.float64), mask).dtype == torch.float64


def test_scale_is_a_factor_on_the_scores():
    mask = masks.kmt(3, 5)
    query, key, value = qkv(mask)
    torch.testing.assert_close(
        kron_attention(query, key, value, mask, scale=0.5), kron_attention(query * 2, key, value, mask, scale=0.25)
    )


@pytest.mark.parametrize("backend", ["sdpa", "flex", "dense"])
def test_an_empty_batch_gives_an_empty_output_of_the_usual_layout(backend):
    query, key = torch.randn(0, 4, 15, 16), torch.randn(0, 2, 15, 16)
    call = partial(kron_attention, query, key, key, masks.kmct(3, 5), backend=backend, return_lse=True)

    for output, lse in (call(), torch.compile(call, backend="aot_eager", fullgraph=True)()):
        assert (output.shape, lse.shape) == (query.shape, query.shape[:3])


def test_an_empty_batch_has_empty_gradients():
    mask = masks.kmt(3, 5)
    query = torch.randn(0, 2, 15, 16, requires_grad=True)
    output = kron_attention(query, query, query, mask)
    output.sum().backward()
    assert output.shape == query.shape == query.grad.shape


def test_inputs_are_left_as_they_were():
    mask = masks.kmt(3, 5)
    inputs = qkv(mask, requires_grad=True)
    before = [x.detach().clone() for x in inputs]
    kron_attention(*inputs, mask).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def bad(change):
    """Call with one argument changed."""
    mask = masks.kmt(8, 197)
    arguments = dict(
        zip(("query", "key", "value"), (torch.randn(2, 4, 1576, 16) for _ in range(3)), strict=True), mask=mask
    )
    return kron_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"key": torch.randn(2, 4, 1568, 16), "value": torch.randn(2, 4, 1568, 16)},
            ValueError,
            r"8 \* 197 = 1576, but key has 1568 tokens; is the class token",
        ),
        ({"query": torch.randn(2, 4, 1568, 16)}, ValueError, "query has 1568 tokens"),
        ({"query": torch.randn(4, 1576, 16)}, ValueError, r"query must be \(batch, heads, tokens, head_dim\)"),
        ({"value": torch.randn(2, 4, 1576, 8)}, ValueError, "must agree in batch and head_dim"),
        ({"key": torch.randn(1, 4, 1576, 16)}, ValueError, "must agree in batch and head_dim"),
        ({"value": torch.randn(2, 2, 1576, 16)}, ValueError, "key .* and value .* must have the same shape"),
        ({"query": torch.randn(2, 6, 1576, 16)}, ValueError, "6 heads, which is no multiple of the 4 heads"),
        ({"key": torch.randn(2, 4, 1576, 16).half()}, TypeError, "query is torch.float32 but key is torch.float16"),
        ({"query": torch.ones(2, 4, 1576, 16).long()}, TypeError, "query is torch.int64"),
        ({"key": torch.randn(2, 4, 1576, 16, device="meta")}, ValueError, "query is on cpu but key is on meta"),
        ({"mask": torch.ones(1576, 1576).bool()}, TypeError, "a list of them, not Tensor"),
        ({"backend": "triton9"}, ValueError, "unknown backend 'triton9'"),
        ({"mask": masks.kmt(8, 197, prefix=1)}, ValueError, r"1 prefix tokens \+ frames \* tokens"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        bad(change)


def test_what_a_backend_cannot_do_names_one_that_can():
    mask = masks.kmt(3, 5)
    inputs = qkv(mask, dtype=torch.float64)
    for backend in ("sdpa", "flex"):
        with pytest.raises(NotImplementedError, match=r"float64.*KronMask\(frames=3.*Backends that can: dense"):
            kron_attention(*inputs, mask, backend=backend)
    inputs = qkv(mask, requires_grad=True)
    with pytest.raises(NotImplementedError, match="Backends that can: sdpa, dense"):
        kron_attention(*inputs, mask, backend="flex").sum().backward()


def test_import_needs_torch_and_einops_alone():
    code = (
        "import sys; import torch, einops; before = set(sys.modules); import kronmask;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new & {'timm', 'open_clip', 'torchvision', 'transformers', 'matplotlib', 'av', 'yaml', 'tqdm'}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@torch.library.custom_op("kronmask_tests::derivative_of_the_square", mutates_args=())
def _derivative_of_the_square(x: torch.Tensor) -> torch.Tensor:
    with flex._autograd():
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(torch.compile(torch.square, backend="aot_eager")(leaf).sum(), leaf)
    assert not torch.is_grad_enabled()
    return grad


def test_flex_differentiates_inside_of_a_custom_op():
    """Below one, torch has taken autograd out of the dispatcher: nothing would require a gradient."""
    with torch.no_grad():
        assert _derivative_of_the_square(torch.tensor([1.0, 3.0])).tolist() == [2.0, 6.0]

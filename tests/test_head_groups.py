"""A mask for each group of heads is each group under its own mask, in every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import kron_masks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kronmask import KronMask, attention_backend, kron_attention, masks
from kronmask.attention import join_rules
from kronmask.clips import PackedClips
from kronmask.nn import KronAttention

NAMES = [name for name in masks.NAMES if name != "neighborhood"]


def per_head(query: Tensor, key: Tensor, value: Tensor, several: list[KronMask]) -> tuple[Tensor, Tensor]:
    """Softmax attention in which head `h` has the mask `h * groups // heads`, written down in float64."""
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    allowed = torch.stack([several[head * len(several) // heads].dense() for head in range(heads)])
    scores = (query @ key.mT * query.shape[3] ** -0.5).masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None]) @ value, lse


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
@settings(max_examples=40)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    of_group=st.integers(1, 2),
    key_heads=st.sampled_from(["as many", "one for each group", "one"]),
    seed=st.integers(0, 99),
)
def test_groups_of_heads_have_their_own_masks(
    backend: str, names: list[str], of_group: int, key_heads: str, seed: int
) -> None:
    several = [masks.NAMES[name](3, 4) for name in names]
    heads = of_group * len(several)
    shared = {"as many": heads, "one for each group": len(several), "one": 1}[key_heads]
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, heads, 12, 6), (2, shared, 12, 6), (2, shared, 12, 6))
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    dtype = torch.float64 if backend == "dense" else torch.float32
    actual = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    expected = [x.clone().requires_grad_() for x in inputs]
    output, lse = kron_attention(*actual, several, backend=backend, return_lse=True)
    want, want_lse = per_head(*expected, several)
    torch.testing.assert_close(output, want.to(dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.to(lse.dtype), rtol=1e-5, atol=1e-5)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (want, want_lse)]
    (output * weights[0]).sum().add((lse * weights[1]).sum()).backward()
    (want * weights[0]).sum().add((want_lse * weights[1]).sum()).backward()
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.to(dtype), rtol=1e-4, atol=1e-5)


@settings(max_examples=10)
@given(mask=kron_masks())
def test_equal_masks_are_one_mask(mask: KronMask) -> None:
    query, key = torch.randn(1, 4, mask.shape[0], 8), torch.randn(1, 4, mask.shape[1], 8)
    torch.testing.assert_close(
        kron_attention(query, key, key, [mask, mask]), kron_attention(query, key, key, mask), rtol=1e-5, atol=1e-5
    )


def test_flex_takes_groups_of_heads() -> None:
    several = [masks.kmct(3, 4), masks.axial(3, 4)]
    inputs = torch.randn(3, 1, 4, 12, 16).unbind(0)
    with torch.no_grad(), attention_backend("flex"):
        torch.testing.assert_close(
            kron_attention(*inputs, several), per_head(*inputs, several)[0], rtol=1e-5, atol=1e-5
        )


def test_groups_of_heads_compile_without_a_graph_break_and_export() -> None:
    several = [masks.kmct(3, 4), masks.axial(3, 4)]

    class Attend(torch.nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            return kron_attention(query, query, query, several)

    query = torch.randn(2, 4, 12, 16)
    expected = Attend()(query)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(Attend(), fullgraph=True, backend="aot_eager")(query), expected)
    torch.testing.assert_close(torch.export.export(Attend(), (query,)).module()(query), expected)


class Calls(TorchDispatchMode):
    """Counts the calls of the operator."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function in (torch.ops.kronmask.attention.default, torch.ops.kronmask.attention_backward.default)
        return function(*args, **(kwargs or {}))


def test_groups_of_heads_are_one_call_of_the_operator_in_each_direction() -> None:
    query = torch.randn(1, 4, 12, 16, requires_grad=True)
    layer = KronAttention(24, 4, ["kmct", "temporal"])
    for attend in (
        lambda: kron_attention(query, query, query, [masks.kmct(3, 4), masks.axial(3, 4)]),
        lambda: layer(torch.randn(1, 12, 24), 3, 4),
        lambda: layer(torch.randn(1, 12, 24), PackedClips([1, 2]), 4),
    ):
        with Calls() as calls:
            attend().sum().backward()
        assert calls.number == 2


def test_groups_of_heads_pack_clips_of_different_lengths() -> None:
    layer, x = KronAttention(24, 4, ["kmct", "temporal"]), torch.randn(1, 20, 24)
    alone = torch.cat([layer(x[:, :8], 2, 4), layer(x[:, 8:], 3, 4)], 1)
    torch.testing.assert_close(layer(x, PackedClips([2, 3]), 4), alone)


def test_masks_of_one_shape_but_other_frames_are_groups_too() -> None:
    several = [masks.kmct(3, 4), masks.kmt(4, 3), masks.axial(2, 6), masks.joint(2, 5, prefix=2)]
    inputs = torch.randn(3, 1, 4, 12, 16, dtype=torch.float64).unbind(0)
    actual = kron_attention(*inputs, several, backend="dense", return_lse=True)
    torch.testing.assert_close(actual, per_head(*inputs, several))


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_opcheck_of_groups_of_heads(backend: str) -> None:
    mask = masks.kmct(3, 4)
    rules = join_rules([mask.rule, masks.axial(3, 4).rule])
    inputs = [torch.randn(1, heads, 12, 16, requires_grad=True) for heads in (4, 1, 1)]
    torch.library.opcheck(torch.ops.kronmask.attention, (*inputs, rules, 3, 3, 4, 4, 0, 0.25, backend))
    query, key, value = (x.detach() for x in inputs)
    output, lse = kron_attention(query, key, value, [mask, masks.axial(3, 4)], return_lse=True)
    for grad_lse in (None, lse):
        arguments = (output, grad_lse, query, key, value, output, lse, rules, 3, 3, 4, 4, 0, 0.25, backend)
        torch.library.opcheck(torch.ops.kronmask.attention_backward, arguments)


def test_flops_are_those_of_each_group() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    query, several = torch.randn(1, 4, 12, 16), [masks.kmct(3, 4), masks.joint(3, 4)]
    with FlopCounterMode(display=False) as counter:
        kron_attention(query, query, query, several)
    assert counter.get_total_flops() == 4 * 16 * 2 * sum(mask.num_pairs for mask in several)


@pytest.mark.parametrize(
    ("several", "error", "message"),
    [
        ([masks.kmt(3, 4), masks.kmt(4, 3).T, masks.kmt(2, 4)], ValueError, "must have one shape"),
        ([masks.kmt(3, 4)] * 3, ValueError, "4 heads of queries and 4 of keys and values do not divide into 3 equal"),
        ([], ValueError, "into 0 equal groups"),
        ([masks.kmt(3, 4), "kmct"], TypeError, "a KronMask, or a list of them, not str"),
        (torch.ones(12, 12, dtype=torch.bool), TypeError, "a KronMask, or a list of them, not Tensor"),
    ],
)
def test_groups_that_do_not_fit_are_refused(several: object, error: type[Exception], message: str) -> None:
    query = torch.randn(1, 4, 12, 8)
    with pytest.raises(error, match=message):
        kron_attention(query, query, query, several)


def test_a_layer_has_a_mask_for_each_group() -> None:
    layer, x = KronAttention(24, 4, ["kmct", "temporal"]), torch.randn(2, 12, 24)
    query, key, value = (
        part.unflatten(-1, (4, 6)).transpose(1, 2)
        for part in (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, -1)
    )
    expected = per_head(query, key, value, [masks.kmct(3, 4), masks.temporal(3, 4)])[0]
    torch.testing.assert_close(layer(x, 3, 4), layer.out_proj(expected.transpose(1, 2).flatten(2)))
    assert "attention=[kmct, temporal]" in repr(layer)
    with pytest.raises(ValueError, match="4 heads do not divide into 3 equal groups"):
        KronAttention(24, 4, ["kmct", "kmt", "axial"])
    with pytest.raises(ValueError, match="empty list"):
        KronAttention(24, 4, [])

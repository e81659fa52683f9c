"""The layers of kronmask.nn on their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kronmask import masks
from kronmask.nn import (
    KronAttention,
    MaskRule,
    QuickGELU,
    TemporalBlock,
    TemporalEmbedding,
    TemporalResidual,
    rotate_by_time,
)

FRAMES, TOKENS, DIM = 3, 5, 12


def clip(length: int = FRAMES * TOKENS, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(0))


def every_parameter_matters(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


@pytest.mark.parametrize("name", [name for name in masks.NAMES if name != "neighborhood"])
def test_attention_is_multihead_attention_under_the_mask(name: str) -> None:
    ours = every_parameter_matters(KronAttention(DIM, 3, name))
    theirs = nn.MultiheadAttention(DIM, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())  # names and shapes are those of nn.MultiheadAttention
    mask = masks.NAMES[name](FRAMES, TOKENS)
    expected = theirs(clip(), clip(), clip(), attn_mask=~mask.dense(), need_weights=False)[0]
    torch.testing.assert_close(ours(clip(), FRAMES, TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_attention_has_global_tokens_in_front_of_the_frames() -> None:
    ours = every_parameter_matters(KronAttention(DIM, 3, "kmct"))
    theirs = nn.MultiheadAttention(DIM, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = clip(2 + FRAMES * TOKENS)
    mask = masks.kmct(FRAMES, TOKENS, prefix=2)
    expected = theirs(x, x, x, attn_mask=~mask.dense(), need_weights=False)[0]
    torch.testing.assert_close(ours(x, FRAMES, TOKENS, prefix=2), expected, rtol=1e-5, atol=1e-6)


def test_attention_takes_any_head_dim_and_norms_of_queries_and_keys() -> None:
    attention = KronAttention(DIM, 5, head_dim=4, qk_norm=nn.LayerNorm, bias=False)
    assert attention.in_proj_weight.shape == (60, DIM)
    assert attention.in_proj_bias is None
    assert attention.q_norm.normalized_shape == (4,)
    assert attention(clip(), FRAMES, TOKENS).shape == clip().shape
    with pytest.raises(ValueError, match="dim 12 is no multiple of num_heads 5"):
        KronAttention(DIM, 5)


def test_a_sequence_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 \* 5 = 15, but query has 14"):
        KronAttention(DIM, 3)(clip(14), FRAMES, TOKENS)


def test_a_block_is_attention_and_mlp_each_on_the_norm_and_with_a_residual() -> None:
    block = every_parameter_matters(TemporalBlock(DIM, 3, "kmct", act_layer=QuickGELU))
    x = clip() + block.attn(block.ln_1(clip()), FRAMES, TOKENS)
    hidden = F.linear(block.ln_2(x), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    expected = x + F.linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias)
    torch.testing.assert_close(block(clip(), FRAMES, TOKENS), expected)
    assert block.mlp.c_fc.out_features == 4 * DIM


@pytest.mark.parametrize("kind", [TemporalResidual, TemporalBlock])
def test_zero_output_makes_a_layer_the_identity_whose_output_projections_learn(kind: type[TemporalResidual]) -> None:
    layer = every_parameter_matters(kind(DIM, 3))
    layer.zero_output_()
    output = layer(clip(), FRAMES, TOKENS)
    assert torch.equal(output, clip())
    output.square().sum().backward()
    assert layer.attn.out_proj.weight.grad.abs().sum() > 0


def test_reset_gives_the_standard_deviations_of_clip() -> None:
    torch.manual_seed(0)
    block = TemporalBlock(256, 4)
    block.reset_parameters(layers=8)
    for weight, std in (
        (block.attn.in_proj_weight, 256**-0.5),
        (block.attn.out_proj.weight, (2 * 8 * 256) ** -0.5),
        (block.mlp.c_fc.weight, (2 * 256) ** -0.5),
        (block.mlp.c_proj.weight, (2 * 8 * 256) ** -0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert not block.attn.in_proj_bias.any()


@given(st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_the_embedding_is_interpolated_as_torch_does_along_time(learned: int, frames: int) -> None:
    embedding = TemporalEmbedding(4, learned, std=1.0)
    series = embedding.weight[0, :, 0].T[None]  # (1, D, T)
    expected = F.interpolate(series, size=frames, mode="linear", align_corners=False)[0].T[None, :, None]
    torch.testing.assert_close(embedding.at(frames), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_embedding_is_exact_at_its_own_length_and_central_at_one_frame(dtype: torch.dtype) -> None:
    embedding = TemporalEmbedding(DIM, 8, std=1.0).to(dtype)
    assert torch.equal(embedding.at(8), embedding.weight)
    torch.testing.assert_close(embedding.at(1), embedding.weight[:, 3:5].mean(1, keepdim=True))
    assert embedding(torch.zeros(2, 3, TOKENS, DIM, dtype=dtype)).dtype == dtype


def test_an_embedding_loads_from_another_number_of_frames() -> None:
    long, short = TemporalEmbedding(DIM, 16), TemporalEmbedding(DIM, 6)
    short.load_state_dict(long.state_dict())
    assert torch.equal(short.weight, long.at(6))
    with pytest.raises(RuntimeError, match="size mismatch"):
        short.load_state_dict(TemporalEmbedding(DIM + 1, 16).state_dict())


def test_every_frame_of_the_embedding_learns_from_clips_of_any_length() -> None:
    for frames in (4, 8, 11):
        embedding = TemporalEmbedding(DIM, 4)
        (embedding(torch.zeros(1, frames, TOKENS, DIM)) * torch.randn(1, frames, 1, DIM)).sum().backward()
        assert (embedding.weight.grad.abs().sum((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", ["kmt", "kmct", "joint", "frame_window", "axial"])
def test_the_rule_of_a_name_holds_at_every_size(name: str) -> None:
    rule = MaskRule(name)
    assert rule(3, 5) == rule(16, 197)


@pytest.mark.parametrize("attention", ["dilated", "neighborhood", masks.neighborhood])
def test_a_rule_of_one_size_is_found_for_each_size(attention) -> None:
    rule, mask = MaskRule(attention), masks.NAMES[getattr(attention, "__name__", attention)]
    for frames, tokens in ((3, 5), (4, 10)):
        assert rule(frames, tokens) == mask(frames, tokens).rule


@pytest.mark.parametrize("attention", ["no_such_mask", 3, None])
def test_an_unknown_attention_is_refused_when_the_layer_is_made(attention) -> None:
    with pytest.raises(ValueError, match=r"named masks are joint, spatial|a name, a KronMask or a callable"):
        KronAttention(DIM, 3, attention)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("attention", ["kmt", masks.kmct, masks.kmct(FRAMES, TOKENS)], ids=["name", "callable", "mask"])
def test_layers_copy_and_pickle(attention, duplicate) -> None:
    block = every_parameter_matters(TemporalBlock(DIM, 3, attention))
    other = duplicate(block)
    assert torch.equal(other(clip(), FRAMES, TOKENS), block(clip(), FRAMES, TOKENS))
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in block.parameters()}


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_a_block_keeps_the_dtype_of_its_stream_under_autocast(stream: torch.dtype) -> None:
    block = TemporalBlock(DIM, 3, qk_norm=nn.LayerNorm)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(clip().to(stream), FRAMES, TOKENS).dtype == stream


def test_a_float64_block_passes_gradcheck() -> None:
    block = every_parameter_matters(TemporalBlock(DIM, 3, "kmct")).double()
    x = clip(4, batch=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block(x, 2, 2), (x,))


def test_the_repr_names_the_mask() -> None:
    assert "attention=kmct" in repr(TemporalBlock(DIM, 3, "kmct"))
    assert "frames=8" in repr(TemporalEmbedding(DIM, 8))


# ---- rotary time ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**20), st.integers(2, 9), st.integers(0, 2))
def test_scores_depend_on_the_distance_in_time_alone(later: int, head_dim: int, prefix: int) -> None:
    query, key = torch.randn(2, 1, 2, prefix + FRAMES * TOKENS, head_dim, generator=torch.Generator().manual_seed(3))
    times = torch.arange(FRAMES)

    def scores(times: torch.Tensor) -> torch.Tensor:
        q, k = (rotate_by_time(x, times, TOKENS, prefix)[:, :, prefix:] for x in (query, key))
        return q @ k.transpose(-1, -2)

    torch.testing.assert_close(scores(times + later), scores(times), rtol=1e-5, atol=1e-5)
    within = (scores(times) - (query @ key.transpose(-1, -2))[:, :, prefix:, prefix:]).unflatten(2, (FRAMES, TOKENS))
    for frame in range(FRAMES):  # tokens of one frame see each other as without it
        own = within[:, :, frame, :, frame * TOKENS : (frame + 1) * TOKENS]
        torch.testing.assert_close(own, torch.zeros_like(own), rtol=0, atol=1e-5)
    far = within[:, :, 0, :, TOKENS:]
    assert far.abs().max() > 0.1


def test_rotation_keeps_lengths_dtype_prefix_and_an_odd_channel() -> None:
    x = torch.randn(2, 3, 4 + FRAMES * TOKENS, 7)
    turned = rotate_by_time(x, torch.tensor([5, 1, 9]), TOKENS, 4)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, :4], x[:, :, :4])
    assert torch.equal(turned[..., 6], x[..., 6])
    assert rotate_by_time(x.bfloat16(), torch.arange(FRAMES), TOKENS, 4).dtype == torch.bfloat16
    each = torch.stack([rotate_by_time(x[i : i + 1], times, TOKENS, 4)[0] for i, times in enumerate(torch.eye(2, 3))])
    torch.testing.assert_close(rotate_by_time(x, torch.eye(2, 3), TOKENS, 4), each)


def test_rotary_attention_knows_the_order_of_frames_and_has_no_parameters() -> None:
    plain, rotary = (KronAttention(DIM, 3, "joint", rotary=r) for r in (False, True))
    rotary.load_state_dict(plain.state_dict())
    x = clip().unflatten(1, (FRAMES, TOKENS))
    for layer, blind in ((plain, True), (rotary, False)):
        forth = layer(x.flatten(1, 2), FRAMES, TOKENS).unflatten(1, (FRAMES, TOKENS))
        back = layer(x.flip(1).flatten(1, 2), FRAMES, TOKENS).unflatten(1, (FRAMES, TOKENS)).flip(1)
        assert torch.allclose(forth, back, atol=1e-5) == blind
    assert "rotary=True" in repr(rotary)

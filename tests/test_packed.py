"""Clips of different lengths in one sequence: each is computed as it is alone, and costs what it costs alone."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_within, expect
from strategies import masks_of_size
from torch.utils.flop_counter import FlopCounterMode

from kronmask import KronMask, kron_attention, masks, plan
from kronmask.clips import Clips, PackedClips
from kronmask.kernels.tiles import KINDS, Blocks, make_tiling
from kronmask.nn import KronAttention, TemporalBlock, TemporalEmbedding
from kronmask.plan import make_plan

NAMES = sorted(masks.NAMES)
IRREDUCIBLE = sorted(set(NAMES) - {"spatial", "dilated", "neighborhood"})  # clips that fall into no smaller blocks


def named(name: str, frames: int, tokens: int) -> KronMask:
    options = {"grid": (1, tokens)} if name == "neighborhood" else {}
    return masks.NAMES[name](frames, tokens, **options)


@st.composite
def packs(draw, names=tuple(NAMES), tokens=(1, 9), frames=(1, 7)):
    """Named masks of clips of equal tokens."""
    number = draw(st.integers(*tokens))
    clips = draw(st.lists(st.tuples(st.sampled_from(names), st.integers(*frames)), min_size=1, max_size=5))
    return [named(name, length, number) for name, length in clips]


@st.composite
def random_packs(draw):
    """Random masks, rectangular in frames and in tokens."""
    tokens = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    sizes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
    return [draw(masks_of_size(*size, *tokens, 0)) for size in sizes]


@given(packs() | random_packs())
def test_the_dense_form_is_block_diagonal(clips):
    packed = KronMask.block_diagonal(clips)
    assert torch.equal(packed.dense().int(), torch.block_diag(*(mask.dense().int() for mask in clips)))
    sizes = {"frames": (packed.query_frames, packed.key_frames), "tokens": (packed.query_tokens, packed.key_tokens)}
    again = KronMask.from_rule(packed.rule, **sizes)
    assert again == packed
    assert hash(again) == hash(packed)
    assert packed.num_pairs == sum(mask.num_pairs for mask in clips)


def clip_by_clip(clips: list[KronMask], tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What of each tensor `(B, H, L, ...)` belongs to each clip; keys and values are cut as the keys are."""
    queries, keys = ([mask.shape[i] for mask in clips] for i in range(2))
    cut = {
        name: tensor.split(keys if name in ("key", "value", "grad_key", "grad_value") else queries, 2)
        for name, tensor in tensors.items()
    }
    return [{name: parts[i] for name, parts in cut.items()} for i in range(len(clips))]


def check(clips: list[KronMask], dtype: torch.dtype = torch.float32, batch: int = 2) -> None:
    """Every backend computes a pack as float64 does clip by clip: output, LSE and gradients."""
    packed = KronMask.block_diagonal(clips)
    generator = torch.Generator().manual_seed(0)

    def normal(length: int, *last: int) -> torch.Tensor:
        return torch.randn(batch, 2, length, *last, generator=generator).to(dtype)

    (rows, columns), head_dim = packed.shape, 16
    inputs = {"query": normal(rows, head_dim), "key": normal(columns, head_dim), "value": normal(columns, head_dim)}
    grads = {"grad_output": normal(rows, head_dim), "grad_lse": normal(rows).float()}
    expected = [
        expect(**part, mask=mask) for mask, part in zip(clips, clip_by_clip(clips, inputs | grads), strict=True)
    ]
    # FlexAttention of torch 2.7 rounds its LSE to the inputs' dtype
    for backend in ("sdpa", "dense", "flex") if dtype == torch.float32 else ("sdpa", "dense"):
        leaves = {name: tensor.clone().requires_grad_(backend != "flex") for name, tensor in inputs.items()}
        output, lse = kron_attention(**leaves, mask=packed, backend=backend, return_lse=True)
        actual = {"output": output, "lse": lse}
        if backend != "flex":
            gradients = torch.autograd.grad((output, lse), tuple(leaves.values()), tuple(grads.values()))
            actual |= dict(zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True))
        for part, want in zip(clip_by_clip(clips, actual), expected, strict=True):
            assert_within(part, want, backend)


@settings(max_examples=60)
@given(clips=packs() | random_packs(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), batch=st.integers(1, 3))
def test_backends_compute_a_pack_as_they_do_clip_by_clip(clips, dtype, batch):
    check(clips, dtype, batch)


@pytest.mark.parametrize("tokens", [10, 50])
@pytest.mark.parametrize("names", [["kmt"], ["kmct"], ["axial"], ["temporal"], ["axial", "kmct", "joint", "temporal"]])
def test_packs_that_are_computed_in_parts_agree_with_float64(names, tokens):
    """At 10 tokens under masks, at 50 in rectangles, own positions and attention over frames."""
    check([named(names[i % len(names)], length, tokens) for i, length in enumerate((8, 5, 5, 1, 12))], batch=1)


def test_packed_streams_that_attend_over_frames_agree_with_float64():
    clips = [masks.axial(5, 128).select(query=slice(3, 5)), masks.temporal(4, 128).select(query=slice(2, 4))]
    assert len(make_plan(KronMask.block_diagonal(clips)).positions) == 2
    check(clips, batch=1)


@pytest.mark.parametrize(("tokens", "poison"), [(4, 1e4), (50, float("nan"))])  # few tokens share a call, under a mask
def test_a_clip_takes_nothing_from_another(tokens, poison):
    packed = KronMask.block_diagonal([masks.kmt(3, tokens), masks.kmct(2, tokens)])
    query, key, value = torch.randn(3, 1, 2, 5 * tokens, 8)
    output = kron_attention(query, key, value, packed)
    key[:, :, 3 * tokens :] = value[:, :, 3 * tokens :] = poison
    assert torch.equal(kron_attention(query, key, value, packed)[:, :, : 3 * tokens], output[:, :, : 3 * tokens])


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "at least one mask"),
        ([masks.kmt(2, 3), masks.kmt(2, 4)], r"tokens=3.*mask 1 is .*tokens=4"),
        ([masks.kmt(2, 3), masks.kmt(2, 3, prefix=2)], "mask 1 has 2 prefix tokens.*in tokens"),
    ],
)
def test_masks_that_cannot_be_packed_are_refused(clips, message):
    with pytest.raises(ValueError, match=message):
        KronMask.block_diagonal(clips)


def test_flops_are_the_sum_of_the_clips():
    clips = [masks.kmt(3, 5), masks.kmct(4, 5)]
    counts = []
    for group in ([KronMask.block_diagonal(clips)], clips):
        with FlopCounterMode(display=False) as counter:
            for mask in group:
                query = torch.randn(1, 2, mask.shape[0], 8, requires_grad=True)
                kron_attention(query, query, query, mask).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# ---- layers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    attention=st.sampled_from([*NAMES, masks.kmct]),
    tokens=st.sampled_from([1, 2, 5]),
)
def test_a_temporal_block_computes_a_pack_as_it_does_clip_by_clip(lengths, attention, tokens):
    torch.manual_seed(0)
    block, embedding = TemporalBlock(8, 2, attention).double(), TemporalEmbedding(8, 3).double()
    parameters = [*block.parameters(), *embedding.parameters()]
    x = torch.randn(1, sum(lengths), tokens, 8, dtype=torch.float64)
    weights = torch.randn(1, sum(lengths) * tokens, 8, dtype=torch.float64)

    def run(clips: Clips, x: torch.Tensor) -> torch.Tensor:
        return block(embedding(x, clips).flatten(1, 2), clips, tokens)

    packed = run(PackedClips(lengths), x)
    alone = torch.cat([run(Clips(clip.shape[1]), clip) for clip in x.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), parameters) for y in (packed, alone)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_packed_clips_say_what_their_frames_are():
    clips, value = PackedClips([2, 1, 3]), torch.arange(6.0)[:, None]
    assert clips.frames == 6
    assert clips.count(6) == 3
    assert clips == PackedClips((2, 1, 3))
    assert clips != PackedClips((3, 3))
    assert clips != Clips(6)
    assert clips.times(torch.device("cpu")).tolist() == [0, 1, 0, 0, 1, 2]
    assert [clip.flatten().tolist() for clip in clips.by_clip(value)] == [[0, 1], [2], [3, 4, 5]]
    assert clips.mean(value).tolist() == [[0.5], [2.0], [4.0]]
    assert clips.repeat(value[:3]).flatten().tolist() == [0, 0, 1, 2, 2, 2]
    assert [Clips(4).count(12), Clips(4).times(torch.device("cpu")).tolist()] == [3, [0, 1, 2, 3]]


def test_packed_clips_have_no_prefix():
    with pytest.raises(ValueError, match="no prefix tokens, but prefix is 1"):
        KronAttention(8, 2)(torch.randn(1, 13, 8), PackedClips([1, 2]), 4, prefix=1)


def test_a_fixed_mask_is_for_clips_of_its_size():
    layer = KronAttention(8, 2, masks.kmt(3, 4))
    assert layer(torch.randn(1, 24, 8), PackedClips([3, 3]), 4).shape == (1, 24, 8)
    with pytest.raises(ValueError, match=r"3 frames of 4 tokens.*2 frames of 4 tokens"):
        layer(torch.randn(1, 20, 8), PackedClips([3, 2]), 4)


# ---- what a pack costs ----------------------------------------------------------------------------------------------


def parts(mask: KronMask, masked_blocks: bool = True) -> Counter:
    """The parts of a plan with their numbers: rows of own positions, rectangles, blocks under masks, and masks over frames."""
    found, counted = make_plan(mask, masked_blocks), Counter[Any]()
    for part in found.own:
        counted["own"] += part.query_rows * part.count
    for part in found.rectangles:
        counted[part.query_rows, part.key_rows] += part.count
    for block, part in found.masked:
        counted[block, part.query_rows, part.key_rows] += part.count
    for frames, *_ in found.positions:
        counted[frames] += 1
    return counted


def calls(mask: KronMask) -> int:
    found = make_plan(mask)
    return len(found.own) + len(found.rectangles) + len(found.masked) + len(found.positions)


@settings(max_examples=60)
@given(clips=packs(frames=(1, 12), tokens=(64, 64)), masked_blocks=st.booleans())
def test_the_parts_of_a_pack_are_those_of_its_clips(clips, masked_blocks):
    packed = KronMask.block_diagonal(clips)
    assert parts(packed, masked_blocks) == sum((parts(mask, masked_blocks) for mask in clips), Counter())
    assert calls(packed) <= sum(map(calls, clips))


@settings(max_examples=100)
@given(clips=packs(names=tuple(IRREDUCIBLE), frames=(1, 12), tokens=(1, 60)), masked_blocks=st.booleans())
def test_a_pack_is_estimated_to_cost_no_more_than_its_clips(clips, masked_blocks):
    def cost(mask: KronMask) -> float:
        return plan._Cutter(mask, masked_blocks).cut(mask.codes)[0]

    assert cost(KronMask.block_diagonal(clips)) <= sum(map(cost, clips)) * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked_blocks", [True, False])
def test_cutting_between_blocks_changes_no_plan_of_one_clip(name, masked_blocks, monkeypatch):
    """Not of own frames alone either, whose table is block-diagonal: they are cut in halves, as before."""
    clips = [
        masks.NAMES[name](frames, tokens, prefix=prefix)
        for frames in (1, 2, 3, 7, 8, 16)
        for tokens in (1, 2, 5, 10, 50, 197)
        for prefix in (0, 2)
    ]
    plans = [make_plan(mask, masked_blocks) for mask in clips]
    monkeypatch.setattr(plan, "_diagonal_cut", lambda table: None)
    assert [make_plan.__wrapped__(mask, masked_blocks) for mask in clips] == plans


STREAMS = [masks.kmct(t, 197).select(query=slice(t - 2, t)) for t in (8, 8, 5)]  # the last frames against all
EARLIER = [masks.kmct(t, 197) & ~masks.spatial(t, 197) for t in (4, 9)]  # the first frame sees nothing


@pytest.mark.parametrize("clips", [STREAMS, EARLIER, EARLIER[::-1]], ids=["streams", "earlier frames", "longer first"])
def test_clips_are_told_apart_where_they_are_no_square_or_have_frames_that_see_nothing(clips):
    packed = KronMask.block_diagonal(clips)
    assert parts(packed, False) == sum((parts(mask, False) for mask in clips), Counter())


def test_equal_clips_are_batched():
    for name in ("kmt", "kmct", "joint", "causal", "spatial"):
        assert calls(KronMask.block_diagonal([named(name, 8, 197)] * 6)) == calls(named(name, 8, 197))
    packed = make_plan(KronMask.block_diagonal([masks.kmt(8, 50)] * 6))
    assert [(mask, part.count) for mask, part in packed.masked] == [(masks.kmt(8, 50), 6)]


def test_the_plan_of_many_clips_is_made_quickly():
    """Counted in calls of functions, which a busy machine does not change: 105,000 took 65 ms of a core; 0.2 s are allowed."""
    clips = [named(IRREDUCIBLE[i % len(IRREDUCIBLE)], 4 + i * 7 % 13, 197) for i in range(64)]
    packed, count = KronMask.block_diagonal(clips), 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        make_plan(packed)
    finally:
        sys.setprofile(None)
    assert count < 200_000


@pytest.mark.parametrize("blocks", [Blocks(128, 64), Blocks(64, 64)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["kmt", "kmct", "axial", "causal", "joint"])
def test_tiles_of_a_pack_visit_what_those_of_its_clips_do(name, kind, blocks):
    """But for tiles that two clips share, which visit the keys of both, once for each boundary."""
    clips = [named(name, length, 197) for length in (8, 5, 16, 4, 11)]
    packed = make_tiling(KronMask.block_diagonal(clips), blocks, kind).visits
    alone = [make_tiling(mask, blocks, kind) for mask in clips]
    widest = max(tile.visits(blocks.columns) for tiling in alone for tile in tiling.tiles)
    assert packed <= sum(tiling.visits for tiling in alone) + (len(clips) - 1) * widest

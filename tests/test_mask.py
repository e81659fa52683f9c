"""The algebra of masks is the algebra of their dense forms."""

import base64
import copy
import pickle
import time
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import kron_masks, mask_pairs
from torch.nn.attention.flex_attention import create_block_mask

from kronmask import KronMask, eye, kron, masks, ones


def frames_part(mask: KronMask) -> torch.Tensor:
    return mask.dense()[mask.prefix :, mask.prefix :]


@given(mask_pairs())
def test_or_and_are_elementwise(pair):
    a, b = pair
    assert torch.equal((a | b).dense(), a.dense() | b.dense())
    assert torch.equal((a & b).dense(), a.dense() & b.dense())


@given(kron_masks())
def test_complement_flips_the_frames_and_keeps_the_prefix(mask):
    assert torch.equal(frames_part(~mask), ~frames_part(mask))
    assert (~mask).dense()[: mask.prefix].all()
    assert (~mask).dense()[:, : mask.prefix].all()
    assert ~~mask == mask


@given(kron_masks())
def test_transpose(mask):
    assert torch.equal(mask.T.dense(), mask.dense().T)
    assert mask == mask.T.T


@given(mask_pairs())
def test_equality_and_hash_follow_the_dense_mask(pair):
    a, b = pair
    assert (a == b) == torch.equal(a.dense(), b.dense())
    same = KronMask(
        a.codes,
        [a.factor(3 + i) for i in range(len(a.palette))],
        tokens=(a.query_tokens, a.key_tokens),
        prefix=a.prefix,
    )
    assert same == a
    assert hash(same) == hash(a)


@given(mask_pairs())
def test_laws_of_a_boolean_algebra_hold_as_equality_of_masks(pair):
    a, b = pair
    assert a | b == b | a
    assert a & (a | b) == a
    assert ~(a | b) == ~a & ~b
    assert (a & b).T == a.T & b.T


@given(kron_masks())
def test_a_pattern_that_is_empty_full_or_identity_becomes_a_code(mask):
    for i in range(len(mask.palette)):
        pattern = mask.factor(3 + i)
        assert pattern.any()
        assert not pattern.all()
        assert pattern.shape[0] != pattern.shape[1] or not torch.equal(pattern, eye(len(pattern)))
    assert sorted({c for row in mask.codes for c in row if c >= 3}) == list(range(3, 3 + len(mask.palette)))


@given(kron_masks())
def test_num_pairs_density_and_shape_are_those_of_the_dense_mask(mask):
    dense = mask.dense()
    assert mask.shape == tuple(dense.shape)
    assert mask.num_pairs == int(dense.sum())
    assert mask.density == pytest.approx(dense.double().mean().item())


@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_kron_is_the_kronecker_product(data, tq, tk, nq, nk):
    time_factor = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tq * tk, max_size=tq * tk))).view(tq, tk)
    space = torch.tensor(data.draw(st.lists(st.booleans(), min_size=nq * nk, max_size=nq * nk))).view(nq, nk)
    assert torch.equal(kron(time_factor, space).dense(), torch.kron(time_factor.int(), space.int()).bool())


@given(kron_masks())
def test_mask_mod_is_the_dense_mask(mask):
    rows, columns = mask.shape
    zero = torch.zeros((), dtype=torch.int32)
    allowed = mask.mask_mod()(zero, zero, torch.arange(rows)[:, None], torch.arange(columns)[None])
    assert torch.equal(allowed, mask.dense())


@given(kron_masks(frames=(1, 4), tokens=(1, 9)), st.sampled_from([1, 2, 3, 4, 8, 16, (4, 2), (2, 16)]))
def test_block_counts_are_the_sums_of_the_dense_blocks(mask, block):
    rows, columns = block if isinstance(block, tuple) else (block, block)
    dense = mask.dense().long()
    dense = torch.nn.functional.pad(dense, (0, -dense.shape[1] % columns, 0, -dense.shape[0] % rows))
    expected = dense.view(dense.shape[0] // rows, rows, -1, columns).sum((1, 3))
    assert torch.equal(mask.block_counts(block), expected)


@given(kron_masks(frames=(1, 4), tokens=(1, 9)), st.sampled_from([4, 8, (8, 4)]))
def test_block_mask_equals_create_block_mask(mask, block):
    assert_same_block_mask(mask, block)


@pytest.mark.parametrize("name", masks.NAMES)
@pytest.mark.parametrize(("frames", "tokens", "prefix"), [(8, 50, 0), (5, 37, 1), (3, 197, 4)])
def test_block_mask_equals_create_block_mask_at_full_size(name, frames, tokens, prefix):
    assert_same_block_mask(masks.NAMES[name](frames, tokens, prefix=prefix), 128)


def assert_same_block_mask(mask, block):
    ours = mask.block_mask(block)
    theirs = create_block_mask(mask.mask_mod(), None, None, *mask.shape, device="cpu", BLOCK_SIZE=block)
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for part in ("", "full_"):
        for side in ("kv", "q"):
            for kind in ("num_blocks", "indices"):
                field = f"{part}{side}_{kind}"
                assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


def test_block_mask_of_a_long_clip_needs_no_time_for_token_pairs():
    mask = masks.kmt(128, 577)  # 73,856 tokens: 5.5e9 pairs, 333,000 blocks
    start = time.perf_counter()
    mask.block_counts(128)
    assert time.perf_counter() - start < 5


@given(kron_masks())
def test_rule_round_trips(mask):
    sizes = {"frames": (mask.query_frames, mask.key_frames), "tokens": (mask.query_tokens, mask.key_tokens)}
    assert KronMask.from_rule(mask.rule, **sizes, prefix=mask.prefix) == mask


@pytest.mark.parametrize("name", ["joint", "spatial", "temporal", "causal", "kmt", "kmct", "frame_window", "axial"])
@given(frames=st.integers(1, 12), tokens=st.integers(1, 9), prefix=st.integers(0, 2))
def test_the_rule_of_a_mask_without_patterns_holds_at_every_size(name, frames, tokens, prefix):
    rule = masks.mask_rule(name, 8, 5)
    mask = KronMask.from_rule(rule, frames=(frames, frames), tokens=(tokens, tokens), prefix=prefix)
    assert mask == masks.NAMES[name](frames, tokens, prefix=prefix)


@given(kron_masks())
def test_masks_survive_pickle_and_deepcopy(mask):
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert copy.deepcopy(mask) == mask


@given(kron_masks(), st.data())
def test_select_is_slicing_of_the_dense_frames(mask, data):
    q = data.draw(st.integers(0, mask.query_frames - 1))
    k = data.draw(st.integers(0, mask.key_frames - 1))
    part = mask.select(query=slice(q, None), key=slice(None, k + 1))
    expected = frames_part(mask)[q * mask.query_tokens :, : (k + 1) * mask.key_tokens]
    assert torch.equal(frames_part(part), expected)


@given(kron_masks(), st.data())
def test_select_of_numbers_takes_these_frames_in_their_order(mask, data):
    queries = data.draw(st.lists(st.integers(0, mask.query_frames - 1), min_size=1, max_size=6))
    keys = data.draw(st.lists(st.integers(0, mask.key_frames - 1), min_size=1, max_size=6))
    rows = [q * mask.query_tokens + n for q in queries for n in range(mask.query_tokens)]
    columns = [k * mask.key_tokens + n for k in keys for n in range(mask.key_tokens)]
    part = mask.select(query=queries, key=tuple(keys))
    assert torch.equal(frames_part(part), frames_part(mask)[rows][:, columns])
    assert part.prefix == mask.prefix
    assert mask.select(query=range(mask.query_frames)) == mask.select() == mask


def test_masks_cannot_be_changed():
    mask = masks.kmt(3, 4)
    with pytest.raises(AttributeError):
        mask.prefix = 1
    pattern = masks.neighborhood(2, 9)
    pattern.factor(3).fill_(False)
    assert pattern == masks.neighborhood(2, 9)


def of_pattern(compressed):
    """A mask from a rule with one pattern of 2 x 2 tokens."""
    return KronMask.from_rule(f"diagonals:3;{base64.b64encode(compressed).decode()}", frames=(3, 3), tokens=(2, 2))


def test_kmt_by_hand():
    assert masks.kmt(8, 197) == kron(~eye(8), ones(197)) | kron(eye(8), eye(197))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KronMask([[0, 1], [1]], tokens=3), "table"),
        (lambda: KronMask([], tokens=3), "table"),
        (lambda: KronMask([[3]], tokens=3), "code 3 names no factor"),
        (lambda: KronMask([[2]], tokens=(3, 4)), "identity"),
        (lambda: KronMask([[1]], tokens=0), "tokens"),
        (lambda: KronMask([[1]], tokens=3, prefix=-1), "prefix"),
        (lambda: KronMask([[3]], [ones(2)], tokens=3), r"palette\[0\]"),
        (lambda: kron(torch.eye(3), ones(3)), "time must be a boolean matrix"),
        (lambda: kron(eye(3), ones(3)[0]), "space must be a boolean matrix"),
        (lambda: masks.kmt(3, 4) | masks.kmt(4, 4), "different sizes"),
        (lambda: masks.kmt(3, 4) & masks.kmt(3, 4, prefix=1), "different sizes"),
        (lambda: masks.kmt(0, 4), "frames"),
        (lambda: masks.kmt(3, 4).select(query=slice(3, 4)), "select no frames"),
        (lambda: masks.kmt(3, 4).select(query=[]), "select no frames"),
        (lambda: masks.kmt(3, 4).select(key=[0, 3]), r"key=\[0, 3\] selects frame 3, but the key frames are 0 to 2"),
        (lambda: masks.kmt(3, 4).select(query=[-1]), "selects frame -1"),
        (lambda: masks.neighborhood(2, 7), "grid"),
        (lambda: masks.neighborhood(2, 7, grid=(3, 3)), "does not fit"),
        (lambda: masks.frame_window(3, 4, radius=-1), "radius"),
        (lambda: masks.dilated(3, 4, stride=0), "stride"),
        (lambda: masks.mask_rule("kmtt", 3, 4), "unknown attention"),
        (lambda: masks.mask_rule(masks.kmt(4, 4), 3, 4), "3 frames of 4 tokens"),
        (lambda: masks.mask_rule(lambda t, n: None, 3, 4), "not a KronMask"),
        (lambda: masks.mask_rule(3, 3, 4), "attention must be"),
        (lambda: KronMask.from_rule("table:1x4", frames=(3, 3), tokens=(2, 2)), "does not fit"),
        (lambda: KronMask.from_rule("nonsense", frames=(3, 3), tokens=(2, 2)), "not the rule"),
        (lambda: KronMask.from_rule("table:1x9 ", frames=(3, 3), tokens=(2, 2)), "not the rule"),
        (lambda: KronMask.from_rule("table:1x4,+1x5", frames=(3, 3), tokens=(2, 2)), "not the rule"),
        (lambda: KronMask.from_rule("diagonals:1<0", frames=(3, 3), tokens=(2, 2)), "not the rule"),
        (lambda: KronMask.from_rule("diagonals:1<0,2junk", frames=(3, 3), tokens=(2, 2)), "not the rule"),
        (lambda: KronMask.from_rule("table:1x999999999,1x9", frames=(3, 3), tokens=(2, 2)), "1000000008 pairs"),
        (lambda: of_pattern(zlib.compress(bytes(10**8))), "more than 4 entries"),
        (lambda: of_pattern(zlib.compress(bytes(3))), "pattern of 3 entries"),
        (lambda: of_pattern(zlib.compress(bytes(4)) + b"more"), "not a pattern"),
        (lambda: of_pattern(zlib.compress(bytes([0, 1, 2, 0]))), "not a pattern"),
        (lambda: of_pattern(b"not zlib"), "not a pattern"),
        (lambda: KronMask.from_rule("diagonals:3;A*A=", frames=(3, 3), tokens=(2, 2)), "not a pattern"),
    ],
)
def test_bad_masks_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()

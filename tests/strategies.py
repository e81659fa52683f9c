"""Random masks for hypothesis."""

import torch
from hypothesis import strategies as st

from kronmask import KronMask


@st.composite
def kron_masks(draw, *, frames=(1, 5), tokens=(1, 6), square=False):
    """Masks with any codes and up to two explicit patterns; rectangular in frames and in tokens unless `square`."""
    query_frames = draw(st.integers(*frames))
    key_frames = query_frames if square else draw(st.integers(*frames))
    query_tokens = draw(st.integers(*tokens))
    key_tokens = query_tokens if square or draw(st.booleans()) else draw(st.integers(*tokens))
    return draw(masks_of_size(query_frames, key_frames, query_tokens, key_tokens, draw(st.integers(0, 2))))


@st.composite
def masks_of_size(draw, query_frames, key_frames, query_tokens, key_tokens, prefix):
    bits = st.lists(st.booleans(), min_size=query_tokens * key_tokens, max_size=query_tokens * key_tokens)
    palette = [torch.tensor(draw(bits)).view(query_tokens, key_tokens) for _ in range(draw(st.integers(0, 2)))]
    codes = [c for c in range(3 + len(palette)) if c != 2 or query_tokens == key_tokens]
    row = st.lists(st.sampled_from(codes), min_size=key_frames, max_size=key_frames)
    table = draw(st.lists(row, min_size=query_frames, max_size=query_frames))
    return KronMask(table, palette, tokens=(query_tokens, key_tokens), prefix=prefix)


@st.composite
def mask_pairs(draw):
    """Two masks of the same sizes."""
    sizes = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        *([draw(st.integers(1, 5))] * 2),
        draw(st.integers(0, 2)),
    )
    return draw(masks_of_size(*sizes)), draw(masks_of_size(*sizes))

"""Each named mask is the set of pairs that its definition says."""

import pytest
import torch

from kronmask import masks

DEFINITIONS = {
    "joint": lambda t, n, u, m: True,
    "spatial": lambda t, n, u, m: t == u,
    "temporal": lambda t, n, u, m: n == m,
    "causal": lambda t, n, u, m: u <= t,
    "kmt": lambda t, n, u, m: t != u or n == m,
    "kmct": lambda t, n, u, m: u < t or (t, n) == (u, m),
    "frame_window": lambda t, n, u, m: abs(t - u) <= 1,
    "dilated": lambda t, n, u, m: (t - u) % 2 == 0,
    "axial": lambda t, n, u, m: t == u or n == m,
    # class token, then a 3 x 3 grid
    "neighborhood": lambda t, n, u, m: (
        n == 0 or m == 0 or max(abs((n - 1) // 3 - (m - 1) // 3), abs((n - 1) % 3 - (m - 1) % 3)) <= 1
    ),
}


def test_every_named_mask_has_a_definition():
    assert set(DEFINITIONS) == set(masks.NAMES)


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("prefix", [0, 2])
def test_named_mask(name, frames, prefix):
    tokens, allowed = 10, DEFINITIONS[name]
    pairs = [(t, n) for t in range(frames) for n in range(tokens)]
    expected = torch.ones(prefix + len(pairs), prefix + len(pairs), dtype=torch.bool)
    expected[prefix:, prefix:] = torch.tensor([[allowed(*query, *key) for key in pairs] for query in pairs])
    assert torch.equal(masks.NAMES[name](frames, tokens, prefix=prefix).dense(), expected)


def test_parameters():
    far = masks.frame_window(6, 3, radius=2).dense()[::3, ::3]
    assert far.sum(1).tolist() == [3, 4, 5, 5, 4, 3]
    assert masks.dilated(6, 3, stride=3).dense()[::3, ::3].sum(1).tolist() == [2] * 6
    registers = masks.neighborhood(2, 4 + 6, grid=(2, 3), radius=1)
    assert registers.dense()[:4].all()
    assert not registers.dense()[4, 6]  # first patch, and the patch two columns to its right


@pytest.mark.parametrize("name", ["causal", "kmct"])
@pytest.mark.parametrize(("window", "sink"), [(1, 0), (3, 0), (3, 2), (1, 1), (9, 0), (None, 2)])
def test_windows_and_sinks(name, window, sink):
    frames, tokens, allowed = 6, 3, DEFINITIONS[name]
    pairs = [(t, n) for t in range(frames) for n in range(tokens)]

    def seen(t, n, u, m):
        near = window is None or t - u < window
        return allowed(t, n, u, m) and (near or u < sink)

    expected = torch.tensor([[seen(*query, *key) for key in pairs] for query in pairs])
    assert torch.equal(masks.NAMES[name](frames, tokens, window=window, sink=sink).dense(), expected)


def test_a_window_of_no_frame_is_refused():
    with pytest.raises(ValueError, match="window must be an int of at least 1, not 0"):
        masks.kmct(4, 3, window=0)
    with pytest.raises(ValueError, match="sink must be an int of at least 0, not -1"):
        masks.causal(4, 3, sink=-1)

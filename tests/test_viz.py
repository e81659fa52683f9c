"""A mask can be read at a glance: text, SVG and matplotlib."""

import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
from hypothesis import given, settings
from strategies import kron_masks

from kronmask import masks

mpl.use("Agg")


def test_repr_shows_the_frame_table():
    lines = repr(masks.kmct(3, 5)).splitlines()
    assert lines[0] == "KronMask(frames=3, tokens=5, density=0.400)"
    assert lines[1:4] == ["  ╲╲····", "  ██╲╲··", "  ████╲╲"]


def test_repr_of_a_long_clip_is_cut_and_says_so():
    text = repr(masks.kmt(100, 5))
    assert "first 32 frames" in text
    assert len(text.splitlines()) < 40


@given(kron_masks())
def test_every_mask_has_a_text_and_a_well_formed_svg(mask):
    assert str(mask) in repr(mask)
    root = ElementTree.fromstring(mask._repr_svg_())
    cells = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert len(cells) == mask.query_frames * mask.key_frames


@settings(max_examples=10)
@given(kron_masks())
def test_every_mask_can_be_drawn(mask):
    import matplotlib.pyplot as plt

    for tokens in (False, True):
        ax = mask.plot(tokens=tokens)
        assert ax.get_xlabel() == "key frame"
        plt.close(ax.figure)

"""How a mask looks: text for a terminal, SVG for a notebook, matplotlib for a paper."""

from __future__ import annotations

from html import escape
from typing import Any

from kronmask.mask import EMPTY, FULL, IDENTITY, KronMask

__all__ = ["plot", "svg", "text"]

MAX_FRAMES = 32  # a larger table is shown by its first frames
GLYPHS = {EMPTY: "·", FULL: "█", IDENTITY: "╲"}
COLORS = {EMPTY: "#f4f4f2", FULL: "#1f5a8a", IDENTITY: "#f0a202"}
PATTERN_COLORS = ("#5aa469", "#b5446e", "#7768ae", "#3fa7d6", "#8d6a4f")
NAMES = {EMPTY: "nothing", FULL: "all positions", IDENTITY: "own position"}


def text(mask: KronMask) -> str:
    """The frame table in letters, a row for each query frame."""
    rows = ["  " + "".join(_glyph(code) * 2 for code in row[:MAX_FRAMES]) for row in mask.codes[:MAX_FRAMES]]
    cut = mask.query_frames > MAX_FRAMES or mask.key_frames > MAX_FRAMES
    legend = "  ".join(f"{_glyph(code)} {_name(code)}" for code in _used(mask))
    return "\n".join([*rows, *([f"  ... first {MAX_FRAMES} frames"] if cut else []), f"  {legend}"])


def svg(mask: KronMask) -> str:
    """The frame table as a small SVG picture: a row for each query frame, a column for each key frame."""
    cell, rows, columns = 16, mask.codes[:MAX_FRAMES], min(mask.key_frames, MAX_FRAMES)
    width, height = max(cell * columns + 2, 360), cell * len(rows) + 22 * (len(_used(mask)) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    ]
    for y, row in enumerate(rows):
        for x, code in enumerate(row[:MAX_FRAMES]):
            place = f'x="{1 + x * cell}" y="{1 + y * cell}" width="{cell - 1}" height="{cell - 1}"'
            parts.append(
                f'<rect {place} rx="2" fill="{_color(code)}"><title>frame {y} to {x}: {_name(code)}</title></rect>'
            )
    bottom = cell * len(rows) + 16
    parts.append(f'<text x="1" y="{bottom}" fill="#444">{escape(str(mask))}</text>')
    for line, code in enumerate(_used(mask), start=1):
        parts.append(
            f'<rect x="1" y="{bottom + 20 * line - 10}" width="12" height="12" fill="{_color(code)}" stroke="#999"/>'
        )
        parts.append(f'<text x="20" y="{bottom + 20 * line}" fill="#444">{_name(code)}</text>')
    return "".join([*parts, "</svg>"])


def plot(mask: KronMask, ax: Any = None, *, tokens: bool = False) -> Any:
    """Draw the frame table, or with `tokens` the dense `(Lq, Lk)` mask, on matplotlib axes; returns the axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing a mask needs matplotlib: pip install matplotlib") from error
    if ax is None:
        _, ax = plt.subplots(figsize=(4, 4), layout="constrained")
    if tokens:
        ax.imshow(
            mask.dense().numpy(),
            cmap=ListedColormap([COLORS[EMPTY], COLORS[FULL]]),
            vmin=0,
            vmax=1,
            interpolation="none",
        )
        for axis, frames, size in (
            (ax.set_yticks, mask.query_frames, mask.query_tokens),
            (ax.set_xticks, mask.key_frames, mask.key_tokens),
        ):
            axis([mask.prefix - 0.5 + t * size for t in range(frames)], [str(t) for t in range(frames)])
        ax.grid(color="white", linewidth=0.8)
    else:
        count = 3 + len(mask.palette)
        ax.imshow(mask.codes, cmap=ListedColormap([_color(c) for c in range(count)]), vmin=-0.5, vmax=count - 0.5)
        ax.set_xticks([x - 0.5 for x in range(1, mask.key_frames)], minor=True)
        ax.set_yticks([y - 0.5 for y in range(1, mask.query_frames)], minor=True)
        ax.grid(which="minor", color="white", linewidth=1.5)
        handles = [Patch(facecolor=_color(code), edgecolor="#999", label=_name(code)) for code in _used(mask)]
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=8)
    ax.tick_params(which="both", length=0, labelsize=8)
    ax.set(xlabel="key frame", ylabel="query frame")
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def _used(mask: KronMask) -> list[int]:
    return sorted({code for row in mask.codes for code in row})


def _glyph(code: int) -> str:
    return GLYPHS.get(code) or chr(ord("A") + (code - 3) % 26)


def _color(code: int) -> str:
    return COLORS.get(code) or PATTERN_COLORS[(code - 3) % len(PATTERN_COLORS)]


def _name(code: int) -> str:
    return NAMES.get(code) or f"pattern {_glyph(code)}"

"""Draws the frame tables of some masks: python examples/plot_masks.py [FILE]"""

import sys

import matplotlib as mpl

from kronmask import masks

mpl.use("Agg")
import matplotlib.pyplot as plt

FRAMES, TOKENS = 8, 197
SHOWN = {
    "joint": masks.joint(FRAMES, TOKENS),
    "kmt": masks.kmt(FRAMES, TOKENS),
    "kmct": masks.kmct(FRAMES, TOKENS),
    "causal": masks.causal(FRAMES, TOKENS),
    "axial": masks.axial(FRAMES, TOKENS),
    "neighborhood & frame_window": masks.neighborhood(FRAMES, TOKENS, radius=2) & masks.frame_window(FRAMES, TOKENS),
}


def main(path: str) -> None:
    """Write the picture to `path`; its ending chooses the format."""
    figure, panels = plt.subplots(2, 3, figsize=(10, 7), layout="constrained")
    for ax, (name, mask) in zip(panels.flat, SHOWN.items(), strict=True):
        mask.plot(ax)
        ax.set_title(f"{name}\n{mask.density:.1%} of all pairs", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "masks.png")

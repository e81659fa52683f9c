"""CLAVER (ICLR 2025, arXiv 2502.03549) on kronmask: CLIP for actions, with a Kronecker mask in the vision tower."""

import os

DEMO_CHECKPOINT = "runs/demo/claver.safetensors"  # what commands take that are given none


def check_demo_checkpoint(path: str) -> None:
    """Raise ValueError if `path` is the demo's checkpoint and the demo has not run here."""
    if path == DEMO_CHECKPOINT and not os.path.exists(path):
        raise ValueError(f"{path}: not there yet; run the demo first (claver_k400.py), or pass --checkpoint")

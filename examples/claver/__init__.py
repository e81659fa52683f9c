"""CLAVER (ICLR 2025, arXiv 2502.03549) on kronmask: CLIP for actions, with a Kronecker mask in the vision tower."""

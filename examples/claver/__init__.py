"""CLAVER (ICLR 2025, arXiv 2502.03549) on kronmask: CLIP for actions, with a Kronecker mask in the vision tower."""

DEMO_CHECKPOINT = "runs/demo/claver.safetensors"  # what commands take that are given none

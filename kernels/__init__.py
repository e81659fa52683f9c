"""The fused kernels of kronmask, installed as `kronmask.kernels`."""

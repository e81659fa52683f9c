"""The fused Triton kernels of kronmask, installed as `kronmask.kernels`.

`tiles` turns a mask into tiles and small tables (pure Python, no Triton); `forward` and `backward` are the kernels that execute
them, `primitives` what these share; `config` chooses block sizes for a GPU and `report` shows what compiled kernels would use.
"""

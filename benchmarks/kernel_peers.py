"""The model of `kronmask.kernels.report` for other attention kernels, compiled for GPUs that need not be there.

    python benchmarks/kernel_peers.py [--arch sm_80 sm_90] [--tutorial FILE]

FlexAttention's forward is what torch's compiler generates for KMT and KMCT: it is told of a GPU that is not there and stopped
when it hands its kernel to Triton. The tutorial on fused attention is not in Triton's wheel: FILE is a copy of its `_attn_fwd`
and `_attn_fwd_inner` (`python/tutorials/06-fused-attention.py`, the version with block pointers).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from common import RESULTS, provenance
from torch.nn.attention.flex_attention import BlockMask
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kronmask import masks
from kronmask.kernels.compiled import ARCHITECTURES, Code, read_code
from kronmask.kernels.machine import GPUS

SIZES = ((8, 197), (8, 257), (32, 197))  # frames and tokens
FLEX_BLOCK = 128


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], arch: str, warps: int, stages: int
) -> Any:
    """Compiles a kernel, specialised as the JIT would be for aligned pointers and lengths."""
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {at[n]: [["tt.divisibility", 16]] for n, kind in types.items() if kind.startswith("*") or kind == "i32"}
    source = ASTSource(kernel, types, {at[n]: value for n, value in constants.items()}, aligned)
    return triton.compile(source, target=ARCHITECTURES[arch][0], options={"num_warps": warps, "num_stages": stages})


def row(name: str, code: Code, arch: str, head_dim: int, tile: tuple[int, int, int, int]) -> dict[str, Any]:
    """What of a peer's kernel is stored; its loops in the order of its code."""
    rows, columns, _, _ = tile
    ideal = 2 * 2 * rows * columns * head_dim / GPUS[arch].flop
    loops = [
        {
            "cycles": {pipe: round(cycles) for pipe, cycles in work.cycles.items()},
            "share": [round(ideal / t, 3) for t in (work.overlapped, work.in_turn, work.estimated(code.blocks))],
            "overlapped": round(work.overlapped),
            "estimated": round(work.estimated(code.blocks)),
        }
        for work in code.loops
    ]
    shape = "{}x{}w{}s{}".format(*tile)
    return {
        "kernel": name,
        "arch": arch,
        "head_dim": head_dim,
        "option": shape,
        "registers": code.registers,
        "spilled_bytes": code.spilled_bytes,
        "blocks": code.blocks,
        "loops": loops,
    }


# ---- Triton's tutorial ----------------------------------------------------------------------------------------------


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tutorial(path: Path, arch: str, head_dim: int, tile: tuple[int, int, int, int]) -> dict[str, Any]:
    """Attention without a mask by the tutorial's kernel."""
    rows, columns, warps, stages = tile
    kernel = load(path, "tutorial")._attn_fwd
    constants = {"HEAD_DIM": head_dim, "BLOCK_M": rows, "BLOCK_N": columns, "STAGE": 1}
    constants |= dict.fromkeys(("stride_qk", "stride_kk", "stride_vn", "stride_on"), 1)
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= dict.fromkeys(("Q", "K", "V", "Out"), "*bf16") | {"M": "*fp32", "sm_scale": "fp32"}
    code = compiled(kernel, signature, constants, arch, warps, stages)
    return row("tutorial", read_code(code, arch, warps, 2 * columns * 64, head_dim // 64), arch, head_dim, tile)


# ---- FlexAttention --------------------------------------------------------------------------------------------------


class GeneratedError(Exception):
    """Thrown through the compiler when it has the source of the kernel."""


def pretend(arch: str) -> list[str]:
    """Makes torch believe in a GPU, in this process for good; collects the sources of the kernels that it generates."""
    capability = int(arch.removeprefix("sm_"))
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name=arch, major=major, minor=minor, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30, gcnArchName="",
        shared_memory_per_block_optin=ARCHITECTURES[arch][1], shared_memory_per_block=48 << 10,
        shared_memory_per_multiprocessor=GPUS[arch].shared_bytes, L2_cache_size=50 << 20,
    )  # fmt: skip

    def constant(value: object) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.async_compile import AsyncCompile

    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {"get_device_properties": properties, "get_device_capability": (major, minor), "is_available": True,
                     "current_device": 0, "device_count": 1, "_lazy_init": None, "get_device_name": arch, "synchronize": None,
                     "_exchange_device": 0, "_maybe_exchange_device": 0, "set_rng_state": None,
                     "get_rng_state": torch.empty(16, dtype=torch.uint8)},
        CudaInterface: {"get_device_properties": properties, "get_compute_capability": capability, "current_device": 0,
                        "is_available": True},
        CudaInterface.Worker: {"get_device_properties": properties},
    }  # fmt: skip
    for owner, values in answers.items():
        for name, value in values.items():
            answer = constant(value)
            setattr(owner, name, answer if owner is torch.cuda else staticmethod(answer))

    class Driver:
        get_current_target = constant(GPUTarget("cuda", capability, 32))
        get_current_device = constant(0)

        def __getattr__(self, name: str) -> Any:
            return constant(None)

    triton.runtime.driver.set_active(Driver())
    sources: list[str] = []

    def take(self: AsyncCompile, name: str, source: str, *args: object, **kwargs: object) -> None:
        sources.append(source)
        raise GeneratedError

    AsyncCompile.triton = take  # type: ignore[method-assign, assignment]
    return sources


def generated(mask_name: str, frames: int, tokens: int, head_dim: int, sources: list[str]) -> str:
    """The source of FlexAttention's forward kernel for a mask."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    sys.modules["torch._higher_order_ops.flex_attention"]._permute_strides = lambda out, strides: out  # type: ignore[attr-defined]
    mask = masks.NAMES[mask_name](frames, tokens)
    length, number = mask.shape[0], -(-mask.shape[0] // FLEX_BLOCK)
    mask_mod = FLEX_MODS[mask_name](tokens)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(1, 12, length, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        tables = [
            torch.empty(1, 1, *shape, dtype=torch.int32, device="cuda") for shape in [(number,), (number, number)] * 2
        ]
        counts, index, full_counts, full_index = tables
        block_mask = BlockMask.from_kv_blocks(
            counts, index, full_counts, full_index, FLEX_BLOCK, mask_mod, (length, length), compute_q_blocks=False
        ).as_tuple()
        options: dict[str, Any] = {"WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True, "BACKEND": "TRITON"}
        options |= dict.fromkeys(("PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "OUTPUT_MAX"), False)

        def attention(q: Any, k: Any, v: Any, *tables: Any) -> Any:
            given = iter(tables)
            filled = tuple(next(given) if isinstance(x, torch.Tensor) else x for x in block_mask)
            plain = lambda score, b, h, i, j: score  # noqa: E731
            return torch.ops.higher_order.flex_attention(q, k, v, plain, filled, head_dim**-0.5, options, (), ())

        graph = make_fx(attention, decomposition_table=select_decomp_table())(q, k, v, *tables)
        try:
            compile_fx_inner(graph, [q, k, v, *tables])
        except Exception as error:
            if not sources:
                raise RuntimeError("torch's compiler failed before it had a kernel") from error
    return sources.pop()


FLEX_MODS: dict[str, Callable[[int], Callable]] = {
    "kmt": lambda tokens: lambda b, h, i, j: (i // tokens != j // tokens) | (i == j),
    "kmct": lambda tokens: lambda b, h, i, j: (j // tokens < i // tokens) | (i == j),
}


def flex(name: str, arch: str, head_dim: int, sources: list[str], folder: Path) -> dict[str, Any]:
    """FlexAttention's kernel for a mask, and the blocks that it visits for clips of SIZES."""
    source = generated(name, 8, 197, head_dim, sources)
    (signature,) = (eval(found) for found in re.findall(r"triton_meta=\{'signature': (\{.*?\})", source))
    numbers = {key: int(value) for key, value in re.findall(r"\b(BLOCK_[MN]) : tl\.constexpr = (\d+)", source)}
    warps, stages = (int(re.findall(rf"num_{key}=(\d+)", source)[0]) for key in ("warps", "stages"))
    text = re.sub(r"@triton_heuristics\.template\(.*?\n\)\n", "", source, count=1, flags=re.DOTALL)
    path = folder / f"flex_{name}_{arch}_{head_dim}.py"
    path.write_text(text)
    (kernel,) = (value for key, value in vars(load(path, path.stem)).items() if key.startswith("triton_tem"))
    code = compiled(kernel, signature, {}, arch, warps, stages)
    tile = (numbers["BLOCK_M"], numbers["BLOCK_N"], warps, stages)
    found = row(f"flex {name}", read_code(code, arch, warps, 2 * tile[1] * 64, head_dim // 64), arch, head_dim, tile)
    visits = {}
    for frames, tokens in SIZES:
        blocks = masks.NAMES[name](frames, tokens).block_mask(FLEX_BLOCK)
        partial, full = (int(x.sum()) for x in (blocks.kv_num_blocks, blocks.full_kv_num_blocks))
        each = (FLEX_BLOCK // tile[0]) * (FLEX_BLOCK // tile[1])
        visits[f"{frames}x{tokens}"] = {"partial": partial * each, "full": full * each}
    return {**found, "visits": visits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(GPUS), default=["sm_80", "sm_90"])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--tutorial", type=Path, help="a copy of the tutorial's kernel")
    options = parser.parse_args()
    rows = []
    for arch in options.arch:
        for head_dim in options.head_dim:
            if options.tutorial:
                for tile in [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)]:
                    found = tutorial(options.tutorial, arch, head_dim, tile)
                    rows += [found] if not found["spilled_bytes"] else []
            with tempfile.TemporaryDirectory() as folder:
                sources = pretend(arch)
                rows += [flex(name, arch, head_dim, sources, Path(folder)) for name in ("kmt", "kmct")]
    for found in rows:
        print(json.dumps(found))
    content = {**provenance(), "rows": rows}
    (RESULTS / "kernel_peers.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

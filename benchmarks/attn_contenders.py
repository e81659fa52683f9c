"""The contenders of `attn_speed.py`: each makes, for a case and a mask, the call that is timed."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from common import synchronize
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from kronmask import kron_attention, masks
from kronmask.backends import BACKENDS

__all__ = ["CONTENDERS", "PEERS", "Case", "Contender", "dense", "qkv", "runs_on", "timed"]


@dataclass(frozen=True)
class Case:
    """What all contenders are given: sizes, numbers and pass."""

    frames: int
    tokens: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    device: str
    passes: str
    seed: int = 0

    @property
    def length(self) -> int:
        return self.frames * self.tokens

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one of query, key, value and output."""
        return self.batch * self.heads * self.length * self.head_dim * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Contender:
    """One way to compute a case, ready to be called.

    `forward` returns `(B, H, L, D)`; `inputs` are what a backward pass differentiates by. `mask_seconds` is the time that making
    the mask took, which no call repeats. `around` is what it runs inside of.
    """

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    mask_seconds: float | None = None
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@lru_cache(maxsize=1)
def qkv(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `(B, H, L, D)`, views of one `(B, L, 3, H, D)` tensor."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    shape, dtype = (case.batch, case.length, 3, case.heads, case.head_dim), getattr(torch, case.dtype)
    packed = torch.randn(shape, generator=generator, device=case.device, dtype=dtype)
    query, key, value = packed.requires_grad_(case.passes != "forward").permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _kronmask(case: Case, mask_name: str, backend: str) -> Contender:
    inputs = qkv(case)
    mask, seconds = timed(lambda: masks.NAMES[mask_name](case.frames, case.tokens), case)
    return Contender(lambda: kron_attention(*inputs, mask, backend=backend), inputs, seconds)


def _joint(case: Case, mask_name: str) -> Contender:
    inputs = qkv(case)
    return Contender(lambda: F.scaled_dot_product_attention(*inputs), inputs)


def _divided(case: Case, mask_name: str) -> Contender:
    """Over frames, then over positions with what that gave as values: a chain, as in TimeSformer, without its projections."""
    query, key, value = inputs = qkv(case)
    sizes = {"b": case.batch, "t": case.frames}

    def over(batched: str, *tensors: Tensor) -> Tensor:
        q, k, v = (rearrange(x, f"b h (t n) d -> {batched}", **sizes) for x in tensors)
        return rearrange(F.scaled_dot_product_attention(q, k, v), f"{batched} -> b h (t n) d", **sizes)

    def forward() -> Tensor:
        return over("(b t) h n d", query, key, over("(b n) h t d", query, key, value))

    return Contender(forward, inputs)


def _sdpa_mask(case: Case, mask_name: str) -> Contender:
    inputs = qkv(case)
    mask, seconds = timed(lambda: dense(mask_name, case), case)
    return Contender(lambda: F.scaled_dot_product_attention(*inputs, attn_mask=mask), inputs, seconds)


def _flex(case: Case, mask_name: str, block: int | tuple[int, int], kernel: str = "TRITON") -> Contender:
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 1000  # over it FlexAttention would silently run unfused
    inputs, mask_mod = qkv(case), _mask_mod(mask_name, case)
    sizes = (None, None, case.length, case.length)
    build = partial(create_block_mask, mask_mod, *sizes, device=case.device, BLOCK_SIZE=block)
    build()  # the first one also loads what torch loads late
    block_mask, seconds = timed(build, case)
    attend: Any = torch.compile(flex_attention, dynamic=False)
    options = {"kernel_options": {"BACKEND": kernel}} if kernel != "TRITON" else {}
    return Contender(lambda: attend(*inputs, block_mask=block_mask, **options), inputs, seconds)


def _flex_flash(case: Case, mask_name: str) -> Contender:
    """On Blackwell these kernels take two tiles of queries at once."""
    tall = torch.cuda.get_device_capability(case.device) >= (10, 0)
    return _flex(case, mask_name, (256, 128) if tall else 128, "FLASH")


def _sdpa_on(case: Case, mask_name: str, implementation: str) -> Contender:
    return replace(_kronmask(case, mask_name, "sdpa"), around=partial(_flash_kernels, implementation))


@contextmanager
def _flash_kernels(implementation: str) -> Iterator[None]:
    """These kernels under torch's own operators; before and after, those that were active."""
    from torch.nn import attention

    before = attention.current_flash_attention_impl()
    attention.activate_flash_attention_impl(implementation)
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()
        if before is not None:
            attention.activate_flash_attention_impl(before)


def _mha(case: Case, mask_name: str) -> Contender:
    """The module with identity weights, so that it computes the attention of its input; no product looks at the values."""
    width = case.heads * case.head_dim
    embedding = rearrange(qkv(case)[0].detach(), "b h l d -> b l (h d)").contiguous()
    embedding.requires_grad_(case.passes != "forward")
    module = nn.MultiheadAttention(width, case.heads, batch_first=True).to(embedding)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(width))
    zeros = partial(torch.zeros, case.length, case.length, dtype=embedding.dtype, device=case.device)
    mask, seconds = timed(lambda: zeros().masked_fill_(~dense(mask_name, case), -math.inf), case)

    def forward() -> Tensor:
        output = module(embedding, embedding, embedding, attn_mask=mask, need_weights=False)[0]
        return rearrange(output, "b l (h d) -> b h l d", h=case.heads)

    return Contender(forward, (embedding, *module.parameters()), seconds)


PEERS: dict[str, Callable[[Case, str], Contender]] = {
    "joint": _joint,
    "divided": _divided,
    "sdpa_mask": _sdpa_mask,
    "flex_64": partial(_flex, block=64),
    "flex_128": partial(_flex, block=128),
    "mha": _mha,
    "flex-flash": _flex_flash,
    "sdpa-fa3": partial(_sdpa_on, implementation="FA3"),
    "sdpa-fa4": partial(_sdpa_on, implementation="FA4"),
}
NEEDS = {  # package and compute capabilities
    "flex-flash": ("flash_attn.cute", (9, 10, 12)),
    "sdpa-fa3": ("flash_attn_interface", (9,)),
    "sdpa-fa4": ("flash_attn.cute", (9, 10)),
}
CONTENDERS = PEERS | {f"kronmask {backend}": partial(_kronmask, backend=backend) for backend in BACKENDS}


def runs_on(device: torch.device, name: str) -> bool:
    """Whether a contender with needs can run; what fails nevertheless is a row that says why."""
    if name not in NEEDS:
        return True
    package, capabilities = NEEDS[name]
    try:
        is_installed = importlib.util.find_spec(package) is not None
    except ImportError:  # of the package that it lies in
        return False
    if not is_installed or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] in capabilities


def _mask_mod(mask_name: str, case: Case) -> Callable[..., Tensor]:
    """The mask as FlexAttention takes it: for CLAVER's two as one would write them by hand, else a look-up in the frame table."""
    tokens = case.tokens
    if mask_name == "kmt":
        return lambda b, h, q, k: (q // tokens != k // tokens) | (q == k)
    if mask_name == "kmct":
        return lambda b, h, q, k: (q // tokens > k // tokens) | (q == k)
    return masks.NAMES[mask_name](case.frames, tokens).mask_mod(case.device)


def dense(mask_name: str, case: Case) -> Tensor:
    return masks.NAMES[mask_name](case.frames, case.tokens).dense(case.device)


def timed(call: Callable[[], Any], case: Case) -> tuple[Any, float]:
    device = torch.device(case.device)
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start

"""The patched model a second time, as plainly as possible: loops over clips and frames, dense masks, nothing of kronmask.

It runs the unpatched image model and a `state_dict` of the temporal weights: hooks on the image blocks put the temporal layers
where the documentation says they are, and `scaled_dot_product_attention` is replaced by loops for `placement="replace"`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASKS: dict[str, Callable[[int, int, int, int], bool]] = {
    "kmt": lambda t, n, s, m: t != s or n == m,
    "kmct": lambda t, n, s, m: s < t or (t == s and n == m),
    "joint": lambda t, n, s, m: True,
    "causal": lambda t, n, s, m: s <= t,
    "spatial": lambda t, n, s, m: t == s,
    "temporal": lambda t, n, s, m: n == m,
}
"""Whether token n of frame t sees token m of frame s."""


def of_head(attention: str | Sequence[str], head: int, heads: int) -> str:
    """The mask of a head: names of masks divide the heads into equal groups, in order."""
    return attention if isinstance(attention, str) else attention[head // (heads // len(attention))]


def dense_mask(name: str, frames: int, tokens: int) -> Tensor:
    """The mask as a matrix over the `frames * tokens` tokens of a clip, entry by entry."""
    places = [(t, n) for t in range(frames) for n in range(tokens)]
    return torch.tensor([[MASKS[name](t, n, s, m) for s, m in places] for t, n in places])


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention of one head: `(L, D)` each."""
    scores = query @ key.T * (1 / math.sqrt(query.shape[1]) if scale is None else scale)
    weights = torch.zeros_like(scores)
    for row in range(len(scores)):
        seen = mask[row]
        if seen.any():
            weights[row, seen] = torch.softmax(scores[row, seen], dim=0)
    return weights @ value


def turn(x: Tensor, frames: int) -> Tensor:
    """Rotary time: channels `i` and `D/2 + i` of a head `(T*N, D)` as a complex number, turned by its frame's number."""
    half = x.shape[1] // 2
    rows = []
    for row, channels in enumerate(x):
        frame = row // (len(x) // frames)
        angles = torch.tensor([frame / 10000 ** (i / half) for i in range(half)], dtype=torch.float64)
        turned = torch.complex(channels[:half].double(), channels[half : 2 * half].double()) * torch.exp(1j * angles)
        rows.append(torch.cat([turned.real, turned.imag, channels[2 * half :].double()]))
    return torch.stack(rows).to(x.dtype)


class TemporalLayer:
    """A pre-norm residual of attention over a whole clip, and of an MLP where the weights have one."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        prefix: str,
        like: dict[str, Any],
        heads: int,
        attention: str | Sequence[str],
        rotary: bool,
    ) -> None:
        self.weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        self.like, self.heads, self.attention, self.rotary = like, heads, attention, rotary

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """The image model's kind of norm, with the temporal layer's weights."""
        names = {k: v for k, v in self.weights.items() if k.startswith(f"{name}.")}
        return torch.func.functional_call(
            self.like[name], {k.removeprefix(f"{name}."): v for k, v in names.items()}, (x,)
        )

    def __call__(self, clip: Tensor) -> Tensor:
        """`(T, N, D)` to the same."""
        frames, tokens, dim = clip.shape
        w = self.weights
        x = clip.reshape(frames * tokens, dim)
        y = self._norm("ln_1", x) @ w["attn.in_proj_weight"].T + w["attn.in_proj_bias"]
        query, key, value = y.chunk(3, dim=1)
        heads: list[Tensor] = []
        for q, k, v in zip(*(part.chunk(self.heads, dim=1) for part in (query, key, value)), strict=True):
            mask = dense_mask(of_head(self.attention, len(heads), self.heads), frames, tokens)
            q = self._norm("attn.q_norm", q) if "attn.q_norm" in self.like else q
            k = self._norm("attn.k_norm", k) if "attn.k_norm" in self.like else k
            q, k = (turn(q, frames), turn(k, frames)) if self.rotary else (q, k)
            heads.append(attention(q, k, v, mask))
        x = x + torch.cat(heads, dim=1) @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
        if "mlp.c_fc.weight" in w:
            hidden = self.like["mlp.act"](self._norm("ln_2", x) @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"])
            x = x + hidden @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]
        return x.reshape(frames, tokens, dim)


def run(
    image_model: nn.Module,
    call: Callable[[nn.Module, Tensor], Any],
    blocks: Sequence[nn.Module],
    video: Tensor,
    weights: dict[str, Tensor],
    *,
    attention: str | Sequence[str],
    placement: str,
    layers: Sequence[int] = (),
    heads: int = 1,
    like: dict[str, Any] | None = None,
    batch_dim: int = 0,
    rotary: bool = False,
) -> Any:
    """What the patched model is documented to return for `video (B, T, C, H, W)`, one output for each clip.

    Args:
        image_model: the model before patching, with the image weights.
        call: calls it on images `(T, C, H, W)`.
        blocks: its blocks.
        weights: the temporal weights, by their names behind `temporal_encoder.`.
        layers: with "interleave" and "replace", the image blocks concerned.
        like: a norm, q_norm, k_norm and activation of the kind that the temporal layers have, by their names in a layer.
        batch_dim: where a block has its batch: 1 for sequence-first models.
        rotary: whether temporal attention turns queries and keys by time.
    """
    clips = []
    for clip in video:  # each clip alone: nothing can leak between them
        with ExitStack() as stack:
            _place(
                stack, blocks, len(clip), weights, attention, placement, layers, heads, like or {}, batch_dim, rotary
            )
            clips.append(call(image_model, clip))
    if isinstance(clips[0], tuple):
        return tuple(torch.stack([output.mean(0) for output in outputs]) for outputs in zip(*clips, strict=True))
    return torch.stack([output.mean(0) for output in clips])


def _place(
    stack: ExitStack,
    blocks: Sequence[nn.Module],
    frames: int,
    weights: dict[str, Tensor],
    attention: str | Sequence[str],
    placement: str,
    layers: Sequence[int],
    heads: int,
    like: dict[str, Any],
    batch_dim: int,
    rotary: bool,
) -> None:
    embedding = weights.get("embedding.weight")

    def embed(x: Tensor) -> Tensor:
        if embedding is None:
            return x
        assert embedding.shape[1] == frames, "the reference knows no interpolation"
        return torch.stack([x[t] + embedding[0, t, 0] for t in range(frames)])

    def on_tokens(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if batch_dim else x
        tokens = x.reshape(len(x), -1, x.shape[-1])  # (T, N, D)
        y = function(tokens).reshape(x.shape)
        return y.transpose(0, 1) if batch_dim else y

    if placement == "append":
        count = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        appended = [TemporalLayer(weights, f"blocks.{i}.", like, heads, attention, rotary) for i in range(count)]

        def append(tokens: Tensor) -> Tensor:
            tokens = embed(tokens)
            for layer in appended:
                tokens = layer(tokens)
            return tokens

        stack.enter_context(_output_of(blocks[-1], lambda x: on_tokens(append, x)))
        return
    first = min(layers)
    if placement == "interleave":
        for index in layers:
            layer = TemporalLayer(weights, f"residuals.{index}.", like, heads, attention, rotary)

            def interleave(tokens: Tensor, index: int = index, layer: TemporalLayer = layer) -> Tensor:
                return layer(embed(tokens) if index == first else tokens)

            stack.enter_context(_input_of(blocks[index], lambda x, f=interleave: on_tokens(f, x)))
        return
    stack.enter_context(_input_of(blocks[first], lambda x: on_tokens(embed, x)))
    for index in layers:
        stack.enter_context(_attends_over_the_clip(blocks[index], attention, rotary))


@contextmanager
def _input_of(block: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (function(args[0]), *args[1:]), kwargs

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _output_of(block: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _attends_over_the_clip(block: nn.Module, names: str | Sequence[str], rotary: bool) -> Iterator[None]:
    """While the block runs, torch's attention over the tokens of each frame is attention over all of them, by loops."""

    def over_the_clip(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, scale: float | None = None, **_: Any
    ) -> Tensor:
        frames, heads, tokens, _ = query.shape
        outputs = []
        for head in range(heads):
            mask = dense_mask(of_head(names, head, heads), frames, tokens)
            shared = head * key.shape[1] // heads  # the head of keys and values, if queries share them
            q = query[:, head].reshape(frames * tokens, -1)
            k, v = (x[:, shared].reshape(frames * tokens, -1) for x in (key, value))
            q, k = (turn(q, frames), turn(k, frames)) if rotary else (q, k)
            outputs.append(attention(q, k, v, mask, scale).reshape(frames, tokens, -1))
        return torch.stack(outputs, dim=1)

    patches: list[Any] = []

    def enter(*_: Any) -> None:
        patches.append(mock.patch.object(F, "scaled_dot_product_attention", over_the_clip))
        patches[-1].start()

    def leave(*_: Any) -> None:
        patches.pop().stop()

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    handles = block.register_forward_pre_hook(enter), block.register_forward_hook(leave)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while patches:  # the block has raised
            leave()
        torch.backends.mha.set_fastpath_enabled(fast)

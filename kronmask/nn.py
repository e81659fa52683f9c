"""Layers of video transformers whose attention mask is a Kronecker product.

`patch_vit` builds its temporal blocks from these; they also work on their own. Sequences are `(B, P + T*N, D)`,
frame-major: token `(t, n)` sits at `P + t*N + n`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronmask.attention import join_rules
from kronmask.backends.groups import head_groups
from kronmask.clips import Clips
from kronmask.mask import KronMask
from kronmask.masks import mask_rule

__all__ = [
    "MLP",
    "KronAttention",
    "MaskRule",
    "QuickGELU",
    "TemporalBlock",
    "TemporalEmbedding",
    "TemporalResidual",
    "rotate_by_time",
]

Attention = str | KronMask | Callable[[int, int], KronMask]
AttentionOrGroups = Attention | Sequence[Attention]


class MaskRule:
    """The rule of an `attention` argument for clips of any size; what a layer asks in its forward.

    The rule of a name that holds at every size is found once, so a compiled model needs no new graph for another number
    of frames; a callable has one graph for each size. To pickle a model, its callable must pickle (no lambda).

    Args:
        attention: a name out of `kronmask.masks.NAMES`, a `KronMask`, or a callable `(frames, tokens) -> KronMask`; or a
            sequence of these, which divide the heads into equal groups in order: then `groups` are the rules of each, and the
            rule is theirs joined.

    Raises:
        ValueError: `attention` is an unknown name or none of the three, or an empty sequence.
    """

    def __init__(self, attention: AttentionOrGroups) -> None:
        self.attention = tuple(attention) if isinstance(attention, list) else attention
        self.groups: tuple[MaskRule, ...] = (self,)
        self._fixed: str | None = None
        if isinstance(attention, (list, tuple)):
            if not attention:
                raise ValueError("attention is an empty list; name a mask for each group of heads")
            self.groups = tuple(MaskRule(of_group) for of_group in attention)
        elif isinstance(attention, KronMask):
            self._fixed = mask_rule(attention, attention.num_frames, attention.num_tokens)
        elif isinstance(attention, str):
            small, large = mask_rule(attention, 8, 5), mask_rule(attention, 11, 10)
            self._fixed = small if small == large else None
        elif not callable(attention):
            mask_rule(attention, 1, 1)  # type: ignore[arg-type]  # raises, listing what it takes

    def __call__(self, frames: int, tokens: int) -> str:
        """The rule for `frames` frames of `tokens` tokens, which may be symbolic.

        Raises:
            ValueError: `attention` is a `KronMask` of another size.
        """
        if self.groups != (self,):
            return join_rules([of_group(frames, tokens) for of_group in self.groups])
        if self._fixed is None:
            return mask_rule(self.attention, int(frames), int(tokens))  # type: ignore[arg-type]
        if isinstance(self.attention, KronMask):
            fits = frames == self.attention.num_frames and tokens == self.attention.num_tokens
            if not fits:
                raise ValueError(
                    f"the attention mask is for {self.attention.num_frames} frames of {self.attention.num_tokens} "
                    f"tokens, but the clip has {frames} frames of {tokens} tokens; pass a name or a callable "
                    "(frames, tokens) -> KronMask as attention for clips of any size"
                )
        return self._fixed

    def __repr__(self) -> str:
        if self.groups != (self,):
            return f"[{', '.join(map(repr, self.groups))}]"
        return self.attention if isinstance(self.attention, str) else str(self.attention)


def attend_in_groups(
    clips: Clips,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskRule,
    tokens: int,
    *,
    prefix: int = 0,
    scale: float | None = None,
) -> Tensor:
    """`clips.attend`, for each group of heads under its own mask: in one call where the clips take all groups at once."""
    if clips.takes_groups:
        return clips.attend(query, key, value, mask, tokens, prefix=prefix, scale=scale)
    if len(mask.groups) == 1:
        return clips.attend(query, key, value, mask.groups[0], tokens, prefix=prefix, scale=scale)
    parts = zip(mask.groups, head_groups(query, key, value, len(mask.groups)), strict=True)
    return torch.cat([clips.attend(*part, rule, tokens, prefix=prefix, scale=scale) for rule, part in parts], dim=1)


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP (arXiv 2103.00020)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TemporalEmbedding(nn.Module):
    """A learned vector for each frame, added to all tokens of the frame; interpolated for clips of another length.

    `weight` is `(1, frames, 1, dim)`. A checkpoint of another number of frames loads, interpolated in the same way.

    Args:
        dim: channels D.
        frames: number of frames the embedding is learned for.
        std: standard deviation of its initial values (.02 in CLAVER, arXiv 2502.03549; 0 for none).
    """

    def __init__(self, dim: int, frames: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(1, frames, 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `weight` from `N(0, std)`."""
        nn.init.normal_(self.weight, std=self.std) if self.std else nn.init.zeros_(self.weight)

    def at(self, frames: int) -> Tensor:
        """The embedding of a clip of `frames` frames, `(1, frames, 1, D)`; exactly `weight` at its own length."""
        return _interpolate(self.weight, frames)

    def forward(self, x: Tensor, clips: Clips | None = None) -> Tensor:
        """Add the embedding to `x (B, T, N, D)`, in the dtype of `x`; `clips` says which frames these are, all by default."""
        clips = Clips(x.shape[1]) if clips is None else clips
        return x + clips.embedding(self).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        loaded, own = state_dict.get(f"{prefix}weight"), self.weight
        if isinstance(loaded, Tensor) and loaded.ndim == 4 and loaded.shape[1] != own.shape[1]:
            with torch.no_grad():
                state_dict[f"{prefix}weight"] = _interpolate(loaded, own.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[3]}, frames={self.weight.shape[1]}"


def _interpolate(embedding: Tensor, frames: int) -> Tensor:
    """Linear interpolation of `(1, F, 1, D)` to `(1, frames, 1, D)`: frame `t` covers the span `[t, t+1) / frames`.

    The values of `F.interpolate(mode="linear", align_corners=False)`, but without a branch on equal lengths (there the
    weights are 0 and 1): a compiled model needs no graph of its own for the length it was patched for.
    """
    last = embedding.shape[1] - 1
    centre = (torch.arange(frames, device=embedding.device, dtype=torch.float32) + 0.5) * ((last + 1) / frames) - 0.5
    centre = centre.clamp(0, last)
    below = centre.floor()
    weight = (centre - below).view(1, -1, 1, 1)
    below = below.long()
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    low, high = embedding[:, below].to(dtype), embedding[:, (below + 1).clamp(max=last)].to(dtype)
    return torch.lerp(low, high, weight.to(dtype)).to(embedding.dtype)


def rotate_by_time(x: Tensor, times: Tensor, tokens: int, prefix: int = 0) -> Tensor:
    """Rotary embedding of time (RoFormer, arXiv 2104.09864): scores then depend on how many frames lie between two tokens.

    Channel `i` of the first half of a head and channel `i` of the second half are turned by `time * 10000 ** (-2 i / D)`, the
    same for all tokens of a frame. There are no parameters, and clips may have any length.

    Args:
        x: queries or keys `(B, H, prefix + T*N, D)`; an odd last channel and the prefix stay as they are.
        times: when each frame is, `(T,)` or `(B, T)`, in frames.
        tokens: tokens N of a frame.
        prefix: tokens before the frames.
    """
    half = x.shape[-1] // 2
    rates = 10000 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = times.to(torch.float64)[..., None] * rates  # exact also after a million frames; (T, half) or (B, T, half)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (
        of_frame.to(dtype).repeat_interleave(tokens, -2).unsqueeze(-3) for of_frame in (angles.cos(), angles.sin())
    )  # (1, T*N, half) or (B, 1, T*N, half)
    frames = x[:, :, prefix:].to(dtype)
    first, second, rest = frames.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)
    return torch.cat([x[:, :, :prefix], turned], dim=2) if prefix else turned


class KronAttention(nn.Module):
    """Multi-head self-attention over the tokens of all frames of a clip, under a Kronecker mask.

    Parameters have the shapes of `nn.MultiheadAttention`: `in_proj_weight (3*H*head_dim, D)`, `in_proj_bias`,
    `out_proj`.

    Args:
        dim: channels D.
        num_heads: heads H.
        attention: a name out of `kronmask.masks.NAMES`, a `KronMask`, or a callable `(frames, tokens) -> KronMask`; a list of
            these divides the heads into equal groups in order, each under its own mask.
        head_dim: channels of a head, `dim // num_heads` by default.
        bias: whether the projections have biases.
        qk_norm: makes the norm of queries and of keys from `head_dim` (arXiv 2302.05442); none by default.
        rotary: whether queries and keys are turned by the time of their frame, see `rotate_by_time`.

    Raises:
        ValueError: `dim` is no multiple of `num_heads` and no `head_dim` is given, or `attention` is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: AttentionOrGroups = "kmt",
        *,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if num_heads < 1 or dim % num_heads:
                raise ValueError(f"dim {dim} is no multiple of num_heads {num_heads}; pass head_dim")
            head_dim = dim // num_heads
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.mask = MaskRule(attention)
        if num_heads % len(self.mask.groups):
            raise ValueError(
                f"{num_heads} heads do not divide into {len(self.mask.groups)} equal groups, one for each mask"
            )
        self.rotary = rotary
        inner = num_heads * head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * inner)) if bias else None
        self.q_norm = qk_norm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(head_dim) if qk_norm else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self, layers: int = 1) -> None:
        """CLIP's initialisation (arXiv 2103.00020) for a transformer of `layers` blocks; biases 0."""
        nn.init.normal_(self.in_proj_weight, std=self.dim**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(self.dim * 2 * layers) ** -0.5)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, frames: int | Clips, tokens: int, prefix: int = 0) -> Tensor:
        """Attend.

        Args:
            x: `(B, prefix + frames * tokens, D)`.
            frames: frames T of the clip, or what they are of it.
            tokens: tokens N of a frame, its class token included.
            prefix: global tokens in front of the frames, which see and are seen by all.

        Returns:
            A tensor of the shape of `x`.

        Raises:
            ValueError: the length of `x` is not `prefix + frames * tokens`, or a fixed mask is of another size.
        """
        weight, bias = self.in_proj_weight.to(x.dtype), self.in_proj_bias
        qkv = F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(
            2, 0, 3, 1, 4
        )  # (B, H, L, head_dim)
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        clips = frames if isinstance(frames, Clips) else Clips(frames)
        if self.rotary:
            times = clips.times(x.device)
            query, key = (rotate_by_time(part, times, tokens, prefix) for part in (query, key))
        output = attend_in_groups(clips, query, key, value, self.mask, tokens, prefix=prefix)
        return self.out_proj(output.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        rotary = ", rotary=True" if self.rotary else ""
        return f"dim={self.dim}, num_heads={self.num_heads}, attention={self.mask!r}{rotary}"


class MLP(nn.Module):
    """Two linear layers with an activation between them, on the last dimension: `dim -> hidden_dim -> dim`."""

    def __init__(self, dim: int, hidden_dim: int, act_layer: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.c_proj = nn.Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self, layers: int = 1) -> None:
        """CLIP's initialisation (arXiv 2103.00020) for a transformer of `layers` blocks; biases 0."""
        dim = self.c_fc.in_features
        nn.init.normal_(self.c_fc.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(self.c_proj.weight, std=(2 * layers * dim) ** -0.5)
        nn.init.zeros_(self.c_fc.bias)
        nn.init.zeros_(self.c_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class TemporalResidual(nn.Module):
    """`x + attention(norm(x))` over all tokens of a clip: time attention in front of an image block.

    With `attention="temporal"` in front of each block it is the divided space-time attention of TimeSformer (arXiv
    2102.05095). The arguments are those of `KronAttention`; `norm_layer` makes the norm from `dim`. The dtype of `x` is
    kept.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: AttentionOrGroups = "kmt",
        *,
        head_dim: int | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        qk_norm: Callable[[int], nn.Module] | None = None,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.ln_1 = norm_layer(dim)
        self.attn = KronAttention(dim, num_heads, attention, head_dim=head_dim, qk_norm=qk_norm, rotary=rotary)

    def reset_parameters(self, layers: int = 1) -> None:
        """CLIP's initialisation for a transformer of `layers` such layers."""
        self.attn.reset_parameters(layers)

    @torch.no_grad()
    def zero_output_(self) -> None:
        """Set the output projections to zero: the layer is the identity until it has learned."""
        _zero(self.attn.out_proj)

    def forward(self, x: Tensor, frames: int | Clips, tokens: int, prefix: int = 0) -> Tensor:
        """`x (B, prefix + frames * tokens, D)` to the same shape and dtype."""
        return x + self.attn(self.ln_1(x).to(x.dtype), frames, tokens, prefix).to(x.dtype)


class TemporalBlock(TemporalResidual):
    """A pre-norm transformer block over all tokens of a clip, under a Kronecker mask: CLAVER's (arXiv 2502.03549).

    `x + attention(norm(x))`, then `x + mlp(norm(x))`. Arguments beyond those of `TemporalResidual`: `hidden_dim` of the
    MLP (`4 * dim` by default) and `act_layer`, which makes its activation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: AttentionOrGroups = "kmt",
        *,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        qk_norm: Callable[[int], nn.Module] | None = None,
        rotary: bool = False,
    ) -> None:
        super().__init__(
            dim, num_heads, attention, head_dim=head_dim, norm_layer=norm_layer, qk_norm=qk_norm, rotary=rotary
        )
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.ln_2 = norm_layer(dim)
        self.mlp = MLP(dim, hidden_dim, act_layer)

    def reset_parameters(self, layers: int = 1) -> None:
        super().reset_parameters(layers)
        self.mlp.reset_parameters(layers)

    @torch.no_grad()
    def zero_output_(self) -> None:
        super().zero_output_()
        _zero(self.mlp.c_proj)

    def forward(self, x: Tensor, frames: int | Clips, tokens: int, prefix: int = 0) -> Tensor:
        x = super().forward(x, frames, tokens, prefix)
        return x + self.mlp(self.ln_2(x).to(x.dtype)).to(x.dtype)


def _zero(linear: nn.Linear) -> None:
    linear.weight.zero_()
    if linear.bias is not None:
        linear.bias.zero_()

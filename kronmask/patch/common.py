"""What the families of patched image encoders share: settings, the temporal half of a model, the swap of a class.

A patched encoder carries its activations as `(B, T, N, D)`. Image blocks see `(B*T, N, D)`; a block whose own attention
was replaced sees all four dimensions, and its attention reads T and N from them, so no module holds the size of a clip.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kronmask.attention import rule_attention
from kronmask.mask import KronMask
from kronmask.nn import Attention, KronAttention, MaskRule, TemporalBlock, TemporalEmbedding, TemporalResidual

__all__ = [
    "INITS",
    "PLACEMENTS",
    "ImageBlock",
    "Settings",
    "TemporalEncoder",
    "VideoTower",
    "average_frames",
    "build_temporal_encoder",
    "clip_attention",
    "clips",
    "each_frame",
    "refuse_dropout",
    "refuse_image_mask",
    "refuse_own_forward",
    "swap_class",
    "two_layers",
    "video_class",
]

PLACEMENTS = ("append", "interleave", "replace")
INITS = ("zero", "random", "copy")


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The checked arguments of `patch_vit`."""

    frames: int
    attention: Attention
    placement: str
    layers: int | Sequence[int] | None
    init: str
    temporal_embedding: bool

    def __post_init__(self) -> None:
        for name, value, choices in (("placement", self.placement, PLACEMENTS), ("init", self.init, INITS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1:
            raise ValueError(f"frames must be an int of at least 1, not {self.frames!r}")
        MaskRule(self.attention)  # raises ValueError

    def check_mask(self, tokens: int | None) -> None:
        """Raises ValueError if the attention is a `KronMask` that fits neither `frames` nor the model's `tokens`."""
        mask = self.attention
        if isinstance(mask, KronMask):
            MaskRule(mask)(self.frames, mask.num_tokens if tokens is None else tokens)

    def appended(self, depth: int) -> int:
        """How many temporal blocks `placement="append"` adds to an encoder of `depth` blocks."""
        if self.layers is None:
            return max(1, depth // 3)
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise ValueError(
                "with placement='append', layers is the number of temporal blocks, an int of at least 1; "
                f"got {self.layers!r}"
            )
        if self.init == "copy" and self.layers > depth:
            raise ValueError(
                f"init='copy' has {depth} image blocks to copy from, but layers={self.layers} was asked for"
            )
        return self.layers

    def selected(self, depth: int) -> tuple[int, ...]:
        """Which of `depth` blocks `placement="interleave"` or `"replace"` is about."""
        layers = range(depth) if self.layers is None else self.layers
        expected = (
            f"with placement={self.placement!r}, layers is an int k from 1 to {depth} (every k-th block) or a sequence "
            f"of different block indices from 0 to {depth - 1}; got {self.layers!r}"
        )
        if isinstance(layers, (bool, str)):
            raise ValueError(expected)
        if isinstance(layers, int):
            if not 1 <= layers <= depth:
                raise ValueError(expected)
            return tuple(range(layers - 1, depth, layers))
        try:
            indices = [index + depth if index < 0 else index for index in layers]
        except TypeError:
            raise ValueError(expected) from None
        whole = all(isinstance(index, int) and 0 <= index < depth for index in indices)
        if not indices or not whole or len(set(indices)) != len(indices):
            raise ValueError(expected)
        return tuple(sorted(indices))


# ---- what a family says about its image blocks ----------------------------------------------------------------------


@dataclass(frozen=True)
class ImageBlock:
    """One block of an image encoder, in words that every family shares.

    The tensors of the weights are those of `nn.MultiheadAttention` and of a two-layer MLP; `scale_1` and `scale_2` are
    the LayerScale of the two branches. `cannot_copy_attention` and `cannot_copy_mlp` say what the block computes beyond
    them.
    """

    dim: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    norm_1: nn.Module
    norm_2: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    activation: nn.Module
    like: Tensor  # device and dtype of projections
    in_proj: tuple[Tensor, Tensor | None] | None
    out_proj: nn.Linear | None
    c_fc: nn.Linear | None
    c_proj: nn.Linear | None
    scale_1: Tensor | None
    scale_2: Tensor | None
    cannot_copy_attention: str | None
    cannot_copy_mlp: str | None


# ---- the temporal half of a model -----------------------------------------------------------------------------------


class TemporalEncoder(nn.Module):
    """Runs an encoder's image blocks together with temporal attention; the one child that patching adds to a model.

    Its parameters are all that is new: `temporal_encoder.embedding.weight`, `temporal_encoder.blocks.{i}.*` (append)
    and `temporal_encoder.residuals.{index of the image block}.*` (interleave).

    Args:
        embedding: added to the tokens before the first temporal attention.
        blocks: run after the image blocks (append).
        residuals: run in front of the image block of that index (interleave).
        replaced: indices of the image blocks whose own attention runs over the whole clip (replace).
    """

    def __init__(
        self,
        embedding: TemporalEmbedding | None,
        *,
        blocks: Iterable[TemporalBlock] = (),
        residuals: dict[int, TemporalResidual] | None = None,
        replaced: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        residuals = residuals or {}
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.residuals = nn.ModuleDict({str(index): residual for index, residual in residuals.items()})
        self.replaced = tuple(replaced)
        self.first = min((*residuals, *self.replaced), default=None)  # the embedding is added in front of this block

    def forward(self, x: Tensor, blocks: Iterable[nn.Module], checkpointing: bool = False) -> Tensor:
        """`x (B, T, N, D)` through the image `blocks` and the temporal layers, to the same shape and dtype."""
        batch, frames, tokens, _ = x.shape
        for index, block in enumerate(blocks):
            if index == self.first and self.embedding is not None:
                x = self.embedding(x)
            if str(index) in self.residuals:
                residual = self.residuals[str(index)]
                x = _run(checkpointing, residual, x.flatten(1, 2), frames, tokens).unflatten(1, (frames, tokens))
            if index in self.replaced:
                x = _run(checkpointing, block, x)
            else:
                x = _run(checkpointing, block, x.flatten(0, 1)).unflatten(0, (batch, frames))
        if self.first is None:
            if self.embedding is not None:
                x = self.embedding(x)
            x = x.flatten(1, 2)
            for block in self.blocks:
                x = _run(checkpointing, block, x, frames, tokens)
            x = x.unflatten(1, (frames, tokens))
        return x

    def extra_repr(self) -> str:
        return f"replaced={self.replaced}" if self.replaced else ""


def _run(checkpointing: bool, module: nn.Module, *args: Any) -> Tensor:
    return checkpoint(module, *args, use_reentrant=False) if checkpointing else module(*args)


def build_temporal_encoder(settings: Settings, image_blocks: Sequence[ImageBlock]) -> TemporalEncoder:
    """The temporal half for an encoder of `image_blocks`, on their device and in their dtype.

    Raises:
        ValueError: `layers` does not fit the depth, or `init="copy"` of blocks that cannot be copied.
    """
    depth, first = len(image_blocks), image_blocks[0]
    embedding = None
    if settings.temporal_embedding:
        embedding = TemporalEmbedding(first.dim, settings.frames, std=0.0 if settings.init == "zero" else 0.02)
        embedding.to(device=first.like.device, dtype=first.like.dtype)
    if settings.placement == "append":
        sources = image_blocks[depth - settings.appended(depth) :] if settings.init == "copy" else None
        count = settings.appended(depth)
        blocks = [
            _temporal_layer(TemporalBlock, settings, sources[i] if sources else image_blocks[-1], count)
            for i in range(count)
        ]
        return TemporalEncoder(embedding, blocks=blocks)
    indices = settings.selected(depth)
    if settings.placement == "replace":
        return TemporalEncoder(embedding, replaced=indices)
    residuals = {i: _temporal_layer(TemporalResidual, settings, image_blocks[i], len(indices)) for i in indices}
    return TemporalEncoder(embedding, residuals=residuals)


def _temporal_layer(kind: type[Any], settings: Settings, source: ImageBlock, count: int) -> Any:
    """A temporal layer of the sizes, norms and activation of `source`, initialised as `settings` say."""
    q_norm = source.q_norm
    options: dict[str, Any] = {"norm_layer": lambda dim: _fresh(source.norm_1), "head_dim": source.head_dim}
    if q_norm is not None:
        options["qk_norm"] = lambda dim: _fresh(q_norm)
    if kind is TemporalBlock:
        options |= {"hidden_dim": source.hidden_dim, "act_layer": lambda: copy.deepcopy(source.activation)}
    layer = kind(source.dim, source.num_heads, settings.attention, **options)
    layer.reset_parameters(count)
    layer.to(device=source.like.device)
    for module in layer.modules():  # the norms keep the dtype of the image model's norms
        if isinstance(module, nn.Linear):
            module.to(dtype=source.like.dtype)
        elif isinstance(module, KronAttention):
            module.in_proj_weight.data = module.in_proj_weight.data.to(source.like.dtype)
            module.in_proj_bias.data = module.in_proj_bias.data.to(source.like.dtype)  # type: ignore[union-attr]
    if settings.init == "zero":
        layer.zero_output_()
    elif settings.init == "copy":
        _copy(layer, source)
    return layer.requires_grad_(True)


def _fresh(norm: nn.Module) -> nn.Module:
    """A norm of the same type, eps and dtype, as at the start of training."""
    norm = copy.deepcopy(norm)
    norm._forward_hooks.clear()
    norm._forward_pre_hooks.clear()
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return norm


@torch.no_grad()
def _copy(layer: TemporalResidual, source: ImageBlock) -> None:
    """Copy the weights of an image block, its LayerScale multiplied into the output projections."""
    with_mlp = isinstance(layer, TemporalBlock)
    obstacle = source.cannot_copy_attention or (source.cannot_copy_mlp if with_mlp else None)
    if obstacle:
        raise ValueError(f"init='copy' cannot copy this model's blocks: {obstacle}; use init='zero' or init='random'")
    assert source.in_proj is not None
    assert source.out_proj is not None
    layer.ln_1.load_state_dict(source.norm_1.state_dict())
    attn = layer.attn
    assert attn.in_proj_bias is not None
    attn.in_proj_weight.copy_(source.in_proj[0])
    attn.in_proj_bias.zero_() if source.in_proj[1] is None else attn.in_proj_bias.copy_(source.in_proj[1])
    if source.q_norm is not None and source.k_norm is not None:
        attn.q_norm.load_state_dict(source.q_norm.state_dict())
        attn.k_norm.load_state_dict(source.k_norm.state_dict())
    _copy_linear(attn.out_proj, source.out_proj, source.scale_1)
    if isinstance(layer, TemporalBlock):
        assert source.c_fc is not None
        assert source.c_proj is not None
        layer.ln_2.load_state_dict(source.norm_2.state_dict())
        _copy_linear(layer.mlp.c_fc, source.c_fc, None)
        _copy_linear(layer.mlp.c_proj, source.c_proj, source.scale_2)


def _copy_linear(target: nn.Linear, source: nn.Linear, scale: Tensor | None) -> None:
    factor = torch.ones_like(target.bias) if scale is None else scale
    target.weight.copy_(factor[:, None] * source.weight)
    target.bias.zero_() if source.bias is None else target.bias.copy_(factor * source.bias)


# ---- the patched encoder --------------------------------------------------------------------------------------------


class VideoTower(nn.Module):
    """Mixin of every patched image encoder. A family's class inherits from it first and from the image class second."""

    image_class: ClassVar[type[nn.Module]]
    temporal_encoder: TemporalEncoder

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Not defined for clips: see the error."""
        raise NotImplementedError(
            "a model patched by kronmask.patch_vit has no intermediate layers of an image: use forward_tokens(video) "
            "or forward_frames(video), or unpatch_vit(model) for the image model's"
        )

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """Not defined for clips: see the error."""
        return self.forward_intermediates(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """Load; a checkpoint without any temporal weight (an image model's) leaves the temporal weights as they are."""
        new = f"{prefix}temporal_encoder."
        if not any(key.startswith(new) for key in state_dict):
            state_dict.update(
                (f"{new}{name}", tensor)
                for name, tensor in self.temporal_encoder.named_parameters(remove_duplicate=False)
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        if "patched_base" not in vars(cls):
            return super().__reduce_ex__(protocol)
        state = super().__reduce_ex__(max(2, protocol))[2:]
        return _rebuild, (vars(cls)["patched_base"], cls.image_class), *state


_video_classes: dict[tuple[type[VideoTower], type[nn.Module]], type[VideoTower]] = {}


def video_class(base: type[VideoTower], image_class: type[nn.Module]) -> type[VideoTower]:
    """`base`, or for a subclass of its image class (a user's), `base` on top of that; its instances pickle."""
    if image_class is base.image_class:
        return base
    made = _video_classes.get((base, image_class))
    if made is None:
        members = {"image_class": image_class, "patched_base": base, "__module__": base.__module__}
        made = type(f"Kron{image_class.__name__}", (base, image_class), members)
        _video_classes[base, image_class] = made
    return made


def _rebuild(base: type[VideoTower], image_class: type[nn.Module]) -> VideoTower:
    cls = video_class(base, image_class)
    return cls.__new__(cls)


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, in place."""
    module.__class__ = cls  # type: ignore[assignment]


def refuse_own_forward(model: nn.Module, image_class: type[nn.Module], methods: Sequence[str]) -> None:
    """Raises TypeError if a subclass or the instance has replaced what patching must replace."""
    for name in methods:
        own = getattr(type(model), name) is not getattr(image_class, name)
        if own or name in vars(model):
            where = f"{type(model).__module__}.{type(model).__qualname__}" if own else "the instance"
            raise TypeError(
                f"{where} defines its own {name}, which patch_vit would lose; patch a plain "
                f"{image_class.__module__}.{image_class.__qualname__}, or build on the layers of kronmask.nn"
            )


# ---- shapes ---------------------------------------------------------------------------------------------------------


def clips(video: Tensor, channels: int) -> Tensor:
    """`(B, T, C, H, W)` of a video batch; an image batch `(B, C, H, W)` becomes clips of one frame.

    Raises:
        ValueError: another number of dimensions, no frame, or another number of channels.
    """
    if video.ndim == 4:
        video = video.unsqueeze(1)
    if video.ndim != 5 or video.shape[1] < 1 or video.shape[2] != channels:
        swapped = video.ndim == 5 and video.shape[1] == channels
        hint = "; it looks like (B, C, T, H, W): use video.transpose(1, 2)" if swapped else ""
        raise ValueError(
            f"the input has shape {tuple(video.shape)}, expected video (B, T, {channels}, H, W) with at least one "
            f"frame, or images (B, {channels}, H, W){hint}"
        )
    return video


def each_frame(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Apply an image function to the frames of `x (B, T, ...)`: a tensor `(B, T, ...)`, or a tuple of such."""
    output, sizes = function(x.flatten(0, 1)), (x.shape[0], x.shape[1])
    if isinstance(output, Tensor):
        return output.unflatten(0, sizes)
    return tuple(tensor.unflatten(0, sizes) for tensor in output)


def average_frames(output: Any) -> Any:
    """Mean over the frames of a tensor `(B, T, ...)` or of each of a tuple of such."""
    return output.mean(1) if isinstance(output, Tensor) else tuple(tensor.mean(1) for tensor in output)


def clip_attention(
    qkv: Tensor, num_heads: int, mask: MaskRule, q_norm: nn.Module | None = None, k_norm: nn.Module | None = None
) -> Tensor:
    """Attention over all tokens of a clip, from projections `(B, T, N, 3*H*head_dim)` to `(B, T, N, H*head_dim)`."""
    frames, tokens = qkv.shape[1], qkv.shape[2]
    query, key, value = (
        qkv.flatten(1, 2).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    )  # (B, H, T*N, head_dim)
    if q_norm is not None and k_norm is not None:
        query, key = (
            q_norm(query).to(value.dtype),
            k_norm(key).to(value.dtype),
        )  # norms may return float32 under autocast
    output = rule_attention(query, key, value, mask(frames, tokens), frames=frames, tokens=tokens)
    return output.transpose(1, 2).flatten(2).unflatten(1, (frames, tokens))


def refuse_dropout(probability: float) -> None:
    """Raises ValueError if attention weights are to be dropped, which no fused kernel here does."""
    if probability > 0:
        raise ValueError(
            f"the model has attention dropout {probability}, which placement='replace' cannot apply; set it to 0 "
            "(attn_drop_rate=0), or use placement='append' or 'interleave'"
        )


def refuse_image_mask(*masks: Any) -> None:
    """Raises ValueError if a caller passes a mask of the image model."""
    if any(mask is not None and mask is not False for mask in masks):
        raise ValueError(
            "a model patched by kronmask.patch_vit takes no attn_mask or is_causal; its mask is patch_vit(attention=)"
        )


# ---- what image blocks are made of ----------------------------------------------------------------------------------


def two_layers(mlp: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """The two linear layers of a plain MLP, or None if it is another."""
    linears = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    if len(linears) != 2 or linears[0].out_features != linears[1].in_features:
        return None
    if any(parameter.ndim == 1 for parameter in mlp.parameters() if not _is_bias(parameter, linears)):
        return None  # a norm in between
    return linears[0], linears[1]


def _is_bias(parameter: nn.Parameter, linears: list[nn.Linear]) -> bool:
    return any(parameter is linear.bias for linear in linears)

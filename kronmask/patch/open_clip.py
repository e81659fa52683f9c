"""open_clip's `VisionTransformer`, and its CLIP models with that or a timm ViT as image tower, as video models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention as CustomAttention
from open_clip.transformer import CustomResidualAttentionBlock, PatchDropout, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from kronmask.nn import MaskRule
from kronmask.patch.common import (
    ImageBlock,
    Settings,
    VideoTower,
    average_frames,
    build_temporal_encoder,
    clip_attention,
    clips,
    each_frame,
    refuse_dropout,
    refuse_image_mask,
    refuse_own_forward,
    swap_class,
    two_layers,
    video_class,
)

__all__ = [
    "KronCustomAttention",
    "KronMultiheadAttention",
    "KronTimmModel",
    "KronVisionTransformer",
    "TubeDropout",
    "patch",
    "unpatch",
]


class KronMultiheadAttention(nn.MultiheadAttention):
    """The attention of an image block, over all tokens of a clip (`placement="replace"`)."""

    temporal_mask: MaskRule

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """`query (B, T, N, D)`, which is also key and value, to the same shape; no attention weights."""
        refuse_image_mask(attn_mask, need_weights)
        refuse_dropout(self.dropout if self.training else 0.0)
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(clip_attention(qkv, self.num_heads, self.temporal_mask)), None


class KronCustomAttention(CustomAttention):
    """open_clip's own attention of an image block, over all tokens of a clip (`placement="replace"`)."""

    temporal_mask: MaskRule

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """`x (B, T, N, D)` to the same shape."""
        refuse_image_mask(attn_mask)
        refuse_dropout(self.attn_drop.p if self.training else 0.0)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        output = clip_attention(qkv, self.num_heads, self.temporal_mask, self.ln_q, self.ln_k)
        if self.head_scale is not None:
            heads = output.unflatten(-1, (self.num_heads, -1)) * self.head_scale.view(self.num_heads, 1)
            output = heads.flatten(-2)
        return self.out_drop(self.out_proj(self.ln_inner(output)))


class TubeDropout(PatchDropout):
    """Patch dropout that drops the same patches in all frames of a clip, so that a position stays a position.

    It lets single frames pass; the patched model calls it again on the clip. What lies between works on each token
    alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Frames `(B*T, N, D)` as they are; a clip `(B, T, N, D)` in training with fewer tokens."""
        if x.ndim == 3 or not self.training or self.prob == 0.0:
            return x
        wide = super().forward(x.transpose(1, 2).flatten(2))  # (B, N, T*D)
        return wide.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2).contiguous()


class KronVisionTransformer(VideoTower, VisionTransformer):
    """An open_clip `VisionTransformer` that takes video `(B, T, 3, H, W)`; made by `patch_vit`."""

    image_class = VisionTransformer
    conv1: nn.Conv2d
    patch_dropout: nn.Module
    transformer: Any
    proj: Tensor | None
    _embeds: Callable[[Tensor], Tensor]
    _pool: Callable[[Tensor], tuple[Tensor, Tensor]]

    def forward_tokens(self, video: Tensor) -> Tensor:
        """Tokens after the last temporal layer and before `ln_post`, class token first.

        Args:
            video: `(B, T, 3, H, W)`, or images `(B, 3, H, W)` as clips of one frame.

        Returns:
            `(B, T, N, D)`.

        Raises:
            ValueError: another shape.
        """
        x = self.patch_dropout(each_frame(self._embeds, clips(video, self.conv1.in_channels)))
        return self.temporal_encoder(x, self.transformer.resblocks, self.transformer.grad_checkpointing)

    def pool_frames(self, tokens: Tensor) -> Any:
        """Norm, pooling and projection of the image model on the tokens `(B, T, N, D)` of each frame: `(B, T, E)`."""
        return each_frame(self._project, tokens)

    def _project(self, x: Tensor) -> Any:
        pooled, tokens = self._pool(x)
        pooled = pooled if self.proj is None else pooled @ self.proj
        return (pooled, tokens) if self.output_tokens else pooled

    def forward_frames(self, video: Tensor) -> Any:
        """The output of the image model for each frame: features `(B, T, E)`, not normalised (with `output_tokens`, a pair).

        CLAVER (arXiv 2502.03549) normalises these and then takes their mean; `forward(video)` is the mean of these.
        """
        return self.pool_frames(self.forward_tokens(video))

    def forward(self, x: Tensor) -> Any:
        """What the image model returns, per clip: features `(B, E)` for video `(B, T, 3, H, W)`."""
        return average_frames(self.forward_frames(x))


class KronTimmModel(TimmModel):
    """open_clip's adapter of timm models, whose patched trunk takes video; its projection is applied to each frame."""

    def forward_tokens(self, video: Tensor) -> Tensor:
        """Tokens `(B, T, N, D)` after the last temporal layer and before the final norm."""
        return self.trunk.forward_tokens(video)

    def forward_frames(self, video: Tensor) -> Any:
        """Features of each frame, `(B, T, E)`, not normalised."""
        return each_frame(self.head, self.trunk.forward_frames(video))

    def forward(self, x: Tensor) -> Any:
        """Features of each clip `(B, E)`, the mean of `forward_frames`."""
        return average_frames(self.forward_frames(x))


def patch(model: nn.Module, settings: Settings) -> None:
    """Patch in place. Nothing is changed if it raises.

    Raises:
        TypeError: a model without a vision transformer, or blocks that `placement="replace"` does not know.
        ValueError: settings that do not fit the model.
    """
    tower = _tower(model)
    if isinstance(tower, TimmModel):
        if type(tower) is not TimmModel:
            raise TypeError(f"patch_vit does not know {type(tower).__qualname__}, a subclass of open_clip's TimmModel")
        importlib.import_module("kronmask.patch.timm").patch(tower.trunk, settings)
        swap_class(tower, KronTimmModel)
        return
    refuse_own_forward(tower, VisionTransformer, ("forward",))
    blocks = tower.transformer.resblocks
    drops = isinstance(tower.patch_dropout, PatchDropout)
    settings.check_mask(None if drops else tower.positional_embedding.shape[0])
    encoder = build_temporal_encoder(settings, [_describe(block) for block in blocks])
    replaced = [_attention(blocks[index]) for index in encoder.replaced]

    for attn in replaced:
        attn.temporal_mask = MaskRule(settings.attention)
        swap_class(attn, KronMultiheadAttention if isinstance(attn, nn.MultiheadAttention) else KronCustomAttention)
    if drops:
        swap_class(tower.patch_dropout, TubeDropout)
    tower.temporal_encoder = encoder.train(tower.training)
    swap_class(tower, video_class(KronVisionTransformer, type(tower)))


def unpatch(model: nn.Module) -> None:
    """Undo `patch` in place."""
    tower = _tower(model)
    if isinstance(tower, KronTimmModel):
        importlib.import_module("kronmask.patch.timm").unpatch(tower.trunk)
        swap_class(tower, TimmModel)
        return
    assert isinstance(tower, KronVisionTransformer)
    image_classes: dict[type[nn.Module], type[nn.Module]] = {
        KronMultiheadAttention: nn.MultiheadAttention,
        KronCustomAttention: CustomAttention,
    }
    for module in tower.modules():
        if type(module) in image_classes:
            del module.temporal_mask
            swap_class(module, image_classes[type(module)])
        elif type(module) is TubeDropout:
            swap_class(module, PatchDropout)
    del tower.temporal_encoder
    swap_class(tower, tower.image_class)


def _tower(model: nn.Module) -> Any:
    """The image tower of an open_clip model, which is a vision transformer."""
    tower = model if isinstance(model, (VisionTransformer, TimmModel)) else getattr(model, "visual", None)
    if isinstance(tower, (VisionTransformer, TimmModel)):
        return tower
    part = "" if tower is None else f", whose image tower is {type(tower).__name__}"
    raise TypeError(
        "patch_vit patches open_clip's VisionTransformer, TimmModel with a timm ViT, and CLIP models with one of these "
        f"as image tower, not {type(model).__module__}.{type(model).__qualname__}{part}"
    )


def _attention(block: nn.Module) -> Any:
    """The attention of a block that works on `(B, T, N, D)` once it does."""
    attn: Any = getattr(block, "attn", None)
    known = (type(block), type(attn)) in (
        (ResidualAttentionBlock, nn.MultiheadAttention),
        (CustomResidualAttentionBlock, CustomAttention),
    )
    if isinstance(attn, nn.MultiheadAttention):
        known = known and attn.in_proj_weight is not None and attn.bias_k is None and not attn.add_zero_attn
        refuse_dropout(attn.dropout)
    elif isinstance(attn, CustomAttention):
        known = known and attn.logit_scale is None
        refuse_dropout(attn.attn_drop.p)
    if not known or attn is None:
        raise TypeError(
            f"placement='replace' does not know {type(attn).__name__} (or an option of it) in {type(block).__name__}; "
            "use placement='append' or 'interleave'"
        )
    return attn


def _describe(block: Any) -> ImageBlock:
    """Sizes, norms and weights of a residual attention block."""
    attn = block.attn
    if not getattr(attn, "batch_first", True):
        raise TypeError("this release of open_clip runs its vision transformer sequence-first; update open_clip_torch")
    dim = attn.in_proj_weight.shape[1]
    layers = two_layers(block.mlp)
    q_norm, k_norm = getattr(attn, "ln_q", None), getattr(attn, "ln_k", None)
    if isinstance(q_norm, nn.Identity):
        q_norm = k_norm = None
    options = (getattr(block, "ln_attn", None), getattr(attn, "ln_inner", None))
    plain = all(option is None or isinstance(option, nn.Identity) for option in options)
    plain = plain and getattr(attn, "logit_scale", None) is None and getattr(attn, "head_scale", None) is None
    activation = [module for module in block.mlp if not list(module.parameters()) and type(module) is not nn.Identity]
    return ImageBlock(
        dim=dim,
        num_heads=attn.num_heads,
        head_dim=dim // attn.num_heads,
        hidden_dim=layers[0].out_features if layers else 4 * dim,
        norm_1=block.ln_1,
        norm_2=block.ln_2,
        q_norm=q_norm,
        k_norm=k_norm,
        activation=activation[0] if activation else nn.GELU(),
        like=attn.in_proj_weight,
        in_proj=(attn.in_proj_weight, attn.in_proj_bias),
        out_proj=attn.out_proj,
        c_fc=layers[0] if layers else None,
        c_proj=layers[1] if layers else None,
        scale_1=getattr(block.ls_1, "gamma", None),
        scale_2=getattr(block.ls_2, "gamma", None),
        cannot_copy_attention=None if plain else "their attention has a scale or norm on its logits or output",
        cannot_copy_mlp=None if layers else "their MLP has a norm",
    )

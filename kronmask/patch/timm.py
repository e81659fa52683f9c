"""timm's `VisionTransformer` as a video model."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Attention as ImageAttention
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

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

__all__ = ["KronImageAttention", "KronVisionTransformer", "patch", "unpatch"]


class KronImageAttention(ImageAttention):
    """The attention of an image block, over all tokens of a clip (`placement="replace"`)."""

    temporal_mask: MaskRule

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`x (B, T, N, D)` to the same shape."""
        refuse_image_mask(attn_mask, is_causal)
        refuse_dropout(self.attn_drop.p if self.training else 0.0)
        output = clip_attention(self.qkv(x), self.num_heads, self.temporal_mask, self.q_norm, self.k_norm)
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)  # not in every release
        output = output if norm is None else norm(output)
        output = output if gate is None else output * gate(x).sigmoid()
        return self.proj_drop(self.proj(output))


class KronVisionTransformer(VideoTower, VisionTransformer):
    """A timm `VisionTransformer` that takes video `(B, T, C, H, W)`; made by `patch_vit`, undone by `unpatch_vit`."""

    image_class = VisionTransformer

    def forward_tokens(self, video: Tensor) -> Tensor:
        """Tokens after the last temporal layer and before the final norm.

        Args:
            video: `(B, T, C, H, W)`, or images `(B, C, H, W)` as clips of one frame.

        Returns:
            `(B, T, N, D)`; N counts class token and registers, which come first.

        Raises:
            ValueError: another shape.
        """
        x = each_frame(self._embed_frames, clips(video, self.patch_embed.proj.in_channels))
        if self.training and not isinstance(self.patch_drop, nn.Identity):
            x = _drop_tubes(self.patch_drop, x)
        return self.temporal_encoder(self.norm_pre(x), self.blocks, self.grad_checkpointing)

    def no_weight_decay(self) -> set[str]:
        """What timm's optimizer factory is not to decay: the image model's own, and the temporal embedding."""
        temporal = {name for name, _ in self.named_parameters() if name.startswith("temporal_encoder.embedding")}
        return set(super().no_weight_decay()) | temporal

    def _embed_frames(self, images: Tensor) -> Tensor:
        return self._pos_embed(self.patch_embed(images))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The tokens of each frame after the final norm, `(B, T, N, D)`; see `forward_tokens`."""
        refuse_image_mask(attn_mask, is_causal)
        return self.norm(self.forward_tokens(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The head on each frame of `x (B, T, N, D)`, averaged over frames; `x (B, N, D)` are clips of one frame."""
        return average_frames(self._frame_heads(x if x.ndim == 4 else x.unsqueeze(1), pre_logits))

    def _frame_heads(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        image_head = super().forward_head
        return each_frame(lambda frame: image_head(frame, pre_logits=pre_logits), x)

    def forward_frames(self, video: Tensor) -> Tensor:
        """What the image model returns, for each frame: `(B, T, classes)`; their mean over T is `forward(video)`."""
        return self._frame_heads(self.forward_features(video))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """What the image model returns, per clip: `(B, classes)` for video `(B, T, C, H, W)`."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))


def patch(model: nn.Module, settings: Settings) -> None:
    """Patch in place. Nothing is changed if it raises.

    Raises:
        TypeError: a timm model of another kind, or blocks that `placement="replace"` does not know.
        ValueError: settings that do not fit the model.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            f"patch_vit patches timm's VisionTransformer and its subclasses, but timm's {type(model).__name__} "
            f"({type(model).__module__}) is another architecture; choose a vit_* or deit_* model"
        )
    refuse_own_forward(model, VisionTransformer, ("forward", "forward_features"))
    fixed_tokens = not model.dynamic_img_size and isinstance(model.patch_drop, nn.Identity)
    settings.check_mask(model.patch_embed.num_patches + model.num_prefix_tokens if fixed_tokens else None)
    encoder = build_temporal_encoder(settings, [_describe(block, model.embed_dim) for block in model.blocks])
    replaced = [attn for index in encoder.replaced for attn in _attentions(model.blocks[index])]

    for attn in replaced:
        attn.temporal_mask = MaskRule(settings.attention)
        swap_class(attn, KronImageAttention)
    model.temporal_encoder = encoder.train(model.training)
    swap_class(model, video_class(KronVisionTransformer, type(model)))


def unpatch(model: nn.Module) -> None:
    """Undo `patch` in place."""
    assert isinstance(model, KronVisionTransformer)
    for module in model.modules():
        if type(module) is KronImageAttention:
            del module.temporal_mask
            swap_class(module, ImageAttention)
    del model.temporal_encoder
    swap_class(model, model.image_class)


def _attentions(block: nn.Module) -> list[Any]:
    """The attentions of a block that works on `(B, T, N, D)` once they do."""
    name = f"{type(block).__module__}.{type(block).__qualname__}"
    if type(block) not in (Block, ResPostBlock, ParallelThingsBlock):
        raise TypeError(
            f"placement='replace' does not know blocks of type {name}; use placement='append' or 'interleave'"
        )
    with_heads: list[Any] = [module for module in block.modules() if hasattr(module, "num_heads")]
    for attn in with_heads:
        if type(attn) is not ImageAttention or "forward" in vars(attn):
            kind = f"{type(attn).__module__}.{type(attn).__qualname__}"
            raise TypeError(
                f"placement='replace' does not know attention {kind}; use placement='append' or 'interleave'"
            )
        refuse_dropout(attn.attn_drop.p)
    return with_heads


def _describe(block: Any, dim: int) -> ImageBlock:
    """Sizes, norms and weights of any block of a timm ViT, found by what they are rather than by where."""
    attn: Any = next((module for module in block.modules() if hasattr(module, "num_heads")), block)
    plain = type(block) is Block and type(attn) is ImageAttention
    heads = attn.num_heads
    norm = next(module for name, module in block.named_modules() if "norm" in name.rpartition(".")[2])
    linear = next(module for module in block.modules() if isinstance(module, nn.Linear))
    mlp = getattr(block, "mlp", nn.Identity())
    layers = two_layers(mlp)

    obstacle = None
    if not plain:
        obstacle = f"they are {type(block).__name__} with {type(attn).__name__}"
    elif not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) or getattr(attn, "gate", None) is not None:
        obstacle = "their attention has a norm or gate on its output"
    return ImageBlock(
        dim=dim,
        num_heads=heads,
        head_dim=attn.head_dim if type(attn) is ImageAttention else dim // heads,
        hidden_dim=layers[0].out_features if layers else 4 * dim,
        norm_1=block.norm1 if plain else norm,
        norm_2=block.norm2 if plain else norm,
        q_norm=_norm_or_none(getattr(attn, "q_norm", None)) if type(attn) is ImageAttention else None,
        k_norm=_norm_or_none(getattr(attn, "k_norm", None)) if type(attn) is ImageAttention else None,
        activation=getattr(mlp, "act", None) or nn.GELU(),
        like=linear.weight,
        in_proj=(attn.qkv.weight, attn.qkv.bias) if plain else None,
        out_proj=attn.proj if plain else None,
        c_fc=layers[0] if layers else None,
        c_proj=layers[1] if layers else None,
        scale_1=getattr(getattr(block, "ls1", None), "gamma", None),
        scale_2=getattr(getattr(block, "ls2", None), "gamma", None),
        cannot_copy_attention=obstacle,
        cannot_copy_mlp=None if layers else f"their MLP is {type(mlp).__name__}, not two linear layers",
    )


def _norm_or_none(norm: nn.Module | None) -> nn.Module | None:
    return None if isinstance(norm, nn.Identity) else norm


def _drop_tubes(patch_drop: nn.Module, x: Tensor) -> Tensor:
    """Drop the same patches in all frames of a clip, so that a position stays a position."""
    wide = x.transpose(1, 2).flatten(2)  # (B, N, T*D)
    return patch_drop(wide).unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2).contiguous()

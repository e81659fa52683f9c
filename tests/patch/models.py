"""Small image models of every family, in which every parameter matters: what the suites of this folder run over."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import open_clip
import open_clip.coca_model as coca_file
import open_clip.model as oc_model
import open_clip.transformer as oc
import packaging.version
import timm
import timm.layers as timm_layers
import timm.models.beit as timm_beit
import timm.models.cait as timm_cait
import timm.models.deit as timm_deit
import timm.models.eva as timm_eva
import timm.models.vision_transformer as timm_vit
import timm.models.vision_transformer_relpos as timm_relpos
import timm.models.vision_transformer_sam as timm_sam
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from kronmask import temporal_parameters
from kronmask.patch import Family

if find_spec("pkg_resources") is None:  # gone from setuptools; OpenAI's clip takes nothing but `packaging` from it
    sys.modules["pkg_resources"] = SimpleNamespace(packaging=packaging)  # type: ignore[assignment]
openai = importlib.import_module("clip.model")

BATCH, FRAMES, SIZE = 2, 4, 32


@dataclass(frozen=True)
class Case:
    """A small image model, and what the suites must know of it.

    Args:
        build: makes it.
        encoder: attribute path of the image encoder, "" for the model itself.
        blocks: attribute path of the blocks from the encoder.
        size: of the images, in pixels.
        call: calls the model on images; by default the model itself, or its `encode_image`.
        replace: whether `placement="replace"` can serve it.
        copy: whether `init="copy"` can.
        like: modules of the kind that the temporal layers have, from a block: norm, activation, norms of queries and keys.
        sequence_first: whether blocks take `(N, B, D)`.
        heads: of the image blocks.
        family: what `patch_vit` is told, for a model of no library.
    """

    build: Callable[[], nn.Module]
    encoder: str = ""
    blocks: str = "blocks"
    size: int = SIZE
    call: Callable[[Any, Tensor], Any] | None = None
    replace: bool = True
    copy: bool = True
    like: dict[str, str] = field(default_factory=dict)
    sequence_first: bool = False
    heads: int = 2
    family: Family | None = None


TIMM_LIKE = {"ln_1": "norm1", "ln_2": "norm2", "mlp.act": "mlp.act"}
OPEN_CLIP_LIKE = {"ln_1": "ln_1", "ln_2": "ln_2", "mlp.act": "mlp.gelu"}
NEW_TIMM = packaging.version.parse(timm.__version__) >= packaging.version.parse("1.0.20")
NEW_OPEN_CLIP = packaging.version.parse(open_clip.__version__) >= packaging.version.parse("3")
NEW_HF = int(transformers.__version__.split(".")[0]) >= 5
HF_LAYERS = "layers" if NEW_HF else "encoder.layer"
HF_ACT = "mlp.activation_fn" if NEW_HF else "intermediate.intermediate_act_fn"
HF_LIKE = {"ln_1": "layernorm_before", "ln_2": "layernorm_after", "mlp.act": HF_ACT}
DINO_LIKE = {"ln_1": "norm1", "ln_2": "norm2", "mlp.act": "mlp.activation_fn" if NEW_HF else "mlp.activation"}
CLIP_LIKE = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.act": "mlp.activation_fn"}


class UserViT(timm_vit.VisionTransformer):
    """A user's subclass that changes head and features."""

    def forward_features(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward_features(x, **options) + 1

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return 2 * super().forward_head(x, pre_logits)


class OwnBlock(nn.Module):
    """The block of `OwnViT`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_a, self.norm_b = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.act, self.down = nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_a(x)).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*qkv.unbind(0), scale=0.5).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm_b(x))))


class OwnViT(nn.Module):
    """A ViT that no library knows, with the mean of its tokens as features."""

    def __init__(self, dim: int = 24, num_heads: int = 2, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 16, 16)
        self.position = nn.Parameter(torch.randn(1, 4, dim))
        self.layers = nn.ModuleList(OwnBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)


def timm_model(cls: Any = timm_vit.VisionTransformer, **options: Any) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return cls(**(sizes | options))


def open_clip_model(**options: Any) -> nn.Module:
    sizes = {"image_size": SIZE, "patch_size": 16, "width": 24, "layers": 3, "heads": 2}
    return oc.VisionTransformer(**(sizes | {"mlp_ratio": 4.0, "output_dim": 8} | options))


TEXT = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
VISION = {"layers": 3, "width": 24, "head_width": 12, "patch_size": 16, "image_size": SIZE}


def clip(cls: type[nn.Module] = oc_model.CLIP, vision: dict | None = None, **options: Any) -> nn.Module:
    return cls(embed_dim=8, vision_cfg=VISION | (vision or {}), text_cfg=TEXT, **options)


def coca() -> nn.Module:
    vision = VISION | {"attentional_pool": True, "attn_pooler_queries": 3, "output_tokens": True}
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    return coca_file.CoCa(embed_dim=16, multimodal_cfg=TEXT, text_cfg=text, vision_cfg=vision)


def timm_tower(name: str = "test_vit", projection: str = "linear") -> nn.Module:
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": projection, "image_size": 160}
    return oc_model.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=TEXT)


def openai_clip() -> nn.Module:
    torch.manual_seed(0)
    return openai.CLIP(8, SIZE, 3, 64, 16, 7, 20, 64, 1, 1).float()


HF = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
HF |= {"image_size": SIZE, "patch_size": 16}


def hf_clip() -> nn.Module:
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 20,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(HF), projection_dim=8)
    return transformers.CLIPModel(config)


def hf_image_features(model: Any, images: Tensor) -> Tensor:
    output = model.get_image_features(pixel_values=images)
    return output if isinstance(output, Tensor) else output.pooler_output


def hf_output(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    output = model(pixel_values=images)
    return output.last_hidden_state, output.pooler_output


def logits(model: Any, images: Tensor) -> Tensor:
    return model(pixel_values=images).logits


def case(build: Callable[[], nn.Module], like: dict[str, str] = TIMM_LIKE, **facts: Any) -> Case:
    return Case(build, like=like, **facts)


def of_open_clip(build: Callable[[], nn.Module], encoder: str = "", **facts: Any) -> Case:
    return Case(build, encoder, "transformer.resblocks", like=facts.pop("like", OPEN_CLIP_LIKE), **facts)


def of_hf(build: Callable[[], nn.Module], call: Any, encoder: str = "", blocks: str = HF_LAYERS, **facts: Any) -> Case:
    return Case(build, encoder, blocks, call=call, like=facts.pop("like", HF_LIKE), **facts)


QK = {"attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm"}
LN_QK = {"attn.q_norm": "attn.ln_q", "attn.k_norm": "attn.ln_k"}

CASES: dict[str, Case] = {
    "timm": case(timm_model),
    "timm-registers-layerscale": case(lambda: timm_model(reg_tokens=4, init_values=0.1, no_embed_class=True)),
    "timm-qk-norm": case(lambda: timm_model(qk_norm=True, qkv_bias=False), TIMM_LIKE | QK),
    "timm-scale-norm": case(lambda: timm_model(scale_attn_norm=True, scale_mlp_norm=True), copy=False),
    "timm-avg-no-class": case(lambda: timm_model(class_token=False, global_pool="avg")),
    "timm-avg-fc-norm": case(lambda: timm_model(global_pool="avg", fc_norm=True)),
    "timm-map": case(lambda: timm_model(class_token=False, global_pool="map")),
    "timm-no-pool": case(lambda: timm_model(global_pool="")),
    "timm-clip": case(lambda: timm_model(pre_norm=True, norm_layer=nn.LayerNorm, act_layer="quick_gelu")),
    "timm-dynamic": case(lambda: timm_model(dynamic_img_size=True)),
    "timm-no-classes": case(lambda: timm_model(num_classes=0)),
    "timm-patch-drop": case(lambda: timm_model(patch_drop_rate=0.5)),
    "timm-rms-swiglu": case(
        lambda: timm_model(norm_layer=timm_layers.RmsNorm, mlp_layer=timm_layers.SwiGLU), copy=False
    ),
    "timm-res-post": case(lambda: timm_model(block_fn=timm_vit.ResPostBlock), copy=False),
    "timm-parallel-things": case(
        lambda: timm_model(block_fn=timm_vit.ParallelThingsBlock),
        {"ln_1": "attns.0.norm", "ln_2": "attns.0.norm", "mlp.act": "ffns.0.mlp.act"},
        copy=False,
    ),
    "timm-parallel-scaling": case(
        lambda: timm_model(block_fn=timm_vit.ParallelScalingBlock, qk_norm=True),
        {"ln_1": "in_norm", "ln_2": "in_norm", "mlp.act": "mlp_act"}
        | {"attn.q_norm": "q_norm", "attn.k_norm": "k_norm"},
        copy=False,
    ),
    "timm-distilled": case(lambda: timm_model(timm_deit.VisionTransformerDistilled)),
    "timm-user-subclass": case(lambda: timm_model(UserViT)),
    "timm-eva02": case(
        lambda: timm_model(timm_eva.Eva, num_heads=3, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True),
        copy=False,
        heads=3,
    ),
    "timm-eva-dinov3": case(
        lambda: timm_model(
            timm_eva.Eva, num_heads=3, use_rot_pos_emb=True, num_reg_tokens=2, init_values=0.1, use_abs_pos_emb=False
        ),
        copy=False,
        heads=3,
    ),
    "timm-beit": case(lambda: timm_model(timm_beit.Beit, use_rel_pos_bias=True), replace=False, copy=False),
    "timm-beit-no-bias": case(lambda: timm_model(timm_beit.Beit, init_values=0.1, use_abs_pos_emb=True)),
    "timm-relpos": case(
        lambda: timm_model(timm_relpos.VisionTransformerRelPos, class_token=True), replace=False, copy=False
    ),
    "timm-sam": case(
        lambda: timm_model(timm_sam.VisionTransformerSAM, use_rel_pos=True, img_size=64), size=64, replace=False, copy=False
    ),
    "timm-cait": case(lambda: timm_model(timm_cait.Cait), replace=False, copy=False),
    "timm-naflex": case(
        lambda: timm.create_model("naflexvit_base_patch16_gap", embed_dim=24, depth=3, num_heads=2, num_classes=5)
    ),
    "open_clip": of_open_clip(open_clip_model),
    "open_clip-layerscale": of_open_clip(lambda: open_clip_model(ls_init_value=0.1)),
    "open_clip-avg": of_open_clip(lambda: open_clip_model(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True)),
    "open_clip-tokens": of_open_clip(
        lambda: open_clip_model(output_tokens=True, attentional_pool=True, attn_pooler_queries=3)
    ),
    "open_clip-parallel-pool": of_open_clip(lambda: open_clip_model(attentional_pool="parallel", output_dim=24)),
    "open_clip-cascade-pool": of_open_clip(
        lambda: open_clip_model(attentional_pool="cascade", output_dim=24, output_tokens=True)
    ),
    "open_clip-patch-dropout": of_open_clip(lambda: open_clip_model(patch_dropout=0.5)),
    "open_clip-CLIP": of_open_clip(lambda: clip(quick_gelu=True), "visual"),
    "open_clip-CustomTextCLIP": of_open_clip(lambda: clip(oc_model.CustomTextCLIP), "visual"),
    "open_clip-CoCa": of_open_clip(coca, "visual", call=lambda model, x: model.encode_image(x, normalize=False)),
    "open_clip-timm-tower": Case(timm_tower, "visual", "trunk.blocks", 160, like=TIMM_LIKE),
    "open_clip-timm-tower-mlp": Case(lambda: timm_tower(projection="mlp"), "visual", "trunk.blocks", 160, like=TIMM_LIKE),
    "clip": Case(openai_clip, "visual", "transformer.resblocks", like=OPEN_CLIP_LIKE, sequence_first=True, heads=1),
    "transformers-ViT": of_hf(lambda: transformers.ViTModel(transformers.ViTConfig(**HF)), hf_output),
    "transformers-ViTForImageClassification": of_hf(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5)), logits, "vit"
    ),
    "transformers-CLIP": of_hf(hf_clip, hf_image_features, "vision_model", "encoder.layers", like=CLIP_LIKE),
    "transformers-DINOv2": of_hf(
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF)),
        hf_output,
        blocks="encoder.layer",
        like=DINO_LIKE,
    ),
    "transformers-SigLIP": of_hf(
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF)),
        hf_output,
        "" if NEW_HF else "vision_model",
        "encoder.layers",
        like=CLIP_LIKE,
    ),
    "transformers-BEiT": of_hf(
        lambda: transformers.BeitModel(transformers.BeitConfig(**HF, use_relative_position_bias=True, drop_path_rate=0.0)),
        hf_output,
        replace=False,
        copy=False,
    ),
    "torchvision": Case(
        lambda: torchvision.models.VisionTransformer(SIZE, 16, 3, 2, 24, 48, num_classes=5),
        blocks="encoder.layers",
        like={"ln_1": "ln_1", "ln_2": "ln_2", "mlp.act": "mlp.1"},
    ),
    "own": Case(
        OwnViT,
        blocks="layers",
        like={"ln_1": "norm_a", "ln_2": "norm_b", "mlp.act": "act"},
        copy=False,
        family=Family(OwnViT, "layers"),
    ),
}  # fmt: skip
"""Everything that a suite runs over."""

if not NEW_TIMM:  # options, registers with rotary positions, and models that older releases of timm do not have
    for newer in (
        "timm-scale-norm",
        "timm-eva-dinov3",
        "timm-naflex",
        "open_clip-timm-tower",
        "open_clip-timm-tower-mlp",
    ):
        del CASES[newer]
if "attn_layer" in timm_vit.VisionTransformer.__init__.__code__.co_varnames:  # of newer releases of timm
    CASES["timm-diff"] = case(lambda: timm_model(attn_layer="diff"), copy=False)
if NEW_OPEN_CLIP:
    CASES["open_clip-custom"] = of_open_clip(
        lambda: open_clip_model(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True),
        like=OPEN_CLIP_LIKE | LN_QK,
        copy=False,
    )


def image_model(name: str) -> nn.Module:
    """A small image model in which every parameter matters (nothing is left at zero or one)."""
    model = copy.deepcopy(_prototype(name))
    torch.manual_seed(0)
    return model


@lru_cache(maxsize=4)  # building a model takes longer than copying it
def _prototype(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def clips(name: str, frames: int = FRAMES, batch: int = BATCH) -> Tensor:
    size = CASES[name].size
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(1))


def encode(name: str, model: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of an image or video model, as a tuple."""
    call = CASES[name].call or (lambda model, x: model.encode_image(x) if hasattr(model, "encode_image") else model(x))
    output = call(model, x)
    return output if isinstance(output, tuple) else (output,)


def encoder(name: str, model: nn.Module) -> Any:
    """The image encoder of a model."""
    return attrgetter(CASES[name].encoder)(model) if CASES[name].encoder else model


def blocks(name: str, model: nn.Module) -> Sequence[Any]:
    """Its blocks."""
    return attrgetter(CASES[name].blocks)(encoder(name, model))


def averaged(name: str, model: nn.Module, video: Tensor) -> tuple[Tensor, ...]:
    """The image model on each frame, averaged over the frames."""
    return tuple(o.unflatten(0, video.shape[:2]).mean(1) for o in encode(name, model, video.flatten(0, 1)))


def stir(model: nn.Module) -> nn.Module:
    """Give every temporal parameter a value with consequences."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in temporal_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model

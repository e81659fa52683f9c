"""What is particular to open_clip: whole CLIP models, its towers and its blocks."""

from __future__ import annotations

import copy

import open_clip
import open_clip.coca_model as coca_file
import open_clip.model as model_file
import open_clip.transformer as oc
import pytest
import torch
from models import NEW_OPEN_CLIP, NEW_TIMM
from torch import Tensor, nn
from torch.nn import functional as F

from kronmask import param_groups, patch_vit, temporal_parameters, unpatch_vit

TEXT = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}


def clip(cls: type[nn.Module] = model_file.CLIP, vision: dict | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"layers": 3, "width": 24, "head_width": 12, "patch_size": 16, "image_size": 32}
    return cls(embed_dim=8, vision_cfg=sizes | (vision or {}), text_cfg=TEXT, **options).eval()


def tower(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "image_size": 32,
        "patch_size": 16,
        "width": 24,
        "layers": 3,
        "heads": 2,
        "mlp_ratio": 4.0,
        "output_dim": 8,
    }
    return oc.VisionTransformer(**(sizes | options)).eval()


def clips(frames: int = 4, size: int = 32) -> Tensor:
    return torch.randn(2, frames, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_vit_b_16_equals_the_image_model_averaged_over_frames() -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu").eval()
    video = clips(2, 224)[:1]
    with torch.no_grad():
        expected = model.encode_image(video.flatten(0, 1)).mean(0, keepdim=True)
        patch_vit(model)
        torch.testing.assert_close(model.encode_image(video), expected, rtol=1e-5, atol=1e-5)
        assert model.visual.forward_tokens(video).shape == (1, 2, 197, 768)
    blocks = model.visual.temporal_encoder.blocks
    assert len(blocks) == 4
    assert blocks[0].attn.num_heads == 12
    assert type(blocks[0].mlp.act).__name__ == "QuickGELU"
    assert type(blocks[0].ln_1) is type(model.visual.ln_post)


@pytest.mark.parametrize("cls", [model_file.CLIP, model_file.CustomTextCLIP])
def test_a_whole_clip_takes_video(cls: type[nn.Module]) -> None:
    model, text = patch_vit(clip(cls), init="random"), torch.randint(0, 20, (3, 7))
    features = model.encode_image(clips())
    assert features.shape == (2, 8)
    torch.testing.assert_close(model.encode_image(clips(), normalize=True), F.normalize(features, dim=-1))
    image, words, scale = model(clips(), text)
    torch.testing.assert_close(image, F.normalize(features, dim=-1))
    torch.testing.assert_close(model.get_logits(clips(), text)[0], scale * image @ words.T)
    torch.testing.assert_close(model.visual.forward_frames(clips()).mean(1), features)
    assert all(name.startswith("visual.temporal_encoder.") for name in temporal_parameters(model))
    layers = model.forward_intermediates(clips(), image_indices=2, image_output_fmt="NLC")
    assert [layer.shape for layer in layers["image_intermediates"]] == [(2, 4, 4, 24)] * 2


def test_coca_takes_video() -> None:
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 16, "image_size": 32}
    vision |= {"attentional_pool": True, "attn_pooler_queries": 3, "output_tokens": True}
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = coca_file.CoCa(embed_dim=16, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision).eval()
    expected = model.encode_image(clips().flatten(0, 1), normalize=False).unflatten(0, (2, 4)).mean(1)
    patch_vit(model)
    torch.testing.assert_close(model.encode_image(clips(), normalize=False), expected, rtol=1e-5, atol=1e-5)
    output = model(clips(), torch.randint(1, 20, (2, 7)))
    assert output["image_features"].shape == (2, 16)


def test_clip_and_its_tower_can_be_patched_and_unpatched_from_either() -> None:
    model = clip()
    patch_vit(model.visual)
    with pytest.raises(ValueError, match="patched already"):
        patch_vit(model)
    assert type(unpatch_vit(model).visual) is oc.VisionTransformer


def test_patch_dropout_drops_the_same_patches_in_all_frames() -> None:
    model = patch_vit(tower(patch_dropout=0.5, image_size=64), temporal_embedding=False).train()
    frame = clips(1, size=64)
    tokens = model.forward_tokens(frame.expand(-1, 5, -1, -1, -1))
    assert tokens.shape == (2, 5, 1 + 8, 24)
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))
    assert not torch.allclose(model.forward_tokens(frame), model.forward_tokens(frame))
    assert model.eval().forward_tokens(frame).shape[2] == 17
    assert type(unpatch_vit(model).patch_dropout) is oc.PatchDropout


@pytest.mark.parametrize("before", [True, False])
def test_weights_in_low_precision_with_norms_in_float32(before: bool) -> None:
    """open_clip's precision="fp16" and "bf16": projections are converted, norms compute in float32."""
    model = clip(cast_dtype=torch.bfloat16)
    reference = patch_vit(copy.deepcopy(model), init="random", frames=4)
    if before:
        model_file.convert_weights_to_lp(model, torch.bfloat16)
    patch_vit(model, init="random", frames=4)
    model.load_state_dict(reference.state_dict())
    if not before:
        model_file.convert_weights_to_lp(model, torch.bfloat16)
    output = model.encode_image(clips().bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), reference.encode_image(clips()), rtol=0.1, atol=0.1)
    norm = model.visual.temporal_encoder.blocks[0].ln_1
    assert type(norm) is oc.LayerNormFp32
    assert norm.weight.dtype == torch.float32


def test_a_locked_image_tower_learns_its_temporal_layers_only() -> None:
    model = clip()
    model.lock_image_tower()
    patch_vit(model, init="random")
    model.encode_image(clips()).sum().backward()
    learned = {name for name, p in model.visual.named_parameters() if p.grad is not None}
    assert learned == set(temporal_parameters(model.visual))


def test_parameter_groups_of_a_whole_clip() -> None:
    model = patch_vit(clip(model_file.CustomTextCLIP))
    groups = {group["name"]: group for group in param_groups(model, lr=1.0, weight_decay=0.1)}
    assert list(groups) == ["image", "image_no_decay", "temporal", "temporal_no_decay"]
    ids = {id(parameter) for parameter in groups["image_no_decay"]["params"]}
    for parameter in (model.logit_scale, model.visual.class_embedding, model.text.positional_embedding):
        assert id(parameter) in ids
    assert id(model.visual.temporal_encoder.embedding.weight) in {id(p) for p in groups["temporal_no_decay"]["params"]}
    assert id(model.visual.proj) in {id(p) for p in groups["image"]["params"]}


def test_models_without_a_vision_transformer_are_refused_by_name() -> None:
    resnet = clip(vision={"layers": (1, 1, 1, 1), "width": 16, "head_width": 16})
    with pytest.raises(TypeError, match="CLIP, whose image tower is ModifiedResNet"):
        patch_vit(resnet)
    with pytest.raises(TypeError, match="TextTransformer"):
        patch_vit(clip(model_file.CustomTextCLIP).text)


@pytest.mark.skipif(not NEW_TIMM, reason="timm before 1.0.20 has no test_resnet")
def test_a_timm_tower_that_is_no_vit_is_refused_by_name() -> None:
    vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    with pytest.raises(TypeError, match="ResNet.*no multi-head attention"):
        patch_vit(clip(model_file.CustomTextCLIP, vision))


NEWER = pytest.mark.skipif(not NEW_OPEN_CLIP, reason="open_clip before 3 has no such option")


@NEWER
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale_attn": True}, "they are not norm, attention, norm, MLP"),
        ({"scale_fc": True}, "they are not norm, attention, norm, MLP"),
        ({"scaled_cosine_attn": True}, "cosines of queries and keys"),
    ],
)
def test_copies_that_would_compute_something_else_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"init='copy' cannot copy .*{reason}"):
        patch_vit(tower(**options), init="copy")


@NEWER
def test_replace_refuses_attention_dropout_and_cosine_attention() -> None:
    model = tower()
    model.transformer.resblocks[1].attn.dropout = 0.1
    with pytest.raises(ValueError, match=r"attention dropout 0\.1"):
        patch_vit(model, placement="replace")
    assert type(model) is oc.VisionTransformer
    with pytest.raises(TypeError, match="cosines of queries and keys"):
        patch_vit(tower(scaled_cosine_attn=True), placement="replace")

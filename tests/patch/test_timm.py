"""What is particular to timm's vision transformers."""

from __future__ import annotations

import inspect

import pytest
import timm
import timm.layers as layers
import timm.models.vision_transformer as vit
import timm.optim
import torch
from models import NEW_TIMM
from torch import Tensor, nn

from kronmask import param_groups, patch_vit, temporal_parameters, unpatch_vit

NEWER = pytest.mark.skipif(not NEW_TIMM, reason="timm before 1.0.20 does not have it")


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return vit.VisionTransformer(**(sizes | options)).eval()


def clips(frames: int = 4, size: int = 32) -> Tensor:
    return torch.randn(2, frames, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("vit_base_patch16_clip_224", 197),
        ("vit_small_patch14_reg4_dinov2", 261),
        ("vit_base_patch16_siglip_224", 196),
        ("deit_tiny_distilled_patch16_224", 198),
    ],
)
def test_registered_models_equal_the_image_model_averaged_over_frames(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    sizes = {} if name == "vit_base_patch16_clip_224" else {"depth": 3, "embed_dim": 96, "num_heads": 3}
    options = {"img_size": 224} if "dinov2" in name else {}
    model = timm.create_model(name, **options, **sizes).eval()
    video = clips(2, 224)[:1]
    with torch.no_grad():
        expected = model(video.flatten(0, 1)).mean(0, keepdim=True)
        patch_vit(model)
        torch.testing.assert_close(model(video), expected, rtol=1e-5, atol=1e-5)
        assert model.forward_tokens(video).shape == (1, 2, tokens, model.embed_dim)
    assert len(model.temporal_encoder.blocks) == len(model.blocks) // 3


def test_forward_is_the_head_on_the_features_of_each_frame() -> None:
    model = patch_vit(small(reg_tokens=2), init="random")
    features = model.forward_features(clips())
    assert features.shape == (2, 4, 4 + 3, 24)
    assert torch.equal(model.forward_head(features), model(clips()))
    assert torch.equal(model.norm(model.forward_tokens(clips())), features)
    logits = model.forward_frames(clips())
    assert logits.shape == (2, 4, 5)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, :, 0].mean(1))
    torch.testing.assert_close(model.forward_head(features[:, 0]), logits[:, 0])


def test_temporal_blocks_have_the_heads_norms_and_activation_of_the_image_blocks() -> None:
    model = small(norm_layer=layers.RmsNorm, act_layer="quick_gelu", qk_norm=True, mlp_ratio=3.0)
    patch_vit(model, init="random")
    block, image = model.temporal_encoder.blocks[0], model.blocks[0]
    assert type(block.ln_1) is type(image.norm1)
    assert block.ln_1.eps == image.norm1.eps
    assert type(block.mlp.act) is type(image.mlp.act)
    assert type(block.attn.q_norm) is type(image.attn.q_norm)
    assert block.mlp.c_fc.out_features == 72
    assert block.attn.num_heads == 2
    assert len(model.temporal_encoder.blocks) == 1


def test_norms_start_fresh_and_learn_though_the_image_model_is_frozen() -> None:
    model = small().requires_grad_(False)
    with torch.no_grad():
        model.blocks[-1].norm1.weight.fill_(7)
    patch_vit(model, init="random")
    assert (model.temporal_encoder.blocks[0].ln_1.weight == 1).all()
    assert all(p.requires_grad for p in temporal_parameters(model).values())
    assert [group["name"] for group in param_groups(model, lr=1.0)] == ["temporal", "temporal_no_decay"]


@NEWER
def test_head_and_input_size_can_change_after_patching() -> None:
    model = patch_vit(small(dynamic_img_size=True), init="random")
    assert model(clips(size=48)).shape == (2, 5)
    model.reset_classifier(7)
    assert model(clips()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(clips()).shape == (2, 24)
    model.set_input_size(64)
    assert model.forward_tokens(clips(size=64)).shape == (2, 4, 17, 24)
    assert type(unpatch_vit(model)) is vit.VisionTransformer


def test_patch_dropout_drops_the_same_patches_in_all_frames() -> None:
    model = patch_vit(small(patch_drop_rate=0.5, img_size=64), temporal_embedding=False).train()
    frame = clips(1, size=64)
    tokens = model.forward_tokens(frame.expand(-1, 5, -1, -1, -1))
    assert tokens.shape == (2, 5, 1 + 8, 24)
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))
    assert not torch.allclose(model.forward_tokens(frame), model.forward_tokens(frame))
    assert model.eval().forward_tokens(frame).shape[2] == 17


def test_a_distilled_model_in_training_returns_both_heads_per_clip() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, num_classes=5, img_size=32)
    model.set_distilled_training(True)
    outputs = patch_vit(model).train()(clips())
    assert [output.shape for output in outputs] == [(2, 5), (2, 5)]


def test_models_of_other_channels_say_which_they_expect() -> None:
    model = patch_vit(small(in_chans=1))
    assert model(clips()[:, :, :1]).shape == (2, 5)
    with pytest.raises(ValueError, match=r"\(B, T, 1, H, W\)"):
        model(clips())


@pytest.mark.skipif("attn_mask" not in inspect.signature(vit.VisionTransformer.forward).parameters, reason="older timm")
def test_a_mask_of_the_image_model_holds_within_each_frame_and_is_refused_in_replace() -> None:
    model, video, mask = small(), clips(), torch.eye(5, dtype=torch.bool)
    expected = model(video.flatten(0, 1), attn_mask=mask).unflatten(0, (2, 4)).mean(1)
    torch.testing.assert_close(patch_vit(model)(video, attn_mask=mask), expected)
    assert not torch.allclose(model(video), expected)
    model = patch_vit(small(), placement="replace", attention="joint")
    with pytest.raises(ValueError, match=r"cannot apply an attention mask .*attn_mask of shape \(5, 5\)"):
        model(video, attn_mask=mask)
    with pytest.raises(ValueError, match=r"cannot apply an attention mask .*is_causal"):
        model.forward_features(video, is_causal=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "hierarchical"),
        ("resnet18", "no multi-head attention"),
        ("xcit_nano_12_p16_224", "no plain stack"),
    ],
)
def test_other_architectures_are_refused_by_name_with_the_reason(name: str, reason: str) -> None:
    model = timm.create_model(name)
    with pytest.raises(TypeError, match=f"{type(model).__name__}.*{reason}"):
        patch_vit(model)


def test_a_forward_set_on_the_instance_is_refused() -> None:
    model = small()
    model.forward = model.forward_features
    with pytest.raises(TypeError, match="VisionTransformer has its own forward set on the instance"):
        patch_vit(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mlp_layer": layers.SwiGLU}, "MLP is not two linear layers"),
        pytest.param({"scale_mlp_norm": True}, "they are not norm, attention", marks=NEWER),
        pytest.param({"scale_attn_norm": True}, "they compute more", marks=NEWER),
        ({"block_fn": vit.ResPostBlock}, "ResPostBlock"),
        pytest.param({"attn_layer": "diff"}, "they compute more", marks=NEWER),
    ],
)
def test_copies_that_would_compute_something_else_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"init='copy' cannot copy .*{reason}"):
        patch_vit(small(**options), init="copy")


def test_replace_refuses_what_it_cannot_apply() -> None:
    with pytest.raises(ValueError, match=r"attention dropout 0\.1"):
        patch_vit(small(attn_drop_rate=0.1), placement="replace")
    model = small()
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(TypeError, match="fused_attn is False"):
        patch_vit(model, placement="replace")
    assert type(model) is vit.VisionTransformer
    with pytest.raises(TypeError, match="talking heads"):
        patch_vit(timm.create_model("cait_xxs24_224", depth=2), placement="replace")
    with pytest.raises(TypeError, match="windows of 14 patches"):
        patch_vit(timm.create_model("samvit_base_patch16", depth=2, use_rel_pos=False), placement="replace")
    model = patch_vit(small(), placement="replace", attention="joint")
    model.blocks[0].attn.attn_drop.p = 0.2
    assert model(clips()).shape == (2, 5)  # dropout does nothing in eval
    with pytest.raises(ValueError, match=r"attention dropout 0\.2"):
        model.train()(clips())


@NEWER
def test_timms_own_optimizer_factory_does_not_decay_the_temporal_embedding() -> None:
    model = patch_vit(vit.VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=3, num_heads=2), frames=4)
    groups = timm.optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert id(model.temporal_encoder.embedding.weight) not in decayed
    assert id(model.pos_embed) not in decayed
    assert id(model.head.weight) in decayed


def test_temporal_parameters_are_those_that_patching_added_whatever_the_model_is_called() -> None:
    model = vit.VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=3, num_heads=2)
    before = {id(p) for p in model.parameters()}
    wrapper = nn.ModuleDict({"temporal_model": patch_vit(model, frames=4)})
    added = [p for p in model.parameters() if id(p) not in before]
    assert list(map(id, temporal_parameters(wrapper).values())) == list(map(id, added))
    groups = param_groups(wrapper, lr=1.0)
    assert sum(len(g["params"]) for g in groups if g["name"].startswith("temporal")) == len(added)

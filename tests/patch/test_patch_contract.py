"""What every family of patched models keeps: one suite for timm and open_clip, over the options of their models."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable

import open_clip.model as oc_model
import open_clip.transformer as oc
import pytest
import timm.layers as timm_layers
import timm.models.deit as timm_deit
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

from kronmask import KronMask, attention_backend, masks, param_groups, patch_vit, temporal_parameters, unpatch_vit
from kronmask.patch.common import VideoTower

BATCH, FRAMES, SIZE = 2, 4, 32


class UserViT(timm_vit.VisionTransformer):
    """A user's subclass that changes the head only."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return 2 * super().forward_head(x, pre_logits)


def timm_model(cls: type[nn.Module] = timm_vit.VisionTransformer, **options) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return cls(**(sizes | options))


def open_clip_model(**options) -> nn.Module:
    sizes = {
        "image_size": SIZE,
        "patch_size": 16,
        "width": 24,
        "layers": 3,
        "heads": 2,
        "mlp_ratio": 4.0,
        "output_dim": 8,
    }
    return oc.VisionTransformer(**(sizes | options))


def clip(cls: type[nn.Module] = oc_model.CLIP, **vision) -> nn.Module:
    sizes = {"layers": 3, "width": 24, "head_width": 12, "patch_size": 16, "image_size": SIZE}
    text = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    return cls(embed_dim=8, vision_cfg=sizes | vision, text_cfg=text, quick_gelu=True)


IMAGE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_model,
    "timm-registers-layerscale": lambda: timm_model(reg_tokens=4, init_values=0.1, no_embed_class=True),
    "timm-qk-norm": lambda: timm_model(qk_norm=True, qkv_bias=False),
    "timm-scale-norm": lambda: timm_model(scale_attn_norm=True, scale_mlp_norm=True),
    "timm-avg-no-class": lambda: timm_model(class_token=False, global_pool="avg"),
    "timm-avg-fc-norm": lambda: timm_model(global_pool="avg", fc_norm=True),
    "timm-map": lambda: timm_model(class_token=False, global_pool="map"),
    "timm-no-pool": lambda: timm_model(global_pool=""),
    "timm-clip": lambda: timm_model(pre_norm=True, norm_layer=nn.LayerNorm, act_layer="quick_gelu"),
    "timm-dynamic": lambda: timm_model(dynamic_img_size=True),
    "timm-no-classes": lambda: timm_model(num_classes=0),
    "timm-patch-drop": lambda: timm_model(patch_drop_rate=0.5),
    "timm-rms-swiglu": lambda: timm_model(norm_layer=timm_layers.RmsNorm, mlp_layer=timm_layers.SwiGLU),
    "timm-res-post": lambda: timm_model(block_fn=timm_vit.ResPostBlock),
    "timm-parallel-things": lambda: timm_model(block_fn=timm_vit.ParallelThingsBlock),
    "timm-distilled": lambda: timm_model(timm_deit.VisionTransformerDistilled),
    "timm-user-subclass": lambda: timm_model(UserViT),
    "open_clip": open_clip_model,
    "open_clip-layerscale": lambda: open_clip_model(ls_init_value=0.1),
    "open_clip-avg": lambda: open_clip_model(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
    "open_clip-tokens": lambda: open_clip_model(output_tokens=True, attentional_pool=True, attn_pooler_queries=3),
    "open_clip-parallel-pool": lambda: open_clip_model(attentional_pool="parallel", output_dim=24),
    "open_clip-cascade-pool": lambda: open_clip_model(attentional_pool="cascade", output_dim=24, output_tokens=True),
    "open_clip-patch-dropout": lambda: open_clip_model(patch_dropout=0.5),
    "open_clip-custom": lambda: open_clip_model(
        qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
    ),
    "open_clip-CLIP": clip,
    "open_clip-CustomTextCLIP": lambda: clip(oc_model.CustomTextCLIP),
}
EVERY = pytest.mark.parametrize("name", IMAGE_MODELS)
TWO = pytest.mark.parametrize("name", ["timm", "open_clip"])
FEW = pytest.mark.parametrize(
    "name", ["timm", "timm-registers-layerscale", "timm-user-subclass", "open_clip", "open_clip-CLIP"]
)
PLACEMENT = pytest.mark.parametrize("placement", ["append", "interleave", "replace"])


def image_model(name: str) -> nn.Module:
    """A small image model in which every parameter matters (nothing is left at zero or one)."""
    torch.manual_seed(0)
    model = IMAGE_MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def clips(frames: int = FRAMES, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def encode(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    output = model.encode_image(x) if hasattr(model, "encode_image") else model(x)
    return output if isinstance(output, tuple) else (output,)


def averaged(model: nn.Module, video: Tensor) -> tuple[Tensor, ...]:
    """The image model on each frame, averaged over the frames."""
    return tuple(output.unflatten(0, video.shape[:2]).mean(1) for output in encode(model, video.flatten(0, 1)))


def tower(model: nn.Module) -> nn.Module:
    return getattr(model, "visual", model)


def stir(model: nn.Module) -> nn.Module:
    """Give every temporal parameter a value with consequences."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in temporal_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))


def differ(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return not torch.allclose(first[0], second[0], atol=1e-5)


# ---- the patched model and the image model --------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("placement", ["append", "interleave"])
def test_zero_init_is_the_image_model_averaged_over_frames(name: str, placement: str) -> None:
    model, video = image_model(name), clips()
    expected = averaged(model, video)
    assert patch_vit(model, placement=placement, frames=3) is model
    assert_same(encode(model, video), expected, rtol=1e-5, atol=1e-5)
    assert differ(encode(stir(model), video), expected)


@EVERY
def test_replace_under_the_spatial_mask_is_the_image_model_averaged_over_frames(name: str) -> None:
    model, video = image_model(name), clips()
    expected = averaged(model, video)
    patch_vit(model, placement="replace", attention=masks.spatial, temporal_embedding=False)
    assert not temporal_parameters(model)
    assert_same(encode(model, video), expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_replace_under_the_joint_mask_mixes_frames(name: str) -> None:
    model, video = image_model(name), clips()
    expected = averaged(model, video)
    patch_vit(model, placement="replace", attention="joint", temporal_embedding=False)
    assert differ(encode(model, video), expected)


@EVERY
@PLACEMENT
def test_unpatching_restores_types_keys_attributes_and_outputs(name: str, placement: str) -> None:
    model, images = image_model(name), clips()[:, 0]
    types = [type(module) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    state, expected = copy.deepcopy(model.state_dict()), encode(model, images)
    stir(patch_vit(model, placement=placement, layers=2))
    assert [type(module) for module in model.modules()] != types
    assert unpatch_vit(model) is model
    assert [type(module) for module in model.modules()] == types
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert list(model.state_dict()) == list(state)
    assert_same(encode(model, images), expected)


@EVERY
@PLACEMENT
def test_every_new_key_says_temporal_and_pretrained_keys_keep_their_names(name: str, placement: str) -> None:
    model = image_model(name)
    before = set(model.state_dict())
    patch_vit(model, placement=placement)
    new = set(model.state_dict()) - before
    assert before <= set(model.state_dict())
    assert new
    assert all("temporal_" in key for key in new)
    assert set(temporal_parameters(model)) == new


@EVERY
@pytest.mark.parametrize("placement", ["append", "interleave"])
def test_every_temporal_parameter_learns_and_the_normal_forward_leaves_none_unused(name: str, placement: str) -> None:
    model = patch_vit(image_model(name), init="random", placement=placement).train()
    sum(output.square().sum() for output in encode(model, clips())).backward()
    for key, parameter in temporal_parameters(model).items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@FEW
@pytest.mark.parametrize("placement", ["append", "interleave"])
@pytest.mark.parametrize("init", ["random", "copy"])
def test_the_other_inits_mix_frames_and_start_the_embedding_at_std_02(name: str, placement: str, init: str) -> None:
    model, video = image_model(name), clips()
    expected = averaged(model, video)
    patch_vit(model, placement=placement, init=init, frames=64)
    assert differ(encode(model, video), expected)
    embedding = tower(model).temporal_encoder.embedding.weight
    assert embedding.shape == (1, 64, 1, 24)
    assert 0.017 < embedding.std() < 0.023


@pytest.mark.parametrize(
    "name", ["timm", "timm-registers-layerscale", "timm-qk-norm", "open_clip", "open_clip-layerscale"]
)
def test_a_copied_block_computes_what_the_image_block_does(name: str) -> None:
    """Under the spatial mask and without temporal embedding, appended copies of blocks run these blocks again."""
    model, video = image_model(name), clips()
    twice = copy.deepcopy(model)
    blocks = twice.blocks if hasattr(twice, "blocks") else twice.transformer.resblocks
    for block in list(blocks)[1:]:
        blocks.append(copy.deepcopy(block))
    patch_vit(model, init="copy", layers=2, attention="spatial", temporal_embedding=False)
    assert_same(encode(model, video), averaged(twice, video), rtol=1e-4, atol=1e-5)


@TWO
def test_interleaved_copies_take_the_attention_of_their_own_block(name: str) -> None:
    model = patch_vit(image_model(name), init="copy", placement="interleave", layers=[2, 0])
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer.resblocks
    assert list(model.temporal_encoder.residuals) == ["0", "2"]
    for index, residual in model.temporal_encoder.residuals.items():
        attn = blocks[int(index)].attn
        weight = attn.qkv.weight if hasattr(attn, "qkv") else attn.in_proj_weight
        assert torch.equal(residual.attn.in_proj_weight, weight)


# ---- clips ----------------------------------------------------------------------------------------------------------


@FEW
@PLACEMENT
def test_images_are_clips_of_one_frame_and_any_number_of_frames_goes(name: str, placement: str) -> None:
    model = stir(patch_vit(image_model(name), placement=placement, frames=3))
    video = clips(7)
    assert_same(encode(model, video[:, 0]), encode(model, video[:, :1]))
    shapes = {output[0].shape for output in (encode(model, video[:, :frames]) for frames in (1, 2, 3, 7))}
    assert len(shapes) == 1


@FEW
@PLACEMENT
@pytest.mark.parametrize("attention", ["kmct", "causal"])
def test_under_a_causal_mask_the_past_does_not_depend_on_the_future(name: str, placement: str, attention: str) -> None:
    model = tower(stir(patch_vit(image_model(name), placement=placement, attention=attention, frames=FRAMES)))
    video = clips()
    later = video.clone()
    later[:, 2:] = 0
    first, second = model.forward_frames(video), model.forward_frames(later)
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2:], second[:, 2:], atol=1e-5)


@EVERY
def test_the_output_is_the_mean_of_the_frames_and_tokens_are_reachable(name: str) -> None:
    model, video = stir(patch_vit(image_model(name), frames=3)), clips()
    frames = tower(model).forward_frames(video)
    frames = frames if isinstance(frames, tuple) else (frames,)
    assert all(output.shape[:2] == (BATCH, FRAMES) for output in frames)
    assert_same(tuple(output.mean(1) for output in frames), encode(model, video), rtol=1e-5, atol=1e-6)
    tokens = tower(model).forward_tokens(video)
    assert tokens.ndim == 4
    assert tokens.shape[:2] == (BATCH, FRAMES)
    assert tokens.shape[3] == 24


@TWO
@pytest.mark.parametrize(
    "shape", [(3, SIZE, SIZE), (2, 3, 4, SIZE, SIZE), (1, 2, 3, 4, SIZE, SIZE), (2, 0, 3, SIZE, SIZE)]
)
def test_other_inputs_are_refused_with_their_shape(name: str, shape: tuple[int, ...]) -> None:
    model = patch_vit(image_model(name))
    with pytest.raises(
        ValueError, match=r"has shape \(" + ", ".join(map(str, shape)) + r"\), expected video \(B, T, 3, H, W\)"
    ):
        model(torch.zeros(shape))


@TWO
def test_intermediate_layers_of_an_image_are_refused(name: str) -> None:
    model = patch_vit(image_model(name))
    with pytest.raises(NotImplementedError, match="unpatch_vit"):
        model.forward_intermediates(clips())
    with pytest.raises(NotImplementedError, match="unpatch_vit"):
        model.get_intermediate_layers(clips()[:, 0])


@TWO
@PLACEMENT
def test_a_fixed_mask_and_a_callable_say_what_their_name_says(name: str, placement: str) -> None:
    video, tokens = clips(), 5
    outputs = [
        encode(stir(patch_vit(image_model(name), placement=placement, frames=FRAMES, attention=attention)), video)
        for attention in ("kmct", masks.kmct, masks.kmct(FRAMES, tokens))
    ]
    assert_same(outputs[0], outputs[1])
    assert_same(outputs[0], outputs[2])


@TWO
def test_a_fixed_mask_that_does_not_fit_is_refused_with_both_sizes(name: str) -> None:
    with pytest.raises(ValueError, match=r"4 frames of 5 tokens.*8 frames of 5 tokens"):
        patch_vit(image_model(name), frames=8, attention=masks.kmt(4, 5))
    with pytest.raises(ValueError, match=r"4 frames of 6 tokens.*4 frames of 5 tokens"):
        patch_vit(image_model(name), frames=4, attention=masks.kmt(4, 6))
    model = patch_vit(image_model(name), frames=4, attention=masks.kmt(4, 5))
    with pytest.raises(ValueError, match=r"4 frames of 5 tokens.*3 frames of 5 tokens"):
        model(clips(3))


# ---- copies, files, checkpoints -------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_ema(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model).module


@FEW
@PLACEMENT
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save, through_ema])
def test_copies_are_equal_and_independent(
    name: str, placement: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    model, video = stir(patch_vit(image_model(name), placement=placement)), clips()
    expected = encode(model, video)
    other = duplicate(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert_same(encode(other, video), expected)
    for changed, kept in ((other, model), (model, duplicate(model))):
        before = encode(kept, video)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.5)
        assert_same(encode(kept, video), before)
        assert differ(encode(changed, video), before)
    keys = set(unpatch_vit(other).state_dict())
    assert keys == set(image_model(name).state_dict())


def test_a_patched_model_loads_in_a_process_that_has_imported_nothing(tmp_path) -> None:
    model, video = stir(patch_vit(clip().eval(), attention=masks.kmt(FRAMES, 5), frames=FRAMES)), clips()
    torch.save((model, video, model.encode_image(video)), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, video, expected = torch.load(sys.argv[1], weights_only=False); "
        "torch.testing.assert_close(model.encode_image(video), expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, env=os.environ, timeout=120)


@EVERY
def test_an_image_checkpoint_loads_before_and_after_patching(name: str) -> None:
    image = image_model(name)
    checkpoint = {key: tensor + 0.01 for key, tensor in image.state_dict().items()}
    before, after = image_model(name), stir(patch_vit(image_model(name)))
    before.load_state_dict(checkpoint)
    patch_vit(before)
    temporal = {key: parameter.clone() for key, parameter in temporal_parameters(after).items()}
    before.load_state_dict(temporal, strict=False)
    after.load_state_dict(checkpoint, strict=True)
    assert_same(encode(after, clips()), encode(before, clips()))
    for key, parameter in temporal_parameters(after).items():
        assert torch.equal(parameter, temporal[key])


@FEW
def test_a_video_checkpoint_needs_all_temporal_keys_and_only_these(name: str) -> None:
    model = patch_vit(image_model(name))
    state = stir(copy.deepcopy(model)).state_dict()
    model.load_state_dict(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    key = next(key for key in state if "temporal_" in key)
    with pytest.raises(RuntimeError, match=r"Missing key.*temporal_"):
        model.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*temporal_"):
        image_model(name).load_state_dict(state)


@TWO
def test_a_checkpoint_of_another_number_of_frames_loads_interpolated(name: str) -> None:
    long, short = patch_vit(image_model(name), frames=16, init="random"), patch_vit(image_model(name), frames=8)
    embedding = long.temporal_encoder.embedding
    state = long.state_dict()
    short.load_state_dict(state)
    assert torch.equal(short.temporal_encoder.embedding.weight, embedding.at(8))
    assert state["temporal_encoder.embedding.weight"].shape[1] == 16
    assert_same(encode(short, clips(8)), encode(long, clips(8)), rtol=1e-5, atol=1e-6)


# ---- training -------------------------------------------------------------------------------------------------------


@FEW
@PLACEMENT
def test_checkpointing_changes_neither_output_nor_gradients(name: str, placement: str) -> None:
    model, video = stir(patch_vit(image_model(name), placement=placement)).train(), clips()
    results = []
    for enable in (False, True):
        tower(model).set_grad_checkpointing(enable)
        model.zero_grad()
        output = encode(model, video)
        output[0].square().sum().backward()
        results.append((output, tuple(p.grad for p in tower(model).parameters() if p.grad is not None)))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


@TWO
def test_checkpointing_runs_the_temporal_layers_again_in_backward(name: str) -> None:
    model = patch_vit(image_model(name), layers=1).train()
    model.set_grad_checkpointing(True)
    calls = []
    model.temporal_encoder.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    encode(model, clips())[0].sum().backward()
    assert len(calls) == 2


@FEW
@PLACEMENT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_run_and_stay_close(name: str, placement: str, dtype: torch.dtype) -> None:
    model, video = stir(patch_vit(image_model(name), placement=placement)), clips()
    expected = encode(model, video)
    model.to(dtype)
    output = encode(model, video.to(dtype))
    assert output[0].dtype == dtype
    assert_same((output[0].float(),), (expected[0],), rtol=0.1, atol=0.1)


@FEW
@PLACEMENT
def test_autocast_keeps_the_dtype_of_the_stream(name: str, placement: str) -> None:
    image, video = image_model(name), clips()
    with torch.autocast("cpu", torch.bfloat16):
        expected = encode(image, video[:, 0])[0].dtype
    model = stir(patch_vit(image, placement=placement)).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = encode(model, video)
    assert output[0].dtype == expected
    output[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@TWO
def test_a_model_converted_before_patching_gets_temporal_layers_of_its_dtype(name: str) -> None:
    model = patch_vit(image_model(name).bfloat16().requires_grad_(False))
    assert {p.dtype for p in temporal_parameters(model).values()} == {torch.bfloat16}
    assert all(p.requires_grad for p in temporal_parameters(model).values())
    model(clips().bfloat16())


@TWO
@PLACEMENT
def test_a_compiled_model_needs_one_more_graph_when_frames_first_change_and_no_other(name: str, placement: str) -> None:
    torch._dynamo.reset()
    model = stir(patch_vit(image_model(name), placement=placement, frames=6, layers=2)).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    graphs = torch._dynamo.utils.counters["stats"]
    start = graphs["unique_graphs"]
    for frames, batch, limit in (
        (4, 2, 1),
        (6, 2, 2),
        (5, 2, 2),
        (9, 2, 2),
        (2, 2, 2),
        (9, 3, 3),
        (7, 5, 3),
        (3, 4, 3),
    ):
        torch.testing.assert_close(compiled(clips(frames, batch)), model(clips(frames, batch)), rtol=1e-4, atol=1e-5)
        assert graphs["unique_graphs"] - start <= limit, (frames, batch)
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "placement"), [("timm", "replace"), ("open_clip", "append")])
def test_a_compiled_model_has_the_gradients_of_the_eager_one(name: str, placement: str) -> None:
    torch._dynamo.reset()
    model = stir(patch_vit(image_model(name), placement=placement, frames=6, layers=1)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for frames in (4, 5):
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            run(clips(frames)).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@TWO
def test_a_checkpointed_model_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    model = stir(patch_vit(image_model(name), layers=1)).train()
    model.set_grad_checkpointing(True)
    output = torch.compile(model, fullgraph=True, backend="eager")(clips())
    torch.testing.assert_close(output, model(clips()), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@TWO
def test_a_model_exports_for_clips_of_any_size(name: str) -> None:
    model = stir(patch_vit(image_model(name), layers=1))
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("frames", min=2, max=64)}}
    exported = torch.export.export(model, (clips(),), dynamic_shapes=sizes).module()
    torch.testing.assert_close(exported(clips(6, batch=3)), model(clips(6, batch=3)), rtol=1e-4, atol=1e-5)


@TWO
@pytest.mark.parametrize(
    "attention", [masks.kmct, "dilated", masks.kmt(FRAMES, 5)], ids=["callable", "dilated", "KronMask"]
)
def test_masks_of_one_size_compile_without_a_graph_break(name: str, attention) -> None:
    torch._dynamo.reset()
    model = stir(patch_vit(image_model(name), attention=attention, frames=FRAMES))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for frames in (FRAMES,) if isinstance(attention, KronMask) else (FRAMES, 3, 5):
        torch.testing.assert_close(compiled(clips(frames)), model(clips(frames)), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@TWO
def test_distributed_training_finds_no_unused_parameter(name: str, tmp_path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(patch_vit(image_model(name)).train())
        for _ in range(2):  # the second forward raises if the first left a parameter without gradient
            model(clips()).sum().backward()
    finally:
        dist.destroy_process_group()


@EVERY
@PLACEMENT
def test_parameter_groups_hold_each_trainable_parameter_once(name: str, placement: str) -> None:
    model = patch_vit(image_model(name), placement=placement)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    groups = param_groups(model, lr=1e-3, temporal_lr_mult=10, weight_decay=0.1)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()} - {id(frozen)}
    by_id = {id(parameter): group for group in groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        if parameter is frozen:
            continue
        group = by_id[id(parameter)]
        assert group["lr"] == pytest.approx(1e-2 if "temporal_" in key else 1e-3)
        embedding = any(word in key for word in ("pos_embed", "token", "_embedding", "embedding.weight", "logit_scale"))
        if "token_embedding" in key:
            embedding = False
        assert (group["weight_decay"] == 0) == (parameter.ndim < 2 or embedding), key
    assert all(group["params"] for group in groups)
    torch.optim.AdamW(groups)


# ---- arguments ------------------------------------------------------------------------------------------------------


@TWO
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "inside"}, "'append', 'interleave', 'replace'"),
        ({"init": "ones"}, "'zero', 'random', 'copy'"),
        ({"attention": "kmtt"}, "kmt, kmct"),
        ({"attention": 3}, "name, a KronMask or a callable"),
        ({"frames": 0}, "frames must be"),
        ({"frames": 2.0}, "frames must be"),
        ({"layers": 0}, "number of temporal blocks"),
        ({"layers": [0, 1]}, "number of temporal blocks"),
        ({"layers": 4, "init": "copy"}, "3 image blocks to copy from"),
        ({"placement": "interleave", "layers": 4}, "from 1 to 3"),
        ({"placement": "replace", "layers": [3]}, "from 0 to 2"),
        ({"placement": "replace", "layers": [0, -3]}, "different block indices"),
        ({"placement": "interleave", "layers": []}, "block indices"),
        ({"placement": "interleave", "layers": "all"}, "block indices"),
    ],
)
def test_bad_arguments_are_refused_with_the_choices_and_change_nothing(name: str, options: dict, message: str) -> None:
    model = image_model(name)
    types, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        patch_vit(model, **options)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == keys


@TWO
@pytest.mark.parametrize(
    ("layers", "indices"), [(None, [0, 1, 2]), (1, [0, 1, 2]), (2, [1]), (3, [2]), ([2, 0], [0, 2]), ([-1], [2])]
)
def test_layers_choose_blocks(name: str, layers, indices: list[int]) -> None:
    interleaved = patch_vit(image_model(name), placement="interleave", layers=layers).temporal_encoder
    assert list(interleaved.residuals) == [str(index) for index in indices]
    replaced = patch_vit(image_model(name), placement="replace", layers=layers)
    assert replaced.temporal_encoder.replaced == tuple(indices)
    assert sum(hasattr(module, "temporal_mask") for module in replaced.modules()) == len(indices)


@TWO
def test_patching_twice_and_unpatching_an_image_model_are_refused(name: str) -> None:
    model = image_model(name)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_vit(model)
    patch_vit(model)
    with pytest.raises(ValueError, match="patched already"):
        patch_vit(model)
    unpatch_vit(model)
    patch_vit(model, placement="replace")
    assert any(isinstance(module, VideoTower) for module in model.modules())


def test_an_unknown_model_is_refused_with_the_families() -> None:
    with pytest.raises(TypeError, match=r"Linear.*timm, open_clip"):
        patch_vit(nn.Linear(2, 2))


def test_importing_kronmask_imports_no_model_library() -> None:
    code = "import sys, kronmask; assert not {'timm', 'open_clip', 'torchvision', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@TWO
def test_the_forced_backend_is_used(name: str) -> None:
    model, video = stir(patch_vit(image_model(name))), clips()
    with attention_backend("dense"):
        dense = encode(model, video)
    assert_same(encode(model, video), dense, rtol=1e-4, atol=1e-5)

"""Vision transformers of Hugging Face: every class that `patch_vit` knows, as a small model from a configuration."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kronmask import masks, patch_vit, temporal_parameters, unpatch_vit
from kronmask.patch import VideoEncoder
from kronmask.patch.transformers import from_pretrained

pytestmark = [
    pytest.mark.filterwarnings("ignore:placement='replace' with attention"),
    pytest.mark.filterwarnings("ignore:`?(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag|flex_attention called without torch.compile"),
]

BATCH, FRAMES, SIZE, PATCH, WIDTH = 2, 3, 32, 16, 24
VISION = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
VISION |= {"image_size": SIZE, "patch_size": PATCH}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT |= {"vocab_size": 20, "max_position_embeddings": 7, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IDS = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])

Build = Callable[..., nn.Module]


def vision(model: str, config: str, **sizes: Any) -> Build:
    """A function that makes a vision model; its options go to `_from_config` (`attn_implementation`)."""

    def build(**options: Any) -> nn.Module:
        made = getattr(transformers, config)(**VISION | sizes)
        return getattr(transformers, model)._from_config(made, **options)

    return build


def with_text(model: str, config: str, **sizes: Any) -> Build:
    """The same for a model of images and texts."""

    def build(**options: Any) -> nn.Module:
        siglip = "Siglip" in config
        text = TEXT | ({"projection_size": WIDTH} if siglip else {})
        made = getattr(transformers, config)(
            text_config=text, vision_config=VISION | sizes, **{} if siglip else {"projection_dim": 8}
        )
        return getattr(transformers, model)._from_config(made, **options)

    return build


ALL: dict[str, Build] = {
    "ViTModel": vision("ViTModel", "ViTConfig"),
    "ViTForImageClassification": vision("ViTForImageClassification", "ViTConfig", num_labels=5),
    "DeiTModel": vision("DeiTModel", "DeiTConfig"),
    "DeiTForImageClassification": vision("DeiTForImageClassification", "DeiTConfig"),
    "DeiTForImageClassificationWithTeacher": vision("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "BeitModel": vision("BeitModel", "BeitConfig", use_absolute_position_embeddings=True, use_mask_token=True),
    "BeitModel-bias": vision("BeitModel", "BeitConfig", use_relative_position_bias=True, use_mean_pooling=False),
    "BeitModel-shared-bias": vision("BeitModel", "BeitConfig", use_shared_relative_position_bias=True),
    "BeitForImageClassification": vision("BeitForImageClassification", "BeitConfig"),
    "Dinov2Model": vision("Dinov2Model", "Dinov2Config", mlp_ratio=2),
    "Dinov2ForImageClassification": vision("Dinov2ForImageClassification", "Dinov2Config", use_swiglu_ffn=True),
    "Dinov2WithRegistersModel": vision("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
    "DINOv3ViTModel": vision("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
    "DINOv3ViTModel-gated": vision("DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, hidden_act="silu"),
    "ViTMAEModel": vision("ViTMAEModel", "ViTMAEConfig", patch_size=8),
    "ViTMSNModel": vision("ViTMSNModel", "ViTMSNConfig"),
    "IJepaModel": vision("IJepaModel", "IJepaConfig"),
    "CLIPVisionModel": vision("CLIPVisionModel", "CLIPVisionConfig"),
    "CLIPVisionModelWithProjection": vision("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=8),
    "CLIPModel": with_text("CLIPModel", "CLIPConfig"),
    "MetaClip2VisionModel": vision("MetaClip2VisionModel", "MetaClip2VisionConfig"),
    "SiglipVisionModel": vision("SiglipVisionModel", "SiglipVisionConfig"),
    "SiglipModel": with_text("SiglipModel", "SiglipConfig"),
    "Siglip2VisionModel": vision("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=16, patch_size=4),
    "Siglip2Model": with_text("Siglip2Model", "Siglip2Config", num_patches=16, patch_size=4),
}
MODELS = {name: build for name, build in ALL.items() if hasattr(transformers, name.partition("-")[0])}
"""Small models by name; each value is a function that makes one."""

NOT_REPLACED = {
    "BeitModel-bias": "bias for the relative position",
    "BeitModel-shared-bias": "bias for the relative position",
    "Siglip2VisionModel": "masks the padding",
    "Siglip2Model": "masks the padding",
}
NOT_COPIED = {
    "BeitModel-bias": "bias for the relative position",
    "BeitModel-shared-bias": "bias for the relative position",
    "DINOv3ViTModel": "rotates queries and keys",
    "DINOv3ViTModel-gated": "rotates queries and keys",
    "Dinov2ForImageClassification": "MLP is not two linear layers",
}
OLD = int(transformers.__version__.partition(".")[0]) < 5
EAGER_CLASSES = [name for name in ALL if OLD and re.match("Beit|CLIP|Siglip", name)]
"""Models whose eager attention is a class of its own in older releases, which no kernel can be put into."""
PLACEMENTS = ("append", "interleave", "replace")

EVERY = pytest.mark.parametrize("name", MODELS)
TEMPORAL = pytest.mark.parametrize("placement", ["append", "interleave"])
REPLACEABLE = [name for name in MODELS if name not in NOT_REPLACED]
PLACED = [
    (name, placement) for name in MODELS for placement in PLACEMENTS if placement != "replace" or name in REPLACEABLE
]
EVERY_PLACED = pytest.mark.parametrize(("name", "placement"), PLACED)
PLACED_ONCE = [PLACED[index] for index in range(0, len(PLACED), 2)]  # each model, and all placements among them
SOME_PLACED = pytest.mark.parametrize(("name", "placement"), PLACED_ONCE)
FEW = ["ViTForImageClassification", "Dinov2Model", "CLIPModel"]
FEW_PLACED = pytest.mark.parametrize(("name", "placement"), [case for case in PLACED if case[0] in FEW])


def image_model(name: str, **options: Any) -> Any:
    """A small image model in which every parameter matters (nothing is left at zero or one)."""
    torch.manual_seed(0)
    model = MODELS[name](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def video_model(name: str, placement: str = "append", **options: Any) -> Any:
    """A patched model, in which the temporal parameters matter too."""
    model = patch_vit(image_model(name), placement=placement, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in temporal_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def encoder(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, VideoEncoder))


def clips(name: str, batch: int = BATCH, frames: int = FRAMES) -> dict[str, Tensor]:
    """What the vision model takes for clips: pixel values first, the rest as its arguments come."""
    generator = torch.Generator().manual_seed(1)
    if name.startswith("Siglip2"):
        pixels = torch.randn(batch, frames, 16, 3 * 4 * 4, generator=generator)
        seen = torch.arange(16) < torch.tensor([16] + [12] * (batch - 1))[:, None]
        shapes = torch.tensor([[4, 4]] + [[3, 4]] * (batch - 1))
        return {"pixel_values": pixels, "pixel_attention_mask": seen.long(), "spatial_shapes": shapes}
    inputs = {"pixel_values": torch.randn(batch, frames, 3, SIZE, SIZE, generator=generator)}
    if name == "ViTMAEModel":
        inputs["noise"] = torch.rand(batch, 16, generator=generator)
    return inputs


def folded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The frames of clips as a batch of images."""
    frames = inputs["pixel_values"].shape[1]
    return {k: v.flatten(0, 1) if k == "pixel_values" else v.repeat_interleave(frames, 0) for k, v in inputs.items()}


def encode(model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The floating-point outputs of the vision part, by name."""
    output = (
        model.get_image_features(*args, **kwargs) if hasattr(model, "get_image_features") else model(*args, **kwargs)
    )
    output = output if isinstance(output, Mapping) else {"image_embeds": output}
    return {k: v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def averaged(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image model on each frame, averaged over the frames."""
    sizes = inputs["pixel_values"].shape[:2]
    return {k: v.unflatten(0, sizes).mean(1) for k, v in encode(model, **folded(inputs)).items()}


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return any(not torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def close(first: Any, second: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def description(model: Any) -> list[Any]:
    """All of a model but the values of its parameters."""
    modules = [
        (name, type(module), {k: id(v) for k, v in vars(module).items()}) for name, module in model.named_modules()
    ]
    return [modules, list(model.state_dict()), model.config.to_dict()]


# ---- the patched model and the image model --------------------------------------------------------------------------


def test_only_classes_of_newer_releases_are_left_out() -> None:
    newer = {"DINOv3ViTModel", "DINOv3ViTModel-gated", "MetaClip2VisionModel"}
    assert set(ALL) - set(MODELS) <= newer


@EVERY
@TEMPORAL
def test_zero_init_is_the_image_model_averaged_over_frames(name: str, placement: str) -> None:
    model, inputs = image_model(name), clips(name)
    expected = averaged(model, inputs)
    assert patch_vit(model, placement=placement) is model
    close(encode(model, **inputs), expected)
    assert differ(encode(video_model(name, placement), **inputs), expected)


@pytest.mark.parametrize("name", REPLACEABLE)
def test_replace_under_the_spatial_mask_is_the_image_model_averaged_over_frames(name: str) -> None:
    model, inputs = image_model(name), clips(name)
    expected = averaged(model, inputs)
    patch_vit(model, placement="replace", attention="spatial", temporal_embedding=False)
    assert not temporal_parameters(model)
    close(encode(model, **inputs), expected)
    joint = patch_vit(unpatch_vit(model), placement="replace", attention="joint", temporal_embedding=False)
    assert differ(encode(joint, **inputs), expected)


@pytest.mark.parametrize("name", NOT_REPLACED)
def test_a_placement_that_cannot_serve_says_why_and_changes_nothing(name: str) -> None:
    model = image_model(name)
    before = description(model)
    with pytest.raises(TypeError, match=rf"^placement='replace' cannot serve [^\n]*{NOT_REPLACED[name]}[^\n]*$"):
        patch_vit(model, placement="replace")
    assert description(model) == before


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel"])
def test_attention_dropout_is_refused_in_replaced_attention(name: str) -> None:
    model = image_model(name)
    before = description(model)
    attention = next(m for m in model.modules() if hasattr(m, "q_proj") or hasattr(m, "query"))
    rate = next(k for k in ("attention_dropout", "dropout_prob", "dropout") if hasattr(attention, k))
    setattr(attention, rate, 0.1)
    with pytest.raises(ValueError, match="attention dropout 0.1"):
        patch_vit(model, placement="replace")
    setattr(attention, rate, 0.0)
    assert [entry[:2] for entry in description(model)[0]] == [entry[:2] for entry in before[0]]


@SOME_PLACED
def test_arguments_by_position_and_by_name_are_the_same(name: str, placement: str) -> None:
    model, inputs = video_model(name, placement), clips(name)
    close(encode(model, *inputs.values()), encode(model, **inputs), 0)


@EVERY
def test_images_are_clips_of_one_frame(name: str) -> None:
    model, inputs = video_model(name), clips(name, frames=1)
    images = inputs | {"pixel_values": inputs["pixel_values"][:, 0]}
    close(encode(model, **images), encode(model, **inputs), 0)


@EVERY
def test_outputs_are_the_mean_of_the_frames_and_tokens_are_reachable(name: str) -> None:
    model, inputs = video_model(name), clips(name)
    video = encoder(model)
    output, frames = video(*inputs.values()), video.forward_frames(*inputs.values())
    assert frames.last_hidden_state.shape[:2] == (BATCH, FRAMES)
    close(frames.last_hidden_state.mean(1), output.last_hidden_state)
    tokens = video.forward_tokens(*inputs.values())
    assert tokens.shape == frames.last_hidden_state.shape
    norm = next((m for n, m in video.named_children() if n in ("layernorm", "norm", "post_layernorm")), nn.Identity())
    close(tokens if name.startswith(("CLIP", "MetaClip")) else norm(tokens), frames.last_hidden_state)


@pytest.mark.parametrize("name", ["BeitModel", "Dinov2Model"])
def test_the_masked_patches_of_a_clip_are_those_of_its_frames(name: str) -> None:
    model, pixels = image_model(name), clips(name)["pixel_values"]
    masked = torch.tensor([[True, False, True, False], [False, False, False, True]])
    images = model(pixels.flatten(0, 1), bool_masked_pos=masked.repeat_interleave(FRAMES, 0)).last_hidden_state
    expected = images.unflatten(0, (BATCH, FRAMES)).mean(1)
    patch_vit(model)
    close(model(pixels, masked).last_hidden_state, expected)
    close(model(pixels, bool_masked_pos=masked).last_hidden_state, expected)
    with pytest.raises(TypeError, match="multiple values"):
        model(pixels, masked, bool_masked_pos=masked)


def test_an_autoencoder_masks_the_same_patches_in_all_frames_of_a_clip() -> None:
    image, model = image_model("ViTMAEModel"), video_model("ViTMAEModel")
    pixels, noise = clips("ViTMAEModel")["pixel_values"], torch.rand(BATCH, 16)
    expected = image(pixels[:, 0], noise=noise)
    for output in (model(pixels, noise=noise), model(pixels, noise)):
        assert torch.equal(output.mask, expected.mask)
        assert torch.equal(output.ids_restore, expected.ids_restore)
    assert torch.equal(model(pixels, noise, return_dict=False)[2], expected.ids_restore)
    drawn = [model(pixels).mask for _ in range(4)]
    assert all(set(mask.unique().tolist()) == {0, 1} for mask in drawn)
    assert any(not torch.equal(drawn[0], mask) for mask in drawn)
    assert any(not torch.equal(mask[0], mask[1]) for mask in drawn)
    assert model.forward_tokens(pixels).shape == (BATCH, FRAMES, 1 + 4, WIDTH)


def test_a_loss_of_labels_is_that_of_the_averaged_logits() -> None:
    model, pixels = video_model("ViTForImageClassification"), clips("ViTForImageClassification")["pixel_values"]
    labels = torch.tensor([1, 4])
    output = model(pixels, labels=labels)
    close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert output.logits.shape == (BATCH, 5)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Siglip2Model"])
def test_clips_and_texts_are_compared_by_the_features_of_the_clips(name: str) -> None:
    model, inputs = video_model(name), clips(name)
    features = model.get_image_features(**inputs)
    features = features if isinstance(features, Tensor) else features.pooler_output
    output = model(input_ids=IDS, **inputs)
    assert output.logits_per_image.shape == (BATCH, 2)
    close(output.image_embeds, features / features.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_COPIED and "Model" in name[-9:]])
def test_a_copied_block_computes_what_the_image_block_does(name: str) -> None:
    """Under the spatial mask and without temporal embedding, appended copies of blocks run these blocks again."""
    if name.startswith("Siglip2"):
        pytest.skip("a copied block sees the padding")
    model, inputs = image_model(name), clips(name)
    twice = copy.deepcopy(model)
    blocks = next(
        m for n, m in twice.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 3 and "text" not in n
    )
    for block in list(blocks)[1:]:
        blocks.append(copy.deepcopy(block))
    for module in twice.modules():
        if hasattr(module, "config") and hasattr(module.config, "num_hidden_layers"):
            module.config.num_hidden_layers = 5
    patch_vit(model, init="copy", layers=2, attention="spatial", temporal_embedding=False)
    close(encode(model, **inputs), averaged(twice, inputs), 1e-4)


@pytest.mark.parametrize("name", [name for name in NOT_COPIED if name in MODELS])
def test_a_block_that_is_more_than_its_copy_would_be_is_not_copied(name: str) -> None:
    model = image_model(name)
    before = description(model)
    with pytest.raises(ValueError, match=f"init='copy' cannot copy .*{NOT_COPIED[name]}"):
        patch_vit(model, init="copy")
    assert description(model) == before


# ---- unpatching, copies ---------------------------------------------------------------------------------------------


@EVERY_PLACED
def test_unpatching_restores_types_attributes_keys_configuration_and_outputs(name: str, placement: str) -> None:
    model, inputs = image_model(name), folded(clips(name))
    expected, before = encode(model, **inputs), description(model)
    patch_vit(model, placement=placement)
    assert description(model) != before
    assert unpatch_vit(model) is model
    assert description(model) == before
    close(encode(model, **inputs), expected, 0)


def test_a_model_is_unpatched_from_any_model_around_it() -> None:
    model = image_model("CLIPModel")
    before = description(model)
    patch_vit(model)
    unpatch_vit(nn.ModuleDict({"inner": model}))
    assert description(model) == before
    patch_vit(model.vision_model)
    unpatch_vit(model)
    assert description(model) == before


@EVERY_PLACED
def test_every_new_key_says_temporal_and_pretrained_keys_keep_their_names(name: str, placement: str) -> None:
    model = image_model(name)
    before = list(model.state_dict())
    patch_vit(model, placement=placement)
    new = [key for key in model.state_dict() if key not in before]
    assert [key for key in model.state_dict() if key in before] == before
    assert new
    assert all("temporal_encoder." in key for key in new)
    assert set(temporal_parameters(model)) == set(new)


@SOME_PLACED
def test_a_patched_class_has_the_name_by_which_transformers_knows_the_image_class(name: str, placement: str) -> None:
    image, model = image_model(name), video_model(name, placement)
    for module, patched in zip(
        image.modules(), (m for n, m in model.named_modules() if "temporal_" not in n), strict=True
    ):
        if isinstance(module, transformers.PreTrainedModel):
            assert str(type(patched)) == str(type(module))
            assert type(patched).config_class is type(module).config_class


@SOME_PLACED
def test_a_deep_copy_is_isolated_from_its_original(name: str, placement: str) -> None:
    model, inputs = video_model(name, placement), clips(name)
    expected, clone = encode(model, **inputs), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    close(encode(clone, **inputs), expected, 0)
    clone.load_state_dict(model.state_dict())
    assert not differ(encode(clone, **inputs), encode(model, **inputs))
    unpatch_vit(model)
    assert encoder(clone) is not None
    assert "kronmask" not in model.config.to_dict()
    assert "kronmask" in clone.config.to_dict()


@SOME_PLACED
def test_a_model_survives_pickling(name: str, placement: str) -> None:
    model, inputs = video_model(name, placement, attention="causal"), clips(name)
    pickled, file = pickle.dumps(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    clone, saved = pickle.loads(pickled), torch.load(file, weights_only=False)
    close(encode(clone, **inputs), encode(model, **inputs), 0)
    assert [type(module) for module in clone.modules()] == [type(module) for module in model.modules()]
    close(encode(unpatch_vit(saved), **folded(inputs)), encode(unpatch_vit(model), **folded(inputs)), 0)


# ---- what is returned -----------------------------------------------------------------------------------------------


def vision_output(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """The output of the vision model itself, out of that of a model of images and texts."""
    if hasattr(model, "get_image_features"):
        return model(input_ids=IDS, **inputs, **options).vision_model_output
    return model(**inputs, **options)


@EVERY
@TEMPORAL
def test_hidden_states_and_attention_weights_keep_their_frames(name: str, placement: str) -> None:
    model, inputs = image_model(name, attn_implementation="eager"), clips(name)
    options = {"output_hidden_states": True, "output_attentions": True}
    images = folded(inputs)
    if hasattr(model, "get_image_features"):
        expected = model(input_ids=IDS.repeat_interleave(FRAMES, 0), **images, **options).vision_model_output
    else:
        expected = model(**images, **options)
    output = vision_output(patch_vit(model, placement=placement), inputs, **options)
    for field, ndim, length in (("hidden_states", 4, 4), ("attentions", 5, 3)):
        assert len(output[field]) == len(expected[field]) == length
        for frames, image in zip(output[field], expected[field], strict=True):
            assert frames.ndim == ndim
            close(frames, image.unflatten(0, (BATCH, FRAMES)))


@EVERY
def test_the_last_hidden_state_is_that_behind_the_temporal_blocks(name: str) -> None:
    model, inputs = video_model(name), clips(name)
    hidden = vision_output(model, inputs, output_hidden_states=True).hidden_states
    before = vision_output(patch_vit(image_model(name)), inputs, output_hidden_states=True).hidden_states
    close(hidden[:-1], before[:-1])
    assert not torch.allclose(hidden[-1], before[-1], atol=1e-4)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModel"])
def test_hidden_states_can_be_asked_for_in_the_configuration(name: str) -> None:
    model, inputs = image_model(name), clips(name)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.output_hidden_states = True
    states = patch_vit(model)(**inputs).hidden_states
    assert [state.shape[:2] for state in states] == [(BATCH, FRAMES)] * 4


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("option", ["output_attentions", "attention_mask"])
def test_replaced_attention_refuses_what_it_cannot_give(name: str, option: str) -> None:
    model, inputs = video_model(name, "replace", attention="causal"), clips(name)
    video = encoder(model)
    value = True if option == "output_attentions" else torch.ones(BATCH, 5)
    with pytest.raises(ValueError, match=f"placement='replace' .* leave {option} out"):
        video(inputs["pixel_values"], **{option: value})
    assert video(inputs["pixel_values"], output_hidden_states=True).hidden_states[0].shape == (BATCH, FRAMES, 5, WIDTH)


@SOME_PLACED
def test_a_tuple_has_the_values_of_the_output(name: str, placement: str) -> None:
    model, inputs = video_model(name, placement), clips(name)
    inputs = inputs | ({"input_ids": IDS} if hasattr(model, "get_image_features") else {})
    options = {"output_hidden_states": True}
    close(model(**inputs, **options, return_dict=False), model(**inputs, **options).to_tuple(), 0)


@EVERY_PLACED
def test_implementations_of_attention_are_equal(name: str, placement: str) -> None:
    inputs, options = clips(name), {"placement": placement, "attention": "causal", "init": "random"}
    eager = image_model(name, attn_implementation="eager")
    if placement == "replace" and name in EAGER_CLASSES:
        with pytest.raises(TypeError, match="attn_implementation='sdpa'"):
            patch_vit(eager, **options)
        return
    outputs = []
    for model in (eager, image_model(name)):
        torch.manual_seed(3)
        outputs.append(encode(patch_vit(model, **options), **inputs))
    close(*outputs)


@pytest.mark.skipif(OLD, reason="vision models have no flex_attention in this release")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["ViTModel", "CLIPModel"])
def test_flex_attention_is_equal_too_also_when_it_is_set_later(name: str, placement: str) -> None:
    options = {"placement": placement, "attention": "causal", "layers": 1}
    expected = encode(video_model(name, **options), **clips(name))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        later = video_model(name, **options)
        later.set_attn_implementation("flex_attention")
        close(encode(later, **clips(name)), expected)
        torch.manual_seed(0)
        sooner = image_model(name, attn_implementation="flex_attention")
        patch_vit(sooner, **options)
        sooner.load_state_dict(later.state_dict())
        close(encode(sooner, **clips(name)), expected)


# ---- training -------------------------------------------------------------------------------------------------------


@FEW_PLACED
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_outputs_nor_gradients(name: str, placement: str, reentrant: bool) -> None:
    model, inputs = video_model(name, placement, attention="causal").train(), clips(name)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        output = encode(model, **inputs)
        sum(value.square().sum() for value in output.values()).backward()
        results.append((output, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}))
    close(results[0], results[1], 1e-6)
    assert set(temporal_parameters(model)) <= set(results[1][1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_the_temporal_layers_again_in_the_backward(reentrant: bool) -> None:
    model = video_model("ViTModel").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls: list[int] = []
    model.temporal_encoder.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model(**clips("ViTModel")).last_hidden_state.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_one_backward_through_clips_of_several_lengths_has_the_right_gradients(placement: str, reentrant: bool) -> None:
    """All forwards have six frames, and each must be recomputed with its own number of frames in a clip."""
    model = video_model("ViTModel", placement, attention="causal").train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        outputs = [model(**clips("ViTModel", batch, frames)) for batch, frames in ((2, 3), (3, 2), (1, 6))]
        sum(output.last_hidden_state.square().sum() for output in outputs).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    close(*gradients, 1e-4)


@FEW_PLACED
def test_every_temporal_parameter_learns(name: str, placement: str) -> None:
    model = patch_vit(image_model(name), init="random", placement=placement, attention="causal").train()
    sum(value.square().sum() for value in encode(model, **clips(name)).values()).backward()
    for key, parameter in temporal_parameters(model).items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


class Clips(torch.utils.data.Dataset):
    """Four clips with labels, as `Trainer` wants them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(FRAMES, 3, SIZE, SIZE, generator=generator), "labels": index}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_a_step_and_saves_a_model_that_loads(tmp_path: Path, checkpointing: bool) -> None:
    model = patch_vit(image_model("ViTForImageClassification"), init="random")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=checkpointing,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Clips())
    result = trainer.train()
    assert 0 < result.training_loss < 10
    assert all(not torch.equal(before[key], model.state_dict()[key]) for key in temporal_parameters(model))
    assert not torch.equal(before["classifier.weight"], model.classifier.weight)
    trainer.save_model(str(tmp_path / "model"))
    inputs = clips("ViTForImageClassification")
    restored = from_pretrained(type(model), tmp_path / "model").eval()
    close(encode(restored, **inputs), encode(model.eval(), **inputs), 0)


@pytest.mark.parametrize("placement", ["append", "interleave"])
def test_adapters_train_and_the_temporal_layers_are_trained_beside_them(placement: str) -> None:
    peft = pytest.importorskip("peft")
    model = patch_vit(image_model("ViTForImageClassification"), init="random", placement=placement)
    names = {name.rpartition(".")[2] for name, module in model.vit.named_modules() if isinstance(module, nn.Linear)}
    config = peft.LoraConfig(
        target_modules=sorted(names & {"q_proj", "v_proj", "query", "value"}), modules_to_save=["temporal_encoder"]
    )
    inputs = clips("ViTForImageClassification")
    expected = encode(model, **inputs)
    adapted = peft.get_peft_model(model, config)
    close(encode(adapted, **inputs), expected, 0)

    adapted(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    learned = {key for key, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert learned == {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    trained = {key for key in learned if "temporal_encoder.modules_to_save.default" in key}
    assert len(trained) == len([key for key in temporal_parameters(model) if ".original_module." in key])
    assert any("lora_A" in key for key in learned)
    assert all("lora_" in key or key in trained for key in learned)

    with torch.no_grad():  # the original is out of use, the copy is in use
        for key, parameter in temporal_parameters(adapted).items():
            if ".original_module." in key:
                parameter.fill_(9)
    close(encode(adapted, **inputs), expected, 0)
    with torch.no_grad():
        for key in trained:
            adapted.get_parameter(key).add_(torch.randn_like(adapted.get_parameter(key)))
    changed = encode(adapted, **inputs)
    assert differ(changed, expected)
    close(encode(adapted.merge_and_unload(), **inputs), changed)


# ---- compilers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "placement"),
    [("ViTModel", "append"), ("CLIPVisionModel", "replace")],
)
def test_a_compiled_model_has_no_graph_break_and_the_outputs_of_the_eager_one(name: str, placement: str) -> None:
    torch._dynamo.reset()
    model = video_model(name, placement, attention="causal", layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for frames in (FRAMES, 2):
        inputs = clips(name, frames=frames)
        close(dict(compiled(**inputs)), dict(model(**inputs)))
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "placement"), [("ViTModel", "replace"), ("CLIPVisionModel", "append")])
def test_a_compiled_model_has_the_gradients_of_the_eager_one(name: str, placement: str) -> None:
    torch._dynamo.reset()
    model, inputs = video_model(name, placement, attention="causal", layers=1).train(), clips(name)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(**inputs).pooler_output.square().sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    close(*gradients, 1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("placement", ["append", "replace"])
def test_a_model_exports_for_clips_of_any_size(placement: str) -> None:
    model = video_model("ViTModel", placement, attention="causal", layers=1)
    sizes = {
        "pixel_values": {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("frames", min=2, max=64)}
    }
    exported = torch.export.export(model, (), clips("ViTModel"), dynamic_shapes=sizes).module()
    inputs = clips("ViTModel", batch=3, frames=5)
    close(exported(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


# ---- files ----------------------------------------------------------------------------------------------------------


@SOME_PLACED
def test_a_saved_model_is_restored_exactly(name: str, placement: str, tmp_path: Path) -> None:
    image, inputs = image_model(name), clips(name)
    image.save_pretrained(tmp_path / "image")
    model = type(image).from_pretrained(tmp_path / "image").eval()  # an image checkpoint, and then patched
    torch.manual_seed(5)
    patch_vit(model, placement=placement, attention="causal", init="random", frames=4, layers=2)
    model.save_pretrained(tmp_path / "video")

    restored = from_pretrained(type(image), tmp_path / "video")
    assert not restored.training
    close(encode(restored, **inputs), encode(model, **inputs), 0)
    assert [type(module) for module in restored.modules()] == [type(module) for module in model.modules()]
    assert list(restored.state_dict()) == list(model.state_dict())
    assert restored.config.kronmask == model.config.kronmask
    config = json.loads((tmp_path / "video" / "config.json").read_text())
    assert config["architectures"] == [type(image).__name__]
    assert config["kronmask"]["placement"] == placement
    assert config["kronmask"]["layers"] == 2
    close(encode(unpatch_vit(restored), **folded(inputs)), encode(image, **folded(inputs)), 0)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPModel"])
@pytest.mark.parametrize("init", ["copy", "zero"])
def test_a_mask_and_the_way_of_initialisation_come_back_from_the_file(name: str, init: str, tmp_path: Path) -> None:
    mask = masks.kmct(FRAMES, 5) | masks.axial(FRAMES, 5)
    model = video_model(name, attention=mask, frames=FRAMES, init=init, layers=1)
    model.save_pretrained(tmp_path)
    restored = from_pretrained(type(model), tmp_path)
    close(encode(restored, **clips(name)), encode(model, **clips(name)), 0)
    assert restored.config.kronmask == model.config.kronmask
    assert restored.config.kronmask["init"] == init
    assert encoder(restored).temporal_encoder.blocks[0].attn.mask.attention == mask


def test_a_function_is_asked_for(tmp_path: Path) -> None:
    inputs, options = clips("ViTModel"), {"placement": "interleave", "layers": [0, 2], "temporal_embedding": False}
    model = video_model("ViTModel", attention=masks.kmct, **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was a function.*attention="):
        from_pretrained(type(model), tmp_path)
    restored = from_pretrained(transformers.ViTModel, tmp_path, attention=masks.kmct)
    close(encode(restored, **inputs), encode(model, **inputs), 0)
    assert list(restored.state_dict()) == list(model.state_dict())


def test_a_file_of_an_image_model_and_a_class_of_no_model_are_refused(tmp_path: Path) -> None:
    image_model("ViTModel").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not written by a model of patch_vit; use ViTModel.from_pretrained"):
        from_pretrained(transformers.ViTModel, tmp_path)
    with pytest.raises(TypeError, match="ViTForImageClassification, not .*AutoModel"):
        from_pretrained(transformers.AutoModel, tmp_path)


def test_options_of_loading_are_those_of_transformers(tmp_path: Path) -> None:
    video_model("ViTForImageClassification").save_pretrained(tmp_path / "sub", max_shard_size="20KB")
    assert len(list((tmp_path / "sub").glob("*.safetensors"))) > 1
    model, report = from_pretrained(
        transformers.ViTForImageClassification,
        tmp_path,
        subfolder="sub",
        num_labels=7,
        ignore_mismatched_sizes=True,
        torch_dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert model.classifier.out_features == 7
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not report["unexpected_keys"]
    assert not [key for key in report["missing_keys"] if "classifier" not in key]


def test_an_encoder_and_the_classifier_around_it_read_each_other(tmp_path: Path) -> None:
    inputs = clips("ViTForImageClassification")
    model = video_model("ViTForImageClassification")
    model.save_pretrained(tmp_path / "classifier")
    encoder_alone = from_pretrained(transformers.ViTModel, tmp_path / "classifier", add_pooling_layer=False)
    close(encoder_alone(**inputs).last_hidden_state, model.vit(**inputs).last_hidden_state, 0)
    encoder_alone.save_pretrained(tmp_path / "encoder")
    classifier = from_pretrained(transformers.ViTForImageClassification, tmp_path / "encoder")
    close(classifier.vit(**inputs).last_hidden_state, model.vit(**inputs).last_hidden_state, 0)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_the_vision_model_is_read_out_of_a_model_of_images_and_texts(name: str, tmp_path: Path) -> None:
    model, pixels = video_model(name), clips(name)["pixel_values"]
    model.save_pretrained(tmp_path)
    alone = from_pretrained(getattr(transformers, name.replace("Model", "VisionModel")), tmp_path)
    expected = encoder(model)(pixels)
    close(alone(pixels).pooler_output, expected.pooler_output, 0)
    close(alone(pixels).last_hidden_state, expected.last_hidden_state, 0)


@pytest.mark.skipif(OLD, reason="in this release a vision model has a configuration of its own, which is not saved")
def test_a_model_is_restored_of_which_the_vision_model_was_patched(tmp_path: Path) -> None:
    model, inputs = image_model("CLIPModel"), clips("CLIPModel")
    patch_vit(model.vision_model, init="random")
    model.save_pretrained(tmp_path)
    close(encode(from_pretrained(type(model), tmp_path), **inputs), encode(model, **inputs), 0)


@EVERY
def test_an_image_checkpoint_loads_into_a_patched_model(name: str) -> None:
    model, image = patch_vit(image_model(name), init="random"), image_model(name)
    temporal = {key: value.clone() for key, value in temporal_parameters(model).items()}
    with torch.no_grad():
        for parameter in image.parameters():
            parameter.mul_(0.5)
    model.load_state_dict(image.state_dict())
    assert all(torch.equal(temporal_parameters(model)[key], value) for key, value in temporal.items())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in image.state_dict().items())


# ---- devices and dtypes ---------------------------------------------------------------------------------------------


@SOME_PLACED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_run_and_stay_close(name: str, placement: str, dtype: torch.dtype) -> None:
    model, inputs = video_model(name, placement, attention="causal"), clips(name)
    expected = encode(model, **inputs)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    output = encode(model.to(dtype), **inputs)
    assert all(value.dtype == dtype for key, value in output.items() if key != "mask")
    close({k: v.float() for k, v in output.items()}, expected, 0.1)
    patched_later = patch_vit(unpatch_vit(model), placement=placement)
    assert {parameter.dtype for parameter in temporal_parameters(patched_later).values()} == {dtype}


@FEW_PLACED
def test_a_model_on_the_meta_device_is_patched_and_takes_weights_later(name: str, placement: str) -> None:
    model, inputs = video_model(name, placement, attention="causal"), clips(name)
    with torch.device("meta"):
        empty = MODELS[name]().eval()
    patch_vit(empty, placement=placement, attention="causal")
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    for module, filled in zip(empty.modules(), model.modules(), strict=True):  # buffers that no state_dict has
        for key, buffer in module.named_buffers(recurse=False):
            buffer.copy_(filled.get_buffer(key))
    close(encode(empty, **inputs), encode(model, **inputs), 0)


# ---- refused --------------------------------------------------------------------------------------------------------


def small(config: str, **sizes: Any) -> Any:
    return getattr(transformers, config)(**sizes)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BertModel": (lambda: transformers.BertModel(small("BertConfig", **TEXT)), "takes no images"),
    "CLIPTextModel": (lambda: transformers.CLIPTextModel(small("CLIPTextConfig", **TEXT)), "takes no images"),
    "ViTForMaskedImageModeling": (
        lambda: transformers.ViTForMaskedImageModeling(small("ViTConfig", **VISION)),
        r"alone, model\.vit$",
    ),
    "ViTMAEForPreTraining": (
        lambda: transformers.ViTMAEForPreTraining(
            small(
                "ViTMAEConfig",
                **VISION,
                decoder_hidden_size=24,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
            )
        ),
        r"alone, model\.vit$",
    ),
    "BeitForSemanticSegmentation": (
        lambda: transformers.BeitForSemanticSegmentation(small("BeitConfig", **VISION, out_indices=[0, 1, 2, 3])),
        r"alone, model\.beit$",
    ),
    "Dinov2Backbone": (
        lambda: transformers.Dinov2Backbone(small("Dinov2Config", **VISION)),
        "maps over the patches of one image",
    ),
    "ConvNextModel": (
        lambda: transformers.ConvNextModel(small("ConvNextConfig", hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),
        "convolutional or hierarchical",
    ),
    "SwinModel": (
        lambda: transformers.SwinModel(
            small("SwinConfig", embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=SIZE)
        ),
        "convolutional or hierarchical",
    ),
    "VivitModel": (
        lambda: transformers.VivitModel(small("VivitConfig", **VISION, num_frames=2)),
        r"none of the vision transformers that are known \(.*ViTModel.*family=",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name_with_the_reason(name: str) -> None:
    build, reason = REFUSED[name]
    model = build()
    before = description(model)
    with pytest.raises(
        TypeError, match=rf"^patch_vit cannot patch transformers\.[\w.]*{re.escape(name)}: [^\n]*{reason}"
    ):
        patch_vit(model)
    assert description(model) == before


def test_a_model_with_two_vision_transformers_is_refused() -> None:
    class Pair(transformers.ViTPreTrainedModel):
        def __init__(self) -> None:
            super().__init__(small("ViTConfig", **VISION))
            self.left, self.right = (transformers.ViTModel(self.config) for _ in range(2))

    with pytest.raises(TypeError, match="2 vision transformers; pass one of them"):
        patch_vit(Pair())


def test_a_subclass_of_ones_own_is_patched_by_what_it_is_made_of() -> None:
    class TeamMAEForActions(transformers.ViTMAEModel):
        pass

    image = image_model("ViTMAEModel")
    model = TeamMAEForActions(image.config).eval()
    model.load_state_dict(image.state_dict())
    inputs = clips("ViTMAEModel")
    expected = averaged(image, inputs)
    patch_vit(model)
    assert type(model).__name__ == "TeamMAEForActions"
    close(encode(model, **inputs), expected)
    assert model(inputs["pixel_values"]).ids_restore.shape == (BATCH, 16)

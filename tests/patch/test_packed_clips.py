"""Patched models on a list of clips of different lengths: each clip comes out as it does alone, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CASES, SIZE, encode, encoder, image_model, stir
from test_transformers import MODELS, video_model
from test_transformers import encoder as hf_encoder
from torch import Tensor, nn

from kronmask import masks, patch_vit
from kronmask.clips import PackedClips
from kronmask.patch.video import _packed

pytestmark = [
    pytest.mark.filterwarnings("ignore:placement='replace' with attention"),
    pytest.mark.filterwarnings("ignore:`?(is_)?gradient_checkpointing:FutureWarning"),
]

PLACEMENT = pytest.mark.parametrize("placement", ["append", "interleave", "replace"])
TWO = pytest.mark.parametrize("name", ["timm", "open_clip"])
LENGTHS = (3, 1, 4)
MASKS: dict[str, Any] = {name: name for name in ("kmct", "axial", "temporal", "dilated")}
MASKS |= {"a function": masks.causal, "groups of heads": ["kmct", "axial"]}


def patched(name: str, placement: str = "append", **options: Any) -> nn.Module:
    model = image_model(name)
    return stir(patch_vit(model, placement=placement, frames=3, family=CASES[name].family, **options))


def video(name: str, *lengths: int) -> list[Tensor]:
    generator, size = torch.Generator().manual_seed(1), CASES[name].size
    return [torch.randn(length, 3, size, size, generator=generator) for length in lengths]


def run(name: str, model: Any, clips: Any) -> tuple[Tensor, ...]:
    """As `encode`; OpenAI's own `encode_image` casts a tensor, so lists go to its image tower."""
    if name == "clip":
        return (model.visual(clips),)
    return encode(name, model, clips)


def tensors(output: Any) -> list[Tensor]:
    """All tensors in an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


def gradients(model: nn.Module, output: Any) -> dict[str, Tensor]:
    """Of a loss in which no two outputs weigh the same."""
    model.zero_grad()
    loss = sum((t.square() * torch.linspace(1, 2, t.numel()).view(t.shape)).sum() for t in tensors(output))
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * scale)


@PLACEMENT
@pytest.mark.parametrize("name", CASES)
def test_each_clip_comes_out_as_it_does_alone_with_its_gradients(name: str, placement: str) -> None:
    if placement == "replace" and not CASES[name].replace:
        pytest.skip("refused, as test_reference.py shows")
    model, clips = patched(name, placement), video(name, *LENGTHS)
    packed = run(name, model, clips)
    alone = tuple(torch.cat(parts) for parts in zip(*(run(name, model, clip[None]) for clip in clips), strict=True))
    close(packed, alone)
    close_gradients(gradients(model, packed), gradients(model, alone))


@PLACEMENT
@pytest.mark.parametrize("name", ["timm", "open_clip-CLIP", "clip", "transformers-ViT", "torchvision", "own"])
def test_frames_and_tokens_are_lists_of_what_each_clip_has_alone(name: str, placement: str) -> None:
    model, clips = encoder(name, patched(name, placement)), video(name, *LENGTHS)
    for method in (model.forward_frames, model.forward_tokens):
        packed, alone = method(clips), [method(clip[None]) for clip in clips]
        if isinstance(packed, dict):
            packed, alone = packed["last_hidden_state"], [output["last_hidden_state"] for output in alone]
        assert isinstance(packed, list)
        assert [len(clip) for clip in packed] == list(LENGTHS)
        close(packed, [output[0] for output in alone])


def test_features_and_intermediate_layers_are_lists_and_features_go_to_the_head() -> None:
    model, clips = patched("timm"), video("timm", *LENGTHS)
    features = model.forward_features(clips)
    close(features, [model.forward_features(clip[None])[0] for clip in clips])
    close(model.forward_head(features), model(clips))
    final, layers = model.forward_intermediates(clips, indices=2, output_fmt="NLC")
    alone = [model.forward_intermediates(clip[None], indices=2, output_fmt="NLC") for clip in clips]
    close(final, [output[0][0] for output in alone])
    for i in range(2):
        close(layers[i], [output[1][i][0] for output in alone])


@TWO
@PLACEMENT
def test_a_list_of_clips_of_one_length_is_a_batch(name: str, placement: str) -> None:
    model, clips = patched(name, placement), video(name, 4, 4, 4)
    for sequence in (clips, tuple(clips)):
        close(model(sequence), model(torch.stack(clips)))
    close(model.forward_frames(clips), list(model.forward_frames(torch.stack(clips))))
    close(model(clips[:1]), model(clips[0][None]))


@TWO
@PLACEMENT
@pytest.mark.parametrize("embedding", [True, "rotary"])
@pytest.mark.parametrize("attention", MASKS)
def test_every_kind_of_mask_is_packed(name: str, placement: str, attention: str, embedding: Any) -> None:
    model = patched(name, placement, attention=MASKS[attention], temporal_embedding=embedding)
    clips = video(name, 5, 2, 7)
    close(model(clips), torch.cat([model(clip[None]) for clip in clips]))


def test_a_fixed_mask_takes_clips_of_its_size() -> None:
    model = patched("timm", attention=masks.kmt(3, 5))
    clips = video("timm", 3, 3)
    close(model(clips), model(torch.stack(clips)))
    with pytest.raises(ValueError, match=r"3 frames of 5 tokens.*2 frames of 5 tokens"):
        model(video("timm", 3, 2))


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("Siglip2")])
def test_hugging_face_models_take_lists_as_pixel_values(name: str) -> None:
    model = video_model(name)
    clips = [torch.randn(length, 3, 32, 32) for length in LENGTHS]
    given = {"noise": torch.rand(len(clips), 16)} if name == "ViTMAEModel" else {}
    call = getattr(model, "get_image_features", model)

    def outputs(pixel_values: Any, **options: Any) -> list[Tensor]:
        return [t for t in tensors(call(pixel_values=pixel_values, **options)) if t.is_floating_point()]

    alone = [outputs(clip[None], **{k: v[i : i + 1] for k, v in given.items()}) for i, clip in enumerate(clips)]
    close(outputs(clips, **given), [torch.cat(parts) for parts in zip(*alone, strict=True)])


@pytest.mark.parametrize("name", [name for name in MODELS if name == "Siglip2VisionModel"])
def test_what_is_given_for_each_clip_is_given_to_its_frames(name: str) -> None:
    """SigLIP 2 takes patches, and for each clip which of them are padding and its grid."""
    model = video_model(name)
    clips = [torch.randn(length, 16, 48) for length in LENGTHS]
    seen = torch.arange(16) < torch.tensor([16, 12, 8])[:, None]
    given = {"pixel_attention_mask": seen.long(), "spatial_shapes": torch.tensor([[4, 4], [3, 4], [2, 4]])}
    alone = [
        model(clip[None], **{k: v[i : i + 1] for k, v in given.items()}).pooler_output for i, clip in enumerate(clips)
    ]
    close(model(clips, **given).pooler_output, torch.cat(alone))


def test_an_autoencoder_masks_the_same_patches_in_all_frames_of_each_packed_clip() -> None:
    model, clips = video_model("ViTMAEModel"), [torch.randn(length, 3, 32, 32) for length in LENGTHS]
    output, noise = model(clips), torch.rand(len(clips), 16)
    assert set(output.mask.unique().tolist()) == {0, 1}
    assert output.ids_restore.shape == output.mask.shape == (3, 16)
    assert not torch.equal(output.mask[0], output.mask[1])
    assert torch.equal(model(clips, noise=noise, return_dict=False)[2], noise.argsort(1).argsort(1))


def test_hidden_states_are_lists() -> None:
    model, clips = video_model("ViTModel"), [torch.randn(length, 3, 32, 32) for length in LENGTHS]
    states = model(pixel_values=clips, output_hidden_states=True).hidden_states
    alone = [model(clip[None], output_hidden_states=True).hidden_states for clip in clips]
    for i, layer in enumerate(states):
        close(layer, [hidden[i][0] for hidden in alone])


# ---- training -------------------------------------------------------------------------------------------------------


@TWO
@PLACEMENT
def test_checkpointing_recomputes_packed_clips_whatever_else_is_pending(name: str, placement: str) -> None:
    model, clips = patched(name, placement).train(), video(name, 3, 5)
    model.set_grad_checkpointing(True)
    expected = gradients(model, torch.cat([model(clip[None]) for clip in clips]))
    pending = model(clips)
    model(video(name, 4, 4))  # as many frames
    model(torch.stack(video(name, 2, 2, 2, 2)))
    close_gradients(gradients(model, pending), expected)
    tokens = model.forward_tokens(clips)
    with torch.no_grad():
        model(video(name, 6, 2))
    alone = gradients(model, model.forward_tokens(clips[1][None])[0])
    close_gradients(gradients(model, tokens[1]), alone)


def test_hugging_face_checkpointing_recomputes_packed_clips() -> None:
    model, clips = video_model("ViTModel").train(), [torch.randn(length, 3, 32, 32) for length in (3, 5)]
    expected = gradients(model, model(clips).last_hidden_state)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    pending = model(clips).last_hidden_state
    hf_encoder(model)(clips[::-1])
    close_gradients(gradients(model, pending), expected)


@pytest.mark.parametrize("name", ["timm-patch-drop", "open_clip-patch-dropout"])
def test_patch_dropout_keeps_the_same_patches_in_all_frames_of_a_pack(name: str) -> None:
    model, kept = patched(name).train(), []
    dropout = next(module for module in model.modules() if type(module).__name__ == "PatchDropout")
    dropout.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    frame = torch.randn(1, 3, SIZE, SIZE)
    gradients(model, model([frame.expand(length, -1, -1, -1) for length in LENGTHS]))
    before, after = kept[0]
    after = after[0] if isinstance(after, tuple) else after
    assert after.shape[1] < before.shape[1]
    assert all(torch.equal(row, after[0]) for row in after)


@TWO
def test_packed_clips_compile_with_a_graph_for_each_tuple_of_lengths(name: str) -> None:
    torch._dynamo.reset()
    model = patched(name, layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    start = graphs["unique_graphs"]
    for lengths, limit in (((3, 2), 1), ((3, 2), 1), ((2, 4, 1), 2), ((3, 2), 2)):
        clips = video(name, *lengths)
        output, expected = compiled(clips), model(clips)
        close(output, expected, 1e-4)
        close_gradients(gradients(model, output), gradients(model, expected))
        assert graphs["unique_graphs"] - start <= limit
    torch._dynamo.reset()


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clips", "error", "message"),
    [
        ([], ValueError, r"list of clips is empty.*\(T, 3, H, W\)"),
        ([torch.zeros(2, 3, SIZE, SIZE), 7], TypeError, r"clip 1 of the list is no tensor \(T, 3, H, W\) but int"),
        ([torch.zeros(3, SIZE, SIZE)], ValueError, r"clip 0 .*\(3, 32, 32\), expected \(T, 3, H, W\)"),
        (
            [torch.zeros(2, 3, SIZE, SIZE), torch.zeros(1, 2, 3, SIZE, SIZE)],
            ValueError,
            r"clip 1 .*\(1, 2, 3, 32, 32\), expected",
        ),
        ([torch.zeros(2, 3, SIZE, SIZE), torch.zeros(0, 3, SIZE, SIZE)], ValueError, "clip 1 .* at least one frame"),
        ([torch.zeros(2, 4, SIZE, SIZE)], ValueError, r"clip 0 .*\(2, 4, 32, 32\), expected \(T, 3, H, W\)"),
        (
            [torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, 3, SIZE, 48)],
            ValueError,
            r"clip 1 .*\(3, 32, 48\), torch.float32 on cpu, but clip 0 has \(3, 32, 32\)",
        ),
        (
            [torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, 3, SIZE, SIZE).half()],
            ValueError,
            "clip 1 .*torch.float16 on cpu, but clip 0 has .*torch.float32 on cpu",
        ),
        (
            [torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, 3, SIZE, SIZE, device="meta")],
            ValueError,
            "clip 1 .* on meta, but clip 0 has .* on cpu",
        ),
    ],
    ids=lambda value: None if isinstance(value, (list, type)) else value[:20],
)
@TWO
def test_a_list_that_is_no_list_of_clips_is_refused_naming_the_clip(
    name: str, clips: list, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        patched(name)(clips)


def test_clips_become_one_sequence_of_frames() -> None:
    entry = patched("timm").family.entries[0]
    frames, clips = _packed(video("timm", *LENGTHS), entry, 3)
    assert frames.shape == (1, 8, 3, SIZE, SIZE)
    assert clips == PackedClips(LENGTHS)

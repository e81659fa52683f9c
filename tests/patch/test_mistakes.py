"""What people get wrong: each is refused with one clear line, and nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import open_clip.transformer as oc
import pytest
import timm.models.vision_transformer as timm_vit
import torch
import transformers
from models import CASES, HF, OwnViT, clip, encoder, hf_clip, image_model, timm_model
from torch import nn

from kronmask import masks, patch_vit, temporal_parameters, unpatch_vit
from kronmask.patch import Entry, Family


class Classifier(nn.Module):
    """A user's model around a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = timm_model(num_classes=0), nn.Linear(24, 3)


def refuses(model: nn.Module, error: type[Exception], message: str, **options) -> None:
    """Refuses in one line, and leaves types and keys as they were."""
    types, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(error, match=message) as refusal:
        patch_vit(model, **options)
    assert "\n" not in str(refusal.value)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["timm", "open_clip", "clip", "transformers-ViT", "torchvision", "own"])
def test_channels_before_frames_are_recognised(name: str) -> None:
    model = encoder(name, patch_vit(image_model(name), family=CASES[name].family))
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 32, 32\).*looks like \(B, C, T, H, W\): use video.transpose"):
        model(torch.zeros(2, 3, 4, 32, 32))
    with pytest.raises(ValueError, match=r"expected video \(B, T, 3, H, W\)"):
        model(torch.zeros(2, 4, 1, 32, 32))
    with pytest.raises(TypeError, match="takes a tensor of video"):
        model(torch.zeros(2, 4, 3, 32, 32).numpy())


def test_a_wrapper_is_refused_with_the_path_to_the_model_in_it(tmp_path) -> None:
    refuses(
        nn.Sequential(nn.Identity(), timm_model()), TypeError, r"the ViT itself, not the .*Sequential.*pass model\.1$"
    )
    refuses(Classifier(), TypeError, r"not the .*Classifier around it: pass model\.backbone$")
    refuses(torch.compile(timm_model()), TypeError, r"OptimizedModule around it: pass model\._orig_mod$")
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(timm_model())
        refuses(wrapped, TypeError, r"DistributedDataParallel around it: pass model\.module$")
    finally:
        dist.destroy_process_group()


def test_a_model_whose_part_is_patched_is_patched_already() -> None:
    for model, part in ((clip(), "visual"), (Classifier(), "backbone"), (hf_clip(), "vision_model")):
        patch_vit(getattr(model, part))
        refuses(model, ValueError, f"{type(model).__name__} is patched already; call unpatch_vit")
        unpatch_vit(model)


@pytest.mark.skipif("open_clip-timm-tower" not in CASES, reason="timm before 1.0.20 has no small tower")
def test_the_trunk_of_a_patched_timm_tower_is_patched_already() -> None:
    model = image_model("open_clip-timm-tower")
    patch_vit(model)
    refuses(model.visual.trunk, ValueError, "the blocks of this model are patched already")


def test_models_without_images_are_refused_by_name() -> None:
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    refuses(
        transformers.BertModel(transformers.BertConfig(**config)),
        TypeError,
        "BertModel.*no (images|vision transformer)",
    )
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, bos_token_id=0, eos_token_id=1))
    refuses(text, TypeError, "CLIPTextModel.*no (images|vision transformer)")
    refuses(oc.TextTransformer(7, 20, 16, 2, 1), TypeError, "TextTransformer")
    refuses(
        nn.Linear(2, 2), TypeError, "Linear: it knows the vision transformers of timm, open_clip, clip, transformers"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "kmtt"}, "unknown attention 'kmtt', did you mean 'kmt'"),
        ({"attention": "neighbourhood"}, "did you mean 'neighborhood'"),
        ({"placement": "interleaved"}, "not 'interleaved', did you mean 'interleave'"),
        ({"init": "zeros"}, "not 'zeros', did you mean 'zero'"),
        ({"attention": masks.kmt(8, 5), "frames": 4}, "8 frames of 5 tokens, but the clip has 4 frames"),
    ],
)
def test_a_misspelt_name_names_the_nearest(options: dict, message: str) -> None:
    refuses(timm_model(), ValueError, message, **options)


@pytest.mark.parametrize("attention", ["kmt", "kmct"])
def test_replace_warns_where_a_frame_does_not_see_itself(attention: str) -> None:
    with pytest.warns(
        UserWarning, match="class token learns nothing from its own patches.*'joint', 'causal' and 'axial'"
    ):
        patch_vit(timm_model(), placement="replace", attention=attention)


def test_under_kmct_in_replace_the_patches_of_the_last_frame_influence_nothing() -> None:
    """What the warning says, and that it is otherwise under the masks it names."""
    video = torch.randn(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = video.clone()
    other[:, -1] += 1
    for attention, reaches in (("kmct", False), ("causal", True), ("joint", True), ("axial", True)):
        model = timm_model().eval()
        if attention == "kmct":
            with pytest.warns(UserWarning, match="class token"):
                patch_vit(model, placement="replace", attention=attention)
        else:
            patch_vit(model, placement="replace", attention=attention)
        assert torch.equal(model(video), model(other)) != reaches


def test_a_wrong_declaration_says_what_is_wrong_with_it() -> None:
    family = Family(OwnViT, "blocks")
    refuses(OwnViT(), TypeError, "no transformer blocks at 'blocks' of OwnViT", family=family)
    refuses(timm_model(), TypeError, "family declares OwnViT, of which this VisionTransformer has 0", family=family)
    refuses(OwnViT(), TypeError, "declare another with family=")
    convolutions = Family(nn.Sequential, lambda encoder: encoder)
    refuses(
        nn.Sequential(nn.Conv2d(3, 8, 3)),
        TypeError,
        "no multi-head attention was found in .*Conv2d",
        family=convolutions,
    )
    with pytest.raises(ValueError, match="'mean' or 'frames'"):
        Entry("forward", "average")


def test_a_block_called_outside_of_its_model_says_so() -> None:
    model = patch_vit(timm_model())
    with pytest.raises(RuntimeError, match=r"called on 7 images outside of the model's forward.*unpatch_vit"):
        model.blocks[0](torch.zeros(7, 5, 24))


def test_hf_models_of_dense_outputs_are_refused() -> None:
    model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**HF, encoder_stride=16))
    refuses(model, TypeError, "ViTForMaskedImageModeling")


def test_a_subclass_of_a_known_vit_is_patched_as_one() -> None:
    class Mine(timm_vit.VisionTransformer):
        pass

    model = patch_vit(Mine(img_size=32, embed_dim=24, depth=1, num_heads=2))
    assert isinstance(model, Mine)
    assert type(unpatch_vit(model)) is Mine


class Wrong(nn.Module):
    """A ViT whose forward is what a test says."""

    def __init__(self, run, **options) -> None:
        super().__init__()
        self.stem, self.run = nn.Conv2d(3, 24, 16, 16), run
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 24, 0.0, **options) for _ in range(3))

    def forward(self, images: torch.Tensor):
        return self.run(self, self.stem(images).flatten(2).transpose(1, 2))


WRONG = Family(Wrong, "layers")


def through(model: Wrong, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        x = layer(x)
    return x


def sequence_first(model: Wrong, x: torch.Tensor) -> torch.Tensor:
    return through(model, x.transpose(0, 1)).mean(0)


def penultimate(model: Wrong, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers[:-1]:
        x = layer(x)
    return x.mean(1)


def test_what_would_be_wrong_in_silence_is_refused() -> None:
    video = torch.randn(2, 4, 3, 32, 32)
    with pytest.raises(ValueError, match=r"got 4 images of the 8 .*sequence_first=True"):
        patch_vit(Wrong(sequence_first), family=WRONG)(video)
    with pytest.raises(ValueError, match="has not run the last block"):
        patch_vit(Wrong(penultimate, batch_first=True), family=WRONG)(video)
    with pytest.raises(ValueError, match=r"shape \(4, 8, 24\) for 8 images, which has no row for each"):
        patch_vit(Wrong(lambda m, x: through(m, x).transpose(0, 1), batch_first=True), family=WRONG)(video)
    model = timm_model()
    with pytest.raises(ValueError, match="forward_intermediates has not run the last block"):
        patch_vit(model).forward_intermediates(video, indices=[0], stop_early=True)


def test_names_and_blocks_that_patching_cannot_tell_apart_are_refused() -> None:
    model = Wrong(through, batch_first=True)
    model.temporal_encoder = nn.Linear(2, 2)
    refuses(model, ValueError, "temporal_encoder of its own", family=WRONG)
    model = Wrong(through, batch_first=True)
    model.layers[2] = model.layers[0]
    refuses(model, TypeError, "used more than once", family=WRONG)
    misspelt = Family(Wrong, "layers", entries=(Entry("forwrad"),))
    refuses(Wrong(through), TypeError, "no method 'forwrad'", family=misspelt)


class Named(NamedTuple):
    tokens: torch.Tensor
    pooled: torch.Tensor


@dataclass
class Data:
    tokens: torch.Tensor
    pooled: torch.Tensor


@pytest.mark.parametrize("kind", [Named, Data, dict])
def test_outputs_of_any_kind_are_per_clip(kind) -> None:
    def run(model: Wrong, x: torch.Tensor):
        x = through(model, x)
        return kind(tokens=x, pooled=x.mean(1))

    output = patch_vit(Wrong(run, batch_first=True), family=WRONG)(torch.randn(2, 4, 3, 32, 32))
    assert type(output) is kind
    tokens, pooled = output.values() if kind is dict else (output.tokens, output.pooled)
    assert (tokens.shape, pooled.shape) == ((2, 4, 24), (2, 24))


class Tripled(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return super().forward(3 * query, key, value, **options)


class TwoInputs(nn.TransformerEncoderLayer):
    """Positions are added to queries and keys alone, as in DETR."""

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        return self.self_attn(x + 1, x + torch.linspace(0, 1, x.shape[1])[:, None], x)[0]


def test_multihead_attention_of_several_inputs_stays_what_it_is_and_of_a_subclass_is_refused() -> None:
    model, video = Wrong(lambda m, x: through(m, x).mean(1), batch_first=True), torch.randn(2, 4, 3, 32, 32)
    model.layers = nn.ModuleList(TwoInputs(24, 2, 24, 0.0, batch_first=True) for _ in range(2))
    expected = model(video.flatten(0, 1)).unflatten(0, (2, 4)).mean(1)
    patch_vit(model, placement="replace", attention="spatial", temporal_embedding=False, family=WRONG)
    torch.testing.assert_close(model(video), expected)
    model = Wrong(through, batch_first=True)
    model.layers[0].self_attn = Tripled(24, 2, batch_first=True)
    refuses(model, TypeError, "Tripled changes what nn.MultiheadAttention does", placement="replace", family=WRONG)


def test_a_wrapper_may_call_its_model_temporal_encoder() -> None:
    wrapper = nn.ModuleDict({"temporal_encoder": patch_vit(timm_model())})
    assert len(temporal_parameters(wrapper)) == 13

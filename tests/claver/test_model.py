"""The contrastive model computes what the paper's formula says."""

import pytest
import torch
from claver.config import ModelConfig, TrainConfig
from claver.model import build_model, describe_trained, freeze, torch_defaults
from claver.training.optimizer import parameter_groups
from small import small_model
from torch import nn
from torch.nn import functional as F

from kronmask import masks


def test_logits_are_scaled_cosines_of_the_mean_of_normalised_frames():
    model = build_model(small_model()).eval()
    video, tokens = torch.randn(2, 4, 3, 32, 32), torch.randint(1, 100, (3, 5, 16))
    frames = model.clip.visual.forward_frames(video)
    expected_video = (frames / frames.norm(dim=-1, keepdim=True)).mean(1)
    text = F.normalize(model.clip.encode_text(tokens.flatten(0, 1)), dim=-1).view(3, 5, -1)
    expected = model.clip.logit_scale.exp() * torch.einsum("be,ace->bac", expected_video, text)
    torch.testing.assert_close(model(video, tokens), expected)
    assert (model.encode_video(video).norm(dim=-1) < 1 - 1e-4).all()  # a mean of unit vectors, not normalised again


def test_a_third_of_the_depth_is_temporal_and_has_the_papers_mask():
    model = build_model(
        small_model(vision={"layers": 6, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32})
    )
    assert len(model.clip.visual.temporal_encoder.blocks) == 2
    assert {repr(block.attn.mask) for block in model.clip.visual.temporal_encoder.blocks} == {"kmt"}


@pytest.mark.parametrize("window", [4, 2])
def test_a_window_is_that_of_the_mask(window):
    torch.manual_seed(0)
    model = build_model(small_model(attention="kmct", window=window, sink=0, temporal_embedding="rotary")).eval()
    torch.manual_seed(0)
    whole = build_model(small_model(attention="kmct", temporal_embedding="rotary")).eval()
    video = torch.randn(1, 4, 3, 32, 32)
    same = torch.allclose(model.frame_features(video), whole.frame_features(video), atol=1e-6)
    assert same == (window == 4)  # in clips of four frames


def test_a_sink_is_that_of_the_mask():
    model = build_model(small_model(attention="causal", window=2, sink=1))
    rules = {block.attn.mask(4, 5) for block in model.clip.visual.temporal_encoder.blocks}
    assert rules == {masks.causal(4, 5, window=2, sink=1).rule}


def test_only_a_learned_temporal_embedding_has_initial_values():
    learned = build_model(small_model(temporal_embedding=True, temporal_std=100.0))
    assert learned.clip.visual.temporal_encoder.embedding.weight.std() > 10
    for other in (False, "rotary"):
        encoder = build_model(small_model(temporal_embedding=other)).clip.visual.temporal_encoder
        assert not any("embedding" in name for name, _ in encoder.named_parameters())


def test_parameters_of_the_published_model():
    model = build_model(ModelConfig(name="ViT-B-32", pretrained=None))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(179.6, abs=0.1)


def test_temporal_tuning_trains_the_temporal_parameters_alone():
    model = build_model(small_model())
    freeze(model, "temporal")
    assert {("temporal_" in name) == p.requires_grad for name, p in model.named_parameters()} == {True}
    assert "vision 0.0M" in describe_trained(model)
    freeze(model, "full")
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(2, 4, 3, 32, 32), torch.randint(1, 100, (2, 5, 16))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_logits_are_float32_under_autocast():
    """Scaled by 100, cosines in bfloat16 would be off by a third of a unit and tie."""
    model = build_model(small_model(logit_scale=100.0)).eval()
    video, text = F.normalize(torch.randn(4, 16), dim=-1), F.normalize(torch.randn(2, 50, 16), dim=-1)
    exact = 100 * torch.einsum("be,ace->bac", video.double(), text.double())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(video, text)
        assert model(torch.randn(1, 4, 3, 32, 32), torch.randint(1, 100, (1, 2, 16))).dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-3, rtol=0)


def test_the_authors_initial_values_are_those_of_torchs_layers():
    """Their blocks are nn.MultiheadAttention and an MLP of nn.Linear, which nothing initialises anew."""
    block = build_model(small_model()).clip.visual.temporal_encoder.blocks[0]
    torch.manual_seed(5)
    attention, first, second = nn.MultiheadAttention(32, 2), nn.Linear(32, 128), nn.Linear(128, 32)
    torch.manual_seed(5)
    torch_defaults(block)
    ours = (block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj.weight, block.attn.out_proj.bias)
    theirs = (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias)
    for a, b in zip(
        (*ours, *block.mlp.parameters()), (*theirs, *first.parameters(), *second.parameters()), strict=True
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(norm.weight, torch.ones(32)) for norm in (block.ln_1, block.ln_2))


def test_the_setting_for_the_authors_initial_values_acts_on_the_temporal_blocks_alone():
    states = []
    for init in ("random", "torch"):
        torch.manual_seed(0)
        states.append(build_model(small_model(init=init)).state_dict())
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed == {name for name in states[0] if ".temporal_encoder.blocks." in name and any(
        part in name for part in ("in_proj_weight", "out_proj.weight", "mlp.")
    )}  # fmt: skip
    weight = build_model(ModelConfig(pretrained=None, init="torch")).clip.visual.temporal_encoder.blocks[3].attn
    assert weight.in_proj_weight.std().item() == pytest.approx(0.0255, rel=0.01)  # (2 / (4 * 768)) ** .5
    assert weight.out_proj.weight.std().item() == pytest.approx(0.0208, rel=0.01)  # (1 / (3 * 768)) ** .5


@pytest.mark.parametrize("tune", ["full", "temporal"])
def test_the_authors_rule_of_weight_decay(tune):
    """All but what has one dimension and position embeddings: their optimizer's filter, put right."""
    model = build_model(small_model())
    freeze(model, tune)
    usual, official = (
        {
            id(parameter): group
            for group in parameter_groups(model, TrainConfig(decay=decay))
            for parameter in group["params"]
        }
        for decay in ("usual", "official")
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert usual.keys() == official.keys() == {id(parameter) for parameter in trained.values()}
    for name, parameter in trained.items():
        decays = parameter.ndim != 1 and "positional_embedding" not in name
        group = official[id(parameter)]
        assert group["weight_decay"] == (1e-3 if decays else 0)
        assert group["lr"] == pytest.approx(1.2e-4 if "temporal_" in name else 1.2e-5)
        assert ("no_decay" in group["name"]) != decays
    more = {
        name
        for name in trained
        if official[id(trained[name])]["weight_decay"] != usual[id(trained[name])]["weight_decay"]
    }
    expected = {"clip.visual.temporal_encoder.embedding.weight", "clip.logit_scale"}
    assert more == (expected if tune == "full" else {"clip.visual.temporal_encoder.embedding.weight"})


def test_a_group_that_only_the_authors_rule_has_is_made():
    model = build_model(small_model())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("logit_scale" in name)
    (group,) = parameter_groups(model, TrainConfig(decay="official"))
    assert (group["name"], group["weight_decay"], len(group["params"])) == ("image", 1e-3, 1)

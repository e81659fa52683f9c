"""The contrastive model computes what the paper's formula says."""

import pytest
import torch
from claver.config import ModelConfig
from claver.model import build_model, describe_trained, freeze
from small import small_model
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
        assert not any(
            "embedding" in name
            for name, _ in build_model(
                small_model(temporal_embedding=other, temporal_std=100.0)
            ).clip.visual.temporal_encoder.named_parameters()
        )


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

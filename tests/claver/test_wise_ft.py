"""Weights between two models are what the paper says, and none of a model's own is lost."""

import json

import pytest
import torch
from claver.evaluation.wise_ft import interpolated, sweep
from claver.model import build_model
from small import small_model


def models(**changes):
    torch.manual_seed(0)
    source = build_model(small_model(init="zero", **changes))
    torch.manual_seed(1)
    tuned = build_model(small_model(**changes))
    return source.eval(), tuned.eval()


def test_weights_are_on_the_line_between_the_two_models():
    source, tuned = (model.state_dict() for model in models())
    mixed = interpolated(source, tuned, 0.25)
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.75 * source[name] + 0.25 * tuned[name])
    assert all(torch.equal(interpolated(source, tuned, 1.0)[name], tensor) for name, tensor in tuned.items())


@pytest.mark.parametrize("placement", ["append", "interleave"])
def test_at_zero_an_image_model_is_itself_on_each_frame(placement):
    source, tuned = models(placement=placement, layers=1)
    image = {name: tensor for name, tensor in source.state_dict().items() if "temporal_" not in name}
    video = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        expected, far = source.encode_video(video), tuned.encode_video(video)
        tuned.load_state_dict(interpolated(image, tuned.state_dict(), 0.0))
        torch.testing.assert_close(tuned.encode_video(video), expected)
    assert (far - expected).abs().max() > 1e-2


def test_models_of_two_kinds_and_shares_out_of_range_are_refused():
    source, tuned = (model.state_dict() for model in models())
    with pytest.raises(ValueError, match="not of one kind: clip.logit_scale differ"):
        interpolated({name: tensor for name, tensor in source.items() if name != "clip.logit_scale"}, tuned, 0.5)
    with pytest.raises(ValueError, match="clip.ln_final.bias differ"):
        interpolated(source | {"clip.ln_final.bias": torch.zeros(3)}, tuned, 0.5)
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, not 1.5"):
        interpolated(source, tuned, 1.5)


def test_a_sweep_evaluates_each_task_at_each_share_and_leaves_the_model_as_it_was(tmp_path):
    source, tuned = models()
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    weight = "clip.text_projection"
    first, last = source.state_dict()[weight], before[weight]

    def place(model):
        """Where the weights that the task sees lie between the two models."""
        return {"top1": float(((model.state_dict()[weight] - first) / (last - first)).mean())}

    tasks = {"tuned": place, "other": lambda model: {"top1": 0.25}}
    records = sweep(tuned, source.state_dict(), [0.0, 0.5, 1.0], tasks, tmp_path)
    assert [record["tuned"] for record in records] == pytest.approx([0.0, 0.5, 1.0], abs=1e-4)
    assert [record["alpha"] for record in records] == [0.0, 0.5, 1.0]
    assert records[1]["other"] == 0.25
    assert json.loads((tmp_path / "wise_ft.json").read_text()) == records
    assert (tmp_path / "wise_ft.png").stat().st_size > 5_000
    assert all(torch.equal(before[name], tensor) for name, tensor in tuned.state_dict().items())

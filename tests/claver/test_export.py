"""The exported towers say what the model says, for any batch, and any frames where the mask allows it."""

import json

import claver.weights.export
import pytest
import torch
from claver.config import Config
from claver.evaluation.evaluate import class_probabilities
from claver.model import build_model
from claver.prompts.build import tokenize
from claver.text import encode_prompts
from claver.weights.export import export, load_export
from small import small_config, small_model

CLASSES, PROMPTS = ["left", "right", "up"], [["a left", "a right", "an up"], ["left", "right", "up"]]


def exported(folder, **changes):
    torch.manual_seed(0)
    config = Config(model=small_model(**changes), augment=small_config(folder, num_train=1, num_test=1).augment)
    model = build_model(config.model).eval()
    export(model, folder / "x", config=config, classes=CLASSES, prompts=PROMPTS)
    return model, config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return (folder / "x", *exported(folder, attention="kmct"))


def test_the_towers_and_probabilities_are_the_models(whole):
    folder, model, _ = whole
    loaded = load_export(folder)
    tokens = tokenize(PROMPTS, context_length=16)
    for batch, frames in ((1, 4), (4, 4), (2, 1), (3, 9)):
        video = torch.randn(batch, frames, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(loaded.video(video), model.encode_video(video), atol=1e-5, rtol=0)
            expected = class_probabilities(model, video[:, None], encode_prompts(model, tokens))
            torch.testing.assert_close(loaded.probabilities(video), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded.text(tokens.flatten(0, 1)), model.encode_text(tokens).flatten(0, 1))
        torch.testing.assert_close(loaded.text(tokens[0, :1]), model.encode_text(tokens)[0, :1])


def test_the_json_says_how_to_feed_them(whole):
    folder, model, config = whole
    about = json.loads((folder / "export.json").read_text())
    assert about["video"]["input"] == ["batch", "frames", 3, 32, 32]
    assert (tuple(about["video"]["mean"]), tuple(about["video"]["std"])) == (config.augment.mean, config.augment.std)
    assert (about["video"]["short_side"], about["video"]["frames"]) == (32, 4)
    assert (about["classes"], about["texts"]["prompts"], about["text"]["input"]) == (CLASSES, PROMPTS, ["batch", 16])
    assert about["logit_scale"] == pytest.approx(model.clip.logit_scale.exp().item())
    assert {path.name for path in folder.iterdir()} == {"export.json", "video.pt2", "text.pt2", "texts.safetensors"}


def test_a_mask_that_depends_on_the_frames_fixes_them(tmp_path):
    model, _ = exported(tmp_path, attention="kmct", window=2, temporal_embedding="rotary")
    loaded = load_export(tmp_path / "x")
    assert loaded.about["video"]["input"] == ["batch", 4, 3, 32, 32]
    assert not loaded.about["video"]["any_frames"]
    video = torch.randn(5, 4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.video(video), model.encode_video(video), atol=1e-5, rtol=0)
    with pytest.raises(Exception, match="4"):
        loaded.video(torch.randn(1, 6, 3, 32, 32))


def test_a_program_needs_no_more_than_the_json_names(whole):
    about = json.loads((whole[0] / "export.json").read_text())
    for tower in ("video", "text"):
        graph = torch.export.load(whole[0] / about[tower]["file"]).graph
        operators = {node.target for node in graph.nodes if node.op == "call_function"}
        spaces = {op.namespace for op in operators if isinstance(op, torch._ops.OpOverload)}
        assert spaces <= {"aten", about["import"]}


def test_other_numbers_than_the_models_are_not_written(tmp_path):
    class Random(torch.nn.Module):
        def forward(self, x):
            return torch.rand_like(x)

    with pytest.raises(ValueError, match=r"v\.pt2: gives features that are .* from the model's"):
        claver.weights.export._write(Random(), tmp_path / "v.pt2", {"x": (torch.ones(3, 2), {})}, [])
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_not_replaced_unasked_and_a_folder_without_one_is_named(whole, tmp_path):
    folder, model, config = whole
    with pytest.raises(ValueError, match="holds an export already"):
        export(model, folder, config=config, classes=CLASSES, prompts=PROMPTS)
    with pytest.raises(ValueError, match="holds no export"):
        load_export(tmp_path)

"""A converted checkpoint has the values of its source to the bit, and says what its source said or was told."""

from pathlib import Path

import pytest
import torch
from claver.command_line import Given
from claver.config import Config, DataConfig
from claver.model import build_model
from claver.prompts.choice import choose_prompts_of_checkpoint
from claver.settings import to_dict
from claver.weights.checkpoint import CheckpointError, load_checkpoint, load_model
from claver.weights.convert import convert
from official_files import official_config, official_names, write_official
from safetensors.torch import load_file
from small import TEXT, small_model

REGRESSION = Path(__file__).parent / "regression.pt"
NOTHING = Given({}, ())


def given(config):
    return Given(to_dict(config), ())


@pytest.fixture
def official(tmp_path):
    """An official checkpoint with known outputs, and a configuration for its heads, which such a file does not tell."""
    stored = torch.load(REGRESSION, weights_only=True)
    path = write_official(tmp_path / "official.pth", stored["state_dict"], official_config("KMT"))
    return path, Config(model=small_model(text=TEXT | {"vocab_size": 64})), stored


def test_an_official_checkpoint_is_converted_to_the_bit(tmp_path, official):
    path, config, stored = official
    out = convert(path, tmp_path / "ours.safetensors", given(config), force=True)
    converted = load_file(out)
    assert official_names(converted).keys() == stored["state_dict"].keys()
    for name, tensor in load_checkpoint(path)["model"].items():
        assert torch.equal(converted[name], tensor)
        assert converted[name].dtype == tensor.dtype
    model, _ = load_model(out)
    with torch.no_grad():
        torch.testing.assert_close(model(stored["video"], stored["text_tokens"]), stored["logits"], atol=1e-5, rtol=0)


def test_what_it_says_without_a_configuration_is_kept(tmp_path):
    model = build_model(small_model(vision={"layers": 3, "width": 64, "patch_size": 16, "image_size": 32}, text=TEXT))
    path = write_official(tmp_path / "o.pth", official_names(model.state_dict()), official_config("KMCT"))
    out = convert(path, tmp_path / "ours.safetensors", NOTHING)
    loaded, content = load_model(out)
    assert content["config"]["model"]["attention"] == "kmct"
    assert tuple(content["config"]["augment"]["mean"]) == (0.485, 0.456, 0.406)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_an_older_checkpoint_keeps_its_classes_and_texts(tmp_path):
    config = Config(model=small_model(attention="kmct"))
    model, names, prompts = build_model(config.model), ["a", "b"], [["an a", "a b"]]
    old = {"format": "kronmask-claver-1", "model": model.state_dict(), "config": to_dict(config), "optimizer": {}}
    torch.save(old | {"classes": names, "prompts": prompts, "epoch": 3}, tmp_path / "old.pt")
    content = load_checkpoint(convert(tmp_path / "old.pt", tmp_path / "new.safetensors", NOTHING))
    assert (content["classes"], content["prompts"], content["epoch"]) == (names, prompts, 3)
    assert content["config"]["model"]["attention"] == "kmct"
    for name, tensor in model.state_dict().items():
        assert torch.equal(content["model"][name], tensor)
    with pytest.raises(CheckpointError, match=r"old\.pt: was trained on other classes: 2, beginning with 'a'"):
        convert(tmp_path / "old.pt", tmp_path / "other.safetensors", NOTHING, classes=["b", "a"])


def test_classes_are_given_to_a_checkpoint_that_has_none(tmp_path, official):
    path, config, _ = official
    config = Config(model=config.model, data=DataConfig(templates=("a {}.",), prompts="templates"))
    out = convert(path, tmp_path / "ours.safetensors", given(config), classes=["cat", "dog"], force=True)
    content = load_checkpoint(out)
    choice = choose_prompts_of_checkpoint(config, content, need_labels=False)
    assert (choice.classes, choice.prompts) == (["cat", "dog"], [["a cat.", "a dog."]])


def test_without_classes_they_are_read_from_the_labels(tmp_path, official):
    path, config, _ = official
    labels = tmp_path / "labels.csv"
    labels.write_text("id,name\n0,cat\n1,dog\n")
    config = Config(model=config.model, data=DataConfig(labels=str(labels), prompts="names"))
    content = load_checkpoint(convert(path, tmp_path / "ours.safetensors", given(config), force=True))
    choice = choose_prompts_of_checkpoint(config, content, need_labels=False)
    assert (choice.classes, choice.prompts) == (["cat", "dog"], [["cat", "dog"]])


def test_names_that_it_would_not_write_to_are_refused(tmp_path, official):
    path, config, _ = official
    with pytest.raises(ValueError, match=r"a\.pt: converted checkpoints are safetensors"):
        convert(path, tmp_path / "a.pt", given(config), force=True)
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"b\.safetensors: is there already"):
        convert(path, tmp_path / "b.safetensors", given(config), force=True)
    assert (tmp_path / "b.safetensors").read_text() == "mine"

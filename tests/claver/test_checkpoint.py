"""Checkpoints are read whole or refused by name, and no pickle is executed."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from claver.checkpoint import CheckpointError, from_official, load_checkpoint, load_model, save_checkpoint
from claver.config import Config, to_dict
from claver.model import build_model
from safetensors.torch import load_file, save_file
from small import TEXT, VISION, small_model

REGRESSION = Path(__file__).parent / "regression.pt"
CLASSES, PROMPTS = ["left", "right"], [["a left", "a right"]]


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict as the authors' code would have written it."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("clip.")
        name = re.sub(
            r"visual\.temporal_encoder\.blocks\.(\d+)\.", r"visual.transformer_t.resblocks.\1.temporal_", name
        )
        renamed[name.replace("visual.temporal_encoder.embedding.weight", "visual.temporal_embedding")] = tensor
    return renamed


def test_a_checkpoint_round_trips(tmp_path):
    config = Config(model=small_model())
    model = build_model(config.model).eval()
    save_checkpoint(tmp_path / "c.safetensors", model, config, CLASSES, PROMPTS, epoch=3, step=7)
    loaded, content = load_model(tmp_path / "c.safetensors")
    assert (content["epoch"], content["step"], content["classes"], content["prompts"]) == (3, 7, CLASSES, PROMPTS)
    assert not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert os.listdir(tmp_path) == ["c.safetensors"]
    assert load_file(tmp_path / "c.safetensors").keys() == model.state_dict().keys()


def test_checkpoints_of_before_safetensors_are_read(tmp_path):
    config = Config(model=small_model())
    model = build_model(config.model).eval()
    old = {"format": "kronmask-claver-1", "model": model.state_dict(), "config": to_dict(config)}
    torch.save(old | {"classes": CLASSES, "prompts": PROMPTS, "epoch": 3}, tmp_path / "best.pt")
    loaded, content = load_model(tmp_path / "best.pt")
    assert (content["epoch"], content["classes"], content["prompts"]) == (3, CLASSES, PROMPTS)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


class Node(dict):
    """Stands for the configuration object in an official checkpoint."""

    def __reduce__(self):
        return (_explode, (), {"a": 1}, iter([1, 2]), iter([("k", "v")]))


def _explode(*args):
    raise AssertionError("the pickle was executed")


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_official_checkpoint_loads_without_executing_its_pickle(tmp_path, wrapped):
    config = Config(model=small_model(vision=VISION | {"layers": 3}))
    model = build_model(config.model).eval()
    state = official_names(model.state_dict())
    assert "visual.transformer_t.resblocks.0.temporal_attn.in_proj_weight" in state
    if wrapped:
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": state, "config": Node(), "epoch": 59, "max_accuracy": 81.5}, tmp_path / "official.pth")
    with pytest.raises(AssertionError, match="executed"):
        torch.load(tmp_path / "official.pth", weights_only=False)
    loaded, _ = load_model(tmp_path / "official.pth", config)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    with pytest.raises(CheckpointError, match="pass --config"):
        load_model(tmp_path / "official.pth")


def test_a_malicious_pickle_does_nothing(tmp_path):
    class Command:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'executed'}",))

    torch.save({"model": {"a": torch.ones(1)}, "config": Command()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        load_checkpoint(tmp_path / "m.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Command()))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "plain.pkl")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path, keep):
    config = Config(model=small_model())
    save_checkpoint(tmp_path / "c.pt", build_model(config.model), config, CLASSES, PROMPTS)
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"c\.pt: not a checkpoint, or a damaged one"):
        load_checkpoint(tmp_path / "c.pt")


def test_files_that_are_no_checkpoint_are_refused_by_name(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state": 1}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    for name in ("list.pt", "empty.pt", "text.pt", "nowhere.pt", "foreign.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)


def test_weights_of_another_model_are_refused_with_the_names(tmp_path):
    config = Config(model=small_model())
    save_checkpoint(tmp_path / "c.pt", build_model(config.model), config, CLASSES, PROMPTS)
    with pytest.raises(CheckpointError, match=r"c\.pt: the weights do not fit"):
        load_model(tmp_path / "c.pt", Config(model=small_model(vision=VISION | {"layers": 3})))


def test_the_outputs_of_a_stored_model_do_not_change():
    """Written by `python tests/claver/test_checkpoint.py`; a change of the architecture must not pass unseen."""
    stored = torch.load(REGRESSION, weights_only=True)
    model = build_model(small_model(text=TEXT | {"vocab_size": 64})).eval()
    model.load_state_dict(from_official(stored["state_dict"]))
    with torch.no_grad():
        for name, tensor in _outputs(model, stored["video"], stored["text_tokens"]).items():
            torch.testing.assert_close(tensor, stored[name], atol=1e-5, rtol=0)


def _outputs(model, video, text_tokens) -> dict[str, torch.Tensor]:
    return {
        "frame_features": model.frame_features(video),
        "patch_tokens": model.clip.visual.forward_tokens(video)[:, :, 1:],
        "logits": model(video, text_tokens),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    small = build_model(small_model(text=TEXT | {"vocab_size": 64})).eval()
    example = {"video": torch.randn(2, 4, 3, 32, 32), "text_tokens": torch.randint(0, 64, (2, 3, 16))}
    with torch.no_grad():
        torch.save(
            {"state_dict": official_names(small.state_dict()), **example, **_outputs(small, **example)}, REGRESSION
        )

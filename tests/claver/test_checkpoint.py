"""Checkpoints are read whole or refused by name, and no pickle is executed."""

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch
from claver.config import Config
from claver.model import build_model
from claver.settings import to_dict
from claver.weights.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from claver.weights.official import from_official
from official_files import official_names
from safetensors.torch import load_file, save_file
from small import TEXT, VISION, small_model

REGRESSION = Path(__file__).parent / "regression.pt"
CLASSES, PROMPTS = ["left", "right"], [["a left", "a right"]]


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


def test_what_our_checkpoint_says_of_its_model_binds(tmp_path):
    config = Config(model=small_model(attention="kmct", window=3, layers=1, temporal_embedding="rotary"))
    path = tmp_path / "c.pt"
    save_checkpoint(path, build_model(config.model), config, CLASSES, PROMPTS)
    load_model(path, config)
    with pytest.raises(CheckpointError, match=r"attention is 'kmct' there, 'causal' here.*window is 3 there, 2 here"):
        load_model(path, Config(model=dataclasses.replace(config.model, attention="causal", window=2)))
    load_model(path, Config(model=dataclasses.replace(config.model, window=2)), force=True)
    longer = Config(model=dataclasses.replace(config.model, frames=6))
    with pytest.raises(CheckpointError, match=r"model\.frames is 4 there, 6 here"):
        load_model(path, longer)
    for option in ("force", "any_frames"):
        with pytest.warns(UserWarning, match="on 4 frames and gets 6: no weight of it is of time"):
            load_model(path, longer, **{option: True})


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

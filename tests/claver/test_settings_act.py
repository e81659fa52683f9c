"""Every setting that `eval` is given acts on what is evaluated, or is refused: none is taken without effect."""

import json

import claver_k400
import pytest
import torch
from accelerate.state import AcceleratorState
from claver.commands import COMMANDS
from claver.data.lists import read_labels
from claver.evaluation.evaluate import Evaluation
from claver.model import build_model
from claver.prompts.choice import choose_prompts
from claver.prompts.files import MOTION_PROMPTS
from claver.settings import settings_of
from claver.weights.checkpoint import save_checkpoint
from small import small_config

# another value of each setting that eval takes; that of the small run is another
OTHERS = {
    "data.root": "{folder}/elsewhere",
    "data.test_list": "{folder}/one.txt",
    "data.labels": "{folder}/labels.csv",
    "data.prompts": str(MOTION_PROMPTS),
    "data.templates": "neutral",
    "data.num_workers": "1",
    "data.cache": "true",
    "augment.size": "24",
    "augment.short_side": "48",
    "augment.mean": "[0.5, 0.5, 0.5]",
    "augment.std": "[0.5, 0.5, 0.5]",
    "test.clips": "1",
    "test.crops": "3",
    "test.batch_size": "1",
    "test.broken": "wrong",
    "train.precision": "bf16",
}
# what contradicts the weights, or the other settings
REFUSED = {
    "model.name": "other",
    "model.quick_gelu": "false",
    "model.embed_dim": "8",
    "model.vision": json.dumps({"layers": 1}),
    "model.text": json.dumps({"layers": 2}),
    "model.frames": "8",
    "model.attention": "kmct",
    "model.window": "2",
    "model.sink": "1",
    "model.placement": "interleave",
    "model.layers": "2",
    "model.temporal_embedding": "rotary",
    "data.kinds": "[scene]",
    "data.per_kind": "1",
    "data.splits": "[a, b]",
    "test.summary": "harmonic",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    config = small_config(folder, num_train=1)
    classes = read_labels(config.data.labels)
    prompts = choose_prompts(config, classes).prompts
    save_checkpoint(folder / "best.safetensors", build_model(config.model), config, classes, prompts)
    (folder / "one.txt").write_text("videos/test_00003.mp4 3\n")
    (folder / "labels.csv").write_text("id,name\n" + "".join(f"{i},another {i}\n" for i in range(8)))
    (folder / "elsewhere").symlink_to(config.data.root)
    return folder


def evaluated(folder, setting, monkeypatch, capsys):
    """Status, error and all that goes into an evaluation, under one setting."""
    seen = []

    def record(model, loader, tokens, accelerator, **options):
        data = loader.dataset
        seen.append(
            [data.samples, data.frames, data.augment, data.num_clips, data.num_crops, data.source.cache is None, options,
             loader.batch_size, loader.num_workers, tokens.tolist(), AcceleratorState().mixed_precision]
        )  # fmt: skip
        scores = torch.eye(tokens.shape[1])[[sample.label for sample in data.samples]]
        return Evaluation(scores, scores, torch.tensor([sample.label for sample in data.samples]))

    monkeypatch.setattr("claver.evaluation.evaluate.evaluate", record)
    line = ["eval", "--checkpoint", str(folder / "best.safetensors"), *([f"--{setting}"] if setting else [])]
    status = claver_k400.main(line)
    return status, capsys.readouterr().err, seen


def test_the_tables_name_every_setting():
    taken = {name for name in settings_of() if name.startswith(COMMANDS["eval"].settings)}
    assert taken == OTHERS.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_changes_what_is_evaluated(name, run, monkeypatch, capsys):
    _, _, before = evaluated(run, None, monkeypatch, capsys)
    status, error, after = evaluated(run, f"{name}={OTHERS[name].format(folder=run)}", monkeypatch, capsys)
    assert (status, len(before), len(after)) == (0, 1, 1), error
    assert before != after


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_contradicts_is_refused_by_name(name, run, monkeypatch, capsys):
    status, error, after = evaluated(run, f"{name}={REFUSED[name]}", monkeypatch, capsys)
    assert (status, after) == (1, [])
    assert name in error or "do not fit" in error


@pytest.mark.parametrize(
    "name", sorted(name for name in settings_of() if not name.startswith(COMMANDS["eval"].settings))
)
def test_a_setting_of_training_is_refused_by_name(name, run, monkeypatch, capsys):
    status, error, after = evaluated(run, f"{name}=null", monkeypatch, capsys)
    assert (status, after) in ((1, []), (2, []))  # 2: null is no value of it at all
    assert name in error

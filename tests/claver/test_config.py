"""A configuration is what its file says, or an error that says what is wrong with it."""

import dataclasses
import re

import claver_k400
import pytest
from claver.config import Config, DataConfig, ModelConfig, TestConfig, TrainConfig
from claver.data.augment import AugmentConfig
from claver.prompts.choice import choose_prompts
from claver.prompts.files import shipped_classes
from claver.settings import from_dict, load_config, settings_of, to_dict
from docstring_parser import parse as parse_docstring


@pytest.mark.parametrize(
    "name", [f"k400_{model}_{frames}f" for model in ("b32", "b16", "l14") for frames in (8, 16, 32)]
)
def test_the_files_for_kinetics_400_are_the_authors_settings(name):
    config = load_config(name)
    model, frames = re.fullmatch(r"k400_(\w+)_(\d+)f", name).groups()
    assert config.model.name == {"b32": "ViT-B-32", "b16": "ViT-B-16", "l14": "ViT-L-14"}[model]
    assert config.model.frames == int(frames)
    train = config.train
    assert (train.lr, train.temporal_lr_mult, train.batch_size, train.epochs, train.warmup_epochs) == (
        1.2e-5,
        10,
        256,
        60,
        5,
    )
    assert (train.betas, train.eps, train.weight_decay, train.min_lr_ratio) == ((0.9, 0.98), 1e-8, 1e-3, 0.01)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.switch, config.seed) == (0.8, 1.0, 0.5, 3047)
    assert (config.test.clips, config.test.crops) == (4, 3)
    assert train.batch_size % train.accumulate == 0


def test_the_official_file_is_the_authors_code():
    official, ours = (load_config(f"{name}k400_b16_8f") for name in ("official_", ""))
    ours, theirs = to_dict(ours), to_dict(official)
    changed = {
        f"{section}.{key}" for section in ("data", "model", "augment", "train", "test") for key in theirs[section]
        if theirs[section][key] != ours[section][key]
    }  # fmt: skip
    settings = "data.templates data.kinds model.init augment.mean augment.std"
    assert changed == {*settings.split(), *(f"train.{key}" for key in (
        "precision", "accumulate", "draws", "decay", "max_logit_scale", "evaluate_every"
    ))}  # fmt: skip
    pixels = [255 * value for value in (*official.augment.mean, *official.augment.std)]
    assert pixels == pytest.approx([123.675, 116.28, 103.53, 58.395, 57.12, 57.375])  # as mmcv has them
    assert official.train.batch_size == 8 * 8 * official.train.accumulate  # processes, clips of each
    assert len(choose_prompts(official, list(shipped_classes("kinetics400"))).prompts) == 31


def test_dictionaries_round_trip():
    config = Config()
    assert from_dict(to_dict(config)) == config


def test_overrides_and_numbers_without_a_point(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {lr: 1e-5}\n")
    config = load_config(
        file,
        {
            "model": {"frames": 16},
            "data": {"root": "/videos"},
            "train": {"weight_decay": 0},
            "augment": {"scales": [1, 0.5]},
        },
    )
    assert (config.train.lr, config.model.frames, config.data.root, config.train.weight_decay) == (
        1e-5,
        16,
        "/videos",
        0.0,
    )
    assert config.augment.scales == (1.0, 0.5)


@pytest.mark.parametrize("embedding", [True, False, "rotary"])
def test_a_window_and_each_temporal_embedding_round_trip(tmp_path, embedding):
    file = tmp_path / "c.yaml"
    written = str(embedding).lower()
    file.write_text(f"model: {{attention: kmct, window: 8, sink: 1, temporal_embedding: {written}}}\n")
    config = load_config(file)
    assert (config.model.window, config.model.sink) == (8, 1)
    assert config.model.temporal_embedding is embedding or config.model.temporal_embedding == "rotary" == embedding
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rates: 1}", "unknown setting train.learning_rates"),
        ("train: {batch_sise: 1}", "unknown setting train.batch_sise (did you mean train.batch_size?)"),
        ("lr: 1", "unknown setting lr (did you mean train.lr?)"),
        ("trian: {}", "unknown setting trian (did you mean train?)"),
        ("train: {epochs: many}", "train.epochs must be int, not 'many'"),
        ("train: {epochs: 0}", "train.epochs must be at least 1"),
        ("train: {tune: head}", "train.tune must be one of full, temporal"),
        ("train: {lr: -1}", "train.lr must be in (0, inf), not -1.0"),
        ("train: {lr: 0}", "train.lr must be in (0, inf), not 0.0"),
        ("train: {lr: .nan}", "train.lr must be in (0, inf), not nan"),
        ("train: {lr: .inf}", "train.lr must be in (0, inf), not inf"),
        ("train: {eps: 0}", "train.eps must be in (0, inf), not 0.0"),
        ("train: {timeout: 0}", "train.timeout must be in (0, inf), not 0.0"),
        ("train: {max_grad_norm: -1}", "train.max_grad_norm must be in (0, inf), not -1.0"),
        ("train: {temporal_lr_mult: -1}", "train.temporal_lr_mult must be in [0, inf), not -1.0"),
        ("train: {warmup_epochs: -1}", "train.warmup_epochs must be in [0, inf), not -1.0"),
        ("train: {weight_decay: .nan}", "train.weight_decay must be in [0, inf), not nan"),
        ("train: {min_lr_ratio: 2}", "train.min_lr_ratio must be in [0, 1], not 2.0"),
        ("train: {layer_decay: 0}", "train.layer_decay must be in (0, 1], not 0.0"),
        ("train: {layer_decay: 1.5}", "train.layer_decay must be in (0, 1], not 1.5"),
        ("train: {ema: 1}", "train.ema must be in (0, 1), not 1.0"),
        ("train: {betas: [0.9, 1]}", "train.betas must be in [0, 1), not 1.0"),
        ("train: {betas: [0.9]}", "train.betas must be tuple[float, float], not '[0.9]'"),
        ("train: {save_every: 0}", "train.save_every must be at least 1, not 0"),
        ("train: {keep: 0}", "train.keep must be at least 1, not 0"),
        ("train: {trackers: [tensorboard, tensorboard]}", "train.trackers must be different names"),
        ("train: {precision: fp8}", "train.precision must be one of"),
        ("train: 3", "train must be a mapping of epochs, batch_size"),
        ("- 1", "expected a mapping of run_dir, seed, data"),
        ("a: [", "not a readable YAML file"),
        ("augment: {flip: 2}", "flip is a probability"),
        ("data: {kinds: scene}", "data.kinds must be a list such as [scene], not 'scene'"),
        ("test: {crops: 2}", "test.crops must be 1 (the centre) or 3"),
        ("test: {clips: 0}", "test.clips must be at least 1, not 0"),
        ("model: {frames: 0}", "model.frames must be at least 1, not 0"),
        ("model: {vision: {layers: 2}}", "model.pretrained is 'openai', but model.vision makes a model of its own"),
        ("model: {text: {layers: 2}}", "model.text is of a model of one's own: give model.vision too"),
        (
            "model: {temporal_embedding: rotary, temporal_std: 1}",
            "model.temporal_std is of a learned temporal embedding",
        ),
        ("model: {temporal_embedding: rotari}", "temporal_embedding must be one of true, false, rotary, not 'rotari'"),
        ("model: {temporal_embedding: 3}", "temporal_embedding must be bool | str, not '3'"),
        ("model: {temporal_embedding: null}", "temporal_embedding must be one of true, false, rotary, not None"),
        ("model: {window: 8}", "model.window and model.sink are of attention causal and kmct, not of kmt"),
        (
            "model: {attention: joint, sink: 1}",
            "model.window and model.sink are of attention causal and kmct, not of joint",
        ),
        ("model: {attention: kmct, window: 0}", "model.window must be at least 1 frame, not 0"),
        ("model: {attention: kmct, window: true}", "model.window must be int | None, not True"),
        ("model: {attention: kmct, window: 8, sink: -1}", "model.sink must be at least 0 frames, not -1"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_config(file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_refused_with_the_nearest_that_is_shipped(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such configuration"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match=re.escape("k400_b16_8: no such configuration (did you mean k400_b16_8f?)")):
        load_config("k400_b16_8")


def test_every_setting_and_every_option_is_explained(capsys):
    """What `--help` prints is what the docstrings say: none is without words, none explains what is not there."""
    for kind in (Config, DataConfig, ModelConfig, AugmentConfig, TrainConfig, TestConfig):
        explained = {item.arg_name for item in parse_docstring(kind.__doc__).params if item.description}
        assert explained == {item.name for item in dataclasses.fields(kind)}, kind.__name__
    with pytest.raises(SystemExit):
        claver_k400.main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name in settings_of():
        assert f"--{name} " in printed, name

"""The configuration of a run: dataclasses, read from YAML; the defaults are the authors' settings for Kinetics-400."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .augment import AugmentConfig
from .prompts import KINDS

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "TestConfig",
    "TrainConfig",
    "from_dict",
    "load_config",
    "override",
    "to_dict",
]

WINDOWED = ("causal", "kmct")


@dataclass(frozen=True)
class DataConfig:
    """Lists of videos and classes, and the texts of the classes. Relative paths in the lists are under `root`.

    `train_list` and `test_list` are text or CSV lists, or else a folder or a tar file with a folder for each class, or
    WebDataset shards (a folder, a glob, or `shards-{000000..000009}.tar`): see `videos.read_videos`.
    `prompts` says which sentences join the templates: "auto" those that are shipped for the data set whose classes `labels`
    has, if there are any; a data set's name those of that one; a path those of a file; "templates" (or nothing) none;
    "names" makes the bare class names the only texts.
    """

    root: str = "data/k400"
    train_list: str = "data/k400/train.txt"
    test_list: str = "data/k400/val.txt"
    labels: str = "data/k400/labels.csv"
    prompts: str | None = "auto"
    kinds: tuple[str, ...] | None = None  # of sentences, some of prompts.KINDS; None: all that the file has
    per_kind: int | None = None  # sentences of each kind, the first ones; None: all
    templates: tuple[str, ...] | None = None  # with {} for the class name; None: the 16 templates for actions
    num_workers: int = 8
    cache: bool = False  # keep decoded frames in memory: for small sets, with num_workers=0
    broken: str = (
        "refuse"  # training videos that cannot be read; or "skip": others take their places, and they are named
    )
    max_broken: float = 0.01  # share of the training videos that may be skipped; with more the run stops

    def __post_init__(self) -> None:
        _choice("data.broken", self.broken, ("refuse", "skip"))
        if not 0 <= self.max_broken < 1:
            raise ValueError(f"data.max_broken must be a share from 0 to less than 1, not {self.max_broken}")
        if self.broken == "refuse" and self.max_broken != type(self).max_broken:
            raise ValueError("data.max_broken is of data.broken = skip; leave it out, or skip")
        for kind in self.kinds or ():
            _choice("data.kinds", kind, KINDS)
        if self.kinds is not None and len(set(self.kinds)) < max(1, len(self.kinds)):
            raise ValueError(f"data.kinds must be one or more different kinds, not {list(self.kinds)}")
        if self.per_kind is not None and self.per_kind < 1:
            raise ValueError(f"data.per_kind must be at least 1, not {self.per_kind}")


@dataclass(frozen=True)
class ModelConfig:
    """An open_clip model and its temporal layers.

    `name` is an open_clip architecture and `pretrained` a tag or a file of weights. With `vision` and `text` (arguments of
    open_clip's CLIPVisionCfg and CLIPTextCfg) and `embed_dim`, the model is made from these and `name` is only a label.

    Raises:
        ValueError: a window or sink of a mask that has none, or an unknown temporal embedding.
    """

    name: str = "ViT-B-32"
    pretrained: str | None = "openai"
    quick_gelu: bool = True  # as OpenAI's weights were trained
    embed_dim: int = 512
    vision: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    frames: int = 8
    attention: str = "kmt"
    window: int | None = (
        None  # frames that a frame sees, its own among them; of causal and kmct; None: all earlier ones
    )
    sink: int = 0  # of the first frames, which are seen beyond the window
    placement: str = "append"
    layers: int | None = None  # temporal blocks; None: depth // 3
    init: str = "random"
    temporal_embedding: bool | str = True  # a learned vector for each frame, False for none, or "rotary"
    # for training from scratch, where CLIP's small initial values take long to grow; None: CLIP's and the paper's
    position_std: float | None = None
    temporal_std: float | None = None  # of the learned temporal embedding
    token_std: float | None = None
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        if self.temporal_embedding not in (True, False, "rotary"):
            raise ValueError(
                f"model.temporal_embedding must be one of true, false, rotary, not {self.temporal_embedding!r}"
            )
        if (self.window is not None or self.sink) and self.attention not in WINDOWED:
            raise ValueError(
                f"model.window and model.sink are of attention {' and '.join(WINDOWED)}, not of {self.attention}; leave them out"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"model.window must be at least 1 frame, not {self.window}")
        if self.sink < 0:
            raise ValueError(f"model.sink must be at least 0 frames, not {self.sink}")


@dataclass(frozen=True)
class TrainConfig:
    """AdamW with a cosine schedule; `batch_size` is global: all processes and accumulated steps together.

    Raises:
        ValueError: a value that no run can have; the message names it.
    """

    epochs: int = 60
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 1.2e-5
    temporal_lr_mult: float = 10.0
    layer_decay: float | None = None  # factor on lr for each block of a tower below its last, such as 0.75
    min_lr_ratio: float = 0.01
    warmup_epochs: float = 5.0
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    max_grad_norm: float | None = None
    ema: float | None = None  # decay each step of the average of the weights that is evaluated, such as 0.9998
    prompts_per_step: int = 5  # drawn anew each step, K of A
    tune: str = "full"  # or "vision": the text tower stays frozen; or "temporal": the image tower does, too
    precision: str = "no"  # float32, or "fp16", "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False  # by torch.compile
    fsdp: bool = (
        False  # each process keeps its share of weights and optimizer (FSDP2): for models too large for one GPU
    )
    timeout: float = 600.0  # seconds after which a process gives up waiting for the others
    evaluate_every: int = 5  # epochs between evaluations of the middle view
    save_every: int | None = None  # steps between checkpoints, besides the one at the end of each epoch
    keep: int = 1  # last checkpoints; the best is kept besides
    trackers: tuple[str, ...] = (
        "tensorboard",
    )  # where losses are logged besides history.jsonl: names that Accelerate knows

    def __post_init__(self) -> None:
        _choice("train.tune", self.tune, ("full", "temporal", "vision"))
        _choice("train.precision", self.precision, ("no", "fp16", "bf16"))
        for name in ("epochs", "batch_size", "accumulate", "prompts_per_step", "evaluate_every", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1, not {value}")
        for name in ("lr", "eps", "timeout", "max_grad_norm"):
            _within(f"train.{name}", getattr(self, name), "(0, inf)")
        for name in ("temporal_lr_mult", "warmup_epochs", "weight_decay"):
            _within(f"train.{name}", getattr(self, name), "[0, inf)")
        _within("train.min_lr_ratio", self.min_lr_ratio, "[0, 1]")
        _within("train.layer_decay", self.layer_decay, "(0, 1]")
        _within("train.ema", self.ema, "(0, 1)")
        if len(self.betas) != 2:
            raise ValueError(f"train.betas must be two numbers, not {list(self.betas)}")
        for beta in self.betas:
            _within("train.betas", beta, "[0, 1)")
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"train.trackers must be different names, not {list(self.trackers)}")


@dataclass(frozen=True)
class TestConfig:
    """Multi-view evaluation: softmax averaged over prompts, `clips` views in time and `crops` in space."""

    __test__ = False  # not a test, whatever pytest makes of its name

    clips: int = 4
    crops: int = 3
    batch_size: int = 8  # videos
    broken: str = "refuse"  # videos that cannot be read; or "wrong": they count as wrong, and are listed

    def __post_init__(self) -> None:
        _choice("test.broken", self.broken, ("refuse", "wrong"))


@dataclass(frozen=True)
class Config:
    run_dir: str = "runs/claver"
    seed: int = 3047
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """A configuration from a YAML file; each override is `section.key=value`, the value in YAML.

    Raises:
        ValueError: a file that is no mapping, an unknown key (the message lists the known ones) or a value of a wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of sections, not {type(values).__name__}")
    return from_dict(override(values, overrides or []), str(path))


def override(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of nested dictionaries with some values set; each override is `section.key=value`, the value in YAML.

    Raises:
        ValueError: an override without `=`, or one that names a value as if it were a section.
    """
    values = copy.deepcopy(values)
    for item in overrides:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes section.key=value, not {item!r}")
        *sections, key = name.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {item}: {section} is no section")
        target[key] = yaml.safe_load(value)
    return values


def from_dict(values: dict[str, Any], source: str = "config") -> Config:
    """A configuration from nested dictionaries, as `to_dict` writes and YAML reads them; errors are those of `load_config`."""
    return _build(Config, values, source)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def _build(kind: Any, values: Any, source: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a mapping of {', '.join(_fields(kind))}, not {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = [str(key) for key in values if key not in hints]
    if unknown:
        raise ValueError(f"{source}: unknown {', '.join(unknown)}; known are {', '.join(_fields(kind))}")
    return kind(**{key: _value(hints[key], value, f"{source}: {key}") for key, value in values.items()})


def _value(hint: Any, value: Any, source: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, source)
    if isinstance(hint, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        if len(options) > 1:
            return _one_of(options, value, source)
        hint = options[0]
    origin = typing.get_origin(hint) or hint
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(typing.get_args(hint)[0], item, source) for item in value)
    if origin is float and isinstance(value, str):  # YAML 1.1 reads 1e-5, without a point, as text
        try:
            return float(value)
        except ValueError:
            pass
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, (str, int, float)):
        raise ValueError(f"{source} must be a list such as [{value}], not {value!r}")
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise ValueError(f"{source} must be {getattr(hint, '__name__', hint)}, not {value!r}")
    return value


def _one_of(options: list[Any], value: Any, source: str) -> Any:
    for option in options:
        try:
            return _value(option, value, source)
        except ValueError:
            pass
    raise ValueError(f"{source} must be {' or '.join(option.__name__ for option in options)}, not {value!r}")


def _fields(kind: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _within(name: str, value: float | None, interval: str) -> None:
    """Refuse a number outside of an interval such as "(0, 1]", whose parentheses exclude and brackets include; NaN is outside."""
    low, high = map(float, interval[1:-1].split(","))
    if value is not None and not (
        (low <= value if interval[0] == "[" else low < value)
        and (value <= high if interval[-1] == "]" else value < high)
    ):
        raise ValueError(f"{name} must be in {interval}, not {value}")

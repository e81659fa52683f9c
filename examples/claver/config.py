"""The configuration of a run: dataclasses; the defaults are the authors' settings for Kinetics-400.

jsonargparse makes the options of the command line, their help and their types of these classes; see `settings`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .data.augment import AugmentConfig
from .prompts.build import KINDS, TEMPLATES

__all__ = ["Config", "DataConfig", "ModelConfig", "TestConfig", "TrainConfig", "by_split"]

WINDOWED = ("causal", "kmct")


@dataclass(frozen=True)
class DataConfig:
    """Videos, classes and texts.

    Attributes:
        root: folder of the relative paths in the lists.
        train_list: videos to train on: a text file of `path label` lines or a CSV; a folder or a tar file with a folder for each
            class; or WebDataset shards (a folder, a glob, or shards-{000000..000009}.tar).
        test_list: videos to evaluate on, likewise.
        labels: CSV of id,name.
        splits: names that take the place of {split} in these paths; evaluation goes over all, training takes the first.
        prompts: sentences that join the templates: "auto" those that are shipped for the data set whose classes `labels` has, if
            there are any; a data set's name those of that one; a path those of a file; "templates" (or null) none; "names" makes
            the bare class names the only texts.
        kinds: of sentences, some of decomposition, body_parts, synonyms, scene; null for all that the file has.
        per_kind: sentences of each kind, the first ones; null for all.
        templates: gerund (a person is {}), neutral (fit any class name), official (the authors'), or a list, each with {} for the
            class name; null for gerund if most class names have one (running), else neutral.
        num_workers: processes that decode videos, for each process that trains.
        cache: keep decoded frames in memory: for small sets, with num_workers 0.
        broken: training videos that cannot be read: refuse; or skip, and others take their places, and they are named.
        max_broken: share of the training videos that may be skipped; with more the run stops.
    """

    root: str = "data/k400"
    train_list: str = "data/k400/train.txt"
    test_list: str = "data/k400/val.txt"
    labels: str = "data/k400/labels.csv"
    splits: tuple[str, ...] | None = None
    prompts: str | None = "auto"
    kinds: tuple[str, ...] | None = None
    per_kind: int | None = None
    templates: str | tuple[str, ...] | None = None
    num_workers: int = 8
    cache: bool = False
    broken: str = "refuse"
    max_broken: float = 0.01

    def __post_init__(self) -> None:
        paths = (self.train_list, self.test_list, self.labels)
        if (self.splits is not None) != any("{split}" in path for path in paths):
            raise ValueError(
                f"data.splits is {self.splits and list(self.splits)}, and {{split}} stands in "
                f"{', '.join(path for path in paths if '{split}' in path) or 'none of the paths'}: give both or neither"
            )
        if self.splits is not None and (not self.splits or len(set(self.splits)) < len(self.splits)):
            raise ValueError(f"data.splits must be one or more different names, not {list(self.splits)}")
        _choice("data.broken", self.broken, ("refuse", "skip"))
        if not 0 <= self.max_broken < 1:
            raise ValueError(f"data.max_broken must be a share from 0 to less than 1, not {self.max_broken}")
        if self.broken == "refuse" and self.max_broken != type(self).max_broken:
            raise ValueError("data.max_broken is of data.broken = skip; leave it out, or skip")
        for kind in self.kinds or ():
            _choice("data.kinds", kind, KINDS)
        if self.kinds is not None and len(set(self.kinds)) < max(1, len(self.kinds)):
            raise ValueError(f"data.kinds must be one or more different kinds, not {list(self.kinds)}")
        if isinstance(self.templates, str):
            _choice("data.templates", self.templates, tuple(TEMPLATES), " or a list")
        if self.per_kind is not None and self.per_kind < 1:
            raise ValueError(f"data.per_kind must be at least 1, not {self.per_kind}")


@dataclass(frozen=True)
class ModelConfig:
    """An open_clip model and its temporal layers.

    Attributes:
        name: an open_clip architecture; with `vision` only a label.
        pretrained: open_clip's tag of its weights, or a file of them; null for random ones.
        quick_gelu: as OpenAI's weights were trained.
        embed_dim: of the features, with `vision`.
        vision: arguments of open_clip's CLIPVisionCfg, for a model of one's own.
        text: arguments of its CLIPTextCfg, with `vision`.
        frames: of a clip.
        attention: mask over the frames: kmt, kmct, joint, causal, spatial and others, see kronmask.masks.
        window: frames that a frame sees, its own among them; of causal and kmct; null for all earlier ones.
        sink: first frames that are seen beyond the window.
        placement: append, interleave or replace, see patch_vit.
        layers: temporal blocks; null for a third of the image blocks.
        init: of temporal blocks: random (as CLIP's blocks), torch (as torch's layers, which the authors do), zero or copy.
        temporal_embedding: true for a learned vector for each frame, false for none, or rotary.
        position_std: of the initial positions, for training from scratch, where CLIP's small values take long to grow.
        temporal_std: of the initial temporal embedding; null for the paper's.
        token_std: of the initial token embedding; null for CLIP's.
        logit_scale: initial scale of the logits; null for CLIP's.

    Raises:
        ValueError: settings that do not fit together, or an unknown temporal embedding.
    """

    name: str = "ViT-B-32"
    pretrained: str | None = "openai"
    quick_gelu: bool = True
    embed_dim: int = 512
    vision: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    frames: int = 8
    attention: str = "kmt"
    window: int | None = None
    sink: int = 0
    placement: str = "append"
    layers: int | None = None
    init: str = "random"
    temporal_embedding: bool | str = True
    position_std: float | None = None
    temporal_std: float | None = None
    token_std: float | None = None
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        if self.vision is not None and self.pretrained is not None:
            raise ValueError(
                f"model.pretrained is {self.pretrained!r}, but model.vision makes a model of its own, which has no weights yet: "
                "set it to null"
            )
        if self.text is not None and self.vision is None:
            raise ValueError("model.text is of a model of one's own: give model.vision too")
        if self.temporal_std is not None and self.temporal_embedding is not True:
            raise ValueError(
                "model.temporal_std is of a learned temporal embedding, but model.temporal_embedding is "
                f"{self.temporal_embedding!r}"
            )
        if self.frames < 1:
            raise ValueError(f"model.frames must be at least 1, not {self.frames}")
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
    """AdamW with a cosine schedule.

    Attributes:
        epochs: to train for.
        batch_size: clips of a step, of all processes and accumulated steps together.
        accumulate: steps through the model for one of the optimizer.
        lr: learning rate after the warm-up.
        temporal_lr_mult: factor on it for temporal parameters.
        layer_decay: factor on it for each block of a tower below its last, such as 0.75; null for none.
        min_lr_ratio: of the last to the first learning rate of the cosine.
        warmup_epochs: epochs in which the learning rate rises from 0.
        weight_decay: of matrices; biases, norms and positions have none, see decay.
        betas: of AdamW.
        eps: of AdamW.
        max_grad_norm: to which gradients are cut; null for any.
        ema: decay each step of the average of the weights that is evaluated, such as 0.9998; null for no average.
        prompts_per_step: texts of each class that are drawn anew each step.
        draws: step (different texts, for all micro-batches and processes of a step) or microbatch (each draws its own, with
            replacement, as the authors' code does).
        classes_per_step: classes of the loss, those of the clips and others at random; null for all.
        decay: which parameters have weight decay: usual (matrices) or official (the authors' rule: also the temporal embedding
            and the logit scale).
        max_logit_scale: bound of the logits' scale, CLIP's own by default; null for none.
        tune: full; or vision, and the text tower stays frozen; or temporal, and the image tower does, too.
        precision: no (float32), fp16 or bf16.
        gradient_checkpointing: compute activations again instead of keeping them.
        compile: by torch.compile.
        fsdp: each process keeps its share of weights and optimizer (FSDP2), for models too large for one GPU.
        timeout: seconds after which a process gives up waiting for the others.
        evaluate_every: epochs between evaluations of the middle view.
        save_every: steps between checkpoints, besides the one at the end of each epoch; null for none.
        keep: last checkpoints; the best is kept besides.
        trackers: where losses are logged besides history.jsonl, names that Accelerate knows.

    Raises:
        ValueError: a value that no run can have; the message names it.
    """

    epochs: int = 60
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 1.2e-5
    temporal_lr_mult: float = 10.0
    layer_decay: float | None = None
    min_lr_ratio: float = 0.01
    warmup_epochs: float = 5.0
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    max_grad_norm: float | None = None
    ema: float | None = None
    prompts_per_step: int = 5
    draws: str = "step"
    classes_per_step: int | None = None
    decay: str = "usual"
    max_logit_scale: float | None = 100.0
    tune: str = "full"
    precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    timeout: float = 600.0
    evaluate_every: int = 5
    save_every: int | None = None
    keep: int = 1
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        _choice("train.tune", self.tune, ("full", "temporal", "vision"))
        _choice("train.precision", self.precision, ("no", "fp16", "bf16"))
        _choice("train.draws", self.draws, ("step", "microbatch"))
        _choice("train.decay", self.decay, ("usual", "official"))
        if self.classes_per_step is not None and self.classes_per_step < 2:
            raise ValueError(f"train.classes_per_step must be at least 2, or null for all, not {self.classes_per_step}")
        for name in ("epochs", "batch_size", "accumulate", "prompts_per_step", "evaluate_every", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1, not {value}")
        for name in ("lr", "eps", "timeout", "max_grad_norm", "max_logit_scale"):
            _within(f"train.{name}", getattr(self, name), "(0, inf)")
        for name in ("temporal_lr_mult", "warmup_epochs", "weight_decay"):
            _within(f"train.{name}", getattr(self, name), "[0, inf)")
        _within("train.min_lr_ratio", self.min_lr_ratio, "[0, 1]")
        _within("train.layer_decay", self.layer_decay, "(0, 1]")
        _within("train.ema", self.ema, "(0, 1)")
        for beta in self.betas:
            _within("train.betas", beta, "[0, 1)")
        if self.fsdp and self.precision == "fp16":
            raise ValueError(
                "train.fsdp is for train.precision no or bf16: the scale of fp16's loss is one process's own"
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"train.trackers must be different names, not {list(self.trackers)}")


@dataclass(frozen=True)
class TestConfig:
    """Multi-view evaluation: softmax averaged over prompts and views.

    Attributes:
        clips: views in time.
        crops: views in space, 1 (the centre) or 3 (along the longer side).
        batch_size: videos.
        summary: of several splits: mean, with the standard deviation; or harmonic, as of base and novel classes.
        broken: videos that cannot be read: refuse; or wrong, and they count as wrong, and are listed.
    """

    __test__ = False  # not a test, whatever pytest makes of its name

    clips: int = 4
    crops: int = 3
    batch_size: int = 8
    summary: str = "mean"
    broken: str = "refuse"

    def __post_init__(self) -> None:
        _choice("test.summary", self.summary, ("mean", "harmonic"))
        _choice("test.broken", self.broken, ("refuse", "wrong"))
        if self.crops not in (1, 3):
            raise ValueError(f"test.crops must be 1 (the centre) or 3 (along the longer side), not {self.crops}")
        for name in ("clips", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"test.{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Config:
    """A run.

    Attributes:
        run_dir: folder for everything that is written.
        seed: of initial weights, order, augmentation and draws of prompts.
        data: videos, classes and texts.
        model: the model and its temporal layers.
        augment: pixels of a clip.
        train: the optimizer and its schedule.
        test: multi-view evaluation.
    """

    run_dir: str = "runs/claver"
    seed: int = 3047
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)


def by_split(config: Config) -> dict[str, Config]:
    """For each of `data.splits` the configuration with its paths; the configuration itself, as "", if it has no splits."""
    if config.data.splits is None:
        return {"": config}
    found = {}
    for split in config.data.splits:
        names = ("train_list", "test_list", "labels")
        paths = {name: getattr(config.data, name).replace("{split}", split) for name in names}
        found[split] = replace(config, data=replace(config.data, splits=None, **paths))
    return found


def _choice(name: str, value: str, choices: tuple[str, ...], others: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}{others}, not {value!r}")


def _within(name: str, value: float | None, interval: str) -> None:
    """Refuse a number outside of an interval such as "(0, 1]", whose parentheses exclude and brackets include; NaN is outside."""
    low, high = map(float, interval[1:-1].split(","))
    if value is not None and not (
        (low <= value if interval[0] == "[" else low < value)
        and (value <= high if interval[-1] == "]" else value < high)
    ):
        raise ValueError(f"{name} must be in {interval}, not {value}")

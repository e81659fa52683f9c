"""What a training has before its first step: videos, texts, a model with its first weights; refused if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..config import Config
from ..data.broken import BrokenFiles, file_problems
from ..data.datasets import TrainDataset, train_loader
from ..data.lists import read_labels
from ..data.videos import VideoList, read_videos
from ..evaluation.evaluate import test_loader
from ..model import Claver, build_model, describe_trained, freeze
from ..prompts.choice import choose_prompts
from ..text import TrainingTexts, tokens_of
from ..weights.checkpoint import BEST, CheckpointError, load_checkpoint, load_model
from .run_folder import clean, load_pair, saved_steps, weights_of
from .state import TrainState, check_same_run
from .step import TrainStep

__all__ = ["Prepared", "pass_over", "prepare"]


@dataclass
class Prepared:
    """A run before its first step.

    Attributes:
        classes: their names.
        prompts: `[A][C]`.
        tokens: of the prompts `(A, C, context)`, on the device.
        state: what its steps change.
        step: does the next step.
        loader: of the training clips.
        middle: loader of the middle views of the test videos.
        broken: training videos that are passed over.
        per_epoch: steps of an epoch.
        total: steps of the run.
        saved: the step of the last checkpoint; None if there is none yet.
    """

    classes: list[str]
    prompts: list[list[str]]
    tokens: Tensor
    state: TrainState
    step: TrainStep
    loader: Any
    middle: Any
    broken: BrokenFiles
    per_epoch: int
    total: int
    saved: int | None


def prepare(
    config: Config,
    accelerator: Accelerator,
    *,
    model: Claver | None,
    init_from: str | Path | None,
    resume: bool,
    overwrite: bool,
) -> Prepared:
    """Read all that a run needs, and say what it is; arguments and errors are those of `train.train`."""
    folder, settings, data, say = Path(config.run_dir), config.train, config.data, accelerator.print
    shares = accelerator.num_processes * settings.accumulate
    if settings.batch_size % shares:
        raise ValueError(
            f"train.batch_size is global: {settings.batch_size} is no multiple of {accelerator.num_processes} processes "
            f"* {settings.accumulate} accumulated steps"
        )
    first = _open_folder(folder, accelerator, keep=settings.keep, resume=resume, overwrite=overwrite)

    classes = read_labels(data.labels)
    train = read_videos(data.train_list, data.root, classes)
    test = read_videos(data.test_list, data.root, classes)
    broken = BrokenFiles(train.samples, data.max_broken if data.broken == "skip" else None)
    pass_over(broken, _found("train", train, classes, say), say)
    if config.test.broken == "refuse":
        BrokenFiles(test.samples, None).add(_found("test", test, classes, say))
    _, prompts, per_step, description = choose_prompts(config, classes)
    if per_step > len(prompts):
        raise ValueError(f"train.prompts_per_step is {per_step}, but there are {len(prompts)} prompts for each class")
    how = "each step" if settings.draws == "step" else "with replacement for each micro-batch and process"
    say(f"texts: {description}; {per_step} of {len(prompts)} drawn {how}")

    saved = None
    torch.manual_seed(config.seed)
    if first is not None:
        content, saved = load_pair(folder, first)
        check_same_run(weights_of(folder, first), content, config, classes, prompts)
        model = _with_weights(weights_of(folder, first), config, model)
        say(f"resuming {folder} after step {first}")
        _check_processes(saved["processes"], accelerator.num_processes, train, say)
        if data.broken == "skip":  # a restart gives no new allowance
            for name, reason in broken.add(
                (broken.names[place], why) for place, why in saved.get("broken", {}).items()
            ):
                say(f"passed over before: {name}: {reason}")
            broken.replaced = saved.get("replaced", 0) if accelerator.is_main_process else 0
    elif init_from is not None:
        model = _with_weights(init_from, config, model)
        say(f"starting from the weights of {init_from}")
    elif resume:
        say(f"{folder} has no checkpoint yet: starting")
    model = build_model(config.model) if model is None else model
    freeze(model, settings.tune)
    if settings.gradient_checkpointing:
        model.clip.set_grad_checkpointing()
    say(describe_trained(model))

    clips = settings.batch_size // shares
    tokens = tokens_of(prompts, model).to(accelerator.device)
    texts = TrainingTexts(  # now, while a tower that is not trained, and is used here, is in one piece
        model,
        tokens,
        accelerator,
        per_step=per_step,
        draws=settings.draws,
        classes_per_step=settings.classes_per_step,
        one_group=settings.fsdp,
    )
    say(texts.describe((clips, config.model.frames, 3, config.augment.size, config.augment.size)))
    state = TrainState(config, model, accelerator)
    if saved is not None and first is not None:
        state.load_state_dict(saved, first)

    loader = train_loader(
        TrainDataset(
            train.samples,
            config.model.frames,
            config.augment,
            seed=config.seed,
            cache=data.cache,
            skip_broken=data.broken == "skip",
        ),
        clips,
        num_workers=data.num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
        stream=train.kind == "shards",
    )
    per_epoch = len(loader) // settings.accumulate
    if not per_epoch:
        raise ValueError(f"{len(train.samples)} training videos do not fill one batch of {settings.batch_size}")
    total, warmup = settings.epochs * per_epoch, round(settings.warmup_epochs * per_epoch)
    say(
        f"{config.model.attention} over {config.model.frames} frames of {config.augment.size} pixels, mean "
        f"{_listed(config.augment.mean)}, std {_listed(config.augment.std)}"
    )
    say(
        f"a batch of {settings.batch_size} clips is {accelerator.num_processes} processes * {settings.accumulate} accumulated "
        f"* {clips}; {settings.epochs} epochs of {per_epoch} steps; lr {settings.lr:g}, temporal "
        f"{settings.lr * settings.temporal_lr_mult:g}, {warmup} steps of warm-up"
    )
    return Prepared(
        classes,
        prompts,
        tokens,
        state,
        TrainStep(config, state, accelerator, texts, samples=train.samples, total=total, warmup=warmup),
        loader,
        test_loader(config, test.samples, accelerator, clips=1, crops=1),
        broken,
        per_epoch,
        total,
        first,
    )


def pass_over(broken: BrokenFiles, problems: Sequence[tuple[str, str]], say: Callable[[str], object]) -> None:
    """Name videos that are passed over, each once; raises DatasetError where there are too many."""
    for name, reason in broken.add(problems):
        say(f"skipping {name}: {reason}")


def _open_folder(folder: Path, accelerator: Accelerator, *, keep: int, resume: bool, overwrite: bool) -> int | None:
    """Make the folder of a run; the step of the checkpoint to go on from, the same on all processes."""
    steps, best = saved_steps(folder), (folder / BEST).exists()
    if (steps or best) and not (resume or overwrite):
        raise ValueError(f"{folder} holds a run already; go on with it (--resume), or choose another run_dir")
    if best and not steps and not overwrite:
        raise ValueError(f"{folder} holds {BEST}, but no checkpoint to go on from; choose another run_dir")
    (first,) = broadcast_object_list([steps[-1] if steps and resume else None])
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder, keep=keep if resume else 0)
    return first


def _found(
    name: str, videos: VideoList, classes: Sequence[str], say: Callable[[str], object]
) -> Sequence[tuple[str, str]]:
    """Say how many videos of a list are there; `(name, reason)` of those that are not."""
    problems = file_problems(videos.samples)
    expected = len({sample.path for sample in videos.samples})
    say(
        f"{name}: found {expected - len(problems)} of {expected} videos of {len(classes)} classes, {videos.kind} {videos.hash}"
    )
    return problems


def _check_processes(there: int, here: int, videos: VideoList, say: Callable[[str], object]) -> None:
    """Say, or refuse, that a run goes on with another number of processes."""
    if there == here:
        return
    if videos.kind == "shards":
        raise CheckpointError(
            f"the run had {there} processes, and this is {here}: which videos of shards are in a step depends on it; start it "
            f"with {there}, or train from a list"
        )
    say(
        f"it ran on {there} processes and goes on with {here}: the same videos in each step, but mixed in other pairs, so the "
        "losses will not be those it would have had"
    )


def _with_weights(path: str | Path, config: Config, model: Claver | None) -> Claver:
    """The model of a configuration, or the one that is given, with the weights of a checkpoint."""
    if model is None:
        return load_model(path, config, any_frames=True)[0]
    try:
        model.load_state_dict(load_checkpoint(path)["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the model: {error}") from error
    return model


def _listed(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)

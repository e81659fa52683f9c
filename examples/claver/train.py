"""Training: from a configuration to a folder of checkpoints; goes on exactly where it was stopped or killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from .broken import BrokenFiles, check_files, file_problems
from .checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint, written
from .config import Config
from .data import TestDataset, TrainDataset, eval_loader, read_labels, set_epoch, train_loader
from .evaluate import Evaluation, evaluate
from .lists import Sample
from .model import Claver, build_model, describe_trained, freeze
from .processes import StopSignals, end_together, start_processes
from .prompt_choice import choose_prompts
from .prompts import tokenize
from .run_folder import BEST, empty, load_pair, save_pair, saved_steps, weights_of
from .settings import to_dict
from .state import TrainState, check_same_run
from .step import NonFiniteError, StepResult, TrainStep
from .videos import VideoList, read_videos

__all__ = ["Run", "Stopped", "run_evaluation", "tokens_of", "train"]

LOG_EVERY = 10  # steps between records of the loss


class Run:
    """What a training leaves: its folder, the model and the history of records `{step, loss, lr}` and `{step, top1}`.

    The model is the one that was evaluated last: the average of the weights, with `train.ema`.
    """

    def __init__(self, folder: Path, model: Claver, tokens: Tensor, history: list[dict[str, Any]]) -> None:
        self.folder, self.model, self.tokens, self.history = folder, model, tokens, history


class Stopped(KeyboardInterrupt):
    """A training was stopped by Ctrl-C or SIGTERM; the message says how to go on."""


def tokens_of(prompts: list[list[str]], model: Claver) -> Tensor:
    """Tokens `(A, C, context)` for the text tower of `model`."""
    return tokenize(prompts, context_length=model.clip.context_length)


def train(
    config: Config,
    *,
    model: Claver | None = None,
    init_from: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: str = "training",
    bar_position: int | None = None,
) -> Run:
    """Train and evaluate; writes `config.json`, `history.jsonl`, `best.safetensors` and checkpoints into `config.run_dir`.

    What a step does is a function of the configuration and the step, so a run that is resumed ends as if it never stopped.

    Args:
        config: of the run.
        model: one to train in place of that of `config.model`, for what a configuration cannot say.
        init_from: a checkpoint, ours or the authors', whose weights are those of step 0; a temporal embedding of another
            number of frames is interpolated.
        resume: go on from the last checkpoint in the folder; from the start if there is none yet.
        overwrite: remove the checkpoints that are in the folder.
        progress: what the progress bar says.
        bar_position: line of the progress bar.

    Raises:
        DatasetError: lists or files that are missing or broken, all of them named.
        ValueError: a configuration that does not fit together, or a run folder that holds a run and neither `resume` nor
            `overwrite`.
        CheckpointError: a checkpoint that cannot be read, or of another run.
        NonFiniteError: the loss is not finite; the checkpoints before are kept.
        OSError: a checkpoint cannot be written; those before are kept.
        Stopped: by Ctrl-C or SIGTERM, after a checkpoint of the last whole step.
        ProcessError: another process of the run failed.
    """
    accelerator = start_processes(config, trackers=True)
    with end_together(accelerator):
        run = _Training(config, accelerator, model, init_from, resume=resume, overwrite=overwrite)
        return run.loop(progress, bar_position)


class _Training:
    """A run: what is prepared before its first step, and the loop over its steps."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: Claver | None,
        init_from: str | Path | None,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, Path(config.run_dir)
        self.main, settings, say = accelerator.is_main_process, config.train, accelerator.print
        shares = accelerator.num_processes * settings.accumulate
        if settings.batch_size % shares:
            raise ValueError(
                f"train.batch_size is global: {settings.batch_size} is no multiple of {accelerator.num_processes} processes "
                f"* {settings.accumulate} accumulated steps"
            )
        steps, best = saved_steps(self.folder), (self.folder / BEST).exists()
        if (steps or best) and not (resume or overwrite):
            raise ValueError(f"{self.folder} holds a run already; go on with it (--resume), or choose another run_dir")
        if best and not steps and not overwrite:
            raise ValueError(f"{self.folder} holds {BEST}, but no checkpoint to go on from; choose another run_dir")
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            empty(self.folder, checkpoints=not resume)
        # one process says which checkpoint it is: a shared folder may not look the same to all of them
        (first,) = broadcast_object_list([steps[-1] if steps and resume else None])

        self.classes = read_labels(config.data.labels)
        videos, tested = self._videos("train"), self._videos("test").samples
        samples, self.skip = videos.samples, config.data.broken == "skip"
        self.broken, self.replaced = BrokenFiles(samples, config.data.max_broken if self.skip else None), 0
        self._pass_over(file_problems(samples), say)
        if config.test.broken == "refuse":
            check_files(tested)
        _, self.prompts, per_step, description = choose_prompts(config, self.classes)
        if per_step > len(self.prompts):
            raise ValueError(
                f"train.prompts_per_step is {per_step}, but there are {len(self.prompts)} prompts for each class"
            )
        say(f"texts: {description}; {per_step} of {len(self.prompts)} drawn each step")

        saved = None
        torch.manual_seed(config.seed)
        if first is not None:
            content, saved = load_pair(self.folder, first)
            check_same_run(weights_of(self.folder, first), content, config, self.classes, self.prompts)
            model = _with_weights(weights_of(self.folder, first), config, model)
            say(f"resuming {self.folder} after step {first}")
            if saved["processes"] != accelerator.num_processes:
                say(
                    f"it ran on {saved['processes']} processes and goes on with {accelerator.num_processes}: the same videos in "
                    "each step, but mixed in other pairs, so the losses will not be those it would have had"
                )
        elif init_from is not None:
            model = _with_weights(init_from, config, model)
            say(f"starting from the weights of {init_from}")
        elif resume:
            say(f"{self.folder} has no checkpoint yet: starting")
        model = build_model(config.model) if model is None else model
        freeze(model, settings.tune)
        if settings.gradient_checkpointing:
            model.clip.set_grad_checkpointing()
        say(describe_trained(model))
        self.tokens = tokens_of(self.prompts, model).to(accelerator.device)
        self.state = TrainState(config, model, accelerator)
        if saved is not None:
            self.state.load_state_dict(saved, first)
        self.saved = first

        self.loader = train_loader(
            TrainDataset(
                samples,
                config.model.frames,
                config.augment,
                seed=config.seed,
                cache=config.data.cache,
                skip_broken=self.skip,
            ),
            settings.batch_size // shares,
            num_workers=config.data.num_workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            stream=videos.kind == "shards",
        )
        self.middle = _test_loader(config, tested, accelerator, clips=1, crops=1)
        self.per_epoch = len(self.loader) // settings.accumulate
        if not self.per_epoch:
            raise ValueError(f"{len(samples)} training videos do not fill one batch of {settings.batch_size}")
        self.total = settings.epochs * self.per_epoch
        self.do_step = TrainStep(
            config,
            self.state,
            accelerator,
            self.tokens,
            per_step=per_step,
            samples=samples,
            total=self.total,
            warmup=round(settings.warmup_epochs * self.per_epoch),
        )
        say(_describe_engine(config, accelerator, self.per_epoch))

    def _videos(self, name: str) -> VideoList:
        data = self.config.data
        videos = read_videos(getattr(data, f"{name}_list"), data.root, self.classes)
        self.accelerator.print(
            f"{name}: {len(videos.samples)} videos of {len(self.classes)} classes, {videos.kind} {videos.hash}"
        )
        return videos

    def _pass_over(self, problems: Sequence[tuple[str, str]], say: Callable[[str], object]) -> None:
        """Name videos that are passed over, each once; raise where there are too many."""
        for name, reason in self.broken.add(problems):
            say(f"skipping {name}: {reason}")

    def loop(self, progress: str, bar_position: int | None) -> Run:
        """All steps that are left, with evaluations and checkpoints between them."""
        config, state, accelerator = self.config, self.state, self.accelerator
        if self.main:
            with written(self.folder / "config.json") as partial:
                partial.write_text(json.dumps(to_dict(config), indent=2))
        if state.step == 0 and self.saved is None:
            self._save()  # a full disk is found now, and a run that is killed has something to go on from
        accelerator.init_trackers("claver", init_kwargs={"tensorboard": {"purge_step": state.step}})
        silent = not self.main
        state.runner.train()
        with (
            tqdm(
                total=self.total, initial=state.step, desc=progress, position=bar_position, unit="step", disable=silent
            ) as bar,
            StopSignals() as signals,
        ):
            try:
                while state.step < self.total:
                    self._epoch(bar, signals, progress)
            except KeyboardInterrupt as error:
                raise Stopped(
                    f"stopped after step {self.saved} of {self.total}; go on with the same command and --resume"
                ) from error
        accelerator.end_training()
        return Run(self.folder, state.evaluated_model(), self.tokens, state.history)

    def _epoch(self, bar: Any, signals: StopSignals, progress: str) -> None:
        """The steps that are left of an epoch."""
        config, state = self.config, self.state
        epoch, begun = divmod(state.step, self.per_epoch)
        set_epoch(self.loader, epoch, skip=begun * config.train.accumulate)
        batches, recent = iter(self.loader), []
        for _ in range(begun, self.per_epoch):
            result = self.do_step(batches, stop=signals.requested)
            recent.append(result)
            bar.update()
            self.replaced += len(result.errors)
            self._pass_over(result.errors, bar.write)
            ends = state.step % self.per_epoch == 0
            if state.step % LOG_EVERY == 0 or ends:
                self._log({"loss": result.loss, "lr": result.lr})
                bar.set_postfix_str(_speed(recent, config.train.batch_size))
                recent = []
            if ends and self.skip:
                self._count_broken(bar, f"{progress}, epoch {epoch + 1}")
            if ends and ((epoch + 1) % config.train.evaluate_every == 0 or state.step == self.total):
                self._evaluate(bar, f"{progress}, epoch {epoch + 1}: loss {result.loss:.3f}")
            every = config.train.save_every
            if ends or result.stop or (every and state.step % every == 0):
                self._save()
            if result.stop:
                raise KeyboardInterrupt

    def _count_broken(self, bar: Any, title: str) -> None:
        """Say how many clips of an epoch were replaced."""
        # the same for all processes, so that all stop or none
        self.broken.add([problem for part in gather_object([list(self.broken.reasons.items())]) for problem in part])
        replaced, self.replaced = sum(gather_object([self.replaced])), 0
        bar.write(
            f"{title}: {replaced} clips of broken videos were replaced; {len(self.broken.reasons)} of "
            f"{self.broken.expected} videos are missing or broken"
        )

    def _evaluate(self, bar: Any, title: str) -> None:
        """Evaluate the middle view, and keep the weights if they are the best."""
        state = self.state
        model = state.evaluated_model()
        broken = self.config.test.broken
        top1 = evaluate(model, self.middle, self.tokens, self.accelerator, broken=broken, progress=None).top(1)
        self._log({"top1": top1})
        bar.write(f"{title}, top-1 of the middle view {top1:.3f}")
        if top1 > state.best:
            state.best = top1
            self._check_finite(weights := state.weights(averaged=True))
            if self.main:
                place = {"epoch": state.step // self.per_epoch, "step": state.step}
                save_checkpoint(self.folder / BEST, weights, self.config, self.classes, self.prompts, **place)

    def _log(self, values: dict[str, float]) -> None:
        self.state.history.append({"step": self.state.step, **values})
        self.accelerator.log(values, step=self.state.step)

    def _save(self) -> None:
        """Write the checkpoint of this step."""
        state = self.state
        if self.saved == state.step:
            return
        weights, rest = state.weights(), state.state_dict() | {"processes": self.accelerator.num_processes}
        self._check_finite(weights)
        if self.main:
            with written(self.folder / "history.jsonl") as partial:
                partial.write_text("".join(json.dumps(record) + "\n" for record in state.history))
            save_pair(
                self.folder,
                weights,
                self.config,
                self.classes,
                self.prompts,
                epoch=state.step // self.per_epoch,
                step=state.step,
                state=rest,
                keep=self.config.train.keep,
            )
        self.saved = state.step
        self.accelerator.wait_for_everyone()

    def _check_finite(self, weights: dict[str, Tensor]) -> None:
        if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise NonFiniteError(
                f"after step {self.state.step} these weights are not finite: {', '.join(bad[:5])}; {self.folder} keeps the "
                f"checkpoint of step {self.saved}"
            )


def run_evaluation(config: Config, model: Claver, tokens: Tensor, classes: Sequence[str] | None = None) -> Evaluation:
    """Evaluate a model multi-view on the test list of a configuration; `classes` are those of `tokens (A, C, context)`,
    by default of `data.labels`.

    Raises:
        ValueError: another number of classes than the texts have.
        DatasetError: a list or files that are missing or broken, all of them named.
    """
    accelerator = start_processes(config)
    classes = read_labels(config.data.labels) if classes is None else classes
    if len(classes) != tokens.shape[1]:
        raise ValueError(f"{len(classes)} classes, but texts of {tokens.shape[1]}; are data.labels those of the texts?")
    samples = read_videos(config.data.test_list, config.data.root, classes).samples
    if config.test.broken == "refuse":
        check_files(samples)
    loader = _test_loader(config, samples, accelerator, clips=config.test.clips, crops=config.test.crops)
    tokens = tokens.to(accelerator.device)
    with end_together(accelerator):
        return evaluate(model.to(accelerator.device), loader, tokens, accelerator, broken=config.test.broken)


def _test_loader(config: Config, samples: list[Sample], accelerator: Accelerator, *, clips: int, crops: int) -> Any:
    dataset = TestDataset(
        samples, config.model.frames, config.augment, num_clips=clips, num_crops=crops, cache=config.data.cache
    )
    return eval_loader(
        dataset,
        config.test.batch_size,
        num_workers=config.data.num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
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


def _describe_engine(config: Config, accelerator: Accelerator, per_epoch: int) -> str:
    settings = config.train
    return (
        f"{config.model.attention}, {config.model.frames} frames; a batch of {settings.batch_size} clips is "
        f"{accelerator.num_processes} processes * {settings.accumulate} accumulated * "
        f"{settings.batch_size // accelerator.num_processes // settings.accumulate}; {settings.epochs} epochs of {per_epoch} "
        f"steps; lr {settings.lr:g}, temporal {settings.lr * settings.temporal_lr_mult:g}"
    )


def _speed(steps: list[StepResult], batch_size: int) -> str:
    """What the progress bar says of the last steps."""
    seconds = sum(step.seconds for step in steps)
    waiting = sum(step.waiting for step in steps) / seconds
    return f"loss {steps[-1].loss:.3f}, {len(steps) * batch_size / seconds:.3g} clips/s, {waiting:.0%} waiting for data"

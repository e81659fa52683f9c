"""Training: from a configuration to a folder of checkpoints; goes on exactly where it was stopped or killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ..config import Config
from ..data.datasets import set_epoch
from ..evaluation.evaluate import evaluate
from ..model import Claver
from ..processes import StopSignals, end_together, start_processes
from ..settings import to_dict
from ..weights.checkpoint import BEST, save_checkpoint, written
from .prepare import Prepared, pass_over, prepare
from .run_folder import save_pair
from .step import NonFiniteError, StepResult

__all__ = ["Run", "Stopped", "train"]

LOG_EVERY = 10  # steps between records of the loss


class Run:
    """What a training leaves: its folder, the model and the history of records `{step, loss, lr}` and `{step, top1}`.

    The model is the one that was evaluated last: the average of the weights, with `train.ema`.
    """

    def __init__(self, folder: Path, model: Claver, tokens: Tensor, history: list[dict[str, Any]]) -> None:
        self.folder, self.model, self.tokens, self.history = folder, model, tokens, history


class Stopped(KeyboardInterrupt):
    """A training was stopped by Ctrl-C or SIGTERM; the message says how to go on."""


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
    accelerator = start_processes(config, training=True)
    with end_together(accelerator):
        prepared = prepare(config, accelerator, model=model, init_from=init_from, resume=resume, overwrite=overwrite)
        return _Loop(config, accelerator, prepared, progress).run(bar_position)


class _Loop:
    """The steps of a run, with evaluations and checkpoints between them."""

    def __init__(self, config: Config, accelerator: Accelerator, prepared: Prepared, title: str) -> None:
        self.config, self.accelerator, self.title = config, accelerator, title
        self.folder, self.main = Path(config.run_dir), accelerator.is_main_process
        self.prepared, self.state, self.saved = prepared, prepared.state, prepared.saved

    def run(self, bar_position: int | None) -> Run:
        """All steps that are left."""
        state, accelerator, total = self.state, self.accelerator, self.prepared.total
        if self.main:
            with written(self.folder / "config.json") as partial:
                partial.write_text(json.dumps(to_dict(self.config), indent=2))
        if self.saved is None:
            self._save()  # a full disk is found now, and a run that is killed has something to go on from
        accelerator.init_trackers("claver", init_kwargs={"tensorboard": {"purge_step": state.step}})
        state.runner.train()
        bar = tqdm(
            total=total, initial=state.step, desc=self.title, unit="step", position=bar_position, disable=not self.main
        )
        with bar, StopSignals() as signals:
            try:
                while state.step < total:
                    self._epoch(bar, signals)
            except KeyboardInterrupt as error:
                how = "go on with the same command and --resume"
                raise Stopped(f"stopped after step {self.saved} of {total}; {how}") from error
        for tracker in accelerator.trackers:  # end_training would end the processes' connection, too
            tracker.finish()
        return Run(self.folder, state.evaluated_model(), self.prepared.tokens, state.history)

    def _epoch(self, bar: Any, signals: StopSignals) -> None:
        """The steps that are left of an epoch."""
        config, state = self.config, self.state
        epoch, begun = divmod(state.step, self.prepared.per_epoch)
        set_epoch(self.prepared.loader, epoch, skip=begun * config.train.accumulate)
        batches, recent = iter(self.prepared.loader), []
        for _ in range(begun, self.prepared.per_epoch):
            result = self.prepared.step(batches, stop=signals.requested)
            recent.append(result)
            bar.update()
            self.prepared.broken.replaced += len(result.errors)
            pass_over(self.prepared.broken, result.errors, bar.write)
            ends = state.step % self.prepared.per_epoch == 0
            if state.step % LOG_EVERY == 0 or ends:
                self._log({"loss": result.loss, "lr": result.lr})
                bar.set_postfix_str(_speed(recent, config.train.batch_size))
                recent = []
            if ends and config.data.broken == "skip":
                self._count_broken(bar, f"{self.title}, epoch {epoch + 1}")
            if ends and ((epoch + 1) % config.train.evaluate_every == 0 or state.step == self.prepared.total):
                self._evaluate(bar, f"{self.title}, epoch {epoch + 1}: loss {result.loss:.3f}")
            every = config.train.save_every
            if ends or result.stop or (every and state.step % every == 0):
                self._save()
            if result.stop:
                raise KeyboardInterrupt

    def _count_broken(self, bar: Any, title: str) -> None:
        """Say how many clips of an epoch were replaced."""
        broken, replaced = self.prepared.broken, self._share_broken()
        broken.replaced = 0
        bar.write(
            f"{title}: {replaced} clips of broken videos were replaced; {len(broken.reasons)} of {broken.expected} videos are "
            "missing or broken"
        )

    def _share_broken(self) -> int:
        """Let every process know the broken videos of all, so that all stop or none; how many clips they replaced together."""
        broken = self.prepared.broken
        found = gather_object([(list(broken.reasons.items()), broken.replaced)])
        broken.add([problem for problems, _ in found for problem in problems])
        return sum(replaced for _, replaced in found)

    def _evaluate(self, bar: Any, title: str) -> None:
        """Evaluate the middle view, and keep the weights if they are the best."""
        state = self.state
        model = state.evaluated_model()
        broken = self.config.test.broken
        top1 = evaluate(
            model, self.prepared.middle, self.prepared.tokens, self.accelerator, broken=broken, progress=None
        ).top(1)
        self._log({"top1": top1})
        bar.write(f"{title}, top-1 of the middle view {top1:.3f}")
        if top1 > state.best:
            state.best = top1
            self._check_finite(weights := state.weights(averaged=True))
            if self.main:
                place = {"epoch": state.step // self.prepared.per_epoch, "step": state.step}
                save_checkpoint(
                    self.folder / BEST, weights, self.config, self.prepared.classes, self.prepared.prompts, **place
                )

    def _log(self, values: dict[str, float]) -> None:
        self.state.history.append({"step": self.state.step, **values})
        self.accelerator.log(values, step=self.state.step)

    def _save(self) -> None:
        """Write the checkpoint of this step."""
        state = self.state
        if self.saved == state.step:
            return
        weights, rest = state.weights(), state.state_dict() | {"processes": self.accelerator.num_processes}
        if self.config.data.broken == "skip":
            replaced = self._share_broken()
            rest |= {"broken": self.prepared.broken.places(), "replaced": replaced}
        self._check_finite(weights)
        if self.main:
            with written(self.folder / "history.jsonl") as partial:
                partial.write_text("".join(json.dumps(record) + "\n" for record in state.history))
            save_pair(
                self.folder,
                weights,
                self.config,
                self.prepared.classes,
                self.prepared.prompts,
                epoch=state.step // self.prepared.per_epoch,
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


def _speed(steps: list[StepResult], batch_size: int) -> str:
    """What the progress bar says of the last steps."""
    seconds = sum(step.seconds for step in steps)
    waiting = sum(step.waiting for step in steps) / seconds
    return f"loss {steps[-1].loss:.3f}, {len(steps) * batch_size / seconds:.3g} clips/s, {waiting:.0%} waiting for data"

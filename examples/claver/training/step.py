"""One step of a training: a batch on each process, prompts drawn anew, and what the step says of itself."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from ..data.augment import mixup_cutmix
from ..data.lists import Sample
from ..files import write_text
from ..text import TrainingTexts
from .optimizer import learning_rate
from .state import TrainState

__all__ = ["NonFiniteError", "StepResult", "TrainStep", "contrastive_loss"]


class NonFiniteError(ValueError):
    """The loss or the weights are not finite; the message says at which step, and what is kept."""


@dataclass(frozen=True)
class StepResult:
    """What a step was: its mean `loss` over all processes, `lr` of the first group, whether one of the processes was asked to
    `stop`, the `seconds` it took here, `waiting` for data among them, and `errors`, the broken videos that others took the place
    of here, as `(name, reason)`."""

    loss: float
    lr: float
    stop: bool
    seconds: float
    waiting: float
    errors: tuple[tuple[str, str], ...]


def contrastive_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits `(B, A, C)` with soft targets `(B, C)`, which hold for each of the A prompts."""
    return F.cross_entropy(logits.float().flatten(0, 1), target.repeat_interleave(logits.shape[1], 0))


class TrainStep:
    """The steps of a run: each is a function of the configuration, the weights and the number of the step.

    Args:
        config: of the run.
        state: what the steps change.
        accelerator: the processes.
        texts: the prompts of the run, which are drawn anew each step.
        samples: the training list, for the names of files.
        total: steps of the whole run.
        warmup: steps of its warm-up.
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        accelerator: Accelerator,
        texts: TrainingTexts,
        *,
        samples: list[Sample],
        total: int,
        warmup: int,
    ) -> None:
        self.config, self.state, self.accelerator, self.texts = config, state, accelerator, texts
        self.samples, self.total, self.warmup = samples, total, warmup

    def __call__(self, batches: Iterator[dict[str, Any]], *, stop: bool) -> StepResult:
        """The next step, of `train.accumulate` batches; `stop` asks all processes to stop after it.

        Raises:
            NonFiniteError: on all processes, before the weights are changed.
        """
        start, waiting = time.perf_counter(), 0.0
        config, state, accelerator = self.config, self.state, self.accelerator
        generator = torch.Generator().manual_seed(hash((config.seed, state.step)) % 2**63)
        # whatever else draws, such as dropout, draws the same after a resume
        torch.manual_seed(hash((config.seed, state.step, accelerator.process_index)) % 2**63)
        prompts = self.texts.draw(generator)
        for group, (base, minimum) in zip(state.optimizer.param_groups, state.rates, strict=True):
            group["lr"] = learning_rate(state.step, self.total, self.warmup, base, minimum)
        losses, indices, errors = [], [], []
        for micro_batch in range(config.train.accumulate):
            if micro_batch and config.train.draws == "microbatch":
                prompts = self.texts.draw(generator)
            asked = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - asked
            indices += batch["index"].tolist()
            errors += batch["errors"]
            video, label = batch["video"].to(accelerator.device), batch["label"].to(accelerator.device)
            classes = self.texts.draw_classes(label, generator)
            label = torch.searchsorted(classes, label)
            video, target = mixup_cutmix(video, label, len(classes), config.augment, generator)
            with accelerator.accumulate(state.runner):
                if config.train.fsdp:
                    state.runner.set_requires_gradient_sync(accelerator.sync_gradients)  # type: ignore[operator]
                with accelerator.autocast():
                    logits = state.runner(video, self.texts.of(prompts, classes))
                loss = contrastive_loss(logits, target)
                losses.append(loss.detach())
                accelerator.backward(loss)
        told = torch.stack([torch.stack(losses).mean(), losses[0].new_tensor(float(stop))])
        means, stops = accelerator.gather(told[None]).float().T.tolist()
        if not all(map(math.isfinite, means)):
            self._refuse(means, indices)
        if config.train.max_grad_norm:
            accelerator.clip_grad_norm_(state.model.parameters(), config.train.max_grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
        if config.train.max_logit_scale is not None:
            with torch.no_grad():
                state.model.clip.logit_scale.clamp_(max=math.log(config.train.max_logit_scale))
        if state.average is not None:
            state.average.update()
        state.step += 1
        rate = state.optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - start
        return StepResult(sum(means) / len(means), rate, any(stops), seconds, waiting, tuple(errors))

    def _refuse(self, losses: list[float], indices: list[int]) -> None:
        """Write the files of the step's batches on all processes with their losses, and raise NonFiniteError."""
        step, folder = self.state.step + 1, Path(self.config.run_dir)
        files = gather_object([[str(self.samples[index].path) for index in indices]])
        path = folder / f"nonfinite_step_{step:08d}.json"
        if self.accelerator.is_main_process:
            batches = [{"loss": str(loss), "files": names} for loss, names in zip(losses, files, strict=True)]
            write_text(path, json.dumps({"step": step, "batches": batches}, indent=1) + "\n")
        self.accelerator.wait_for_everyone()
        raise NonFiniteError(
            f"the loss is {next(loss for loss in losses if not math.isfinite(loss))} at step {step}; the files of its batch are "
            f"in {path}, and the last checkpoint before it is kept"
        )

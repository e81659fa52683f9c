"""What a training changes, as one thing that can be written down and taken up again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import Config
from ..model import Claver
from ..processes import share_model
from ..settings import to_dict
from ..weights.checkpoint import CheckpointError
from .optimizer import AverageWeights, parameter_groups

__all__ = ["TrainState", "check_same_run"]

_WHOLE = StateDictOptions(full_state_dict=True)

# settings that may change when a run is resumed: they do not change what a step computes, but for rounding
FREE_ON_RESUME = (
    "run_dir",
    "data.root",
    "data.num_workers",
    "data.cache",
    "data.broken",  # while nothing is broken nothing is skipped
    "data.max_broken",
    "test.",
    "train.gradient_checkpointing",
    "train.compile",
    "train.fsdp",
    "train.timeout",
    "train.save_every",
    "train.keep",
    "train.trackers",
)


class TrainState:
    """The model where it is trained, its optimizer and average, and how far the run is.

    Attributes:
        model: the model itself; its weights are shares of them under `train.fsdp`.
        runner: what is called to train it, such as DistributedDataParallel around it.
        optimizer: AdamW, prepared by Accelerate.
        rates: for each group of the optimizer the learning rate at its height and at the end.
        average: of the weights; None without `train.ema`.
        step: steps done.
        best: the best top-1 so far, -1 before the first.
        history: records `{step, loss, lr}` and `{step, top1}`.
    """

    def __init__(self, config: Config, model: Claver, accelerator: Accelerator) -> None:
        settings = config.train
        self._scaler = accelerator.scaler
        self._scalars = {name for name, parameter in model.named_parameters() if parameter.ndim == 0}
        # where the weights that are evaluated are not those in training, a model of its own holds them
        self._evaluated = copy.deepcopy(model).to(accelerator.device) if settings.ema or settings.fsdp else None
        self.model = model
        self.runner = share_model(model, accelerator, compiled=settings.compile, fsdp=settings.fsdp)
        groups = parameter_groups(model, settings)
        # the minimum is the same for all parameters, as the authors have it, but for what layer_decay takes
        minimum = settings.lr * settings.min_lr_ratio
        self.rates = [(group["lr"], group.pop("scale") * minimum) for group in groups]
        self.optimizer: Any = accelerator.prepare_optimizer(
            torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
        )
        self.average = AverageWeights(model, settings.ema) if settings.ema else None
        self.step, self.best = 0, -1.0
        self.history: list[dict[str, Any]] = []

    def weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """The whole state dict of the model, on all processes; `averaged` if there is an average."""
        state: dict[str, Any] = get_model_state_dict(self.model, options=_WHOLE)
        if averaged and self.average is not None:
            state |= {name: _whole(tensor) for name, tensor in self.average.weights.items()}
        return {name: self._scalar(name, tensor) for name, tensor in state.items()}

    def evaluated_model(self) -> Claver:
        """The model that evaluation and the best checkpoint are of."""
        if self._evaluated is None:
            return self.model
        self._evaluated.load_state_dict(self.weights(averaged=True))
        return self._evaluated

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, in plain values and whole tensors on the CPU; the same from any number of processes."""
        optimizer = None
        if self.optimizer.optimizer.state:  # asking torch for what is not there yet would make it
            found: Any = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=_WHOLE)
            state = {
                name: {key: self._scalar(name, value).cpu() for key, value in values.items()}
                for name, values in found["state"].items()
            }
            optimizer = {"state": state, "param_groups": found["param_groups"]}
        average = None
        if self.average is not None:
            average = {name: self._scalar(name, _whole(t)).cpu() for name, t in self.average.weights.items()}
        return {
            "optimizer": optimizer,
            "average": average,
            "scaler": self._scaler.state_dict() if self._scaler is not None else None,
            "best": self.best,
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from what `state_dict` gave after `step` steps."""
        if state["optimizer"] is not None:
            own = {
                name: {key: value if key == "step" else self._own(name, value) for key, value in values.items()}
                for name, values in state["optimizer"]["state"].items()
            }
            saved: Any = {"state": own, "param_groups": state["optimizer"]["param_groups"]}
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, saved, options=_WHOLE)
        if self.average is not None:
            for name, tensor in self.average.weights.items():
                value = self._own(name, state["average"][name]).to(tensor.device)
                if isinstance(tensor, DTensor):
                    value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
                tensor.copy_(value)
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.history = step, state["best"], list(state["history"])

    def _scalar(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as it is in files: scalars are vectors of one element in a sharded model alone."""
        return tensor.reshape(()) if name in self._scalars else tensor

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a file as this model has it."""
        return tensor.reshape(self.model.get_parameter(name).shape) if name in self._scalars else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_same_run(
    source: Path, content: Mapping[str, Any], config: Config, classes: list[str], prompts: list[list[str]]
) -> None:
    """Refuse to go on from a checkpoint of other settings, classes or prompts.

    Raises:
        CheckpointError: what is different, there and here.
    """
    ours, theirs = _flat(to_dict(config)), _flat(content["config"])
    theirs = _flat(to_dict(Config())) | theirs  # a setting that is newer than the checkpoint was at its default
    different = [
        f"{key} = {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(ours.keys() | theirs.keys())
        if not key.startswith(FREE_ON_RESUME) and ours.get(key) != theirs.get(key)
    ]
    if different:
        raise CheckpointError(f"{source}: is of a run with other settings: {'; '.join(different)}")
    for name, now, origin in (
        ("classes", classes, config.data.labels),
        ("prompts", prompts, "the file of data.prompts"),
    ):
        if content[name] != now:
            raise CheckpointError(
                f"{source}: its {name} are not those of now; put {origin} back as it was, or choose another run_dir"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`; lists, as JSON has them, for tuples."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat

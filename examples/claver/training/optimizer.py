"""What AdamW is given: groups of parameters with their learning rates, the schedule, and the average of the weights."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kronmask import param_groups

from ..config import TrainConfig

__all__ = ["AverageWeights", "learning_rate", "parameter_groups", "place_in_tower"]


def learning_rate(step: int, total: int, warmup: int, base: float, minimum: float) -> float:
    """The learning rate at `step`: linear from 0 over `warmup` steps, then the cosine from `base` at step 0 to `minimum`.

    As the authors have it, the cosine runs from the first step, also under the warm-up.
    """
    if step < warmup:
        return base * step / warmup
    return minimum + (base - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


def parameter_groups(model: nn.Module, settings: TrainConfig) -> list[dict[str, Any]]:
    """The groups of `kronmask.param_groups`, those of the image and text towers split by block under `layer_decay`.

    Under `decay="official"` all parameters decay but one-dimensional ones and position embeddings (the filter of the authors'
    optimizer): so do the temporal embedding and the logit scale.
    Under `layer_decay` the last block of a tower, and what follows it, has the learning rate of the group, and each block below
    has `layer_decay` times that of the one above; the embeddings are one more block at the bottom. Temporal parameters keep
    theirs.
    A group also has its `scale`, the factor that this gives, by which the schedule's minimum is to be scaled.

    Raises:
        ValueError: `layer_decay` for a model whose blocks are not found by their names.
    """
    groups = param_groups(
        model, lr=settings.lr, temporal_lr_mult=settings.temporal_lr_mult, weight_decay=settings.weight_decay
    )
    if settings.decay == "official":
        groups = _decaying_officially(groups, model, settings.weight_decay)
    if settings.layer_decay is None:
        return [group | {"scale": 1.0} for group in groups]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    images = [group for group in groups if group["name"].startswith("image")]
    places = {id(p): place_in_tower(names[id(p)]) for group in images for p in group["params"]}
    last: dict[str, int] = {}  # block of each tower
    for place in places.values():
        if place is not None:
            last[place[0]] = max(place[1], last.get(place[0], -1))
    if max(last.values(), default=-1) < 0:
        raise ValueError(
            "train.layer_decay needs numbered blocks to be trained below the temporal ones, and there are none"
        )
    split: dict[tuple[str, int], dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            place = places.get(id(parameter))
            below = last[place[0]] - place[1] if place is not None else 0
            scale = settings.layer_decay**below
            name = f"{group['name']}_{below}" if below else group["name"]
            own = group | {"name": name, "params": [], "lr": group["lr"] * scale, "scale": scale}
            split.setdefault((group["name"], below), own)["params"].append(parameter)
    return list(split.values())


def _decaying_officially(groups: list[dict[str, Any]], model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups under the rule of the authors' optimizer."""
    # a scalar such as logit_scale is a vector of one element in a sharded model
    kept = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if "positional_embedding" in name or (parameter.ndim == 1 and "logit_" not in name)
    }
    by_name = {group["name"]: group for group in groups}
    for name, group in list(by_name.items()):
        decaying = [parameter for parameter in group["params"] if id(parameter) not in kept]
        if name.endswith("_no_decay") and decaying:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in kept]
            partner = name.removesuffix("_no_decay")
            by_name.setdefault(partner, group | {"name": partner, "params": [], "weight_decay": weight_decay})
            by_name[partner]["params"] += decaying
    return [group for group in by_name.values() if group["params"]]


_BLOCK = re.compile(r"(?:^|\.)(resblocks|blocks|layers?)\.(\d+)\.")
_TOP = re.compile(
    r"(^|\.)(ln_post|ln_final|norm|fc_norm|attn_pool|head|proj|text_projection|logit_scale|logit_bias)(\.|$)"
)


def place_in_tower(name: str) -> tuple[str, int] | None:
    """The tower, "vision" or "text", and block of a parameter by its name, -1 for its embeddings; None for what is above."""
    tower = "vision" if "visual." in name else "text"
    block = _BLOCK.search(name)
    if block:
        return tower, int(block[2])
    return None if _TOP.search(name) else (tower, -1)


class AverageWeights:
    """The exponential moving average of the weights that are trained: `average += (1 - decay) * (weight - average)`."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.decay, self._trained = decay, trained
        self.weights: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now into the average."""
        for name, parameter in self._trained.items():
            _local(self.weights[name]).lerp_(_local(parameter), 1 - self.decay)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

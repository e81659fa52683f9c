"""The folder of a run: its last checkpoints, from which it goes on, and the best weights.

A checkpoint is a pair of files: `step_00000120.safetensors`, the weights, as `checkpoint.save_checkpoint` writes them, and
`step_00000120.state.pt`, the optimizer's state and what else the next step needs. Each file appears whole or not at all, the
state after its weights, and when an old pair goes, its state goes first. So wherever a state is, its weights are whole: a
process that is killed at any moment leaves every pair that has a state complete, and no pointer is needed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..files import PARTIAL
from ..weights.checkpoint import BEST, CheckpointError, load_checkpoint, save_checkpoint, written

__all__ = ["clean", "load_pair", "save_pair", "saved_steps", "weights_of"]

STATE_FORMAT = "kronmask-claver-state-2"
_STATE = ".state.pt"


def weights_of(folder: str | Path, step: int) -> Path:
    """The file of the weights after `step` steps."""
    return Path(folder) / f"step_{step:08d}.safetensors"


def saved_steps(folder: str | Path) -> list[int]:
    """The steps after which there is a checkpoint, in their order."""
    states = Path(folder).glob(f"step_*{_STATE}")
    steps = sorted(int(path.name.removesuffix(_STATE).removeprefix("step_")) for path in states)
    return [step for step in steps if weights_of(folder, step).exists()]


def save_pair(
    folder: str | Path,
    weights: nn.Module | Mapping[str, Tensor],
    config: Config,
    classes: list[str],
    prompts: list[list[str]],
    *,
    epoch: int,
    step: int,
    state: Mapping[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of a step that has none, then remove all but the last `keep`.

    Raises:
        OSError: it cannot be written; the checkpoints before it are untouched and nothing is left of it.
    """
    try:
        save_checkpoint(weights_of(folder, step), weights, config, classes, prompts, epoch=epoch, step=step)
        with written(_state_of(folder, step)) as partial:
            torch.save({"format": STATE_FORMAT, "step": step, **state}, partial)
    except BaseException:
        with suppress(OSError):  # the error that is told is the first one
            weights_of(folder, step).unlink()
        raise
    _remove(folder, saved_steps(folder)[:-keep])


def load_pair(folder: str | Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `load_checkpoint` gives for the weights of a step, and the state beside them; tensors on the CPU.

    Raises:
        CheckpointError: one of the files is missing, damaged or of another program.
    """
    content, path = load_checkpoint(weights_of(folder, step)), _state_of(folder, step)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not the state of a training, or a damaged one ({error})") from error
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT or state.get("step") != content["step"]:
        raise CheckpointError(f"{path}: not the state that belongs to {weights_of(folder, step).name}")
    return content, state


def clean(folder: str | Path, *, keep: int) -> None:
    """Remove what killed processes left, half written or not yet removed, and all but the last `keep` checkpoints.

    With none to keep the best weights go, too.
    """
    folder = Path(folder)
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)
    steps = saved_steps(folder)
    _remove(folder, steps[: max(0, len(steps) - keep)])
    if not keep:
        (folder / BEST).unlink(missing_ok=True)
    for path in folder.glob("step_*.safetensors"):  # of a process that was killed before it wrote the state
        if not path.with_suffix(_STATE).exists():
            path.unlink(missing_ok=True)


def _state_of(folder: str | Path, step: int) -> Path:
    return weights_of(folder, step).with_suffix(_STATE)


def _remove(folder: str | Path, steps: list[int]) -> None:
    with suppress(OSError):  # what cannot be removed does no harm
        for step in steps:
            _state_of(folder, step).unlink(missing_ok=True)
            weights_of(folder, step).unlink(missing_ok=True)

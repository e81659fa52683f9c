"""The processes of a run: how they start, share a model, agree to stop, and end together when one of them fails."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from .config import Config

__all__ = ["ProcessError", "StopSignals", "end_together", "share_model", "start_processes", "this_process"]

dist = torch.distributed
_FAILURE = "claver_failure"  # key, in the processes' store, of what the first that failed says


class ProcessError(ConnectionError):
    """Another process of the run failed; the message has its error."""


def this_process(timeout: float = 600.0) -> PartialState:
    """This process among those of a launcher, which the first call connects; they wait `timeout` seconds for each other."""
    # without a GPU Accelerate would otherwise take each of them for one that is alone
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(seconds=timeout))


def start_processes(config: Config, *, training: bool = False) -> Accelerator:
    """Accelerate's view of the processes that a launcher started, or of this one alone; with the trackers of a `training`.

    Its state is global, and another run in this process may have had another precision.

    Raises:
        ValueError: a training in fp16 without a GPU, or a tracker that Accelerate does not know or that is not installed.
    """
    cpu = this_process(config.train.timeout).device.type == "cpu"
    if cpu and training and config.train.precision == "fp16":
        raise ValueError("train.precision fp16 needs a GPU; choose bf16 or no")
    names = config.train.trackers if training else ()
    available = [str(name) for name in get_available_trackers()]
    if missing := [name for name in names if name not in available]:
        raise ValueError(
            f"train.trackers: {', '.join(missing)} not installed, or unknown to Accelerate; install it, or choose some of "
            f"[{', '.join(available)}]"
        )
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=cpu,
        mixed_precision=config.train.precision,
        gradient_accumulation_steps=config.train.accumulate,
        log_with=list(names) or None,
        project_dir=config.run_dir,
    )


# ---- one model on all of them ------------------------------------------------------------------------------------------


def share_model(model: nn.Module, accelerator: Accelerator, *, compiled: bool, fsdp: bool) -> nn.Module:
    """Puts the model where it is trained; returns what is to be called in its place, whose gradients all processes share.

    Under `fsdp` each process keeps a share of the weights (`torch.distributed.fsdp.fully_shard`), each block being one unit.
    They stay in float32 and autocast has them in the precision of the run, so that the numbers are those of plain processes.
    Scalars cannot be sharded, and become vectors of one element.

    Raises:
        ValueError: `fsdp` with one process.
    """
    model.to(accelerator.device)
    if compiled:
        model.compile()
    if fsdp:
        if accelerator.num_processes == 1:
            raise ValueError(
                "train.fsdp shares a model over several processes, and this is one; start it with torchrun"
            )
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 0:
                    setattr(module, name, nn.Parameter(parameter.detach()[None], parameter.requires_grad))
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for name, module in model.named_modules():
            if re.search(r"\.(resblocks|blocks|layers?)\.\d+$", name):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if accelerator.num_processes == 1:
        return model
    return DistributedDataParallel(model, None if accelerator.device.type == "cpu" else [accelerator.device])


# ---- their end ---------------------------------------------------------------------------------------------------------


class StopSignals:
    """A context in which Ctrl-C and SIGTERM only set `requested`, so that a step comes to its end; a second one does not wait."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def end_together(accelerator: Accelerator) -> Iterator[None]:
    """A context in which the first process that fails leaves its error to the others, who raise it when they miss that process.

    They do so at once where the connection breaks (gloo), or at the latest after the timeout of the processes.

    Raises:
        ProcessError: in the other processes.
    """
    if accelerator.num_processes == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    own = f"process {accelerator.process_index} of {accelerator.num_processes}"
    try:
        yield
    except BaseException as error:
        try:
            first = store.compare_set(_FAILURE, "", f"{own}: {type(error).__name__}: {error}").decode()
        except RuntimeError:  # the store was that of the process that is gone
            first = ""
        if isinstance(error, KeyboardInterrupt):  # all of them were asked to stop, or will miss this one
            raise
        if first and not first.startswith(own):
            raise ProcessError(f"another process failed, so this one stops. {first}") from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ProcessError(f"another process is gone, so {own} stops ({error})") from error
        raise

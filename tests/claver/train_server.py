"""A process that has imported everything and trains in children, so that a test can kill a training many times a minute."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from claver.config import Config
from claver.settings import to_dict

FOLDERS = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parent)]


class TrainServer:
    """Starts trainings; each is a fork of one process and has its number, by which it is killed and waited for."""

    def __enter__(self) -> TrainServer:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])}
        environment |= {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def start(self, config: Config, log: Path, **options: Any) -> int:
        """Start a training in a group of processes of its own, with the options of `_train`."""
        return self._ask("start", config=to_dict(config), log=str(log), **options)

    def run(self, config: Config, log: Path, *, ranks: int = 1, **options: Any) -> list[int]:
        """Train on some processes, of which each has a log with its rank at the end, and give their statuses."""
        return [self.wait(number) for number in self.start_ranks(config, log, ranks, **options)]

    def start_ranks(self, config: Config, log: Path, ranks: int, **options: Any) -> list[int]:
        """Start the processes of one training."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        return [
            self.start(
                config,
                log.with_name(f"{log.name}{rank}"),
                environment=where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {},
                **options,
            )
            for rank in range(ranks)
        ]

    def wait(self, number: int) -> int:
        """The status with which a training ended; minus the signal that killed it."""
        return self._ask("wait", number=number)

    def _ask(self, command: str, **values: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, **values}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _train(
    config: dict[str, Any],
    log: str,
    *,
    environment: dict[str, str] | None = None,
    resume: bool = False,
    die_in_write: int | None = None,
    evaluate: str | None = None,
    nan_at: int | None = None,
) -> int:
    """Train in this process: the status.

    Args:
        config: of the run.
        log: a file for all that is printed.
        environment: variables that say which process of which this is.
        resume: as `claver.training.train.train` has it.
        die_in_write: kill this process at that one of its changes of the disk.
        evaluate: a file for what the model then says of the test videos.
        nan_at: a backward pass, from 1, whose loss is not a number.
    """
    from claver.evaluation.evaluate import run_evaluation
    from claver.settings import from_dict
    from claver.training.train import Stopped, train

    os.setpgrp()
    os.environ.update(environment or {})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if die_in_write is not None:
        _die_at_change(die_in_write)
    if nan_at is not None:
        _spoil_loss(nan_at)
    try:
        run = train(from_dict(config), resume=resume)
        if evaluate:
            evaluation = run_evaluation(from_dict(config), run.model, run.tokens)
            if os.environ.get("RANK", "0") == "0":
                torch.save((evaluation.probabilities, evaluation.labels), evaluate)
    except Stopped as stop:
        print(stop, flush=True)
        return 130
    return 0


def _spoil_loss(number: int) -> None:
    import claver.training.step

    original, calls = claver.training.step.contrastive_loss, []

    def spoiled(*args: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == number else 1)

    claver.training.step.contrastive_loss = spoiled


def _die_at_change(number: int) -> None:
    """Kill this process before the `number`-th, from 0, of the calls by which the files of a run change."""
    left = number

    def deadly(call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return called

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def _serve() -> None:
    import claver.training.train  # noqa: F401
    from claver.prompts.build import load_tokenizer
    from claver.text import TrainingTexts

    load_tokenizer()
    TrainingTexts.describe = lambda *args: ""  # it counts FLOPs, for a third of the time that a start takes
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("command") == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(request["number"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                status = 1
                try:
                    status = _train(**request)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()

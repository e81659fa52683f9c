"""What the benchmarks share: fair timing, peak memory, and results that say how and where they were measured."""

from __future__ import annotations

import csv
import ctypes
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kronmask.tuning import timer

__all__ = [
    "CAN_MEASURE_A_PROCESS",
    "RESULTS",
    "Times",
    "available_memory",
    "default_device",
    "failing_into",
    "interleaved",
    "peak_memory",
    "provenance",
    "resident_memory",
    "save",
    "synchronize",
    "table",
    "until_failure",
]

RESULTS = Path(__file__).parent / "results"
CAN_MEASURE_A_PROCESS = Path("/proc/self/clear_refs").exists()
"""Whether the system tells the peak of a process's memory."""

PACKAGES = ("kronmask", "torch", "torchvision", "triton", "flash-attn-4", "flash-attn-3", "timm", "open_clip_torch",
            "transformers", "accelerate", "av", "torchcodec", "opencv-python-headless", "decord")  # fmt: skip


# ---- where a number comes from --------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Command, date, machine and versions of this run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    script, root = Path(sys.argv[0]).resolve(), RESULTS.parents[1].resolve()
    name = script.relative_to(root) if script.is_relative_to(root) else Path(script.parent.name, script.name)
    return {
        "command": shlex.join(["python", str(name), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": _cpu(),
            "instructions": torch.backends.cpu.get_cpu_capability(),  # the vector unit that torch found: it decides ratios
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(name: str, rows: Sequence[Mapping[str, Any]], folder: Path, **more: Any) -> Path:
    """Writes `name.json` (provenance, `more`, rows) and `name.csv` (the rows) into a folder; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {**provenance(), **more, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    # a file or pipe has no width: without this the table would be cut to 80 columns
    Console(width=None if sys.stdout.isatty() else 160).print(drawn)


# ---- failures -------------------------------------------------------------------------------------------------------


@contextmanager
def failing_into(row: dict[str, Any]) -> Iterator[None]:
    """What fails in the block says so, in one line, in the row's `error`."""
    try:
        yield
    except Exception as error:
        row["error"] = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")


def until_failure(call: Callable[[], object], row: dict[str, Any]) -> Callable[[], None]:
    """The call, which does nothing any more once it has failed and said so in its row."""

    def guarded() -> None:
        if not row["error"]:
            with failing_into(row):
                call()

    return guarded


# ---- timing ---------------------------------------------------------------------------------------------------------


class Times:
    """Seconds of one call in each round."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = list(seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, relative to the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median

    def over(self, other: Times) -> float:
        """Median of the ratios of the same rounds, which a drift of the machine's speed leaves alone."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 9,
    warmup: int = 2,
    shortest: float = 0.005,
    around: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, Times]:
    """Times calls against each other: in each round each runs once, in turn, so that all meet the same state of the machine.

    Args:
        calls: what to time, by name. A call that is shorter than `shortest` seconds is repeated within a round (CPU only).
        device: on "cuda" the time is that between two events, after the L2 cache was overwritten and the GPU kept busy, so that
            the host's launching does not count where it can run ahead.
        rounds, warmup: counted rounds, and calls of each before them that are not counted.
        around: what a call runs inside of, by name; entering and leaving it is not timed.
    """
    around = around or {}
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        with around.get(name, nullcontext)():
            for _ in range(warmup):
                start = time.perf_counter()
                call()
                synchronize(device)
                last = time.perf_counter() - start
                repeats[name] = 1 if device.type == "cuda" else max(1, round(shortest / last))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    timed = _cuda_seconds(device) if device.type == "cuda" else _cpu_seconds
    for _ in range(rounds):
        for name, call in calls.items():
            with around.get(name, nullcontext)():
                seconds[name].append(timed(call, repeats[name]))
    return {name: Times(values) for name, values in seconds.items()}


def _cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    timed = timer(device)

    def seconds(call: Callable[[], object], _: int) -> float:
        start, stop = timed(call)
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000

    return seconds


# ---- memory ---------------------------------------------------------------------------------------------------------


def available_memory(device: torch.device) -> float:
    """Bytes that can be allocated; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _bytes_of("/proc/meminfo", "MemAvailable")
    except OSError:
        return math.inf


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any, device: torch.device) -> int:
    """Bytes by which memory rises above what stands before the call that `prepare(*arguments)` returns.

    On CUDA by the allocator. On the CPU by the resident set of a process of its own, so that nothing that was freed before
    can be used again unseen; `prepare` and its arguments must be importable there. What the call returns counts.

    Raises:
        RuntimeError: the system does not tell a process's peak (CPU, other than Linux).
    """
    if device.type == "cuda":
        call = prepare(*arguments)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not CAN_MEASURE_A_PROCESS:
        raise RuntimeError("peak memory of a CPU process is read from Linux's /proc, which is not here")
    context = multiprocessing.get_context("forkserver")  # a fresh process that need not import these
    context.set_forkserver_preload(["torch", "kronmask"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, torch.get_num_threads(), prepare, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measured process ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _measure(
    sender: Any, threads: int, prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(threads)
        call = prepare(*arguments)
        ctypes.CDLL(None).malloc_trim(0)  # what `prepare` freed goes back to the system, or its use would not be seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _bytes_of("/proc/self/status", "VmRSS")
        result = call()
        peak = _bytes_of("/proc/self/status", "VmHWM") - before
        del result
        sender.send(max(0, peak))
    except Exception as error:
        sender.send(RuntimeError(f"{type(error).__name__}: {error}"))


def resident_memory(device: torch.device) -> int | None:
    """Bytes that this process holds now, or on CUDA the allocator; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return _bytes_of("/proc/self/status", "VmRSS")
    except OSError:
        return None


def _bytes_of(file: str, field: str) -> int:
    """A field of one of Linux's tables, in bytes."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

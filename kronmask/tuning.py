"""Choices that are measured once on a GPU and remembered: the fastest of some candidates, by a key that names what it depends on.

They lie in a file of the user's cache (`cache_file`); `export` writes them to a file that can be shipped. A file that
KRONMASK_AUTOTUNE_FILE names is read as well, before the cache, and never written.
With KRONMASK_AUTOTUNE=0 nothing is measured: what is known is used, and else what the caller's model says. The logger "kronmask"
says at level INFO what was chosen, and by how much.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import statistics
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

__all__ = [
    "cache_file",
    "environment",
    "export",
    "fastest",
    "is_busy",
    "is_gpu",
    "may_measure",
    "measure",
    "recall",
    "timer",
]

log = logging.getLogger("kronmask")
ROUNDS = 15
HEAD_START = 10_000_000  # cycles of a GPU, some 5 ms, in which the host comes to launch all that is timed
MOST = (
    256  # keys that are measured in a process; who meets more (packed clips of all lengths, say) would measure for ever
)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def is_busy(tensor: Tensor) -> bool:
    """Whether nothing may be timed at this moment: a model is being traced, or a CUDA graph captured."""
    if isinstance(tensor, FakeTensor) or torch.compiler.is_compiling():
        return True
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()


def may_measure(tensor: Tensor) -> bool:
    """Whether candidates may be timed on the tensor's device now."""
    if not is_gpu(tensor.device) or os.environ.get("KRONMASK_AUTOTUNE") == "0" or len(_measured) >= MOST:
        return False
    return not is_busy(tensor)


def environment(device: torch.device) -> str:
    """The part of a key that all choices share: the GPU and the versions of what runs on it."""
    versions = []
    for package in ("torch", "triton", "flash-attn-4", "kronmask"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " | ".join([torch.cuda.get_device_name(device), *versions])


def recall(key: str, names: Sequence[str]) -> str | None:
    """What was chosen for the key, in this process or as the files say; None if nothing was, or none of `names`."""
    entry = _measured.get(key)
    if entry is None:
        entry = (_read(cache_file()) | _read(_shipped_file())).get(key)
    if entry is None:
        return None
    choice = entry.get("choice") if isinstance(entry, dict) else None
    if choice not in names:
        warnings.warn(
            f"for {key!r} the choice {entry!r} is kept, but there are {', '.join(names)}; timing again", stacklevel=2
        )
        return None
    return choice


def fastest(
    key: str,
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    check: Callable[[str], str | None] = lambda name: None,
    level: int = logging.INFO,
) -> str | None:
    """The candidate that takes least time, which is then kept for the key; None, with a warning in the log, if none can be taken.

    Args:
        candidates: calls by name; one that raises is left out.
        check: says in words what is wrong with the candidate of a name, or None; one that is wrong is left out.
        level: of the line in the log.
    """
    failed: dict[str, str] = {}
    for name, call in candidates.items():
        try:
            reason = check(name)
            if reason is None:
                call()  # compiles what is compiled at the first call
        except Exception as error:  # a kernel may fail in any way, and the others go on
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            failed[name] = textwrap.shorten(reason, 300, placeholder=" ...")
    able = {name: call for name, call in candidates.items() if name not in failed}
    without = "".join(f"; not {name}: {reason}" for name, reason in failed.items())
    try:
        times = measure(able, device) if able else {}
    except Exception as error:
        times, without = {}, f"{without}; timing failed: {type(error).__name__}: {error}"
    if not times:
        log.warning("%s: nothing could be measured%s", key, without)
        return None
    best = min(times, key=times.__getitem__)
    others = "".join(
        f", {name} {time:.3f} ms ({time / times[best]:.2f} x)" for name, time in times.items() if name != best
    )
    log.log(level, "%s: %s, %.3f ms%s%s", key, best, times[best], others, without)
    if len(_measured) + 1 == MOST:
        log.warning("%d cases were measured in this process; others take what needs no measurement", MOST)
    _keep(key, {"choice": best, "milliseconds": {name: round(time, 5) for name, time in times.items()}})
    return best


def measure(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call: in each round each runs once, in turn, as `timer` does it."""
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        timed = timer(device)
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start, stop = timed(call)
                events[name].append((start, stop))
            stop.synchronize()
    return {
        name: statistics.median(start.elapsed_time(stop) for start, stop in pairs) for name, pairs in events.items()
    }


def timer(device: torch.device) -> Callable[[Callable[[], object]], tuple[Any, Any]]:
    """What launches a call on a GPU between two events, which it returns, after the L2 cache was overwritten.

    The GPU is kept busy until the host has launched the call, so that the time of a short one is not that of its launch.
    """
    cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)

    def timed(call: Callable[[], object]) -> tuple[Any, Any]:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        stop.record()
        return start, stop

    return timed


# ---- the files ------------------------------------------------------------------------------------------------------


_measured: dict[str, Any] = {}


def cache_file() -> Path:
    """Where choices are kept: `kronmask/autotune.json` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kronmask" / "autotune.json"


def export(path: str | Path) -> int:
    """Writes all known choices to a file that KRONMASK_AUTOTUNE_FILE may name elsewhere; returns how many there are.

    Raises:
        OSError: the file cannot be written.
    """
    known = _read(cache_file()) | _measured | _read(_shipped_file())
    _replace(Path(path), known)
    return len(known)


def _shipped_file() -> Path | None:
    name = os.environ.get("KRONMASK_AUTOTUNE_FILE")
    return Path(name) if name else None


def _keep(key: str, entry: dict[str, Any]) -> None:
    """Adds an entry to what the file has by now: processes side by side, one for each GPU, lose nothing of each other's."""
    _measured[key] = entry
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            _replace(path, {**_read(path, quiet=True), key: entry})
    except OSError as error:
        warnings.warn(f"could not keep the choice in {path}: {error}", stacklevel=3)


def _read(path: Path | None, quiet: bool = False) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        known = json.loads(path.read_text())
        if not isinstance(known, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if not quiet:
            warnings.warn(f"ignoring the choices in {path}, which cannot be read ({error}); timing again", stacklevel=3)
        return {}
    return known


def _replace(path: Path, known: Mapping[str, Any]) -> None:
    """In one step, so that nobody ever reads half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(known, file, indent=1)
    os.replace(file.name, path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # on Windows a choice may get lost, and is measured again
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield

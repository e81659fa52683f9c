"""What a GPU says, stored under its name in benchmarks/results.

    make gpu        or, with a torch of your own (ROCm's, say):  python benchmarks/gpu.py [arguments of attn_speed.py]

    conformance_GPU     the conformance suites
    choices_GPU         what `backend="auto"` measures for KMT and KMCT at the shapes of attn_speed.py, and takes: a file that
                        KRONMASK_AUTOTUNE_FILE may name
    pipe_model_GPU      the cost of a mask relative to joint attention in the same kernel: modelled from compiled code
                        (kernel_report.json), and measured
    attn_speed_GPU      the speed benchmark

Ends with status 1 if a test failed, and at once if torch sees no GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import attn_speed
import torch
from common import RESULTS, interleaved, save, table
from torch import Tensor

from kronmask import KronMask, kron_attention, masks, tuning
from kronmask.kernels.config import architecture

__all__ = ["compare_to_model", "main", "read_report"]

ROOT = RESULTS.parents[1]
SUITES = ("tests/test_conformance.py", "tests/kernels/test_conformance_triton.py")


def main(arguments: Sequence[str] | None = None) -> int:
    if not torch.cuda.is_available():
        sys.exit(f"this needs an NVIDIA or AMD GPU, and torch {torch.__version__} sees none here; nothing was run")
    device = torch.device("cuda", torch.cuda.current_device())
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()).strip("_")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["XDG_CACHE_HOME"] = folder  # four processes on one GPU time badly: nobody should find their choices
        command = [sys.executable, "-m", "pytest", "-n", "4", f"--junitxml={report}", *SUITES]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not report.exists():
            sys.exit(f"pytest ended with status {status} and wrote no report")
        rows, failed = read_report(report)
    path = save(f"conformance_{name}", rows, RESULTS, failed=failed)
    print(f"{path} is written")
    path = RESULTS / f"choices_{name}.json"
    print(f"{_choose(path, device)} choices are written to {path}")
    rows = list(compare_to_model(json.loads((RESULTS / "kernel_report.json").read_text()), device))
    path = save(f"pipe_model_{name}", rows, RESULTS)
    columns = ("pass", "mask", "frames", "tokens", "head_dim", "modelled", "measured")
    table(
        "cost relative to joint attention in the same kernel", columns, [[row[key] for key in columns] for row in rows]
    )
    print(f"{path} is written")
    attn_speed.main(["--name", f"attn_speed_{name}", *(sys.argv[1:] if arguments is None else arguments)])
    return int(status != 0)


def read_report(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """From pytest's JUnit file: for each test function how many of its cases passed, failed and were skipped; and what failed."""
    counts: dict[str, dict[str, Any]] = {}
    failed = []
    for case in ElementTree.parse(path).iter("testcase"):
        test = f"{case.get('classname')}.{case.get('name', '').partition('[')[0]}"
        row = counts.setdefault(test, {"test": test, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        outcome = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
        row[outcome] += 1
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 3)
        if problem is not None:
            failed.append({"case": case.get("name", ""), "message": problem.get("message", "")[:300]})
    return list(counts.values()), failed


# ---- choices and the model ------------------------------------------------------------------------------------------


def _choose(path: Path, device: torch.device) -> int:
    """Lets `auto` measure anew and writes what it takes to a file; returns how many choices there are."""
    for variable in ("KRONMASK_AUTOTUNE", "KRONMASK_AUTOTUNE_FILE"):
        os.environ.pop(variable, None)
    users = os.environ.pop("XDG_CACHE_HOME", None)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            for (frames, tokens), mask_name in product(attn_speed.CUDA["shapes"], ("kmt", "kmct")):
                _passes(masks.NAMES[mask_name](frames, tokens), 64, "auto", device)
            return tuning.export(path)
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if users is not None:
                os.environ["XDG_CACHE_HOME"] = users


def compare_to_model(report: Mapping[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """For each mask that the report has modelled on this GPU: the cost relative to joint attention, modelled and measured.

    The backward is modelled as the mean of its two kernels, which do about the same work.
    """
    modelled: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in report.get("masks", []):
        if row["arch"] == architecture(device) and "estimated" in row:
            case = (row["mask"], row["frames"], row["tokens"], row["head_dim"])
            modelled.setdefault(case, {})[row["step"]] = row["estimated"]
    for (mask_name, frames, tokens, head_dim), steps in modelled.items():
        calls: dict[str, Callable[[], object]] = {}
        for name in (mask_name, "joint"):
            ways = _passes(masks.NAMES[name](frames, tokens), head_dim, "triton", device)
            calls |= {f"{passes} {name}": call for passes, call in ways.items()}
        times = interleaved(calls, device, rounds=15)
        backward = [steps[step] for step in ("backward_query", "backward_key") if step in steps]
        costs = {"forward": steps.get("forward"), "backward": sum(backward) / len(backward) if backward else None}
        for passes, cost in costs.items():
            measured = times[f"{passes} {mask_name}"].over(times[f"{passes} joint"])
            row = {"pass": passes, "mask": mask_name, "frames": frames, "tokens": tokens, "head_dim": head_dim}
            yield {**row, "modelled": cost, "measured": round(measured, 3)}


def _passes(mask: KronMask, head_dim: int, backend: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """Forward and backward of four clips in bfloat16 with 12 heads, as calls; both have run once."""
    query, key, value = inputs = [
        torch.randn(4, mask.shape[0], 12, head_dim, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    ]
    grad_output = torch.randn_like(query)

    def forward() -> Tensor:
        return kron_attention(query, key, value, mask, backend=backend)

    output = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, grad_output, retain_graph=True)

    backward()
    return {"forward": forward, "backward": backward}


if __name__ == "__main__":
    sys.exit(main())

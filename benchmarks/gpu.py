"""What a GPU says: the conformance suite and the speed benchmark on it, stored under the GPU's name.

    make gpu        or, with a torch of your own (ROCm's, say):  python benchmarks/gpu.py [arguments of attn_speed.py]

Writes `conformance_GPU` and `attn_speed_GPU` into benchmarks/results. Ends with status 1 if a test failed, and at once if torch
sees no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attn_speed
import torch
from common import RESULTS, save

__all__ = ["main", "read_report"]

ROOT = RESULTS.parents[1]
SUITES = ("tests/test_conformance.py", "tests/kernels/test_conformance_triton.py")


def main(arguments: Sequence[str] | None = None) -> int:
    if not torch.cuda.is_available():
        sys.exit(f"this needs an NVIDIA or AMD GPU, and torch {torch.__version__} sees none here; nothing was run")
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()).strip("_")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "pytest", "-n", "4", f"--junitxml={report}", *SUITES]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not report.exists():
            sys.exit(f"pytest ended with status {status} and wrote no report")
        rows, failed = read_report(report)
    path = save(f"conformance_{name}", rows, RESULTS, failed=failed)
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


if __name__ == "__main__":
    sys.exit(main())

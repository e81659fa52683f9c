"""Runs the tests of masks, operator and patching in this environment, compiles the kernels, and stores how many tests passed.

make lowest    makes the environment of the lowest supported versions and runs this in it
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from common import RESULTS, save, table

__all__ = ["SUITES", "main"]

ROOT = Path(__file__).parents[1]
SUITES = (
    *(f"tests/test_{name}.py" for name in ("mask", "masks", "nn", "attention", "head_groups", "packed", "distributed")),
    "tests/patch",
    "tests/kernels/test_report.py::test_every_variant_compiles",
)
NOT_HERE = ("tests/patch/test_zoo.py",)  # its models are those of the newest timm


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        ignored = [f"--ignore={path}" for path in NOT_HERE]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", *ignored, *SUITES]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    found: dict[str, Counter[str]] = {}
    failed, skipped = [], Counter[str]()
    for case in cases:
        kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        found.setdefault(case.get("classname", ""), Counter())[kind] += 1
        if kind in ("failure", "error"):
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        if kind == "skipped":
            skipped[next(child.get("message", "") for child in case)] += 1
    kinds = ("passed", "skipped", "failure", "error")
    rows = [{"suite": suite} | {kind: count[kind] for kind in kinds} for suite, count in found.items()]
    save("lowest", rows, RESULTS, failed=failed, skipped=dict(skipped), status=status)
    table("lowest supported versions", ["suite", *kinds], [tuple(row.values()) for row in rows])
    return status


if __name__ == "__main__":
    sys.exit(main())

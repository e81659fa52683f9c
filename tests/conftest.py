"""Shared settings: the examples are importable, and a failing random test prints how to repeat it."""

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

for folder in ("examples", "benchmarks", "tests", "tests/claver"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
torch.set_num_threads(1)  # the tests run side by side, a process for each core

settings.register_profile(
    "kronmask", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("kronmask")

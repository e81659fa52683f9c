"""Checkpoints as the authors' code writes them, whose configuration is of a class that is gone when they are read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class CfgNode(dict):
    """Pickles as yacs' class of this name does: items, and attributes that are not settings."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({key: CfgNode(v) if isinstance(v, dict) else v for key, v in values.items()})
        self.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False)


def write_official(path: Path, state: dict[str, torch.Tensor], config: dict[str, Any] | None) -> Path:
    """`{model, optimizer, lr_scheduler, max_accuracy, epoch, config}`, as the authors' `save_checkpoint` does."""
    module = sys.modules["yacs_of_the_authors"] = ModuleType("yacs_of_the_authors")
    module.CfgNode = CfgNode
    CfgNode.__module__ = module.__name__
    content = {"model": state, "optimizer": {"state": {}}, "lr_scheduler": {}, "max_accuracy": 81.5, "epoch": 59}
    try:
        torch.save(content | ({} if config is None else {"config": CfgNode(config)}), path)
    finally:
        CfgNode.__module__ = __name__
        del sys.modules["yacs_of_the_authors"]
    return path


def official_config(mask: str = "KMCT", frames: int = 4, arch: str = "small") -> dict[str, Any]:
    return {
        "DATA": {"NUM_FRAMES": frames, "INPUT_SIZE": 32, "LABEL_LIST": "labels/k400.csv"},
        "MODEL": {"ARCH": arch, "MASK_MODE": mask, "PRETRAINED": None},
        "TRAIN": {"LR": 1.2e-5, "BETAS": (0.9, 0.98)},
        "SEED": 3047,
    }


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict as the authors' code would have written it."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("clip.")
        name = re.sub(
            r"visual\.temporal_encoder\.blocks\.(\d+)\.", r"visual.transformer_t.resblocks.\1.temporal_", name
        )
        if name == "visual.temporal_encoder.embedding.weight":  # (1, T, D) there
            name, tensor = "visual.temporal_embedding", tensor.squeeze(2)
        renamed[name] = tensor
    return renamed

"""Weights between a pretrained and a tuned model: accuracy on the tuned task against accuracy on classes never trained on.

After WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903) and its use for video CLIP (Weng et al. 2023, arXiv 2302.00624).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..figures import plot_tradeoff
from ..files import write_text
from ..model import Claver, build_model

__all__ = ["interpolated", "pretrained_state", "sweep"]

OUTPUTS = (".out_proj.weight", ".out_proj.bias", ".mlp.c_proj.weight", ".mlp.c_proj.bias")


def pretrained_state(config: ModelConfig) -> dict[str, Tensor]:
    """The weights of the image and text model alone, as `model.name` and `model.pretrained` say.

    Raises:
        ValueError: the configuration names no weights.
    """
    if config.pretrained is None:
        raise ValueError("model.pretrained names no weights to start from; give it, or --source")
    return {name: tensor for name, tensor in build_model(config).state_dict().items() if "temporal_" not in name}


def interpolated(source: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """`(1 - alpha) * source + alpha * tuned`, for state dicts.

    What the source lacks, an image model's temporal layers, are scaled by alpha where they write to the residual stream (output
    projections and temporal embedding) and are the tuned ones elsewhere: so alpha 0 is the image model on each frame, exactly.

    Raises:
        ValueError: alpha not from 0 to 1, or weights that are not of one model, by name.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, not {alpha}")
    missing = {name for name in tuned.keys() - source.keys() if "temporal_" not in name}
    different = sorted(missing | (source.keys() - tuned.keys())) + [
        name for name in source.keys() & tuned.keys() if source[name].shape != tuned[name].shape
    ]
    if different:
        raise ValueError(f"the models are not of one kind: {', '.join(different[:5])} differ")
    mixed = {}
    for name, tensor in tuned.items():
        if not tensor.is_floating_point():
            mixed[name] = tensor
        elif name in source:
            mixed[name] = torch.lerp(source[name].to(tensor.dtype), tensor, alpha)
        else:
            writes = name.endswith(OUTPUTS) or name.endswith("embedding.weight")
            mixed[name] = tensor * alpha if writes else tensor
    return mixed


def sweep(
    model: Claver,
    source: Mapping[str, Tensor],
    alphas: Sequence[float],
    tasks: Mapping[str, Callable[[Claver], Mapping[str, Any]]],
    folder: str | Path,
) -> list[dict[str, Any]]:
    """Evaluate the model on each task at each alpha; writes `wise_ft.json` and `wise_ft.png`.

    Args:
        model: tuned; it has its weights again at the end.
        source: state dict of the pretrained model.
        alphas: shares of the tuned weights, 0 to 1.
        tasks: by name, from a model to its numbers with `top1`; the first is the tuned one.
        folder: is made if it is not there.

    Returns:
        For each alpha a record `{alpha, task: top1, ...}`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records = []
    try:
        for alpha in alphas:
            model.load_state_dict(interpolated(source, tuned, alpha))
            records.append({"alpha": alpha, **{name: float(task(model)["top1"]) for name, task in tasks.items()}})
    finally:
        model.load_state_dict(tuned)
    write_text(folder / "wise_ft.json", json.dumps(records, indent=1) + "\n")
    plot_tradeoff(records, folder / "wise_ft.png")
    return records

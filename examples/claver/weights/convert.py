"""Official checkpoints, and ours of before, as the files that this program writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import Config
from ..prompts.choice import choose_prompts
from ..settings import from_dict
from .checkpoint import CheckpointError, load_model, save_checkpoint

__all__ = ["convert"]

SUFFIX = ".safetensors"


def convert(
    source: str | Path,
    out: str | Path,
    *,
    config: Config | None = None,
    classes: Sequence[str] | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of the authors, or an older one of this program, as weights that say what they are.

    Each value is written as it was read, to the bit.

    Args:
        source: the checkpoint.
        out: where to write it; a name that ends in .safetensors.
        config: what an official checkpoint does not say: its mask, if that is missing, and texts and pixels; None: what it says.
        classes: names by label, for a checkpoint without; the texts are then those of `config`. None: whoever uses the
            checkpoint has to name classes.
        force: let `config` contradict the checkpoint.
        overwrite: replace a file that is there.

    Returns:
        `out`.

    Raises:
        CheckpointError: as `checkpoint.load_model`; classes that are not those of the checkpoint.
        ValueError: a name with another ending, or of a file that is there.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise ValueError(f"{out}: converted checkpoints are safetensors; give it a name that ends in {SUFFIX}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: is there already; pass --overwrite, or another name")
    model, content = load_model(source, config, force=force)
    settings = from_dict(content["config"], str(source)) if config is None else config
    stored = content.get("classes") or None
    if stored and classes and list(classes) != stored:
        raise CheckpointError(f"{source}: was trained on other classes: {len(stored)}, beginning with {stored[0]!r}")
    if stored:
        names, prompts = stored, content["prompts"]
    else:
        names, prompts = list(classes or ()), choose_prompts(settings, classes).prompts if classes else []
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, model, settings, names, prompts, epoch=content.get("epoch", 0))
    return out

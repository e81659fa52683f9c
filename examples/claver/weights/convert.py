"""Official checkpoints, and ours of before, as the files that this program writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..command_line import Given
from ..data.lists import read_labels
from ..prompts.choice import choose_prompts
from .checkpoint import CheckpointError, save_checkpoint
from .loading import open_checkpoint

__all__ = ["convert"]

SUFFIX = ".safetensors"


def convert(
    source: str,
    out: str | Path,
    given: Given,
    *,
    classes: Sequence[str] | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of the authors, or an older one of this program, as weights that say what they are.

    Each value is written as it was read, to the bit.

    Args:
        source: the checkpoint.
        out: where to write it; a name that ends in .safetensors.
        given: settings over those of the checkpoint: what an official one does not say, as its mask, texts and pixels.
        classes: names by label, for a checkpoint without, whose texts are then those of the settings; None: those of a file of
            labels among the settings. Without either whoever uses the checkpoint has to name classes.
        force: let the settings contradict the checkpoint.
        overwrite: replace a file that is there.

    Returns:
        `out`.

    Raises:
        CheckpointError: as `loading.open_checkpoint`; classes that are not those of the checkpoint.
        ValueError: a name with another ending, or of a file that is there.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise ValueError(f"{out}: converted checkpoints are safetensors; give it a name that ends in {SUFFIX}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: is there already; pass --overwrite, or another name")
    model, content, config = open_checkpoint(source, given, force=force)
    if classes is None and "data.labels" in given.typed:
        classes = read_labels(config.data.labels)
    stored = content.get("classes") or None
    if stored and classes and list(classes) != stored:
        raise CheckpointError(f"{source}: was trained on other classes: {len(stored)}, beginning with {stored[0]!r}")
    if stored:
        names, prompts = stored, content["prompts"]
    else:
        names, prompts = list(classes or ()), choose_prompts(config, classes).prompts if classes else []
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, model, config, names, prompts, epoch=content.get("epoch", 0))
    return out

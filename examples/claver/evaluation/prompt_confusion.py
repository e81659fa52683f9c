"""Which classes a CLIP takes for each other by their texts: class names alone against each kind of sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..class_names import clean_class_name
from ..figures import save_figure
from ..prompts.build import Interpretive, tokenize

__all__ = ["NAMES", "Nearest", "TextEncoder", "clip_encoder", "compare_texts", "nearest", "plot_texts", "summarize"]

NAMES, ALL = "class names", "all sentences"
BATCH = 256  # texts encoded at once

TextEncoder = Callable[[Sequence[str]], Tensor]
"""Texts -> features `(len(texts), E)`, of any length."""


class Nearest(NamedTuple):
    """A class, the other class whose texts are nearest to its own, and the cosine between them."""

    name: str
    other: str
    cosine: float


def clip_encoder(
    name: str | None = None, pretrained: str | None = None, checkpoint: str | None = None
) -> tuple[str, TextEncoder]:
    """What a text tower is called, and the tower: that of an open_clip model, or of a CLAVER checkpoint.

    Args:
        name: an architecture of open_clip.
        pretrained: a tag of open_clip or a file of weights; None: random weights.
        checkpoint: a checkpoint of this program, in place of the other two.

    Raises:
        ImportError: open_clip is missing.
        ValueError, OSError: no such model, weights or checkpoint.
    """
    if checkpoint is not None:
        from ..weights.checkpoint import load_model

        model, content = load_model(checkpoint)
        clip, title = model.clip, f"{checkpoint}, after epoch {content.get('epoch', '?')}"
        context = clip.context_length

        def tokens_of(texts: list[str]) -> Tensor:
            return tokenize([texts], context_length=context)[0]
    else:
        try:
            import open_clip
        except ImportError as error:
            raise ImportError("this needs open_clip: pip install 'kronmask[claver]'") from error
        if name not in open_clip.list_models():
            raise ValueError(f"open_clip has no model {name!r}; it has {', '.join(open_clip.list_models()[:8])}, ...")
        try:
            clip = open_clip.create_model(name, pretrained=pretrained)
        except (RuntimeError, KeyError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"open_clip cannot load {name} with the weights {pretrained!r}: {reason}") from None
        tokens_of = open_clip.get_tokenizer(name)
        title = f"{name}, {pretrained or 'random weights'}"
    clip.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(clip.parameters()).device

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        parts = [list(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        return torch.cat([clip.encode_text(tokens_of(part).to(device)).float().cpu() for part in parts])

    return title, encode


def compare_texts(entries: Interpretive, encode: TextEncoder) -> dict[str, Tensor]:
    """Cosines `(C, C)` between classes by their names, by each kind of sentence, and by all sentences.

    The feature of a class is the mean of its texts' normalised features, normalised.
    """
    names = list(entries)
    kinds = list(entries[names[0]])
    texts = [clean_class_name(name) for name in names]
    owners = [("", i) for i in range(len(names))]
    for i, name in enumerate(names):
        for kind in kinds:
            texts += entries[name][kind]
            owners += [(kind, i)] * len(entries[name][kind])
    features = F.normalize(encode(texts), dim=-1)  # (texts, E)
    sums = {kind: torch.zeros(len(names), features.shape[1]) for kind in ("", *kinds)}
    for kind in sums:
        rows = [row for row, (of, _) in enumerate(owners) if of == kind]
        sums[kind].index_add_(0, torch.tensor([owners[row][1] for row in rows]), features[rows])
    titles = {NAMES: sums[""], **{kind: sums[kind] for kind in kinds}}
    if len(kinds) > 1:
        titles[ALL] = torch.stack([sums[kind] for kind in kinds]).sum(0)
    means = {title: F.normalize(total, dim=-1) for title, total in titles.items()}
    return {title: mean @ mean.T for title, mean in means.items()}


def nearest(names: Sequence[str], cosines: Tensor) -> list[Nearest]:
    """For each class the other one that is nearest, the nearest pairs first."""
    apart = cosines.clone().fill_diagonal_(-2)
    values, others = apart.max(1)
    found = [Nearest(names[i], names[int(j)], float(v)) for i, (v, j) in enumerate(zip(values, others, strict=True))]
    return sorted(found, key=lambda item: -item.cosine)


def summarize(names: Sequence[str], cosines: Mapping[str, Tensor], most: int = 10) -> str:
    """How near the nearest other class is on average for each kind of text, and the pairs that are nearest."""
    lines = []
    for title, table in cosines.items():
        found = nearest(names, table)
        mean = sum(item.cosine for item in found) / len(found)
        lines.append(f"{title}: the nearest other class has a cosine of {mean:.3f} on average")
        pairs: dict[frozenset[str], Nearest] = {}
        for item in found:
            pairs.setdefault(frozenset(item[:2]), item)
        lines += [f"  {item.cosine:.3f}  {item.name} | {item.other}" for item in list(pairs.values())[:most]]
    return "\n".join(lines)


def plot_texts(names: Sequence[str], cosines: Mapping[str, Tensor], path: str | Path, title: str) -> None:
    """Draws a table of cosines for each kind of text, on one scale of colours, with the classes in their order."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(cosines))
    rows = -(-len(cosines) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 4.6 * rows + 0.6), layout="constrained", squeeze=False
    )
    off = torch.cat([table[~torch.eye(len(names), dtype=torch.bool)] for table in cosines.values()])
    low, high = (
        (off.quantile(share).item() for share in (0.01, 0.999)) if off.numel() < 2**24 else (off.min().item(), 1.0)
    )
    for panel in panels.flat[len(cosines) :]:
        panel.axis("off")
    image = None
    for panel, (kind, table) in zip(panels.flat, cosines.items(), strict=False):
        image = panel.imshow(
            table.numpy(), vmin=low, vmax=max(high, low + 1e-6), cmap="viridis", interpolation="nearest"
        )
        mean = sum(item.cosine for item in nearest(names, table)) / len(names)
        panel.set_title(f"{kind}: {mean:.3f} to the nearest other", fontsize=10)
        if len(names) <= 30:
            panel.set_yticks(range(len(names)), [clean_class_name(name) for name in names], fontsize=6)
            panel.set_xticks(range(len(names)), [clean_class_name(name) for name in names], fontsize=6, rotation=90)
        else:
            panel.set_xticks([])
            panel.set_yticks([])
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.6, label="cosine of the texts of two classes")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
    plt.close(figure)

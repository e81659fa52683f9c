"""What patching has to know about a class of image encoders: `Family`, a declaration of facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

__all__ = ["NO_PRUNING", "Entry", "Family", "available"]

NO_PRUNING = (
    ("prune_intermediate_layers", "it would cut off the blocks that run the temporal layers; unpatch_vit(model) first"),
)
"""A value of `Family.refused`."""


@dataclass(frozen=True)
class Entry:
    """A method of an image encoder that takes a batch of images, and takes a batch of video once the encoder is patched.

    Args:
        method: its name. Its first argument is the images.
        output: "mean" for one output per clip, the mean over its frames; "frames" for one per frame, `(B, T, ...)`.
        ndim: dimensions of its first argument for images: 4 for `(B, C, H, W)`, 3 for tokens `(B, N, D)`.
        features: its first argument is features of the encoder, not pixels.
    """

    method: str
    output: str = "mean"
    ndim: int = 4
    features: bool = False

    def __post_init__(self) -> None:
        if self.output not in ("mean", "frames"):
            raise ValueError(f"output must be 'mean' or 'frames', not {self.output!r}")
        if self.ndim not in (3, 4):
            raise ValueError(f"ndim must be 3 (tokens) or 4 (images), not {self.ndim!r}")


def available(encoder: type[nn.Module], entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Those of some entries that the installed release of a library has."""
    return tuple(entry for entry in entries if hasattr(encoder, entry.method))


@dataclass(frozen=True)
class Family:
    """The facts about a class of image ViTs that `patch_vit` needs; the built-in families are declared with it too.

    The model's own code computes everything else: a clip is folded into the batch, `(B, T, C, H, W)` to `(B*T, C, H, W)`,
    and goes through the model's own methods; only the blocks behave differently, since a block is where temporal
    attention acts. So position terms, pooling and heads of the model are its own, whatever they are. To pickle a patched
    model, the functions of its family must be importable (no lambda).

    Args:
        encoder: the class whose methods take images; subclasses are meant too.
        blocks: where its transformer blocks are: an attribute path (`"blocks"`, `"encoder.layers"`) or a function of the
            encoder. A block takes tokens `(B, N, D)` (or `(B, H, W, D)`) as its first argument and returns them, alone or
            first in a tuple. Multi-head attention is found in it by the attribute `num_heads`.
        entries: its methods that take images; `forward` is among them.
        per_image: names of further tensor arguments of these methods that have one row for each image. For video they
            are given per clip `(B, ...)` and repeated for each frame.
        sequence_first: the blocks take tokens as `(N, B, D)`; a function of the encoder where it depends.
        refused: methods that have no meaning for a patched model, with the reason.
        cannot_replace: from the encoder and a block, why `placement="replace"` cannot serve it, or None. Not needed for
            attention through `scaled_dot_product_attention` or `nn.MultiheadAttention` without a bias on its scores.
        cannot_copy: from the encoder and a block, why `init="copy"` would lose something, or None. That the copied layer
            computes what the block does is checked in any case.
        base: a subclass of `kronmask.patch.VideoEncoder` for what no fact can express.
    """

    encoder: type[nn.Module]
    blocks: str | Callable[[Any], Sequence[nn.Module]]
    entries: tuple[Entry, ...] = (Entry("forward"),)
    per_image: tuple[str, ...] = ()
    sequence_first: bool | Callable[[Any], bool] = False
    refused: tuple[tuple[str, str], ...] = ()
    cannot_replace: Callable[[Any, Any], str | None] | None = None
    cannot_copy: Callable[[Any, Any], str | None] | None = None
    base: type[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("entries", "per_image", "refused"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def find_blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """The transformer blocks of an encoder.

        Raises:
            TypeError: there are none where this declaration says.
        """
        try:
            found = list((attrgetter(self.blocks) if isinstance(self.blocks, str) else self.blocks)(encoder))
        except (AttributeError, TypeError):
            found = []
        if not found or not all(isinstance(block, nn.Module) for block in found):
            raise TypeError(f"no transformer blocks at {self.blocks!r} of {type(encoder).__qualname__}")
        return found

    def is_sequence_first(self, encoder: nn.Module) -> bool:
        """Whether the blocks take `(N, B, D)`."""
        return self.sequence_first(encoder) if callable(self.sequence_first) else self.sequence_first

"""The arguments of `patch_vit`, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kronmask.mask import KronMask
from kronmask.masks import did_you_mean
from kronmask.nn import AttentionOrGroups, MaskRule

__all__ = ["EMBEDDINGS", "INITS", "PLACEMENTS", "Settings"]

PLACEMENTS = ("append", "interleave", "replace")
INITS = ("zero", "random", "copy")
EMBEDDINGS = (True, False, "rotary")


@dataclass(frozen=True)
class Settings:
    """The checked arguments of `patch_vit`."""

    frames: int
    attention: AttentionOrGroups
    placement: str
    layers: int | Sequence[int] | None
    init: str
    temporal_embedding: bool | str

    def __post_init__(self) -> None:
        chosen: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
            ("placement", self.placement, PLACEMENTS),
            ("init", self.init, INITS),
            ("temporal_embedding", self.temporal_embedding, EMBEDDINGS),
        )
        for name, value, choices in chosen:
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                hint = did_you_mean(value, map(str, choices))
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1:
            raise ValueError(f"frames must be an int of at least 1, not {self.frames!r}")
        rule = MaskRule(self.attention)  # raises ValueError
        for group in rule.groups:
            if isinstance(group.attention, KronMask):
                group(self.frames, group.attention.num_tokens)  # raises ValueError for another number of frames

    def appended(self, depth: int) -> int:
        """How many temporal blocks `placement="append"` adds to an encoder of `depth` blocks."""
        if self.layers is None:
            return max(1, depth // 3)
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise ValueError(
                "with placement='append', layers is the number of temporal blocks, an int of at least 1; "
                f"got {self.layers!r}"
            )
        if self.init == "copy" and self.layers > depth:
            raise ValueError(
                f"init='copy' has {depth} image blocks to copy from, but layers={self.layers} was asked for"
            )
        return self.layers

    def selected(self, depth: int) -> tuple[int, ...]:
        """Which of `depth` blocks `placement="interleave"` or `"replace"` is about."""
        layers = range(depth) if self.layers is None else self.layers
        expected = (
            f"with placement={self.placement!r}, layers is an int k from 1 to {depth} (every k-th block) or a sequence "
            f"of different block indices from 0 to {depth - 1}; got {self.layers!r}"
        )
        if isinstance(layers, (bool, str)):
            raise ValueError(expected)
        if isinstance(layers, int):
            if not 1 <= layers <= depth:
                raise ValueError(expected)
            return tuple(range(layers - 1, depth, layers))
        try:
            indices = [index + depth if index < 0 else index for index in layers]
        except TypeError:
            raise ValueError(expected) from None
        whole = all(isinstance(index, int) and 0 <= index < depth for index in indices)
        if not indices or not whole or len(set(indices)) != len(indices):
            raise ValueError(expected)
        return tuple(sorted(indices))

"""How the frames in a batch form clips: all that a temporal layer asks about them.

A temporal layer has the tokens `(B, T*N, D)` of T frames before it. Which frames these are, and which others they attend to, is
said by a `Clips`: here, by one for whole clips of one length, and by one for clips of several lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronmask.attention import join_rules, rule_attention, split_rules
from kronmask.mask import KronMask

if TYPE_CHECKING:
    from kronmask.nn import MaskRule, TemporalEmbedding

__all__ = ["Clips", "PackedClips"]


class Clips:
    """Whole clips of `frames` frames each: a frame attends to those of its own clip that the mask allows.

    Args:
        frames: frames T of each sequence, which may be symbolic.
    """

    whole = True  # whether a batch has all frames of its clips
    takes_groups = True  # whether `attend` takes the mask of all groups of heads at once

    def __init__(self, frames: int) -> None:
        self.frames = frames

    # ---- for temporal layers ----------------------------------------------------------------------------------------

    def times(self, device: torch.device) -> Tensor:
        """When each of the T frames is, `(T,)` int64: its number in its clip."""
        return torch.arange(self.frames, device=device)

    def embedding(self, embedding: TemporalEmbedding) -> Tensor:
        """The temporal embedding of each of the T frames, `(1, T, 1, D)`."""
        return embedding.at(self.frames)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskRule,
        tokens: int,
        *,
        prefix: int = 0,
        scale: float | None = None,
    ) -> Tensor:
        """Attention `(B, H, prefix + T*N, D)` of these frames to those that the mask allows.

        Args:
            query, key, value: of these frames, as in `kron_attention`.
            mask: for clips of any size.
            tokens: tokens N of a frame.
            prefix: global tokens before the frames.
            scale: factor on the scores, `D ** -0.5` by default.
        """
        rule = mask(self.frames, tokens)
        return rule_attention(query, key, value, rule, frames=self.frames, tokens=tokens, prefix=prefix, scale=scale)

    # ---- for the model around them ----------------------------------------------------------------------------------

    def count(self, images: int) -> int:
        """The number of clips that `images` frames form."""
        return images // self.frames

    def repeat(self, value: Tensor) -> Tensor:
        """`(B, ...)`, a row for each clip, to `(B*T, ...)`, a row for each frame."""
        return value.repeat_interleave(self.frames, 0)

    def by_clip(self, value: Tensor) -> Any:
        """`(B*T, ...)`, a row for each frame, to `(B, T, ...)`."""
        return value.unflatten(0, (-1, self.frames))

    def mean(self, value: Tensor) -> Tensor:
        """`(B*T, ...)`, a row for each frame, to `(B, ...)`: the mean over the frames of a clip."""
        return value.unflatten(0, (-1, self.frames)).mean(1)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = object.__hash__


class PackedClips(Clips):
    """Clips of different lengths, one behind the other in a batch of one: a frame attends within its own clip.

    What is `(B, T, ...)` for clips of one length is a list of a `(T, ...)` for each clip here.

    Args:
        lengths: frames of each clip.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(index(length) for length in lengths)  # constants of a traced graph, as is the mask
        super().__init__(sum(self.lengths))

    def times(self, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])

    def embedding(self, embedding: TemporalEmbedding) -> Tensor:
        return torch.cat([embedding.at(length) for length in self.lengths], 1)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskRule,
        tokens: int,
        *,
        prefix: int = 0,
        scale: float | None = None,
    ) -> Tensor:
        """As of `Clips`, in one call for all clips.

        Raises:
            ValueError: a prefix, which would belong to all clips.
        """
        if prefix:
            raise ValueError(f"packed clips have no prefix tokens, but prefix is {prefix}; count them in tokens")
        rule = _packed_rule(tuple(mask(length, tokens) for length in self.lengths), self.lengths, index(tokens))
        return rule_attention(query, key, value, rule, frames=self.frames, tokens=tokens, scale=scale)

    def count(self, images: int) -> int:
        return len(self.lengths)

    def repeat(self, value: Tensor) -> Tensor:
        lengths = torch.tensor(self.lengths, device=value.device)
        return value.repeat_interleave(lengths, 0, output_size=self.frames)

    def by_clip(self, value: Tensor) -> list[Tensor]:
        return list(value.split(self.lengths))

    def mean(self, value: Tensor) -> Tensor:
        return torch.stack([clip.mean(0) for clip in self.by_clip(value)])


@torch.compiler.assume_constant_result
def _packed_rule(rules: tuple[str, ...], lengths: tuple[int, ...], tokens: int) -> str:
    """The rule of clips one behind the other, from that of each."""
    return _block_diagonal(rules, lengths, tokens)


@lru_cache(maxsize=256)
def _block_diagonal(rules: tuple[str, ...], lengths: tuple[int, ...], tokens: int) -> str:
    packed = []
    for of_clips in zip(*map(split_rules, rules), strict=True):  # for each group of heads
        masks = [
            KronMask.from_rule(rule, frames=(length, length), tokens=(tokens, tokens))
            for rule, length in zip(of_clips, lengths, strict=True)
        ]
        packed.append(KronMask.block_diagonal(masks).rule)
    return join_rules(packed)

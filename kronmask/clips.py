"""How the frames in a batch form clips: all that a temporal layer asks about them.

A temporal layer has the tokens `(B, T*N, D)` of T frames before it. Which frames these are, and which others they attend to, is
said by a `Clips`: here, by one for whole clips.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronmask.attention import rule_attention

if TYPE_CHECKING:
    from kronmask.nn import MaskRule, TemporalEmbedding

__all__ = ["Clips"]


class Clips:
    """Whole clips of `frames` frames each: a frame attends to those of its own clip that the mask allows.

    Args:
        frames: frames T of each sequence, which may be symbolic.
    """

    whole = True  # whether a batch has all frames of its clips

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
        site: Any,
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
            site: which attention of the model this is; equal from forward to forward.
            query, key, value: of these frames, as in `kron_attention`.
            mask: for clips of any size.
            tokens: tokens N of a frame.
            prefix: global tokens before the frames.
            scale: factor on the scores, `D ** -0.5` by default.
        """
        rule = mask(self.frames, tokens)
        return rule_attention(query, key, value, rule, frames=self.frames, tokens=tokens, prefix=prefix, scale=scale)

    # ---- for the model around them ----------------------------------------------------------------------------------

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

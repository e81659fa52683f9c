"""A CLAVER model on a stream: what is in the last frames, anew after each, every frame computed once."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kronmask.stream import FrameStream

from ..data.augment import AugmentConfig, crop_views
from ..model import Claver
from .evaluate import feature_probabilities

__all__ = ["StreamClassifier", "open_stream"]


def open_stream(model: Claver, frames: int) -> FrameStream:
    """A stream without an end where the model allows it, else one whose `length` is that of a training clip, `frames`.

    Raises:
        ValueError: a model whose frames see later ones.
    """
    try:
        return FrameStream(model.clip.visual)
    except ValueError:  # a learned embedding, or no window; a mask that looks ahead is refused again
        return FrameStream(model.clip.visual, length=frames)


class StreamClassifier:
    """Class probabilities of the last frames of a stream, after each.

    They are those of a clip: a frame's feature is normalised, and the mean over frames is compared with the texts.

    Args:
        model: in evaluation mode.
        frames: of a training clip.
        augment: how evaluation prepares frames; the centre is taken.
        text_features: `(A, C, E)`, as `text.encode_prompts` gives, on the device of the model.
        average: frames that the mean is over; None: as many as a training clip has.

    Raises:
        ValueError: a model whose frames see later ones, or an average over less than one frame.
    """

    def __init__(
        self,
        model: Claver,
        frames: int,
        augment: AugmentConfig,
        text_features: Tensor,
        *,
        average: int | None = None,
    ) -> None:
        if average is not None and average < 1:
            raise ValueError(f"the mean must be over at least 1 frame, not {average}")
        self.model, self.augment, self.text_features = model, augment, text_features
        self.stream = open_stream(model, frames)
        self._features: deque[Tensor] = deque(maxlen=average or frames)
        self._device = text_features.device
        self.frames = 0
        self.seconds = 0.0  # in the model, for all frames
        self.cache_bytes = 0  # at most

    @property
    def average(self) -> int:
        """Frames that the mean is over, once there are so many."""
        assert self._features.maxlen is not None
        return self._features.maxlen

    @property
    def frames_per_second(self) -> float:
        """Of the model, without decoding; the first frame, which also allocates, counts."""
        return self.frames / self.seconds if self.seconds else 0.0

    def reset(self) -> None:
        """Begin anew: the next frame is the first of another video."""
        self.stream.reset()
        self._features.clear()

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Tensor:
        """Probabilities `(C,)` on the CPU, given the next frame, uint8 RGB `(H, W, 3)`, of any size."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        frame = crop_views(pixels[None], self.augment, 1)[0].to(self._device)  # (1, 3, S, S)
        start = time.perf_counter()
        if self.stream.frames_seen == [self.stream.length]:
            self.stream.reset()  # the mean goes on: its frames are then of two clips, and each place in a clip is there once
        feature = F.normalize(self.stream(frame)[0, 0].float(), dim=-1)
        self._features.append(feature)
        mean = torch.stack(list(self._features)).mean(0)
        probabilities = feature_probabilities(self.model, mean[None], self.text_features)[0].cpu()  # waits for a GPU
        self.seconds += time.perf_counter() - start
        self.frames += 1
        self.cache_bytes = max(self.cache_bytes, self.stream.cache_bytes)
        return probabilities

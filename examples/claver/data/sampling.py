"""Which frames of a video make a clip: temporal segment sampling (TSN, arXiv 1608.00859)."""

from __future__ import annotations

import torch

__all__ = ["segment_indices", "view_indices"]


def segment_indices(num_frames: int, frames: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """One frame index of each of `frames` equal segments of a video: int64 `(frames,)`, never decreasing.

    With a generator the frame is drawn uniformly in its segment (training), without one it is the segment's centre.
    A video with fewer frames than segments repeats some. Raises ValueError unless both numbers are at least 1.
    """
    start, length = _segments(num_frames, frames)
    if generator is None:
        return start + length // 2
    draw = torch.rand(frames, generator=generator, dtype=torch.float64)
    return start + (draw * length).long()


def view_indices(num_frames: int, frames: int, num_clips: int) -> torch.Tensor:
    """Frame indices of `num_clips` test clips of one video: int64 `(num_clips, frames)`, rows never decreasing.

    Clip `c` takes the frame at `(c + 1/2) / num_clips` of each segment, so one clip is the centre of
    `segment_indices`. Raises ValueError unless all numbers are at least 1.
    """
    if num_clips < 1:
        raise ValueError(f"num_clips must be at least 1, got {num_clips}")
    start, length = _segments(num_frames, frames)
    offset = (2 * torch.arange(num_clips)[:, None] + 1) * length // (2 * num_clips)  # (num_clips, frames)
    return start + offset


def _segments(num_frames: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First frame and length of each segment, both `(frames,)`; 0 long where a short video repeats a frame."""
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    bounds = torch.arange(frames + 1) * num_frames // frames
    return bounds[:-1], bounds.diff()

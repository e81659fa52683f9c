"""Segment sampling: in range, in order, one frame from each segment, reproducible."""

from __future__ import annotations

import pytest
import torch
from claver.data.sampling import segment_indices, view_indices
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = st.integers(1, 5000)
FRAMES = st.integers(1, 64)
SEEDS = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(LENGTHS, FRAMES, SEEDS)
def test_each_index_lies_in_its_own_segment(num_frames: int, frames: int, seed: int) -> None:
    for indices in (
        segment_indices(num_frames, frames),
        segment_indices(num_frames, frames, generator=generator(seed)),
    ):
        assert indices.dtype == torch.int64
        assert indices.shape == (frames,)
        assert (indices.diff() >= 0).all()
        for i, index in enumerate(indices.tolist()):
            first = i * num_frames // frames
            last = max(first, (i + 1) * num_frames // frames - 1)
            assert 0 <= first <= index <= last < num_frames
    if num_frames >= frames:
        assert (indices.diff() > 0).all()


@given(LENGTHS, FRAMES, st.integers(1, 10))
def test_views_are_in_range_and_in_order_both_ways(num_frames: int, frames: int, num_clips: int) -> None:
    views = view_indices(num_frames, frames, num_clips)
    assert views.dtype == torch.int64
    assert views.shape == (num_clips, frames)
    assert 0 <= views.min() <= views.max() < num_frames
    assert (views.diff(dim=1) >= 0).all()
    assert (views.diff(dim=0) >= 0).all()
    if num_frames >= frames * num_clips:
        assert len(views.unique()) == views.numel()


@given(LENGTHS, FRAMES)
def test_one_view_is_the_centre_of_the_segments(num_frames: int, frames: int) -> None:
    assert torch.equal(view_indices(num_frames, frames, 1)[0], segment_indices(num_frames, frames))


def test_values_worked_by_hand() -> None:
    assert segment_indices(16, 4).tolist() == [2, 6, 10, 14]
    assert segment_indices(10, 4).tolist() == [1, 3, 6, 8]
    assert segment_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert segment_indices(1, 4).tolist() == [0, 0, 0, 0]
    assert view_indices(32, 4, 4).tolist() == [[1, 9, 17, 25], [3, 11, 19, 27], [5, 13, 21, 29], [7, 15, 23, 31]]


def test_every_frame_is_drawn_about_equally_often() -> None:
    draw = generator(0)
    counts = torch.zeros(40)
    for _ in range(2000):
        counts[segment_indices(40, 8, generator=draw)] += 1
    assert counts.min() > 320  # 400 expected, standard deviation 18
    assert counts.max() < 480


def test_the_draw_is_the_generators_alone() -> None:
    first = segment_indices(300, 8, generator=generator(5))
    torch.manual_seed(1)
    assert torch.equal(first, segment_indices(300, 8, generator=generator(5)))
    assert not torch.equal(first, segment_indices(300, 8, generator=generator(6)))


@pytest.mark.parametrize(("num_frames", "frames", "num_clips"), [(0, 8, 1), (10, 0, 1), (10, 8, 0), (-5, 8, 1)])
def test_numbers_below_one_are_refused(num_frames: int, frames: int, num_clips: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        view_indices(num_frames, frames, num_clips)

"""Augmentation: one draw a clip, reproducible, exact geometry; mixing of batches with targets that fit the pixels."""

from __future__ import annotations

import pytest
import torch
from claver.data import augment
from claver.data.augment import (
    CLIP_MEAN,
    CLIP_STD,
    AugmentConfig,
    _multi_scale_box,
    crop_views,
    mixup_cutmix,
    resize_short_side,
    train_clip,
)
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

SMALL = AugmentConfig(size=32, short_side=40)
PLAIN = AugmentConfig(size=32, short_side=32, scales=(1.0,), flip=0, jitter=0, grey=0)


def normalize(video):
    """With CLIP's statistics, the default."""
    return augment.normalize(video, AugmentConfig())


def denormalize(video):
    """The inverse of `normalize`."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return video * std + mean


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_clip(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def test_statistics_are_those_of_clip() -> None:
    assert CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert CLIP_STD == (0.26862954, 0.26130258, 0.27577711)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    clip = torch.rand(2, 3, 4, 5, generator=generator())
    torch.testing.assert_close(normalize(clip), (clip - mean) / std)
    torch.testing.assert_close(denormalize(normalize(clip)), clip)


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (31, 33), (500, 300), (1, 7)])
def test_a_training_clip_has_the_asked_size_and_a_sensible_range(size: tuple[int, int]) -> None:
    for seed in range(10):
        clip = train_clip(random_clip(4, 3, *size), SMALL, generator(seed))
        assert clip.shape == (4, 3, 32, 32)
        assert clip.dtype == torch.float32
        assert (clip - normalize(denormalize(clip))).abs().max() < 1e-5  # pixels in [0, 1]


def test_the_draw_is_the_same_for_all_frames_of_a_clip() -> None:
    still = random_clip(1, 3, 50, 70).expand(6, 3, 50, 70)
    for seed in range(30):
        clip = train_clip(still, SMALL, generator(seed))
        assert (clip - clip[:1]).abs().max() < 1e-5


def test_a_clip_is_a_function_of_the_seed_alone() -> None:
    video = random_clip(4, 3, 50, 70)
    first = train_clip(video, SMALL, generator(3))
    torch.manual_seed(99)
    assert torch.equal(first, train_clip(video, SMALL, generator(3)))
    assert not torch.equal(first, train_clip(video, SMALL, generator(4)))


def test_the_global_random_state_is_neither_used_nor_moved() -> None:
    before = torch.random.get_rng_state()
    train_clip(random_clip(2, 3, 50, 70), SMALL, generator())
    mixup_cutmix(torch.rand(4, 2, 3, 8, 8, generator=generator()), torch.arange(4), 4, SMALL, generator())
    assert torch.equal(before, torch.random.get_rng_state())


def test_with_everything_off_a_square_clip_is_only_normalised() -> None:
    video = random_clip(3, 3, 32, 32)
    torch.testing.assert_close(train_clip(video, PLAIN, generator()), normalize(video / 255))


@pytest.mark.parametrize(("flip", "low", "high"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_flip_is_as_likely_as_said_and_can_be_switched_off(flip: float, low: int, high: int) -> None:
    config = AugmentConfig(size=32, short_side=32, scales=(1.0,), flip=flip, jitter=0, grey=0)
    video = random_clip(1, 3, 32, 32)
    straight, flipped = normalize(video / 255), normalize(video.flip(-1) / 255)
    count = 0
    for seed in range(200):
        clip = train_clip(video, config, generator(seed))
        is_flipped = torch.allclose(clip, flipped, atol=1e-5)
        assert is_flipped or torch.allclose(clip, straight, atol=1e-5)
        count += is_flipped
    assert low <= count <= high


def test_grey_makes_the_channels_equal_and_jitter_changes_the_colours() -> None:
    video = random_clip(2, 3, 32, 32)
    grey = denormalize(train_clip(video, AugmentConfig(32, 32, (1.0,), flip=0, jitter=0, grey=1), generator()))
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    jittered = denormalize(train_clip(video, AugmentConfig(32, 32, (1.0,), flip=0, jitter=1, grey=0), generator()))
    assert (jittered - video / 255).abs().mean() > 0.01
    assert (jittered[:, 0] - jittered[:, 2]).abs().mean() > 0.01


@given(st.integers(8, 300), st.integers(8, 300), st.integers(0, 2**31))
def test_multi_scale_boxes_lie_inside_and_use_neighbouring_scales(height: int, width: int, seed: int) -> None:
    scales = (1.0, 0.875, 0.75, 0.66)
    top, left, box_height, box_width = _multi_scale_box(height, width, scales, generator(seed))
    assert 0 <= top <= top + box_height <= height
    assert 0 <= left <= left + box_width <= width
    sizes = [int(min(height, width) * scale) for scale in scales]
    assert any((box_height, box_width) == (sizes[i], sizes[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1)


def test_all_scales_and_places_are_drawn() -> None:
    boxes = {_multi_scale_box(100, 150, (1.0, 0.75), generator(seed)) for seed in range(300)}
    assert {box[2:] for box in boxes} == {(100, 100), (100, 75), (75, 100), (75, 75)}
    assert {box[:2] for box in boxes if box[2:] == (75, 75)} == {(0, 0), (0, 75), (25, 0), (25, 75), (12, 37)}


def test_three_crops_are_the_ends_and_the_centre_of_the_longer_side() -> None:
    """Of frames whose shorter side is the crop's: they show the whole frame."""
    config = AugmentConfig(size=32, short_side=40)
    video = random_clip(2, 3, 32, 64)
    wide = crop_views(video, config, 3)
    assert wide.shape == (3, 2, 3, 32, 32)
    for crop, left in zip(wide, (0, 16, 32), strict=True):
        torch.testing.assert_close(crop, normalize(video[..., left : left + 32] / 255))
    torch.testing.assert_close(crop_views(video.mT, config, 3), wide.mT)


def test_one_crop_is_the_centre_of_frames_of_the_short_side() -> None:
    config = AugmentConfig(size=32, short_side=40)
    video = random_clip(2, 3, 40, 64)
    torch.testing.assert_close(crop_views(video, config, 1)[0], normalize(video[..., 4:36, 16:48] / 255))


@pytest.mark.parametrize(("num_crops", "size"), [(1, [40, 64]), (3, [32, 51])])
def test_test_crops_resize_the_short_side(num_crops: int, size: list[int]) -> None:
    config = AugmentConfig(size=32, short_side=40)
    video = random_clip(2, 3, 80, 128)
    expected = F.resize(video, size, antialias=True)
    torch.testing.assert_close(crop_views(video, config, num_crops), crop_views(expected, config, num_crops))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(80, 128, (40, 64)), (128, 80, (64, 40)), (41, 40, (41, 40)), (20, 21, (40, 42))]
)
def test_resizing_keeps_the_shape_of_the_content(height: int, width: int, size: tuple[int, int]) -> None:
    assert resize_short_side(random_clip(1, 3, height, width), 40).shape[-2:] == size


def test_a_number_of_crops_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_crops must be 1 \(centre\) or 3 .* got 5"):
        crop_views(random_clip(1, 3, 40, 64), SMALL, 5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", 0),
        ("short_side", 223),
        ("scales", ()),
        ("scales", (1.5,)),
        ("flip", -0.1),
        ("grey", 2.0),
        ("mixup", -1.0),
        ("label_smoothing", 1.0),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option}.* got "):
        AugmentConfig(**{option: value})  # type: ignore[arg-type]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of one constant value each, so that a mixed pixel shows its sources."""
    label = torch.tensor([0, 1, 2, 3])
    return (2.0**label).reshape(4, 1, 1, 1, 1).expand(4, 2, 3, 20, 24).clone(), label


MIXING = [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]


@given(st.integers(0, 2**31), st.sampled_from(MIXING), st.sampled_from([0.0, 0.1]))
def test_targets_weigh_the_classes_by_their_share_of_the_pixels(
    seed: int, mixing: tuple[float, float], smoothing: float
) -> None:
    video, label = batch()
    config = AugmentConfig(mixup=mixing[0], cutmix=mixing[1], label_smoothing=smoothing)
    mixed, target = mixup_cutmix(video, label, 4, config, generator(seed))
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    share = (target - smoothing / 4) / (1 - smoothing)
    torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), share @ (2.0**label), rtol=1e-4, atol=1e-4)
    assert torch.equal(mixed, mixed[:, :1].expand_as(mixed))  # all frames alike


@given(st.integers(0, 2**31))
def test_cutmix_pastes_one_box(seed: int) -> None:
    video, label = batch()
    mixed, _ = mixup_cutmix(video, label, 4, AugmentConfig(mixup=0), generator(seed))
    for clip, own in zip(mixed, video, strict=True):
        rows, columns = (clip != own)[0, 0].nonzero(as_tuple=True)
        if len(rows):
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert len(clip.unique()) <= 2


def test_both_kinds_of_mixing_are_drawn_as_often_as_said() -> None:
    video, label = batch()
    kinds = []
    for seed in range(200):
        mixed, _ = mixup_cutmix(video, label, 4, AugmentConfig(switch=0.25), generator(seed))
        kinds.append(bool(torch.isin(mixed, 2.0**label).all()))  # pasted pixels are whole
    assert 25 <= sum(kinds) <= 75


def test_off_means_off_and_inputs_are_never_changed() -> None:
    video, label = batch()
    off = AugmentConfig(mixup=0, cutmix=0, label_smoothing=0)
    mixed, target = mixup_cutmix(video, label, 6, off, generator())
    assert torch.equal(mixed, video)
    assert torch.equal(target, torch.nn.functional.one_hot(label, 6).float())
    _, smoothed = mixup_cutmix(video, label, 5, AugmentConfig(mixup=0, cutmix=0), generator())
    torch.testing.assert_close(smoothed[1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
    copy = video.clone()
    for seed in range(10):
        mixup_cutmix(video, label, 4, AugmentConfig(), generator(seed))
    assert torch.equal(video, copy)


def test_mixing_is_a_function_of_the_generator() -> None:
    video, label = batch()
    first = mixup_cutmix(video, label, 4, AugmentConfig(), generator(1))
    again = mixup_cutmix(video, label, 4, AugmentConfig(), generator(1))
    other = mixup_cutmix(video, label, 4, AugmentConfig(), generator(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_short_side_goes_with_the_size_unless_it_is_given() -> None:
    """The authors' int(256 / 224 * size): 256 at 224, 384 at 336."""
    assert [AugmentConfig(size=size).short_side for size in (224, 336, 112, 7)] == [256, 384, 128, 8]
    assert AugmentConfig(size=336, short_side=340).short_side == 340
    assert train_clip(random_clip(2, 3, 40, 60), AugmentConfig(size=336), generator(0)).shape[-2:] == (336, 336)

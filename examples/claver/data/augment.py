"""What happens to the pixels of a clip: training augmentation, test crops, and mixing the clips of a batch.

All randomness comes from a `torch.Generator` on the CPU, so a clip is reproducible from its seed. Every transform is
drawn once for a clip and is the same for all of its frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "AugmentConfig",
    "crop_views",
    "mixup_cutmix",
    "normalize",
    "resize_short_side",
    "train_clip",
]

# Of the RGB values in [0, 1] of CLIP's own training images (arXiv 2103.00020); not ImageNet's.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Strength of the colour jitter: brightness, contrast and saturation in [1 - x, 1 + x], hue in [-x, x] turns.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1


@dataclass(frozen=True)
class AugmentConfig:
    """Pixels of a clip, and random changes of them in training; the defaults are CLAVER's.

    Attributes:
        size: of a clip in pixels.
        short_side: to which frames are resized before they are cropped; 0 for 256 / 224 of the size (384 at 336).
        scales: of the training crops, of which one is drawn for each side.
        flip: probability of mirroring; 0 where left and right matter.
        jitter: probability of other colours.
        grey: probability of none.
        mixup: alpha of the Beta distribution by which two clips are blended; 0 for off.
        cutmix: alpha of that by which a part of one is put into another; 0 for off.
        switch: probability of cutmix where both are on.
        label_smoothing: share of the target that all classes have.
        mean: of RGB in [0, 1]; CLIP's. The authors' own checkpoints were trained with ImageNet's.
        std: of RGB in [0, 1].

    Raises:
        ValueError: a value out of its range, or a crop that is larger than the resized frame.
    """

    size: int = 224
    short_side: int = 0
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: float = 0.5
    jitter: float = 0.8
    grey: float = 0.2
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    label_smoothing: float = 0.1
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        if self.short_side == 0:
            object.__setattr__(self, "short_side", round(self.size * 256 / 224))
        if not 1 <= self.size <= self.short_side:
            raise ValueError(
                f"size must be from 1 to short_side = {self.short_side}, got {self.size}; a short_side of 0 goes with the size"
            )
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales must be in (0, 1] and at least one, got {self.scales}")
        for name in ("flip", "jitter", "grey", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability from 0 to 1, got {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (off) or positive, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


def train_clip(video: torch.Tensor, config: AugmentConfig, generator: torch.Generator) -> torch.Tensor:
    """Augment one clip: uint8 RGB `(T, 3, H, W)` to normalised float32 `(T, 3, size, size)`."""
    video = resize_short_side(video, config.short_side)
    top, left, height, width = _multi_scale_box(video.shape[-2], video.shape[-1], config.scales, generator)
    video = video[..., top : top + height, left : left + width]
    video = F.resize(video, [config.size, config.size], antialias=True)
    if _chance(config.flip, generator):
        video = F.horizontal_flip(video)
    video = F.to_dtype(video, torch.float32, scale=True)
    if _chance(config.jitter, generator):
        video = _colour_jitter(video, generator)
    if _chance(config.grey, generator):
        video = F.rgb_to_grayscale(video, num_output_channels=3)
    return normalize(video, config)


def crop_views(video: torch.Tensor, config: AugmentConfig, num_crops: int) -> torch.Tensor:
    """Crop frames for testing: uint8 RGB `(T, 3, H, W)` to normalised float32 `(num_crops, T, 3, size, size)`.

    One crop is the centre of frames of `short_side`; three are the two ends and the centre of the longer side of frames whose
    shorter side is `size`, in order: together they show the whole frame.
    Raises ValueError for any other number.
    """
    if num_crops not in (1, 3):
        raise ValueError(f"num_crops must be 1 (centre) or 3 (along the longer side), got {num_crops}")
    video = resize_short_side(video, config.short_side if num_crops == 1 else config.size)
    free_height, free_width = video.shape[-2] - config.size, video.shape[-1] - config.size
    corners = [(free_height // 2, free_width // 2)]
    if num_crops == 3 and free_width >= free_height:
        corners = [(free_height // 2, left) for left in (0, free_width // 2, free_width)]
    elif num_crops == 3:
        corners = [(top, free_width // 2) for top in (0, free_height // 2, free_height)]
    crops = [video[..., top : top + config.size, left : left + config.size] for top, left in corners]
    return normalize(F.to_dtype(torch.stack(crops), torch.float32, scale=True), config)


def resize_short_side(video: torch.Tensor, short_side: int) -> torch.Tensor:
    """Resize `(..., 3, H, W)` so that its shorter side has `short_side` pixels, keeping the shape of its content."""
    height, width = video.shape[-2:]
    scale = short_side / min(height, width)
    size = [max(short_side, round(height * scale)), max(short_side, round(width * scale))]
    return video if size == [height, width] else F.resize(video, size, antialias=True)


def normalize(video: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    """From RGB in [0, 1] `(..., 3, H, W)` to zero mean and unit variance under the configuration's statistics."""
    return F.normalize(video, list(config.mean), list(config.std))


def mixup_cutmix(
    video: torch.Tensor, label: torch.Tensor, num_classes: int, config: AugmentConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each clip of a batch with another: blended (mixup, arXiv 1710.09412) or pasted (cutmix, arXiv 1905.04899).

    `video (B, T, C, H, W)` and `label (B,)`, int64, become mixed videos of the same shape and soft targets
    `(B, num_classes)`, float32, whose rows add up to 1. The weight, the partners and the box are drawn once for the
    batch; the box is the same in all frames. Neither input is changed. With both off, only labels are smoothed.
    """
    smooth = config.label_smoothing / num_classes
    target = torch.full((len(label), num_classes), smooth, device=label.device)
    target.scatter_(1, label[:, None], 1 - config.label_smoothing + smooth)
    if not (config.mixup or config.cutmix):
        return video, target

    use_cutmix = config.cutmix > 0 and (config.mixup == 0 or _chance(config.switch, generator))
    weight = _beta(config.cutmix if use_cutmix else config.mixup, generator)
    partner = torch.randperm(len(label), generator=generator).to(label.device)
    if use_cutmix:
        height, width = video.shape[-2:]
        top, bottom, left, right = _cutmix_box(height, width, weight, generator)
        weight = 1 - (bottom - top) * (right - left) / (height * width)
        mixed = video.clone()
        mixed[..., top:bottom, left:right] = video[partner][..., top:bottom, left:right]
    else:
        mixed = torch.lerp(video[partner], video, weight)
    return mixed, torch.lerp(target[partner], target, weight)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _chance(probability: float, generator: torch.Generator) -> bool:
    return _uniform(0, 1, generator) < probability


def _integer(high: int, generator: torch.Generator) -> int:
    """Uniform in `0 .. high - 1`."""
    return int(torch.randint(high, (), generator=generator))


def _beta(alpha: float, generator: torch.Generator) -> float:
    # torch's Beta takes no generator.
    return float(np.random.default_rng(_integer(2**62, generator)).beta(alpha, alpha))


def _multi_scale_box(
    height: int, width: int, scales: tuple[float, ...], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """TSN's multi-scale crop: two neighbouring scales of the shorter side, at a corner or the centre.

    Returns top, left, height and width.
    """
    short = min(height, width)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    scale_height, scale_width = pairs[_integer(len(pairs), generator)]
    crop_height, crop_width = max(1, int(short * scale_height)), max(1, int(short * scale_width))
    free_height, free_width = height - crop_height, width - crop_width
    places = [(0, 0), (0, free_width), (free_height, 0), (free_height, free_width), (free_height // 2, free_width // 2)]
    top, left = places[_integer(len(places), generator)]
    return top, left, crop_height, crop_width


def _colour_jitter(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and hue in random order; `video (T, 3, H, W)` in [0, 1]."""
    brightness = _uniform(1 - _BRIGHTNESS, 1 + _BRIGHTNESS, generator)
    contrast = _uniform(1 - _CONTRAST, 1 + _CONTRAST, generator)
    saturation = _uniform(1 - _SATURATION, 1 + _SATURATION, generator)
    hue = _uniform(-_HUE, _HUE, generator)
    for step in torch.randperm(4, generator=generator).tolist():
        if step == 0:
            video = F.adjust_brightness(video, brightness)
        elif step == 1:  # about the mean of the clip, not of each frame, which would flicker
            mean = F.rgb_to_grayscale(video).mean()
            video = torch.lerp(mean, video, contrast).clamp(0, 1)
        elif step == 2:
            video = F.adjust_saturation(video, saturation)
        else:
            video = F.adjust_hue(video, hue)
    return video


def _cutmix_box(height: int, width: int, weight: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box of `1 - weight` of the area about a random centre, clipped to the frame."""
    ratio = (1 - weight) ** 0.5
    box_height, box_width = int(height * ratio), int(width * ratio)
    centre_y, centre_x = _integer(height, generator), _integer(width, generator)
    top, bottom = max(0, centre_y - box_height // 2), min(height, centre_y + (box_height + 1) // 2)
    left, right = max(0, centre_x - box_width // 2), min(width, centre_x + (box_width + 1) // 2)
    return top, bottom, left, right

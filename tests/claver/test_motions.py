"""The motion data set: what moves where, that only the order of frames tells opposites apart, and what lies on disk."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from claver.data.motions import MOTIONS, draw_clip, opposite, write_motion_dataset, write_video

SEEDS = range(12)


def clip_of(name: str, seed: int, **options: float):
    return draw_clip(MOTIONS.index(name), np.random.default_rng(seed), **options)


def centers(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroid of the object in each frame, in pixels from the left and from the top."""
    weight = mask.sum(axis=(1, 2))
    columns, rows = np.arange(mask.shape[2]), np.arange(mask.shape[1])
    return (mask.sum(axis=1) @ columns) / weight, (mask.sum(axis=2) @ rows) / weight


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "axis", "sign"),
    [("moving left", 0, -1), ("moving right", 0, 1), ("moving up", 1, -1), ("moving down", 1, 1)],
)
def test_a_moving_object_crosses_the_screen_in_its_direction(name: str, axis: int, sign: int, seed: int) -> None:
    position = centers(clip_of(name, seed).mask)
    travel = position[axis][-1] - position[axis][0]
    sideways = position[1 - axis][-1] - position[1 - axis][0]
    assert sign * travel >= 0.3 * 64
    assert abs(sideways) < 0.4 * abs(travel)
    assert (sign * np.diff(position[axis]) > -0.25).all()  # never back, but for the rounding of the mask


@pytest.mark.parametrize("seed", SEEDS)
def test_clockwise_passes_the_top_of_its_orbit_to_the_right(seed: int) -> None:
    x, y = centers(clip_of("turning clockwise", seed).mask)
    # Least-squares circle: x^2 + y^2 = 2 a x + 2 b y + c.
    a, b, _ = np.linalg.lstsq(np.stack([2 * x, 2 * y, np.ones_like(x)], axis=1), x**2 + y**2, rcond=None)[0]
    dx, dy = np.diff(x), np.diff(y)
    above, below = y[:-1] < b - 4, y[:-1] > b + 4
    assert (dx[above] > 0).all()
    assert (dx[below] < 0).all()
    left, right = x[:-1] < a - 4, x[:-1] > a + 4
    assert (dy[left] < 0).all()
    assert (dy[right] > 0).all()
    swept = np.degrees(np.ptp(np.unwrap(np.arctan2(y - b, x - a))))
    assert 150 <= swept <= 300


@pytest.mark.parametrize("seed", SEEDS)
def test_a_growing_object_gains_area_in_every_frame(seed: int) -> None:
    area = clip_of("growing", seed).mask.sum(axis=(1, 2))
    assert (np.diff(area) > 0).all()
    assert area[-1] / area[0] >= 1.8**2


@pytest.mark.parametrize("label", range(len(MOTIONS)))
@pytest.mark.parametrize("seed", SEEDS)
def test_opposites_are_exact_time_reversals_before_noise(label: int, seed: int) -> None:
    clip = draw_clip(label, np.random.default_rng(seed), noise_std=0)
    reverse = draw_clip(opposite(label), np.random.default_rng(seed), noise_std=0)
    assert np.array_equal(clip.video, reverse.video[::-1])
    assert np.array_equal(clip.mask, reverse.mask[::-1])
    assert not np.array_equal(clip.video, reverse.video)


def test_noise_is_drawn_anew_for_every_frame_and_has_no_direction_in_time() -> None:
    clean = clip_of("growing", 3, noise_std=0).video.astype(float)
    noisy = clip_of("growing", 3).video.astype(float)
    inside = (clean > 20) & (clean < 235)  # not clipped
    noise = np.where(inside, noisy - clean, 0.0)
    spread = noise.std(axis=(1, 2, 3))
    assert spread.max() < 1.1 * spread.min()
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(neighbours) < 0.02


def test_statistics_of_unordered_frames_agree_between_opposites() -> None:
    """Independent clips of both members of a pair: sets of object positions and sizes have the same mean and spread."""
    count = 150
    for first in (0, 2, 4, 6):
        means, deviations = [], []
        for label in (first, first + 1):
            features = []
            for index in range(count):
                clip = draw_clip(label, np.random.default_rng([label, index]), num_frames=6, size=32, noise_std=0)
                x, y = centers(clip.mask)
                features.append([x.mean(), y.mean(), x.std(), y.std(), clip.mask.mean(), clip.video.mean()])
            means.append(np.mean(features, axis=0))
            deviations.append(np.std(features, axis=0))
        error = np.sqrt((deviations[0] ** 2 + deviations[1] ** 2) / count)
        assert (np.abs(means[0] - means[1]) < 4 * error).all(), MOTIONS[first]


@pytest.mark.parametrize("label", range(len(MOTIONS)))
def test_the_object_stays_in_view_and_stands_out(label: int) -> None:
    for seed in SEEDS:
        clip = draw_clip(label, np.random.default_rng(seed), noise_std=0)
        assert clip.video.shape == (24, 64, 64, 3)
        assert clip.video.dtype == np.uint8
        assert clip.mask.shape == (24, 64, 64)
        covered = clip.mask.sum(axis=(1, 2))
        assert covered.min() >= 20
        border = np.concatenate([clip.mask[:, 0], clip.mask[:, -1], clip.mask[:, :, 0], clip.mask[:, :, -1]], axis=1)
        assert border.sum(axis=1).max() <= 6  # touches an edge at most
        inside, outside = clip.video[clip.mask > 0.99].mean(), clip.video[clip.mask < 0.01].mean()
        assert inside > outside + 40


def test_a_data_set_on_disk_has_the_lists_and_files_it_names(tmp_path: Path) -> None:
    dataset = write_motion_dataset(tmp_path, num_train=17, num_test=8, size=32, num_frames=9, progress=False)
    assert dataset.labels.read_text().splitlines() == ["id,name", *(f"{i},{name}" for i, name in enumerate(MOTIONS))]
    for list_path, split, count in ((dataset.train_list, "train", 17), (dataset.test_list, "test", 8)):
        entries = [line.rsplit(" ", 1) for line in list_path.read_text().splitlines()]
        assert [path for path, _ in entries] == [f"videos/{split}_{index:05d}.mp4" for index in range(count)]
        sizes = np.bincount([int(label) for _, label in entries], minlength=8)
        assert sizes.max() - sizes.min() <= 1
        for path, _ in entries:
            assert decode(tmp_path / path).shape == (9, 32, 32, 3)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    options = {"num_train": 3, "num_test": 1, "size": 32, "num_frames": 6, "progress": False}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_motion_dataset(tmp_path / name, seed=seed, **options)
    contents = [[p.read_bytes() for p in sorted((tmp_path / name / "videos").iterdir())] for name in "abc"]
    assert contents[0] == contents[1]
    assert all(a != c for a, c in zip(contents[0], contents[2], strict=True))


def test_a_complete_data_set_is_reused_and_anything_else_is_written_again(tmp_path: Path) -> None:
    options = {"num_train": 3, "num_test": 1, "size": 32, "num_frames": 6, "progress": False}
    write_motion_dataset(tmp_path, **options)
    first = tmp_path / "videos" / "train_00000.mp4"
    written = first.stat().st_mtime_ns, first.read_bytes()
    write_motion_dataset(tmp_path, **options)
    assert first.stat().st_mtime_ns == written[0]

    first.unlink()  # as after an interruption
    write_motion_dataset(tmp_path, **options)
    assert first.read_bytes() == written[1]

    write_motion_dataset(tmp_path, **{**options, "num_frames": 7})
    assert len(decode(first)) == 7


def test_compression_keeps_the_picture(tmp_path: Path) -> None:
    clip = clip_of("moving left", 0)
    write_video(tmp_path / "clip.mp4", clip.video, frame_rate=15)
    decoded = decode(tmp_path / "clip.mp4")
    assert decoded.shape == clip.video.shape
    luma = np.array([0.299, 0.587, 0.114])
    error = (decoded.astype(float) - clip.video) @ luma
    assert abs(error.mean()) < 2
    assert np.sqrt((error**2).mean()) < 6
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 15)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"label must be 0 to 7 .* got 8"):
        draw_clip(8, rng)
    with pytest.raises(ValueError, match="num_frames=1"):
        draw_clip(0, rng, num_frames=1)
    with pytest.raises(ValueError, match="size=33"):
        write_motion_dataset(tmp_path, num_train=1, num_test=1, size=33)
    with pytest.raises(ValueError, match="num_train=0"):
        write_motion_dataset(tmp_path, num_train=0, num_test=1)
    with pytest.raises(ValueError, match=r"uint8 \(2, 8, 8\)"):
        write_video(tmp_path / "x.mp4", np.zeros((2, 8, 8), np.uint8), 12)
    assert not list(tmp_path.iterdir())

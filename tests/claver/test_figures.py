"""Pictures: files that decode to non-blank images; inputs that do not fit are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from claver.figures import plot_confusion, plot_curves, plot_film_strips, plot_probabilities, plot_results

NAMES = ["moving left", "moving right", "growing"]
CLIPS = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 24, 3), dtype=np.uint8)
GUESSES = [[("moving left", 0.7), ("growing", 0.2), ("moving right", 0.1)], [("growing", 1.0)]]


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    image = imread(path)
    assert image.shape[0] > 100
    assert image.shape[1] > 300
    assert image[..., :3].std() > 0.02, "blank picture"
    return image


def test_film_strips_are_drawn_with_a_row_for_each_clip(tmp_path: Path) -> None:
    plot_film_strips(CLIPS, NAMES[:2], GUESSES, tmp_path / "new" / "two.png")
    plot_film_strips(CLIPS[:1], NAMES[:1], GUESSES[:1], tmp_path / "one.png")
    assert pixels(tmp_path / "new" / "two.png").shape[0] > pixels(tmp_path / "one.png").shape[0] + 150


@pytest.mark.parametrize(
    ("clips", "names", "guesses", "message"),
    [
        (CLIPS[0], NAMES[:2], GUESSES, r"got uint8 \(4, 16, 24, 3\)"),
        (CLIPS.astype(np.float32), NAMES[:2], GUESSES, "got float32"),
        (CLIPS[:0], [], [], r"got uint8 \(0, "),
        (CLIPS, NAMES, GUESSES, "2 clips, but 3 true_names"),
        (CLIPS, NAMES[:2], GUESSES[:1], "1 predictions"),
        (CLIPS, NAMES[:2], [GUESSES[0], []], r"predicted\[1\]"),
        (CLIPS, NAMES[:2], [GUESSES[0], [("growing", 70.0)]], r"predicted\[1\] .*70.0"),
    ],
)
def test_film_strips_that_do_not_fit_are_refused(clips, names, guesses, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plot_film_strips(clips, names, guesses, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_confusion_matrices_are_drawn_alone_side_by_side_and_for_many_classes(tmp_path: Path) -> None:
    counts = np.array([[8, 1, 1], [0, 10, 0], [0, 0, 0]])  # the last class has no clips
    plot_confusion(counts, NAMES, tmp_path / "one.png")
    plot_confusion({"KMCT": counts, "frames averaged": counts.T}, NAMES, tmp_path / "two.png", "Where the mistakes are")
    assert pixels(tmp_path / "two.png").shape[1] > pixels(tmp_path / "one.png").shape[1]
    plot_confusion(np.eye(51), [f"class {i}" for i in range(51)], tmp_path / "many.png")
    pixels(tmp_path / "many.png")


@pytest.mark.parametrize("matrix", [np.ones((2, 3)), np.ones(3), -np.eye(3), np.full((3, 3), np.nan), {}])
def test_confusion_matrices_that_do_not_fit_are_refused(matrix, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"confusion matrix|nothing to draw"):
        plot_confusion(matrix, NAMES, tmp_path / "x.png")


def test_curves_are_drawn_from_records_that_may_lack_a_quantity(tmp_path: Path) -> None:
    losses = [{"step": step, "loss": 2.0 / (step + 1), "top1": None} for step in range(100)]
    scores = [{"step": 50, "top1": 0.5}, {"step": 100, "loss": 0.1, "top1": 0.9}]
    plot_curves({"KMCT": [*losses, *scores], "KMT": scores, "late": []}, tmp_path / "a.png", "Learning")
    plot_curves({"KMCT": losses}, tmp_path / "b.png")
    pixels(tmp_path / "a.png")
    pixels(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({}, "1 to 6 models"),
        ({"KMCT": []}, "1 to 6 models"),
        ({"KMCT": [{"loss": 1.0}]}, "'KMCT' has no step"),
        ({"KMCT": [{"step": 3, "top1": 90}]}, "step 3 must be 0 to 1, got 90"),
    ],
)
def test_curves_that_do_not_fit_are_refused(history, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plot_curves(history, tmp_path / "x.png")


def test_results_are_drawn_with_and_without_chance(tmp_path: Path) -> None:
    plot_results({"CLAVER (KMCT)": 0.91, "frames averaged": 0.45}, tmp_path / "a.png", chance=1 / 8)
    plot_results({"CLAVER (KMCT)": 1.0}, tmp_path / "b.png")
    assert pixels(tmp_path / "a.png").shape[0] > pixels(tmp_path / "b.png").shape[0]


def test_results_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'KMCT': 91"):
        plot_results({"KMCT": 91.0}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one model"):
        plot_results({}, tmp_path / "x.png")


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    before, figures = dict(matplotlib.rcParams), plt.get_fignums()
    plot_results({"KMCT": 0.5}, tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == figures


def test_probabilities_over_time_are_drawn_for_the_likeliest_classes(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(9)]
    rows = np.random.default_rng(0).dirichlet(np.ones(9), 50)
    plot_probabilities(range(50), rows, names, tmp_path / "many.png", starts=[20], title="A stream")
    plot_probabilities([3], rows[:1, :2], names[:2], tmp_path / "one.png")
    assert pixels(tmp_path / "many.png").shape == pixels(tmp_path / "one.png").shape


def test_probabilities_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for times, shape in (([], (0, 2)), ([0, 1], (1, 2)), ([0], (1, 3))):
        with pytest.raises(ValueError, match="expected probabilities of"):
            plot_probabilities(times, np.zeros(shape), ["a", "b"], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())

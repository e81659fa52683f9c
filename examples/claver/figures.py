"""Pictures of what a video model predicts and how it learned: film strips, confusion matrices, curves, accuracies.

Drawn with matplotlib's Agg canvas: no window, no display, no change of the caller's matplotlib settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "plot_confusion",
    "plot_curves",
    "plot_film_strips",
    "plot_probabilities",
    "plot_results",
    "plot_tradeoff",
    "save_figure",
]

DPI = 150
INK, MUTED, FAINT = "#222222", "#6b6b6b", "#dddddd"
RIGHT, WRONG, OTHER = "#009e73", "#d55e00", "#b8bcc2"  # Okabe and Ito: told apart by colour-blind readers
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")

Prediction = Sequence[tuple[str, float]]
FilePath = str | Path


def plot_film_strips(
    clips: npt.NDArray[np.uint8],
    true_names: Sequence[str],
    predicted: Sequence[Prediction],
    path: FilePath,
    title: str = "What the model sees and says",
) -> None:
    """Draws one row for each clip: its frames in order, its class, and bars for its most likely classes.

    Args:
        clips: uint8 `(K, T, H, W, 3)`, RGB.
        true_names: K class names.
        predicted: for each clip `(class name, probability 0 to 1)`, the likeliest first, 1 to 5 of them.
        path: file to write; its ending chooses the format.
        title: a line above the rows.

    Raises:
        ValueError: shapes or lengths do not agree, or a probability is out of range.
    """
    if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != np.uint8 or 0 in clips.shape:
        raise ValueError(
            f"clips must be uint8 (clips, frames, height, width, 3), none of them 0, got {clips.dtype} {clips.shape}"
        )
    count, frames, height, width, _ = clips.shape
    if len(true_names) != count or len(predicted) != count:
        raise ValueError(f"{count} clips, but {len(true_names)} true_names and {len(predicted)} predictions")
    for index, guesses in enumerate(predicted):
        if not 1 <= len(guesses) <= 5 or not all(0 <= probability <= 1 for _, probability in guesses):
            raise ValueError(f"predicted[{index}] must be 1 to 5 pairs (name, probability 0 to 1), got {list(guesses)}")

    row, strip_width, bars_width, head = 1.0, frames * width / height, 2.9, 0.35
    figure = _figure(strip_width + bars_width + 0.35, count * (row + 0.42) + head)
    total_height = figure.get_size_inches()[1]
    _title(figure, title)
    for index in range(count):
        bottom = total_height - head - (index + 1) * (row + 0.42) + 0.1
        guesses = predicted[index]
        is_right = guesses[0][0] == true_names[index]

        strip: Any = figure.add_axes(_box(figure, 0.15, bottom, strip_width, row))
        gap = max(1, width // 32)
        film = np.full((height, frames * (width + gap) - gap, 3), 255, np.uint8)
        for time in range(frames):
            film[:, time * (width + gap) : time * (width + gap) + width] = clips[index, time]
        strip.imshow(film, aspect="auto", interpolation="nearest")
        strip.set_axis_off()
        strip.set_title(true_names[index], loc="left", fontsize=10, fontweight="bold", color=INK, pad=4)
        mark, color = ("\u2713 correct", RIGHT) if is_right else ("\u2717 wrong", WRONG)
        strip.set_title(mark, loc="right", fontsize=9, fontweight="bold", color=color, pad=4)

        bars: Any = figure.add_axes(_box(figure, 0.15 + strip_width + 0.15, bottom, bars_width - 0.15, row))
        step = 1.0 / len(guesses)
        for place, (name, probability) in enumerate(guesses):
            top = 1 - place * step
            thickness = min(0.13, 0.4 * step)
            bars.barh(top - 0.72 * step, 1.0, thickness, color="#f1f1f1")
            shade = RIGHT if name == true_names[index] else WRONG if place == 0 else OTHER
            bars.barh(top - 0.72 * step, probability, thickness, color=shade)
            weight = "bold" if place == 0 else "normal"
            bars.text(0, top - 0.5 * step, name, va="bottom", fontsize=8, color=INK, fontweight=weight)
            bars.text(1, top - 0.5 * step, f"{probability:.0%}", va="bottom", ha="right", fontsize=8, color=MUTED)
        bars.set(xlim=(0, 1), ylim=(0, 1))
        bars.set_axis_off()
    save_figure(figure, path)


def plot_confusion(
    matrix: npt.NDArray[Any] | Mapping[str, npt.NDArray[Any]], names: Sequence[str], path: FilePath, title: str = ""
) -> None:
    """Draws a confusion matrix, or several side by side, each row as shares of its true class.

    Args:
        matrix: counts `(C, C)`, true classes in rows and predicted ones in columns; or `{model name: counts}`.
        names: C class names.
        path: file to write.
        title: a line above.

    Raises:
        ValueError: a matrix that is not `(C, C)`, holds negative or non-finite counts, or no matrix.
    """
    given = matrix if isinstance(matrix, Mapping) else {"": matrix}
    matrices = {model: np.asarray(counts) for model, counts in given.items()}
    if not matrices or not names:
        raise ValueError("nothing to draw: give at least one matrix and one class name")
    classes = len(names)
    for model, counts in matrices.items():
        if counts.shape != (classes, classes) or not np.isfinite(counts).all() or (counts < 0).any():
            raise ValueError(
                f"confusion matrix {model!r} must be ({classes}, {classes}) counts for {classes} names, got shape "
                f"{counts.shape}"
            )

    named = classes <= 120  # the names of more would make the picture larger than a page
    cell = 0.42 if classes <= 12 else max(4.5 / classes, 0.16) if named else 10 / classes
    label_room = 0.062 * max(map(len, names)) + 0.45 if named else 0.5
    side, gap, head = cell * classes, 0.35, 0.75 if title else 0.4
    figure = _figure(label_room + len(matrices) * (side + gap), head + side + label_room)
    _title(figure, title)
    for place, (model, counts) in enumerate(matrices.items()):
        totals = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
        left = label_room + place * (side + gap)
        axes: Any = figure.add_axes(_box(figure, left, label_room, side, side))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if classes <= 12:
            for true, guess in np.argwhere(shares >= 0.005):
                share = shares[true, guess]
                color = "white" if share > 0.55 else INK
                axes.text(guess, true, f"{share * 100:.0f}", ha="center", va="center", fontsize=8, color=color)
        if named:
            axes.set_xticks(range(classes), names, rotation=90, fontsize=8, color=INK)
            axes.set_yticks(range(classes), names if place == 0 else [""] * classes, fontsize=8, color=INK)
            axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
            axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted, % of the true class", fontsize=8, color=MUTED)
        if place == 0:
            axes.set_ylabel("true class", fontsize=8, color=MUTED)
        top1 = np.trace(counts) / max(counts.sum(), 1)
        axes.set_title(
            f"{model}   {top1:.1%} correct" if model else f"{top1:.1%} correct", loc="left", fontsize=9, color=INK
        )
    save_figure(figure, path)


def plot_curves(history: Mapping[str, Sequence[Mapping[str, Any]]], path: FilePath, title: str = "") -> None:
    """Draws training loss and test accuracy over steps, one colour for each model.

    Args:
        history: `{model name: records}`, 6 models at most. A record has `step` and one or both of `loss` (any positive
            number) and `top1` (0 to 1); records without a quantity, or with None, are left out of its curve.
        path: file to write.
        title: a line above.

    Raises:
        ValueError: no records, a record without `step`, `top1` out of range, or too many models.
    """
    if not history or not any(history.values()) or len(history) > len(PALETTE):
        raise ValueError(f"history must hold records of 1 to {len(PALETTE)} models, got {list(history)}")
    for model, records in history.items():
        for record in records:
            if "step" not in record:
                raise ValueError(f"a record of {model!r} has no step: {dict(record)}")
            if record.get("top1") is not None and not 0 <= record["top1"] <= 1:
                raise ValueError(f"top1 of {model!r} at step {record['step']} must be 0 to 1, got {record['top1']}")

    end_room = 0.085 * (max(map(len, history)) + 5) + 0.3
    figure = _figure(7.9 + end_room, 3.55 if title else 3.2)
    _title(figure, title)
    panels: list[Any] = [figure.add_axes(_box(figure, left, 0.55, 3.3, 2.3)) for left in (0.55, 4.6)]
    ends: list[tuple[float, str, str]] = []
    for (model, records), color in zip(history.items(), PALETTE, strict=False):
        for panel, quantity in zip(panels, ("loss", "top1"), strict=True):
            points = [(record["step"], record[quantity]) for record in records if record.get(quantity) is not None]
            if not points:
                continue
            steps, values = np.array(points, np.float64).T
            if quantity == "loss" and len(points) > 40:
                panel.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
                values = _smooth(values, len(points) // 20)
            dots = "o" if quantity == "top1" and len(points) <= 40 else None
            panel.plot(steps, values, color=color, linewidth=2, marker=dots, markersize=4, label=model)
            if quantity == "top1":
                ends.append((values[-1], f"{model}  {values[-1]:.0%}", color))
    for panel, heading in zip(panels, ("training loss", "test top-1 accuracy"), strict=True):
        _plain(panel)
        panel.set_title(heading, loc="left", fontsize=10, color=INK)
        panel.set_xlabel("step", fontsize=9, color=MUTED)
        panel.margins(x=0.02)
    panels[1].set_ylim(0, 1.02)
    panels[1].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    for height, (_, label, color) in zip(_spread([end[0] for end in ends], 0.085), ends, strict=True):
        panels[1].annotate(
            label, (1.02, height), xycoords=("axes fraction", "data"), fontsize=9, color=color, va="center"
        )
    if not ends:
        panels[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_results(
    top1: Mapping[str, float], path: FilePath, chance: float | None = None, title: str = "Test top-1 accuracy"
) -> None:
    """Draws one horizontal bar for each model, the first one in colour, and a line at chance.

    Args:
        top1: `{model name: accuracy 0 to 1}`, drawn from top to bottom.
        path: file to write.
        chance: accuracy of guessing, 0 to 1.
        title: a line above.

    Raises:
        ValueError: no models, or an accuracy out of range.
    """
    wrong = {name: value for name, value in top1.items() if not 0 <= value <= 1}
    if not top1 or wrong or (chance is not None and not 0 <= chance <= 1):
        raise ValueError(
            f"accuracies must be 0 to 1 for at least one model, got {wrong or dict(top1)}, chance {chance}"
        )
    count = len(top1)
    label_room = 0.078 * max(map(len, top1)) + 0.3
    width, height = label_room + 5.2, 0.42 * count + 0.85
    figure = _figure(width, height)
    _title(figure, title)
    axes: Any = figure.add_axes(_box(figure, label_room, 0.35, 4.6, 0.42 * count))
    for place, (name, value) in enumerate(top1.items()):
        strong = place == 0
        axes.barh(place, value, 0.62, color=PALETTE[0] if strong else OTHER, zorder=2)
        weight = "bold" if strong else "normal"
        axes.text(-0.015, place, name, ha="right", va="center", fontsize=9, color=INK, fontweight=weight)
        axes.text(value + 0.012, place, f"{value:.1%}", va="center", fontsize=9, color=INK, fontweight=weight, zorder=4)
    if chance is not None:
        axes.axvline(chance, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
        axes.text(chance, count - 0.38, f"chance {chance:.1%}", ha="center", va="top", fontsize=8, color=MUTED)
    axes.set(xlim=(0, 1.1), ylim=(count - 0.5, -0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.axvline(0, color=MUTED, linewidth=1)
    save_figure(figure, path)


def plot_tradeoff(records: Sequence[Mapping[str, float]], path: FilePath) -> None:
    """Draws accuracy on a tuned task against accuracy on others, a point for each share of the tuned weights.

    Args:
        records: `{alpha, task: accuracy, ...}`, accuracies 0 to 1; the first task is the tuned one.
        path: file to write.

    Raises:
        ValueError: no records, or fewer than two tasks.
    """
    names = [name for name in records[0] if name != "alpha"] if records else []
    if len(names) < 2:
        raise ValueError(f"a trade-off needs records of two tasks or more, got {names}")
    tuned, others = names[0], names[1:]
    figure = _figure(5.6, 4.2)
    axes: Any = figure.add_axes(_box(figure, 0.75, 0.6, 4.5, 3.2))
    for color, name in zip(PALETTE, others, strict=False):
        points = [(record[name], record[tuned]) for record in records]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=name)
        for record, point in zip(records, points, strict=True):
            axes.annotate(f"{record['alpha']:g}", point, (4, 4), textcoords="offset points", fontsize=7, color=MUTED)
    axes.set_xlabel("top-1 on what was not trained on", fontsize=9, color=MUTED)
    axes.set_ylabel(f"top-1, {tuned}", fontsize=9, color=MUTED)
    _title(figure, "Weights between the pretrained model (0) and the tuned one (1)")
    _plain(axes)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_probabilities(
    times: Sequence[int],
    probabilities: npt.NDArray[np.floating],
    classes: Sequence[str],
    path: FilePath,
    starts: Sequence[int] = (),
    title: str = "",
) -> None:
    """Draws what a model says of a stream: a curve over frames for each of the classes that were ever likeliest, 6 at most.

    Args:
        times: numbers of the frames, `(T,)`, increasing.
        probabilities: `(T, C)`, 0 to 1.
        classes: the C names.
        path: file to write.
        starts: numbers of frames at which something new begins, each marked by a line.
        title: a line above.

    Raises:
        ValueError: no frames, or sizes that do not fit each other.
    """
    if not len(times) or probabilities.shape != (len(times), len(classes)):
        raise ValueError(
            f"expected probabilities of {len(times)} frames (1 or more) and {len(classes)} classes, got {probabilities.shape}"
        )
    shown = np.argsort(-probabilities.max(0), kind="stable")[: len(PALETTE)]
    end_room = 0.085 * (max(len(classes[i]) for i in shown) + 5) + 0.3
    figure = _figure(6.9 + end_room, 3.3)
    _title(figure, title)
    axes: Any = figure.add_axes(_box(figure, 0.6, 0.55, 6.1, 2.3))
    _plain(axes)
    for start in starts:
        axes.axvline(start, color=OTHER, linewidth=0.8, zorder=0)
    dots = "o" if len(times) <= 40 else None
    for place, color in zip(shown, PALETTE, strict=False):
        axes.plot(times, probabilities[:, place], color=color, linewidth=2, marker=dots, markersize=4)
    ends = probabilities[-1, shown]
    for height, place, color, end in zip(_spread(ends, 0.085), shown, PALETTE, ends, strict=False):
        axes.annotate(f"{classes[place]}  {end:.0%}", (1.02, height), xycoords=("axes fraction", "data"), fontsize=9,
                      color=color, va="center")  # fmt: skip
    axes.set_xlabel("frames taken", fontsize=9, color=MUTED)
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    save_figure(figure, path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, title: str) -> None:
    height = figure.get_size_inches()[1]
    if title:
        figure.text(0.15 / figure.get_size_inches()[0], 1 - 0.14 / height, title, va="top", fontsize=12, color=INK)


def _box(figure: Figure, left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Inches -> fractions of the figure."""
    total_width, total_height = figure.get_size_inches()
    return left / total_width, bottom / total_height, width / total_width, height / total_height


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED)


def _smooth(values: npt.NDArray[np.float64], radius: int) -> npt.NDArray[np.float64]:
    """Centred moving average whose window shrinks at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), radius)
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _spread(heights: Sequence[float], distance: float) -> list[float]:
    """Moves labels up until no two are nearer than `distance`, in their order of height."""
    placed = list(heights)
    last = -np.inf
    for index in sorted(range(len(placed)), key=placed.__getitem__):
        placed[index] = max(placed[index], last + distance)
        last = placed[index]
    return placed


def save_figure(figure: Figure, path: FilePath) -> None:
    """Write a figure in the format that the ending of `path` names, PNG without one; its folder is made if it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as partial:
        figure.savefig(partial, dpi=DPI, format=path.suffix[1:] or "png")

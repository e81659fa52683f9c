"""Pictures of `attn_speed.py`: time relative to joint attention against frames and against tokens, and a roofline.

Drawn with matplotlib's Agg canvas: no window, no display, no change of the caller's matplotlib settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]

Row = Mapping[str, Any]

INK, MUTED, FAINT = "#222222", "#6b6b6b", "#dddddd"
# Okabe and Ito: told apart by colour-blind readers. The two reference backends, which are not for speed, are grey.
COLORS = {
    "joint": INK,
    "divided": "#009e73",
    "sdpa_mask": "#d55e00",
    "flex_64": "#8a6d00",
    "flex_128": "#e69f00",
    "mha": "#cc79a7",
    "kronmask triton": "#56b4e9",
    "kronmask sdpa": "#0072b2",
    "kronmask flex": "#a8adb4",
    "kronmask dense": "#7d838b",
    "kronmask flex-flash": "#c9b458",
    "flex-flash": "#f0e442",
    "sdpa-fa3": "#004b76",
    "sdpa-fa4": "#3a3f8f",
}
MARKERS = "D^vsPX*<>d"  # of the masks
PREFERRED = {"tokens": 197, "frames": 8}  # what is held while the other varies
AXES = {"frames": "frames T", "tokens": "tokens per frame N"}
OTHERS = ("joint", "divided")  # contenders that compute another function than the masks' panels are about


def draw(rows: Sequence[Row], peaks: Mapping[str, Mapping[str, float]], folder: Path, name: str) -> list[Path]:
    """Draws the rows that ran, of the first batch, heads, head_dim and dtype among them; returns the files that it can draw.

    Args:
        rows: as `attn_speed.run_case` returns them.
        peaks: for each dtype the machine's `tflops` and `terabytes_per_second`.
        folder, name: files are `folder/name_frames.png`, `name_tokens.png` and `name_roofline.png`.
    """
    ran = [row for row in rows if row["error"] is None]
    if not ran:
        return []
    setting = {key: ran[0][key] for key in ("batch", "heads", "head_dim", "dtype", "device")}
    ran = [row for row in ran if all(row[key] == value for key, value in setting.items())]
    title = "B={batch}, H={heads}, D={head_dim}, {dtype}, {device}".format(**setting)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{what}.png" for what in ("roofline", "frames", "tokens")]
    _roofline(ran, peaks[setting["dtype"]], title, paths[0])
    relative = [row for row in ran if row["over_joint"] is not None and row["contender"] != "joint"]
    if all(row["contender"] in OTHERS for row in relative):  # nothing under a mask, or nothing to compare it to
        return paths[:1]
    _relative_times(relative, "frames", title, paths[1])
    _relative_times(relative, "tokens", title, paths[2])
    return paths


def _relative_times(rows: Sequence[Row], varied: str, title: str, path: Path) -> None:
    """A panel for each mask and pass: time over that of joint attention, and the density as the ideal."""
    held = "tokens" if varied == "frames" else "frames"
    sizes = {value: len({row[varied] for row in rows if row[held] == value}) for value in {row[held] for row in rows}}
    value = max(sizes, key=lambda size: (sizes[size], size == PREFERRED[held], size))
    rows = [row for row in rows if row[held] == value]
    names = list(dict.fromkeys(row["mask"] for row in rows if row["contender"] != "divided"))
    passes = list(dict.fromkeys(row["pass"] for row in rows))

    title = f"Time relative to joint attention; {'N' if held == 'tokens' else 'T'}={value}, {title}"
    figure = _figure(5.2 * len(names), 3.9 * len(passes) + 0.3, title)
    grid = figure.subplots(len(passes), len(names), squeeze=False, sharex=True, sharey=True)
    for axes_row, which in zip(grid, passes, strict=True):
        for axes, mask in zip(axes_row, names, strict=True):
            lines: dict[str, list[tuple[int, float]]] = {}
            ideal = {row[varied]: row["density"] for row in rows if row["mask"] == mask}
            for row in rows:
                if row["pass"] == which and (row["mask"] == mask or row["contender"] == "divided"):
                    lines.setdefault(row["contender"], []).append((row[varied], row["over_joint"]))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.axhline(1, color=INK, linewidth=1)
            axes.plot(*zip(*sorted(ideal.items()), strict=True), color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            ends = {"joint": (None, 1.0), "ideal": max(ideal.items())}
            for contender, points in lines.items():
                points.sort()
                ours = contender.startswith("kronmask")
                x, y = zip(*points, strict=True)
                style = {"linewidth": 2.2, "marker": "o"} if ours else {"linewidth": 1.4, "marker": "."}
                line = ":" if contender == "divided" else "-"
                axes.plot(x, y, line, color=COLORS[contender], markersize=5, **style)
                ends[contender] = points[-1]
            ticks = sorted({row[varied] for row in rows})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            low, high = axes.get_ylim()
            choices = [tick for tick in (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= tick <= high]
            axes.set_yticks(choices, [f"{tick:g}×" for tick in choices])
            axes.set_title(f"{mask}, {which}", loc="left", fontsize=10, fontweight="bold", color=INK)
            _plain(axes)
            axes.ends = ends
    for axes in grid.flat:  # labels last: the panels share their limits, which are known now
        _label_ends(axes, axes.ends)
    for axes in grid[-1]:
        axes.set_xlabel(AXES[varied], fontsize=9, color=MUTED)
    figure.savefig(path)


def _label_ends(axes: Any, ends: Mapping[str, tuple[int | None, float]]) -> None:
    """Names each line at its right end, apart from each other."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    gap = 0.058
    order = sorted(ends, key=lambda name: ends[name][1])
    wanted = [(math.log(ends[name][1]) - low) / (high - low) for name in order]
    places = list(wanted)
    for _ in range(200):  # neighbours that are too close push each other away
        for i in range(1, len(places)):
            short = gap - (places[i] - places[i - 1])
            if short > 1e-6:
                places[i - 1] -= short / 2
                places[i] += short / 2
    for name, place, (x, y) in zip(order, places, (ends[name] for name in order), strict=True):
        text = {"ideal": "ideal (density)"}.get(name, name)
        color = COLORS.get(name, INK)
        weight = "bold" if name.startswith("kronmask") else "normal"
        start = (axes.get_xlim()[1] if x is None else x, y)
        axes.annotate(
            text, start, (1.06, place), textcoords="axes fraction", fontsize=8, color=color, fontweight=weight, va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip


def _roofline(rows: Sequence[Row], peak: Mapping[str, float], title: str, path: Path) -> None:
    """A panel for each pass: useful TFLOP/s against useful FLOPs per byte of the tensors that a pass must read and write."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    names = list(dict.fromkeys(row["mask"] for row in rows if row["contender"] not in OTHERS))
    contenders = [name for name in COLORS if any(row["contender"] == name for row in rows)]
    unit, factor = ("TFLOP/s", 1.0) if peak["tflops"] >= 2 else ("GFLOP/s", 1e3)
    figure = _figure(5.2 * len(passes) + 1.9, 4.6, f"Useful {unit} and what the machine can do; {title}")
    grid = figure.subplots(1, len(passes), squeeze=False, sharex=True, sharey=True)[0]
    intensities = [_intensity(row) for row in rows]
    ridge = peak["tflops"] / peak["terabytes_per_second"]
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    for axes, which in zip(grid, passes, strict=True):
        for row, intensity in zip(rows, intensities, strict=True):
            if row["pass"] == which:
                marker = "o" if row["contender"] in OTHERS else MARKERS[names.index(row["mask"])]
                style = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.5}
                axes.plot(intensity, row["tflops"] * factor, marker, color=COLORS[row["contender"]], **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        slope = left * peak["terabytes_per_second"]
        axes.plot([left, ridge, right], [slope * factor, *[peak["tflops"] * factor] * 2], color=INK, linewidth=1.2)
        axes.set_xlim(left, right)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if axis is axes.yaxis else (1,)))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        text = {"fontsize": 8, "color": MUTED}
        axes.annotate(
            "matrix product", (right, peak["tflops"] * factor), (-3, 4), textcoords="offset points", ha="right", **text
        )
        axes.annotate("copy", (left, slope * factor), (6, -2), textcoords="offset points", **text)
        axes.set_title(which, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_xlabel(
            "useful FLOPs per byte of query, key, value, output and their gradients", fontsize=8, color=MUTED
        )
        _plain(axes)
    grid[0].set_ylabel(f"useful {unit}", fontsize=9, color=MUTED)
    keys = [("o", COLORS[name], name) for name in contenders]
    keys += [(marker, MUTED, mask) for marker, mask in zip(MARKERS, names, strict=False)]
    handles = [
        Line2D([], [], marker=marker, color=color, label=label, linestyle="none") for marker, color, label in keys
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)


def _intensity(row: Row) -> float:
    """Useful FLOPs per byte: forward q, k, v, o; backward these, the gradient of o, and those of q, k and v."""
    element = {"float32": 4, "float16": 2, "bfloat16": 2}[row["dtype"]]
    tensor = row["batch"] * row["heads"] * row["frames"] * row["tokens"] * row["head_dim"] * element
    return row["useful_flops"] / (tensor * (4 if row["pass"] == "forward" else 12))


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _plain(axes: Any) -> None:
    """Grid lines instead of a box."""
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors=MUTED)

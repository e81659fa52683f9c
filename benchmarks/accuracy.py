"""Which attention learns motion: one small CLAVER under six masks, and what its embedding of time, depth and placement do.

Runs of one variant differ in the seed alone (of initial weights and order of clips). Variants differ from "kmct" in what their
names say; those of another mask have the same parameters, clips and steps. The model is the demo's, two thirds as wide.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import common
from claver.config import Config
from claver.data.motions import MOTIONS, MotionDataset, write_motion_dataset
from claver.demo import FRAMES, SIZE, demo_config
from claver.evaluation.evaluate import run_evaluation
from claver.evaluation.order import MEASURES, evaluate_order, mean_and_interval, opposites_of, with_interval
from claver.model import Claver, build_model
from claver.training.train import train

from kronmask import temporal_parameters
from kronmask.nn import MaskRule

__all__ = [
    "VARIANTS",
    "Variant",
    "count_flops",
    "main",
    "plot",
    "plot_curves",
    "summarize",
    "variant_config",
    "variant_model",
]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a variant's temporal blocks are; two masks are those of its two blocks, in their order."""

    masks: tuple[str, ...]
    embedding: bool | str = True
    layers: int = 2
    placement: str = "append"
    note: str = ""


_BLIND = "no temporal embedding: blind to the order of frames"

VARIANTS = {
    "spatial": Variant(("spatial",), note="knows order by the temporal embedding alone"),
    "temporal": Variant(("temporal",)),
    "divided": Variant(("temporal", "spatial"), note="one block of each; in TimeSformer a block has both attentions"),
    "joint": Variant(("joint",)),
    "kmt": Variant(("kmt",)),
    "kmct": Variant(("kmct",)),
    "spatial, no embedding": Variant(("spatial",), embedding=False, note=f"{_BLIND}; the average of frames"),
    "kmt, no embedding": Variant(("kmt",), embedding=False, note=_BLIND),
    "kmct, no embedding": Variant(("kmct",), embedding=False, note="knows order by the mask alone"),
    "kmct, rotary": Variant(("kmct",), embedding="rotary", note="time by rotation of queries and keys"),
    "kmct, 1 layer": Variant(("kmct",), layers=1),
    "kmct, 4 layers": Variant(("kmct",), layers=4),
    "kmct, interleave": Variant(
        ("kmct",), layers=1, placement="interleave", note="attention over time before each block, and no MLP of its own"
    ),
    "joint, replace": Variant(
        ("joint",), layers=1, placement="replace", note="no blocks are added: both attend over time"
    ),
}

MASKS = ("spatial", "temporal", "divided", "joint", "kmt", "kmct")  # the variants that differ in nothing else
WIDTH = 64  # of the vision tower
QUICK = {
    "epochs": 3,
    "seeds": [0],
    "num_train": 96,
    "num_test": 48,
    "out": Path("runs/benchmarks"),
    "folder": Path("runs/benchmarks/accuracy"),
}
NOTES = {
    "top1, top5": "of held-out clips, softmax averaged over prompts and three views in time",
    "reversed_opposite, reversed_same": "shares of them that get the opposite class, or keep theirs, when played backwards",
    "shuffled_same": "share of them that keep their class when their frames are shuffled",
    "interval": "half the width of the 95 % interval of a mean over seeds (Student's t)",
    "curves": "top-1 of the middle view after so many steps",
    "seconds": "wall time of training, reading the files included, on one thread with `workers` runs and what else ran beside",
    "instructions": "vector unit of the CPU: the same run ends with other last digits, and another top-1, on another one",
    "gflops": "forward of one clip through the video encoder, 2 for each multiply-add, attention by its allowed pairs",
    "order": "without order 0.5 is the best top-1 that can be expected; with a temporal embedding all masks have order",
}


# ---- one run --------------------------------------------------------------------------------------------------------


def variant_config(name: str, folder: Path, dataset: MotionDataset, *, seed: int, epochs: int) -> Config:
    """The demo's configuration, but for the width and what the variant is about."""
    variant = VARIANTS[name]
    config = demo_config(folder, dataset, temporal=True, seed=seed, epochs=epochs)
    assert config.model.vision is not None
    model = dataclasses.replace(
        config.model,
        vision={**config.model.vision, "width": WIDTH},
        attention=variant.masks[0],
        layers=variant.layers,
        placement=variant.placement,
        temporal_embedding=variant.embedding,
        temporal_std=config.model.temporal_std if variant.embedding is True else None,
    )
    return dataclasses.replace(
        config,
        run_dir=str(folder / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"),
        model=model,
        train=dataclasses.replace(config.train, evaluate_every=max(1, epochs // 8)),
    )


def variant_model(name: str, config: Config) -> Claver:
    """The model of a variant: `patch_vit` gives all temporal blocks one mask, but those of `divided` get their own.

    It is a block of temporal and then a block of spatial attention, at the parameters of the others. In TimeSformer
    (arXiv 2102.05095) each block has both attentions, which is another number of parameters.
    """
    model, masks = build_model(config.model), VARIANTS[name].masks
    if len(masks) > 1:
        for block, mask in zip(model.clip.visual.temporal_encoder.blocks, masks, strict=True):
            block.attn.mask = MaskRule(mask)
    return model


def count_flops(model: Claver) -> int:
    """Forward of one clip through the video encoder, 2 for each multiply-add."""
    video = torch.zeros(1, FRAMES, 3, SIZE, SIZE)
    # torch counts neither the fused kernel of SDPA on the CPU nor, in eval mode, that of nn.MultiheadAttention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train().encode_video(video)
    return counter.get_total_flops()


def _run(name: str, folder: Path, dataset: MotionDataset, seed: int, epochs: int) -> dict[str, Any]:
    """Trains and evaluates one model on one thread; what it prints goes to `log.txt` in the run's folder."""
    torch.set_num_threads(1)
    config = variant_config(name, folder, dataset, seed=seed, epochs=epochs)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        torch.manual_seed(seed)
        model = variant_model(name, config)
        sizes = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "temporal_parameters": sum(parameter.numel() for parameter in temporal_parameters(model).values()),
            "gflops": count_flops(model) / 1e9,
        }
        start = time.perf_counter()
        try:
            run = train(config, model=model, overwrite=True)
        finally:  # its checkpoints say one mask for all blocks: "divided" has two
            for checkpoint in (*run_dir.glob("*.safetensors"), *run_dir.glob("*.pt")):
                checkpoint.unlink()
        seconds = time.perf_counter() - start
        order = evaluate_order(
            run.model,
            lambda model: run_evaluation(config, model, run.tokens),
            opposites_of(MOTIONS),
            forwards=(evaluation := run_evaluation(config, run.model, run.tokens)),
        )
    scores = {name: getattr(order, name) for name in MEASURES} | {"top5": evaluation.top(5)}
    curve = [[record["step"], record["top1"]] for record in run.history if "top1" in record]
    return {**scores, "steps": run.history[-1]["step"], "seconds": round(seconds, 1), **sizes, "curve": curve}


# ---- all runs -------------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each variant with a finished run: means over seeds with their intervals, least and greatest top-1, and `last_gain`.

    That is how much of its top-1 the last quarter of the training brought (of the middle view): near 0 the curve is flat.
    """
    summary = []
    for name in dict.fromkeys(row["attention"] for row in rows):
        done = [row for row in rows if row["attention"] == name and "top1" in row]
        if not done:
            continue
        item: dict[str, Any] = {"attention": name, "runs": len(done)}
        for measure in MEASURES:
            values = [row[measure] for row in done]
            item[f"{measure}_mean"], item[f"{measure}_interval"] = mean_and_interval(values)
        top1 = [row["top1"] for row in done]
        item |= {
            "top1_min": min(top1),
            "top1_max": max(top1),
            "last_gain": statistics.fmean(_last_gain(row["curve"]) for row in done),
            "top5_mean": statistics.fmean(row["top5"] for row in done),
            "seconds_mean": statistics.fmean(row["seconds"] for row in done),
            **{key: done[0][key] for key in ("steps", "parameters", "temporal_parameters", "gflops", "note")},
        }
        summary.append(item)
    return summary


def _last_gain(curve: Sequence[Sequence[float]]) -> float:
    end, last = curve[-1]
    before = [top1 for step, top1 in curve if step <= 0.75 * end]
    return last - before[-1] if before else last


INK, MUTED = "#222222", "#6b6b6b"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One dot for each seed, a bar at the mean with its interval, a line for each variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = summarize(rows)
    height = 1.0 + 0.42 * max(1, len(summary))
    figure = Figure(figsize=(8.5, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.23, 0.5 / height, 0.46, 1 - 0.8 / height))
    above, beside = ("data", "axes fraction"), ("axes fraction", "data")
    for value, text in ((1 / len(MOTIONS), "chance"), (0.5, "best without order")):
        axes.axvline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(text, (value, 1.01), xycoords=above, ha="center", va="bottom", fontsize=8, color=MUTED)
    columns = ((1.31, "mean, 95 %"), (1.47, "reversed"), (1.64, "MFLOPs"))
    for x, text in columns:
        axes.annotate(text, (x, 1.01), xycoords="axes fraction", ha="right", va="bottom", fontsize=8, color=MUTED)
    for place, item in enumerate(summary):
        # Okabe and Ito: told apart by colour-blind readers, and by shape
        color, marker = ("#0072b2", "o") if VARIANTS[item["attention"]].embedding else ("#d55e00", "D")
        top1 = [row["top1"] for row in rows if row["attention"] == item["attention"] and "top1" in row]
        mean, interval = item["top1_mean"], item["top1_interval"]
        axes.scatter(top1, [place] * len(top1), s=30, color=color, marker=marker, alpha=0.6, linewidths=0, zorder=2)
        axes.errorbar(
            mean, place, xerr=interval, color=INK, linewidth=1.5, capsize=3, marker="|", markersize=12, zorder=3
        )
        cells = (
            with_interval(mean, interval),
            f"{item['reversed_opposite_mean']:.3f}",
            f"{item['gflops'] * 1000:.1f}",
        )
        for (x, _), text in zip(columns, cells, strict=True):
            axes.annotate(text, (x, place), xycoords=beside, ha="right", va="center", fontsize=9, color=INK)
    axes.set(xlim=(0, 1), xlabel="top-1 on held-out clips: a dot for each seed, mean and 95 % interval")
    axes.set_ylim(max(1, len(summary)) - 0.5, -0.5)
    axes.set_yticks(range(len(summary)), [item["attention"] for item in summary])
    axes.tick_params(length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Top-1 over training, for the variants of another mask: the mean over seeds and, of three or more, its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = zip(MASKS, ("#999999", "#e69f00", "#cc79a7", "#009e73", "#0072b2", "#d55e00"), "sPvD^o", strict=True)
    for name, color, marker in styles:
        curves = [row["curve"] for row in rows if row["attention"] == name and "curve" in row]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]]
        means, intervals = zip(
            *(mean_and_interval([curve[i][1] for curve in curves]) for i in range(len(steps))), strict=True
        )
        low, high = ([m + sign * (i or 0) for m, i in zip(means, intervals, strict=True)] for sign in (-1, 1))
        if len(curves) > 2:  # the interval of two is as wide as the picture
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(steps, means, color=color, marker=marker, markersize=4, label=name)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("best without order", (0, 0.51), fontsize=8, color=MUTED)
    axes.set(xlabel="steps", ylabel="top-1 of the middle view, mean and 95 % interval", xlim=(0, None), ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def _print(rows: Sequence[Mapping[str, Any]], workers: int) -> None:
    """The summary as a table, and below it what failed."""
    columns = (
        "attention", "runs", "top-1", "min", "max", "reversed", "shuffled", "last gain", "steps", "seconds", "parameters",
        "temporal", "MFLOPs",
    )  # fmt: skip
    cells = []
    for item in summarize(rows):
        least, most, gain = (f"{item[key]:.3f}" for key in ("top1_min", "top1_max", "last_gain"))
        top1, backwards, shuffled = (
            with_interval(item[f"{key}_mean"], item[f"{key}_interval"])
            for key in ("top1", "reversed_opposite", "shuffled_same")
        )
        counts = (f"{item[key]:,}" for key in ("parameters", "temporal_parameters"))
        seconds, flops = f"{item['seconds_mean']:.0f}", f"{item['gflops'] * 1000:.1f}"
        scores = (top1, least, most, backwards, shuffled, gain)
        cells.append((item["attention"], item["runs"], *scores, item["steps"], seconds, *counts, flops))
    common.table(f"Top-1 on held-out clips of motions (workers: {workers}, one thread each)", columns, cells)
    for row in rows:
        if "error" in row:
            print(f"failed: {row['attention']}, seed {row['seed']}: {row['error']}")


def _stored(path: Path, settings: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished runs of an earlier call, by variant and seed.

    Raises:
        ValueError: they were trained in another way, or by other versions.
    """
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    now = {"settings": settings, "versions": common.provenance()["versions"]}
    for what, value in now.items():
        if stored[what] != value:
            raise ValueError(f"{path} holds runs of other {what}: {stored[what]}, and not {value}; leave out --resume")
    curves = stored["curves"]
    return {
        (row["attention"], row["seed"]): row | {"curve": curves[row["attention"]][str(row["seed"])]}
        for row in stored["rows"]
        if not row.get("error")
    }


def _save(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    curves: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "curve" in row:
            curves.setdefault(row["attention"], {})[str(row["seed"])] = row["curve"]
    plain = [{key: value for key, value in row.items() if key != "curve"} for row in rows]
    path = common.save(
        options.name, plain, options.out, summary=summarize(rows), curves=curves, chance=1 / len(MOTIONS),
        settings=settings, notes=NOTES,
    )  # fmt: skip
    plot(rows, path.with_suffix(".png"))
    plot_curves(rows, path.with_name(f"{path.stem}_curves.png"))
    return path


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs the benchmark, writes after each run what is there, and returns the rows; a run that failed has an `error`."""
    options = _options(arguments)
    settings = {name: getattr(options, name) for name in ("epochs", "num_train", "num_test")} | {"width": WIDTH}
    runs = [(name, seed) for seed in options.seeds for name in options.attentions]  # whole rounds first
    rows = _stored(options.out / f"{options.name}.json", settings) if options.resume else {}
    left = [run for run in runs if run not in rows]
    count = options.num_train + options.num_test
    print(f"{count} clips of {len(MOTIONS)} motions in {options.folder / 'data'}", flush=True)
    dataset = write_motion_dataset(
        options.folder / "data", num_train=options.num_train, num_test=options.num_test, size=SIZE, seed=0
    )

    def finished() -> list[dict[str, Any]]:
        places = [(name, seed) for seed in sorted({seed for _, seed in (*rows, *runs)}) for name in VARIANTS]
        return [rows[run] for run in places if run in rows]

    pool = ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"))
    try:
        futures = {
            pool.submit(_run, name, options.folder, dataset, seed, options.epochs): (name, seed) for name, seed in left
        }
        for future in as_completed(futures):
            name, seed = futures[future]
            error = future.exception()
            result = {"error": f"{type(error).__name__}: {error}"} if error else future.result()
            machine = {"instructions": torch.backends.cpu.get_cpu_capability()}
            rows[name, seed] = {"attention": name, "seed": seed, **result, **machine, "note": VARIANTS[name].note}
            _save(options, finished(), settings)
            told = result.get("error") or f"top-1 {result['top1']:.3f} after {result['seconds']:.0f} s"
            print(f"{len(rows)}/{len({*rows, *runs})}  {name}, seed {seed}: {told}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt ends the benchmark, not only the runs in progress
    _print(finished(), options.workers)
    path = _save(options, finished(), settings)
    print(f"{path}, and .csv and two .png beside it; logs in {options.folder}")
    return finished()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--attentions", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of initial weights and order of clips"
    )
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--num-train", type=int, default=800, help="clips")
    parser.add_argument("--num-test", type=int, default=240, help="clips")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs side by side, on a thread each")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    parser.add_argument("--name", default="accuracy", help="of the files in it")
    parser.add_argument("--folder", type=Path, default=Path("runs/accuracy"), help="of clips, histories and logs")
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished runs that are there, and run the others"
    )
    parser.add_argument("--quick", action="store_true", help="other defaults: only shows that it runs, in two minutes")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(any("error" in row for row in main()))

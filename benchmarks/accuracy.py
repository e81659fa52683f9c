"""Which attention learns motion: the demo's small CLAVER under eight masks, with the same parameters, clips and steps.

The runs differ in the masks of the two temporal blocks and in the seed (of initial weights and order of clips), in nothing
else. Two controls have no temporal embedding.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from claver.model import Claver, build_model
from claver.training.train import train

from kronmask import temporal_parameters
from kronmask.nn import MaskRule

__all__ = ["VARIANTS", "Variant", "count_flops", "main", "plot", "summarize", "variant_config", "variant_model"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """The masks of the temporal blocks in their order, and whether tokens know the place of their frame."""

    masks: tuple[str, str]
    embedding: bool = True
    note: str = ""


_NO_EMBEDDING = "no temporal embedding, so fewer parameters by that; blind to the order of frames"

VARIANTS = {
    "spatial": Variant(("spatial", "spatial"), note="knows order by the temporal embedding alone"),
    "temporal": Variant(("temporal", "temporal")),
    "divided": Variant(("temporal", "spatial"), note="one block of each; in TimeSformer a block has both attentions"),
    "joint": Variant(("joint", "joint")),
    "kmt": Variant(("kmt", "kmt")),
    "kmct": Variant(("kmct", "kmct")),
    "kmt, no embedding": Variant(("kmt", "kmt"), embedding=False, note=_NO_EMBEDDING),
    "spatial, no embedding": Variant(("spatial", "spatial"), embedding=False, note=f"{_NO_EMBEDDING}; frame average"),
}

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
    "seconds": "wall time of training, reading the files included, on one thread with `workers` runs side by side",
    "gflops": "forward of one clip through the video encoder, 2 for each multiply-add, attention by its allowed pairs",
    "order": "without order 0.5 is the best top-1 that can be expected; with a temporal embedding all masks have order",
}


# ---- one run --------------------------------------------------------------------------------------------------------


def variant_config(name: str, folder: Path, dataset: MotionDataset, *, seed: int, epochs: int) -> Config:
    """The demo's configuration, but for what the variant is about."""
    variant = VARIANTS[name]
    config = demo_config(folder, dataset, temporal=True, seed=seed, epochs=epochs)
    model = dataclasses.replace(
        config.model,
        attention=variant.masks[0],
        temporal_embedding=variant.embedding,
        temporal_std=config.model.temporal_std if variant.embedding else None,
    )
    return dataclasses.replace(
        config,
        run_dir=str(folder / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"),
        model=model,
        train=dataclasses.replace(config.train, evaluate_every=epochs),
    )


def variant_model(name: str, config: Config) -> Claver:
    """The model of a variant: `patch_vit` gives all temporal blocks one mask, here each block gets its own.

    So `divided` is a block of temporal and then a block of spatial attention, at the parameters of the others. In TimeSformer
    (arXiv 2102.05095) each block has both attentions, which is another number of parameters.
    """
    model = build_model(config.model)
    blocks = model.clip.visual.temporal_encoder.blocks
    for block, mask in zip(blocks, VARIANTS[name].masks, strict=True):
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
        evaluation = run_evaluation(config, run.model, run.tokens)
    scores = {"top1": evaluation.top(1), "top5": evaluation.top(5), "steps": run.history[-1]["step"]}
    return {**scores, "seconds": round(seconds, 1), **sizes}


# ---- all runs -------------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each attention with a finished run: mean, sample standard deviation (None for one run), least and greatest top-1."""
    summary = []
    for name in dict.fromkeys(row["attention"] for row in rows):
        done = [row for row in rows if row["attention"] == name and "top1" in row]
        if not done:
            continue
        top1 = [row["top1"] for row in done]
        summary.append(
            {
                "attention": name,
                "runs": len(done),
                "top1_mean": statistics.mean(top1),
                "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
                "top1_min": min(top1),
                "top1_max": max(top1),
                "top5_mean": statistics.mean(row["top5"] for row in done),
                "seconds_mean": statistics.mean(row["seconds"] for row in done),
                **{key: done[0][key] for key in ("steps", "parameters", "temporal_parameters", "gflops", "note")},
            }
        )
    return summary


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One dot for each seed and a bar at the mean, a line for each attention."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary, ink, muted = summarize(rows), "#222222", "#6b6b6b"
    height = 1.0 + 0.42 * max(1, len(summary))
    figure = Figure(figsize=(8, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.23, 0.5 / height, 0.51, 1 - 0.8 / height))
    above, beside = ("data", "axes fraction"), ("axes fraction", "data")
    for value, text in ((1 / len(MOTIONS), "chance"), (0.5, "best without order")):
        axes.axvline(value, color=muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(text, (value, 1.01), xycoords=above, ha="center", va="bottom", fontsize=8, color=muted)
    for x, text in ((1.26, "mean ± std"), (1.42, "MFLOPs")):
        axes.annotate(text, (x, 1.01), xycoords="axes fraction", ha="right", va="bottom", fontsize=8, color=muted)
    for place, item in enumerate(summary):
        # Okabe and Ito: told apart by colour-blind readers, and by shape
        color, marker = ("#0072b2", "o") if VARIANTS[item["attention"]].embedding else ("#d55e00", "D")
        top1 = [row["top1"] for row in rows if row["attention"] == item["attention"] and "top1" in row]
        axes.scatter(top1, [place] * len(top1), s=34, color=color, marker=marker, alpha=0.75, linewidths=0, zorder=3)
        axes.plot([item["top1_mean"]] * 2, [place - 0.3, place + 0.3], color=ink, linewidth=2, zorder=2)
        for x, text in ((1.26, _mean_and_spread(item)), (1.42, f"{item['gflops'] * 1000:.1f}")):
            axes.annotate(text, (x, place), xycoords=beside, ha="right", va="center", fontsize=9, color=ink)
    axes.set(xlim=(0, 1), xlabel="top-1 on held-out clips; a dot for each seed, a bar at the mean")
    axes.set_ylim(max(1, len(summary)) - 0.5, -0.5)
    axes.set_yticks(range(len(summary)), [item["attention"] for item in summary])
    axes.tick_params(length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)


def _mean_and_spread(item: Mapping[str, Any]) -> str:
    spread = "" if item["top1_std"] is None else f" ± {item['top1_std']:.3f}"
    return f"{item['top1_mean']:.3f}{spread}"


def _print(rows: Sequence[Mapping[str, Any]], workers: int) -> None:
    """The summary as a table, and below it what failed."""
    columns = (
        "attention",
        "runs",
        "top-1",
        "min",
        "max",
        "top-5",
        "steps",
        "seconds",
        "parameters",
        "temporal",
        "MFLOPs",
    )
    cells = []
    for item in summarize(rows):
        shares = (f"{item[key]:.3f}" for key in ("top1_min", "top1_max", "top5_mean"))
        counts = (f"{item[key]:,}" for key in ("parameters", "temporal_parameters"))
        seconds, flops = f"{item['seconds_mean']:.0f}", f"{item['gflops'] * 1000:.1f}"
        top1 = _mean_and_spread(item)
        cells.append((item["attention"], item["runs"], top1, *shares, item["steps"], seconds, *counts, flops))
    common.table(f"Top-1 on held-out clips of motions (workers: {workers}, one thread each)", columns, cells)
    for row in rows:
        if "error" in row:
            print(f"failed: {row['attention']}, seed {row['seed']}: {row['error']}")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs the benchmark, writes after each run what is there, and returns the rows; a run that failed has an `error`."""
    options = _options(arguments)
    count = options.num_train + options.num_test
    print(f"{count} clips of {len(MOTIONS)} motions in {options.folder / 'data'}", flush=True)
    dataset = write_motion_dataset(
        options.folder / "data", num_train=options.num_train, num_test=options.num_test, size=SIZE, seed=0
    )
    runs = [(name, seed) for seed in options.seeds for name in options.attentions]  # whole rounds first
    settings = {name: getattr(options, name) for name in ("epochs", "num_train", "num_test", "workers")}
    rows: dict[tuple[str, int], dict[str, Any]] = {}

    def finished() -> list[dict[str, Any]]:
        return [rows[run] for run in runs if run in rows]

    start = time.perf_counter()
    pool = ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"))
    try:
        futures = {
            pool.submit(_run, name, options.folder, dataset, seed, options.epochs): (name, seed) for name, seed in runs
        }
        for future in as_completed(futures):
            name, seed = futures[future]
            error = future.exception()
            result = {"error": f"{type(error).__name__}: {error}"} if error else future.result()
            rows[name, seed] = {"attention": name, "seed": seed, **result, "note": VARIANTS[name].note}
            path = common.save(
                options.name, finished(), options.out, summary=summarize(finished()), chance=1 / len(MOTIONS),
                settings=settings, notes=NOTES, seconds=round(time.perf_counter() - start, 1),
            )  # fmt: skip
            plot(finished(), path.with_suffix(".png"))
            told = result.get("error") or f"top-1 {result['top1']:.3f} after {result['seconds']:.0f} s"
            print(f"{len(rows)}/{len(runs)}  {name}, seed {seed}: {told}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt ends the benchmark, not only the runs in progress
    _print(finished(), options.workers)
    print(f"{path}, and .csv and .png beside it; logs in {options.folder}")
    return finished()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--attentions", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of initial weights and order of clips")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--num-train", type=int, default=800, help="clips")
    parser.add_argument("--num-test", type=int, default=240, help="clips")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs side by side, on a thread each")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    parser.add_argument("--name", default="accuracy", help="of the files in it")
    parser.add_argument("--folder", type=Path, default=Path("runs/accuracy"), help="of clips, histories and logs")
    parser.add_argument("--quick", action="store_true", help="other defaults: only shows that it runs, in two minutes")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(any("error" in row for row in main()))

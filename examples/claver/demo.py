"""The demo: a small CLAVER learns to tell motions apart from real video files, with and without temporal attention."""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kronmask
from kronmask import masks

from . import DEMO_CHECKPOINT
from .config import Config, DataConfig, ModelConfig, TestConfig, TrainConfig
from .data.augment import AugmentConfig
from .data.lists import read_labels, read_list
from .data.motions import MOTIONS, MotionDataset, write_motion_dataset
from .data.sampling import segment_indices
from .data.tars import Member
from .data.video import read_clip
from .evaluation.evaluate import Evaluation, likeliest, run_evaluation
from .evaluation.order import Order, evaluate_order, opposites_of
from .figures import plot_confusion, plot_curves, plot_film_strips, plot_results, save_figure
from .files import replace_file, write_text
from .prompts.build import OBJECT_TEMPLATES
from .training.run_folder import saved_steps, weights_of
from .training.train import train

__all__ = ["demo", "demo_config"]

SIZE, FRAMES, WIDTH = 64, 8, 96


def demo_config(
    folder: Path, dataset: MotionDataset, *, temporal: bool, seed: int, epochs: int, rotary: bool = False
) -> Config:
    """A CLIP of 2 spatial and 2 temporal blocks on 64-pixel frames of 16 patches, trained from scratch.

    With `rotary` time is relative and a frame sees a window as long as a clip, so that a stream of the model needs no end; it
    takes more clips to learn as much. Without `temporal` the same four blocks see one frame each and know nothing of its place
    in the clip: the average of an unordered set of frames, with the same parameters but the temporal embedding.
    """
    return Config(
        run_dir=str(folder / ("kmct" if temporal else "frame_average")),
        seed=seed,
        data=DataConfig(
            root=str(dataset.root),
            train_list=str(dataset.train_list),
            test_list=str(dataset.test_list),
            labels=str(dataset.labels),
            prompts="templates",
            templates=OBJECT_TEMPLATES,
            num_workers=0,
            cache=True,
        ),
        model=ModelConfig(
            name="CLIP-motion-64",
            pretrained=None,
            quick_gelu=False,
            embed_dim=64,
            vision={"layers": 2, "width": WIDTH, "head_width": 32, "patch_size": 16, "image_size": SIZE},
            text={"context_length": 24, "width": 64, "heads": 2, "layers": 1},
            frames=FRAMES,
            attention="kmct" if temporal else "spatial",
            window=FRAMES if temporal and rotary else None,
            layers=2,
            temporal_embedding="rotary" if temporal and rotary else temporal,
            # a frame's patches have a standard deviation of about .5 at the start: smaller positions would drown in them
            position_std=1.0,
            temporal_std=0.5 if temporal and not rotary else None,
            token_std=0.1,
            logit_scale=30.0,
        ),
        # left and right must not be mirrored, a mixed clip would move both ways, and the frames fill the model's input
        augment=AugmentConfig(
            size=SIZE, short_side=SIZE, scales=(1.0,), flip=0, jitter=0, grey=0, mixup=0, cutmix=0, label_smoothing=0.1
        ),
        train=TrainConfig(
            epochs=epochs,
            batch_size=32,
            lr=7e-4,
            temporal_lr_mult=1,
            warmup_epochs=2,
            weight_decay=0.02,
            max_grad_norm=1.0,
            prompts_per_step=2,
            evaluate_every=4,
            trackers=(),
        ),
        test=TestConfig(clips=3, crops=1, batch_size=16),
    )


def demo(
    folder: str | Path = "runs/demo",
    *,
    seed: int = 0,
    num_train: int = 800,
    num_test: int = 240,
    epochs: int = 24,
    rotary: bool = False,
) -> dict[str, Any]:
    """Write videos, train both models, evaluate them multi-view, draw, and print where everything is.

    `rotary` is that of `demo_config`.

    Returns:
        What `results.json` in `folder` holds.
    """
    start, folder = time.perf_counter(), Path(folder)
    print(
        f"1/3  writing {num_train + num_test} mp4 files of {len(MOTIONS)} motions in opposite pairs to {folder / 'data'}"
    )
    dataset = write_motion_dataset(folder / "data", num_train=num_train, num_test=num_test, size=SIZE, seed=seed)
    classes = read_labels(dataset.labels)

    print("2/3  training with temporal attention (KMCT) and without (frame average), side by side")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=tqdm.set_lock, initargs=(context.RLock(),)) as pool:
        futures = {}
        for position, name in enumerate(("KMCT", "frame average")):
            config = demo_config(folder, dataset, temporal=name == "KMCT", seed=seed, epochs=epochs, rotary=rotary)
            futures[name] = pool.submit(_train_and_evaluate, config, name, position)
        histories, evaluations, orders = {}, {}, {}
        for name, future in futures.items():
            histories[name], evaluations[name], orders[name] = future.result()
    with replace_file(folder / Path(DEMO_CHECKPOINT).name) as partial:
        shutil.copyfile(weights_of(folder / "kmct", saved_steps(folder / "kmct")[-1]), partial)

    print("3/3  drawing")
    results = {
        "top1": evaluations["KMCT"].top(1),
        "top5": evaluations["KMCT"].top(5),
        "baseline_top1": evaluations["frame average"].top(1),
        "baseline_top5": evaluations["frame average"].top(5),
        "order": {name: dataclasses.asdict(order) for name, order in orders.items()},
        "chance": 1 / len(classes),
        "classes": classes,
        "num_train": num_train,
        "num_test": num_test,
        "seconds": round(time.perf_counter() - start, 1),
        "seed": seed,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads_per_model": 1, "gpu": _gpu()},
        "versions": {"kronmask": kronmask.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    pictures = _draw(folder, dataset, classes, histories, evaluations)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    _report(folder, results, pictures)
    return results


def _train_and_evaluate(config: Config, name: str, position: int) -> tuple[list[dict[str, Any]], Evaluation, Order]:
    """One model's history and evaluation, also of clips backwards, on one thread: the same numbers on any number of cores."""
    torch.set_num_threads(1)
    run = train(config, overwrite=True, progress=name, bar_position=position)
    evaluation = run_evaluation(config, run.model, run.tokens)
    order = evaluate_order(
        run.model,
        lambda model: run_evaluation(config, model, run.tokens),
        opposites_of(read_labels(config.data.labels)),
        forwards=evaluation,
    )
    return run.history, evaluation, order


def _draw(
    folder: Path,
    dataset: MotionDataset,
    classes: list[str],
    histories: dict[str, list[dict[str, Any]]],
    evaluations: dict[str, Evaluation],
) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = ("mask", "predictions", "confusion", "curves", "accuracy")
    mask, predictions, confusion, curves, accuracy = pictures = [folder / f"{name}.png" for name in names]
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.9), layout="constrained")
    for ax, name in zip(panels, ("joint", "kmt", "kmct", "axial"), strict=True):
        example = masks.NAMES[name](FRAMES, 17)
        example.plot(ax)
        ax.set_title(f"{name}: {example.density:.0%} of all pairs", fontsize=10)
    save_figure(figure, mask)
    plt.close(figure)

    model = evaluations["KMCT"]
    shown = [int((model.labels == label).nonzero()[0]) for label in range(len(classes))]
    samples = read_list(dataset.test_list, dataset.root, len(classes))
    clips = torch.stack([_film(samples[i].path) for i in shown])
    top = [likeliest(model.probabilities[i], classes, 3) for i in shown]
    plot_film_strips(
        clips.numpy(),
        [classes[label] for label in range(len(classes))],
        top,
        predictions,
        title="Held-out clips, KMCT",
    )
    plot_confusion({name: e.confusion().numpy() for name, e in evaluations.items()}, classes, confusion)
    plot_curves(histories, curves)
    plot_results({name: e.top(1) for name, e in evaluations.items()}, accuracy, chance=1 / len(classes))
    return pictures


def _film(path: str | Member) -> Tensor:
    return read_clip(path, lambda count: segment_indices(count, FRAMES))


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _report(folder: Path, results: dict[str, Any], pictures: list[Path]) -> None:
    print(
        f"\nTop-1 on {results['num_test']} held-out clips: {results['top1']:.3f} with KMCT, {results['baseline_top1']:.3f} as a "
        f"frame average, {results['chance']:.3f} by chance ({results['seconds']:.0f} s).\n"
        "Opposite motions have the same frames in another order: without order, 0.5 is the best that can be expected.\n"
        f"Played backwards, {results['order']['KMCT']['reversed_opposite']:.3f} of the clips are taken for the opposite motion "
        f"with KMCT, {results['order']['frame average']['reversed_opposite']:.3f} as a frame average.\n"
        f"\n  results      {folder / 'results.json'}\n  checkpoint   {folder / Path(DEMO_CHECKPOINT).name}"
    )
    for picture in pictures:
        print(f"  {picture.stem:<12} {picture}")
    video, checkpoint = (
        shlex.quote(str(folder / "data" / "videos" / "test_00000.mp4")),
        folder / Path(DEMO_CHECKPOINT).name,
    )
    chosen = "" if checkpoint == Path(DEMO_CHECKPOINT) else f" --checkpoint {shlex.quote(str(checkpoint))}"
    print(f"\nTry it on a file:      python examples/claver_k400.py predict {video}{chosen}")
    print(f"and frame by frame:    python examples/stream.py {video} --out annotated.mp4{chosen}")

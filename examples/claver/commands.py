"""The commands of `claver_k400.py`, and those among them that train, evaluate and look at lists of videos."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import model_commands, prompt_commands
from .command_line import Command, Given, Group

if TYPE_CHECKING:
    from .config import Config
    from .model import Claver
    from .prompts.choice import Choice
    from .weights.loading import Loaded

__all__ = ["COMMANDS"]


def demo(
    *,
    run_dir: str = "runs/demo",
    seed: int = 0,
    num_train: int = 800,
    num_test: int = 240,
    epochs: int = 24,
    rotary: bool = False,
) -> int:
    """Write videos of motions, train on them from scratch, show what was learned.

    Args:
        run_dir: folder for everything it writes.
        seed: of videos and training.
        num_train: training videos.
        num_test: held-out videos.
        epochs: to train for.
        rotary: relative time and a window, for streams without an end.
    """
    from .demo import demo as run

    run(run_dir, seed=seed, num_train=num_train, num_test=num_test, epochs=epochs, rotary=rotary)
    return 0


def train(given: Given, *, resume: bool = False, init_from: str | None = None) -> int:
    """Train on videos, and evaluate the best checkpoint.

    Args:
        resume: go on with the run in the run folder.
        init_from: checkpoint, ours or the authors', whose weights are those of step 0.
    """
    from .prompts.choice import choose_prompts_of_checkpoint
    from .training.train import train as run
    from .weights.checkpoint import BEST, load_model

    splits = _splits(given)
    folder = run(next(iter(splits.values())), resume=resume, init_from=init_from).folder
    model, content = load_model(folder / BEST)
    tasks = {split: (config, choose_prompts_of_checkpoint(config, content)) for split, config in splits.items()}
    _evaluate(model, tasks, {"checkpoint": f"{BEST}, of epoch {content['epoch']}"}, folder)
    return 0


def evaluate(given: Given, *, checkpoint: str, out: str | None = None, force: bool = False) -> int:
    """Evaluate a checkpoint multi-view, under the settings of its training unless others are given.

    Args:
        checkpoint: of this program, an official one, or hf://owner/name.
        out: folder for accuracy by class, confusions and predictions.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .config import by_split
    from .weights.loading import open_checkpoint

    loaded = open_checkpoint(checkpoint, given, force=force)
    if "augment.short_side" in given.typed and loaded.config.test.crops == 3:
        raise ValueError(
            "augment.short_side has no effect with test.crops 3, whose frames have a short side of augment.size"
        )
    splits = by_split(loaded.config)
    if "test.summary" in given.typed and len(splits) == 1:
        raise ValueError("test.summary has no effect without data.splits; leave it out")
    tasks = _with_texts(loaded, splits, given)
    _evaluate(loaded.model, tasks, {"checkpoint": checkpoint}, Path(out) if out else None)
    return 0


def _splits(given: Given) -> dict[str, Config]:
    """The configuration that is given, by its splits."""
    from .config import by_split
    from .settings import from_dict

    return by_split(from_dict(given.values, "the configuration"))


def _with_texts(loaded: Loaded, splits: dict[str, Config], given: Given) -> dict[str, tuple[Config, Choice]]:
    """The texts of a checkpoint for each split, whose labels count."""
    from .weights.loading import texts_of

    return {
        split: (config, texts_of(loaded._replace(config=config), given, need_labels=True))
        for split, config in splits.items()
    }


def _evaluate(
    model: Claver, splits: dict[str, tuple[Config, Choice]], about: dict[str, Any], folder: Path | None
) -> dict[str, Any]:
    """Evaluate on each split; print the numbers as a line of JSON, and write reports if there is a folder for them."""
    from .data.videos import read_videos
    from .evaluation.evaluate import run_evaluation
    from .evaluation.reports import numbers, over_splits, write_report
    from .files import write_text
    from .processes import this_process
    from .text import tokens_of

    results: dict[str, dict[str, Any]] = {}
    main = this_process().is_main_process
    for split, (config, choice) in splits.items():
        videos = read_videos(config.data.test_list, config.data.root, choice.classes)
        header = _header(config, choice) | {"list": videos.hash}
        this_process().print(f"{split or 'test'}: {len(videos.samples)} videos; {json.dumps(header)}", file=sys.stderr)
        evaluation = run_evaluation(config, model, tokens_of(choice.prompts, model), choice.classes, videos.samples)
        results[split] = numbers(evaluation)
        for name, reason in evaluation.broken:
            this_process().print(f"counted as wrong: {name}: {reason}", file=sys.stderr)
        if folder and main:
            write_report(folder / split, evaluation, choice.classes, videos.samples, about | header)
    if list(results) == [""]:
        result = about | results[""]
    else:
        summary = next(iter(splits.values()))[0].test.summary
        result = about | {"splits": results} | over_splits(results, summary)
        if folder and main:
            write_text(folder / "results.json", json.dumps(result, indent=2) + "\n")
    if main:
        print(json.dumps(result))
    return result


def _header(config: Config, choice: Choice) -> dict[str, Any]:
    """What a number depends on, beside the weights and the list."""
    model, test = config.model, config.test
    mask = model.attention + (f", window {model.window}, sink {model.sink}" if model.window or model.sink else "")
    return {
        "classes": len(choice.classes),
        "prompts": len(choice.prompts),
        "texts": choice.description,
        "mask": mask,
        "placement": model.placement,
        "frames": model.frames,
        "pixels": config.augment.size,
        "mean": [round(value, 4) for value in config.augment.mean],
        "std": [round(value, 4) for value in config.augment.std],
        "views": f"{test.clips} clips x {test.crops} crops",
    }


def wise_ft(
    given: Given,
    *,
    checkpoint: str,
    out: str,
    source: str | None = None,
    alphas: list[float] | None = None,
    zero_shot: list[str] | None = None,
) -> int:
    """Evaluate weights between a pretrained and a tuned model, on the tuned task and on others.

    Args:
        checkpoint: the tuned model.
        out: folder for wise_ft.json and wise_ft.png.
        source: checkpoint before the tuning; without one the open_clip model of model.name and model.pretrained, frame by frame.
        alphas: shares of the tuned weights; 0 to 1 in steps of a tenth if none is given.
        zero_shot: configurations of the other tasks, as zero_shot_hmdb51; their data sections are taken.
    """
    from .config import by_split
    from .evaluation.wise_ft import pretrained_state, sweep
    from .settings import find_config, from_dict, merge, read_yaml, to_dict
    from .weights.checkpoint import load_checkpoint
    from .weights.loading import open_checkpoint

    loaded = open_checkpoint(checkpoint, given)
    before = load_checkpoint(source)["model"] if source else pretrained_state(loaded.config.model)
    tasks = {"tuned task": (loaded.config, given)}
    for name in zero_shot or ():
        values = {key: value for key, value in read_yaml(find_config(name)).items() if key in ("data", "test")}
        typed = tuple(f"data.{key}" for key in values.get("data", {}))
        config = from_dict(merge(to_dict(loaded.config), values), name)
        tasks[Path(name).stem] = (config, Given(values, typed))
    runs = {}
    for task, (config, settings) in tasks.items():
        splits = _with_texts(loaded, by_split(config), settings)
        runs[task] = partial(_evaluate, splits=splits, about={"task": task}, folder=None)
    shares = [share / 10 for share in range(11)] if alphas is None else alphas
    sweep(loaded.model, before, shares, runs, out)
    print(f"written to {Path(out) / 'wise_ft.json'} and {Path(out) / 'wise_ft.png'}")
    return 0


def order(
    runs: list[str],
    *,
    control: list[str] | None = None,
    opposites: str | None = None,
    out: str | None = None,
) -> int:
    """Ask whether models know the order of frames: clips forwards, backwards and shuffled.

    Args:
        runs: checkpoints, or folders of runs, of several seeds.
        control: the same of runs that are blind to order.
        opposites: CSV of class,opposite; the motions of the demo if none is given.
        out: JSON file for the numbers.
    """
    from .evaluation.order import order as run
    from .evaluation.order import read_opposites

    run(runs, control=control or (), opposites=read_opposites(opposites) if opposites else None, out=out)
    return 0


def scan(given: Given, *, deep: bool = False, processes: int | None = None, out: str | None = None) -> int:
    """Look at every video of the lists, and print what is missing, broken, short or there twice.

    Args:
        deep: decode every frame; otherwise packets are counted and the first frame is decoded.
        processes: that decode; one for each processor if not given.
        out: JSON file for the whole report; in the run folder scan.json, or scan_SPLIT.json of each split, if not given.
    """
    from .data.scan import scan as run

    splits = _splits(given)
    if len(splits) > 1 and out:
        raise ValueError("--out is one file, but there are several splits; leave it out, and each has its own")
    status = 0
    for split, config in splits.items():
        output = str(Path(config.run_dir) / f"scan_{split}.json") if split else out
        status |= run(config, deep=deep, processes=processes, output=output)
    return status


def shards(
    given: Given,
    folder: str,
    *,
    which: Literal["train", "test"] = "train",
    per_shard: int = 1000,
    shuffle: bool | None = None,
) -> int:
    """Pack the videos of a list into WebDataset shards, as they are.

    Args:
        folder: to write; it must be empty or not there.
        which: train or test.
        per_shard: videos of a shard.
        shuffle: pack them in random order, as training from shards needs it; by default those of train.
    """
    from .data.pack import pack
    from .settings import from_dict

    config = from_dict(given.values, "the configuration")
    return pack(config, folder=folder, which=which, per_shard=per_shard, shuffle=shuffle)


def few_shot_list(given: Given, *, out: str, shots: list[int] | None = None, base_to_novel: bool = False) -> int:
    """Draw few-shot lists from the training list, by the seed.

    Args:
        out: folder to write; lists are named after the training list, as train1_few_shot_2.txt.
        shots: videos of each class; 2, 4, 8 and 16 if none is given.
        base_to_novel: also divide the classes in two, and write their labels, few-shot lists and test lists, as labels_base.csv.
    """
    from .data.few_shot import base_and_novel, draw_few_shot, of_classes, write_classes, write_list
    from .data.lists import read_labels
    from .data.videos import read_videos

    written = []
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for config in _splits(given).values():
        data = config.data
        classes, numbers = read_labels(data.labels), shots or [2, 4, 8, 16]
        train_list = read_videos(data.train_list, data.root, classes).samples
        stem, seed = Path(data.train_list).stem, config.seed
        for number in numbers:
            written.append(folder / f"{stem}_few_shot_{number}.txt")
            write_list(written[-1], draw_few_shot(train_list, classes, number, seed), data.root)
        if not base_to_novel:
            continue
        test_list = read_videos(data.test_list, data.root, classes).samples
        for part, labels in zip(("base", "novel"), base_and_novel(train_list, len(classes)), strict=True):
            names = [classes[label] for label in labels]
            written += [folder / f"labels_{part}.csv", folder / f"test_{part}.txt"]
            write_classes(written[-2], names)
            write_list(written[-1], of_classes(test_list, labels), data.root)
            for number in numbers if part == "base" else ():
                written.append(folder / f"train_base_few_shot_{number}.txt")
                write_list(written[-1], draw_few_shot(of_classes(train_list, labels), names, number, seed), data.root)
    for path in written:
        print(path)
    return 0


# what the weights of a checkpoint are for
MODEL = ("name", "quick_gelu", "embed_dim", "vision", "text", "frames", "attention", "window", "sink", "placement", "layers",
         "temporal_embedding")  # fmt: skip
BOUND = tuple(f"model.{name}" for name in MODEL)
PIXELS = ("augment.size", "augment.short_side", "augment.mean", "augment.std")
TEXTS = ("data.labels", "data.prompts", "data.kinds", "data.per_kind", "data.templates")
VIEWS = ("test.clips", "test.crops")
LISTS = ("data.root", "data.test_list", "data.splits", "data.num_workers", "data.cache")
EVALUATION = (*LISTS, *TEXTS, *PIXELS, *BOUND, "test.", "train.precision")
VIDEOS = ("data.root", "data.train_list", "data.test_list", "data.splits", "data.labels")

COMMANDS: dict[str, Command | Group] = {
    "demo": Command(demo),
    "train": Command(train, ("run_dir", "seed", "data.", "model.", "augment.", "train.", "test.")),
    "eval": Command(evaluate, EVALUATION),
    "predict": Command(model_commands.predict, (*TEXTS, *PIXELS, *BOUND, *VIEWS)),
    "scan": Command(scan, (*VIDEOS, "run_dir", "model.frames")),
    "shards": Command(shards, (*VIDEOS, "seed")),
    "few-shot-list": Command(few_shot_list, (*VIDEOS, "seed")),
    "wise-ft": Command(wise_ft, (*EVALUATION, "model.pretrained")),
    "order": Command(order),
    "features": Command(model_commands.features, (*PIXELS, *BOUND, *VIEWS)),
    "retrieve": Command(model_commands.retrieve, (*PIXELS, *BOUND, *VIEWS)),
    "convert": Command(model_commands.convert, (*TEXTS, *PIXELS, *BOUND)),
    "export": Command(model_commands.export, (*TEXTS, *PIXELS, *BOUND)),
    "push": Command(model_commands.push, (*TEXTS, *PIXELS, *BOUND)),
    "prompts": {
        "make": Command(prompt_commands.make),
        "check": Command(prompt_commands.check),
        "show": Command(prompt_commands.show),
        "confusion": Command(prompt_commands.confusion),
    },
}

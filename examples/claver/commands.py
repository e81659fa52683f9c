"""The commands of `claver_k400.py`: what each is given, runs and prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import DEMO_CHECKPOINT, prompt_command
from .command_line import Command, Given, Group

if TYPE_CHECKING:
    from .config import Config
    from .evaluate import Evaluation
    from .model import Claver

__all__ = ["COMMANDS", "Loaded", "open_checkpoint"]

# ---- checkpoints and the settings that are given with them --------------------------------------------------------------

# what the weights of a checkpoint are for
MODEL = ("name", "quick_gelu", "embed_dim", "vision", "text", "frames", "attention", "window", "sink", "placement", "layers",
         "temporal_embedding")  # fmt: skip
PIXELS = ("augment.size", "augment.short_side", "augment.mean", "augment.std")
TEXTS = ("data.labels", "data.prompts", "data.kinds", "data.per_kind", "data.templates")
BOUND = tuple(f"model.{name}" for name in MODEL)


class Loaded(NamedTuple):
    """A checkpoint that is ready: its model in evaluation mode, what else is in it, and the configuration that holds."""

    model: Claver
    content: dict[str, Any]
    config: Config


def open_checkpoint(path: str, given: Given, *, force: bool = False) -> Loaded:
    """The model of a checkpoint, under its own settings with those that are given laid over them.

    Raises:
        CheckpointError: no checkpoint, or one whose model is another than the settings say and `force` is not set.
    """
    from .checkpoint import CheckpointError, load_checkpoint, load_model
    from .settings import from_dict, merge

    if path == DEMO_CHECKPOINT and not Path(path).exists():
        raise ValueError(f"{path}: not there yet; run the demo first, or pass --checkpoint")
    content = load_checkpoint(path)
    stored = content.get("config", {})
    if not stored and not given.values:
        raise CheckpointError(f"{path}: an official checkpoint does not say what it is; pass --config")
    asked = given.values.get("model", {})
    before = from_dict(stored, path).model
    different = [
        f"{name} is {getattr(before, name)!r} there, {asked[name]!r} was asked for"
        for name in MODEL
        if stored and name in asked and asked[name] != getattr(before, name)
    ]
    if different and not force:
        raise CheckpointError(
            f"{path}: its weights are of another model: {'; '.join(different)}. Leave that out, or pass --force to try"
        )
    config = from_dict(merge(stored, given.values), path)
    model, content = load_model(path, config)
    return Loaded(model, content, config)


# ---- commands -----------------------------------------------------------------------------------------------------------


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


def train(given: Given, *, resume: bool = False) -> int:
    """Train on videos, and evaluate the best checkpoint.

    Args:
        resume: go on with the run in the run folder.
    """
    from .checkpoint import load_model
    from .settings import from_dict
    from .train import run_evaluation
    from .train import train as run_training

    config = from_dict(given.values, "the configuration")
    run = run_training(config, resume=resume)
    model, content = load_model(run.folder / "best.pt")
    _print_evaluation(run_evaluation(config, model, run.tokens), f"best.pt, of epoch {content['epoch']}", run.folder)
    return 0


def evaluate(given: Given, *, checkpoint: str, force: bool = False) -> int:
    """Evaluate a checkpoint multi-view, under the settings of its training unless others are given.

    Args:
        checkpoint: of this program, or an official one.
        force: take the settings that are given even where the weights were trained under others.
    """
    from accelerate import PartialState

    from .prompt_choice import choose_prompts_of_checkpoint
    from .train import run_evaluation, tokens_of

    model, content, config = open_checkpoint(checkpoint, given, force=force)
    choice = choose_prompts_of_checkpoint(config, content)
    PartialState().print(f"texts of {len(choice.classes)} classes: {choice.description}")
    _print_evaluation(run_evaluation(config, model, tokens_of(choice.prompts, model)), checkpoint)
    return 0


def predict(
    given: Given,
    videos: list[str],
    *,
    checkpoint: str = DEMO_CHECKPOINT,
    labels: str | None = None,
    top: int = 5,
    force: bool = False,
) -> int:
    """Print the likeliest classes of video files.

    Args:
        videos: files.
        checkpoint: of this program, or an official one.
        labels: CSV of id,name of other classes than those of the training.
        top: classes to print.
        force: take the settings that are given even where the weights were trained under others.
    """
    import torch

    from .data import read_labels
    from .evaluate import likeliest, predict_files
    from .prompt_choice import choose_prompts_of_checkpoint, choose_prompts_of_others
    from .train import tokens_of

    model, content, config = open_checkpoint(checkpoint, given, force=force)
    if labels:
        choice = choose_prompts_of_others(config, read_labels(labels), keep="data.prompts" in given.typed)
    else:
        choice = choose_prompts_of_checkpoint(config, content, need_labels=False)
    print(f"texts of {len(choice.classes)} classes: {choice.description}", file=sys.stderr)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    results = predict_files(
        model,
        videos,
        tokens_of(choice.prompts, model),
        config.model.frames,
        config.augment,
        clips=config.test.clips,
        crops=config.test.crops,
    )
    for path, result in zip(videos, results, strict=True):
        print(path)
        if isinstance(result, str):
            print(f"  error: {result}")
            continue
        for name, probability in likeliest(result, choice.classes, top):
            print(f"  {probability:6.1%}  {name}")
    return int(any(isinstance(result, str) for result in results))


def _print_evaluation(evaluation: Evaluation, what: str, folder: Path | None = None) -> None:
    from accelerate import PartialState

    result = {
        "checkpoint": what,
        "top1": evaluation.top(1),
        "top5": evaluation.top(5),
        "videos": len(evaluation.labels),
    }
    if PartialState().is_main_process:
        print(json.dumps(result))
        if folder:
            (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")


LISTS = ("data.root", "data.test_list", "data.num_workers", "data.cache")
COMMANDS: dict[str, Command | Group] = {
    "demo": Command(demo),
    "train": Command(train, ("run_dir", "seed", "data.", "model.", "augment.", "train.", "test.")),
    "eval": Command(evaluate, (*LISTS, *TEXTS, *PIXELS, *BOUND, "test.", "train.precision")),
    "predict": Command(predict, (*TEXTS, *PIXELS, *BOUND, "test.clips", "test.crops")),
    "prompts": {
        "make": Command(prompt_command.make),
        "check": Command(prompt_command.check),
        "show": Command(prompt_command.show),
        "confusion": Command(prompt_command.confusion),
    },
}

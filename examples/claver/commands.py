"""The commands of `claver_k400.py`: what each is given, runs and prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import DEMO_CHECKPOINT, check_demo_checkpoint, prompt_command
from .command_line import Command, Given, Group

if TYPE_CHECKING:
    from .config import Config
    from .evaluate import Evaluation
    from .model import Claver
    from .prompt_choice import Choice

__all__ = ["COMMANDS", "Loaded", "open_checkpoint", "texts_of"]

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
        ValueError: settings that are wrong; or the demo's checkpoint, which is not there yet.
    """
    from .checkpoint import CheckpointError, load_checkpoint, load_model
    from .settings import from_dict, merge

    check_demo_checkpoint(path)
    settings = merge(load_checkpoint(path)["config"], given.values)
    if "attention" not in settings["model"]:
        raise CheckpointError(
            f"{path}: an official checkpoint that does not say which mask it has; pass --model.attention"
        )
    config = from_dict(settings, path)
    model, content = load_model(path, config, force=force)
    return Loaded(model.to("cuda" if torch.cuda.is_available() else "cpu"), content, config)


def texts_of(loaded: Loaded, given: Given, classes: list[str] | None = None, *, need_labels: bool = False) -> Choice:
    """The texts that a checkpoint's videos are compared with: of `classes`, of the file of labels if one is given, or its own."""
    from accelerate import PartialState

    from .lists import read_labels
    from .prompt_choice import choose_prompts_of_checkpoint, choose_prompts_of_others

    if classes is None and "data.labels" in given.typed and not need_labels:
        classes = read_labels(loaded.config.data.labels)
    if classes is not None and classes != loaded.content.get("classes"):
        choice = choose_prompts_of_others(loaded.config, classes, keep="data.prompts" in given.typed)
    else:
        choice = choose_prompts_of_checkpoint(loaded.config, loaded.content, need_labels=need_labels)
    PartialState().print(f"texts of {len(choice.classes)} classes: {choice.description}", file=sys.stderr)
    return choice


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


def train(given: Given, *, resume: bool = False, init_from: str | None = None) -> int:
    """Train on videos, and evaluate the best checkpoint.

    Args:
        resume: go on with the run in the run folder.
        init_from: checkpoint, ours or the authors', whose weights are those of step 0.
    """
    from .checkpoint import load_model
    from .run_folder import BEST
    from .settings import from_dict
    from .train import run_evaluation
    from .train import train as run_training

    config = from_dict(given.values, "the configuration")
    run = run_training(config, resume=resume, init_from=init_from)
    model, content = load_model(run.folder / BEST)
    _print_evaluation(run_evaluation(config, model, run.tokens), f"{BEST}, of epoch {content['epoch']}", run.folder)
    return 0


def evaluate(given: Given, *, checkpoint: str, force: bool = False) -> int:
    """Evaluate a checkpoint multi-view, under the settings of its training unless others are given.

    Args:
        checkpoint: of this program, or an official one.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .train import run_evaluation, tokens_of

    loaded = open_checkpoint(checkpoint, given, force=force)
    choice = texts_of(loaded, given, need_labels=True)
    _print_evaluation(run_evaluation(loaded.config, loaded.model, tokens_of(choice.prompts, loaded.model)), checkpoint)
    return 0


def predict(
    given: Given,
    videos: list[str],
    *,
    checkpoint: str = DEMO_CHECKPOINT,
    classes: list[str] | None = None,
    top: int = 5,
    json: bool = False,
    annotate: str | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> int:
    """Print the likeliest classes of videos.

    Args:
        videos: files, folders, and patterns such as "clips/*.mp4".
        checkpoint: of this program, or an official one.
        classes: names in place of those of the training, as "juggling" "waving"; --data.labels takes a CSV of id,name.
        top: classes to print.
        json: print a JSON object a line.
        annotate: mp4 file to write the frames to, over the likeliest classes so far.
        overwrite: replace that file.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .predict import predict as run

    loaded = open_checkpoint(checkpoint, given, force=force)
    choice = texts_of(loaded, given, classes)
    return run(
        videos,
        model=loaded.model,
        config=loaded.config,
        classes=choice.classes,
        prompts=choice.prompts,
        top=top,
        json_lines=json,
        annotated=annotate,
        overwrite=overwrite,
    )


def export(
    given: Given,
    *,
    checkpoint: str,
    out: str,
    classes: list[str] | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> int:
    """Write the two towers as programs of torch.export, and compare them with the model.

    Args:
        checkpoint: of this program, or an official one.
        out: folder to write.
        classes: names in place of those of the training; --data.labels takes a CSV of id,name.
        overwrite: replace what was exported there before.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .export import export as run

    loaded = open_checkpoint(checkpoint, given, force=force)
    choice = texts_of(loaded, given, classes)
    folder = run(
        loaded.model, out, config=loaded.config, classes=choice.classes, prompts=choice.prompts, overwrite=overwrite
    )
    print(f"exported to {folder}")
    return 0


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
    "export": Command(export, (*TEXTS, *PIXELS, *BOUND)),
    "prompts": {
        "make": Command(prompt_command.make),
        "check": Command(prompt_command.check),
        "show": Command(prompt_command.show),
        "confusion": Command(prompt_command.confusion),
    },
}

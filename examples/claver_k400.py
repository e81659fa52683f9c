"""CLAVER on Kinetics-400, or on any labelled videos: demo, train, eval, predict, prompts. Without arguments: demo."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claver import DEMO_CHECKPOINT
from claver.prompt_command import add_commands

if TYPE_CHECKING:
    from claver.config import Config
    from claver.evaluate import Evaluation
    from claver.model import Claver

CONFIGS = Path(__file__).parent / "claver" / "configs"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 1 for an error that the user can mend, which is printed without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run_demo(options: argparse.Namespace) -> int:
    from claver.demo import demo

    demo(
        options.run_dir,
        seed=options.seed,
        num_train=options.num_train,
        num_test=options.num_test,
        epochs=options.epochs,
        rotary=options.rotary,
    )
    return 0


def run_train(options: argparse.Namespace) -> int:
    from claver.checkpoint import load_model
    from claver.train import run_evaluation, train

    config = _config(options)
    run = train(config, resume=options.resume)
    model, content = load_model(run.folder / "best.pt")
    _print_evaluation(run_evaluation(config, model, run.tokens), f"best.pt, of epoch {content['epoch']}", run.folder)
    return 0


def run_eval(options: argparse.Namespace) -> int:
    from accelerate import PartialState
    from claver.prompt_choice import choose_prompts_of_checkpoint
    from claver.train import run_evaluation, tokens_of

    model, content, config = _load(options)
    choice = choose_prompts_of_checkpoint(config, content)
    PartialState().print(f"texts of {len(choice.classes)} classes: {choice.description}")
    _print_evaluation(run_evaluation(config, model, tokens_of(choice.prompts, model)), options.checkpoint)
    return 0


def run_predict(options: argparse.Namespace) -> int:
    import torch
    from claver.data import read_labels
    from claver.evaluate import likeliest, predict_files
    from claver.prompt_choice import choose_prompts_of_checkpoint, choose_prompts_of_others
    from claver.train import tokens_of

    if options.checkpoint == DEMO_CHECKPOINT and not Path(DEMO_CHECKPOINT).exists():
        raise ValueError(f"{DEMO_CHECKPOINT}: not there yet; run the demo first, or pass --checkpoint")
    model, content, config = _load(options)
    if options.labels:
        named = any(setting.startswith("data.prompts=") for setting in options.set or [])
        choice = choose_prompts_of_others(config, read_labels(options.labels), keep=named)
    else:
        choice = choose_prompts_of_checkpoint(config, content, need_labels=False)
    print(f"texts of {len(choice.classes)} classes: {choice.description}", file=sys.stderr)
    classes = choice.classes
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    results = predict_files(
        model,
        options.videos,
        tokens_of(choice.prompts, model),
        config.model.frames,
        config.augment,
        clips=config.test.clips,
        crops=config.test.crops,
    )
    for path, result in zip(options.videos, results, strict=True):
        print(path)
        if isinstance(result, str):
            print(f"  error: {result}")
            continue
        for name, probability in likeliest(result, classes, options.top):
            print(f"  {probability:6.1%}  {name}")
    return int(any(isinstance(result, str) for result in results))


def _config(options: argparse.Namespace) -> Config:
    from claver.config import load_config

    overrides = list(options.set or [])
    if getattr(options, "run_dir", None):
        overrides.append(f"run_dir={json.dumps(options.run_dir)}")
    named = CONFIGS / f"{options.config}.yaml"
    return load_config(named if named.exists() else options.config, overrides)


def _load(options: argparse.Namespace) -> tuple[Claver, dict[str, Any], Config]:
    """The model of `--checkpoint`, what else is in it, and its configuration or that of `--config`, with `--set` applied."""
    from claver.checkpoint import load_model
    from claver.config import from_dict, override

    config = _config(options) if options.config else None
    model, content = load_model(options.checkpoint, config)
    if config is None:
        config = from_dict(override(content["config"], options.set or []), options.checkpoint)
    return model, content, config


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(title="commands")

    demo = commands.add_parser(
        "demo", help="write videos of motions, train on them from scratch, show what was learned"
    )
    train = commands.add_parser("train", help="train on lists of videos")
    evaluate = commands.add_parser("eval", help="evaluate a checkpoint multi-view")
    predict = commands.add_parser("predict", help="print the likeliest classes of video files")

    prompts = commands.add_parser("prompts", help="make, check and show the sentences that stand for classes")
    add_commands(prompts)

    for command, run in ((demo, run_demo), (train, run_train), (evaluate, run_eval), (predict, run_predict)):
        command.set_defaults(run=run)
    for command in (parser, demo):  # a default of the second would overwrite what the first was given
        defaults = {"run_dir": "runs/demo", "seed": 0, "num_train": 800, "num_test": 240, "epochs": 24, "rotary": False}
        unless = (lambda name, values=defaults: values[name]) if command is parser else (lambda name: argparse.SUPPRESS)
        command.add_argument("--run-dir", default=unless("run_dir"), help="folder for everything it writes")
        command.add_argument("--seed", type=int, default=unless("seed"))
        command.add_argument("--num-train", type=int, default=unless("num_train"), help="training videos")
        command.add_argument("--num-test", type=int, default=unless("num_test"), help="held-out videos")
        command.add_argument("--epochs", type=int, default=unless("epochs"))
        command.add_argument(
            "--rotary",
            action="store_true",
            default=unless("rotary"),
            help="relative time and a window, for streams without an end",
        )
    parser.set_defaults(run=run_demo)

    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    for command, needed in ((train, True), (evaluate, False), (predict, False)):
        command.add_argument("--config", required=needed, help=f"a YAML file, or one of {known}")
        command.add_argument(
            "--set", action="extend", nargs="+", metavar="SECTION.KEY=VALUE", help="change the configuration"
        )
    train.add_argument("--run-dir", help="folder for everything it writes")
    train.add_argument("--resume", action="store_true", help="go on from last.pt in the run folder")
    evaluate.add_argument("--checkpoint", required=True, help="of this program, or an official one (with --config)")
    predict.add_argument("videos", nargs="+", metavar="VIDEO")
    predict.add_argument("--checkpoint", default=DEMO_CHECKPOINT, help="default: %(default)s")
    predict.add_argument("--labels", help="CSV of id,name: other classes than those of the training")
    predict.add_argument("--top", type=int, default=5, help="classes to print")
    return parser


if __name__ == "__main__":
    sys.exit(main())

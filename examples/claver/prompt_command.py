"""The command `prompts`: make, check and show interpretive prompts, and draw which classes' texts are alike."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["add_commands"]


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Adds `make`, `check`, `show` and `confusion`; each sets `run`, from the options to the status."""
    commands = parser.add_subparsers(title="commands", required=True)

    make = commands.add_parser(
        "make",
        help="write sentences for your classes with a language model",
        description="Writes sentences for every class of a list with a language model, checks them, and asks again for "
        "those that are wrong. A run that was cut off goes on where it stopped. The key of an endpoint is read from "
        "the environment variable OPENAI_API_KEY.",
    )
    make.add_argument("--classes", required=True, help="CSV of id,name, or a text file with a name on each line")
    make.add_argument("--out", required=True, help="prompt file to write, or to go on with")
    make.add_argument("--model", help="the endpoint's name of the model")
    make.add_argument("--base-url", metavar="URL", help="endpoint with OpenAI's interface, as http://localhost:8000/v1")
    make.add_argument("--local", metavar="FOLDER", help="a Hugging Face model on this machine, in place of an endpoint")
    make.add_argument("--kinds", nargs="+", metavar="KIND", help="default: all four")
    make.add_argument(
        "--per-kind", default=5, help="sentences of each kind, default: %(default)s", type=int, metavar="N"
    )
    make.add_argument("--temperature", type=float, default=0.9, help="default: %(default)s")
    make.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--max-tokens", default=2048, help="of a reply, default: %(default)s", type=int, metavar="N")
    make.add_argument(
        "--concurrency", default=4, help="requests at a time, default: %(default)s", type=int, metavar="N"
    )
    make.add_argument("--attempts", default=5, help="replies for a class until it is given up", type=int, metavar="N")
    make.add_argument("--patience", default=6, help="times to ask again when there is no answer", type=int, metavar="N")
    make.add_argument("--backoff", type=float, default=1.0, help="seconds before the first of these; then doubled")
    make.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for an answer")
    make.add_argument("--price-in", type=float, help="price of a million tokens read, to record the cost")
    make.add_argument("--price-out", type=float, help="price of a million tokens written")
    make.set_defaults(run=run_make)

    check = commands.add_parser(
        "check", help="look for faults in prompt files", description="Status 1 if there is a finding."
    )
    check.add_argument("files", nargs="*", metavar="FILE", help="default: those that are shipped")
    check.add_argument("--classes", help="CSV or text file of the classes that the files must have")
    check.add_argument(
        "--per-kind", help="sentences of each kind, default: what the file says, or 5", type=int, metavar="N"
    )
    check.add_argument("--share", type=float, help="of a class's words that another may have in a kind")
    check.set_defaults(run=run_check)

    show = commands.add_parser("show", help="print the sentences of a class")
    show.add_argument("name", metavar="CLASS")
    show.add_argument("--file", help="default: all that are shipped")
    show.set_defaults(run=run_show)

    confusion = commands.add_parser("confusion", help="draw which classes' texts a CLIP finds alike")
    confusion.add_argument(
        "file", metavar="FILE", help="a prompt file, or the name of a data set whose prompts are shipped"
    )
    confusion.add_argument("--model", default="ViT-B-32", help="an open_clip model, default: %(default)s")
    confusion.add_argument(
        "--pretrained", metavar="TAG_OR_FILE", default="openai", help="its weights; none: random ones"
    )
    confusion.add_argument("--checkpoint", help="a checkpoint of this program, in place of an open_clip model")
    confusion.add_argument("--out", default="confusion.png", help="picture, default: %(default)s")
    confusion.add_argument("--top", default=10, help="pairs to print", type=int, metavar="N")
    confusion.set_defaults(run=run_confusion)


def run_make(options: argparse.Namespace) -> int:
    from .prompt_maker import MakerSettings, make_prompts
    from .prompt_models import Endpoint, TextModel, local_model
    from .prompts import KINDS

    settings = MakerSettings(
        kinds=tuple(options.kinds or KINDS),
        per_kind=options.per_kind,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        max_tokens=options.max_tokens,
        concurrency=options.concurrency,
        attempts=options.attempts,
        patience=options.patience,
        backoff=options.backoff,
        price_in=options.price_in,
        price_out=options.price_out,
    )
    if (options.local is None) == (options.model is None):
        raise ValueError("give either --model (and --base-url), or --local")
    names = _names(options.classes)
    model: TextModel
    if options.local:
        model = local_model(options.local)
    else:
        model = Endpoint(options.model, options.base_url, options.timeout)
    try:
        made = make_prompts(names, options.out, model, settings)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {options.out}", file=sys.stderr)
        return 130
    usage = ", ".join(f"{value:g} {key.replace('_', ' ')}" for key, value in made.usage.items())
    print(f"{options.out}: {made.made} classes made, {made.found} found there, {len(made.failed)} failed; {usage}")
    for name, failure in made.failed.items():
        print(f"  {name}: {failure}", file=sys.stderr)
    return int(bool(made.failed))


def run_check(options: argparse.Namespace) -> int:
    from .prompt_check import SHARE, check_files, summary
    from .prompt_files import DATASETS, read_prompt_file, shipped_file

    files = [read_prompt_file(path) for path in options.files or map(shipped_file, DATASETS)]
    share = SHARE if options.share is None else options.share
    classes = _names(options.classes) if options.classes else None
    findings = check_files(files, classes, per_kind=options.per_kind, share=share)
    for rule, where, detail in findings:
        line = f"{rule}: {where}: {detail}"
        print("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line))
    print(summary(files))
    counted = ", ".join(f"{count} {rule}" for rule, count in Counter(finding.rule for finding in findings).items())
    print(f"{len(findings)} findings: {counted}" if findings else "clean")
    return int(bool(findings))


def run_show(options: argparse.Namespace) -> int:
    from .prompt_check import dataset_of
    from .prompt_files import DATASETS, class_key, load_groups, read_prompt_file, shipped_file
    from .prompt_rules import num_tokens
    from .prompts import load_tokenizer

    encoder, found = load_tokenizer(), False
    for path in [options.file] if options.file else map(shipped_file, DATASETS):
        file = read_prompt_file(path)
        for name in file.entries:
            if class_key(name) != class_key(options.name):
                continue
            found, member = True, (dataset_of(file), name)
            print(f"{name}, of {file.title}")
            for group, members in load_groups().items():
                if member in members:
                    print(
                        f"  group {group}: {', '.join(dict.fromkeys(other for _, other in members if other != name))}"
                    )
            for kind, sentences in file.entries[name].items():
                print(f"  {kind}")
                for text in sentences:
                    print(f"    {num_tokens(text, encoder):3}  {text}")
    if not found:
        raise ValueError(f"no class {options.name!r} in {options.file or 'the files that are shipped'}")
    return 0


def run_confusion(options: argparse.Namespace) -> int:
    from .prompt_confusion import clip_encoder, compare_texts, plot_texts, summarize
    from .prompt_files import DATASETS, load_prompts, read_prompt_file, shipped_file

    file = read_prompt_file(shipped_file(options.file) if options.file in DATASETS else options.file)
    names = _by_group(file)
    entries = load_prompts(file.path, names)
    pretrained = None if options.pretrained in ("none", "") else options.pretrained
    title, encode = clip_encoder(options.model, pretrained, options.checkpoint)
    cosines = compare_texts(entries, encode)
    print(summarize(names, cosines, options.top))
    plot_texts(names, cosines, options.out, f"{file.title}, {len(names)} classes by group; text tower of {title}")
    print(f"drawn in {options.out}")
    return 0


def _names(path: str) -> list[str]:
    """Class names from a CSV file of id,name or from the lines of a text file."""
    from .data import read_labels

    if Path(path).suffix.lower() == ".csv":
        return read_labels(path)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: no class names in it")
    return names


def _by_group(file: Any) -> list[str]:
    """The classes of a file with similar ones side by side, if they are known."""
    from .prompt_check import dataset_of
    from .prompt_files import load_groups

    dataset = dataset_of(file)
    order = {
        name: i for i, (_, name) in enumerate(m for group in load_groups().values() for m in group if m[0] == dataset)
    }
    return sorted(file.entries, key=lambda name: order.get(name, len(order)))

"""The command `prompts`: make, check and show interpretive prompts, and draw which classes' texts are alike."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .prompts.files import PromptFile

__all__ = ["check", "confusion", "make", "show"]


def make(
    *,
    classes: str,
    out: str,
    model: str | None = None,
    base_url: str | None = None,
    local: str | None = None,
    kinds: list[str] | None = None,
    per_kind: int = 5,
    temperature: float = 0.9,
    top_p: float = 0.95,
    seed: int = 0,
    max_tokens: int = 2048,
    concurrency: int = 4,
    attempts: int = 5,
    patience: int = 6,
    backoff: float = 1.0,
    timeout: float = 120.0,
    price_in: float | None = None,
    price_out: float | None = None,
) -> int:
    """Write sentences for your classes with a language model, check them, and ask again for those that are wrong.

    A run that was cut off goes on where it stopped. The key of an endpoint is read from OPENAI_API_KEY.

    Args:
        classes: CSV of id,name, or a text file with a name on each line.
        out: prompt file to write, or to go on with.
        model: the endpoint's name of the model.
        base_url: endpoint with OpenAI's interface, as http://localhost:8000/v1.
        local: folder of a Hugging Face model on this machine, in place of an endpoint.
        kinds: of sentences; all four if none is given.
        per_kind: sentences of each kind.
        temperature: of the draw.
        top_p: of the draw.
        seed: of the draw.
        max_tokens: of a reply.
        concurrency: requests at a time.
        attempts: replies for a class until it is given up.
        patience: times to ask again when there is no answer.
        backoff: seconds before the first of these; then doubled.
        timeout: seconds to wait for an answer.
        price_in: price of a million tokens read, to record the cost.
        price_out: price of a million tokens written.
    """
    from .prompts.build import KINDS
    from .prompts.maker import MakerSettings, make_prompts
    from .prompts.models import Endpoint, TextModel, local_model

    settings = MakerSettings(
        kinds=tuple(kinds or KINDS),
        per_kind=per_kind,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        concurrency=concurrency,
        attempts=attempts,
        patience=patience,
        backoff=backoff,
        price_in=price_in,
        price_out=price_out,
    )
    if (local is None) == (model is None):
        raise ValueError("give either --model (and --base_url), or --local")
    names = _names(classes)
    writer: TextModel = local_model(local) if local else Endpoint(str(model), base_url, timeout)
    try:
        made = make_prompts(names, out, writer, settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command goes on with {out}") from None
    usage = ", ".join(f"{value:g} {key.replace('_', ' ')}" for key, value in made.usage.items())
    print(f"{out}: {made.made} classes made, {made.found} found there, {len(made.failed)} failed; {usage}")
    for name, failure in made.failed.items():
        print(f"  {name}: {failure}", file=sys.stderr)
    return int(bool(made.failed))


def check(
    files: list[str] | None = None,
    *,
    classes: str | None = None,
    per_kind: int | None = None,
    share: float | None = None,
) -> int:
    """Look for faults in prompt files; status 1 if there is a finding.

    Args:
        files: those that are shipped if none is given.
        classes: CSV or text file of the classes that the files must have.
        per_kind: sentences of each kind; what the file says, or 5, if not given.
        share: of a class's words that another may have in a kind.
    """
    from .prompts.check import SHARE, check_files, summary
    from .prompts.files import DATASETS, read_prompt_file, shipped_file

    found = [read_prompt_file(path) for path in files or map(shipped_file, DATASETS)]
    names = _names(classes) if classes else None
    findings = check_files(found, names, per_kind=per_kind, share=SHARE if share is None else share)
    for rule, where, detail in findings:
        line = f"{rule}: {where}: {detail}"
        print("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line))
    print(summary(found))
    counted = ", ".join(f"{count} {rule}" for rule, count in Counter(finding.rule for finding in findings).items())
    print(f"{len(findings)} findings: {counted}" if findings else "clean")
    return int(bool(findings))


def show(name: str, *, file: str | None = None) -> int:
    """Print the sentences of a class.

    Args:
        name: of the class.
        file: a prompt file; all that are shipped if none is given.
    """
    from .class_names import class_key
    from .prompts.build import load_tokenizer
    from .prompts.check import dataset_of
    from .prompts.files import DATASETS, load_groups, read_prompt_file, shipped_file
    from .prompts.rules import num_tokens

    encoder, found = load_tokenizer(), False
    for path in [file] if file else map(shipped_file, DATASETS):
        prompts = read_prompt_file(path)
        for each in prompts.entries:
            if class_key(each) != class_key(name):
                continue
            found, member = True, (dataset_of(prompts), each)
            print(f"{each}, of {prompts.title}")
            for group, members in load_groups().items():
                if member in members:
                    print(
                        f"  group {group}: {', '.join(dict.fromkeys(other for _, other in members if other != each))}"
                    )
            for kind, sentences in prompts.entries[each].items():
                print(f"  {kind}")
                for text in sentences:
                    print(f"    {num_tokens(text, encoder):3}  {text}")
    if not found:
        raise ValueError(f"no class {name!r} in {file or 'the files that are shipped'}")
    return 0


def confusion(
    file: str,
    *,
    model: str = "ViT-B-32",
    pretrained: str | None = "openai",
    checkpoint: str | None = None,
    out: str = "confusion.png",
    top: int = 10,
) -> int:
    """Draw which classes' texts a CLIP finds alike.

    Args:
        file: a prompt file, or the name of a data set whose prompts are shipped.
        model: of open_clip.
        pretrained: its weights, a tag or a file; null for random ones.
        checkpoint: a checkpoint of this program, in place of an open_clip model.
        out: picture.
        top: pairs to print.
    """
    from .evaluation.prompt_confusion import clip_encoder, compare_texts, plot_texts, summarize
    from .prompts.files import DATASETS, load_prompts, read_prompt_file, shipped_file

    prompts = read_prompt_file(shipped_file(file) if file in DATASETS else file)
    names = _by_group(prompts)
    entries = load_prompts(prompts.path, names)
    title, encode = clip_encoder(model, None if pretrained in ("none", "") else pretrained, checkpoint)
    cosines = compare_texts(entries, encode)
    print(summarize(names, cosines, top))
    plot_texts(names, cosines, out, f"{prompts.title}, {len(names)} classes by group; text tower of {title}")
    print(f"drawn in {out}")
    return 0


def _names(path: str) -> list[str]:
    """Class names from a CSV file of id,name or from the lines of a text file."""
    from .data.lists import read_labels

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


def _by_group(file: PromptFile) -> list[str]:
    """The classes of a file with similar ones side by side, if they are known."""
    from .prompts.check import dataset_of
    from .prompts.files import load_groups

    dataset = dataset_of(file)
    order = {
        name: i for i, (_, name) in enumerate(m for group in load_groups().values() for m in group if m[0] == dataset)
    }
    return sorted(file.entries, key=lambda name: order.get(name, len(order)))

"""Text prompts for action classes: templates, class names, the sentences of interpretive prompts, and their tokens.

A class has A prompts: one for each template, then the sentences of the interpretive kinds (CLAVER, arXiv 2502.03549).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ACTION_TEMPLATES",
    "KINDS",
    "MOTION_PROMPTS",
    "OBJECT_TEMPLATES",
    "Interpretive",
    "build_prompts",
    "clean_class_name",
    "draw_prompts",
    "load_prompts",
    "load_tokenizer",
    "tokenize",
]

KINDS = ("decomposition", "body_parts", "synonyms", "scene")
"""Kinds of interpretive prompts: simple steps of an action, what the parts do, other words for it, where it happens."""

SENTENCES_PER_KIND = 5

Interpretive = dict[str, dict[str, list[str]]]
"""`{class name: {kind: sentences}}`, the content of a prompt file."""

ACTION_TEMPLATES = (
    "a video of a person {}.",
    "a video clip that shows {}.",
    "a recording of someone {}.",
    "a person is {}.",
    "people who are {}.",
    "the action in this video is {}.",
    "an example of {}.",
    "a close-up of a person {}.",
    "a shaky phone video of {}.",
    "footage of {} filmed from a distance.",
    "a short film about {}.",
    "what is happening here is {}.",
    "someone shows how {} is done.",
    "a person in the middle of {}.",
    "a beginner at {}.",
    "we can see {} in these frames.",
)

OBJECT_TEMPLATES = ("{}.", "an object {}.")
"""For `claver.motions`; short, as a text tower that starts from nothing has to learn to look past every other word."""

MOTION_PROMPTS = Path(__file__).parent / "prompts" / "motions.json"
"""Interpretive prompts for the classes of `claver.motions`."""

_WORD = re.compile(r"[A-Z]{2,}(?![a-z])|[A-Z]?[a-z]+|[A-Z]|[^A-Za-z]+")


def clean_class_name(name: str) -> str:
    """Spells a class name as words: `ApplyEyeMakeup`, `apply_eye_makeup` -> `apply eye makeup`.

    A name that has spaces is prose already and only loses surplus ones: `playing ping-pong`, `Tai chi` stay as they
    are, and so do acronyms: `BMXRiding` -> `BMX riding`.

    Raises:
        ValueError: the name has no letter or digit.
    """
    if not any(character.isalnum() for character in name):
        raise ValueError(f"class name {name!r} has no letter or digit")
    words = name.replace("_", " ").split()
    if len(words) > 1 or not _is_camel_case(words[0]):
        return " ".join(words)
    parts = _WORD.findall(words[0])
    return " ".join(part if part.isupper() and len(part) > 1 else part.lower() for part in parts)


def load_prompts(path: str | Path, classes: Sequence[str]) -> Interpretive:
    """Reads a file of interpretive prompts and checks that it fits the classes.

    The file is JSON: `{class name: {kind: [5 sentences]}}` with the four kinds of `KINDS`.
    Class names are compared after `clean_class_name`; the result is keyed by `classes` as given, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON of that form. All faults are reported together: missing and unknown classes, missing
            and unknown kinds, wrong numbers of sentences, empty sentences.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no prompt file at {path}; leave interpretive prompts out or write one") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object of class names, got a {type(content).__name__}")

    faults: dict[str, list[str]] = {}
    by_name = {
        clean_class_name(name) if any(map(str.isalnum, name)) else name: entry for name, entry in content.items()
    }
    wanted = {clean_class_name(name): name for name in classes}
    if len(by_name) < len(content):
        faults["classes that occur twice in the file"] = [f"{len(content) - len(by_name)} of {len(content)}"]
    faults["classes without prompts"] = [name for key, name in wanted.items() if key not in by_name]
    faults["unknown classes"] = [name for name in by_name if name not in wanted]
    for key, entry in by_name.items():
        if key in wanted:
            for fault, where in _check_entry(key, entry):
                faults.setdefault(fault, []).append(where)
    report = [f"  {len(found)} {fault}: {_some(found)}" for fault, found in faults.items() if found]
    if report:
        raise ValueError(f"{path} does not fit the {len(classes)} classes:\n" + "\n".join(report))
    return {name: by_name[key] for key, name in wanted.items()}


def build_prompts(
    classes: Sequence[str],
    templates: Sequence[str] = ACTION_TEMPLATES,
    interpretive: Interpretive | None = None,
    kinds: Sequence[str] = KINDS,
) -> list[list[str]]:
    """Builds the prompts `[A][C]`: every template with every class name, then the sentences of each kind.

    With `interpretive=None` A is the number of templates, else `len(templates) + 5 * len(kinds)`.

    Raises:
        ValueError: no class, a template without exactly one `{}`, an unknown kind, nothing to build from, or classes
            with unequal numbers of sentences.
        KeyError: a class that `interpretive` lacks.
    """
    if isinstance(classes, str) or not classes:
        raise ValueError(f"classes must be a non-empty list of names, got {classes!r}")
    if isinstance(templates, str):
        raise ValueError(f"templates must be a list of strings, got the string {templates!r}")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(templates)} templates need exactly one {{}}: {_some(wrong)}")
    names = [clean_class_name(name) for name in classes]
    prompts = [[template.replace("{}", name) for name in names] for template in templates]
    if interpretive is not None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"unknown kinds of prompts {unknown}; choose from {list(KINDS)}")
        missing = [name for name in classes if name not in interpretive]
        if missing:
            raise KeyError(f"{len(missing)} of {len(classes)} classes have no interpretive prompts: {_some(missing)}")
        for kind in kinds:
            sentences = [interpretive[name][kind] for name in classes]  # (C, 5)
            counts = sorted({len(each) for each in sentences})
            if len(counts) > 1:
                raise ValueError(f"classes have unequal numbers of {kind} sentences: {counts}")
            prompts += [list(row) for row in zip(*sentences, strict=True)]
    if not prompts:
        raise ValueError("nothing to build prompts from: give templates, or interpretive prompts and kinds")
    return prompts


def load_tokenizer() -> Any:
    """Returns CLIP's tokenizer from open_clip, whose vocabulary comes with the package.

    Raises:
        ImportError: open_clip is missing.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ImportError("CLIP's tokenizer comes with open_clip: pip install open_clip_torch") from error
    return SimpleTokenizer()


def tokenize(
    prompts: Sequence[Sequence[str]], tokenizer: Callable[..., Tensor] | None = None, context_length: int = 77
) -> Tensor:
    """Tokenizes prompts `[A][C]`, each with its start and end token, padded with 0: int64 `(A, C, context_length)`.

    A prompt that is too long loses whole words at its end until it fits (letters, if its first word alone does not);
    one warning says how many did.

    Args:
        prompts: A rows of C sentences.
        tokenizer: an open_clip tokenizer, by default CLIP's: `tokenizer(list of texts, context_length=...)` gives int64
            `(texts, context_length)`, `tokenizer.encode(text)` the tokens without start and end.
        context_length: tokens that the text tower takes, 3 or more.

    Raises:
        ValueError: no prompts, rows of unequal lengths, or a context that has no room.
        ImportError: open_clip is missing and no tokenizer is given.
    """
    if not prompts or not prompts[0] or any(len(row) != len(prompts[0]) for row in prompts):
        lengths = sorted({len(row) for row in prompts})
        raise ValueError(f"prompts must be A rows of C sentences, got {len(prompts)} rows of lengths {lengths}")
    if context_length < 3:
        raise ValueError(f"context_length must be 3 or more (start, one token, end), got {context_length}")
    encoder: Any = load_tokenizer() if tokenizer is None else tokenizer
    room = context_length - 2  # start and end
    texts = [text for row in prompts for text in row]
    fitting = [_shorten(text, encoder, room) for text in texts]
    shortened = [text for text, fit in zip(texts, fitting, strict=True) if fit != text]
    if shortened:
        warnings.warn(
            f"{len(shortened)} of {len(texts)} prompts are longer than {context_length} tokens and lost their last "
            f"words: {_some(shortened)}",
            stacklevel=2,
        )
    tokens = encoder(fitting, context_length=context_length)
    return torch.as_tensor(tokens, dtype=torch.int64).reshape(len(prompts), len(prompts[0]), context_length)


def draw_prompts(num_prompts: int, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws `k` of `num_prompts` prompt indices without replacement, in random order: int64 `(k,)`.

    Raises:
        ValueError: `k` is not 1 to `num_prompts`.
    """
    if not 1 <= k <= num_prompts:
        raise ValueError(f"k must be 1 to the number of prompts, {num_prompts}, got {k}")
    device = "cpu" if generator is None else generator.device
    return torch.randperm(num_prompts, generator=generator, device=device)[:k]


def _is_camel_case(word: str) -> bool:
    """True for `ApplyEyeMakeup`, `BMXRiding` and `Archery`, false for `archery`, `ping-pong` and `BMX`."""
    return re.search(r"[a-z][A-Z]|[A-Z]{2}[a-z]", word) is not None or re.fullmatch(r"[A-Z][a-z]+", word) is not None


def _check_entry(name: str, entry: Any) -> list[tuple[str, str]]:
    """Returns `(fault, where)` for everything that is wrong with one class of a prompt file."""
    if not isinstance(entry, dict):
        return [("classes that are not an object of kinds", name)]
    faults = [("missing kinds", f"{name}/{kind}") for kind in KINDS if kind not in entry]
    faults += [("unknown kinds", f"{name}/{kind}") for kind in entry if kind not in KINDS]
    for kind in KINDS:
        sentences = entry.get(kind)
        where = f"{name}/{kind}"
        if kind not in entry:
            continue
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            faults.append(("kinds that are not a list of sentences", where))
            continue
        if len(sentences) != SENTENCES_PER_KIND:
            faults.append((f"kinds without exactly {SENTENCES_PER_KIND} sentences", f"{where} ({len(sentences)})"))
        faults += [("empty sentences", f"{where}[{i}]") for i, text in enumerate(sentences) if not text.strip()]
    return faults


def _shorten(text: str, encoder: Any, room: int) -> str:
    """Drops words at the end, or letters where the first word alone is too long, until `room` tokens are left."""
    if len(encoder.encode(text)) <= room:
        return text
    for pieces, glue in ((text.split(), " "), (list(text.split()[0]), "")):
        low, high = 0, len(pieces)  # `low` pieces fit, `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            if len(encoder.encode(glue.join(pieces[:middle]))) <= room:
                low = middle
            else:
                high = middle
        if low:
            break
    return glue.join(pieces[:low])


def _some(found: Sequence[str], most: int = 5) -> str:
    """The first few of a list, for a message."""
    shown = ", ".join(repr(item if len(item) <= 60 else item[:57] + "...") for item in found[:most])
    return shown + (f" and {len(found) - most} more" if len(found) > most else "")

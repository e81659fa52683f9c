"""Text prompts for action classes: templates, class names, the sentences of interpretive prompts, and their tokens.

A class has A prompts: one for each template, then the sentences of the interpretive kinds (CLAVER, arXiv 2502.03549).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..class_names import clean_class_name

__all__ = [
    "ACTION_TEMPLATES",
    "KINDS",
    "OBJECT_TEMPLATES",
    "TEMPLATES",
    "Interpretive",
    "build_prompts",
    "choose_templates",
    "draw_prompts",
    "load_tokenizer",
    "some",
    "tokenize",
]

KINDS = ("decomposition", "body_parts", "synonyms", "scene")
"""Kinds of interpretive prompts: simple steps of an action, what the parts do, other words for it, where it happens."""

SENTENCES_PER_KIND = 5  # of the files that are shipped, and of the paper; a file may have others

Interpretive = dict[str, dict[str, list[str]]]
"""`{class name: {kind: sentences}}`, the content of a prompt file; see `files`."""

# for gerunds: "playing drums", but neither "brush hair" nor "archery"
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

NEUTRAL_TEMPLATES = (
    "{}.",
    "{}, an action.",
    "{}, the action in this video.",
    "an action: {}.",
    "a video of the action {}.",
    "a video clip that shows the action {}.",
    "a recording of the action {}.",
    "an example of the action {}.",
    "footage of the action {}, filmed from a distance.",
    "a close-up of the action {}.",
    "a shaky phone video of the action {}.",
    "a short film about the action {}.",
    "a person performs the action {}.",
    "people perform the action {}.",
    "someone shows how the action {} is done.",
    "the action in this video is called {}.",
)
"""For class names of any grammar: `brush hair` and `archery` as well as `playing drums`, which alone fits "a person is"."""

OFFICIAL_TEMPLATES = (
    "{}",
    *(f"a {kind} of {who}{{}}." for kind in ("video", "example", "demonstration") for who in ("", "a person ")),
    "Human action of {}.",
    "{}, an action.",
    "{} this is an action.",
    "{}, a video of action.",
    "Playing action of {}.",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Video classification of {}",
)
"""The 16 that CLAVER's authors train with, out of those of CLIP (arXiv 2103.00020) and ActionCLIP (arXiv 2109.08472)."""

TEMPLATES = {"gerund": ACTION_TEMPLATES, "neutral": NEUTRAL_TEMPLATES, "official": OFFICIAL_TEMPLATES}
"""Templates by the name that `data.templates` has for them."""

OBJECT_TEMPLATES = ("{}.", "an object {}.")
"""For `claver.data.motions`; short, as a text tower that starts from nothing has to learn to look past every other word."""

_GERUND = re.compile(r"[aeiouy]\w*ing\b", re.IGNORECASE)  # running, but not swing, string or ring


def choose_templates(templates: str | Sequence[str] | None, classes: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Templates by their name in `TEMPLATES`, and which they are, in words; a list is itself.

    None stands for "gerund" if at least three quarters of the class names have one, and else for "neutral".
    """
    if templates is None:
        count = sum(_GERUND.search(clean_class_name(name)) is not None for name in classes)
        name = "gerund" if count >= 0.75 * len(classes) else "neutral"
        return TEMPLATES[name], f"{name}: {count} of {len(classes)} class names have a gerund"
    if isinstance(templates, str):
        return TEMPLATES[templates], templates
    return tuple(templates), ""


def build_prompts(
    classes: Sequence[str],
    templates: Sequence[str] = ACTION_TEMPLATES,
    interpretive: Interpretive | None = None,
    kinds: Sequence[str] | None = None,
    per_kind: int | None = None,
) -> list[list[str]]:
    """Builds the prompts `[A][C]`: every template with every class name, then the sentences of each kind.

    With `interpretive=None` A is the number of templates, else that and `per_kind` sentences for each of `kinds`.

    Args:
        classes: names, which the templates spell as words.
        templates: each with one `{}`.
        interpretive: the sentences of each class.
        kinds: which of them, in this order; None: those of the first class.
        per_kind: how many of each kind, the first ones; None: as many as every class has.

    Raises:
        ValueError: no class, a template without exactly one `{}`, an unknown kind, nothing to build from, or fewer than
            `per_kind` sentences.
        KeyError: a class that `interpretive` lacks.
    """
    if isinstance(classes, str) or not classes:
        raise ValueError(f"classes must be a non-empty list of names, got {classes!r}")
    if isinstance(templates, str):
        raise ValueError(f"templates must be a list of strings, got the string {templates!r}")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(templates)} templates need exactly one {{}}: {some(wrong)}")
    names = [clean_class_name(name) for name in classes]
    prompts = [[template.replace("{}", name) for name in names] for template in templates]
    if interpretive is not None:
        unknown = [kind for kind in kinds or () if kind not in KINDS]
        if unknown:
            raise ValueError(f"unknown kinds of prompts {unknown}; choose from {list(KINDS)}")
        missing = [name for name in classes if name not in interpretive]
        if missing:
            raise KeyError(f"{len(missing)} of {len(classes)} classes have no interpretive prompts: {some(missing)}")
        for kind in list(interpretive[classes[0]]) if kinds is None else kinds:
            sentences = [interpretive[name][kind] for name in classes]  # C lists
            fewest = min(len(each) for each in sentences)
            if per_kind is not None and not 1 <= per_kind <= fewest:
                short = [name for name, each in zip(classes, sentences, strict=True) if len(each) < per_kind]
                raise ValueError(f"per_kind is {per_kind}, but of {kind} some classes have {fewest}: {some(short)}")
            count = fewest if per_kind is None else per_kind
            prompts += [[each[i] for each in sentences] for i in range(count)]
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
            f"words: {some(shortened)}",
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


def some(found: Sequence[str], most: int = 5) -> str:
    """The first few of a list, for a message."""
    shown = ", ".join(repr(item if len(item) <= 60 else item[:57] + "...") for item in found[:most])
    return shown + (f" and {len(found) - most} more" if len(found) > most else "")

"""Class names: spelt as words, and compared."""

from __future__ import annotations

import re

__all__ = ["class_key", "clean_class_name"]

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


def class_key(name: str) -> str:
    """What a class name is compared by: its words, or itself if it has none."""
    return clean_class_name(name) if any(map(str.isalnum, name)) else name


def _is_camel_case(word: str) -> bool:
    """True for `ApplyEyeMakeup`, `BMXRiding` and `Archery`, false for `archery`, `ping-pong` and `BMX`."""
    return re.search(r"[a-z][A-Z]|[A-Z]{2}[a-z]", word) is not None or re.fullmatch(r"[A-Z][a-z]+", word) is not None

"""What makes a sentence fit to stand for a class, in rules on its words and tokens.

The rules look at words alone, in lower case, without endings and without the words that every sentence has: a reader
judges meaning, and these find what readers overlook.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..class_names import clean_class_name

__all__ = [
    "CONTEXT",
    "NEAR_DUPLICATE",
    "class_words",
    "closer_rival",
    "content_words",
    "mask_name",
    "named_class",
    "near_duplicates",
    "nearest_classes",
    "num_tokens",
    "sentence_faults",
    "shared_words",
    "skeleton",
]

CONTEXT = 77
"""Tokens of CLIP's text tower, with the start and the end token."""

NEAR_DUPLICATE = 0.7
"""Two sentences are nearly the same if this share of the words that either has are in both (Jaccard index)."""

SHORTEST_NAME = 6
"""A class name of one shorter word (`throw`, `hit`) is a plain word of the language: a sentence may have it."""

_STOP_WORDS = """
a an the of in on at to and with into onto from by for over under as is are be it its his her him their them they he she
while then each one two up down out off back other around through against between behind before after toward towards
across along near above below so that which who this person someone until or not no has have
"""
_STOP = frozenset(_STOP_WORDS.split())
_LETTERS = re.compile(r"[^\W\d_]+|\d+")


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """A word without its usual endings: `throwing`, `throws` -> `throw`; crude, but the same for all."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and not word.endswith("ss") and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    if len(word) > 3 and word.endswith("e"):
        word = word[:-1]
    return word[:-1] + "i" if word.endswith("y") else word


def _plain_words(text: str) -> list[str]:
    return _LETTERS.findall(text.lower())


def content_words(text: str) -> list[str]:
    """The stems of a text in its order, without stop words."""
    return [_stem(word) for word in _plain_words(text) if word not in _STOP]


@lru_cache(maxsize=1 << 12)
def class_words(name: str) -> tuple[str, ...]:
    """The stems of a class name, all of them; what it has in brackets explains it and is left out."""
    bare = re.sub(r"\(.*?\)", " ", clean_class_name(name))
    return tuple(_stem(word) for word in _plain_words(bare if any(map(str.isalnum, bare)) else name))


def num_tokens(text: str, encoder: Any) -> int:
    """CLIP tokens of a text, with start and end."""
    return len(encoder.encode(text)) + 2


def sentence_faults(text: str, encoder: Any, context: int = CONTEXT) -> list[str]:
    """What is wrong with a sentence by itself, in words; empty if nothing is."""
    faults = []
    if text != " ".join(text.split()):
        faults.append("has line breaks or surplus spaces")
    if len(_plain_words(text)) < 3:
        faults.append("has fewer than 3 words")
    if re.search(r"[{}\[\]<>`|\\*]", text):
        faults.append("has signs that are no prose")
    if not " ".join(text.split()).isprintable():
        faults.append("has characters that cannot be printed")
    if (tokens := num_tokens(text, encoder)) > context:
        faults.append(f"has {tokens} CLIP tokens, at most {context} fit")
    return faults


def named_class(text: str, own: str, others: Iterable[str]) -> str | None:
    """The first of other classes that a sentence names, word for word up to endings; None if it names none.

    A class whose name is part of the own one (`push up`, `wall push up`) counts as not named, and so does a short word
    (`SHORTEST_NAME`).
    """
    plain = _plain_words(text)
    stems = tuple(_stem(word) for word in plain)
    mine = class_words(own)
    for other in others:
        words = class_words(other)
        if set(words) <= set(mine) or "".join(words) in "".join(mine):
            continue
        if len(words) == 1:  # by the very word: `fencing` is a class, `fences` are not
            found = len(clean_class_name(other)) >= SHORTEST_NAME and clean_class_name(other).lower() in plain
        else:
            found = any(stems[i : i + len(words)] == words for i in range(len(stems) - len(words) + 1))
        if found:
            return other
    return None


def mask_name(text: str, name: str, mask: str = "*") -> str:
    """A sentence in lower case whose words that are in a class name, whatever their ending, are replaced."""
    mine = set(class_words(name)) - _STOP
    return " ".join(mask if _stem(word) in mine else word for word in _plain_words(text))


def skeleton(text: str, name: str) -> str:
    """What is left of a sentence when its class name may be any: equal for two that differ in the name alone."""
    words = ["a" if word in ("a", "an", "the") else word for word in mask_name(text, name).split()]
    return " ".join(word for i, word in enumerate(words) if word != "*" or i == 0 or words[i - 1] != "*")


def near_duplicates(sentences: Sequence[str], threshold: float = NEAR_DUPLICATE) -> list[tuple[int, int, float]]:
    """Pairs `(i, j, share)`, i < j, whose sets of words have a Jaccard index of at least `threshold`.

    Sets that similar have one of their rarest words in common, so only sentences that share one are compared.
    """
    words = [frozenset(content_words(sentence)) for sentence in sentences]
    frequency = Counter(word for each in words for word in each)
    index: defaultdict[str, list[int]] = defaultdict(list)
    pairs = []
    for i in sorted(range(len(words)), key=lambda i: len(words[i])):
        rarest = sorted(words[i], key=lambda word: (frequency[word], word))
        prefix = rarest[: len(rarest) - math.ceil(threshold * len(rarest)) + 1]
        for j in {j for word in prefix for j in index[word]}:
            share = len(words[i] & words[j]) / len(words[i] | words[j])
            if share >= threshold:
                pairs.append((min(i, j), max(i, j), share))
        for word in prefix:
            index[word].append(i)
    return sorted(pairs)


def closer_rival(sentence: str, counts: Mapping[str, Counter[str]], own: str, rivals: Iterable[str]) -> str | None:
    """The first rival to which a sentence is as close by its words as to its own class; None if there is none.

    A rival is as close if it has all words of the sentence, and all in all as often as the class has them in its other
    sentences (sum of logarithms). `counts` says for each class in how many of its sentences a word stands.
    """
    words = set(content_words(sentence))
    mine = sum(math.log(counts[own][word] - 0.5) for word in words)  # without this sentence, and half added to all
    for rival in rivals:
        theirs = counts[rival]
        if all(word in theirs for word in words) and sum(math.log(theirs[word] + 0.5) for word in words) >= mine:
            return rival
    return None


def shared_words(texts: Mapping[str, Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """Names, and for each two of them the share of words they have in common, of the one with fewer: float `(C, C)`.

    The diagonal is 0.
    """
    names = list(texts)
    sets = [frozenset(word for text in texts[name] for word in content_words(text)) for name in names]
    table = _table(sets)
    sizes = table.sum(1).clip(min=1)
    share = (table @ table.T) / np.minimum(sizes[:, None], sizes[None])
    np.fill_diagonal(share, 0)
    return names, share


def nearest_classes(texts: Mapping[str, Sequence[str]], k: int = 8) -> dict[str, list[str]]:
    """For each class the k others whose words are most alike: rivals where there are no groups of similar classes."""
    names = list(texts)
    table = _table([frozenset(word for text in texts[name] for word in content_words(text)) for name in names])
    table = table * np.log(len(names) / table.sum(0).clip(min=1))
    table /= np.linalg.norm(table, axis=1, keepdims=True).clip(min=1e-9)
    cosine = table @ table.T
    np.fill_diagonal(cosine, -1)
    return {
        name: [names[j] for j in np.argsort(-row)[: min(k, len(names) - 1)]]
        for name, row in zip(names, cosine, strict=True)
    }


def _table(sets: Sequence[frozenset[str]]) -> np.ndarray:
    """1 where a set (row) has a word (column): float32 `(len(sets), words)`."""
    columns = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    table = np.zeros((len(sets), len(columns)), dtype=np.float32)
    for row, words in zip(table, sets, strict=True):
        row[[columns[word] for word in words]] = 1
    return table

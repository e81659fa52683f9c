"""Checks prompt files: form, coverage, numbers, lengths, repetition, and what keeps a class apart from its rivals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..class_names import class_key
from .build import KINDS, SENTENCES_PER_KIND, Interpretive, load_tokenizer
from .files import DATASETS, PromptFile, form_faults, known_dataset, load_groups, shipped_classes
from .rules import (
    closer_rival,
    content_words,
    named_class,
    near_duplicates,
    nearest_classes,
    num_tokens,
    sentence_faults,
    shared_words,
    skeleton,
)

__all__ = ["SHARE", "Finding", "Pool", "check_files", "dataset_of", "pool_entries", "summary"]

SHARE = 0.5
"""At most this share of its words may a class have in common with another, in any kind."""


class Finding(NamedTuple):
    """A fault of a file: the rule that it breaks, the class and kind, and the rest in words."""

    rule: str
    where: str
    detail: str


class Pool(NamedTuple):
    """The classes of some files, each once.

    Attributes:
        entries: by `dataset/class`; what several files say in the same words of one class, or of classes of one group,
            is there once.
        rivals: for each class those that are similar and in the pool.
        names: for each class its name; one that stands for several has that of the first.
    """

    entries: Interpretive
    rivals: dict[str, list[str]]
    names: dict[str, str]


def check_files(
    files: Sequence[PromptFile],
    classes: Sequence[str] | None = None,
    *,
    per_kind: int | None = None,
    share: float = SHARE,
) -> list[Finding]:
    """Everything that is wrong with some files, each by itself and all together.

    Args:
        files: to check; those whose header names a known data set are held against its classes.
        classes: that every file must have; None: those of the data set that its header names, if it is known.
        per_kind: sentences of each kind; None: what the header says, or 5.
        share: of a class's words that another may have in a kind.
    """
    findings = [finding for file in files for finding in _form(file, classes, per_kind)]
    pool = pool_entries(_sound(files))
    if pool.entries:
        findings += _sentences(pool)
        findings += _repetition(pool)
        findings += _rivals(pool)
        findings += _words(pool, share)
    return findings


def summary(files: Sequence[PromptFile]) -> str:
    """How much is in files whose form is right, how long the longest sentence is, and the largest share of words."""
    encoder, lines = load_tokenizer(), []
    files = _sound(files)
    pool = pool_entries(files)
    for file in files:
        texts = [text for entry in file.entries.values() for kind in entry.values() for text in kind]
        longest = max((num_tokens(text, encoder) for text in texts), default=0)
        lines.append(
            f"{file.title}: {len(file.entries)} classes, {len(texts)} sentences, at most {longest} CLIP tokens"
        )
    for kind in KINDS:
        texts_of = {key: entry[kind] for key, entry in pool.entries.items() if kind in entry}
        if len(texts_of) > 1:
            names, table = shared_words(texts_of)
            i, j = np.unravel_index(table.argmax(), table.shape)
            lines.append(f"{kind}: two classes share at most {table[i, j]:.2f} of their words ({names[i]}, {names[j]})")
    return "\n".join(lines)


def dataset_of(file: PromptFile) -> str | None:
    """The known data set that a file is for: what its header says, or whose classes it has."""
    named = file.header.get("dataset")
    return named if named in DATASETS else known_dataset(list(file.entries))


def pool_entries(files: Sequence[PromptFile]) -> Pool:
    """The classes of files whose form is right, and their rivals: those of the group, or the most alike."""
    entries: Interpretive = {}
    groups = {(dataset, class_key(name)): group for group, each in load_groups().items() for dataset, name in each}
    seen: dict[str, list[tuple[str, set[str], set[int]]]] = {}  # content -> key, classes and groups, files
    names: dict[str, str] = {}
    members: dict[tuple[str, str], str] = {}  # data set and class -> key
    for number, file in enumerate(files):
        dataset = dataset_of(file)
        for name, entry in file.entries.items():
            what = {f"class {class_key(name)}"}
            if dataset and (dataset, class_key(name)) in groups:
                what.add(f"group {groups[dataset, class_key(name)]}")
            alike = seen.setdefault(repr(entry), [])
            same = [each for each in alike if number not in each[2] and what & each[1]]
            if same:
                key = same[0][0]
                same[0][1].update(what)
                same[0][2].add(number)
            else:
                key = f"{dataset or file.path.stem}/{name}"
                if key in entries:  # another file has other sentences for it
                    key = f"{file.path} ({number + 1})/{name}"
                alike.append((key, what, {number}))
            entries[key] = entry
            names.setdefault(key, name)
            if dataset:
                members[dataset, class_key(name)] = key
    rivals: dict[str, list[str]] = {}
    for group in load_groups().values():
        keys = [members[dataset, class_key(name)] for dataset, name in group if (dataset, class_key(name)) in members]
        for key in dict.fromkeys(keys):
            rivals[key] = [other for other in dict.fromkeys([*rivals.get(key, []), *keys]) if other != key]
    if len(rivals) < len(entries):
        texts = {key: [text for kind in entry.values() for text in kind] for key, entry in entries.items()}
        rivals = nearest_classes(texts) | rivals
    return Pool(entries, rivals, names)


def _sound(files: Sequence[PromptFile]) -> list[PromptFile]:
    """The files with the classes whose form is right."""
    return [
        PromptFile(file.path, file.header, {k: v for k, v in file.entries.items() if not form_faults(k, v, file.kinds)})
        for file in files
    ]


def _form(file: PromptFile, classes: Sequence[str] | None, per_kind: int | None) -> Iterator[Finding]:
    dataset = file.header.get("dataset")
    if classes is None and dataset in DATASETS:
        classes = shipped_classes(dataset)
    if classes is not None:
        have, wanted = {class_key(name) for name in file.entries}, {class_key(name) for name in classes}
        for name in classes:
            if class_key(name) not in have:
                yield Finding("coverage", name, "has no prompts")
        for name in file.entries:
            if class_key(name) not in wanted:
                yield Finding("coverage", name, "is no class of the list")
    count = per_kind or file.header.get("per_kind", SENTENCES_PER_KIND)
    for name, entry in file.entries.items():
        faults = form_faults(name, entry, file.kinds)
        for fault, where in faults:
            yield Finding("form", f"{name}/{where.removeprefix(name).strip('/')}", fault)
        if not faults:
            for kind in file.kinds:
                if len(entry[kind]) != count:
                    yield Finding("number", f"{name}/{kind}", f"{len(entry[kind])} sentences, not {count}")


def _sentences(pool: Pool) -> Iterator[Finding]:
    encoder = load_tokenizer()
    for key, kind, text in _all(pool.entries):
        for fault in sentence_faults(text, encoder):
            yield Finding("sentence", f"{key}/{kind}", f"{fault}: {text}")


def _repetition(pool: Pool) -> Iterator[Finding]:
    every = list(_all(pool.entries))
    for i, j, alike in near_duplicates([text for _, _, text in every]):
        (key, kind, text), (other, other_kind, other_text) = every[i], every[j]
        rule = "repetition" if key == other else "repetition across classes"
        yield Finding(rule, f"{key}/{kind}", f"{alike:.2f} of the words of {other}/{other_kind}: {text} | {other_text}")
    frames: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for key, kind, text in every:
        frames[skeleton(text, pool.names[key])].setdefault(key, f"{kind}: {text}")
    for same in frames.values():
        (key, text), *others = same.items()
        for other, other_text in others:
            yield Finding("name exchanged", f"{key}/{text.partition(':')[0]}", f"{text} | {other}/{other_text}")


def _rivals(pool: Pool) -> Iterator[Finding]:
    counts = {
        key: Counter(word for kind in entry.values() for text in kind for word in set(content_words(text)))
        for key, entry in pool.entries.items()
    }
    for key, kind, text in _all(pool.entries):
        rivals = pool.rivals[key]
        named = named_class(text, pool.names[key], [pool.names[rival] for rival in rivals])
        if named:
            yield Finding("names another class", f"{key}/{kind}", f"{named}: {text}")
        closer = closer_rival(text, counts, key, rivals)
        if closer:
            yield Finding("as close to another class", f"{key}/{kind}", f"{closer}: {text}")


def _words(pool: Pool, share: float) -> Iterator[Finding]:
    for kind in next(iter(pool.entries.values())):
        names, table = shared_words({key: entry[kind] for key, entry in pool.entries.items() if kind in entry})
        for i, j in np.argwhere(np.triu(table) > share):
            yield Finding("shared words", f"{names[i]}/{kind}", f"{table[i, j]:.2f} of its words or of {names[j]}'s")


def _all(entries: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[tuple[str, str, str]]:
    for key, entry in entries.items():
        for kind, sentences in entry.items():
            for text in sentences:
                yield key, kind, text

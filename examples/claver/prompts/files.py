"""Files of interpretive prompts: their form, the sets that are shipped, and the class lists these belong to.

A file is JSON, in one of two forms:

    {class: {kind: [sentence, ...]}}                                                        plain
    {"format": "kronmask-prompts-1", "dataset": ..., "version": ..., "classes": {class: {kind: [...]}}}  with a header

A header says what the set is for, who wrote it and under which licence; `prompts make` also writes how it was made.
The form of the authors' code is read too: a folder of CSV files of `id;name`, see `read_prompt_folder`.
Kinds are those of `build.KINDS`; a file may leave some out and have any number of sentences of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..class_names import class_key
from ..data.lists import read_labels
from ..files import write_text
from .build import KINDS, Interpretive, some

__all__ = [
    "DATASETS",
    "FORMAT",
    "MOTION_PROMPTS",
    "PromptFile",
    "class_file",
    "form_faults",
    "known_dataset",
    "load_groups",
    "load_prompts",
    "read_prompt_file",
    "read_prompt_folder",
    "shipped_classes",
    "shipped_file",
    "write_prompt_file",
]

FORMAT = "kronmask-prompts-1"

DATASETS = ("kinetics400", "ucf101", "hmdb51", "kinetics600_zero_shot")
"""Data sets whose prompts are shipped. The last are the classes of Kinetics-600 that Kinetics-400 lacks, in three
splits of 160: the columns of its class list say which has a class."""

_PROMPTS = Path(__file__).parent
_CLASSES = _PROMPTS.parent / "classes"

MOTION_PROMPTS = _PROMPTS / "motions.json"
"""Interpretive prompts for the classes of `claver.data.motions`."""


@dataclass(frozen=True)
class PromptFile:
    """What a prompt file says, not yet checked against classes.

    Attributes:
        path: where it was read.
        header: everything but the sentences; empty for the plain form.
        entries: what stands under each class name; a list of sentences for each kind if the file is right.
    """

    path: Path
    header: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that the header announces; all four without one."""
        return tuple(self.header.get("kinds", KINDS))

    @property
    def title(self) -> str:
        """Data set and version, or the file's name."""
        if "dataset" not in self.header:
            return self.path.name
        return " ".join(str(self.header[key]) for key in ("dataset", "version") if key in self.header)


def read_prompt_file(path: str | Path) -> PromptFile:
    """Reads a prompt file of either form.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, names a class twice, has another format than `FORMAT` or a header that is not valid.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise FileNotFoundError(f"no prompt file at {path}; leave interpretive prompts out or write one") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object of class names, got a {type(content).__name__}")
    if not isinstance(content.get("format"), str):  # a class of that name would hold an object
        return PromptFile(path, {}, content)
    entries, kinds = content.pop("classes", None), content.get("kinds", list(KINDS))
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has the format {content['format']!r}, this program reads {FORMAT!r}")
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: 'classes' must be an object of class names, got a {type(entries).__name__}")
    if not isinstance(kinds, list) or not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"{path}: 'kinds' must be a list of some of {list(KINDS)}, got {kinds!r}")
    return PromptFile(path, content, entries)


def read_prompt_folder(path: str | Path, classes: Sequence[str]) -> PromptFile:
    """Reads sentences in the form of the authors' code: a folder with a CSV file for each kind, whose name has `decomposition`,
    `body`, `synonyms` or `scene` in it.

    Below the header, `id;name` or `id,name`, is a sentence a line behind the number of its class, several for a class. As their
    generator writes them, sentences may have commas with backslashes, and run over several lines.

    Raises:
        FileNotFoundError: no such file in the folder.
        ValueError: two files of a kind, another header, or the number of no class.
    """
    found = {kind: [file for file in sorted(Path(path).glob("*.csv")) if kind[:4] in file.stem] for kind in KINDS}
    several = [file.name for files in found.values() for file in files[1:]]
    if several:
        raise ValueError(f"{path} has more than one file of a kind: {some(several)}")
    if not any(found.values()):
        raise FileNotFoundError(f"no CSV file in {path} has decomposition, body, synonyms or scene in its name")
    entries: dict[str, Any] = {name: {} for name in classes}
    for kind, files in found.items():
        for file in files:
            for number, sentence in _numbered_sentences(file):
                if number >= len(classes):
                    raise ValueError(f"{file}: class {number} of {len(classes)}, whose numbers start at 0")
                entries[classes[number]].setdefault(kind, []).append(sentence)
    return PromptFile(Path(path), {"kinds": [kind for kind, files in found.items() if files]}, entries)


def _numbered_sentences(file: Path) -> list[tuple[int, str]]:
    header, *lines = file.read_text(encoding="utf-8-sig").splitlines() or [""]
    if header.replace(" ", "") not in ("id;name", "id,name"):
        raise ValueError(f"{file}: the first line must be id;name, not {header!r}")
    sentences: list[tuple[int, list[str]]] = []
    for number, line in enumerate(lines, 2):
        starts = re.match(rf"(\d+){header.replace(' ', '')[2]}(.*)", line)
        if starts:
            sentences.append((int(starts[1]), [starts[2]]))
        elif sentences:
            sentences[-1][1].append(line)
        elif line.strip():
            raise ValueError(f"{file}: line {number} must start with the number of a class, not {line[:40]!r}")
    return [(number, " ".join(" ".join(parts).replace("\\", "").strip('" ').split())) for number, parts in sentences]


def write_prompt_file(path: str | Path, header: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Writes a file with a header, one sentence a line; one that is cut off leaves the file before it whole."""
    content = {"format": FORMAT, **header, "classes": dict(entries)}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_prompts(path: str | Path, classes: Sequence[str], kinds: Sequence[str] | None = None) -> Interpretive:
    """Reads a file of interpretive prompts and checks that it has what the classes need.

    Class names are compared after `clean_class_name`; the result is keyed by `classes` as given, in their order, and
    has the kinds that are asked for, in their order; None: those of the file. The file may have more of both.

    Raises:
        FileNotFoundError, ValueError: as `read_prompt_file`; or something is missing. All faults are reported together:
            missing classes (then also the unknown ones, which may be the same misspelt), missing and unknown kinds,
            kinds without sentences, empty sentences.
    """
    file = read_prompt_folder(path, classes) if Path(path).is_dir() else read_prompt_file(path)
    kinds = file.kinds if kinds is None else tuple(kinds)
    by_key = {class_key(name): entry for name, entry in file.entries.items()}
    wanted = {class_key(name): name for name in classes}
    faults: dict[str, list[str]] = {}
    if len(wanted) < len(classes):
        kept = set(wanted.values())
        faults["classes of the list that differ from another only in spelling"] = [n for n in classes if n not in kept]
    if len(by_key) < len(file.entries):
        faults["classes that occur twice in the file"] = [f"{len(file.entries) - len(by_key)} of {len(file.entries)}"]
    faults["classes without prompts"] = [name for key, name in wanted.items() if key not in by_key]
    if faults["classes without prompts"]:
        faults["unknown classes"] = [name for name in file.entries if class_key(name) not in wanted]
    for key, name in wanted.items():
        if key in by_key:
            for fault, where in form_faults(name, by_key[key], kinds):
                faults.setdefault(fault, []).append(where)
    report = [f"  {len(found)} {fault}: {some(found)}" for fault, found in faults.items() if found]
    if report:
        raise ValueError(f"{path} does not fit the {len(classes)} classes:\n" + "\n".join(report))
    return {name: {kind: by_key[key][kind] for kind in kinds} for key, name in wanted.items()}


def form_faults(name: str, entry: Any, kinds: Sequence[str] = KINDS) -> list[tuple[str, str]]:
    """`(fault, where)` for everything that is wrong with the form of what stands under one class."""
    if not isinstance(entry, dict):
        return [("classes that are not an object of kinds", name)]
    faults = [("missing kinds", f"{name}/{kind}") for kind in kinds if kind not in entry]
    faults += [("unknown kinds", f"{name}/{kind}") for kind in entry if kind not in KINDS]
    for kind in kinds:
        sentences = entry.get(kind)
        where = f"{name}/{kind}"
        if kind not in entry:
            continue
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            faults.append(("kinds that are not a list of sentences", where))
            continue
        if not sentences:
            faults.append(("kinds without a sentence", where))
        faults += [("empty sentences", f"{where}[{i}]") for i, text in enumerate(sentences) if not text.strip()]
    return faults


def shipped_file(dataset: str) -> Path:
    """The prompt file of one of `DATASETS`."""
    return _PROMPTS / f"{_known(dataset)}.json"


def class_file(dataset: str) -> Path:
    """The class list of one of `DATASETS`: CSV with the columns `id,name`."""
    return _CLASSES / f"{_known(dataset)}.csv"


@lru_cache
def shipped_classes(dataset: str) -> tuple[str, ...]:
    """The class names of one of `DATASETS`, in the order of their ids."""
    return tuple(read_labels(class_file(dataset)))


@lru_cache
def load_groups() -> dict[str, tuple[tuple[str, str], ...]]:
    """Similar classes of all data sets: `{group: ((data set, class), ...)}`; every class is in exactly one group."""
    content = json.loads((_CLASSES / "groups.json").read_text(encoding="utf-8"))
    return {
        group: tuple((dataset, name) for dataset, _, name in (member.partition("/") for member in members))
        for group, members in content.items()
    }


def known_dataset(classes: Sequence[str]) -> str | None:
    """The one of `DATASETS` that has all of these class names; where several have, the one with the fewest others.

    None if there is none, or no class.
    """
    keys = {class_key(name) for name in classes}
    if not keys:
        return None
    fitting = [dataset for dataset in DATASETS if keys <= {class_key(name) for name in shipped_classes(dataset)}]
    return min(fitting, key=lambda dataset: len(shipped_classes(dataset)), default=None)


def _known(dataset: str) -> str:
    if dataset not in DATASETS:
        raise ValueError(f"no prompts are shipped for {dataset!r}; there are some for {', '.join(DATASETS)}")
    return dataset


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} stands twice in the same object")
        result[key] = value
    return result

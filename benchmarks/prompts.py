"""The blind reading: from a sentence alone, its class name masked, can one tell which of five similar classes it is of?

    python benchmarks/prompts.py
    python benchmarks/prompts.py --quick

Sentences are drawn at random, the same number of each kind, from all shipped prompts. In each the words of its class
name are masked. The reader has the masked sentences of five classes of one group, the right one and four others drawn
at random, but none of those that were drawn for the test. It is a bag of stemmed words, each weighed by its inverse
frequency over the sentences that were not drawn (TF-IDF): the class with the largest cosine to the mean of its
sentences is chosen. It knows no language and no video. Ties are counted as wrong.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import common
from claver.prompts.build import KINDS
from claver.prompts.check import pool_entries
from claver.prompts.files import DATASETS, read_prompt_file, shipped_file
from claver.prompts.rules import content_words, mask_name

__all__ = ["CHOICES", "METHOD", "Question", "draw_questions", "main", "read_blindly", "summarize"]

CHOICES = 5

METHOD = (
    "Sentences drawn at random, equally many of each kind; the words of the class name masked in all sentences; five "
    "classes of one group; nearest mean of TF-IDF vectors of stemmed words over the sentences that were not drawn; "
    "ties count as wrong."
)

Vector = dict[str, float]


class Question(NamedTuple):
    """A sentence, where it is from, and the classes to choose from, among them its own."""

    key: str
    kind: str
    text: str
    choices: tuple[str, ...]


def draw_questions(per_kind: int, seed: int) -> tuple[list[Question], dict[str, dict[str, list[str]]], dict[str, str]]:
    """Questions on the shipped prompts, with all entries and names of these, by `dataset/class`.

    Only classes with at least four rivals in their group are asked for; what two data sets share counts once.
    """
    pool = pool_entries([read_prompt_file(shipped_file(dataset)) for dataset in DATASETS])
    draw = random.Random(seed)
    able = [key for key in pool.entries if len(pool.rivals[key]) >= CHOICES - 1]
    questions = []
    for kind in KINDS:
        sentences = [(key, text) for key in able for text in pool.entries[key][kind]]
        for key, text in draw.sample(sentences, min(per_kind, len(sentences))):
            choices = [key, *draw.sample(pool.rivals[key], CHOICES - 1)]
            draw.shuffle(choices)
            questions.append(Question(key, kind, text, tuple(choices)))
    return questions, pool.entries, pool.names


def read_blindly(
    questions: Sequence[Question], entries: Mapping[str, Mapping[str, Sequence[str]]], names: Mapping[str, str]
) -> list[str | None]:
    """For each question the class that is chosen, or None for a tie; it learns from no question's sentence."""
    asked = {question.text for question in questions}
    bags = {
        key: [_words(text, names[key]) for sentences in entry.values() for text in sentences if text not in asked]
        for key, entry in entries.items()
    }
    frequency = Counter(word for sentences in bags.values() for words in sentences for word in set(words))
    total = sum(map(len, bags.values()))
    idf = {word: math.log((1 + total) / (1 + count)) + 1 for word, count in frequency.items()}
    means: dict[str, Vector] = {}
    chosen: list[str | None] = []
    for question in questions:
        for key in question.choices:
            if key not in means:
                means[key] = _mean([_vector(words, idf) for words in bags[key]])
        sentence = _vector(_words(question.text, names[question.key]), idf)
        scores = {
            key: sum(weight * means[key].get(word, 0.0) for word, weight in sentence.items())
            for key in question.choices
        }
        best = max(scores.values())
        winners = [key for key, score in scores.items() if score >= best - 1e-12]
        chosen.append(winners[0] if len(winners) == 1 else None)
    return chosen


def summarize(questions: Sequence[Question], chosen: Sequence[str | None]) -> list[dict[str, Any]]:
    """A row for each kind and one for all: how many were asked and right, with Wilson's 95 % interval."""
    results: defaultdict[str, list[bool]] = defaultdict(list)
    for question, choice in zip(questions, chosen, strict=True):
        results[question.kind].append(choice == question.key)
    rows = []
    for kind, right in [*results.items(), ("all", [each for values in results.values() for each in values])]:
        low, high = _wilson(sum(right), len(right))
        rows.append(
            {
                "kind": kind,
                "sentences": len(right),
                "right": sum(right),
                "accuracy": round(sum(right) / len(right), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "chance": 1 / CHOICES,
            }
        )
    return rows


def _words(text: str, name: str) -> list[str]:
    return content_words(mask_name(text, name, mask=""))


def _vector(words: Sequence[str], idf: Mapping[str, float]) -> Vector:
    """TF-IDF of a sentence, of length 1."""
    weights = {word: count * idf[word] for word, count in Counter(words).items() if word in idf}
    length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
    return {word: weight / length for word, weight in weights.items()}


def _mean(vectors: Sequence[Vector]) -> Vector:
    """The mean of vectors, of length 1."""
    total: defaultdict[str, float] = defaultdict(float)
    for vector in vectors:
        for word, weight in vector.items():
            total[word] += weight
    length = math.sqrt(sum(weight**2 for weight in total.values())) or 1.0
    return {word: weight / length for word, weight in total.items()}


def _wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    share, extra = right / total, z**2 / total
    half = z * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    return (share + extra / 2 - half) / (1 + extra), (share + extra / 2 + half) / (1 + extra)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--sentences", type=int, default=250, help="of each kind, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="50 sentences of each kind")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    questions, entries, names = draw_questions(50 if options.quick else options.sentences, options.seed)
    chosen = read_blindly(questions, entries, names)
    rows = summarize(questions, chosen)
    wrong = [
        {"class": q.key, "kind": q.kind, "sentence": q.text, "taken_for": choice}
        for q, choice in zip(questions, chosen, strict=True)
        if choice != q.key
    ]
    versions = {dataset: read_prompt_file(shipped_file(dataset)).title for dataset in DATASETS}
    path = common.save(
        "prompts", rows, options.out, method=METHOD, seed=options.seed, choices=CHOICES, prompts=versions, wrong=wrong
    )
    common.table(
        f"Which of {CHOICES} similar classes, from one sentence with the name masked",
        ["kind", "sentences", "right", "accuracy", "95 % interval"],
        [
            (r["kind"], r["sentences"], r["right"], f"{r['accuracy']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}")
            for r in rows
        ],
    )
    print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

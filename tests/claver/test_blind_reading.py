"""The blind reading gives away nothing but the sentence, and the stored result is that of the shipped prompts."""

import json
from collections import Counter
from pathlib import Path

import common
import prompts as blind
import pytest
from claver.prompts.build import KINDS
from claver.prompts.files import DATASETS, read_prompt_file, shipped_file


@pytest.fixture(scope="module")
def drawn():
    return blind.draw_questions(50, seed=0)


def test_questions_are_of_five_classes_of_one_group_and_the_same_for_a_seed(drawn):
    questions, entries, _ = drawn
    assert Counter(question.kind for question in questions) == dict.fromkeys(KINDS, 50)
    assert len({question.text for question in questions}) == 200
    for question in questions:
        assert question.text in entries[question.key][question.kind]
        assert question.key in question.choices
        assert len({repr(entries[key]) for key in question.choices}) == blind.CHOICES == 5
    assert blind.draw_questions(50, seed=0)[0] == questions
    assert blind.draw_questions(50, seed=1)[0] != questions
    places = Counter(question.choices.index(question.key) for question in questions)
    assert len(places) == 5  # its place says nothing


def test_neither_names_nor_the_sentences_that_are_asked_help():
    """Classes that differ in their names and in one asked sentence alone leave nothing to go by; another does."""
    names = {key: key for key in ("alpha", "beta", "gamma", "delta", "epsilon")}
    entries = {key: {"scene": [f"A man does {key} here.", f"Nobody does {key} there."]} for key in names}
    entries["beta"]["scene"].append("A man with a hat does beta here.")
    question = blind.Question("beta", "scene", "A man with a hat does beta here.", tuple(names))
    assert blind.read_blindly([question], entries, names) == [None]
    entries["beta"]["scene"].append("The hat is seldom off.")
    assert blind.read_blindly([question], entries, names) == ["beta"]


def test_the_rows_count_right_answers_with_their_interval():
    questions = [blind.Question("a", "scene", str(i), ("a", "b")) for i in range(100)]
    rows = blind.summarize(questions, ["a"] * 80 + ["b"] * 15 + [None] * 5)
    assert [(row["kind"], row["sentences"], row["right"], row["accuracy"]) for row in rows] == [
        ("scene", 100, 80, 0.8),
        ("all", 100, 80, 0.8),
    ]
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((0.7112, 0.8666), abs=1e-3)


def test_it_runs_and_stores_what_it_found(tmp_path, capsys):
    assert blind.main(["--quick", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "prompts.json").read_text())
    assert {"command", "date", "machine", "versions", "method", "seed", "prompts", "rows", "wrong"} <= stored.keys()
    assert stored["rows"][-1]["sentences"] - stored["rows"][-1]["right"] == len(stored["wrong"])
    assert "stored in" in capsys.readouterr().out


def test_the_stored_result_is_of_the_prompts_that_are_shipped():
    path = Path(common.RESULTS) / "prompts.json"
    stored = json.loads(path.read_text())
    assert stored["prompts"] == {dataset: read_prompt_file(shipped_file(dataset)).title for dataset in DATASETS}
    assert stored["rows"][-1]["sentences"] >= 200
    questions, entries, names = blind.draw_questions(stored["rows"][0]["sentences"], stored["seed"])
    rows = blind.summarize(questions, blind.read_blindly(questions, entries, names))
    assert rows == stored["rows"]
    assert rows[-1]["low"] > 2 * rows[-1]["chance"]

"""Prompts: class names as words, prompt files that fit their classes, tokens that always end with the end token."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from claver.class_names import clean_class_name
from claver.data.motions import MOTIONS
from claver.prompts.build import (
    KINDS,
    OBJECT_TEMPLATES,
    TEMPLATES,
    build_prompts,
    draw_prompts,
    load_tokenizer,
    tokenize,
)
from claver.prompts.files import MOTION_PROMPTS, load_prompts
from open_clip.tokenizer import SimpleTokenizer

START, END = 49406, 49407
CLASSES = ["ApplyEyeMakeup", "brush_hair"]
ENTRY = {kind: [f"{kind} sentence {i}" for i in range(5)] for kind in KINDS}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("Archery", "archery"),
        ("BMXRiding", "BMX riding"),
        ("TRX", "TRX"),
        ("brush_hair", "brush hair"),
        ("  abseiling  ", "abseiling"),
        ("playing ping-pong", "playing ping-pong"),
        ("tai  chi", "tai chi"),
        ("passing American football (in game)", "passing American football (in game)"),
        ("turning counter-clockwise", "turning counter-clockwise"),
    ],
)
def test_class_names_become_words(name: str, words: str) -> None:
    assert clean_class_name(name) == words
    assert clean_class_name(words) == words


def test_a_class_name_without_letters_is_refused() -> None:
    with pytest.raises(ValueError, match="'__'"):
        clean_class_name("__")


def test_there_are_sixteen_different_action_templates() -> None:
    assert all(len(set(templates)) == 16 for templates in TEMPLATES.values())
    assert all(template.count("{}") == 1 for template in sum(TEMPLATES.values(), OBJECT_TEMPLATES))


def test_prompts_are_templates_then_sentences_of_each_kind() -> None:
    interpretive = {name: {kind: [f"{name} {text}" for text in ENTRY[kind]] for kind in KINDS} for name in CLASSES}
    prompts = build_prompts(CLASSES, ["a video of {}.", "{}"], interpretive, kinds=("scene", "synonyms"))
    assert len(prompts) == 2 + 2 * 5
    assert prompts[0] == ["a video of apply eye makeup.", "a video of brush hair."]
    assert prompts[2] == ["ApplyEyeMakeup scene sentence 0", "brush_hair scene sentence 0"]
    assert prompts[7] == ["ApplyEyeMakeup synonyms sentence 0", "brush_hair synonyms sentence 0"]
    assert len(build_prompts(CLASSES)) == 16
    assert len(build_prompts(CLASSES, interpretive=interpretive, kinds=KINDS[:3])) == 31  # as in the paper


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 templates need exactly one {}: 'a video'"):
        build_prompts(CLASSES, ["a video", "{}"])
    with pytest.raises(ValueError, match="list of strings"):
        build_prompts(CLASSES, "a video of {}")
    with pytest.raises(ValueError, match=r"unknown kinds .*'smell'"):
        build_prompts(CLASSES, interpretive={}, kinds=["smell"])
    with pytest.raises(KeyError, match="1 of 2 classes have no interpretive prompts: 'brush_hair'"):
        build_prompts(CLASSES, interpretive={"ApplyEyeMakeup": ENTRY})
    with pytest.raises(ValueError, match="nothing to build"):
        build_prompts(CLASSES, [])
    with pytest.raises(ValueError, match="non-empty"):
        build_prompts([])


def test_a_prompt_file_is_matched_to_classes_by_their_words(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"brush hair": ENTRY, "apply eye makeup": ENTRY}))
    assert list(load_prompts(path, CLASSES)) == CLASSES


def test_all_faults_of_a_prompt_file_are_reported_together(tmp_path: Path) -> None:
    bad = copy.deepcopy(ENTRY)
    bad["scene"][2] = "  "
    bad["synonyms"].clear()
    bad["body_parts"] = "hands"
    del bad["decomposition"]
    bad["smell"] = []
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"brush_hair": bad, "juggling": ENTRY, "skipping": ENTRY, "jump": []}))
    with pytest.raises(ValueError, match="does not fit the 3 classes") as caught:
        load_prompts(path, [*CLASSES, "jump"])
    message = str(caught.value)
    for fault in (
        "1 classes without prompts: 'ApplyEyeMakeup'",
        "2 unknown classes: 'juggling', 'skipping'",
        "1 classes that are not an object of kinds: 'jump'",
        "1 missing kinds: 'brush_hair/decomposition'",
        "1 unknown kinds: 'brush_hair/smell'",
        "1 kinds that are not a list of sentences: 'brush_hair/body_parts'",
        "1 kinds without a sentence: 'brush_hair/synonyms'",
        "1 empty sentences: 'brush_hair/scene[2]'",
    ):
        assert fault in message


def test_a_missing_or_broken_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_prompts(tmp_path / "nowhere.json", CLASSES)
    (tmp_path / "broken.json").write_text("{'a':")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        load_prompts(tmp_path / "broken.json", CLASSES)


def test_the_prompts_of_the_motions_are_complete_and_fit_in_the_context() -> None:
    prompts = build_prompts(MOTIONS, OBJECT_TEMPLATES, load_prompts(MOTION_PROMPTS, MOTIONS))
    assert len(prompts) == len(OBJECT_TEMPLATES) + 20
    texts = [text for row in prompts for text in row]
    assert len(set(texts)) == len(texts)  # no sentence says the same of two classes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = tokenize(prompts)
    assert tokens.shape == (len(prompts), len(MOTIONS), 77)


def test_tokens_agree_with_open_clip_for_prompts_that_fit() -> None:
    tokenizer = SimpleTokenizer()
    prompts = build_prompts(CLASSES)
    tokens = tokenize(prompts)
    assert tokens.shape == (16, 2, 77)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.flatten(0, 1), tokenizer([text for row in prompts for text in row]))


def test_long_prompts_lose_whole_words_keep_the_end_token_and_warn_once() -> None:
    long = " ".join(f"extraordinarily{i}" for i in range(60))
    with pytest.warns(UserWarning, match="2 of 4 prompts are longer than 20 tokens") as caught:
        tokens = tokenize([["short", long], [long, "short"]], context_length=20)
    assert len(caught) == 1
    tokenizer = load_tokenizer()
    for row in tokens.flatten(0, 1):
        assert row[0] == START
        assert (row == END).sum() == 1
        end = int((row == END).nonzero())
        assert (row[end + 1 :] == 0).all()
        kept = tokenizer.decode(row[1:end].tolist()).strip().split()
        assert kept == ["short"] or (len(kept) >= 2 and "".join(kept) in long.replace(" ", ""))
    words = long.split()
    shortened = tokens[0, 1]
    length = int((shortened == END).nonzero()) - 1
    counts = [len(tokenizer.encode(" ".join(words[:n]))) for n in range(len(words) + 1)]
    assert length == max(count for count in counts if count <= 18)  # as many words as fit


def test_a_single_word_that_is_too_long_is_cut_and_keeps_the_end_token() -> None:
    tokenizer = SimpleTokenizer()
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        tokens = tokenize([["1234567890" * 3 + " more"]], context_length=5)
    assert torch.equal(tokens[0, 0], tokenizer("123", context_length=5)[0])


def test_what_cannot_be_tokenized_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 rows of lengths \[1, 2\]"):
        tokenize([["a"], ["a", "b"]])
    with pytest.raises(ValueError, match="got 0 rows"):
        tokenize([])
    with pytest.raises(ValueError, match="context_length"):
        tokenize([["a"]], context_length=2)


def test_drawn_prompts_are_distinct_reproducible_and_cover_all() -> None:
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = draw_prompts(31, 5, generator)
        assert drawn.shape == (5,)
        assert drawn.dtype == torch.int64
        assert len(set(drawn.tolist())) == 5
        seen |= set(drawn.tolist())
    assert seen == set(range(31))
    again = draw_prompts(31, 5, torch.Generator().manual_seed(0))
    assert torch.equal(again, draw_prompts(31, 5, torch.Generator().manual_seed(0)))
    for k in (0, 32):
        with pytest.raises(ValueError, match=f"31, got {k}"):
            draw_prompts(31, k)

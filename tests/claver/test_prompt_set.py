"""The prompts that are shipped are complete and short enough, and no class can be taken for another by its words."""

import json
import re
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
from claver.class_names import class_key
from claver.data.lists import read_labels
from claver.data.motions import MOTIONS
from claver.prompts.build import KINDS, tokenize
from claver.prompts.check import SHARE, check_files, pool_entries
from claver.prompts.files import (
    DATASETS,
    MOTION_PROMPTS,
    class_file,
    known_dataset,
    load_groups,
    load_prompts,
    read_prompt_file,
    shipped_classes,
    shipped_file,
)
from claver.prompts.rules import closer_rival, content_words, near_duplicates, shared_words, skeleton
from open_clip.tokenizer import SimpleTokenizer

SIZES = {"kinetics400": 400, "ucf101": 101, "hmdb51": 51, "kinetics600_zero_shot": 217}


@pytest.fixture(scope="module")
def files():
    return {dataset: read_prompt_file(shipped_file(dataset)) for dataset in DATASETS}


@pytest.fixture(scope="module")
def pool(files):
    """Each class once, by data set and name; what two data sets share in the same words is there once."""
    return pool_entries(list(files.values()))


@pytest.fixture(scope="module")
def sentences(pool):
    return [(key, text) for key, entry in pool.entries.items() for kind in KINDS for text in entry[kind]]


def test_all_769_classes_have_four_kinds_of_five_sentences(files):
    assert set(SIZES) == set(DATASETS)
    for dataset, size in SIZES.items():
        entries = files[dataset].entries
        assert list(entries) == list(shipped_classes(dataset))  # in the order of the labels
        assert len(entries) == size
        for name, entry in entries.items():
            assert list(entry) == list(KINDS), name
            assert all(len(entry[kind]) == len(set(entry[kind])) == 5 for kind in KINDS), name
    assert sum(SIZES.values()) == 769


@pytest.mark.parametrize("dataset", DATASETS)
def test_each_file_says_what_it_is_and_has_a_sentence_on_each_line(files, dataset):
    header = files[dataset].header
    assert header["dataset"] == dataset
    assert re.fullmatch(r"\d+\.\d+", header["version"])
    assert header["licence"] == "Apache-2.0"
    assert "language model" in header["provenance"]
    lines = shipped_file(dataset).read_text(encoding="utf-8").splitlines()
    assert (
        sum(line.strip().endswith(('.",', '."')) and line.startswith("    ") for line in lines) == SIZES[dataset] * 20
    )


def test_no_sentence_is_longer_than_clips_context(sentences):
    """By open_clip's tokenizer: what it makes with room to spare has its end within 77."""
    tokens = SimpleTokenizer()([text for _, text in sentences], context_length=200)
    assert int((tokens != 0).sum(1).max()) <= 77
    assert torch.equal(tokens[:, :77].count_nonzero(), tokens.count_nonzero())


def test_no_two_sentences_are_the_same_or_nearly_so(sentences):
    texts = [text for _, text in sentences]
    assert len(texts) == len(set(texts))
    assert [(texts[i], texts[j]) for i, j, _ in near_duplicates(texts)] == []


def test_no_sentence_is_anothers_with_the_class_name_exchanged(pool, sentences):
    frames = sorted({(skeleton(text, pool.names[key]), key) for key, text in sentences})
    assert [list(same) for _, same in groupby(frames, lambda item: item[0]) if len(list(same)) > 1] == []


def test_no_two_classes_share_more_than_half_of_their_words_in_any_kind(pool):
    assert SHARE == 0.5
    for kind in KINDS:
        names, share = shared_words({key: entry[kind] for key, entry in pool.entries.items()})
        i, j = np.unravel_index(share.argmax(), share.shape)
        assert share[i, j] <= SHARE, (kind, names[i], names[j])


def test_every_sentence_is_closer_to_its_class_than_to_any_of_its_group(pool):
    counts = {
        key: Counter(word for kind in entry.values() for text in kind for word in set(content_words(text)))
        for key, entry in pool.entries.items()
    }
    found = [
        (key, text)
        for key, entry in pool.entries.items()
        for kind in entry.values()
        for text in kind
        if closer_rival(text, counts, key, pool.rivals[key])
    ]
    assert found == []


def test_the_checker_finds_nothing(files):
    assert check_files(list(files.values())) == []


def test_the_prompts_of_the_demos_motions_pass_the_same_checks():
    assert check_files([read_prompt_file(MOTION_PROMPTS)], MOTIONS) == []


def test_sentences_are_plain_prose(sentences):
    for key, text in sentences:
        assert text.isascii(), (key, text)
        assert re.fullmatch(r"[A-Z0-9][^.;()\"]*(\.\d[^.;()\"]*)*\.", text), (key, text)
        assert not re.search(r"\b(you|your|this video|the video|the clip)\b", text, re.I), (key, text)


def test_every_class_is_in_one_group_and_has_rivals(files):
    members = [member for group in load_groups().values() for member in group]
    assert sorted(members) == sorted((dataset, name) for dataset in DATASETS for name in shipped_classes(dataset))
    assert len(members) == len(set(members)) == 769
    assert min(len(group) for group in load_groups().values()) >= 5


def test_class_lists_are_labels_and_the_splits_of_kinetics_600_have_160_each():
    for dataset in DATASETS:
        assert read_labels(class_file(dataset)) == list(shipped_classes(dataset))
    rows = class_file("kinetics600_zero_shot").read_text().splitlines()
    assert rows[0] == "id,name,split1,split2,split3"
    assert [sum(int(row.rsplit(",", 3)[i]) for row in rows[1:]) for i in (1, 2, 3)] == [160, 160, 160]
    assert not {class_key(name) for name in shipped_classes("kinetics600_zero_shot")} & {
        class_key(name) for name in shipped_classes("kinetics400")
    }


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_data_set_is_known_by_its_names_however_they_are_spelled(dataset):
    classes = shipped_classes(dataset)
    assert known_dataset(classes) == dataset
    assert known_dataset([class_key(name) for name in classes[:40]]) == dataset
    assert known_dataset([*classes, "juggling eggs"]) is None
    loaded = load_prompts(shipped_file(dataset), classes[::-1][:7])
    assert list(loaded) == list(classes[::-1][:7])
    assert tokenize([[text for entry in loaded.values() for text in entry["scene"]]]).shape == (1, 35, 77)


def test_the_motions_are_of_no_known_data_set():
    assert known_dataset(MOTIONS) is None
    assert json.loads(MOTION_PROMPTS.read_text()).keys() == set(MOTIONS)

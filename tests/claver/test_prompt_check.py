"""`prompts check` finds each kind of fault and says where it is; `show` and `confusion` work on any file."""

import json
import random
import re
from collections import Counter

import claver_k400
import pytest
import torch
from chat_server import entry_for
from claver.evaluation.prompt_confusion import NAMES, clip_encoder, compare_texts, nearest
from claver.prompts.build import KINDS
from claver.prompts.files import (
    FORMAT,
    known_dataset,
    load_prompts,
    read_prompt_file,
    shipped_classes,
    shipped_file,
    write_prompt_file,
)
from claver.prompts.rules import (
    class_words,
    closer_rival,
    content_words,
    mask_name,
    named_class,
    near_duplicates,
    nearest_classes,
    shared_words,
    skeleton,
)
from hypothesis import given
from hypothesis import strategies as st

CLASSES = ["juggling eggs", "folding a map", "riding an ostrich"]


def write(path, change=None, header=None, classes=CLASSES):
    entries = {name: entry_for(name) for name in classes}
    if change:
        change(entries)
    if header is None:
        path.write_text(json.dumps(entries))
    else:
        write_prompt_file(path, header, entries)
    return path


def check(path, capsys, *options):
    status = claver_k400.main(["prompts", "check", str(path), *options])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(CLASSES) + "\n")
    return path


@pytest.mark.parametrize("header", [None, {"version": "0.1", "kinds": list(KINDS)}])
def test_a_sound_file_is_clean(tmp_path, capsys, names, header):
    status, printed = check(write(tmp_path / "p.json", header=header), capsys, "--classes", str(names))
    assert status == 0, printed
    assert printed.splitlines()[-1] == "clean"
    assert "3 classes, 60 sentences" in printed


def put(name, kind, index, text):
    return lambda entries: entries[name][kind].__setitem__(index, text)


def move(entries):
    entries["folding a map"]["scene"][0] = entries["juggling eggs"]["scene"][0]


def copy_words(entries):
    for i in range(5):
        words = " ".join(entries["juggling eggs"]["scene"]).lower().replace(".", "").split()
        random.Random(i).shuffle(words)
        entries["folding a map"]["scene"][i] = " ".join(words[:6]).capitalize() + "."


def exchange(entries):
    entries["juggling eggs"]["synonyms"][0] = "A man likes juggling many an egg in the yard."
    entries["riding an ostrich"]["synonyms"][3] = "The man likes riding many an ostrich in a yard."


def within(entries):
    entries["juggling eggs"]["scene"][0] = "A clown throws seven brown eggs very high."
    entries["juggling eggs"]["synonyms"][0] = "Seven brown eggs a clown throws very high."


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda e: e.pop("folding a map"), "coverage: folding a map: has no prompts"),
        (lambda e: e.update(x=entry_for("x")), "coverage: x: is no class of the list"),
        (lambda e: e["juggling eggs"].pop("scene"), "form: juggling eggs/scene: missing kinds"),
        (lambda e: e["juggling eggs"].update(smell=[]), "form: juggling eggs/smell: unknown kinds"),
        (lambda e: e.update({"juggling eggs": 3}), "form: juggling eggs/: classes that are not an object of kinds"),
        (put("juggling eggs", "scene", 1, " "), "form: juggling eggs/scene[1]: empty sentences"),
        (lambda e: e["juggling eggs"]["scene"].pop(), "number: juggling eggs/scene: 4 sentences, not 5"),
        (put("juggling eggs", "scene", 0, "egg " * 80), "CLIP tokens, at most 77 fit"),
        (put("juggling eggs", "scene", 0, "Two words"), "has fewer than 3 words"),
        (put("juggling eggs", "scene", 0, "An *** egg is thrown up"), "has signs that are no prose"),
        (put("juggling eggs", "scene", 0, "An egg \u202emoves up high"), "has characters that cannot be printed"),
        (put("juggling eggs", "scene", 0, "An egg\x07 moves up high"), "has characters that cannot be printed"),
        (put("juggling eggs", "scene", 0, "An egg \ud83d moves up high"), "has characters that cannot be printed"),
        (
            put("juggling eggs", "scene", 0, "Somebody folds a map of the town."),
            "names another class: p/juggling eggs/scene",
        ),
        (move, "repetition across classes: p/juggling eggs/scene: 1.00 of the words of p/folding a map/scene"),
        (within, "repetition: p/juggling eggs/synonyms: 1.00"),
        (exchange, "name exchanged: p/juggling eggs/synonyms"),
        (move, "as close to another class: p/folding a map/scene"),
        (copy_words, "shared words: p/juggling eggs/scene"),
    ],
)
def test_each_fault_is_found_and_named(tmp_path, capsys, names, change, finding):
    status, printed = check(write(tmp_path / "p.json", change), capsys, "--classes", str(names))
    assert status == 1
    assert finding in printed
    assert "findings:" in printed.splitlines()[-1]


def test_a_class_that_has_the_sentences_of_another_is_found(tmp_path, capsys, names):
    path = write(tmp_path / "p.json", lambda e: e.update({"folding a map": e["juggling eggs"]}))
    status, printed = check(path, capsys, "--classes", str(names))
    assert status == 1
    assert printed.count("repetition across classes: p/juggling eggs/") == 20


def test_files_may_share_sentences_of_the_same_class_and_of_no_other(tmp_path, capsys):
    first = write(tmp_path / "a.json")
    assert check(first, capsys, str(write(tmp_path / "b.json", classes=CLASSES[:2])))[0] == 0
    second = write(tmp_path / "b.json", lambda e: e.update(fishing=e.pop("juggling eggs")))
    printed = check(first, capsys, str(second))[1]
    assert "repetition across classes: a/juggling eggs/scene: 1.00 of the words of b/fishing/scene" in printed
    (tmp_path / "c").mkdir()
    other = write(tmp_path / "c" / "a.json", put("juggling eggs", "scene", 0, "Two words"), classes=CLASSES[:1])
    printed = check(other, capsys, str(first))[1]  # a class of the same name does not hide the other
    assert "sentence: a/juggling eggs/scene: has fewer than 3 words" in printed


def test_a_file_of_a_known_data_set_is_held_against_its_classes(tmp_path, capsys):
    write(tmp_path / "p.json", header={"dataset": "hmdb51"}, classes=["wave", "juggling eggs"])
    status, printed = check(tmp_path / "p.json", capsys)
    assert status == 1
    assert "coverage: brush hair: has no prompts" in printed
    assert "coverage: juggling eggs: is no class of the list" in printed


def test_a_file_that_names_no_data_set_need_not_have_all_classes_of_one(tmp_path, capsys):
    assert known_dataset([]) is None
    for header in (None, {"version": "1"}):
        write(tmp_path / "p.json", header=header, classes=["wave", "brush hair"])
        assert "coverage" not in check(tmp_path / "p.json", capsys)[1]


def test_a_file_may_have_some_kinds_and_other_numbers_if_it_says_so(tmp_path, capsys):
    entries = {name: entry_for(name, ("scene",), 3) for name in CLASSES}
    write_prompt_file(tmp_path / "p.json", {"kinds": ["scene"], "per_kind": 3}, entries)
    assert check(tmp_path / "p.json", capsys)[0] == 0
    assert check(tmp_path / "p.json", capsys, "--per-kind", "4")[0] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold an object"),
        ('{"a": 1', "is not JSON"),
        ('{"a": {}, "a": {}}', "'a' stands twice"),
        ('{"format": "other-1", "classes": {}}', "this program reads 'kronmask-prompts-1'"),
        ('{"format": "kronmask-prompts-1", "classes": []}', "'classes' must be an object"),
        ('{"format": "kronmask-prompts-1", "kinds": ["smell"], "classes": {}}', "'kinds' must be a list"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "p.json").write_text(text)
    status, printed = check(tmp_path / "p.json", capsys)
    assert status == 1
    assert message in printed


def test_both_forms_load_and_more_classes_kinds_and_sentences_do_no_harm(tmp_path):
    entries = {name: entry_for(name, per_kind=7) for name in CLASSES}
    write_prompt_file(tmp_path / "header.json", {"version": "1.0"}, entries)
    (tmp_path / "plain.json").write_text(json.dumps(entries))
    for name in ("header.json", "plain.json"):
        assert load_prompts(tmp_path / name, CLASSES[1:]) == {name: entries[name] for name in CLASSES[1:]}
        assert load_prompts(tmp_path / name, CLASSES[:1], ["scene"]) == {
            CLASSES[0]: {"scene": entries[CLASSES[0]]["scene"]}
        }
    assert read_prompt_file(tmp_path / "header.json").header == {"format": FORMAT, "version": "1.0"}
    with pytest.raises(ValueError, match="1 classes without prompts: 'x'\n  3 unknown classes"):
        load_prompts(tmp_path / "plain.json", ["x"])
    twice = r"1 classes of the list that differ from another only in spelling: 'folding_a_map'"
    with pytest.raises(ValueError, match=twice):
        load_prompts(tmp_path / "plain.json", ["folding_a_map", "folding a map"])


# ---- the rules ------------------------------------------------------------------------------------------------------


def test_words_are_compared_without_endings_and_names_without_brackets():
    assert content_words("The balls are throwing, she throws a ball") == ["bal", "throw", "throw", "bal"]
    assert class_words("fencing (sport)") == class_words("Fencing") == ("fenc",)
    assert mask_name("He throws the axe.", "throwing axe") == "he * the *"
    assert skeleton("He throws the axe.", "throwing axe") == skeleton("He swings a sword.", "swinging a sword")
    assert skeleton("He throws the axe far.", "throwing axe") != skeleton("He swings a sword.", "swinging a sword")


def test_a_name_is_found_word_for_word_unless_it_is_part_of_the_own_or_a_plain_word():
    assert named_class("She was drinking some beer.", "tasting wine", ["drinking beer"]) is None
    assert named_class("She drinks beers here.", "tasting wine", ["drinking beer"]) == "drinking beer"
    assert named_class("She does archery now.", "javelin throw", ["archery"]) == "archery"
    assert named_class("She hits it with a throw.", "javelin toss", ["hit", "throw"]) is None
    assert named_class("A push up at the wall.", "wall push up", ["push up", "PushUps"]) is None


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6), max_size=12),
    st.sampled_from([0.5, 0.7, 1.0]),
)
def test_near_duplicates_are_those_of_the_definition(lists, threshold):
    texts = [" ".join(f"word{letter}" for letter in letters) for letters in lists]
    sets = [set(content_words(text)) for text in texts]
    expected = [
        (i, j)
        for j in range(len(sets))
        for i in range(j)
        if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j])
    ]
    assert [(i, j) for i, j, _ in near_duplicates(texts, threshold)] == sorted(expected)


def test_shared_words_are_counted_of_the_class_with_fewer():
    names, share = shared_words({"a": ["red apple tree"], "b": ["red apple", "apple pear plum cherry"], "c": ["sky"]})
    assert names == ["a", "b", "c"]
    torch.testing.assert_close(
        torch.tensor(share), torch.tensor([[0, 2 / 3, 0], [2 / 3, 0, 0], [0, 0, 0]], dtype=torch.float32)
    )
    texts = {"a": ["red apple tree"], "b": ["red apple pear"], "c": ["blue sky"], "d": ["blue sea"]}
    assert nearest_classes(texts, k=1) == {"a": ["b"], "b": ["a"], "c": ["d"], "d": ["c"]}


def test_a_rival_that_has_all_words_as_often_is_as_close():
    counts = {"own": Counter(bow=3, arrow=1), "rival": Counter(bow=1, arrow=1), "far": Counter(bow=9)}
    assert closer_rival("bow arrow", counts, "own", ["far"]) is None
    assert closer_rival("bow arrow", counts, "own", ["far", "rival"]) == "rival"
    counts["own"]["arrow"] += 2
    assert closer_rival("bow arrow", counts, "own", ["rival"]) is None


# ---- show and confusion ---------------------------------------------------------------------------------------------


def test_show_prints_the_sentences_and_rivals_of_a_class(capsys):
    assert claver_k400.main(["prompts", "show", "Archery"]) == 0
    printed = capsys.readouterr().out
    entry = read_prompt_file(shipped_file("kinetics400")).entries["archery"]
    assert all(text in printed for kind in entry.values() for text in kind)
    assert "javelin throw" in printed
    assert claver_k400.main(["prompts", "show", "juggling eggs"]) == 1
    assert "no class 'juggling eggs'" in capsys.readouterr().err


def test_cosines_are_those_of_mean_features():
    entries = {name: entry_for(name, ("scene", "synonyms"), 2) for name in CLASSES}
    features = {}

    def encode(texts):
        for text in texts:
            features.setdefault(text, torch.randn(5, generator=torch.Generator().manual_seed(len(features))))
        return torch.stack([features[text] for text in texts])

    cosines = compare_texts(entries, encode)
    assert list(cosines) == [NAMES, "scene", "synonyms", "all sentences"]
    unit = torch.nn.functional.normalize
    means = torch.stack([unit(encode(entries[name]["scene"]), dim=-1).mean(0) for name in CLASSES])
    torch.testing.assert_close(cosines["scene"], unit(means, dim=-1) @ unit(means, dim=-1).T)
    found = nearest(CLASSES, cosines["scene"])
    assert [item.cosine for item in found] == sorted((item.cosine for item in found), reverse=True)
    assert {item.name for item in found} == set(CLASSES)
    assert all(item.name != item.other for item in found)


def test_confusion_draws_a_picture_with_any_clip(tmp_path, capsys, monkeypatch):
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
        "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-for-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-for-test.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-for-test").state_dict(), tmp_path / "weights.pt")
    path = write(tmp_path / "p.json")
    arguments = [
        "--model",
        "tiny-for-test",
        "--pretrained",
        str(tmp_path / "weights.pt"),
        "--out",
        str(tmp_path / "c.png"),
    ]
    assert claver_k400.main(["prompts", "confusion", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(
        f"{kind}: the nearest other class has a cosine of" in printed for kind in (NAMES, *KINDS, "all sentences")
    )
    assert (tmp_path / "c.png").stat().st_size > 10_000
    arguments[3] = "none"
    assert claver_k400.main(["prompts", "confusion", "hmdb51", *arguments]) == 0
    names = set(shipped_classes("hmdb51"))
    pairs = re.findall(r"  -?\d\.\d+  (.*) \| (.*)", capsys.readouterr().out)
    assert pairs
    assert all({first, second} <= names for first, second in pairs)
    assert claver_k400.main(["prompts", "confusion", str(path), "--model", "no-such-model"]) == 1
    assert "open_clip has no model 'no-such-model'" in capsys.readouterr().err
    arguments[3] = "no-such-weights"
    assert claver_k400.main(["prompts", "confusion", str(path), *arguments]) == 1
    printed = capsys.readouterr().err
    assert "error: open_clip cannot load tiny-for-test with the weights 'no-such-weights'" in printed


def test_confusion_takes_a_checkpoint_of_this_program(tmp_path):
    from claver.config import Config
    from claver.model import build_model
    from claver.weights.checkpoint import save_checkpoint
    from small import small_model

    config = Config(model=small_model(text={"context_length": 77, "width": 32, "heads": 2, "layers": 1}))
    save_checkpoint(tmp_path / "c.pt", build_model(config.model), config, ["a"], [["a"]], epoch=3)
    title, encode = clip_encoder(checkpoint=str(tmp_path / "c.pt"))
    assert "after epoch 3" in title
    assert compare_texts({name: entry_for(name) for name in CLASSES}, encode)["scene"].shape == (3, 3)

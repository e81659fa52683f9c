"""A run takes the shipped prompts where its labels are of a known data set, says so, and can be told otherwise."""

import csv
import dataclasses
import json
from pathlib import Path

import claver_k400
import pytest
from chat_server import entry_for
from claver.class_names import clean_class_name
from claver.config import Config, DataConfig
from claver.data.lists import DatasetError
from claver.data.motions import MOTIONS, MotionDataset
from claver.demo import demo_config
from claver.model import build_model
from claver.prompts.build import (
    ACTION_TEMPLATES,
    KINDS,
    NEUTRAL_TEMPLATES,
    OBJECT_TEMPLATES,
    OFFICIAL_TEMPLATES,
    TEMPLATES,
    build_prompts,
)
from claver.prompts.choice import choose_prompts, choose_prompts_of_checkpoint
from claver.prompts.files import read_prompt_file, shipped_classes, shipped_file, write_prompt_file
from claver.settings import from_dict, load_config, to_dict
from claver.training.train import train
from claver.weights.checkpoint import load_checkpoint, save_checkpoint
from small import small_config

K400 = list(shipped_classes("kinetics400"))


def choose(classes=K400, **data):
    return choose_prompts(Config(data=DataConfig(**data)), classes)


@pytest.mark.parametrize("dataset", ["kinetics400", "ucf101", "hmdb51", "kinetics600_zero_shot"])
def test_the_labels_of_a_known_data_set_bring_its_sentences(dataset):
    classes = list(shipped_classes(dataset))
    choice = choose(classes)
    assert len(choice.prompts) == 16 + 4 * 5
    assert all(len(row) == len(classes) for row in choice.prompts)
    assert choice.per_step == 5
    entries = read_prompt_file(shipped_file(dataset)).entries
    assert choice.prompts[16:] == [[entries[name][kind][i] for name in classes] for kind in KINDS for i in range(5)]
    assert f"and 20 sentences (5 decomposition, 5 body_parts, 5 synonyms, 5 scene) of the shipped set {dataset}" in (
        choice.description
    )
    assert "exactly these classes" in choice.description


def test_a_subset_in_another_order_does_too_and_other_labels_do_not():
    some = ["zumba", "archery", "YoYo"]
    assert "no sentences, as none are shipped for these labels" in choose(some).description
    assert choose(some).prompts == build_prompts(some, NEUTRAL_TEMPLATES)
    some = some[:2]
    choice = choose(some)
    assert "these 2 among its 400 classes" in choice.description
    assert choice.prompts[3] == ["an action: zumba.", "an action: archery."]
    entries = read_prompt_file(shipped_file("kinetics400")).entries
    assert choice.prompts[16] == [entries["zumba"]["decomposition"][0], entries["archery"]["decomposition"][0]]


def test_class_names_alone_and_templates_alone_are_one_setting_away():
    names = choose(prompts="names")
    assert (names.prompts, names.per_step) == ([[clean_class_name(name) for name in K400]], 1)
    assert names.description == "the class names alone"
    for prompts in ("templates", None):
        assert choose(prompts=prompts).prompts == build_prompts(K400)
        assert choose(prompts=prompts).description == "16 templates (gerund: 373 of 400 class names have a gerund)"
    assert len(choose(templates=()).prompts) == 20  # sentences alone


@pytest.mark.parametrize(
    ("dataset", "templates", "count"),
    [
        ("kinetics400", "gerund", 373),
        ("kinetics600_zero_shot", "gerund", 206),
        ("ucf101", "neutral", 50),
        ("hmdb51", "neutral", 1),
    ],
)
def test_templates_for_gerunds_are_taken_where_most_names_have_one(dataset, templates, count):
    classes = list(shipped_classes(dataset))
    choice = choose(classes, prompts="templates")
    assert choice.prompts == build_prompts(classes, TEMPLATES[templates])
    assert f"{templates}: {count} of {len(classes)}" in choice.description
    for name in TEMPLATES:
        choice = choose(classes, prompts="templates", templates=name)
        assert (choice.prompts, choice.description) == (
            build_prompts(classes, TEMPLATES[name]),
            f"16 templates ({name})",
        )


def test_neither_a_swing_nor_a_ring_is_a_gerund():
    assert (
        "0 of 4" in choose(["swing baseball", "still rings", "String", "ringing"[:4]], prompts="templates").description
    )
    assert (
        "4 of 4" in choose(["RockClimbing", "ringing", "tying tie", "arm wrestling"], prompts="templates").description
    )
    for few, templates in ((3, "gerund"), (2, "neutral")):  # three quarters
        names = [*["running", "sitting", "eating"][:few], *["hit", "run"][: 4 - few]]
        assert f"({templates}: {few} of 4" in choose(names, prompts="templates").description


def test_the_authors_templates_are_told_by_their_name():
    choice = choose(templates="official", kinds=KINDS[:3])
    assert len(choice.prompts) == 31
    assert len(set(OFFICIAL_TEMPLATES)) == 16
    assert [row[0] for row in choice.prompts[:4]] == [
        "abseiling",
        "a video of abseiling.",
        "a video of a person abseiling.",
        "a example of abseiling.",
    ]
    with pytest.raises(
        ValueError, match="data.templates must be one of gerund, neutral, official or a list, not 'ours'"
    ):
        choose(templates="ours")


def test_the_authors_files_of_sentences_are_read_from_their_folder(tmp_path):
    """Their reader wants id;name, their generator writes commas with backslashes and lines as they come."""
    files = {
        "kinetics_400_action_decomposition.csv": 'id;name\n0;First, one runs.\n0;Then one; jumps.\n1;"It eats."\n1;It chews.\n',
        "kinetics_400_body.csv": "id,name\n0,Legs\\, and\n feet.\n1,A mouth.\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    choice = choose(["a run", "a meal"], prompts=str(tmp_path), templates=("{}",))
    assert choice.prompts[1:] == [
        ["First, one runs.", "It eats."],
        ["Then one; jumps.", "It chews."],
        ["Legs, and feet.", "A mouth."],
    ]
    assert f"3 sentences (2 decomposition, 1 body_parts) of the folder {tmp_path}" in choice.description
    assert (
        len(choose(["a run", "a meal"], prompts=str(tmp_path), kinds=("body_parts",), templates=("{}",)).prompts) == 2
    )
    with pytest.raises(ValueError, match="class 1 of 1"):
        choose(["a run"], prompts=str(tmp_path))
    with pytest.raises(ValueError, match="1 missing kinds"):
        choose(["a run", "a meal", "a nap"], prompts=str(tmp_path), kinds=("body_parts",))
    (tmp_path / "body_of_another.csv").write_text("id;name\n")
    with pytest.raises(ValueError, match="more than one file of a kind: 'kinetics_400_body.csv'"):
        choose(["a run", "a meal"], prompts=str(tmp_path))
    for file in tmp_path.glob("*.csv"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no CSV file"):
        choose(["a run"], prompts=str(tmp_path))
    (tmp_path / "scene.csv").write_text("name;id\n")
    with pytest.raises(ValueError, match="first line must be id;name, not 'name;id'"):
        choose(["a run"], prompts=str(tmp_path))


def test_the_demo_trains_on_its_two_templates_alone(tmp_path):
    nowhere = MotionDataset(tmp_path, tmp_path, tmp_path, tmp_path)
    choice = choose_prompts(demo_config(tmp_path, nowhere, temporal=True, seed=0, epochs=1), MOTIONS)
    assert choice.prompts == build_prompts(MOTIONS, OBJECT_TEMPLATES)
    assert (choice.per_step, choice.description) == (2, "2 templates")


def test_kinds_and_numbers_are_as_told():
    assert len(choose(kinds=KINDS[:3]).prompts) == 31  # as the paper's code has it
    choice = choose(kinds=("scene", "synonyms"), per_kind=2, templates=("{}.",))
    entries = read_prompt_file(shipped_file("kinetics400")).entries
    expected = [[entries[name][kind][i] for name in K400] for kind in ("scene", "synonyms") for i in range(2)]
    assert choice.prompts[1:] == expected
    assert "1 templates and 4 sentences (2 scene, 2 synonyms)" in choice.description
    with pytest.raises(ValueError, match="per_kind is 6, but of decomposition some classes have 5"):
        choose(per_kind=6)


def test_a_file_may_have_more_classes_and_any_number_of_sentences(tmp_path):
    entries = {name: entry_for(name, per_kind=3 + len(name) % 2) for name in ("a cat", "a dog", "a bear")}
    write_prompt_file(tmp_path / "p.json", {"version": "2.0"}, entries)
    choice = choose(["a bear", "a dog"], prompts=str(tmp_path / "p.json"))
    assert len(choice.prompts) == 16 + 4 * 3
    assert choice.prompts[-1] == [entries["a bear"]["scene"][2], entries["a dog"]["scene"][2]]
    assert "p.json" in choice.description
    assert choose(["archery"], prompts="ucf101").prompts[-1] == [
        read_prompt_file(shipped_file("ucf101")).entries["Archery"]["scene"][4]
    ]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        choose(["a bear"], prompts="nowhere.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kinds": ["smell"]}, "data.kinds must be one of"),
        ({"kinds": "scene"}, r"kinds must be a list such as \[scene\], not 'scene'"),
        ({"kinds": []}, "data.kinds must be one or more different kinds"),
        ({"kinds": ["scene", "scene"]}, "data.kinds must be one or more different kinds"),
        ({"per_kind": 0}, "data.per_kind must be at least 1"),
    ],
)
def test_wrong_kinds_and_numbers_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict({"data": data})


def test_the_settings_are_those_of_the_command_line():
    config = load_config("k400_b16_8f", {"data": {"prompts": "names"}})
    assert choose_prompts(config, K400).per_step == 1
    config = load_config("k400_b16_8f", {"data": {"kinds": ["scene"], "per_kind": 1}})
    assert len(choose_prompts(config, K400).prompts) == 17
    assert choose_prompts(load_config("k400_b16_8f"), K400).per_step == 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose labels are renamed to classes of HMDB-51."""
    folder = tmp_path_factory.mktemp("choice")
    config = small_config(folder, epochs=1)
    classes = list(shipped_classes("hmdb51"))[:8]
    with open(config.data.labels, "w", newline="") as file:
        csv.writer(file).writerows([("id", "name"), *enumerate(classes)])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, templates=None)), classes


def test_training_and_evaluation_say_which_texts_they_take(run, capsys, tmp_path):
    config, _ = run
    train(config)
    printed = capsys.readouterr().out
    assert "texts: 16 templates (neutral: 0 of 8 class names have a gerund) and 20 sentences" in printed
    assert "of the shipped set hmdb51" in printed
    assert "these 8 among its 51 classes; 2 of 36 drawn each step" in printed
    checkpoint = f"{config.run_dir}/best.safetensors"
    assert len(load_checkpoint(checkpoint)["prompts"]) == 36

    assert claver_k400.main(["eval", "--checkpoint", checkpoint]) == 0
    assert "texts of 8 classes: the 36 of its training" in capsys.readouterr().err
    assert claver_k400.main(["eval", "--checkpoint", checkpoint, "--data.prompts=names"]) == 0
    assert "texts of 8 classes: the class names alone" in capsys.readouterr().err
    assert claver_k400.main(["eval", "--checkpoint", checkpoint, "--data.kinds=[scene]"]) == 0
    assert (
        "16 templates (neutral: 0 of 8 class names have a gerund) and 5 sentences (5 scene)" in capsys.readouterr().err
    )

    other = tmp_path / "labels.csv"  # zero-shot: other classes bring other texts
    with other.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "name"), *enumerate(shipped_classes("ucf101"))])
    assert claver_k400.main(["eval", "--checkpoint", checkpoint, f"--data.labels={other}"]) == 0
    printed = capsys.readouterr()
    assert (
        "texts of 101 classes: 16 templates (neutral: 50 of 101 class names have a gerund) and 20 sentences"
        in printed.err
    )
    assert json.loads(printed.out.splitlines()[-1])["videos"] == 8

    video = f"{config.data.root}/videos/test_00000.mp4"
    assert (
        claver_k400.main(["predict", "--checkpoint", checkpoint, f"--data.labels={other}", "--top", "101", video]) == 0
    )
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 102
    assert (
        "texts of 101 classes: 16 templates (neutral: 50 of 101 class names have a gerund) and 20 sentences"
        in printed.err
    )


def test_class_names_alone_are_trained_on_without_further_settings(run, capsys):
    config, _ = run
    data = dataclasses.replace(config.data, prompts="names")
    train(dataclasses.replace(config, data=data, run_dir=f"{config.run_dir}_names"))
    assert "texts: the class names alone; 1 of 1 drawn each step" in capsys.readouterr().out


def test_a_checkpoint_keeps_its_texts_where_only_the_place_of_the_labels_changes(run, tmp_path):
    config, classes = run
    content = {"prompts": [["x"] * 8], "classes": classes, "config": to_dict(config)}
    moved = tmp_path / "moved.csv"
    moved.write_text(Path(config.data.labels).read_text())
    here = dataclasses.replace(config, data=dataclasses.replace(config.data, labels=str(moved)))
    assert choose_prompts_of_checkpoint(here, content).prompts == [["x"] * 8]
    old = {**content, "config": {"data": {"labels": "gone.csv", "prompts": None, "templates": None}}}  # before kinds
    before = from_dict(old["config"])
    assert choose_prompts_of_checkpoint(before, old, need_labels=False).prompts == [["x"] * 8]  # as predict has it
    assert ACTION_TEMPLATES[0].format("archery") == build_prompts(["archery"])[0][0]


@pytest.mark.parametrize("change", [lambda names: names[::-1], lambda names: names[:7], lambda names: names])
def test_evaluation_reads_the_labels_again_and_prediction_need_not(run, tmp_path, change):
    config, classes = run
    labels = tmp_path / "labels.csv"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, labels=str(labels)))
    content = {"prompts": [["x"] * 8], "classes": classes, "config": to_dict(config)}
    with pytest.raises(DatasetError):
        choose_prompts_of_checkpoint(config, content)
    with labels.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "name"), *enumerate(change(classes))])
    choice = choose_prompts_of_checkpoint(config, content)
    assert choice.classes == change(classes)
    assert (choice.prompts == [["x"] * 8]) == (change(classes) == classes)
    assert choose_prompts_of_checkpoint(config, content, need_labels=False).classes == classes


def test_prediction_of_other_classes_keeps_names_and_templates_but_no_sentences_of_a_file(run, tmp_path, capsys):
    config, classes = run
    data = dataclasses.replace(config.data, prompts="names")
    config = dataclasses.replace(config, data=data)
    checkpoint, labels = tmp_path / "c.pt", tmp_path / "labels.csv"
    save_checkpoint(checkpoint, build_model(config.model), config, classes, build_prompts(classes, ["{}"]))
    labels.write_text("id,name\n0,archery\n1,zumba\n")
    video = f"{config.data.root}/videos/test_00000.mp4"
    command = ["predict", "--checkpoint", str(checkpoint), f"--data.labels={labels}", video]

    def texts(*options):
        assert claver_k400.main([*command, *options]) == 0
        return capsys.readouterr().err

    assert "the class names alone" in texts()
    assert "20 sentences" in texts("--data.prompts=kinetics400")
    file = tmp_path / "c.yaml"
    for prompts, said in (
        ("templates", "16 templates (neutral: 0 of 2 class names have a gerund)\n"),
        ("hmdb51", "of the shipped set kinetics400"),
    ):
        values = to_dict(config) | {"data": to_dict(config)["data"] | {"prompts": prompts}}
        file.write_text(json.dumps(values))  # JSON is YAML
        assert said in texts("--config", str(file))

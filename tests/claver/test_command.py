"""The command: predicts real files, and prints errors that name the culprit instead of a traceback."""

import json
from pathlib import Path

import claver_k400
import pytest
from claver.command_line import parse
from claver.data.lists import read_labels
from claver.demo import demo
from claver.settings import to_dict
from claver.training.train import train
from claver.weights import checkpoint
from small import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    config = small_config(folder)
    train(config)
    return config


def test_predict_prints_the_top_classes_of_each_file(run, capsys):
    videos = [f"{run.data.root}/videos/test_0000{i}.mp4" for i in range(2)]
    assert claver_k400.main(["predict", "--checkpoint", f"{run.run_dir}/best.safetensors", "--top", "3", *videos]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == videos
    assert len(lines) == 8
    assert all("%" in line for line in lines if line.startswith(" "))


def test_predict_takes_other_classes(run, capsys, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("id,name\n0,cat\n1,dog\n")
    video = f"{run.data.root}/videos/test_00000.mp4"
    checkpoint = ["--checkpoint", f"{run.run_dir}/best.safetensors"]
    assert claver_k400.main(["predict", *checkpoint, f"--data.labels={labels}", video]) == 0
    printed = capsys.readouterr()
    assert "texts of 2 classes" in printed.err
    assert claver_k400.main(["predict", video, *checkpoint, "--classes", "cat", "dog"]) == 0
    assert capsys.readouterr().out == printed.out
    assert {line.split("%")[1].strip() for line in printed.out.splitlines()[1:]} == {"cat", "dog"}


def test_predict_reports_a_broken_file_and_goes_on(run, capsys, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    good = f"{run.data.root}/videos/test_00000.mp4"
    assert claver_k400.main(["predict", "--checkpoint", f"{run.run_dir}/best.safetensors", str(bad), good]) == 1
    output = capsys.readouterr().out
    assert "error:" in output
    assert "%" in output


def test_ids_in_another_order_give_the_same_number(run, capsys, tmp_path):
    """What an id means is what the file of labels says now, not what it said when the checkpoint was trained."""
    classes = read_labels(run.data.labels)
    order = [3, 0, 7, 5, 1, 2, 6, 4]  # the new id of each old one
    labels, videos = tmp_path / "labels.csv", tmp_path / "test.txt"
    labels.write_text(
        "id,name\n" + "".join(f"{new},{name}\n" for new, name in sorted(zip(order, classes, strict=True)))
    )
    lines = [line.rsplit(maxsplit=1) for line in Path(run.data.test_list).read_text().splitlines()]
    videos.write_text("".join(f"{path} {order[int(old)]}\n" for path, old in lines))
    command = ["eval", "--checkpoint", f"{run.run_dir}/best.safetensors"]
    results = []
    for settings in ([], [f"--data.labels={labels}", f"--data.test_list={videos}"]):
        assert claver_k400.main([*command, *settings]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("model.attention=kmct", "model.attention is 'kmt' there, 'kmct' here"),
        ("model.placement=interleave", "model.placement is 'append' there, 'interleave' here"),
        ("model.frames=8", "model.frames is 4 there, 8 here"),
        ("model.temporal_embedding=false", "model.temporal_embedding is True there, False here"),
    ],
)
def test_a_model_that_the_weights_are_not_of_is_refused_unless_forced(run, setting, named, capsys):
    command = ["eval", "--checkpoint", f"{run.run_dir}/best.safetensors", f"--{setting}"]
    assert claver_k400.main(command) == 1
    error = capsys.readouterr().err
    assert named in error
    assert "leave these settings out, or pass --force" in error
    if "frames" in setting:
        with pytest.warns(
            UserWarning, match="was trained on 4 frames and gets 8: its temporal embedding is interpolated"
        ):
            assert claver_k400.main([*command, "--force"]) == 0


def test_where_nothing_can_be_forced_no_error_says_so(run, tmp_path, capsys):
    checkpoint, config = f"{run.run_dir}/best.safetensors", tmp_path / "c.yaml"
    config.write_text(json.dumps(to_dict(run) | {"run_dir": str(tmp_path / "run")}))
    for command, remedy in (
        (["push", "--checkpoint", checkpoint, "--folder", str(tmp_path / "hub")], "leave these settings out"),
        (["wise-ft", "--checkpoint", checkpoint, "--out", str(tmp_path / "wise")], "leave these settings out"),
        (["train", "--config", str(config), "--init_from", checkpoint], "give these settings as they are there"),
    ):
        assert claver_k400.main([*command, "--model.attention=kmct"]) == 1
        error = capsys.readouterr().err
        assert error.rstrip().endswith(f"model.attention is 'kmt' there, 'kmct' here; {remedy}")


def test_a_converted_checkpoint_is_read_once_and_its_model_built_once(run, tmp_path, monkeypatch):
    done = []
    for name in ("safe_open", "build_model"):
        original = getattr(checkpoint, name)
        monkeypatch.setattr(checkpoint, name, lambda *args, f=original, n=name: done.append(n) or f(*args))
    out = tmp_path / "out.safetensors"
    assert claver_k400.main(["convert", f"{run.run_dir}/best.safetensors", str(out)]) == 0
    assert done == ["safe_open", "build_model"]


def test_eval_prints_top_1_and_top_5(run, capsys):
    assert claver_k400.main(["eval", "--checkpoint", f"{run.run_dir}/best.safetensors"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["videos"] == 8
    assert 0 <= result["top1"] <= result["top5"] <= 1


def test_a_setting_changes_what_a_checkpoint_says(run, capsys, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("videos/test_00003.mp4 3\n")
    setting = [f"--data.test_list={one}", "--test.clips", "1"]
    assert claver_k400.main(["eval", "--checkpoint", f"{run.run_dir}/best.safetensors", *setting]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["videos"] == 1
    assert claver_k400.main(["eval", "--checkpoint", f"{run.run_dir}/best.safetensors", "--nonsense.key=1"]) == 2
    assert "unknown setting nonsense.key" in capsys.readouterr().err


def options(*arguments):
    return parse(claver_k400.COMMANDS, arguments, description="", default="demo")[0]


def test_a_line_without_a_command_is_the_demo():
    assert options() == options("demo") == {"command": "demo", "demo": {}}
    assert (
        options("--num-train", "3") == options("demo", "--num_train=3") == {"command": "demo", "demo": {"num_train": 3}}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--checkpoint", "nowhere.pt", "x.mp4"], "nowhere.pt: no such checkpoint"),
        (["eval", "--checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["train", "--config", "k400_b32_8f", "--data.labels=nowhere.csv"], "nowhere.csv"),
    ],
)
def test_errors_name_the_culprit_without_a_traceback(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert claver_k400.main(arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "k400_b32_8"], "k400_b32_8: no such configuration (did you mean k400_b32_8f?)"),
        (["train", "--train.epoch=3"], "unknown setting train.epoch (did you mean train.epochs?); see train --help"),
        (["train", "--resumed"], "unknown setting resumed (did you mean resume?)"),
        (["train", "--train.epochs=3x"], "train.epochs must be int, not '3x'"),
        (["demo", "--num-train=many"], "num_train must be int, not 'many'"),
        (["demo", "--train.lr=1"], "unknown setting train.lr; see demo --help"),
        (["trian"], "invalid choice: 'trian'"),
        (["eval"], "required: eval.checkpoint"),
        (["prompts"], "one of {make,check,show,confusion}"),
    ],
)
def test_a_wrong_line_is_refused_with_the_nearest_that_is_known(arguments, message, capsys):
    assert claver_k400.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["eval", "--checkpoint=x", "--train.lr=1"], "train.lr; leave it out"),
        (["eval", "--checkpoint=x", "--seed=1", "--data.train_list=x"], "seed, data.train_list; leave them out"),
        (["predict", "--data.test_list=x", "x.mp4"], "data.test_list"),
        (["predict", "--model.init=zero", "x.mp4"], "model.init"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(arguments, named, capsys):
    assert claver_k400.main(arguments) == 1
    assert f"makes no use of {named}" in capsys.readouterr().err


def test_the_configuration_that_holds_is_printed_and_can_be_read_again(capsys, tmp_path):
    with pytest.raises(SystemExit):
        claver_k400.main(["train", "--config", "k400_l14_8f", "--train.lr=3e-6", "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    given = options("train", "--config", str(tmp_path / "c.yaml"))["train"]
    assert (given["model"]["name"], given["train"]["lr"], given["train"]["eps"]) == ("ViT-L-14", 3e-6, 1e-8)


def test_the_demo_writes_results_checkpoint_and_pictures_and_gives_the_same_numbers_again(tmp_path, capsys):
    results = demo(tmp_path / "demo", num_train=32, num_test=16, epochs=1)
    stored = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert stored == results
    keys = "top1 top5 baseline_top1 order chance classes num_train num_test seconds versions seed command date machine"
    assert set(keys.split()) <= set(stored)
    for name in ("mask", "predictions", "confusion", "curves", "accuracy"):
        assert (tmp_path / "demo" / f"{name}.png").stat().st_size > 10_000
    assert str(tmp_path / "demo" / "results.json") in capsys.readouterr().out
    video = str(tmp_path / "demo" / "data" / "videos" / "test_00000.mp4")
    assert claver_k400.main(["predict", "--checkpoint", str(tmp_path / "demo" / "claver.safetensors"), video]) == 0

    again = demo(tmp_path / "again", num_train=32, num_test=16, epochs=1)
    for values in (results, again):
        del values["seconds"], values["date"]
    assert again == results
    histories = [(tmp_path / run / "kmct" / "history.jsonl").read_text() for run in ("demo", "again")]
    assert histories[0] == histories[1]

"""The command: predicts real files, and prints errors that name the culprit instead of a traceback."""

import json

import claver_k400
import pytest
from claver.demo import demo
from claver.train import train
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
    assert (
        claver_k400.main(["predict", "--checkpoint", f"{run.run_dir}/best.safetensors", "--labels", str(labels), video])
        == 0
    )
    assert {line.split("%")[1].strip() for line in capsys.readouterr().out.splitlines()[1:]} == {"cat", "dog"}


def test_predict_reports_a_broken_file_and_goes_on(run, capsys, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    good = f"{run.data.root}/videos/test_00000.mp4"
    assert claver_k400.main(["predict", "--checkpoint", f"{run.run_dir}/best.safetensors", str(bad), good]) == 1
    output = capsys.readouterr().out
    assert "error:" in output
    assert "%" in output


def test_eval_prints_top_1_and_top_5(run, capsys):
    assert claver_k400.main(["eval", "--checkpoint", f"{run.run_dir}/best.safetensors"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["videos"] == 8
    assert 0 <= result["top1"] <= result["top5"] <= 1


def test_a_setting_changes_what_a_checkpoint_says(run, capsys, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("videos/test_00003.mp4 3\n")
    setting = ["--set", f"data.test_list={one}", "test.clips=1"]
    assert claver_k400.main(["eval", "--checkpoint", f"{run.run_dir}/best.safetensors", *setting]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["videos"] == 1
    assert claver_k400.main(["eval", "--checkpoint", f"{run.run_dir}/best.safetensors", "--set", "nonsense.key=1"]) == 1
    assert "unknown nonsense" in capsys.readouterr().err


def test_options_of_the_demo_hold_before_and_after_its_name():
    parse = claver_k400._parser().parse_args
    assert parse([]).epochs == parse(["demo"]).epochs == 24
    assert parse(["--epochs", "3", "demo"]).epochs == parse(["demo", "--epochs", "3"]).epochs == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--checkpoint", "nowhere.pt", "x.mp4"], "nowhere.pt: no such checkpoint"),
        (["eval", "--checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["train", "--config", "nowhere"], "nowhere: not a readable YAML file"),
        (["train", "--config", "k400_b32_8f", "--set", "train.epoch=3"], "unknown epoch; known are epochs"),
        (["train", "--config", "k400_b32_8f", "--set", "data.labels=nowhere.csv"], "nowhere.csv"),
    ],
)
def test_errors_name_the_culprit_without_a_traceback(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert claver_k400.main(arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_the_demo_writes_results_checkpoint_and_pictures_and_gives_the_same_numbers_again(tmp_path, capsys):
    results = demo(tmp_path / "demo", num_train=32, num_test=16, epochs=1)
    stored = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert stored == results
    keys = "top1 top5 baseline_top1 chance classes num_train num_test seconds versions seed command date machine"
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

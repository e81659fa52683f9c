"""Each configuration that is shipped runs to its end, on small videos in the places that it names."""

import csv
import json

import claver_k400
import pytest
from claver.config import by_split
from claver.data.motions import write_motion_dataset
from claver.model import build_model
from claver.prompts.files import shipped_classes
from claver.settings import CONFIGS, load_config, read_yaml
from claver.weights.checkpoint import save_checkpoint
from small import TEXT, VISION, small_config

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SHIPPED = {"k400": "kinetics400", "hmdb51": "hmdb51", "ucf101": "ucf101", "k600": "kinetics600_zero_shot"}
VIEWS = ("--test.clips=1", "--test.crops=1", "--data.num_workers=0")
TINY_RUN = (
    "epochs=1",
    "batch_size=4",
    "accumulate=1",
    "warmup_epochs=0",
    "precision=no",
    "prompts_per_step=1",
    "fsdp=false",
)
TINY_MODEL = {
    "pretrained": "null",
    "embed_dim": 16,
    "frames": 2,
    "vision": json.dumps(VISION),
    "text": json.dumps(TEXT),
}
SPLITS = {"zero_shot": ["1", "2", "3"], "base_to_novel": ["base", "novel"]}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight small files, of which every list is made."""
    folder = tmp_path_factory.mktemp("experiments")
    dataset = write_motion_dataset(folder / "data", num_train=4, num_test=4, size=32, num_frames=8, progress=False)
    return sorted((dataset.root / "videos").glob("*.mp4"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint as of Kinetics-400."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(folder, num_train=1, num_test=1)
    path = folder / "best.safetensors"
    save_checkpoint(path, build_model(config.model), config, ["a", "b"], [["a", "b"]])
    return str(path)


def write_data(name, root, files):
    """The lists and labels that a configuration names, under another root; where each split has labels, these differ."""
    dataset = next(key for key in ("k400", "hmdb51", "ucf101", "ssv2", "k600") if key in name)
    every = list(shipped_classes(SHIPPED[dataset])) if dataset in SHIPPED else [f"moving {i}" for i in range(20)]
    data = read_yaml(CONFIGS / f"{name}.yaml").get("data", {})
    for number, config in enumerate(by_split(load_config(name)).values()):
        first = 4 * number if "{split}" in data.get("labels", "") else 0
        for path in (config.data.train_list, config.data.test_list, config.data.labels):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
        with (root / config.data.labels).open("w", newline="") as file:
            csv.writer(file).writerows([("id", "name"), *enumerate(every[first : first + 4])])
        for path, chosen in ((config.data.train_list, files[:4]), (config.data.test_list, files[4:])):
            (root / path).write_text("".join(f"{file} {label}\n" for label, file in enumerate(chosen)))


@pytest.mark.filterwarnings("ignore:.*are longer than 16 tokens")
@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_runs_to_its_end(name, videos, trained, tmp_path, monkeypatch, capsys):
    write_data(name, tmp_path, videos)
    monkeypatch.chdir(tmp_path)
    if name.startswith("zero_shot"):
        line, reports = ["eval", "--checkpoint", trained, "--out", "out"], tmp_path / "out"
    else:
        settings = [
            *(f"train.{value}" for value in TINY_RUN),
            *(f"model.{key}={value}" for key, value in TINY_MODEL.items()),
        ]
        line = ["train", *(f"--{setting}" for setting in settings), "--augment.size=32", "--augment.short_side=32"]
        reports = tmp_path / load_config(name).run_dir
    assert claver_k400.main([*line, "--config", name, *VIEWS]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    splits = next((splits for kind, splits in SPLITS.items() if name.startswith(kind)), None)
    if splits:
        assert list(result["splits"]) == splits
        assert all(split["videos"] == 4 for split in result["splits"].values())
        assert 0 <= result["top1"] <= 1
    else:
        assert (result["videos"], result["broken"]) == (4, 0)
    assert json.loads((reports / "results.json").read_text())["top1"] == result["top1"]
    for split in splits or [""]:
        assert (reports / split / "classes.csv").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if "ssv2" in name])
def test_classes_that_name_directions_are_not_mirrored(name):
    assert load_config(name).augment.flip == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("k400")])
def test_there_is_a_configuration_for_each_mask(name):
    config = load_config(name)
    other = load_config(name.removesuffix("_kmct") if name.endswith("_kmct") else f"{name}_kmct")
    assert {config.model.attention, other.model.attention} == {"kmt", "kmct"}
    assert (config.model.frames, config.model.name, config.train) == (other.model.frames, other.model.name, other.train)

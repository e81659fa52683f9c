"""A model goes to a folder or the Hub and comes back the same, with a card; no key and no folder of this machine goes along."""

import json
import traceback
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import yaml
from claver.config import Config, DataConfig
from claver.data.motions import MOTIONS
from claver.model import Claver, build_model
from claver.weights.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from claver.weights.hub import CARD, CONFIG, WEIGHTS, fetch, from_pretrained, push, save_pretrained
from small import small_model

KEY = "hf_" + "k" * 34
PROMPTS = [[f"a {name}" for name in MOTIONS], [f"{name}." for name in MOTIONS]]
CONFIGURATION = Config(
    run_dir="/home/me/runs/mine",
    model=small_model(attention="kmct", window=3),
    data=DataConfig(root="/home/me/videos", train_list="/home/me/train.txt", prompts="/home/me/my.json"),
)
WHAT = {"config": CONFIGURATION, "classes": list(MOTIONS), "prompts": PROMPTS}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(CONFIGURATION.model).eval()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub in memory: repositories as dictionaries of files; the calls that reached it."""
    repositories, calls = {}, []

    def create_repo(self, repo_id, *, private=False, exist_ok=False):
        calls.append(("create", repo_id, private))
        repositories.setdefault(repo_id, {})

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        for path in folder_path.iterdir():
            if path.name in allow_patterns:
                repositories[repo_id][path.name] = path.read_bytes()
        return f"https://hub.example/{repo_id}"

    def download(repo_id, filename, *, revision=None):
        if filename not in repositories.get(repo_id, {}):
            raise FileNotFoundError(f"404: {repo_id}/{filename}")
        path = tmp_path / "cache" / repo_id.replace("/", "--") / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(repositories[repo_id][filename])
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: KEY)
    return repositories, calls


def test_a_folder_gives_the_model_back_with_all_that_it_was_trained_as(tmp_path, model):
    save_pretrained(model, tmp_path / "m", **WHAT)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted([CARD, CONFIG, WEIGHTS])
    loaded = Claver.from_pretrained(tmp_path / "m")
    assert not loaded.training
    assert (loaded.classes, loaded.prompts) == (list(MOTIONS), PROMPTS)
    assert loaded.config.model == CONFIGURATION.model
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    save_pretrained(model, tmp_path / "m", **(WHAT | {"classes": [*MOTIONS[1:], MOTIONS[0]]}))  # replaced
    assert Claver.from_pretrained(tmp_path / "m").classes[-1] == MOTIONS[0]


def test_no_folder_of_this_machine_is_written(tmp_path, model):
    folder = save_pretrained(model, tmp_path / "m", **WHAT)
    stored = load_checkpoint(folder / WEIGHTS)["config"]
    assert (stored["run_dir"], stored["data"]["train_list"]) == ("runs/mine", "train.txt")
    assert (stored["data"]["root"], stored["data"]["prompts"]) == ("videos", "my.json")
    for path in folder.iterdir():
        assert b"/home/me" not in path.read_bytes()


def test_the_card_says_what_the_model_is_and_what_it_reached(tmp_path, model):
    results = {"checkpoint": "best.pt", "top1": 0.9375, "videos": 240}
    card = (save_pretrained(model, tmp_path / "m", **WHAT, results=results) / CARD).read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(front)
    assert data["pipeline_tag"] == "video-classification"
    assert "license" not in data
    assert "license: to be filled in" in front
    for fact in (
        "KMCT, a window of 3 frames",
        "| classes | 8 |",
        "| top1 | 0.9375 |",
        "| videos | 240 |",
        "growing, shrinking",
    ):
        assert fact in body
    assert "best.pt" not in body
    card = (save_pretrained(model, tmp_path / "m", **WHAT, license="apache-2.0") / CARD).read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "No evaluation came with these weights." in card


def test_the_cards_example_runs(tmp_path, model):
    card = (save_pretrained(model, tmp_path / "m", **WHAT) / CARD).read_text()
    scope = {}
    exec(card.split("```python")[1].split("```")[0], scope)
    assert scope["model"].classes == list(MOTIONS)


def test_what_is_pushed_comes_back(model, hub, tmp_path):
    repositories, calls = hub
    assert push(model, "me/claver", **WHAT, private=True) == "https://hub.example/me/claver"
    assert calls == [("create", "me/claver", True)]
    assert set(repositories["me/claver"]) == {WEIGHTS, CONFIG, CARD}
    assert b"--checkpoint hf://me/claver" in repositories["me/claver"][CARD]
    loaded = Claver.from_pretrained("me/claver")
    assert loaded.config.model == CONFIGURATION.model
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert fetch("hf://me/claver").name == WEIGHTS
    assert not any(KEY.encode() in content for content in repositories["me/claver"].values())


def test_a_folder_that_is_pushed_stays_and_its_other_files_are_left_out(model, hub, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "secret.txt").write_text("mine")
    push(model, "me/claver", **WHAT, folder=tmp_path / "m")
    assert set(hub[0]["me/claver"]) == {WEIGHTS, CONFIG, CARD}
    assert (tmp_path / "m" / WEIGHTS).exists()
    assert push(model, **WHAT, folder=tmp_path / "n") == str(tmp_path / "n")
    assert len(hub[1]) == 1  # the second was for this machine alone


@pytest.mark.parametrize("name", ["create_repo", "upload_folder"])
def test_no_error_shows_the_key(model, hub, monkeypatch, capsys, name):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"401 for Authorization: Bearer {KEY}\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, name, refuse)
    with pytest.raises(OSError, match=r"me/claver: cannot be published \(401 .* \[key\]\)") as raised:
        push(model, "me/claver", **WHAT)
    assert KEY not in "".join(traceback.format_exception(raised.value))
    assert KEY not in "".join(capsys.readouterr())


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(model, hub, monkeypatch):
    with pytest.raises(ValueError, match="nowhere to put the model"):
        push(model, **WHAT)
    with pytest.raises(ValueError, match="a/b/c"):
        push(model, "a/b/c", **WHAT)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        push(model, "me/claver", **WHAT)
    assert hub[1] == []


def test_models_that_are_not_there_are_named(tmp_path, hub):
    with pytest.raises(CheckpointError, match=r"me/nothing: no config\.json of it can be had \(404"):
        from_pretrained("me/nothing")
    with pytest.raises(CheckpointError, match=r"a folder without model\.safetensors or best\.safetensors"):
        from_pretrained(tmp_path)


def test_a_run_gives_its_best_weights(tmp_path, model):
    save_checkpoint(tmp_path / "best.safetensors", model, CONFIGURATION, list(MOTIONS), PROMPTS)
    assert fetch(tmp_path) == tmp_path / "best.safetensors"
    assert fetch(tmp_path / "best.safetensors") == tmp_path / "best.safetensors"
    assert from_pretrained(tmp_path).config == CONFIGURATION


def test_a_config_json_that_was_changed_is_refused_as_it_would_not_act(tmp_path, model):
    folder = save_pretrained(model, tmp_path / "m", **WHAT)
    said = json.loads((folder / CONFIG).read_text())
    said["model"]["attention"] = "kmt"
    (folder / CONFIG).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"config\.json: says other things than model\.safetensors"):
        from_pretrained(folder)


def test_a_model_with_other_weights_can_be_saved_again(tmp_path, model):
    loaded = from_pretrained(save_pretrained(model, tmp_path / "m", **WHAT))
    assert loaded.config is not None
    changed = replace(loaded.config, seed=1)
    again = save_pretrained(loaded, tmp_path / "n", config=changed, classes=loaded.classes, prompts=loaded.prompts)
    assert from_pretrained(again).config == changed

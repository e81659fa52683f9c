"""Models on the Hugging Face Hub: folders of `model.safetensors`, which says all, `config.json` for readers, and a model card."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config
from ..files import write_text
from ..model import Claver
from ..prompts.files import DATASETS, known_dataset, read_prompt_file, shipped_file
from ..settings import from_dict, to_dict
from .checkpoint import BEST, CheckpointError, load_model, save_checkpoint

__all__ = ["fetch", "from_pretrained", "model_card", "push", "save_pretrained"]

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SCHEME = "hf://"
PAPER = "https://arxiv.org/abs/2502.03549"


def save_pretrained(
    model: Claver,
    folder: str | Path,
    *,
    config: Config,
    classes: Sequence[str],
    prompts: Sequence[Sequence[str]],
    results: Mapping[str, Any] | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write the folder that `from_pretrained` reads and the Hub shows; folders of this machine are left out of its configuration.

    Args:
        model: whose weights are written.
        folder: is made if it is not there; files of the three names are replaced.
        config: of the training.
        classes: names by label.
        prompts: `[A][C]`, the texts of the classes.
        results: of an evaluation, as in a run's results.json: numbers for the model card.
        license: of the weights, one of the Hub's identifiers; None: the card asks for it.
        repo_id: that the card's example names; None: the folder.

    Raises:
        OSError: a folder that cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, names = _without_folders(config), list(classes)
    save_checkpoint(folder / WEIGHTS, model, config, names, [list(row) for row in prompts])
    texts = {CONFIG: json.dumps(_described(to_dict(config), names), indent=2) + "\n"}
    texts[CARD] = model_card(config, names, len(prompts), results, license=license, name=repo_id or str(folder))
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder


def push(
    model: Claver,
    repo_id: str | None = None,
    *,
    config: Config,
    classes: Sequence[str],
    prompts: Sequence[Sequence[str]],
    results: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool = False,
    folder: str | Path | None = None,
) -> str:
    """Publish a model, with a model card written from its run; the key is that of `hf auth login` or HF_TOKEN.

    Args:
        model: that is published.
        repo_id: `owner/name` on the Hub; it is made if it is not there. None: only `folder` is written.
        config: of the training.
        classes: names by label.
        prompts: `[A][C]`, the texts of the classes.
        results: of an evaluation, as in a run's results.json: numbers for the model card.
        license: of the weights, one of the Hub's identifiers such as apache-2.0; None: the card asks for it.
        private: whether a new repository is seen by its owner alone.
        folder: where to keep what is published; None: nowhere.

    Returns:
        The address of what was published, or `folder`.

    Raises:
        ValueError: a name that the Hub does not allow, no key, or neither `repo_id` nor `folder`.
        OSError: the Hub cannot be reached or refuses, a folder that cannot be written to.
    """
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    what: dict[str, Any] = {"config": config, "classes": classes, "prompts": prompts, "results": results}
    if repo_id is None:
        if folder is None:
            raise ValueError("there is nowhere to put the model: give a repo_id (owner/name), a folder, or both")
        return str(save_pretrained(model, folder, **what, license=license))
    validate_repo_id(repo_id)
    key = huggingface_hub.get_token()
    if key is None:
        raise ValueError("no key for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        written = save_pretrained(model, folder or temporary, **what, license=license, repo_id=repo_id)
        try:
            api = huggingface_hub.HfApi(library_name="kronmask")
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=written,
                allow_patterns=[WEIGHTS, CONFIG, CARD],
                commit_message="Upload CLAVER",
            )
        except Exception as error:  # of several libraries; none may show the key
            raise OSError(f"{repo_id}: cannot be published ({_first_line(error).replace(key, '[key]')})") from None
    return str(commit)


def fetch(name: str | Path, *, revision: str | None = None) -> Path:
    """The file of weights that a name stands for: a file itself, that of a folder, or of `hf://owner/name`, which is downloaded.

    A folder is one of `save_pretrained`, or of a run, whose best weights are taken.

    Raises:
        CheckpointError: the Hub has none or cannot be reached, or the folder has none.
    """
    text = str(name)
    if text.startswith(SCHEME):
        _download(text.removeprefix(SCHEME), CONFIG, revision)  # which lies beside it then
        return _download(text.removeprefix(SCHEME), WEIGHTS, revision)
    if not Path(name).is_dir():
        return Path(name)
    for file in (WEIGHTS, BEST):
        if (Path(name) / file).exists():
            return Path(name) / file
    raise CheckpointError(f"{name}: a folder without {WEIGHTS} or {BEST}")


def from_pretrained(name: str | Path, *, revision: str | None = None) -> Claver:
    """The model of a folder of `save_pretrained`, or of `owner/name` on the Hub, with its `config`, `classes` and `prompts`.

    Raises:
        CheckpointError: no such model, one that is no CLAVER of this program, or a config.json that contradicts the weights.
    """
    local = Path(name).exists() or str(name).startswith(SCHEME)
    weights = fetch(name if local else f"{SCHEME}{name}", revision=revision)
    model, content = load_model(weights)
    model.config = from_dict(content["config"], str(weights))
    model.classes, model.prompts = content["classes"], content["prompts"]
    described = weights.with_name(CONFIG)
    if described.exists():
        binds = json.loads(json.dumps(_described(content["config"], model.classes)))
        if json.loads(described.read_text(encoding="utf-8")) != binds:
            raise CheckpointError(f"{described}: says other things than {WEIGHTS}, which binds; push the model again")
    return model


def model_card(
    config: Config,
    classes: Sequence[str],
    num_prompts: int,
    results: Mapping[str, Any] | None = None,
    *,
    license: str | None = None,
    name: str = "FOLDER",
) -> str:
    """The README of a model: how it was trained, what it reached, and how to use it. The arguments are `save_pretrained`'s."""
    from huggingface_hub import ModelCardData

    tags = ["video-classification", "claver", "kronmask", "clip"]
    data = ModelCardData(library_name="kronmask", pipeline_tag="video-classification", license=license, tags=tags)
    front = data.to_yaml() + ("" if license else "\n# license: to be filled in by whoever publishes the weights")
    dataset = known_dataset(classes)
    model, train = config.model, config.train
    trained_on = "" if dataset is None else f" of {read_prompt_file(shipped_file(dataset)).title}"
    facts = {
        "image and text model": model.name + (f", from the weights {model.pretrained}" if model.pretrained else ""),
        "temporal attention": _attention(config),
        "frames": f"{model.frames}, of {config.augment.size} x {config.augment.size} pixels",
        "statistics of the pixels": f"mean {list(config.augment.mean)}, std {list(config.augment.std)}",
        "classes": f"{len(classes)}{trained_on}",
        "texts of each class": str(num_prompts),
        "training": f"{train.epochs} epochs, batches of {train.batch_size}, learning rate {train.lr:g}, tuned: {train.tune}",
        "seed": str(config.seed),
    }
    lines = [f"| {fact} | {value} |" for fact, value in facts.items()]
    numbers = [f"| {key} | {value:g} |" for key, value in (results or {}).items() if _is_number(value)]
    measured = (
        ["## Results", "", "| | |", "|---|---|", *numbers] if numbers else ["No evaluation came with these weights."]
    )
    hub = name if "/" not in name or Path(name).exists() else f"{SCHEME}{name}"
    return "\n".join(
        [
            "---",
            front.strip(),
            "---",
            "",
            "# CLAVER",
            "",
            "A video classifier that is told its classes as text: CLIP with temporal attention under a Kronecker mask "
            f"([CLAVER, ICLR 2025]({PAPER})), trained and served with kronmask.",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
            *measured,
            "",
            "## Use",
            "",
            "With kronmask's `examples` folder, and `pip install 'kronmask[claver]'`:",
            "",
            "```bash",
            f"python examples/claver_k400.py predict --checkpoint {hub} clip.mp4",
            f'python examples/claver_k400.py predict --checkpoint {hub} clip.mp4 --classes "juggling" "waving"',
            "```",
            "",
            "```python",
            "from claver.model import Claver",
            "",
            f'model = Claver.from_pretrained("{name}")  # model.config, model.classes, model.prompts',
            "```",
            "",
            "<details><summary>Classes</summary>",
            "",
            ", ".join(classes) or "none were given",
            "",
            "</details>",
            "",
        ]
    )


def _attention(config: Config) -> str:
    model = config.model
    limits = f", a window of {model.window} frames" if model.window is not None else ""
    limits += f" and the first {model.sink}" if model.sink else ""
    time = {True: "a learned embedding", False: "no embedding", "rotary": "rotary embeddings"}[model.temporal_embedding]
    return f"{model.attention.upper()}{limits}, {model.placement}, {time} of time"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _described(config: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    return {"model_type": "claver"} | config | {"classes": classes}


def _without_folders(config: Config) -> Config:
    """The configuration with bare file names: where they lie on this machine concerns nobody."""
    data = config.data
    names: dict[str, Any] = {
        key: Path(getattr(data, key)).name for key in ("root", "train_list", "test_list", "labels")
    }
    prompts = data.prompts
    if prompts is not None and prompts not in (*DATASETS, "auto", "templates", "names"):
        prompts = Path(prompts).name
    run_dir = f"runs/{Path(config.run_dir).name}"
    return dataclasses.replace(config, run_dir=run_dir, data=dataclasses.replace(data, prompts=prompts, **names))


def _download(repo_id: str, file: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, file, revision=revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{repo_id}: no {file} of it can be had ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

"""Commands that take a checkpoint and no labelled videos: what each is given, runs and prints."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Any

from . import DEMO_CHECKPOINT
from .command_line import Given

__all__ = ["convert", "export", "features", "predict", "push", "retrieve"]


def predict(
    given: Given,
    videos: list[str],
    *,
    checkpoint: str = DEMO_CHECKPOINT,
    classes: list[str] | None = None,
    top: int = 5,
    json: bool = False,
    annotate: str | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> int:
    """Print the likeliest classes of videos.

    Args:
        videos: files, folders, and patterns such as "clips/*.mp4".
        checkpoint: of this program, an official one, or hf://owner/name.
        classes: names in place of those of the training, as "juggling" "waving"; --data.labels takes a CSV of id,name.
        top: classes to print.
        json: print a JSON object a line.
        annotate: mp4 file to write the frames to, over the likeliest classes so far.
        overwrite: replace that file.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .evaluation.predict import predict as run
    from .weights.loading import open_with_texts

    return run(
        videos,
        **open_with_texts(checkpoint, given, classes, force=force),
        top=top,
        json_lines=json,
        annotated=annotate,
        overwrite=overwrite,
    )


def features(
    given: Given,
    videos: list[str],
    *,
    out: str,
    checkpoint: str = DEMO_CHECKPOINT,
    overwrite: bool = False,
    force: bool = False,
) -> int:
    """Write the features of videos to a file.

    Args:
        videos: files, folders, and patterns such as "clips/*.mp4".
        out: a file that ends in .safetensors or .npz.
        checkpoint: of this program, an official one, or hf://owner/name.
        overwrite: replace that file.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .evaluation.features import features as run
    from .weights.loading import open_checkpoint

    loaded = open_checkpoint(checkpoint, given, force=force)
    return run(videos, out, model=loaded.model, config=loaded.config, overwrite=overwrite)


def retrieve(
    given: Given,
    collection: str,
    *,
    texts: list[str] | None = None,
    videos: list[str] | None = None,
    checkpoint: str = DEMO_CHECKPOINT,
    top: int = 5,
    json: bool = False,
    force: bool = False,
) -> int:
    """Print the videos of a collection that are nearest to texts or to videos.

    Args:
        collection: file that the command `features` wrote.
        texts: queries in words.
        videos: queries that are videos.
        checkpoint: with which the features were made.
        top: videos to print for each query.
        json: print a JSON object a line.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .evaluation.retrieve import retrieve as run
    from .weights.loading import open_checkpoint

    loaded = open_checkpoint(checkpoint, given, force=force)
    return run(
        collection,
        model=loaded.model,
        config=loaded.config,
        texts=texts or (),
        videos=videos or (),
        top=top,
        json_lines=json,
    )


def export(
    given: Given,
    *,
    checkpoint: str,
    out: str,
    classes: list[str] | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> int:
    """Write the two towers as programs of torch.export, and compare them with the model.

    Args:
        checkpoint: of this program, an official one, or hf://owner/name.
        out: folder to write.
        classes: names in place of those of the training; --data.labels takes a CSV of id,name.
        overwrite: replace what was exported there before.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .weights.export import export as run
    from .weights.loading import open_with_texts

    folder = run(folder=out, **open_with_texts(checkpoint, given, classes, force=force), overwrite=overwrite)
    print(f"exported to {folder}")
    return 0


def convert(
    given: Given,
    source: str,
    out: str,
    *,
    classes: list[str] | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> int:
    """Write a checkpoint of the authors, or an older one of this program, as weights that say what they are.

    Args:
        source: the checkpoint.
        out: file that ends in .safetensors.
        classes: names by label, where the checkpoint does not have them; --data.labels takes a CSV of id,name.
        overwrite: replace that file.
        force: take the settings that are given even where the weights were trained under others.
    """
    from .weights.convert import convert as run

    path = run(source, out, given, classes=classes, force=force, overwrite=overwrite)
    print(f"written to {path}")
    return 0


def push(
    given: Given,
    *,
    checkpoint: str,
    repo_id: str | None = None,
    results: str | None = None,
    license: str | None = None,
    private: bool = False,
    folder: str | None = None,
) -> int:
    """Publish a checkpoint on the Hugging Face Hub, with a model card written from its run.

    Args:
        checkpoint: of this program, or an official one.
        repo_id: owner/name; made if it is not there; without it only --folder is written.
        results: results.json of an evaluation; the one beside the checkpoint if there is one.
        license: of the weights, such as apache-2.0.
        private: seen by its owner alone.
        folder: where to keep what is published.
    """
    from .weights.hub import push as run
    from .weights.loading import open_with_texts

    parts = open_with_texts(checkpoint, given)
    path = Path(results) if results else Path(checkpoint).parent / "results.json"
    found: dict[str, Any] | None = None
    if results or path.is_file():
        try:
            found = json_format.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not the results of an evaluation ({error})") from error
    print(run(repo_id=repo_id, **parts, results=found, license=license, private=private, folder=folder))
    return 0

"""Multi-view evaluation of a list, and the probabilities of single videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..config import Config
from ..data.broken import broken_files, check_files
from ..data.datasets import TestDataset, eval_loader
from ..data.lists import Sample, read_labels
from ..data.videos import read_videos
from ..model import Claver
from ..processes import end_together, start_processes
from ..text import encode_prompts

__all__ = [
    "Evaluation",
    "class_probabilities",
    "class_scores",
    "evaluate",
    "feature_probabilities",
    "likeliest",
    "run_evaluation",
    "test_loader",
]


@dataclass(frozen=True)
class Evaluation:
    """What a model says of each video of a list.

    Attributes:
        probabilities: float32 `(videos, C)`, averaged over prompts and views, in the order of the list.
        logits: float32 `(videos, C)`, likewise.
        labels: int64 `(videos,)`.
        broken: `(name, reason)` of the videos that could not be read, in this order too; their probabilities are 0.
    """

    probabilities: Tensor
    logits: Tensor
    labels: Tensor
    broken: tuple[tuple[str, str], ...] = ()

    @property
    def readable(self) -> Tensor:
        """Which videos could be read: bool `(videos,)`."""
        return self.probabilities.any(1)

    def top(self, k: int) -> float:
        """Share of videos whose class is among the k likeliest, 0 to 1; with fewer than k classes, among all.

        A video that could not be read counts as wrong.
        """
        likeliest = self.probabilities.topk(min(k, self.probabilities.shape[1]), dim=1).indices
        return ((likeliest == self.labels[:, None]).any(1) & self.readable).float().mean().item()

    def mean_class(self) -> float:
        """Mean over the classes that have videos of the share of theirs that is right, 0 to 1."""
        counts = torch.bincount(self.labels, minlength=self.probabilities.shape[1])
        return (self.confusion().diagonal()[counts > 0] / counts[counts > 0]).mean().item()

    def confusion(self) -> Tensor:
        """Counts `(C, C)`, true classes in rows and predicted ones in columns, of the videos that could be read."""
        classes = self.probabilities.shape[1]
        cells = (self.labels * classes + self.probabilities.argmax(1))[self.readable]
        return torch.bincount(cells, minlength=classes**2).view(classes, classes)


@torch.no_grad()
def class_probabilities(model: Claver, video: Tensor, text_features: Tensor) -> Tensor:
    """Probabilities `(B, C)` of videos `(B, V, T, 3, H, W)`: softmax over classes, averaged over prompts and views."""
    return class_scores(model, video, text_features)[0]


@torch.no_grad()
def class_scores(model: Claver, video: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and logits `(B, C)` of videos `(B, V, T, 3, H, W)`, each averaged over prompts and views."""
    features = model.encode_video(rearrange(video, "b v t c h w -> (b v) t c h w"))
    logits = rearrange(model.logits(features, text_features), "(b v) a c -> b (v a) c", v=video.shape[1])
    return logits.softmax(-1).mean(1), logits.mean(1)


@torch.no_grad()
def feature_probabilities(model: Claver, video_features: Tensor, text_features: Tensor) -> Tensor:
    """Probabilities `(B, C)` of video features `(B, E)`, as `encode_video` gives: softmax over classes, averaged over prompts."""
    return model.logits(video_features, text_features).softmax(-1).mean(1)


def evaluate(
    model: Claver,
    loader: DataLoader[Any],
    tokens: Tensor,
    accelerator: Accelerator,
    *,
    broken: str = "refuse",
    progress: str | None = "evaluating",
) -> Evaluation:
    """Evaluate on all videos of a list, each exactly once, over all processes.

    Args:
        model: in any mode, which is kept.
        loader: of `datasets.eval_loader`, this process's share of the list.
        tokens: prompts `(A, C, context)`.
        accelerator: the processes.
        broken: "wrong" counts videos that could not be read as wrong, and lists them in the result.
        progress: what the progress bar says; None for no bar.

    Raises:
        DatasetError: files could not be read, and `broken` is "refuse" or none could; it lists all of them. There is then
            no number.
    """
    training = model.training
    model.eval()
    found: list[tuple[int, int, Tensor, Tensor]] = []
    errors: list[tuple[str, str]] = []
    with accelerator.autocast():
        text_features = encode_prompts(model, tokens)
        silent = progress is None or not accelerator.is_main_process
        for batch in tqdm(loader, desc=progress, unit="batch", disable=silent, leave=False):
            errors += batch["errors"]
            if len(batch["index"]):
                scores = class_scores(model, batch["video"].to(accelerator.device), text_features)
                found += zip(
                    batch["index"].tolist(), batch["label"].tolist(), *(score.cpu() for score in scores), strict=True
                )
    model.train(training)
    if accelerator.num_processes > 1:
        found, errors = gather_object(found), gather_object(errors)
    assert isinstance(loader.dataset, TestDataset)
    samples, reasons = loader.dataset.samples, dict(errors)
    expected = len(samples)
    unread = sorted(set(range(expected)) - {index for index, *_ in found})
    if unread and (broken == "refuse" or len(unread) == expected):
        raise broken_files(sorted(errors), expected)
    nothing = torch.zeros(tokens.shape[1])
    found += [(i, samples[i].label, nothing, nothing) for i in unread]
    found.sort(key=lambda item: item[0])
    assert [index for index, *_ in found] == list(range(expected)), "a video was evaluated twice or not at all"
    return Evaluation(
        torch.stack([probabilities for _, _, probabilities, _ in found]),
        torch.stack([logits for *_, logits in found]),
        torch.tensor([label for _, label, _, _ in found]),
        tuple((name, reasons[name]) for name in (str(samples[i].path) for i in unread)),
    )


def run_evaluation(
    config: Config,
    model: Claver,
    tokens: Tensor,
    classes: Sequence[str] | None = None,
    samples: list[Sample] | None = None,
) -> Evaluation:
    """Evaluate a model multi-view on the test list of a configuration; `classes` are those of `tokens (A, C, context)`,
    by default of `data.labels`, and `samples` those of the list, where it was read already.

    Raises:
        ValueError: another number of classes than the texts have.
        DatasetError: a list or files that are missing or broken, all of them named.
    """
    accelerator = start_processes(config)
    classes = read_labels(config.data.labels) if classes is None else classes
    if len(classes) != tokens.shape[1]:
        raise ValueError(f"{len(classes)} classes, but texts of {tokens.shape[1]}; are data.labels those of the texts?")
    if samples is None:
        samples = read_videos(config.data.test_list, config.data.root, classes).samples
    if config.test.broken == "refuse":
        check_files(samples)
    loader = test_loader(config, samples, accelerator, clips=config.test.clips, crops=config.test.crops)
    tokens = tokens.to(accelerator.device)
    with end_together(accelerator):
        return evaluate(model.to(accelerator.device), loader, tokens, accelerator, broken=config.test.broken)


def test_loader(config: Config, samples: list[Sample], accelerator: Accelerator, *, clips: int, crops: int) -> Any:
    """This process's share of test videos, each with `clips * crops` views."""
    dataset = TestDataset(
        samples, config.model.frames, config.augment, num_clips=clips, num_crops=crops, cache=config.data.cache
    )
    return eval_loader(
        dataset,
        config.test.batch_size,
        num_workers=config.data.num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )


def likeliest(probabilities: Tensor, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The `count` likeliest classes, or all if there are fewer, with their `probabilities (C,)`, the likeliest first."""
    top = probabilities.topk(min(count, len(classes)))
    return [(classes[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]

"""What the texts of a training step of CLAVER cost: encoded whole by every process, cut, shared, and encoded once.

    python benchmarks/train_step.py           # towers of 2 blocks, 6 classes; writes benchmarks/results; 2 minutes on two cores
    python benchmarks/train_step.py --quick   # a look, with a small model; writes runs/benchmarks

A step is a forward and a backward through both towers, with prompts that are drawn anew each round out of those shipped for
Kinetics-400, the same for every way; each process has one thread. In one process the whole texts are timed against cut ones,
and for a text tower that is not trained against features encoded once; in two processes (gloo, DistributedDataParallel)
against cut and shared ones. Losses and gradients of the ways are compared. The share of the text tower in the FLOPs of a step
is counted for these and for the models of Kinetics-400 (400 classes, 8 clips of 8 frames on each process), which are not run.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, Times, interleaved, save, table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

__all__ = ["main"]

WHOLE, CUT, SHARED = "whole", "cut", "cut and shared"
FROZEN_WHOLE, FROZEN_ONCE = "not trained, whole", "not trained, once"
WAYS = {1: (WHOLE, CUT, FROZEN_WHOLE, FROZEN_ONCE), 2: (WHOLE, CUT, SHARED)}
KINETICS = {"ViT-B-32": 224, "ViT-B-16": 224, "ViT-L-14": 224}
CONVENTIONS = {
    "seconds": "median over the rounds of a forward and a backward, of the slower process",
    "over_whole": "median of the ratios to the whole texts (with the same towers trained) in the same round",
    "text_share": "FLOPs of the text tower over those of both towers, forward and backward, on one process, for one draw",
    "loss_difference": "largest difference of a loss to that of the whole texts with the same draw",
    "gradient_difference": "largest difference of a gradient to that, over the largest gradient of that parameter",
}


class Step:
    """A model, its prompts, and steps in each way; in one of `ranks` processes."""

    def __init__(self, options: argparse.Namespace, ranks: int, rank: int) -> None:
        from claver.model import build_model
        from claver.prompts.build import tokenize

        torch.manual_seed(0)
        self.model = build_model(_model(options))
        self.tokens = tokenize(_prompts(options.classes), context_length=self.model.clip.context_length)
        self.ranks, self.rank, self.per_step = ranks, rank, options.prompts
        generator = torch.Generator().manual_seed(1 + rank)
        self.video = torch.randn(options.clips, options.frames, 3, options.size, options.size, generator=generator)
        self.target = torch.rand(options.clips, options.classes, generator=generator).softmax(-1)
        self.wrapped: Any = DistributedDataParallel(self.model) if ranks > 1 else self.model
        self.once: Any = None

    def texts(self, way: str, seed: int) -> Any:
        """What `Claver.forward` takes for the texts."""
        from claver.text import TrainingTexts

        ranks, rank = (self.ranks, self.rank) if way == SHARED else (1, 0)
        processes: Any = SimpleNamespace(num_processes=ranks, process_index=rank, autocast=nullcontext)
        every = torch.arange(self.tokens.shape[1])
        if way != FROZEN_ONCE or self.once is None:
            texts = TrainingTexts(self.model, self.tokens, processes, per_step=self.per_step)
        if way == FROZEN_ONCE:
            texts = self.once = self.once or texts
        drawn = texts.draw(torch.Generator().manual_seed(seed))
        return self.tokens[drawn[0]] if way in (WHOLE, FROZEN_WHOLE) else texts.of(drawn, every)

    def __call__(self, way: str, seed: int) -> float:
        """The loss of a step, which leaves its gradients."""
        from claver.model import freeze
        from claver.training.step import contrastive_loss

        if self.ranks == 1:
            freeze(self.model, "temporal" if way in (FROZEN_WHOLE, FROZEN_ONCE) else "full")
        self.model.zero_grad()
        loss = contrastive_loss(self.wrapped(self.video, self.texts(way, seed)), self.target)
        loss.backward()
        return loss.item()

    def gradient_difference(self, way: str, whole: str) -> float:
        """The largest difference of a gradient between two ways, over the largest gradient of that parameter."""
        found = []
        for each in (whole, way):
            self(each, 0)
            found.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])
        return max(float((b - a).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(*found, strict=True))

    def text_share(self, way: str) -> float:
        """The share of the text tower in the FLOPs of a step on one process."""
        from claver.model import freeze
        from claver.text import StepTexts, step_flops

        freeze(self.model, "temporal" if way in (FROZEN_WHOLE, FROZEN_ONCE) else "full")
        texts = self.texts(way, 0)
        if isinstance(texts, Tensor):
            texts = StepTexts((texts.flatten(0, 1),), torch.zeros(texts.shape[:2]).long(), cut=False, shared=False)
        if not isinstance(texts, StepTexts):
            return 0.0
        of_texts, of_clips = step_flops(self.model, texts, tuple(self.video.shape))
        return of_texts / (of_texts + of_clips)


def _model(options: argparse.Namespace) -> Any:
    from claver.config import ModelConfig

    sizes = {
        "layers": options.depth,
        "width": options.width,
        "head_width": 64,
        "patch_size": 32,
        "image_size": options.size,
    }
    text = {
        "context_length": 77,
        "width": options.text_width,
        "heads": options.text_width // 64,
        "layers": options.depth,
    }
    return ModelConfig(name="measured", pretrained=None, vision=sizes, text=text, frames=options.frames)


def _prompts(classes: int) -> list[list[str]]:
    from claver.config import Config
    from claver.prompts.choice import choose_prompts
    from claver.prompts.files import shipped_classes

    return [row[:classes] for row in choose_prompts(Config(), list(shipped_classes("kinetics400"))).prompts]


# ---- processes ------------------------------------------------------------------------------------------------------


def _work(connection: Any, options: argparse.Namespace, ranks: int, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    step = Step(options, ranks, rank)
    while (asked := connection.recv()) is not None:
        method, arguments = asked
        connection.send(getattr(step, method)(*arguments))
    if ranks > 1:
        dist.destroy_process_group()


@contextmanager
def processes(options: argparse.Namespace, ranks: int) -> Iterator[Callable[..., list[Any]]]:
    """`ranks` processes; what it gives calls a method of `Step` in all of them, and returns what they say."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, started = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, options, ranks, rank, folder), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            started.append(process)

        def ask(method: str, *arguments: Any) -> list[Any]:
            for pipe in pipes:
                pipe.send((method, arguments))
            return [pipe.recv() for pipe in pipes]

        yield ask
        for pipe in pipes:
            pipe.send(None)
        for process in started:
            process.join()


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, bar: Any) -> list[dict[str, Any]]:
    """A row for each way, with one process and with two."""
    rows = []
    for ranks, ways in WAYS.items():
        with processes(options, ranks) as ask:
            losses: dict[str, list[list[float]]] = {way: [] for way in ways}

            def step(way: str, ask: Any = ask, losses: Any = losses) -> None:
                losses[way].append(ask("__call__", way, len(losses[way])))  # the draw of this round
                bar.update()

            calls = {way: functools.partial(step, way) for way in ways}
            times = interleaved(calls, torch.device("cpu"), rounds=options.rounds, warmup=1, shortest=0)
            for way in ways:
                whole = FROZEN_WHOLE if way in (FROZEN_WHOLE, FROZEN_ONCE) else WHOLE
                rows.append(_row(way, whole, ranks, times, losses, ask))
                bar.update()
    return rows


def _row(
    way: str, whole: str, ranks: int, times: dict[str, Times], losses: dict[str, list[list[float]]], ask: Any
) -> dict[str, Any]:
    pairs = zip(
        torch.tensor(losses[way]).flatten().tolist(), torch.tensor(losses[whole]).flatten().tolist(), strict=True
    )
    return {
        "way": way,
        "processes": ranks,
        "seconds": times[way].median,
        "spread": times[way].spread,
        "over_whole": times[way].over(times[whole]),
        "text_share": ask("text_share", way)[0],
        "loss_difference": max(abs(a - b) for a, b in pairs),
        "gradient_difference": max(ask("gradient_difference", way, whole)),
    }


def count(models: dict[str, int], frames: int = 8, clips: int = 8, shared_by: int = 8) -> list[dict[str, Any]]:
    """The share of the text tower in a step for models of Kinetics-400, by the FLOPs alone."""
    from claver.config import ModelConfig
    from claver.model import build_model
    from claver.prompts.build import tokenize
    from claver.text import StepTexts, TrainingTexts, step_flops

    tokens = tokenize(_prompts(400))
    rows = []
    for name, size in models.items():
        model = build_model(ModelConfig(name=name, pretrained=None, frames=frames))
        video = (clips, frames, 3, size, size)
        row: dict[str, Any] = {"model": name, "texts": 5 * tokens.shape[1], "clips": clips, "shared_by": shared_by}
        for way, ranks in ((WHOLE, 1), (CUT, 1), (SHARED, shared_by)):
            alone: Any = SimpleNamespace(num_processes=ranks, process_index=0)
            texts = TrainingTexts(model, tokens, alone, per_step=5)
            step = texts.of(texts.draw(torch.Generator().manual_seed(0)), torch.arange(tokens.shape[1]))
            assert isinstance(step, StepTexts)
            if way == WHOLE:
                step = replace(step, groups=(tokens[:5].flatten(0, 1),), cut=False)
            of_texts, of_clips = step_flops(model, step, video)
            row |= {f"text_share_{way}": of_texts / (of_texts + of_clips), f"tflop_{way}": (of_texts + of_clips) / 1e12}
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]], counted: Sequence[dict[str, Any]]) -> None:
    columns = ["processes", "seconds", "spread", "/ whole", "text share", "loss differs by", "gradients"]
    table(
        "a training step",
        ["texts", *columns],
        (
            (
                row["way"],
                row["processes"],
                f"{row['seconds']:.2f}",
                f"{row['spread']:.3f}",
                f"{row['over_whole']:.3f}",
                f"{row['text_share']:.0%}",
                f"{row['loss_difference']:.1e}",
                f"{row['gradient_difference']:.1e}",
            )
            for row in rows
        ),
    )
    table(
        "share of the text tower with 400 classes",
        ["model", *(f"{way}, {what}" for way in (WHOLE, CUT, SHARED) for what in ("share", "TFLOP"))],
        ((row["model"], *(f(row, way) for way in (WHOLE, CUT, SHARED) for f in (_percent, _tflop))) for row in counted),
    )


def _percent(row: dict[str, Any], way: str) -> str:
    return f"{row[f'text_share_{way}']:.0%}"


def _tflop(row: dict[str, Any], way: str) -> str:
    return f"{row[f'tflop_{way}']:.1f}"


def main(arguments: Sequence[str] | None = None, models: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """Measures, prints, writes and returns the rows; `models` of which to count, for tests, instead of those of Kinetics-400."""
    options = _parse(arguments)
    steps = sum(len(ways) * (options.rounds + 2) for ways in WAYS.values())
    with tqdm(total=steps, unit="step") as bar:
        rows = measure(options, bar)
    counted = count(KINETICS if models is None else models)
    told = ("classes", "prompts", "clips", "frames", "size", "depth", "width", "text_width", "rounds")
    more = {name: getattr(options, name) for name in told}
    save(options.name, rows, options.out, settings=more, counted=counted, conventions=CONVENTIONS)
    show(rows, counted)
    print(f"{options.out / options.name}.json and .csv are written")
    return rows


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    full = {
        "classes": 6,
        "clips": 2,
        "size": 96,
        "depth": 2,
        "width": 256,
        "text_width": 256,
        "rounds": 5,
        "out": RESULTS,
    }
    quick = {"classes": 6, "clips": 2, "size": 64, "depth": 3, "width": 128, "text_width": 128, "rounds": 3}
    parser.add_argument("--classes", type=int, help="of Kinetics-400, the first ones: 6")
    parser.add_argument("--prompts", type=int, default=5, help="of each class in a step")
    parser.add_argument("--clips", type=int, help="on each process: 2")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, help="pixels, a multiple of 32: 96")
    parser.add_argument("--depth", type=int, help="blocks of each tower: 2")
    parser.add_argument("--width", type=int, help="of the vision tower: 256")
    parser.add_argument("--text-width", type=int, help="of the text tower: 256")
    parser.add_argument("--rounds", type=int, help="in which each way runs once: 5")
    parser.add_argument("--out", type=Path, help="folder: benchmarks/results")
    parser.add_argument("--name", default="train_step", help="of the files")
    parser.add_argument("--quick", action="store_true", help="a small model, runs/benchmarks")
    options = parser.parse_args(arguments)
    for name, value in (quick | {"out": Path("runs/benchmarks")} if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()

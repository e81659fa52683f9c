"""Training: AdamW, cosine schedule, prompts drawn anew each step; resumes exactly. Processes and precision by Accelerate."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .augment import mixup_cutmix
from .broken import BrokenFiles, check_files, file_problems
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import Config
from .data import (
    Sample,
    TestDataset,
    TrainDataset,
    eval_loader,
    read_labels,
    set_epoch,
    train_loader,
)
from .evaluate import Evaluation, evaluate
from .model import Claver, build_model, describe_trained, freeze, parameter_groups
from .prompt_choice import choose_prompts
from .prompts import tokenize
from .settings import to_dict
from .text import TrainingTexts
from .videos import read_videos

# settings that may change when a run is resumed: they do not change what a step computes
FREE_ON_RESUME = (
    "run_dir",
    "data.root",
    "data.num_workers",
    "data.cache",
    "data.broken",  # while nothing is broken nothing is skipped
    "data.max_broken",
    "test.",
    "train.gradient_checkpointing",
)

__all__ = ["Run", "contrastive_loss", "learning_rate", "run_evaluation", "tokens_of", "train"]


class Run:
    """What a training leaves: its folder, the model and the history of records `{step, loss}` and `{step, top1}`."""

    def __init__(self, folder: Path, model: Claver, tokens: Tensor, history: list[dict[str, Any]]) -> None:
        self.folder, self.model, self.tokens, self.history = folder, model, tokens, history


def learning_rate(step: int, total: int, warmup: int, base: float, minimum: float) -> float:
    """The learning rate at `step`: linear from 0 over `warmup` steps, then the cosine from `base` at step 0 to `minimum`.

    As the authors have it, the cosine runs from the first step, also under the warm-up, and `minimum` is the same for all
    parameter groups.
    """
    if step < warmup:
        return base * step / warmup
    return minimum + (base - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


def contrastive_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits `(B, A, C)` with soft targets `(B, C)`, which hold for each of the A prompts."""
    return F.cross_entropy(logits.float().flatten(0, 1), target.repeat_interleave(logits.shape[1], 0))


def tokens_of(prompts: list[list[str]], model: Claver) -> Tensor:
    """Tokens `(A, C, context)` for the text tower of `model`."""
    return tokenize(prompts, context_length=model.clip.context_length)


def train(
    config: Config,
    *,
    model: Claver | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: str = "training",
    bar_position: int | None = None,
) -> Run:
    """Train and evaluate; writes `config.json`, `history.jsonl`, `last.pt` and `best.pt` into `config.run_dir`.

    What a step does is a function of the configuration and the step, so a run that is resumed ends as if it never stopped.
    `model` is one to train in place of that of `config.model`, for what a configuration cannot say.

    Raises:
        DatasetError: lists or files that are missing or broken, all of them named.
        ValueError: a configuration that does not fit together, or a run folder that holds a run and neither `resume` nor
            `overwrite`.
    """
    accelerator = _processes(config)
    say = accelerator.print
    folder = Path(config.run_dir)
    settings, data = config.train, config.data
    if (folder / "last.pt").exists() and not (resume or overwrite):
        raise ValueError(f"{folder} holds a run already; go on with it (--resume), or choose another run_dir")
    shares = accelerator.num_processes * settings.accumulate
    if settings.batch_size % shares:
        raise ValueError(
            f"train.batch_size is global: {settings.batch_size} is no multiple of {accelerator.num_processes} processes "
            f"* {settings.accumulate} accumulated steps"
        )

    classes = read_labels(data.labels)
    lists = {}
    for name, path in (("train", data.train_list), ("test", data.test_list)):
        videos = lists[name] = read_videos(path, data.root, classes)
        say(f"{name}: {len(videos.samples)} videos of {len(classes)} classes, {videos.kind} {videos.hash}")
    skip = data.broken == "skip"
    broken = BrokenFiles(lists["train"].samples, data.max_broken if skip else None)
    for problem in broken.add(file_problems(lists["train"].samples)):
        say("skipping {}: {}".format(*problem))
    if config.test.broken == "refuse":
        check_files(lists["test"].samples)
    _, prompts, per_step, description = choose_prompts(config, classes)
    if per_step > len(prompts):
        raise ValueError(f"train.prompts_per_step is {per_step}, but there are {len(prompts)} prompts for each class")
    how = "each step" if settings.draws == "step" else "with replacement for each micro-batch and process"
    say(f"texts: {description}; {per_step} of {len(prompts)} drawn {how}")

    torch.manual_seed(config.seed)
    model = build_model(config.model) if model is None else model
    freeze(model, settings.tune)
    if settings.gradient_checkpointing:
        model.clip.set_grad_checkpointing()
    say(describe_trained(model))
    tokens = tokens_of(prompts, model).to(accelerator.device)
    texts = TrainingTexts(
        model, tokens, accelerator, per_step=per_step, draws=settings.draws, classes_per_step=settings.classes_per_step
    )
    clips = settings.batch_size // shares
    say(texts.describe((clips, config.model.frames, 3, config.augment.size, config.augment.size)))
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), betas=settings.betas, eps=settings.eps)
    loader = train_loader(
        TrainDataset(
            lists["train"].samples,
            config.model.frames,
            config.augment,
            seed=config.seed,
            cache=data.cache,
            skip_broken=skip,
        ),
        clips,
        num_workers=data.num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
        stream=lists["train"].kind == "shards",
    )
    middle = _test_loader(config, lists["test"].samples, accelerator, clips=1, crops=1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    trained: Claver = accelerator.unwrap_model(wrapped)

    steps_per_epoch = len(loader) // settings.accumulate
    if not steps_per_epoch:
        raise ValueError(
            f"{len(lists['train'].samples)} training videos do not fill one batch of {settings.batch_size}"
        )
    total, warmup = settings.epochs * steps_per_epoch, round(settings.warmup_epochs * steps_per_epoch)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    first_epoch, best = 0, -1.0
    history: list[dict[str, Any]] = []
    if resume:
        first_epoch, best, history = _restore(
            folder / "last.pt", config, classes, prompts, trained, optimizer, accelerator
        )
        say(f"resuming {folder} after epoch {first_epoch} of {settings.epochs}")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2))

    bar = tqdm(
        total=total,
        initial=first_epoch * steps_per_epoch,
        desc=progress,
        position=bar_position,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    wrapped.train()
    for epoch in range(first_epoch, settings.epochs):
        set_epoch(loader, epoch)
        running = torch.zeros((), device=accelerator.device)
        batches, replaced = iter(loader), 0
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            generator = torch.Generator().manual_seed(hash((config.seed, step)) % 2**63)
            drawn = texts.draw(generator)
            for group, base in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = learning_rate(step, total, warmup, base, settings.lr * settings.min_lr_ratio)
            for micro_batch in range(settings.accumulate):
                if micro_batch and settings.draws == "microbatch":
                    drawn = texts.draw(generator)
                batch = next(batches)
                replaced += len(batch["errors"])
                for problem in broken.add(batch["errors"]):
                    bar.write("skipping {}: {}".format(*problem))
                video, label = batch["video"].to(accelerator.device), batch["label"].to(accelerator.device)
                present = texts.draw_classes(label, generator)
                label = torch.searchsorted(present, label)
                video, target = mixup_cutmix(video, label, len(present), config.augment, generator)
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast():
                        logits = wrapped(video, texts.of(drawn, present))
                    loss = contrastive_loss(logits, target)
                    accelerator.backward(loss)
                    if settings.max_grad_norm and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                    if settings.max_logit_scale is not None:
                        with torch.no_grad():
                            trained.clip.logit_scale.clamp_(max=math.log(settings.max_logit_scale))
                running += loss.detach() / settings.accumulate
            bar.update()
            done = step + 1
            if done % 10 == 0 or done == (epoch + 1) * steps_per_epoch:
                value = accelerator.gather(loss.detach().reshape(1)).mean().item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {done}; {folder} keeps the last whole epoch")
                history.append({"step": done, "loss": value, "lr": optimizer.param_groups[0]["lr"]})
                bar.set_postfix(loss=f"{value:.3f}")
        if skip:
            broken.add(gather_object(list(broken.reasons.items())))  # the same for all processes, so all stop or none
            total_replaced = sum(gather_object([replaced]))
            say(
                f"{progress}, epoch {epoch + 1}: {total_replaced} clips of broken videos were replaced; "
                f"{len(broken.reasons)} of {broken.expected} videos are missing or broken"
            )
        if (epoch + 1) % settings.evaluate_every == 0 or epoch + 1 == settings.epochs:
            top1 = evaluate(trained, middle, tokens, accelerator, broken=config.test.broken, progress=None).top(1)
            history.append({"step": (epoch + 1) * steps_per_epoch, "top1": top1})
            bar.write(
                f"{progress}, epoch {epoch + 1}: loss {running.item() / steps_per_epoch:.3f}, top-1 of the middle view {top1:.3f}"
            )
            improved = top1 > best
            best = max(best, top1)
        else:
            improved = False
        if accelerator.is_main_process:
            state = {"epoch": epoch + 1, "best": best, "history": history, "optimizer": optimizer.state_dict()}
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            if improved:
                save_checkpoint(folder / "best.pt", trained, config, classes, prompts, epoch=epoch + 1)
            save_checkpoint(folder / "last.pt", trained, config, classes, prompts, **state)
            (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
        accelerator.wait_for_everyone()
    bar.close()
    return Run(folder, trained, tokens, history)


def run_evaluation(config: Config, model: Claver, tokens: Tensor, classes: Sequence[str] | None = None) -> Evaluation:
    """Evaluate a model multi-view on the test list of a configuration; `classes` are those of `tokens (A, C, context)`,
    by default of `data.labels`.

    Raises:
        ValueError: another number of classes than the texts have.
        DatasetError: a list or files that are missing or broken, all of them named.
    """
    accelerator = _processes(config)
    classes = read_labels(config.data.labels) if classes is None else classes
    if len(classes) != tokens.shape[1]:
        raise ValueError(f"{len(classes)} classes, but texts of {tokens.shape[1]}; are data.labels those of the texts?")
    samples = read_videos(config.data.test_list, config.data.root, classes).samples
    if config.test.broken == "refuse":
        check_files(samples)
    loader = _test_loader(config, samples, accelerator, clips=config.test.clips, crops=config.test.crops)
    tokens = tokens.to(accelerator.device)
    return evaluate(model.to(accelerator.device), loader, tokens, accelerator, broken=config.test.broken)


def _processes(config: Config) -> Accelerator:
    """Accelerate's view of the processes; its state is global, and another run in this process may have had another precision."""
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=config.train.precision, gradient_accumulation_steps=config.train.accumulate)


def _test_loader(config: Config, samples: list[Sample], accelerator: Accelerator, *, clips: int, crops: int) -> Any:
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


def _restore(
    path: Path,
    config: Config,
    classes: list[str],
    prompts: list[list[str]],
    model: Claver,
    optimizer: Any,
    accelerator: Accelerator,
) -> tuple[int, float, list[dict[str, Any]]]:
    content = load_checkpoint(path)
    ours, theirs = _flat(to_dict(config)), _flat(content.get("config", {}))
    if theirs:  # a setting that is newer than the checkpoint was at its default
        theirs = _flat(to_dict(Config())) | theirs
    different = [
        f"{key} = {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(ours.keys() | theirs.keys())
        if not key.startswith(FREE_ON_RESUME) and ours.get(key) != theirs.get(key)
    ]
    if different:
        raise CheckpointError(f"{path}: is of a run with other settings: {'; '.join(different)}")
    for name, now, source in (
        ("classes", classes, config.data.labels),
        ("prompts", prompts, "the file of data.prompts"),
    ):
        if content.get(name) != now:
            raise CheckpointError(
                f"{path}: its {name} are not those of now; put {source} back as it was, or choose another run_dir"
            )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    if accelerator.scaler is not None and "scaler" in content:
        accelerator.scaler.load_state_dict(content["scaler"])
    return content["epoch"], content["best"], content["history"]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

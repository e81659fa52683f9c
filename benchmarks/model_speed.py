"""How fast whole video models are: ViT-B/16 patched by kronmask against the video models of Hugging Face.

    python benchmarks/model_speed.py           # 8, 16 and 32 frames of 224 px; writes benchmarks/results
    python benchmarks/model_speed.py --quick   # a look, in two minutes on two cores; writes runs/benchmarks
    python benchmarks/model_speed.py --frames 8 --models kmt kmct timesformer --passes forward

All have an encoder of the same size, 400 classes and random weights, and take video `(batch, frames, 3, height, width)`.
Results are written after each pass, so an interrupted run keeps what it has. On the CPU each model's memory is measured in
a process of its own, which also finds what does not fit. On two cores a round of everything takes about a quarter of an hour
at most; the default is four of them, one for memory and three that count.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    available_memory,
    default_device,
    failing_into,
    interleaved,
    peak_memory,
    save,
    table,
    until_failure,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from kronmask import patch_vit

__all__ = ["MODELS", "Encoder", "Entry", "build", "flops", "image_model", "logits_of", "main"]

PASSES = ("forward", "forward+backward")
REFERENCE = "frame_average"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito
CONVENTIONS = {
    "seconds": "median over the rounds of one call with `batch` clips; spread: distance of its quartiles over the median",
    "gflops": "2 x the multiply-adds of one forward of one clip; attention counts the pairs that its mask allows",
    "parameters": "all that the model holds, temporal embeddings and head included",
    "peak_bytes": "what one call adds to weights and clip; forward without gradients, forward+backward with them",
    "over_frame_average": "median of the ratios of seconds in the same round",
}


# ---- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """Sizes that all models share: ViT-B/16's. Patches have 16 px."""

    image: int = 224
    width: int = 768
    depth: int = 12
    heads: int = 12
    classes: int = 400


@dataclass(frozen=True)
class Entry:
    """A model of the comparison; `build(encoder, frames)` makes it."""

    model: str
    attention: str
    placement: str
    build: Callable[[Encoder, int], nn.Module]
    note: str


class FrameAverage(nn.Module):
    """The image model on each frame, its logits averaged."""

    def __init__(self, image_model: nn.Module) -> None:
        super().__init__()
        self.image_model = image_model

    def forward(self, video: Tensor) -> Tensor:
        return self.image_model(video.flatten(0, 1)).unflatten(0, video.shape[:2]).mean(1)


class XCLIPVideo(nn.Module):
    """The video side of X-CLIP and a fixed matrix of classes: what a clip costs once the texts are encoded."""

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        del model.text_model, model.text_projection, model.logit_scale
        del model.prompts_visual_layernorm, model.prompts_visual_projection, model.prompts_generator
        self.model, self.config = model, model.config
        self.classes = nn.Linear(model.projection_dim, classes, bias=False)

    def forward(self, video: Tensor) -> Tensor:
        return self.classes(F.normalize(self.model.get_video_features(video).pooler_output, dim=-1))


def image_model(encoder: Encoder) -> nn.Module:
    """The image model that all of ours are made of, with random weights."""
    import timm

    sizes: dict[str, Any] = {"embed_dim": encoder.width, "depth": encoder.depth, "num_heads": encoder.heads}
    classes, image = encoder.classes, encoder.image
    return timm.create_model("vit_base_patch16_224", num_classes=classes, img_size=image, **sizes)


def _patched(attention: str, placement: str) -> Callable[[Encoder, int], nn.Module]:
    def make(encoder: Encoder, frames: int) -> nn.Module:
        # random weights: multiplying by the zeros of the default takes a GPU less power than training does
        model = image_model(encoder)
        return patch_vit(model, frames=frames, attention=attention, placement=placement, init="random")

    return make


def _hugging_face(kind: str, **options: Any) -> Callable[[Encoder, int], nn.Module]:
    def make(encoder: Encoder, frames: int) -> nn.Module:
        import transformers

        sizes = _sizes(encoder, frames) | {"num_labels": encoder.classes}
        config = getattr(transformers, f"{kind}Config")(**sizes, **options)
        return getattr(transformers, f"{kind}ForVideoClassification")(config)

    return make


def _xclip(encoder: Encoder, frames: int) -> nn.Module:
    from transformers import XCLIPConfig, XCLIPModel

    width, heads = encoder.width * 2 // 3, encoder.heads * 2 // 3  # 512 and 8 for B/16, as published
    integration = {"mit_hidden_size": width, "mit_intermediate_size": 4 * width, "mit_num_attention_heads": heads}
    vision = _sizes(encoder, frames) | {"patch_size": 16} | integration
    unused = {"num_hidden_layers": 1, "hidden_size": 8}
    config = XCLIPConfig(text_config=unused, vision_config=vision, projection_dim=width)
    return XCLIPVideo(XCLIPModel(config), encoder.classes)


def _sizes(encoder: Encoder, frames: int) -> dict[str, int]:
    """The sizes in the words of Hugging Face's configurations."""
    sizes = {"image_size": encoder.image, "num_frames": frames, "hidden_size": encoder.width}
    sizes |= {"num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads}
    return sizes | {"intermediate_size": 4 * encoder.width}


_FLOOR = "timm's image model on each frame, logits averaged: the floor"
_APPEND = "a third more blocks after the image blocks, over all tokens of the clip"
_REPLACE = "the image blocks' own attention, over all tokens of the clip; no new blocks"
_DIVIDED = "attention over time in front of each image block, as in TimeSformer, but with a class token in each frame"
_TIMESFORMER = "divided space-time attention with one class token for the clip and a second projection after time"
_XCLIP = "video side only: vision encoder, multi-frame transformer, fixed class matrix; no text encoder, no prompts"
_TUBELETS = "tubelets of 2 frames: half the tokens of the others"

MODELS = {
    REFERENCE: Entry("frame average", "spatial", "", lambda encoder, _: FrameAverage(image_model(encoder)), _FLOOR),
    "kmt": Entry("KMT (append)", "kmt", "append", _patched("kmt", "append"), _APPEND),
    "kmct": Entry("KMCT (append)", "kmct", "append", _patched("kmct", "append"), _APPEND),
    "joint": Entry("joint (append)", "joint", "append", _patched("joint", "append"), _APPEND),
    "kmt_replace": Entry("KMT (replace)", "kmt", "replace", _patched("kmt", "replace"), _REPLACE),
    "divided": Entry(
        "divided (interleave, temporal)", "temporal", "interleave", _patched("temporal", "interleave"), _DIVIDED
    ),
    "timesformer": Entry("TimeSformer (HF)", "divided", "", _hugging_face("Timesformer", patch_size=16), _TIMESFORMER),
    "xclip": Entry("X-CLIP (HF)", "spatial, message tokens", "", _xclip, _XCLIP),
    "vivit": Entry("ViViT (HF)", "joint", "", _hugging_face("Vivit", tubelet_size=(2, 16, 16)), _TUBELETS),
    "videomae": Entry(
        "VideoMAE (HF)", "joint", "", _hugging_face("VideoMAE", patch_size=16, tubelet_size=2), _TUBELETS
    ),
}


def build(name: str, encoder: Encoder, frames: int) -> nn.Module:
    """A model of `MODELS` with random weights."""
    torch.manual_seed(0)
    return MODELS[name].build(encoder, frames)


def logits_of(model: nn.Module, video: Tensor) -> Tensor:
    """Logits `(B, classes)` of video `(B, T, 3, H, W)`."""
    output = model(video)
    return output if isinstance(output, Tensor) else output.logits


# ---- measurement ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is the same for all models that are timed against each other."""

    encoder: Encoder
    frames: int
    batch: int
    dtype: str
    device: str

    def video(self) -> Tensor:
        shape = (self.batch, self.frames, 3, self.encoder.image, self.encoder.image)
        return torch.randn(shape, dtype=getattr(torch, self.dtype), device=self.device)

    def model(self, name: str) -> nn.Module:
        return build(name, self.encoder, self.frames).to(self.device, getattr(torch, self.dtype))


def step(model: nn.Module, video: Tensor, which: str) -> Callable[[], object]:
    """The measured call of a pass. It leaves no gradients behind."""
    model.train(which != "forward")  # no model has dropout or stochastic depth
    target = torch.zeros(len(video), dtype=torch.long, device=video.device)

    def forward() -> Tensor:
        with torch.no_grad():
            return logits_of(model, video)

    def forward_and_backward() -> None:
        F.cross_entropy(logits_of(model, video).float(), target).backward()
        model.zero_grad(set_to_none=True)

    return forward if which == "forward" else forward_and_backward


def prepare(name: str, setting: Setting, which: str) -> Callable[[], object]:
    """`step` of a new model. In a process of its own it fails where it would take more memory than is free."""
    if multiprocessing.parent_process() is not None:
        import resource

        free = int(available_memory(torch.device("cpu")))
        resource.setrlimit(resource.RLIMIT_DATA, (free, resource.RLIM_INFINITY))
    return step(setting.model(name), setting.video(), which)


def flops(model: nn.Module, video: Tensor) -> int:
    """2 x the multiply-adds of a forward, from shapes alone: nothing is computed."""
    model.eval()
    # torch 2.14 has no formula for the CPU's flash kernel; MATH makes of it matrix products, which have one
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            logits_of(model, fake.from_tensor(video))
        return counter.get_total_flops()


def measure(
    names: Sequence[str], setting: Setting, passes: Sequence[str], rounds: int, memory: bool, bar: tqdm
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each pass, all models timed against each other. A model that fails is a row with its `error`."""
    device, video = torch.device(setting.device), setting.video()
    rows, models = {name: _new_row(MODELS[name], setting, rounds) for name in names}, {}
    for name, row in rows.items():
        bar.set_description(f"{setting.frames} frames: building {row['model']}")
        with failing_into(row):
            models[name] = model = setting.model(name)
            row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            row["gflops"] = flops(model, video) / setting.batch / 1e9
            if kind := getattr(getattr(model, "config", None), "_attn_implementation", None):
                row["note"] += f"; {kind} attention"
    for which in passes:
        done = {name: row | {"pass": which} for name, row in rows.items()}
        calls = {}
        for name, row in done.items():
            bar.set_description(f"{setting.frames} frames, {which}: memory of {row['model']}")
            if not row["error"]:
                with failing_into(row):
                    row["peak_bytes"] = peak_memory(prepare, name, setting, which, device=device) if memory else None
                    calls[name] = until_failure(step(models[name], video, which), row)
        bar.set_description(f"{setting.frames} frames, {which}: timing")
        # on the CPU a call of seconds needs no warming up: the median leaves a slow first round out
        times = interleaved(calls, device, rounds=rounds, warmup=int(device.type == "cuda"))
        for name, row in done.items():
            if not row["error"]:
                row |= {"seconds": times[name].median, "spread": times[name].spread if rounds > 1 else None}
                row["clips_per_second"] = setting.batch / times[name].median
                if not done[REFERENCE]["error"]:
                    row["over_frame_average"] = times[name].over(times[REFERENCE])
        bar.update()
        yield list(done.values())


def _new_row(entry: Entry, setting: Setting, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"model": entry.model, "attention": entry.attention, "placement": entry.placement}
    row |= {"frames": setting.frames, "batch": setting.batch, "size": setting.encoder.image, "pass": ""}
    row |= {"seconds": None, "spread": None, "rounds": rounds, "clips_per_second": None, "gflops": None}
    row |= {"parameters": None, "peak_bytes": None, "over_frame_average": None}
    return row | {"note": entry.note, "error": ""}


# ---- what is shown --------------------------------------------------------------------------------------------------


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the rows of one pass as a table."""

    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        yield row["model"]
        for key, unit, digits in columns.values():
            yield "" if row[key] is None else f"{row[key] / unit:.{digits}f}"
        yield row["error"]

    columns = {
        "clips/s": ("clips_per_second", 1, 3),
        "time / frame average": ("over_frame_average", 1, 2),
        "spread": ("spread", 1, 3),
        "GFLOPs": ("gflops", 1, 1),
        "M parameters": ("parameters", 1e6, 1),
        "peak MiB": ("peak_bytes", 2**20, 0),
    }
    title = "{frames} frames of {size} px, batch {batch}, {pass}".format_map(rows[0])
    table(title, ["model", *columns, "error"], (list(cells(row)) for row in rows))


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws time per clip relative to the frame average: a panel for each pass, a bar for each number of frames."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["over_frame_average"] is not None]
    names, lengths, passes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "frames", "pass"))
    if not rows:
        return
    floor = {row["frames"]: row["gflops"] for row in rows if row["model"] == MODELS[REFERENCE].model}
    height = 0.84 / len(lengths)
    figure = Figure(figsize=(2.6 + 4.6 * len(passes), 1.4 + 0.55 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axes, which in zip(panels, passes, strict=True):
        for index, frames in enumerate(lengths):
            shown = [row for row in rows if row["pass"] == which and row["frames"] == frames]
            places = [names.index(row["model"]) + (index + 0.5) * height - 0.42 for row in shown]
            times = [row["over_frame_average"] for row in shown]
            work = [row["gflops"] / floor[frames] for row in shown]
            axes.barh(places, times, 0.9 * height, color=COLORS[index % len(COLORS)], label=f"time, {frames} frames")
            axes.plot(work, places, "|k", ms=18 / len(lengths), mew=1.5, label="" if index else "GFLOPs of the forward")
            for row, place, right in zip(shown, places, map(max, times, work), strict=True):
                axes.text(right, place, f"  {row['clips_per_second']:.2g} clips/s", va="center", fontsize=6)
        axes.set(title=which, xlabel="relative to the frame average", yticks=range(len(names)), yticklabels=names)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18, y=0.01)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)


# ---- command --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, encoder: Encoder | None = None) -> list[dict[str, Any]]:
    """Measures, prints, writes and returns the rows; `encoder` is for tests, which take a smaller one than ViT-B/16."""
    options = _parse(arguments)
    encoder = replace(encoder or Encoder(), image=options.size)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = list(dict.fromkeys([REFERENCE, *options.models]))
    more = {"encoder": asdict(encoder), "dtype": options.dtype, "device": options.device, "conventions": CONVENTIONS}
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(options.frames) * len(options.passes), unit="table") as bar:
        for frames in options.frames:
            setting = Setting(encoder, frames, options.batch, options.dtype, options.device)
            for finished in measure(names, setting, options.passes, options.rounds, not options.no_memory, bar):
                rows += finished
                save(options.name, rows, options.out, **more)
                plot(rows, options.out / f"{options.name}.png")
                with bar.external_write_mode():
                    show(finished)
    for model, note in dict.fromkeys((row["model"], row["note"]) for row in rows):
        print(f"{model}: {note}")
    print(f"{options.out / options.name}.json, .csv and .png are written")
    return rows


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", help="8 16 32")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="the frame average always runs")
    parser.add_argument("--batch", type=int, default=1, help="clips a call")
    parser.add_argument("--size", type=int, help="pixels, a multiple of 16: 224")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default=default_device().type)
    parser.add_argument("--rounds", type=int, help="3 on the CPU; 9 on CUDA, after one that is not counted")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=[*PASSES])
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, help="folder: benchmarks/results")
    parser.add_argument("--name", default="model_speed", help="of the files")
    parser.add_argument("--quick", action="store_true", help="8 frames, 112 px, 1 round, no memory, runs/benchmarks")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    options = parser.parse_args(arguments)
    options.no_memory |= options.quick
    rounds = 9 if options.device.startswith("cuda") else 3
    full = {"frames": [8, 16, 32], "size": 224, "rounds": rounds, "out": RESULTS}
    quick = {"frames": [8], "size": 112, "rounds": 1, "out": Path("runs/benchmarks")}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()

"""What a frame of a stream costs, after how many frames ever: ViT-B/16 with a window, streamed and recomputed.

    python benchmarks/stream_speed.py           # 1,000 frames of 224 px; writes benchmarks/results
    python benchmarks/stream_speed.py --quick   # a look, in two minutes on two cores; writes runs/benchmarks

The newest frame's features are asked for, as a live stream does. At each number of frames seen, three ways run in turn: the
stream, a stream that has just begun (its window full), and a forward of the sliding clip of the last frames, as long as the
window. A forward of the whole clip is timed for as long as it fits into `--longest` frames; its time grows with the clip. The
sliding clip does not compute the same: its frames have not seen those that have left it. On two cores the default takes about
ten minutes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Times, default_device, interleaved, resident_memory, save, table
from model_speed import Encoder, image_model
from torch import Tensor
from tqdm import tqdm

from kronmask import FrameStream, masks, patch_vit

__all__ = ["main"]

STREAM, YOUNG, SLIDING, WHOLE = "FrameStream", "FrameStream, just begun", "sliding clip", "whole clip"
COLORS = {STREAM: "#0072b2", SLIDING: "#d55e00", WHOLE: "#009e73"}
CONVENTIONS = {
    "seconds": "median over the rounds, for the newest frame of one stream; spread: distance of the quartiles over the median",
    "over_begun": "median of the ratios to a stream that has just begun, in the same round",
    "over_stream": "median of the ratios to the stream, in the same round",
    "resident_bytes": "of the process (CPU) or of the allocator (CUDA), before the rounds; the first before the other ways ran",
    "cache_bytes": "keys and values that the stream keeps",
}


@torch.no_grad()
def measure(model: Any, options: argparse.Namespace, encoder: Encoder, rows: list[dict[str, Any]]) -> None:
    """Appends a row for each way at each number of frames seen."""
    window, device = options.window, torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(1, 2 * window, 3, encoder.image, encoder.image, generator=generator).to(device)
    newest = frames[:, :1]
    stream, begun = FrameStream(model), FrameStream(model)
    with tqdm(total=max(options.frames), unit="frame") as bar:
        for seen in sorted(options.frames):
            while stream.frames_seen < [seen - options.rounds]:
                stream(newest)
                bar.update()
            resident = resident_memory(device)  # before anything else allocates
            begun.reset()
            begun(frames[:, :window])
            ways: dict[str, Callable[[], Tensor]] = {
                STREAM: lambda: stream(newest),
                YOUNG: lambda: begun(newest),
                SLIDING: functools.partial(_newest_of_clip, model, frames[:, :window]),
            }
            if seen <= options.longest:
                ways[WHOLE] = functools.partial(_newest_of_clip, model, newest.expand(1, seen, -1, -1, -1))
            times = interleaved(ways, device, rounds=options.rounds, warmup=1, shortest=0)
            rows += [_row(way, seen, times) for way in ways]
            of_stream = next(row for row in rows if (row["way"], row["frames_seen"]) == (STREAM, seen))
            of_stream.update(resident_bytes=resident, cache_bytes=stream.cache_bytes)
            bar.update(stream.frames_seen[0] - bar.n)


def _newest_of_clip(model: Any, clip: Tensor) -> Tensor:
    return model.forward_frames(clip)[:, -1]


def _row(way: str, seen: int, times: Mapping[str, Times]) -> dict[str, Any]:
    return {
        "way": way,
        "frames_seen": seen,
        "seconds": times[way].median,
        "spread": times[way].spread,
        "over_begun": times[way].over(times[YOUNG]),
        "over_stream": times[way].over(times[STREAM]),
        "resident_bytes": None,
        "cache_bytes": None,
    }


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the time of the newest frame, and the memory of the process, against the number of frames seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2)
    for way, color in COLORS.items():
        points = [row for row in rows if row["way"] == way]
        seen = [row["frames_seen"] for row in points]
        time.plot(seen, [row["seconds"] * 1000 for row in points], "o-", color=color, label=way)
        if way == STREAM:
            memory.plot(seen, [row["resident_bytes"] / 2**20 for row in points], "o-", color=color)
    time.set(xscale="log", xlabel="frames seen", ylabel="ms for the newest frame")
    memory.set(xscale="log", xlabel="frames seen", ylabel="MiB of the process", title=STREAM)
    time.legend(frameon=False)
    for axes in (time, memory):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ["frames seen", "ms", "spread", "/ just begun", "/ stream", "MiB of the process"]
    table(
        "the newest frame",
        ["way", *columns],
        (
            (
                row["way"],
                row["frames_seen"],
                f"{row['seconds'] * 1000:.1f}",
                f"{row['spread']:.3f}",
                f"{row['over_begun']:.3f}",
                f"{row['over_stream']:.2f}",
                "" if row["resident_bytes"] is None else f"{row['resident_bytes'] / 2**20:.0f}",
            )
            for row in rows
        ),
    )


def main(arguments: Sequence[str] | None = None, encoder: Encoder | None = None) -> list[dict[str, Any]]:
    """Measures, prints, writes and returns the rows; `encoder` is for tests, which take a smaller one than ViT-B/16."""
    options = _parse(arguments)
    encoder = encoder or Encoder(image=options.size)
    torch.manual_seed(0)
    attention = functools.partial(masks.kmct, window=options.window)
    model = patch_vit(image_model(encoder), attention=attention, init="random", temporal_embedding="rotary")
    rows: list[dict[str, Any]] = []
    measure(model.eval().to(options.device), options, encoder, rows)
    more = {"window": options.window, "rounds": options.rounds, "size": encoder.image, "conventions": CONVENTIONS}
    save(options.name, rows, options.out, **more)
    plot(rows, options.out / f"{options.name}.png")
    show(rows)
    print(f"{options.out / options.name}.json, .csv and .png are written")
    return rows


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", help="frames seen at which to measure: 20 50 100 200 500 1000")
    parser.add_argument("--window", type=int, default=8, help="frames that a frame sees, its own among them")
    parser.add_argument("--longest", type=int, help="whole clip: 20")
    parser.add_argument("--size", type=int, help="pixels, a multiple of 16: 224")
    parser.add_argument("--device", default=default_device().type)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder: benchmarks/results")
    parser.add_argument("--name", default="stream_speed", help="of the files")
    parser.add_argument("--quick", action="store_true", help="100 frames of 96 px, runs/benchmarks")
    options = parser.parse_args(arguments)
    full = {"frames": [20, 50, 100, 200, 500, 1000], "size": 224, "longest": 20, "out": RESULTS}
    quick = {"frames": [20, 100], "size": 96, "longest": 20, "out": Path("runs/benchmarks")}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.frames) < options.window + options.rounds + 1:
        parser.error(f"--frames must be more than the window and the rounds, {options.window} + {options.rounds}")
    return options


if __name__ == "__main__":
    main()

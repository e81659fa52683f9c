"""How fast 8 of 300 frames of a video are read, and whether they are the right ones: ours, torchcodec, OpenCV and decord.

    python benchmarks/decode.py           # writes benchmarks/results; ten minutes on two cores, most of them for the memory
    python benchmarks/decode.py --quick   # a look, in a minute; writes runs/benchmarks

A training sample opens a file and takes a frame out of each of 8 segments: so every read opens the file anew, with one thread,
as in a worker of a data loader. In each round every reader has its turn, in one process and in two at once. Before that each
is compared to a plain decode from start to end, also of a file cut without encoding, and is given broken ones. Then each reads
a shorter video over and over in a process of its own, which is watched for memory that it does not give back. A reader that is
not installed is a row that says so; torchcodec, which brings no FFmpeg, gets PyAV's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Times, failing_into, interleaved, resident_memory, save, table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

__all__ = ["READERS", "main"]

FRAMES, WIDTH, HEIGHT = 300, 340, 256
SHORT = 16  # frames of the file that is read over and over
TAKEN = 8
KEYFRAMES = 250  # x264's own distance
COLORS = {"kronmask": "#0072b2", "torchcodec": "#d55e00", "torchcodec, approximate": "#e69f00", "OpenCV": "#009e73",
          "decord": "#cc79a7"}  # fmt: skip
CONVENTIONS = {
    "frames_per_second": "8 frames a read over the median time of a read, of all processes; the file is opened each time",
    "over_ours": "median of the ratios of a round's time to ours in the same round",
    "right_frames": "share of the frames that are nearest to the frame of that number in a plain decode by PyAV",
    "difference": "largest difference of an RGB value, 0 to 255, to that frame, where the frame is the right one",
    "refused": "whether reading the broken file is an error",
    "resident_bytes": "of a process that has read 8 frames of a file of 16 so many times",
}

Reader = Callable[[str, Sequence[int]], np.ndarray]
"""The frames of a file at increasing indices, uint8 RGB `(n, H, W, 3)`, decoded by one thread."""


# ---- readers --------------------------------------------------------------------------------------------------------


def _kronmask(path: str, indices: Sequence[int]) -> np.ndarray:
    from claver.data.video import probe, read_frames

    return read_frames(probe(path), indices).numpy()


def _torchcodec(path: str, indices: Sequence[int], mode: str = "exact") -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)  # type: ignore[arg-type]
    return decoder.get_frames_at(list(indices)).data.numpy()


def _opencv(path: str, indices: Sequence[int]) -> np.ndarray:
    import cv2

    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "threads;1"
    cv2.setNumThreads(1)
    video = cv2.VideoCapture(path)
    frames = []
    try:
        for index in indices:
            video.set(cv2.CAP_PROP_POS_FRAMES, index)
            good, frame = video.read()
            if not good:
                raise RuntimeError(f"{path}: frame {index} cannot be read")
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        video.release()
    return np.stack(frames)


def _decord(path: str, indices: Sequence[int]) -> np.ndarray:
    from decord import VideoReader

    return VideoReader(path, num_threads=1).get_batch(list(indices)).asnumpy()


READERS: dict[str, Reader] = {
    "kronmask": _kronmask,
    "torchcodec": _torchcodec,
    "torchcodec, approximate": partial(_torchcodec, mode="approximate"),
    "OpenCV": _opencv,
    "decord": _decord,
}


def indices_of(frames: int) -> list[int]:
    """The middle frame of each of 8 segments, as one test view takes them."""
    from claver.data.sampling import segment_indices

    return segment_indices(frames, TAKEN).tolist()


# ---- files ----------------------------------------------------------------------------------------------------------


def write_video(path: Path, frames: int) -> None:
    """H.264 with B-frames in MP4, at 25 frames a second: a view that pans over a still picture, with a little noise."""
    import av

    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.random((1, 3, 24, 64), dtype=np.float32))
    still = torch.nn.functional.interpolate(coarse, (2 * HEIGHT, 4 * WIDTH), mode="bicubic").clamp(0, 1)[0]
    scene = (still.permute(1, 2, 0).numpy() * 235 + 10).astype(np.int16)
    with av.open(
        str(path), "w", options={"movflags": "faststart"}
    ) as container:  # so that half of it still has its index
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", KEYFRAMES
        stream.codec_context.thread_count = 1
        for number in range(frames):
            top, left = number * HEIGHT // frames, number * 3 * WIDTH // frames
            view = scene[top : top + HEIGHT, left : left + WIDTH]
            noisy = view + random.integers(-5, 6, view.shape, dtype=np.int16)
            frame = av.VideoFrame.from_ndarray(noisy.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_cut(source: Path, target: Path, skipped: float) -> None:
    """The packets of a video, to be shown from `skipped` seconds on: what `ffmpeg -ss -c copy` cuts out of a longer one."""
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        assert stream.time_base is not None
        copy = writer.add_stream_from_template(stream)
        shift = round(skipped / stream.time_base)
        for packet in reader.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                writer.mux(packet)


def lend_ffmpeg(folder: Path) -> None:
    """Let processes started from now on find PyAV's FFmpeg under the names by which other programs ask for it."""
    import av

    folder.mkdir()
    bundled = Path(av.__file__).parents[1] / "av.libs"
    for library in bundled.glob("lib*"):
        if named := re.fullmatch(r"(lib(?:av|sw)[a-z]+)-\w+(\.so\.\d+)[\d.]*", library.name):
            (folder / f"{named[1]}{named[2]}").symlink_to(library)
    places = (str(folder), str(bundled), os.environ.get("LD_LIBRARY_PATH"))
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, places))


def plain_decode(path: str) -> np.ndarray:
    """All frames, decoded from start to end: what the readers are compared to."""
    import av

    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_broken(source: Path, folder: Path) -> dict[str, Path]:
    """Files that must not give frames: cut off, damaged in the middle, and no video."""
    content = source.read_bytes()
    broken = {name: folder / f"{name.replace(' ', '_')}.mp4" for name in ("truncated", "damaged", "no video")}
    start = content.index(b"mdat")
    middle = start + (len(content) - start) // 3
    damaged = bytearray(content)
    damaged[middle : middle + 20_000] = np.random.default_rng(0).bytes(20_000)
    for name, written in (
        ("truncated", content[: len(content) // 2]),
        ("damaged", damaged),
        ("no video", b"no video" * 500),
    ):
        broken[name].write_bytes(written)
    return broken


# ---- exactness ------------------------------------------------------------------------------------------------------


def compare(reader: Reader, path: str, truth: np.ndarray) -> tuple[float, int | None]:
    """Share of the 8 frames that are the right ones, and the largest difference of a value in these (None: there are none)."""
    indices = indices_of(len(truth))
    given = reader(path, indices)
    small = truth[:, ::4, ::4].astype(np.int32)
    distances = [np.abs(small - frame[::4, ::4].astype(np.int32)).mean((1, 2, 3)) for frame in given]
    right = [(frame, i) for frame, i, d in zip(given, indices, distances, strict=True) if int(d.argmin()) == i]
    differences = [int(np.abs(frame.astype(np.int16) - truth[i]).max()) for frame, i in right]
    return len(right) / len(indices), max(differences, default=None)


def _exactness(name: str, files: Mapping[str, Path], broken: Mapping[str, Path], sender: Any) -> None:
    """Sends what a reader says of each file; in a process of its own, which it may take down."""
    reader = READERS[name]
    found: dict[str, Any] = {}
    with failing_into(found):
        for kind, path in files.items():
            found[f"right_frames_{kind}"], found[f"difference_{kind}"] = compare(
                reader, str(path), plain_decode(str(path))
            )
    for kind, path in broken.items():
        try:
            reader(str(path), indices_of(FRAMES))
            found[f"refused_{kind.replace(' ', '_')}"] = False
        except Exception:
            found[f"refused_{kind.replace(' ', '_')}"] = True
    sender.send(found)


# ---- speed ----------------------------------------------------------------------------------------------------------


def _work(connection: Any, path: str, frames: int) -> None:
    """Reads whatever is asked for, as a worker of a data loader does."""
    torch.set_num_threads(1)
    indices = indices_of(frames)
    while (asked := connection.recv()) is not None:
        name, reads = asked
        row: dict[str, Any] = {"error": ""}
        with failing_into(row):
            for _ in range(reads):
                READERS[name](path, indices)
        connection.send(row["error"])


@contextmanager
def workers(count: int, path: str, frames: int) -> Iterator[Callable[[str, int], None]]:
    """`count` processes; what it gives lets each of them read with one reader a number of times, and waits for all."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(count):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, path, frames), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)

    def read(name: str, reads: int) -> None:
        for pipe in pipes:
            pipe.send((name, reads))
        errors = [pipe.recv() for pipe in pipes]
        if any(errors):
            raise RuntimeError(next(filter(None, errors)))

    try:
        yield read
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()


def measure_speed(path: str, names: Sequence[str], options: argparse.Namespace) -> dict[tuple[str, int], Times]:
    """Seconds of `options.reads` reads in each process, by reader and number of processes."""
    keys = [(name, count) for count in (1, 2) for name in names]
    with workers(1, path, options.frames) as one, workers(2, path, options.frames) as two:
        calls = {f"{name}, {count}": partial(one if count == 1 else two, name, options.reads) for name, count in keys}
        times = interleaved(calls, torch.device("cpu"), rounds=options.rounds, warmup=1, shortest=0)
    return {(name, count): times[f"{name}, {count}"] for name, count in keys}


# ---- memory ---------------------------------------------------------------------------------------------------------


def _hold(name: str, path: str, options: argparse.Namespace, sender: Any) -> None:
    """Sends `(reads, resident bytes)` after each `options.every` reads."""
    torch.set_num_threads(1)
    indices = indices_of(SHORT)
    for number in range(1, options.decodes + 1):
        READERS[name](path, indices)
        if number == 1 or number % options.every == 0:
            sender.send((number, resident_memory(torch.device("cpu"))))
    sender.send(None)


def measure_memory(path: str, names: Sequence[str], options: argparse.Namespace) -> dict[str, list[tuple[int, int]]]:
    """Resident memory of a process that reads with one reader, after how many reads; two readers at a time."""
    context = multiprocessing.get_context("spawn")
    series: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    waiting = list(names)
    running: dict[Any, tuple[str, Any]] = {}
    with tqdm(total=len(names) * options.decodes, unit="read", desc="memory", mininterval=5) as bar:
        while waiting or running:
            while waiting and len(running) < 2:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_hold, args=(waiting[0], path, options, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (waiting.pop(0), process)
            ready: list[Any] = multiprocessing.connection.wait(list(running))
            for receiver in ready:
                name, process = running[receiver]
                try:
                    point = receiver.recv()
                except EOFError:  # the process died
                    point = None
                if point is None:
                    process.join()
                    if process.exitcode:
                        raise RuntimeError(f"reading with {name} ended with exit code {process.exitcode}")
                    del running[receiver]
                    continue
                bar.update(point[0] - (series[name][-1][0] if series[name] else 0))
                series[name].append(point)
    return series


# ---- the whole ------------------------------------------------------------------------------------------------------


def _in_process(target: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.join()


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each reader."""
    plain, cut, short = (folder / f"{name}.mp4" for name in ("plain", "cut", "short"))
    write_video(plain, options.frames)
    write_video(short, SHORT)
    write_cut(plain, cut, skipped=1.0)
    lend_ffmpeg(folder / "ffmpeg")
    broken = write_broken(plain, folder)
    rows = []
    for name in READERS:
        found = _in_process(_exactness, name, {"plain": plain, "cut": cut}, broken)
        rows.append({"reader": name, "error": "", **found})
    working = [row["reader"] for row in rows if not row["error"]]
    times = measure_speed(str(plain), working, options)
    series = measure_memory(str(short), working, options)
    for row in rows:
        if row["error"]:
            continue
        name = row["reader"]
        for count in (1, 2):
            of_count = times[name, count]
            row[f"frames_per_second_{count}"] = TAKEN * options.reads * count / of_count.median
            row[f"spread_{count}"] = of_count.spread
            row[f"over_ours_{count}"] = of_count.over(times["kronmask", count])
        row["resident_bytes"] = series[name]
    return rows


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws frames a second, and the memory of a process against the number of its reads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if not row["error"]]
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        color = COLORS[row["reader"]]
        for count, place in ((1, i - 0.2), (2, i + 0.2)):
            rate = row[f"frames_per_second_{count}"]
            speed.barh(place, rate, 0.38, color=color, alpha=1 if count == 1 else 0.5)
            speed.text(rate, place, f" {rate:.0f}", va="center", fontsize=8)
        reads, resident = zip(*row["resident_bytes"], strict=True)
        memory.plot(reads, [value / 2**20 for value in resident], color=color, label=row["reader"])
    speed.set_yticks(range(len(rows)), [row["reader"] for row in rows])
    speed.invert_yaxis()
    speed.margins(x=0.12)
    speed.set(xlabel=f"frames a second, {TAKEN} of {FRAMES} a read", title="one process, and two (pale)")
    memory.set(xlabel="reads", ylabel="MiB of the process", title="memory")
    memory.set_ylim(0, 1.1 * memory.get_ylim()[1])
    memory.legend(frameon=False, fontsize=8)
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = [
        "right",
        "cut",
        "difference",
        "frames/s",
        "frames/s, two",
        "/ ours",
        "/ ours, two",
        "MiB first",
        "MiB last",
    ]
    columns += ["refuses truncated", "damaged", "no video"]

    def line(row: Mapping[str, Any]) -> list[str]:
        cells = [row["reader"]]
        if row["error"]:
            return [*cells, row["error"]]
        cells += [f"{row[f'right_frames_{kind}']:.0%}" for kind in ("plain", "cut")]
        cells.append(str(row["difference_plain"]))
        cells += [f"{row[f'frames_per_second_{count}']:.0f}" for count in (1, 2)]
        cells += [f"{row[f'over_ours_{count}']:.2f}" for count in (1, 2)]
        cells += [f"{row['resident_bytes'][i][1] / 2**20:.0f}" for i in (0, -1)]
        return cells + [str(row[f"refused_{kind}"]) for kind in ("truncated", "damaged", "no_video")]

    table(f"{TAKEN} of {FRAMES} frames", ["reader", *columns], map(line, rows))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints, writes and returns the rows."""
    options = _parse(arguments)
    folder = Path(tempfile.mkdtemp())
    try:
        rows = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    told = {name: getattr(options, name) for name in ("frames", "rounds", "reads", "decodes")}
    save(options.name, rows, options.out, **told, size=[WIDTH, HEIGHT], conventions=CONVENTIONS)
    plot(rows, options.out / f"{options.name}.png")
    show(rows)
    print(f"{options.out / options.name}.json, .csv and .png are written")
    return rows


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of the video")
    parser.add_argument("--rounds", type=int, help="in which every reader has its turn: 9")
    parser.add_argument("--reads", type=int, help="in a turn, in each process: 10")
    parser.add_argument("--decodes", type=int, help="reads while memory is watched: 5000")
    parser.add_argument("--out", type=Path, help="folder: benchmarks/results")
    parser.add_argument("--name", default="decode", help="of the files")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 50 reads for the memory, runs/benchmarks")
    options = parser.parse_args(arguments)
    full = {"rounds": 9, "reads": 10, "decodes": 5000, "out": RESULTS}
    quick = {"rounds": 3, "reads": 2, "decodes": 50, "out": Path("runs/benchmarks")}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.every = max(1, options.decodes // 100)
    return options


if __name__ == "__main__":
    main()

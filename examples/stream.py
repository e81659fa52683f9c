"""Say what happens in a stream of frames, anew after each: a CLAVER checkpoint on video files, folders of images or a camera."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claver import DEMO_CHECKPOINT

if TYPE_CHECKING:
    from claver.config import ModelConfig
    from claver.data.sources import Source
    from claver.evaluation.annotate import AnnotatedVideo
    from claver.evaluation.streaming import StreamClassifier
    from torch import Tensor

MOST_BARS = 10  # in an annotated video
DEFAULT_RATE = 10.0  # frames per second of an annotated video whose source has no rate of its own


def main(arguments: list[str] | None = None) -> int:
    """Stream sources; the exit status is 1 for an error that the user can mend, which is printed without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the stream has begun, or a second time while files are finished
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    """Stream all sources one after the other, and end with a summary, also when Ctrl-C or an error cuts the stream short."""
    from claver.command_line import Given
    from claver.data.lists import read_labels
    from claver.data.sources import open_source
    from claver.evaluation.annotate import AnnotatedVideo
    from claver.evaluation.streaming import StreamClassifier
    from claver.text import encode_prompts, tokens_of
    from claver.weights.loading import open_checkpoint, texts_of

    for path in filter(None, (options.out, options.plot)):
        if any(Path(path).resolve() == Path(source).resolve() for source in options.sources):
            raise ValueError(f"{path}: is a source, which is not to be written over; give another name")
    if options.plot:
        import matplotlib  # noqa: F401  (if it is missing, better now than at the end)

        if Path(options.plot).suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ValueError(f"{options.plot}: give the picture a name that ends in .png, .svg or .pdf")
        if Path(options.plot).exists() and not options.overwrite:
            raise ValueError(f"{options.plot}: is there already; pass --overwrite, or another name")
    video = AnnotatedVideo(options.out, overwrite=options.overwrite) if options.out else None

    given = Given({}, ())
    loaded = open_checkpoint(options.checkpoint, given)
    model, config = loaded.model, loaded.config
    choice = texts_of(loaded, given, read_labels(options.labels) if options.labels else options.classes)
    text_features = encode_prompts(model, tokens_of(choice.prompts, model))
    classifier = StreamClassifier(model, config.model.frames, config.augment, text_features, average=options.average)
    if classifier.stream.length is not None:
        _note(_why_it_begins_anew(config.model))
    sources = [
        open_source(
            name,
            frames=config.model.frames,
            every=options.every,
            watch=options.watch,
            idle=options.idle,
            say=_note,
        )
        for name in options.sources
    ]
    _stream(options, classifier, sources, choice.classes, video)


def _stream(
    options: argparse.Namespace,
    classifier: StreamClassifier,
    sources: Sequence[Source],
    classes: list[str],
    video: AnnotatedVideo | None,
) -> None:
    from claver.evaluation.annotate import annotate
    from claver.evaluation.evaluate import likeliest
    from tqdm import tqdm

    curves = _Curves()
    top: list[tuple[str, float]] = []
    bar = tqdm(unit=" frames", disable=True if options.json else None, leave=False)  # None: where there is a terminal
    try:
        for source in sources:
            classifier.reset()
            _note(source.description)
            curves.starts.append(classifier.frames)
            for name, image in source.frames:
                probabilities = classifier(image)
                top = likeliest(probabilities, classes, options.top)
                speed = classifier.frames_per_second
                if options.json:
                    print(json.dumps(_record(source.name, name, classifier.frames, top, speed)), flush=True)
                elif classifier.frames % options.print_every == 0:
                    tqdm.write(f"{name:>8}  {_in_words(top)}  ({speed:.0f} frames/s)", file=sys.stdout)
                    sys.stdout.flush()
                bar.update()
                if options.plot:
                    curves.add(classifier.frames - 1, probabilities)
                if video is not None:
                    numbered = f"frame {name}" if isinstance(name, int) else name
                    picture = annotate(image, top[:MOST_BARS], f"{Path(source.name).name}  {numbered}")
                    with _whole():
                        video.add(picture, options.fps or source.rate or DEFAULT_RATE)
            if len(sources) > 1 and any(classifier.stream.frames_seen) and not options.json:
                tqdm.write(f"{source.name}: {_in_words(top)}", file=sys.stdout)
    except KeyboardInterrupt:
        _note("ended by Ctrl-C")
    finally:
        bar.close()
        with _whole():
            if video is not None:
                video.close()
            _plot(options.plot, curves, classes)
            _summarize(options, classifier, top, video)


def _why_it_begins_anew(config: ModelConfig) -> str:
    reason = "knows time by a learned embedding" if config.temporal_embedding is True else "has a mask without a window"
    return f"this model {reason} of clips of {config.frames} frames: after each {config.frames} it begins anew"


def _in_words(top: Sequence[tuple[str, float]]) -> str:
    return "  ".join(f"{probability:6.1%} {name}" for name, probability in top)


def _record(source: str, frame: int | str, seen: int, top: Sequence[tuple[str, float]], speed: float) -> dict[str, Any]:
    likeliest = [{"class": name, "probability": round(probability, 6)} for name, probability in top]
    return {"source": source, "frame": frame, "seen": seen, "top": likeliest, "frames_per_second": round(speed, 1)}


def _plot(path: str | None, curves: _Curves, classes: list[str]) -> None:
    import numpy as np
    from claver.figures import plot_probabilities

    if path and curves.times:
        plot_probabilities(
            curves.times, np.stack(curves.rows), classes, path, curves.starts[1:], "What the stream shows"
        )


def _summarize(
    options: argparse.Namespace,
    classifier: StreamClassifier,
    top: Sequence[tuple[str, float]],
    video: AnnotatedVideo | None,
) -> None:
    if not classifier.frames:
        _note("no frames")
        return
    lines = [
        f"{classifier.frames} frames, {classifier.frames_per_second:.1f} a second in the model, at most "
        f"{classifier.cache_bytes:,} bytes of keys and values",
        f"the last {min(classifier.average, classifier.frames)}: {_in_words(top)}",
    ]
    lines += [f"annotated: {video.path}"] if video is not None else []
    lines += [f"curves: {options.plot}"] if options.plot else []
    print("\n".join(lines), file=sys.stderr if options.json else sys.stdout)


class _Curves:
    """Probabilities over time of a stream of any length: at most `most` points, evenly apart."""

    def __init__(self, most: int = 2000) -> None:
        self.most, self.apart = most, 1
        self.times: list[int] = []
        self.rows: list[Any] = []
        self.starts: list[int] = []

    def add(self, frame: int, probabilities: Tensor) -> None:
        if frame % self.apart:
            return
        self.times.append(frame)
        self.rows.append(probabilities.numpy())
        if len(self.times) > self.most:
            self.times, self.rows, self.apart = self.times[::2], self.rows[::2], 2 * self.apart


@contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end: a picture is written whole or not at all."""
    if threading.current_thread() is not threading.main_thread():  # which alone receives it
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


def _note(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _every(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="video file, folder of images, or camera:0; several follow each other",
    )
    add(
        "--checkpoint",
        default=DEMO_CHECKPOINT,
        help="of claver_k400.py, an official one, a folder or hf://owner/name; default: %(default)s",
    )
    add(
        "--every",
        type=_every,
        metavar="K",
        help="take each K-th frame; default auto: of a video file as many as a training clip has, of other sources all",
    )
    add("--average", type=_positive, metavar="N", help="frames that are averaged; default: those of a training clip")
    add("--watch", action="store_true", help="take images as they appear in the folder, those that are there first")
    add(
        "--idle", type=_seconds, metavar="SECONDS", help="end --watch after so long without a new image; default: never"
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--labels", help="CSV of id,name: other classes than those of the training")
    texts.add_argument("--classes", nargs="+", action="extend", metavar="NAME", help="other classes, by their names")
    add("--top", type=_positive, default=3, help="classes to show; default: %(default)s")
    add("--print-every", type=_positive, default=1, metavar="N", help="print a line after each N frames taken")
    add("--json", action="store_true", help="print a line of JSON for each frame taken; all else goes to stderr")
    add("--out", metavar="FILE.mp4", help="write the frames taken, with the likeliest classes below")
    add("--fps", type=_seconds, help=f"frames per second of --out; default: the video's own, else {DEFAULT_RATE:.0f}")
    add("--plot", metavar="FILE.png", help="draw the probabilities over frames")
    add("--overwrite", action="store_true", help="replace the files of --out and --plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())

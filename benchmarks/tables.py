"""Writes what `results/` holds into the tables of the README pages, so that the pages quote nothing else.

    python benchmarks/tables.py           writes the tables
    python benchmarks/tables.py --check   fails if a page says anything else

A table stands between `<!-- results: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from common import RESULTS

__all__ = ["PAGES", "TABLES", "main", "render"]

ROOT = RESULTS.parents[1]
PAGES = tuple(ROOT / folder / "README.md" for folder in (".", "benchmarks", "examples"))
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """The page with each of its tables made anew.

    Raises:
        KeyError: the page asks for a table that there is not.
    """
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[4]}", page)


def _link(name: str, folder: str = "") -> str:
    """A link to a stored result from a page that has the benchmarks in `folder`."""
    return f"[`{name}.json`]({folder}results/{name}.json)"


def _stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _source(name: str, stored: dict[str, Any], folder: str = "") -> str:
    machine, versions = stored["machine"], stored["versions"]
    vectors = f" with {machine['instructions']}" if "instructions" in machine else ""
    where = machine["gpu"] or f"{machine['cores']} cores of an {machine['cpu']}{vectors}, no GPU"
    return f"\n{_link(name, folder)}: `{stored['command']}`, {where}, torch {versions['torch']}, {stored['date']}.\n"


def _attention(name: str, tokens: Sequence[int]) -> str:
    stored = _stored(name)
    rows = {(r["mask"], r["contender"], r["pass"], r["tokens"], r["frames"]): r for r in stored["rows"]}
    shapes = [(n, t) for n in tokens for t in sorted({r["frames"] for r in stored["rows"] if r["tokens"] == n})]
    header = ["`sdpa` backend, time relative to", *(f"N={n} T={t}" for n, t in shapes)]

    def ratios(label: str, mask: str, which: str, key: str) -> list[str]:
        measured = [rows.get((mask, "kronmask sdpa", which, n, t), {}).get(key) for n, t in shapes]
        return [label, *("" if value is None else f"{value:.2f}" for value in measured)]

    lines = []
    for mask in ("kmt", "kmct"):
        title = mask.upper()
        lines += [
            ratios(f"**{title}** forward: joint attention", mask, "forward", "over_joint"),
            ratios("the ideal: the mask's density", mask, "forward", "ideal"),
            ratios("SDPA with the mask", mask, "forward", "over_sdpa_mask"),
            ratios("compiled FlexAttention", mask, "forward", "over_flex_128"),
            ratios(f"**{title}** forward and backward: joint attention", mask, "forward+backward", "over_joint"),
            ratios("SDPA with the mask", mask, "forward+backward", "over_sdpa_mask"),
        ]
    return _markdown(header, lines) + _source(name, stored)


def _models() -> str:
    stored = _stored("model_speed")
    rows = {(row["model"], row["pass"], row["frames"]): row for row in stored["rows"]}
    names = list(dict.fromkeys(name for name, _, _ in rows))
    measured = sorted({(which, t) for _, which, t in rows})
    (_, shortest), (dearest, longest) = measured[0], measured[-1]
    header = ["model", "M parameters", f"GFLOPs, {shortest} frames"]
    header += [f"clips/s {which}, {t} frames" for which, t in measured]
    header.append(f"peak GiB {dearest}, {longest} frames")
    lines = []
    for name in names:
        passes = [rows[name, which, t] for which, t in measured]
        line = [name, _number(passes[0]["parameters"], 1e6, 1), _number(passes[0]["gflops"], 1, 0)]
        line += [_number(row["clips_per_second"], 1, 3) for row in passes]
        lines.append([*line, _number(passes[-1]["peak_bytes"], 2**30, 1)])
    return _markdown(header, lines) + _source("model_speed", stored)


def _number(value: float | None, unit: float, digits: int) -> str:
    return "failed" if value is None else f"{value / unit:.{digits}f}"


def _accuracy() -> str:
    stored = _stored("accuracy")
    header = [
        "attention of the temporal blocks", "seeds", "top-1, mean ± 95 %", "least", "most", "reversed: opposite", "last quarter",
        "MFLOPs a clip",
    ]  # fmt: skip
    lines = [
        [
            row["attention"],
            str(row["runs"]),
            _interval(row, "top1"),
            *(f"{row[key]:.3f}" for key in ("top1_min", "top1_max")),
            _interval(row, "reversed_opposite"),
            f"{row['last_gain']:+.3f}",
            f"{row['gflops'] * 1000:.1f}",
        ]
        for row in stored["summary"]
    ]
    steps = stored["summary"][0]["steps"]
    told = f"\n{steps} steps each, {stored['settings']['num_test']} held-out clips of 8 motions.\n"
    return _markdown(header, lines) + told + _source("accuracy", stored)


def _interval(row: Mapping[str, Any], measure: str) -> str:
    interval = row[f"{measure}_interval"]  # none of one run
    return f"{row[f'{measure}_mean']:.3f}" + ("" if interval is None else f" ± {interval:.3f}")


def _kernels() -> str:
    """What the default kernels use and reach by the model, and what masks cost in them."""
    stored = _stored("kernel_report")
    header = [
        "bfloat16",
        "tile, warps, stages",
        "registers",
        "spilled bytes",
        "blocks an SM",
        "overlapped",
        "in turn",
        "estimated",
        "busiest pipe",
    ]
    lines = []
    for kernel in (k for k in stored["kernels"] if k["mask"] == "kmt" and "share" in k and k["head_dim"] in (64, 128)):
        pipes = kernel["loops"]["whole"]
        lines.append([
            f"{kernel['arch']} {kernel['step']} D={kernel['head_dim']}",
            _option(kernel["option"]),
            *(str(kernel[key]) for key in ("registers", "spilled_bytes", "blocks")),
            *(f"{kernel['share'][key]:.2f}" for key in ("overlapped", "in_turn", "estimated")),
            max(pipes, key=pipes.__getitem__),
        ])  # fmt: skip
    kernels = _markdown(header, lines)
    rows = {
        (r["step"], r["mask"], r["frames"], r["tokens"]): r
        for r in stored["masks"]
        if (r["arch"], r["head_dim"]) == ("sm_90", 64)
    }
    sizes = sorted({key[2:] for key in rows})
    blocks = []
    for mask in ("kmt", "kmct"):
        for step in ("forward", "backward_query", "backward_key"):
            costs = [rows[step, mask, t, n] for t, n in sizes]
            cells = (f"{c['of_dense']:.2f} / {c['loops']:.2f} / {c['with_tiles']:.2f}" for c in costs)
            blocks.append([f"{mask.upper()} {step}", *cells])
    cost = _markdown(["sm_90, D=64: visits / cost of loops / of all", *(f"T={t} N={n}" for t, n in sizes)], blocks)
    told = (
        f"\n{_link('kernel_report')}: `{stored['command']}`, Triton "
        f"{stored['versions']['triton']}, {stored['date']}; compiled, not run.\n"
    )
    return kernels + "\n" + cost + told


def _option(name: str) -> str:
    """`128x64w4s2 descriptors` as `128x64, 4, 2, descriptors`."""
    shape, *loads = name.split()
    return ", ".join([shape.replace("w", ", ").replace("s", ", "), *loads])


def _kernel_peers() -> str:
    """The loops of other kernels by the same model."""
    stored = _stored("kernel_peers")
    header = [
        "forward, bfloat16",
        "tile, warps, stages",
        "registers",
        "spilled bytes",
        "blocks an SM",
        "overlapped",
        "estimated",
    ]
    lines = []
    for row in stored["rows"]:
        for name, loop in zip(
            ("partial blocks", "full blocks") if "visits" in row else ("",), row["loops"], strict=True
        ):
            lines.append([
                f"{row['arch']} D={row['head_dim']} {row['kernel']} {name}".strip(),
                _option(row["option"]),
                *(str(row[key]) for key in ("registers", "spilled_bytes", "blocks")),
                f"{loop['share'][0]:.2f}",
                f"{loop['share'][2]:.2f}",
            ])  # fmt: skip
    versions = stored["versions"]
    told = (
        f"\n{_link('kernel_peers')}: `{stored['command']}`, Triton {versions['triton']}, torch {versions['torch']}, "
        f"{stored['date']}; compiled, not run.\n"
    )
    return _markdown(header, lines) + told


def _families() -> str:
    """What the suite has seen to hold, a letter for each placement; families of which the same holds share a row."""
    stored = _stored("zoo")
    columns = [column for column in stored["rows"][0] if column not in ("family", "placement")]
    alike: dict[tuple[str, ...], list[str]] = {}
    for family in dict.fromkeys(row["family"] for row in stored["rows"]):
        rows = [row for row in stored["rows"] if row["family"] == family]
        letters = [{"yes": row["placement"][0], "refused": "·"} for row in rows]
        cells = tuple(" ".join(of.get(row[c], "no") for of, row in zip(letters, rows, strict=True)) for c in columns)
        alike.setdefault(cells, []).append(family)
    lines = [["; ".join(families), *cells] for cells, families in alike.items()]
    plain = sum(len(kind["models"]) for kind in stored["timm"])
    refused = sum(map(len, stored["refused"].values()))
    told = (
        f"\nOf timm's {plain + refused} models {plain} are plain ViTs, of {len(stored['timm'])} kinds that differ in more than "
        f"size; each kind was checked. The other {refused} models are refused by name, with the reason. "
    )
    return _markdown(["family", *columns], lines) + told + _source("zoo", stored, "benchmarks/").lstrip("\n")


def _streams() -> str:
    stored = _stored("stream_speed")
    rows = {(row["way"], row["frames_seen"]): row for row in stored["rows"]}
    seen = sorted({frames for _, frames in rows})
    header = ["the newest frame, after frames", *map(str, seen)]

    def line(label: str, way: str, key: str, unit: float, digits: int) -> list[str]:
        cells = [rows.get((way, frames), {}).get(key) for frames in seen]
        return [label, *("" if value is None else f"{value / unit:.{digits}f}" for value in cells)]

    lines = [
        line("`FrameStream`, ms", "FrameStream", "seconds", 1e-3, 0),
        line("relative to a stream that has just begun", "FrameStream", "over_begun", 1, 2),
        line("sliding clip of as many frames as the window, ms", "sliding clip", "seconds", 1e-3, 0),
        line("relative to the stream", "sliding clip", "over_stream", 1, 1),
        line("whole clip, ms", "whole clip", "seconds", 1e-3, 0),
        line("relative to the stream", "whole clip", "over_stream", 1, 1),
        line("keys and values of the stream, MiB", "FrameStream", "cache_bytes", 2**20, 1),
        line("resident memory of the process, MiB", "FrameStream", "resident_bytes", 2**20, 0),
    ]
    return _markdown(header, lines) + _source("stream_speed", stored)


def _decode() -> str:
    stored = _stored("decode")
    header = [
        "reader",
        "right frames",
        "of a file cut without encoding",
        "frames/s",
        "in two processes",
        "time relative to ours",
    ]
    header += ["MiB after 1 read", f"after {stored['decodes']:,}", "refuses a truncated, a damaged file"]
    lines = []
    for row in stored["rows"]:
        if row["error"]:
            lines.append([row["reader"], f"not measured: {row['error'][:60]}", *[""] * (len(header) - 2)])
            continue
        lines.append([
            row["reader"],
            *(f"{row[f'right_frames_{kind}']:.0%}" for kind in ("plain", "cut")),
            *(f"{row[f'frames_per_second_{count}']:.0f}" for count in (1, 2)),
            f"{row['over_ours_1']:.2f}, {row['over_ours_2']:.2f}",
            *(f"{row['resident_bytes'][i][1] / 2**20:.0f}" for i in (0, -1)),
            ", ".join("yes" if row[f"refused_{kind}"] else "**no**" for kind in ("truncated", "damaged")),
        ])  # fmt: skip
    versions = stored["versions"]
    names = ("av", "torchcodec", "opencv-python-headless", "decord")
    told = "\n" + ", ".join(f"{name} {versions[name]}" for name in names if name in versions) + ".\n"
    return _markdown(header, lines) + told + _source("decode", stored)


def _train_step() -> str:
    stored = _stored("train_step")
    header = ["texts of a step", "processes", "time relative to whole texts", "text tower's share of FLOPs"]
    header += ["loss differs by", "gradients by, of the largest"]
    lines = [
        [
            row["way"],
            str(row["processes"]),
            f"{row['over_whole']:.2f}",
            f"{row['text_share']:.0%}",
            *(f"{row[f'{what}_difference']:.0e}" for what in ("loss", "gradient")),
        ]
        for row in stored["rows"]
    ]
    ways = ("whole", "cut", "cut and shared")
    counted = [
        [row["model"], *(f"{row[f'text_share_{way}']:.0%} of {row[f'tflop_{way}']:.3g}" for way in ways)]
        for row in stored["counted"]
    ]
    row = stored["counted"][0]
    models = [
        f"{row['texts']:,} texts, {row['clips']} clips a process, TFLOP",
        "whole",
        "cut",
        f"and shared by {row['shared_by']}",
    ]
    return _markdown(header, lines) + "\n" + _markdown(models, counted) + _source("train_step", stored)


def _lowest() -> str:
    """The suites under the lowest supported versions."""
    stored = _stored("lowest")
    passed, failed, skipped = (
        sum(row[kind] for row in stored["rows"] for kind in kinds)
        for kinds in (("passed",), ("failure", "error"), ("skipped",))
    )
    names = ("torch", "torchvision", "timm", "open_clip_torch", "transformers", "accelerate")
    versions = ", ".join(f"{name} {stored['versions'][name]}" for name in names)
    told = (
        f"{passed} tests passed, {failed} failed, {skipped} were skipped with a reason that the file has; {versions}.\n"
    )
    return told + _source("lowest", stored)


def _prompts() -> str:
    """The blind reading of the interpretive prompts."""
    stored = _stored("prompts")
    lines = [
        [r["kind"], str(r["sentences"]), f"{r['accuracy']:.3f}", f"{1 / stored['choices']:.3f}"] for r in stored["rows"]
    ]
    return _markdown(["kind", "sentences", "told apart", "by chance"], lines) + _source(
        "prompts", stored, "../benchmarks/"
    )


def _summary() -> str:
    """A few lines for the front page."""
    attention, models = _stored("attn_speed"), _stored("model_speed")
    rows = {(r["mask"], r["contender"], r["pass"], r["tokens"], r["frames"]): r for r in attention["rows"]}
    kmct, kmt = (rows[mask, "kronmask sdpa", "forward", 197, 8] for mask in ("kmct", "kmt"))
    both = {m: rows[m, "kronmask sdpa", "forward+backward", 197, 8] for m in ("kmct", "kmt")}
    clips = {r["model"]: r["clips_per_second"] for r in models["rows"] if (r["pass"], r["frames"]) == ("forward", 8)}
    average = clips["frame average"]
    accuracy = {row["attention"]: row for row in _stored("accuracy")["summary"]}
    best = max(accuracy.values(), key=lambda row: row["top1_mean"])
    streams = _stored("stream_speed")
    stream = {row["way"]: row for row in streams["rows"] if row["frames_seen"] == 1000}
    return "".join(f"- {line}\n" for line in (
        f"Attention on two CPU cores, 197 tokens, 8 frames: KMCT takes {kmct['over_joint']:.2f} of joint attention's time (ideal "
        f"{kmct['ideal']:.2f}), KMT {kmt['over_joint']:.2f} (ideal {kmt['ideal']:.2f}); with the backward "
        f"{both['kmct']['over_joint']:.2f} and {both['kmt']['over_joint']:.2f}.",
        f"Against SDPA with the same mask: {kmct['over_sdpa_mask']:.2f} and {kmt['over_sdpa_mask']:.2f}; against compiled "
        f"FlexAttention: {kmct['over_flex_128']:.2f} and {kmt['over_flex_128']:.2f}.",
        f"ViT-B/16, 8 frames, clips a second relative to a frame average: KMCT (append) {clips['KMCT (append)'] / average:.2f}, "
        f"KMT (replace) {clips['KMT (replace)'] / average:.2f}, TimeSformer {clips['TimeSformer (HF)'] / average:.2f}.",
        f"A frame of a stream (ViT-B/16, window {streams['window']}) after 1,000 frames costs "
        f"{stream['FrameStream']['over_begun']:.2f} of one at its start; recomputing a clip of {streams['window']} frames "
        f"{stream['sliding clip']['over_stream']:.1f} times as much.",
        f"Toy motions, {best['steps']} steps: {best['attention']} leads with {_interval(best, 'top1')} top-1, KMCT has "
        f"{_interval(accuracy['kmct'], 'top1')}.",
        "No GPU has run any of it: the Triton kernels are compiled for GPUs and run in Triton's interpreter.",
    ))  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "summary": _summary,
    "families": _families,
    "prompts": _prompts,
    "attention": partial(_attention, "attn_speed", (197, 50, 257)),
    "attention_avx2": partial(_attention, "attn_speed_avx2", (197,)),
    "models": _models,
    "accuracy": _accuracy,
    "kernels": _kernels,
    "kernel_peers": _kernel_peers,
    "lowest": _lowest,
    "streams": _streams,
    "decode": _decode,
    "train_step": _train_step,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is not up to date")
    options = parser.parse_args(arguments)
    made = {page: render(page.read_text()) for page in PAGES}
    if options.check:
        return int(any(page.read_text() != text for page, text in made.items()))
    for page, text in made.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

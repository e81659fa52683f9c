"""What the README pages show runs as written, and the numbers they quote stand in stored results."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import accuracy
import attn_speed
import claver_k400
import model_speed
import pytest
import stream_speed
import tables
import torch
from claver.command_line import parse

ROOT = Path(__file__).parents[1]
PAGES = {folder: (ROOT / folder / "README.md").read_text() for folder in (".", "benchmarks", "examples")}
README = PAGES["."]
SNIPPETS = re.findall(r"```python\n(.*?)```", "".join(PAGES.values()), re.S)
NOTEBOOK = ROOT / "examples" / "own_vit.ipynb"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_snippets_run(snippet, monkeypatch):
    """As written, but with random weights: there may be no network. A world of processes has one here."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    for weights, none in (
        ('pretrained="openai"', "pretrained=None"),
        ("pretrained=True", "pretrained=False"),
        ('.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=10)', "(ViTConfig(num_labels=10))"),
    ):
        snippet = snippet.replace(weights, none)
    try:
        exec(f"from transformers import ViTConfig\n{snippet}", {})
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 150


def test_the_notebook_runs():
    """Its cells in order, in one namespace; it is stored without outputs."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    namespace: dict = {}
    for cell in cells:
        assert not cell["outputs"]
        exec("".join(cell["source"]), namespace)


@pytest.mark.parametrize("command", re.findall(r"examples/claver_k400.py ((?:.*\\\n)*.*)", PAGES["examples"]))
def test_commands_parse(command):
    line = shlex.split(command.replace("\\\n", " "), comments=True)
    parse(claver_k400.COMMANDS, line, description="", default="demo")


def test_links_and_pictures_exist():
    for folder, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            assert target.startswith("https://") or (ROOT / folder / target).exists(), target


def test_named_files_exist():
    for name in re.findall(r"`((?:examples|benchmarks|kronmask|tests)/[\w./]+)`", "".join(PAGES.values())):
        assert (ROOT / name).exists(), name


def test_the_tables_say_what_the_results_say():
    pages = [page.read_text() for page in tables.PAGES]
    assert [tables.render(page) for page in pages] == pages
    assert set(tables.TABLES) == {name for page in pages for _, name, *_ in tables.BLOCK.findall(page)}


def test_no_other_share_is_quoted():
    """Outside of the tables stand the demo's line, which has a test of its own, and what half of the pairs is."""
    text = re.sub(r"```.*?```", "", tables.BLOCK.sub("", "".join(PAGES.values())), flags=re.S)
    text = "\n".join(line for line in text.splitlines() if "as a frame average" not in line)
    assert set(re.findall(r"\b0\.\d+", text)) == {"0.5"}


def test_the_arithmetic_of_frames_on_many_gpus_is_that_of_its_formulas():
    """L/14 at 336 pixels: 128 frames of 577 tokens, 1024 channels, 24 image blocks, bfloat16; bandwidths as the page assumes."""
    page = PAGES["benchmarks"].partition("### Frames on many GPUs")[2].partition("\n### ")[0]
    frames, tokens, width, speed = 128, 577, 1024, 400e12

    def row(start):
        line = next(line for line in page.splitlines() if line.replace("*", "").startswith(f"| {start}"))
        return [float(re.search(r"\d*\.?\d+", cell.rpartition("=")[2])[0]) for cell in line.split("|")[-3:-1]]

    def close(measured, expected):
        assert measured == pytest.approx(expected, rel=0.02)

    both = [(8, frames // 8, 360e9), (64, frames // 64, 320e9)]
    kept = [4 * t * tokens * width for _, t, _ in both]
    sent = [(ranks - 1) * size for (ranks, _, _), size in zip(both, kept, strict=True)]
    own = [4 * width * t * tokens * ((t - 1) * tokens + 1) for _, t, _ in both]
    others = [4 * width * t * tokens * (frames - t) * tokens for _, t, _ in both]
    close(row("keys and values of a rank"), [size / 1e6 for size in kept])
    close(row("received, and sent"), [size / 1e6 for size in sent])
    images = [24 * t * tokens * (24 * width**2 + 4 * tokens * width) for _, t, _ in both]
    close(row("image blocks |"), [flops / 1e12 for flops in images])
    close(row("image blocks, all 24"), [1e3 * flops / speed for flops in images])
    close(row("projections and MLP"), [24 * t * tokens * width**2 / 1e12 for _, t, _ in both])
    close(row("attention to own frames, a layer"), [flops / 1e12 for flops in own])
    close(row("attention to other frames, a layer"), [flops / 1e12 for flops in others])
    close(row("keys and values kept"), [4 * frames * tokens * width / 1e6] * 2)
    close(row("gather |"), [1e3 * size / bandwidth for size, (_, _, bandwidth) in zip(sent, both, strict=True)])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_every_result_says_where_it_comes_from(path):
    stored = json.loads(path.read_text())
    assert {"command", "machine", "date", "versions"} <= stored.keys()
    assert stored["command"].startswith("python ")


@pytest.mark.parametrize("module", [accuracy, attn_speed, model_speed, stream_speed])
def test_the_benchmarks_take_quick(module, capsys):
    assert f"benchmarks/{module.__name__}.py" in PAGES["benchmarks"]
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert "--quick" in capsys.readouterr().out


def test_nothing_failed_under_the_lowest_supported_versions():
    stored = json.loads((ROOT / "benchmarks" / "results" / "lowest.json").read_text())
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "tests" / "lowest.txt").read_text(), re.M))
    assert stored["status"] == 0
    assert stored["failed"] == []
    for name in ("torch", "torchvision", "timm", "open_clip_torch", "transformers", "accelerate"):
        assert stored["versions"][name] == pinned[name]


def test_the_lowest_versions_are_the_bounds_of_the_package():
    """Of the packages that are named with a version; where there is no 2.5.0 of one the bound is 2.5 and the version 2.5.2."""
    pinned = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)$", (ROOT / "tests" / "lowest.txt").read_text(), re.M))
    bounds = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert pinned.keys() - bounds.keys() <= {"torchvision"}
    assert {"torch", "timm", "jsonargparse", "webdataset", "safetensors", "tensorboard"} <= pinned.keys()
    for name in pinned.keys() & bounds.keys():
        assert f"{pinned[name]}.".startswith(f"{bounds[name]}."), name


def test_every_benchmark_finds_the_example_without_help():
    """The tests have `examples` on their path; whoever calls a script has not, nor have the processes that it starts."""
    scripts = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "from claver" in path.read_text()]
    assert len(scripts) >= 4
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for path in scripts:
        code = f"import sys; sys.path.insert(0, 'benchmarks'); import {path.stem}, claver"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_demo_is_quoted_as_it_was_measured():
    stored = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    line = next(line for line in README.splitlines() if "top-1" in line and "as a frame average" in line)
    quoted = [float(number) for number in re.findall(r"0\.\d+", line)]
    assert quoted == [round(stored[key], 3) for key in ("top1", "baseline_top1", "chance")]
    assert {"command", "machine", "date", "versions"} <= stored.keys()

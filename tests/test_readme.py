"""What the README shows runs as written, and the numbers it quotes stand in stored results."""

import json
import re
import shlex
from pathlib import Path

import claver_k400
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_snippets_run(snippet):
    """As written, but with random weights: there may be no network."""
    exec(snippet.replace('pretrained="openai"', "pretrained=None").replace("pretrained=True", "pretrained=False"), {})


@pytest.mark.parametrize("command", re.findall(r"examples/claver_k400.py ((?:.*\\\n)*.*)", README))
def test_commands_parse(command):
    claver_k400._parser().parse_args(shlex.split(command.replace("\\\n", " "), comments=True))


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_named_files_exist():
    for name in re.findall(r"`((?:examples|benchmarks|kronmask|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_demo_is_quoted_as_it_was_measured():
    stored = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    line = next(line for line in README.splitlines() if "top-1" in line and "as a frame average" in line)
    quoted = [float(number) for number in re.findall(r"0\.\d+", line)]
    assert quoted == [round(stored[key], 3) for key in ("top1", "baseline_top1", "chance")]
    assert {"command", "machine", "date", "versions"} <= stored.keys()

"""The packages of CLAVER use each other in one direction, so that each can be read without those that come after it."""

import ast
from pathlib import Path

import claver
import pytest

FOLDER = Path(claver.__file__).parent
ORDER = ("data", "prompts", "weights", "evaluation", "training")  # each uses those before it
ABOVE = (
    "command_line",
    "commands",
    "model_commands",
    "prompt_commands",
    "demo",
)  # modules at the top that use all of them


def imported(path: Path) -> set[str]:
    """What a module names after `claver.`, also within functions: `data.lists`, or `config` of the top."""
    package = path.relative_to(FOLDER).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            found |= {".".join(filter(None, [*start, *([] if node.module else [name.name])])) for name in node.names}
    return found


def test_every_package_has_its_place_in_the_order():
    assert {path.parent.name for path in FOLDER.glob("*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_uses_none_that_comes_after_it(package):
    modules = sorted((FOLDER / package).glob("*.py"))
    assert len(modules) > 5
    later = (*ORDER[ORDER.index(package) + 1 :], *(name for name in ABOVE if name != "command_line"))
    uses = {module.name: {name for name in imported(module) if name.split(".")[0] in later} for module in modules}
    assert not {name: found for name, found in uses.items() if found}

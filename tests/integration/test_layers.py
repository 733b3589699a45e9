"""Modules know nothing of the layers above them. ``make lint`` checks their imports with import-linter."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_fast.cli.main import COMMANDS

PACKAGE = Path(__file__).parents[2] / "cifar_fast"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
ENTRY_POINTS = [PACKAGE / name for name in ("__main__.py", "train.py", "compare.py")]
LIBRARY = [
    *(path for path in sorted(PACKAGE.glob("*.py")) if path not in ENTRY_POINTS),
    *(path for room in ROOMS if room.name != "cli" for path in sorted(room.rglob("*.py"))),
]
LIBRARY.remove(PACKAGE / "utils/errors.py")  # describes how the commands show an option
FLAGS = {
    flag for command in COMMANDS.values() for action in command.make_parser()._actions for flag in action.option_strings
}


def command_line_uses(tree):
    """Yield the lines of a module that only a command may have, each with the reason."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if any(name.name == "argparse" for name in names):
                yield node.lineno, "imports argparse"
            case ast.ImportFrom(module="argparse"):
                yield node.lineno, "imports argparse"
            case ast.ImportFrom(module="cifar_fast", names=names) if {name.name for name in names} - {"__version__"}:
                yield node.lineno, "imports from the package, which lies above its rooms"
            case ast.Attribute(value=ast.Name(id="sys"), attr="exit") | ast.Name(id="SystemExit" | "exit"):
                yield node.lineno, "ends the process"
            case ast.Constant(value=str(text)):
                for flag in re.finditer(r"(?<![\w-])--[a-z][\w-]*", text):
                    if flag[0] in FLAGS:
                        yield node.lineno + text.count("\n", 0, flag.start()), f"names the flag {flag[0]}"


def test_rooms_state_their_purpose_in_one_line():
    assert len(ROOMS) + 2 <= 11  # with model.py and recipe.py, and the link to kernels/
    for room in ROOMS:
        purpose = ast.get_docstring(ast.parse((room / "__init__.py").read_text()), clean=False)
        assert purpose and re.fullmatch(r"[A-Z].{10,}\.", purpose), f"{room.name}/__init__.py: {purpose!r}"


def test_package_imports_no_module_before_its_first_use():
    code = "import sys, cifar_fast; print(*(name for name in sys.modules if name.startswith(('cifar_fast.', 'torch'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_library_module_does_not_know_the_command_line(path):
    found = [f"line {line} {reason}" for line, reason in command_line_uses(ast.parse(path.read_text()))]
    assert not found, "\n".join(found)

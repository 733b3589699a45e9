"""Docstrings, comments, names and documents are plain English: CONTRIBUTING.md says how we write."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("cifar_fast", "kernels", "benchmarks", "tests", "examples", "docs")
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".ipynb") and "results" not in path.parts and path != Path(__file__)
]
PHRASES = ("meanwhile", "in the place of", "goes on", "stands", "is told", "of before")
# A phrase may go over lines of text or of a comment, or be a part of a name. "CI stands for" is fine.
FORBIDDEN = re.compile(
    r"(?<![a-z])(" + "|".join(phrase.replace(" ", r"[\s_#]+") for phrase in PHRASES) + r")(?![a-z]|\s+for\b)", re.I
)
FRAGMENT = re.compile(r"(?:\A|[.!?]\s+)\s*((?:What|Of|As|Where|With)\b[^.]{,40})")


def phrases(text):
    """Yield the line and the text of each forbidden phrase."""
    for match in FORBIDDEN.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())


def fragments(text):
    """Yield the line and the start of each sentence of a docstring that lacks a subject or buries it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for match in FRAGMENT.finditer(ast.get_docstring(node) or ""):
                yield node.body[0].lineno, " ".join(match[1].split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain(path):
    text = path.read_text()
    found = [*phrases(text), *(fragments(text) if path.suffix == ".py" else ())]
    assert not found, "\n".join(f"line {line}: {words}" for line, words in sorted(found))


def test_the_checks_find_what_they_look_for():
    assert list(phrases("a\n# meanwhile\n# in the\n# place of x; test_it_is_told; CI stands for it, and stands")) == [
        (2, "meanwhile"),
        (3, "in the # place of"),
        (4, "is_told"),
        (4, "stands"),
    ]
    assert list(fragments('"""Return it. Where it is, it is."""\n\ndef f():\n    """What it is."""')) == [
        (1, "Where it is, it is"),
        (4, "What it is"),
    ]

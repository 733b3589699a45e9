"""Run the Python code of the documents."""

import re
from pathlib import Path

import pytest

import cifar_fast
from cifar_fast import Dataset
from cifar_fast.data.synthetic import PATTERNS, textures

DOCS = Path(__file__).parents[2] / "docs"


def blocks(document, section):
    """Return the Python code blocks under a heading."""
    text = (DOCS / document).read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("section", ["Callbacks", "Loader", "Custom models", "The fused norm"])
def test_documented_code_runs(section, tmp_path, monkeypatch, capsys):
    dataset = Dataset("textures", "textures", *textures(1024, seed=0), *textures(50, seed=1), tuple(PATTERNS))
    monkeypatch.setattr(cifar_fast, "load_dataset", lambda name: dataset)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the setting of a reader
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python.md", section)
    exec(compile(code, section, "exec"), {})
    expected = r"run 1, epoch 2: |2 steps an epoch, test accuracy \d|MyNet 1418 \d|Sequential 1586 \d"
    assert re.search(expected, capsys.readouterr().out)

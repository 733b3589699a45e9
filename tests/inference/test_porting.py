"""Each figure of docs/porting.md holds for the model that ``make demo`` trains."""

import copy
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from cifar_fast import load_model
from tests.helpers import ROOT, cells

PAGE = (ROOT / "docs/porting.md").read_text()
FIRST, *BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
LARGEST = 5e-6
PACKAGES = {
    name: next(block for block in BLOCKS if re.search(rf"^(import|from) {name}\b", block, re.MULTILINE))
    for name in ("flax", "keras", "tinygrad", "onnxruntime", "openvino")
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with ``runs/demo``."""
    folder = tmp_path_factory.mktemp("demo")
    flags = re.search(r"-m cifar_fast\.train (.* --output runs/demo)", (ROOT / "Makefile").read_text())[1]
    command = [sys.executable, "-m", "cifar_fast.train", *shlex.split(flags), "--dtype", "float32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder


def run_block(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    namespace = {}
    for part in (FIRST, code):
        exec(compile(part, "docs/porting.md", "exec", dont_inherit=True), namespace)
    return namespace


def replaced(kind, make):
    def change(model):
        for i, layer in enumerate(model.seq):
            if isinstance(layer, kind):
                model.seq[i] = make(layer)

    return change


def with_epsilon(model):
    for layer in model.seq:
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3


MISTAKES = {
    "ELU with": dict(change=replaced(nn.CELU, lambda layer: nn.ELU(layer.alpha))),
    "CELU with": dict(change=replaced(nn.CELU, lambda layer: nn.CELU(1.0))),
    "epsilon": dict(change=with_epsilon),
    "images divided": dict(divisor=255),
    "`scale` left out": dict(scale=False),
}


def logits_of(classifier, images, change=lambda model: None, divisor=1, scale=True):
    model = copy.deepcopy(classifier.model)
    change(model)
    normalized = (torch.from_numpy(images) / divisor - classifier.mean) / classifier.std
    with torch.no_grad():
        return (model if scale else model.outputs)(normalized.permute(0, 3, 1, 2)).numpy()


@pytest.mark.nightly
@pytest.mark.parametrize("start", MISTAKES)
def test_mistakes_are_as_large_as_stated(start, demo, monkeypatch):
    names = run_block("", demo, monkeypatch)
    (row,) = (row for row in cells(PAGE.splitlines()) if row[0].startswith(start))
    wrong = logits_of(load_model(demo / "runs/demo"), names["images"], **MISTAKES[start])
    error, equal = abs(wrong - names["expected"]).max(), (wrong.argmax(1) == names["expected"].argmax(1)).sum()
    (least, largest), (fewest, most) = ([float(number) for number in cell.split(" to ")] for cell in row[1:])
    assert least / 2 < error < 2 * largest and fewest - 8 <= equal <= most + 8, (error, equal)


@pytest.mark.nightly
@pytest.mark.parametrize("package", PACKAGES)
def test_ports_and_exports_give_the_logits(package, demo, monkeypatch):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "tinygrad":
        from tinygrad import Tensor

        try:
            (Tensor([1.0, 2.0]) @ Tensor([3.0, 4.0])).item()
        except Exception as error:
            pytest.skip(f"tinygrad cannot compute here ({error})")
    assert f"at most {LARGEST:.0e}".replace("e-06", "e-6") in PAGE
    names = run_block(PACKAGES[package], demo, monkeypatch)
    assert np.abs(np.asarray(names["logits"]) - names["expected"]).max() <= LARGEST

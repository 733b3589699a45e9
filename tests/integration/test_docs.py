"""Run every code block of README and docs, in order, as a reader types it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_fast.data import synthetic
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^    (?:\$ )?((?:\w+=\S+ )?(?:cifar-fast|python|torchrun|pip|make|source|cp) .*)$", re.MULTILINE)
SMALL = "--dataset synthetic --train-subset 640 --epochs 2 --batch-size 64 --widths 4 8"
SMALLER = (  # Nothing else of a command changes. Of a flag that is given twice, the last one counts.
    (r"(cifar-fast (?:train|compare|profile)|cifar_fast\.train)(?!.*--resume)", rf"\1 {SMALL}"),
    (r"--nproc-per-node 8", "--nproc-per-node 2"),
    (r"--runs (?:200|10)", "--runs 4"),
    (r"--train-subset 10000", "--train-subset 640"),
)
NOT_RUN = {
    r"^(make|source|pip) ": "installs or tests the project",
    r"files\.example\.org|/mnt/archives": "names an address that is an example",
    r"hf:": "downloads",
    r"--nnodes": "needs several machines",
    r"^cifar-fast check": "takes minutes; tests/diagnostics runs it",
    r"tests\.|benchmarks growth": "takes minutes; tests run a part of it",
    r"--backend compiled": "compiles for minutes",
    r"^cp |sweep spec.toml$|report runs/(spec|ablations)": "needs a folder of real images",
}
RUN_ANYWAY = r"docs/(experiments|cli)\.md cifar-fast sweep spec.toml"


def fenced(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def relative(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder like a fresh clone, with files that the pages tell a reader to write, or that are the reader's own."""
    for folder in ("examples", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (spec,) = fenced(ROOT / "docs/experiments.md", "toml")
    (tmp_path / "spec.toml").write_text(spec)
    (tmp_path / "photos").mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (50, 60, 3), np.uint8)
    for path in ("photos/dog.png", "cat.jpg"):
        Image.fromarray(pixels).save(tmp_path / path)
    write_test_sets(tmp_path)
    write_medmnist(tmp_path / "pathmnist_64.npz")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the setting of a reader
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_medmnist(path):
    """Write images of 64 x 64 pixels as MedMNIST publishes them."""
    arrays = {}
    for seed, (split, n) in enumerate({"train": 700, "val": 20, "test": 20}.items()):
        images, labels = synthetic.textures(n, seed)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images.repeat(2, 1).repeat(2, 2), labels[:, None]
    np.savez(path, **arrays)


def write_test_sets(folder):
    """Write the sets of --also-test in docs/data.md, in their published forms."""
    images, labels = synthetic.textures(20, seed=2)
    for name in ("CIFAR-10.1/datasets", "CIFAR-10-C"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "CIFAR-10.1/datasets/cifar10.1_v6_data.npy", images)
    np.save(folder / "CIFAR-10.1/datasets/cifar10.1_v6_labels.npy", labels)
    np.savez(folder / "cifar102_test.npz", images=images, labels=labels)
    np.save(folder / "CIFAR-10-C/fog.npy", images)
    np.save(folder / "CIFAR-10-C/labels.npy", labels)


def missing_package(code):
    """Return a package that the code imports and that is not installed, or None."""
    found = re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
    return next((name for name in found if find_spec(name) is None), None)


LONG = {"docs/experiments.md": pytest.mark.nightly}  # two sweeps
WITH_PYTHON = [
    pytest.param(page, id=relative(page), marks=LONG.get(relative(page), pytest.mark.slow))
    for page in PAGES
    if fenced(page, "python") and page.name != "porting.md"  # tests/inference/test_porting.py runs it
]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs(page, reader, monkeypatch):
    """The embedded images are the first 1,024 of the 10,000 and 100 of the 2,000; the code is as written."""
    whole = synthetic.textures
    monkeypatch.setattr(synthetic, "textures", lambda n, seed: whole(1024 if n > 2000 else 100, seed))
    namespace = {}
    for number, code in enumerate(fenced(page, "python"), 1):
        if missing := missing_package(code):
            pytest.skip(f"block {number} and later ones need {missing}")
        exec(compile(code, f"{relative(page)}, block {number}", "exec", dont_inherit=True), namespace)


def commands(page):
    """Return the commands of a page that are run, and those that are not, without their comments."""
    lines = [re.sub(r"\s+#.*", "", line) for line in COMMAND.findall(page.read_text())]
    left_out = [
        line
        for line in lines
        if any(re.search(pattern, line) for pattern in NOT_RUN)
        and not re.fullmatch(RUN_ANYWAY, f"{relative(page)} {line}")
    ]
    return [line for line in lines if line not in left_out], left_out


@pytest.mark.nightly
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)[0]], ids=relative)
def test_commands_of_a_page_run(page, reader):
    """Run the commands in order. Trainings are made small by SMALLER, and NOT_RUN has those that are left out."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for command in commands(page)[0]:
        for pattern, replacement in SMALLER:
            command = re.sub(pattern, replacement, command)
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"


def test_every_reason_to_leave_out_a_command_is_used():
    lines = [line for page in PAGES for line in COMMAND.findall(page.read_text())]
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)]


def test_the_example_of_a_sweep_is_the_documented_one():
    (spec,) = fenced(ROOT / "docs/experiments.md", "toml")
    assert (ROOT / "examples/sweep.toml").read_text().split("\n", 1)[1] == spec

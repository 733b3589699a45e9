"""CIFAR-10 and CIFAR-100 in their published form, through the commands; data sets of any array layout."""

import json

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from cifar_fast import Dataset, Recipe, fit
from cifar_fast.compare import main as compare
from cifar_fast.data.synthetic import PATTERNS
from cifar_fast.train import main
from tests.helpers import NARROW, small_dataset

TINY = "--widths 4 8 8 8 16 32 32 32 --epochs 2 --batch-size 32 --device cpu"


def train(name, root, output, flags):
    """Train on the archive with the command and return its summary."""
    assert main(f"--dataset {name} --data-dir {root} --output {output} {TINY} {flags}".split()) == 0
    return json.loads((output / "summary.json").read_text())


def losses(output):
    return [json.loads(line)["train_loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_archives_have_the_published_layout(cifar10, cifar100):
    """torchvision gives a transposed view of [N, 3, 32, 32]."""
    for kind, root in ((CIFAR10, cifar10), (CIFAR100, cifar100)):
        assert kind(root, train=True, download=True).data.strides == (3072, 32, 1, 1024)


@pytest.mark.slow  # whole trainings
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_cifar10_trains_without_compiler(cifar10, tmp_path, backend, capsys):
    summary = train("cifar10", cifar10, tmp_path / "out", f"--backend {backend} --runs 2")
    memory_format = "contiguous_format" if backend == "eager" else "channels_last"
    assert summary["backend"] == "eager" and summary["memory_format"] == memory_format
    assert f"backend eager, {memory_format}, {summary['dtype']}" in capsys.readouterr().out.splitlines()[0]
    assert [run["seed"] for run in summary["runs"]] == [0, 1]
    assert summary["dataset"]["class_names"] == list(PATTERNS)


@pytest.mark.nightly  # the compiler
@pytest.mark.parametrize(("backend", "runs"), [("compiled", 2), ("fused", 1)])
def test_cifar10_trains_with_compiler(cifar10, tmp_path, backend, runs, few_programs):
    flags = f"--dtype float32 --batch-size 50 --runs {runs}"
    summary = train("cifar10", cifar10, tmp_path / "out", f"--backend {backend} {flags}")
    assert summary["backend"] == backend and summary["memory_format"] == "channels_last"
    train("cifar10", cifar10, tmp_path / "eager", f"--backend eager {flags}")
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


def test_cifar100_trains_on_fine_labels(cifar100, tmp_path):
    summary = train("cifar100", cifar100, tmp_path / "out", "--dtype float32")
    assert summary["dataset"]["name"] == "cifar100" and len(summary["dataset"]["class_names"]) == 100
    assert summary["dataset"]["digest"] == small_dataset(200, 100, 100).digest


def test_cifar10_training_can_be_profiled(cifar10, tmp_path):
    assert main(f"--dataset cifar10 --data-dir {cifar10} --profile {tmp_path}/out {TINY}".split()) == 0
    assert json.loads((tmp_path / "out/profile.json").read_text())["step_milliseconds"] > 0


@pytest.mark.slow  # the interpreter
def test_backends_can_be_compared_on_cifar10(cifar10, few_programs, uncompiled):
    flags = f"--dataset cifar10 --data-dir {cifar10} {TINY} --dtype float32 --steps 2"
    assert compare(f"{flags} --backend fused --against eager".split()) == 0


@pytest.mark.slow
def test_eager_uses_contiguous_format_and_channels_last_gives_other_bits(cifar10, tmp_path):
    """Otherwise a test of parity could not tell the two layouts apart."""
    for memory_format in ("auto", "contiguous_format", "channels_last"):
        train(
            "cifar10",
            cifar10,
            tmp_path / memory_format,
            f"--backend eager --dtype float32 --memory-format {memory_format}",
        )
    assert losses(tmp_path / "auto") == losses(tmp_path / "contiguous_format")
    assert losses(tmp_path / "auto") != losses(tmp_path / "channels_last")
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "channels_last"), rel=1e-2)


def memory_mapped(images, tmp_path):
    file = tmp_path / f"{len(images)}.npy"
    np.save(file, images)
    return np.load(file, mmap_mode="r")


def read_only(images, tmp_path):
    images = images.copy()
    images.flags.writeable = False
    return images


LAYOUTS = {
    "transposed": lambda images, _: np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "reversed": lambda images, _: np.ascontiguousarray(images[..., ::-1])[..., ::-1],
    "sliced": lambda images, _: np.repeat(images, 2, axis=0)[::2],
    "Fortran": lambda images, _: np.asfortranarray(images),
    "read-only": read_only,
    "memory-mapped": memory_mapped,
    "nested lists": lambda images, _: np.array(images.tolist(), np.uint8),
}


@pytest.mark.parametrize(
    ("layout", "backend"),
    [*((layout, "auto") for layout in LAYOUTS), pytest.param("transposed", "fused", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("error")
def test_any_array_layout_trains_to_the_same_result(tmp_path, layout, backend, few_programs, uncompiled):
    def other(images):
        return LAYOUTS[layout](images, tmp_path)

    small = small_dataset(train=8, test=4, classes=2)
    labels = small.train_labels.astype(">i4")
    dataset = Dataset(
        "npz", "x", other(small.train_images), labels, other(small.test_images), small.test_labels.astype(np.uint8)
    )
    assert dataset.digest == small.digest
    recipe = Recipe(epochs=1, batch_size=4, widths=NARROW)
    ours, plain = (
        fit(recipe, data, backend=backend, device="cpu", dtype="float32", log=None) for data in (dataset, small)
    )
    assert [(row.train_loss, row.test_accuracy) for row in ours.rows] == [
        (row.train_loss, row.test_accuracy) for row in plain.rows
    ]
    assert all(torch.equal(ours.state_dict[name], tensor) for name, tensor in plain.state_dict.items())


def test_arrays_in_the_right_layout_are_not_copied(small):
    again = Dataset("npz", "x", small.train_images, small.train_labels, small.test_images, small.test_labels)
    assert again.train_images is small.train_images and again.test_labels is small.test_labels

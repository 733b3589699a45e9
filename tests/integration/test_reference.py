"""The eager backend is the reference: same draws, same batches, same weights, same metrics."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from benchmarks.reference import Network, Training, augmented_epoch, normalized
from cifar_fast import CNN, Recipe, draw_epoch, fit, load_dataset
from cifar_fast.data.augment import augment
from cifar_fast.data.dataset import ARRAYS
from cifar_fast.train import main
from tests.helpers import NARROW, normalize, published, small_dataset


def reference_metrics(dataset, recipe, dtype, device="cpu", seed=0):
    """Return loss, training and test accuracy of each epoch by ``benchmarks/reference.py``, and the final weights."""
    train, test = normalized(dataset.train_images, dataset.test_images, dtype, device)
    train_labels = torch.tensor(dataset.train_labels, device=device)
    test_labels = torch.tensor(dataset.test_labels, device=device)
    how = dict(epochs=recipe.epochs, batch_size=recipe.batch_size, widths=recipe.widths, classes=dataset.num_classes)
    training = Training(seed=seed, dtype=dtype, device=device, **how)
    rows = [(*training.epoch(train, train_labels), training.evaluate(test, test_labels)) for _ in range(recipe.epochs)]
    return rows, training.network.state_dict()


def metrics(result):
    """Return the figures of each epoch with all digits of their float32 values, of which a row has the fewest."""
    rows = [(row.train_loss, row.train_accuracy, row.test_accuracy) for row in result.rows]
    return [tuple(map(float, np.float32(values))) for values in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 7])
def test_batches_equal_the_references(dtype, seed):
    dataset = small_dataset(train=1300, classes=10, seed=seed)
    images, _ = normalize(dataset, torch.device("cpu"), dtype)
    expected_images, _ = normalized(dataset.train_images, dataset.test_images, dtype)
    labels = torch.tensor(dataset.train_labels)

    torch.manual_seed(seed)
    expected, expected_labels = augmented_epoch(expected_images, labels)
    after = torch.rand(())
    torch.manual_seed(seed)
    draws = draw_epoch(len(images), device="cpu")
    assert torch.rand(()) == after, "the reference leaves the generator in another state"

    nchw = torch.contiguous_format
    batches = [augment(images, draws.slice(i, i + 512), Recipe(), nchw) for i in range(0, len(images), 512)]
    assert torch.equal(torch.cat(batches), expected)
    assert torch.equal(labels[draws.permutation], expected_labels)
    assert batches[0].stride() == expected[:512].stride(), "other strides select other convolution algorithms"


def test_initial_weights_equal_the_references():
    torch.manual_seed(3)
    expected = Network().state_dict()
    torch.manual_seed(3)
    model = CNN(Recipe(), 10).state_dict()
    assert list(model) == list(expected)
    assert all(torch.equal(model[name], expected[name]) for name in expected)


def test_reference_uses_torchvision_memory_layout(cifar10):
    images = CIFAR10(cifar10, train=True, download=True).data
    dataset = load_dataset("cifar10", cifar10, log=None)
    torchvision = (torch.tensor(images) / 1.0).permute(0, 3, 1, 2)
    reference, _ = normalized(dataset.train_images, dataset.test_images, torch.float32)
    assert reference.stride() == torchvision.stride() and reference.is_contiguous()


def test_training_equals_the_references(cifar10):
    recipe = Recipe(epochs=3, batch_size=32, widths=NARROW)
    dataset = load_dataset("cifar10", cifar10, log=None)
    result = fit(recipe, dataset, backend="eager", device="cpu", dtype="float32", seed=5, log=None)
    expected, weights = reference_metrics(dataset, recipe, torch.float32, seed=5)
    assert metrics(result) == expected
    for name, tensor in weights.items():
        assert torch.equal(result.state_dict[name], tensor), name


@pytest.mark.parametrize(
    "count",
    [pytest.param(128, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.nightly)],
)
def test_metrics_on_real_images_equal_those_of_the_published_script(shared, tmp_path, monkeypatch, count):
    """Train the full network for 2 epochs with batch size 64, by both commands, on the published archive's format."""
    dataset, script = load_dataset("npz", shared("data/cifar10-mini.npz")), shared("reference/cifar94.py")
    arrays = {name: getattr(dataset, name)[:count] for name in ARRAYS}
    dataset, npz = dataclasses.replace(dataset, **arrays), tmp_path / "images.npz"
    dataset.save(npz)
    root = published("cifar10", dataset, tmp_path / "data", monkeypatch)
    flags = "--backend eager --device cpu --dtype float32 --epochs 2 --batch-size 64 --seed 0"
    assert main(f"--dataset cifar10 --data-dir {root} --output {tmp_path}/out {flags}".split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    actual = [(row["train_loss"], row["train_accuracy"], row["test_accuracy"]) for row in rows]
    file = tmp_path / "metrics.jsonl"
    flags = f"--data {npz} --device cpu --dtype float32 --epochs 2 --batch-size 64 --seed 0 --metrics {file}"
    subprocess.run([sys.executable, str(script), *flags.split()], check=True, capture_output=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [(row["train_loss"], row["train_accuracy"], row["test_accuracy"]) for row in rows]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_training_on_a_gpu_matches_the_reference(small, dtype):
    recipe = Recipe(epochs=2, batch_size=32, widths=NARROW)
    previous = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        result = fit(recipe, small, backend="eager", device="cuda", dtype=dtype, seed=5, log=None)
        expected, _ = reference_metrics(small, recipe, getattr(torch, dtype), device="cuda", seed=5)
    finally:
        torch.backends.cudnn.deterministic = previous
    for ours, theirs in zip(metrics(result), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)

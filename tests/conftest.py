import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU

import kernels.launch
from cifar_fast import Dataset
from cifar_fast.synthetic import PATTERNS, textures
from tests.archives import KINDS, write_archive

SHARED = Path(os.environ.get("CIFAR_FAST_SHARED", Path(__file__).parents[2] / "shared"))
NARROW = (4, 8, 8, 8, 16, 32, 32, 32)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(scope="session")
def shared():
    """Gives the path of a file that stands beside the project; skips where it is absent, since it is not part of the project."""

    def find(name):
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not beside the project")
        return SHARED / name

    return find


def small_dataset(train=96, test=40, classes=3, seed=0):
    """Random pictures whose labels can be learnt: class k is brighter than class k - 1."""
    random = np.random.RandomState(seed)

    def split(n):
        labels = np.arange(n) % classes
        images = random.randint(0, 100, (n, 32, 32, 3)) + labels[:, None, None, None] * (155 // classes)
        return images.astype(np.uint8), labels

    (train_images, train_labels), (test_images, test_labels) = split(train), split(test)
    return Dataset("npz", "small.npz", train_images, train_labels, test_images, test_labels)


@pytest.fixture(scope="session")
def small():
    return small_dataset()


def save_npz(path, dataset, **changes):
    """Write the four arrays of ``dataset`` to ``path``, changed or, where None, left out."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    arrays = {name: getattr(dataset, name) for name in names} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def published(name, dataset, root, monkeypatch):
    """``root`` with the archive of ``name`` in it as published, torchvision told to expect it; and nothing on the network."""
    kind = KINDS[name]
    for attribute, value in write_archive(root, name, dataset).items():
        monkeypatch.setattr(kind, attribute, value)
    monkeypatch.setattr(kind, "url", f"http://127.0.0.1:9/{kind.filename}")
    return root


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with a small CIFAR-10 in its published form: 100 of the embedded textures to train on, 50 to test."""
    dataset = Dataset("textures", "textures", *textures(100, seed=0), *textures(50, seed=1), tuple(PATTERNS))
    return published("cifar10", dataset, tmp_path / "cifar10", monkeypatch)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """The same of CIFAR-100: 200 training images, 100 test images, a hundred classes."""
    return published("cifar100", small_dataset(200, 100, 100), tmp_path / "cifar100", monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch):
    """Launch parameters with which small tensors take many blocks, stretches of several blocks, and short last ones."""
    entry = {"*": dict(rows=4, channels=8, stretches=3, num_warps=4)}
    names = ("statistics", "backward_sums", "apply", "pool_apply", "backward_apply")
    table = {f"batch_norm_celu.{name}": entry for name in names} | {"batch_norm_celu.merge": {"*": dict(channels=4, num_warps=4)}}
    monkeypatch.setattr(kernels.launch, "_table", lambda: table)


@pytest.fixture
def uncompiled(monkeypatch):
    """What torch.compile makes of the model is tested by itself; without it a test takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


@pytest.fixture
def few_programs(monkeypatch):
    """Launch parameters for tiny tensors: the interpreter takes a millisecond and more a program."""
    names = ("statistics", "backward_sums", "apply", "pool_apply", "backward_apply")
    table = {f"batch_norm_celu.{name}": {"*": dict(rows=4096, channels=32, stretches=64, num_warps=4)} for name in names}
    table |= {"batch_norm_celu.merge": {"*": dict(channels=32, num_warps=4)}, "augment": {"*": dict(block=8192, num_warps=4)}}
    monkeypatch.setattr(kernels.launch, "_table", lambda: table)

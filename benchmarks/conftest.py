"""``pytest benchmarks/``: each case under pytest-benchmark, on the data set that --dataset and --data-dir name."""

import dataclasses

import numpy as np
import pytest
import torch

from cifar_fast import Dataset, load_dataset
from cifar_fast.kernels.launch import interpreted


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cifar_fast")
    group.addoption("--dataset", default="synthetic", help="data set of the CPU part (default: synthetic)")
    group.addoption("--data-dir", help="where it is")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "no CUDA GPU here" if not torch.cuda.is_available() else "TRITON_INTERPRET is set; unset it"
    if not torch.cuda.is_available() or interpreted():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def dataset(request: pytest.FixtureRequest) -> Dataset:
    """At most 2,048 of the training images, of each class as many: few enough for a look at every change."""
    whole = load_dataset(request.config.getoption("--dataset"), request.config.getoption("--data-dir"), log=None)
    labels = whole.train_labels
    place = np.empty_like(labels)  # of an image in its class
    for label in range(whole.num_classes):
        place[labels == label] = np.arange((labels == label).sum())
    few = np.sort(np.argsort(place, kind="stable")[:2048])
    return dataclasses.replace(whole, train_images=whole.train_images[few], train_labels=labels[few])

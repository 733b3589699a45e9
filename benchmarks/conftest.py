"""Options and data of ``pytest benchmarks/``, which runs each case under pytest-benchmark."""

import dataclasses

import pytest

from cifar_fast import Dataset, load_dataset


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cifar_fast")
    group.addoption("--dataset", default="synthetic", help="data set for the CPU (default: synthetic)")
    group.addoption("--data-dir", help="folder or file of the data set")


@pytest.fixture(scope="session")
def dataset(request: pytest.FixtureRequest) -> Dataset:
    """Return at most 2,048 of the training images, evenly spaced."""
    whole = load_dataset(request.config.getoption("--dataset"), request.config.getoption("--data-dir"), log=None)
    few = slice(None, None, -(-len(whole.train_images) // 2048))
    return dataclasses.replace(whole, train_images=whole.train_images[few], train_labels=whole.train_labels[few])

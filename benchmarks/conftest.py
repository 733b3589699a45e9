"""``pytest benchmarks/``: each case under pytest-benchmark, on the data set that --dataset and --data-dir name."""

import dataclasses

import pytest

from cifar_fast import Dataset, load_dataset


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cifar_fast")
    group.addoption("--dataset", default="synthetic", help="data set of the CPU part (default: synthetic)")
    group.addoption("--data-dir", help="where it is")


@pytest.fixture(scope="session")
def dataset(request: pytest.FixtureRequest) -> Dataset:
    """At most 2,048 of the training images, evenly out of all: few enough for a look at every change."""
    whole = load_dataset(request.config.getoption("--dataset"), request.config.getoption("--data-dir"), log=None)
    few = slice(None, None, -(-len(whole.train_images) // 2048))
    return dataclasses.replace(whole, train_images=whole.train_images[few], train_labels=whole.train_labels[few])

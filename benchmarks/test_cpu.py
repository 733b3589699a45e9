"""``pytest benchmarks/test_cpu.py``: an epoch's augmentation and a training step on this CPU, beside the reference's.

A look at every change, in about a minute, all in one process; ``python -m benchmarks run --only cpu`` lets the sides
take turns in processes of their own, and is what figures are published from. Nothing is timed before it was checked.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.parts import CPU_SIDES, cpu_calls
from cifar_fast import Dataset, Recipe

sides = pytest.mark.parametrize("side", CPU_SIDES[:-1])  # the last is the one before it again


@sides
def test_step(benchmark: BenchmarkFixture, dataset: Dataset, side: str) -> None:
    """A step of 32 images at full width."""
    step, _ = cpu_calls(Recipe(batch_size=32), dataset, side)
    losses: list[torch.Tensor] = []
    benchmark.group = f"training step of 32 images, {dataset.name}"
    benchmark.pedantic(lambda: losses.append(step()), rounds=3, warmup_rounds=1)
    assert torch.stack(losses).isfinite().all()


@sides
def test_augmentation(benchmark: BenchmarkFixture, dataset: Dataset, side: str) -> None:
    """An epoch's: 652 masked passes over all images, and ours, batch by batch."""
    _, augment_epoch = cpu_calls(Recipe(batch_size=32), dataset, side)
    benchmark.group = f"augmentation of {len(dataset.train_images)} images, {dataset.name}"
    benchmark.pedantic(augment_epoch, rounds=3, warmup_rounds=1)

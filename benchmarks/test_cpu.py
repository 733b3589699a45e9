"""``pytest benchmarks/test_cpu.py``: a training step and the augmentation of an epoch on this CPU.

It takes about a minute in one process, so it can be run after every change. For published figures ``python -m
benchmarks run --only cpu`` runs each side in processes of its own, in turn. Both check the results before they time
anything.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.parts import CPU_SIDES, cpu_calls
from cifar_fast import Dataset, Recipe

sides = pytest.mark.parametrize("side", CPU_SIDES[:-1])  # the last one repeats the one before it


@sides
def test_step(benchmark: BenchmarkFixture, dataset: Dataset, side: str) -> None:
    """Time a step of 32 images at full width."""
    step, _ = cpu_calls(Recipe(batch_size=32), dataset, side)
    losses: list[torch.Tensor] = []
    benchmark.group = f"training step of 32 images, {dataset.name}"
    benchmark.pedantic(lambda: losses.append(step()), rounds=3, warmup_rounds=1)
    assert torch.stack(losses).isfinite().all()


@sides
def test_augmentation(benchmark: BenchmarkFixture, dataset: Dataset, side: str) -> None:
    """Time an epoch: 652 masked passes over all images in the reference, batch by batch in ours."""
    _, augment_epoch = cpu_calls(Recipe(batch_size=32), dataset, side)
    benchmark.group = f"augmentation of {len(dataset.train_images)} images, {dataset.name}"
    benchmark.pedantic(augment_epoch, rounds=3, warmup_rounds=1)

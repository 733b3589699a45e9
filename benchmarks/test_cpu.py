"""``pytest benchmarks/test_cpu.py``: an epoch's augmentation and a training step on this CPU, beside the reference's.

A look at every change, in about a minute, all in one process; ``python -m benchmarks run --only cpu`` lets the sides
take turns in processes of their own, and is what figures are published from. Nothing is timed before it was checked.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import reference
from benchmarks.parts import check_batches
from cifar_fast import CNN, Dataset, Recipe, draw_epoch
from cifar_fast.augment import augment
from cifar_fast.plan import resolve, set_up
from cifar_fast.progress import silent

SIDES = ("reference", "eager", "auto")
CPU = torch.device("cpu")


def training_of(dataset: Dataset, recipe: Recipe) -> reference.Training:
    how = dict(epochs=recipe.epochs, batch_size=recipe.batch_size, classes=dataset.num_classes)
    return reference.Training(seed=0, dtype=torch.float32, **how)


def reference_data(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    images, _ = reference.normalized(dataset.train_images, dataset.test_images, torch.float32)
    return images, torch.tensor(dataset.train_labels)


@pytest.mark.parametrize("side", SIDES)
def test_step(benchmark: BenchmarkFixture, dataset: Dataset, side: str) -> None:
    """A step of 32 images at full width. The reference's takes a batch that is there; ours makes it too."""
    recipe = Recipe(batch_size=32)
    n, losses = len(dataset.train_images), []
    training = training_of(dataset, recipe)
    if side == "reference":
        batch = next(training.batches(*reference_data(dataset)))

        def step() -> torch.Tensor:
            return training.step(*batch, n // recipe.batch_size)[0]

    else:
        plan = resolve(side, "cpu", "float32" if side == "eager" else "auto")
        backend, _ = set_up(plan, recipe, dataset, silent)
        torch.manual_seed(0)
        backend.reset(CNN(recipe, dataset.num_classes))
        draws = draw_epoch(n, device=CPU, recipe=recipe)
        if side == "eager":
            expected, _ = training.step(*next(training.batches(*reference_data(dataset))), n // recipe.batch_size)
            assert torch.equal(next(backend.train_epoch(draws))[0], expected), "not the reference's losses"

        def step() -> torch.Tensor:
            return next(backend.train_epoch(draws))[0]

    benchmark.group = "training step of 32 images"
    benchmark.pedantic(lambda: losses.append(step()), rounds=3, warmup_rounds=1)
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("side", SIDES)
def test_augmentation(benchmark: BenchmarkFixture, dataset: Dataset, side: str) -> None:
    """An epoch's: 652 masked passes over all images, and ours, batch by batch."""
    recipe, n = Recipe(), len(dataset.train_images)
    benchmark.group = f"augmentation of {n} images"
    images, labels = reference_data(dataset)
    if side == "reference":
        benchmark.pedantic(reference.augmented_epoch, (images, labels), rounds=3)
        return
    plan = resolve(side, "cpu", "float32" if side == "eager" else "auto")
    check_batches(dataset, recipe, plan.dtype, plan.memory_format)
    source = images.permute(0, 2, 3, 1).contiguous().to(plan.dtype)
    draws = draw_epoch(n, device=CPU, recipe=recipe)

    def epoch() -> None:
        for i in range(0, n, recipe.batch_size):
            augment(source, draws.slice(i, i + recipe.batch_size), recipe, plan.memory_format)

    benchmark.pedantic(epoch, rounds=3, warmup_rounds=1)

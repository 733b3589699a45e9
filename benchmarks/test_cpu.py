"""``pytest benchmarks/test_cpu.py``: augmentation and a training step on this CPU, beside the reference's own settings.

Everywhere, in about a minute, with fewer pictures than the recipe has: a look at every change. All rows run in
one process, one after the other; ``python -m benchmarks.cpu`` lets the sides take turns in processes of their own, and is what
figures are published from. The reference's settings are float32, eager and masked passes; ours are what ``auto``
picks here, and in float32 beside it. Nothing is timed before it was checked.
"""

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import reference
from cifar_fast import CNN, Dataset, Recipe, draw_epoch
from cifar_fast.augment import Draws, augment
from cifar_fast.backends import Eager, normalize
from cifar_fast.choose import choose

CPU = torch.device("cpu")
PICTURES = 2048
STEP = Recipe(batch_size=64)
SIDES = ("reference", "ours", "ours in float32")
ROUNDS = 3


def dataset() -> Dataset:
    """Noise, which costs what pictures cost."""
    images = np.random.RandomState(0).randint(0, 256, (PICTURES, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(PICTURES) % 10
    return Dataset("noise", "noise", images, labels, images[:100], labels[:100])


def dtype_of(side: str) -> torch.dtype:
    return choose(device="cpu").dtype if side == "ours" else torch.float32


def reference_images(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pictures ``[N, 3, 32, 32]`` and their labels, as the reference has them."""
    data = dataset()
    return reference.normalized(data.train_images, data.test_images, dtype)[0], torch.tensor(data.train_labels)


@pytest.mark.parametrize("side", SIDES)
def test_augmentation(benchmark: BenchmarkFixture, side: str) -> None:
    """An epoch's augmentation: 652 masked passes over all pictures, and ours, batch by batch."""
    recipe, dtype = Recipe(), dtype_of(side)
    images, labels = reference_images(dtype)
    ours, _ = normalize(dataset(), CPU, dtype)

    def masked_passes() -> torch.Tensor:
        return reference.augmented_epoch(images, labels)[0]

    def gather() -> list[torch.Tensor]:
        draws = draw_epoch(PICTURES, device=CPU, recipe=recipe)
        return [augment(ours, draws.slice(i, i + recipe.batch_size), recipe) for i in range(0, PICTURES, recipe.batch_size)]

    torch.manual_seed(1)
    expected = masked_passes()
    torch.manual_seed(1)
    assert torch.equal(torch.cat(gather()), expected), "our batches are not the reference's"

    benchmark.group = f"augmentation of {PICTURES} pictures"
    benchmark.extra_info |= {"pictures": PICTURES, "dtype": str(dtype), "threads": torch.get_num_threads()}
    benchmark.pedantic(masked_passes if side == "reference" else gather, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("side", SIDES)
def test_training_step(benchmark: BenchmarkFixture, side: str) -> None:
    """A step at full width: the reference's takes a batch that is there; ours also makes it, from a draw of its own."""
    dtype = dtype_of(side)
    training, batches = reference_training()
    backend, draws = eager_backend(dtype)
    steps = PICTURES // STEP.batch_size

    def reference_step() -> torch.Tensor:
        return training.step(*batches[0], steps)[0]

    def our_step() -> torch.Tensor:
        return next(backend.train_epoch(0, draws.slice(0, STEP.batch_size)))[0]

    step = reference_step if side == "reference" else our_step
    if side == "ours in float32":
        check_steps_are_the_references()
    assert step().isfinite().all(), "the step's losses are not finite"

    benchmark.group = f"training step of {STEP.batch_size} pictures"
    benchmark.extra_info |= {"batch_size": STEP.batch_size, "dtype": str(dtype), "threads": torch.get_num_threads()}
    losses = benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
    assert losses.isfinite().all(), "the timed step's losses are not finite"


def reference_training() -> tuple[reference.Training, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The reference before its first step, and the batches of its first epoch."""
    training = reference.Training(seed=0, epochs=STEP.epochs, batch_size=STEP.batch_size, dtype=torch.float32)
    return training, list(training.batches(*reference_images(torch.float32)))


def eager_backend(dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last) -> tuple[Eager, Draws]:
    """What ``auto`` takes on a CPU, in ``dtype``, set up from the same seed, and the draws of its first epoch."""
    torch.manual_seed(0)
    model = CNN(STEP, 10)
    draws = draw_epoch(PICTURES, device=CPU, recipe=STEP)
    backend = choose(device="cpu").backends[0](STEP, dataset(), CPU, dtype, memory_format)
    backend.prepare(model)
    return backend, draws


def check_steps_are_the_references(count: int = 2) -> None:
    """The losses of the first steps, bit for bit: the second has met the first's gradients."""
    training, batches = reference_training()
    backend, draws = eager_backend(torch.float32, torch.contiguous_format)
    for i, (losses, _) in zip(range(count), backend.train_epoch(0, draws)):
        expected, _ = training.step(*batches[i], PICTURES // STEP.batch_size)
        assert torch.equal(losses, expected), f"the losses of step {i + 1} are not the reference's"

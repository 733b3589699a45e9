"""The training loop of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.data.augment import draw_epoch
from cifar_fast.training.metrics import EpochRow
from cifar_fast.training.time_to_go import TimeToGo
from cifar_fast.training.verify import repeat_step
from cifar_fast.utils.errors import Diverged, MissingRuns


def train(
    backend: Backend,
    order: torch.Generator,
    augmentation: torch.Generator,
    clock: Callable[[], float],
    *,
    after: EpochRow = EpochRow.before_first(0),  # noqa: B008  (frozen)
    on_step: Callable[[], None] = lambda: None,
    to_go: TimeToGo | None = None,
    verify_every: int = 0,
) -> Iterator[EpochRow]:
    """Train the epochs of a run that follow ``after``, and yield a row at the end of each.

    Args:
        backend: was reset, or restored from a checkpoint.
        order: generator of the permutation of each epoch.
        augmentation: generator of the draws for augmentation; may be ``order``.
        clock: function that waits for the device and returns the time in seconds, such as
            :func:`cifar_fast.utils.device.device_timer` returns.
        after: row of the last finished epoch, epoch 0 at the start of a run. New rows get its run index.
        on_step: called after each step.
        to_go: counts the steps, and shows the bar of each epoch.
        verify_every: repeat every so many steps of the run, and compare the bits; 0: none.

    Raises:
        Diverged: the loss is no longer finite.
        MissingRuns: a repeated step has given other bits.
    """
    recipe, n, on_cpu = backend.recipe, len(backend.data.train_images), backend.device.type == "cpu"
    steps = n // recipe.batch_size
    train_seconds, evaluation_seconds = after.train_seconds, after.evaluation_seconds
    to_go = to_go or TimeToGo()
    for epoch in range(after.epoch, recipe.epochs):
        with to_go.epoch(epoch + 1, recipe.epochs, steps, recipe.batch_size) as step:
            start = clock()
            scores = []
            draws = draw_epoch(
                n, device=backend.device, recipe=recipe, generator=augmentation, order=order, epoch=epoch
            )
            train_step = backend.begin_epoch(draws)
            for i in range(steps):
                number = epoch * steps + i + 1  # counted from 1 over the run
                if verify_every and number % verify_every == 0:
                    (loss, correct), differing = repeat_step(backend, train_step, i)
                    check_repeated(differing, f"step {number} (epoch {epoch + 1}) of run {after.run}")
                else:
                    loss, correct = train_step(i)
                scores.append((loss, correct))
                step()
                if on_cpu:  # on a GPU, reading a loss would wait for the device
                    check_finite(loss[None], number, steps)
                on_step()
            train_seconds += clock() - start
        losses, correct = (torch.stack(values) for values in zip(*scores))
        check_finite(losses, epoch * steps + 1, steps)

        start = clock()
        evaluated = backend.evaluate()
        evaluation_seconds += clock() - start
        mean_loss, accuracy = means(losses, correct)
        count = backend.data.validation_count
        val_loss, val_accuracy = means(*(values[:count] for values in evaluated)) if count else (None, None)
        test_loss, test_accuracy = means(*(values[count:] for values in evaluated))
        yield EpochRow(
            run=after.run,
            epoch=epoch + 1,
            train_loss=mean_loss,
            train_accuracy=accuracy,
            validation_loss=val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            validation_accuracy=val_accuracy,
            test_loss=test_loss if math.isfinite(test_loss) else None,
            test_accuracy=test_accuracy,
            train_seconds=train_seconds,
            evaluation_seconds=evaluation_seconds,
        )


def check_repeated(differing: Sequence[str], where: str) -> None:
    """Raise :class:`MissingRuns` if the step ``where`` gave other bits in ``differing`` when it was repeated."""
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise MissingRuns(
            f"{where}: other bits when it was repeated, in {differing[0]}{more}; the memory or the processor may be "
            "faulty, or an algorithm is not deterministic; resume to train on from the last checkpoint"
        )


def means(losses: torch.Tensor, correct: torch.Tensor) -> tuple[float, float]:
    """Return the mean loss, and the accuracy in %."""
    # The reference script averages 100 for correct and 0 for wrong. Other arithmetic changes the last bit.
    return shortest(losses.float().mean()), shortest((100 * correct).float().mean())


def shortest(value: torch.Tensor) -> float:
    """Return the number of fewest digits that is ``value`` in float32: 99.3 and not 99.30000305175781."""
    return float(str(value.cpu().numpy()))


def check_finite(losses: torch.Tensor, first_step: int, steps_per_epoch: int) -> None:
    """Raise :class:`Diverged` for the first step with a loss that is not finite.

    Args:
        losses: ``[steps, B]``, a row for each of several consecutive steps.
        first_step: number of the first of these steps, counted from 1 over the run.
        steps_per_epoch: number of steps in an epoch.
    """
    bad = ~losses.isfinite().all(dim=1)
    if bad.any():
        step = first_step + int(bad.int().argmax())
        raise Diverged.at(step, (step - 1) // steps_per_epoch + 1)

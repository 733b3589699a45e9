"""The training loop, and :func:`fit_plan`, which runs it as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.data.augment import draw_epoch
from cifar_fast.training.metrics import EpochRow
from cifar_fast.utils.errors import Diverged
from cifar_fast.utils.progress import progress_bar


def train(
    backend: Backend,
    n: int,
    draws: torch.Generator,
    run: int,
    clock: Callable[[], float],
    *,
    order: torch.Generator | None = None,
    after: EpochRow | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[EpochRow]:
    """Train all epochs of a run on the ``n`` training images of ``backend``, which was reset; gives a row as each ends.
    With ``after``, the row of the last epoch that ``backend`` has trained, those that follow it.

    ``draws`` is the generator of the epochs' draws, ``order`` that of their permutations where it is another; ``clock``
    gives seconds, read when the device is done, see :func:`device_timer`; ``on_step`` is called after each step.
    """
    recipe, on_cpu = backend.recipe, backend.device.type == "cpu"
    steps = n // recipe.batch_size
    train_seconds, evaluation_seconds = (after.train_seconds, after.evaluation_seconds) if after else (0.0, 0.0)
    for epoch in range(after.epoch if after else 0, recipe.epochs):
        with progress_bar(steps, f"epoch {epoch + 1}/{recipe.epochs}", "step") as bar:
            start = clock()
            scores = []
            drawn = draw_epoch(n, device=backend.device, recipe=recipe, generator=draws, order=order)
            for scored in backend.train_epoch(drawn):
                scores.append(scored)
                bar.update()
                if on_cpu:  # elsewhere reading a loss would make the device wait
                    _check_finite(scored[0][None], epoch * steps + len(scores), steps)
                on_step()
            train_seconds += clock() - start
        losses, correct = (torch.stack(values) for values in zip(*scores))
        _check_finite(losses, epoch * steps + 1, steps)

        start = clock()
        test_correct = backend.evaluate()
        evaluation_seconds += clock() - start
        # 100 where right and 0 elsewhere, averaged: the reference script's arithmetic, to its last bit.
        accuracy, test_accuracy = ((right * 100).float().mean().item() for right in (correct, test_correct))
        loss = losses.float().mean().item()
        yield EpochRow(run, epoch + 1, loss, accuracy, test_accuracy, train_seconds, evaluation_seconds)


def _check_finite(losses: torch.Tensor, first_step: int, steps_per_epoch: int) -> None:
    """Raise :class:`Diverged` at the first of the steps, a row of ``losses`` each, with a loss that is not finite."""
    bad = ~losses.isfinite().all(dim=1)
    if bad.any():
        step = first_step + int(bad.int().argmax())
        epoch = (step - 1) // steps_per_epoch + 1
        raise Diverged(
            f"the loss is not finite at step {step} (epoch {epoch}); try smaller --lr-values, or --dtype float32"
        )

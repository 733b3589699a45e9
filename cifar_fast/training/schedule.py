"""Images and steps that a recipe leaves untrained on a small data set."""

from __future__ import annotations

import numpy as np

from cifar_fast.data.dataset import Dataset
from cifar_fast.recipe import Recipe
from cifar_fast.utils.errors import InputError, option


def schedule_notes(recipe: Recipe, dataset: Dataset) -> list[str]:
    """Return lines about images and steps that train nothing, if they are 1 % of the images or 10 % of the steps.

    Raises:
        InputError: each step has learning rate 0, but not all of ``lr_values`` are 0.
    """
    n, size = len(dataset.train_images), recipe.batch_size
    rates = recipe.learning_rates(dataset.steps_per_epoch(size)).astype(np.float32)  # as the backends round them
    left, zero, total = n % size, int((rates == 0).all(axis=1).sum()), len(rates)
    if zero == total and any(recipe.lr_values):  # otherwise this is intended
        steps = f"all {total} steps have" if total > 1 else "the only step has"
        raise InputError(
            f"{dataset.source}: {steps} learning rate 0, so nothing would be trained; give more {option('epochs')}, a "
            f"smaller {option('batch_size')}, or other {option('lr_values')}"
        )
    lines = []
    if 100 * left >= n:
        lines.append(
            f"{left} of {n} training images are left out of each epoch, because they do not fill a batch of {size}"
        )
    if 10 * zero >= total:
        lines.append(f"{zero} of {total} steps train nothing, because their learning rate is 0")
    return lines

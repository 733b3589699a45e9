"""TensorBoard event files, with the same rows as metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.recipe import Recipe
from cifar_fast.training.metrics import EpochRow
from cifar_fast.utils.errors import InputError, option

FOLDER = "tensorboard"


class TensorBoard:
    """A writer of the rows of a training to ``tensorboard/run-I`` in the training's folder, one step per epoch.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            hint = "pip install 'cifar_fast[tensorboard]'"
            raise InputError(f"{option('log')} tensorboard needs {error.name}: {hint}") from None
        self.recipe = recipe
        self._make_writer = SummaryWriter
        self._run: int | None = None
        self._writer: Any = None

    def add(self, folder: Path, row: EpochRow) -> None:
        """Write ``row`` for the training in ``folder`` and flush it to disk."""
        if row.run != self._run:
            self.close()
            # After a resume this epoch and later ones are trained again. ``purge_step`` makes TensorBoard's readers
            # drop the older points of these epochs.
            self._writer = self._make_writer(str(folder / FOLDER / f"run-{row.run}"), purge_step=row.epoch)
            self._run = row.run
        learning_rate = float(np.interp(row.epoch, *self.recipe.rate_curve()))  # at the end of the epoch
        for name, value in (
            ("loss/train", row.train_loss),
            ("accuracy/train", row.train_accuracy),
            ("loss/validation", row.validation_loss),
            ("accuracy/validation", row.validation_accuracy),
            ("loss/test", row.test_loss),
            ("accuracy/test", row.test_accuracy),
            ("learning_rate", learning_rate),
        ):
            if value is None:
                continue
            self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file of the current run."""
        if self._writer:
            self._writer.close()
        self._run = self._writer = None


def remove_events(folder: Path) -> None:
    """Remove the event files of an earlier training in ``folder``."""
    for file in folder.glob(f"{FOLDER}/run-*/events.out.tfevents.*"):
        file.unlink(missing_ok=True)

"""``--log tensorboard``: the rows of a training as TensorBoard's event files, beside metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_fast.recipe import Recipe
from cifar_fast.training.metrics import EpochRow
from cifar_fast.utils.errors import InputError

FOLDER = "tensorboard"


class TensorBoard:
    """Writes each row of a training of ``recipe`` to ``tensorboard/run-I`` in its folder, at its epoch.

    Raises :class:`InputError` where tensorboard is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"--log tensorboard needs {error.name}: pip install 'cifar_fast[tensorboard]'") from None
        self.recipe = recipe
        self._make = SummaryWriter
        self._run: int | None = None
        self._writer: Any = None

    def add(self, folder: Path, row: EpochRow) -> None:
        """Write ``row``, which is on the disk when this returns."""
        if row.run != self._run:
            self.close()
            # Of an earlier process what comes from this epoch on is trained again: readers drop it.
            self._writer = self._make(str(folder / FOLDER / f"run-{row.run}"), purge_step=row.epoch)
            self._run = row.run
        # For a loss averaged over the batch, as the recipe states it, at the epoch's end.
        learning_rate = self.recipe.learning_rate(row.epoch, 1) * self.recipe.batch_size
        for name, value in (
            ("loss/train", row.train_loss),
            ("accuracy/train", row.train_accuracy),
            ("accuracy/test", row.test_accuracy),
            ("learning_rate", learning_rate),
        ):
            self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        self._run = self._writer = None


def remove_events(folder: Path) -> None:
    """Remove what :class:`TensorBoard` has written for an earlier training in ``folder``."""
    for file in folder.glob(f"{FOLDER}/run-*/events.out.tfevents.*"):
        file.unlink(missing_ok=True)

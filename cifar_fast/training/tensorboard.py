"""TensorBoard event files, with the same rows as metrics.jsonl."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.recipe import Recipe
from cifar_fast.training.metrics import EpochRow
from cifar_fast.utils.errors import InputError, option

FOLDER = "tensorboard"


class TensorBoard:
    """A writer of the rows of a training to ``tensorboard/run-I`` in the training's folder, one step per epoch.

    The files are written here and not by torch's SummaryWriter, which puts the host's name into theirs.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            hint = "pip install 'cifar_fast[tensorboard]'"
            package = (error.name or "").partition(".")[0]
            raise InputError(f"{option('log')} tensorboard needs {package}: {hint}") from None
        self.recipe = recipe
        self._event, self._summary, self._make_writer = event_pb2, summary_pb2, RecordWriter
        self._run: int | None = None
        self._writer: Any = None

    def add(self, folder: Path, row: EpochRow) -> None:
        """Write ``row`` for the training in ``folder`` and flush it to disk."""
        if row.run != self._run:
            self.close()
            self._open(folder / FOLDER / f"run-{row.run}", row.epoch)
            self._run = row.run
        learning_rate = float(np.interp(row.epoch, *self.recipe.rate_curve()))  # at the end of the epoch
        values = {
            "loss/train": row.train_loss,
            "accuracy/train": row.train_accuracy,
            "loss/validation": row.validation_loss,
            "accuracy/validation": row.validation_accuracy,
            "loss/test": row.test_loss,
            "accuracy/test": row.test_accuracy,
            "learning_rate": learning_rate,
        }
        points = [
            self._summary.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if value is not None
        ]
        self._write(step=row.epoch, summary=self._summary.Summary(value=points))
        self._writer.flush()

    def _open(self, folder: Path, epoch: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{os.getpid()}"
        self._writer = self._make_writer(open(folder / name, "xb"))  # noqa: SIM115  (closed with the writer)
        self._write(file_version="brain.Event:2")
        # After a resume this epoch and later ones are trained again. TensorBoard's readers drop the older points of
        # these epochs if a session starts there.
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(step=epoch, session_log=start)

    def _write(self, **content: Any) -> None:
        self._writer.write(self._event.Event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        """Close the event file of the current run."""
        if self._writer:
            self._writer.close()
        self._run = self._writer = None


def remove_events(folder: Path) -> None:
    """Remove the event files of an earlier training in ``folder``."""
    for file in folder.glob(f"{FOLDER}/run-*/events.out.tfevents.*"):
        file.unlink(missing_ok=True)

"""TensorBoard event files, with the same rows as metrics.jsonl.

They are written in this thread. TensorBoard's own writer has a thread, which prints a traceback if the disk is full. It
also names the files after the clock and the host. The clock may jump back, and TensorBoard reads the files in the order
of their names.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.recipe import Recipe
from cifar_fast.training.metrics import EpochRow
from cifar_fast.utils.errors import InputError, option

FOLDER = "tensorboard"
EVENTS = "events.out.tfevents."
"""Begin of the name of an event file, by which TensorBoard knows it. A number follows."""


class TensorBoard:
    """A writer of the rows of a training to ``tensorboard/run-I`` in the training's folder, one step per epoch.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            from torch.utils.tensorboard.summary import scalar  # isort: skip  (torch's error names what is missing)
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            hint = "pip install 'cifar_fast[tensorboard]'"
            package = (error.name or "").partition(".")[0]
            raise InputError(f"{option('log')} tensorboard needs {package}: {hint}") from None
        self.recipe = recipe
        self._scalar, self._event, self._session_log, self._make_writer = scalar, Event, SessionLog, RecordWriter
        self._run: int | None = None
        self._writer: Any = None

    def add(self, folder: Path, row: EpochRow) -> None:
        """Write ``row`` for the training in ``folder`` and flush it to disk. Raise OSError if that fails."""
        if row.run != self._run:
            self.close()
            self._open(folder / FOLDER / f"run-{row.run}", row.epoch)
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
            if value is not None:
                self._write(row.epoch, summary=self._scalar(name, value))
        self._writer.flush()

    def _open(self, folder: Path, first_epoch: int) -> None:
        """Begin a file after the earlier ones in ``folder``.

        After a resume ``first_epoch`` and later ones are trained again. The mark of a start makes TensorBoard's readers
        drop the older points of these epochs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob(f"{EVENTS}*")))
        self._writer = self._make_writer(open(folder / f"{EVENTS}{number:010}", "xb"))  # noqa: SIM115  (close() closes it)
        self._write(first_epoch, file_version="brain.Event:2")
        self._write(first_epoch, session_log=self._session_log(status=self._session_log.START))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(self._event(step=step, wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        """Close the event file of the current run."""
        writer, self._run, self._writer = self._writer, None, None
        if writer:
            writer.close()


def remove_events(folder: Path) -> None:
    """Remove the event files of an earlier training in ``folder``."""
    for file in folder.glob(f"{FOLDER}/run-*/{EVENTS}*"):
        file.unlink(missing_ok=True)

"""The folder of a training's results: rows as they come, then summary, weights and curves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from cifar_fast.training.checkpoint import Checkpoint, read_checkpoint
from cifar_fast.training.metrics import EpochRow
from cifar_fast.training.plots import draw_curves
from cifar_fast.training.results import Result
from cifar_fast.training.tensorboard import FOLDER, TensorBoard, remove_events
from cifar_fast.utils.errors import InputError, first_line
from cifar_fast.utils.files import (
    CHECKPOINT,
    CURVES,
    LOGITS,
    MODEL,
    PARTS,
    ROWS,
    SUMMARY,
    atomic_write,
    check_writable,
    locked,
    os_error_as_input_error,
    remove_empty,
    remove_temporary,
)
from cifar_fast.utils.progress import LogFn

FILES = (ROWS, SUMMARY, MODEL, LOGITS, CURVES, CHECKPOINT, PARTS)


class Output:
    """The folder that a command writes to, its own while it does.

    Rows go out as they come, each line whole, and so does ``checkpoint.pt``, which goes when all is done; the other
    files appear at the end, whole or not at all. What cannot be written is told in a line, in ``report`` and in
    ``failures``, and takes nothing else with it. If no row was written, a folder made for it goes away again. Another
    command's results are kept unless ``overwrite``; then they are deleted when the first new row is there. With ``new``
    the folder is made anew, with a number after its name where that is taken. With ``resume`` the training there goes
    on, from ``checkpoint``, which is None without; rows after it are taken back. Rows go to ``tensorboard``
    too, where it is set before the first.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, *, new: bool = False, resume: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.overwrite, self.new, self.resume = overwrite, new, resume
        self.checkpoint: Checkpoint | None = None
        self.tensorboard: TensorBoard | None = None
        self.report: LogFn = lambda line: None
        self.failures: dict[str, str] = {}
        self._rows: list[str] = []
        self._earlier: list[str] = []  # files of results that are to be replaced
        if resume:
            self.checkpoint = read_checkpoint(self.path, self.name)
        elif not new:
            self._refuse_results()
        check_writable(self.path, self.name)

    @property
    def name(self) -> str:
        return f"--{'resume' if self.resume else 'output'} {self.path}"

    @property
    def events(self) -> Path:
        """The folder that TensorBoard's files go below."""
        return self.path

    @property
    def resumable(self) -> bool:
        """Whether this training has left something to go on from."""
        alone = (self.resume or bool(self._rows)) and (self.path / CHECKPOINT).exists()
        return alone or (PARTS not in self._earlier and (self.path / PARTS).exists())

    def _refuse_results(self) -> None:
        with os_error_as_input_error(self.name):
            self._earlier = [name for name in FILES if (self.path / name).exists()]
        if self._earlier and not self.overwrite:
            go_on = "--resume to go on with it, " if {CHECKPOINT, PARTS} & set(self._earlier) else ""
            raise InputError(
                f"{self.path} already holds results ({self._earlier[0]}); choose another --output, or give {go_on}"
                "--overwrite to replace them"
            )

    def _go_on(self) -> None:
        self.checkpoint = read_checkpoint(self.path, self.name)  # another command may have gone on in the meantime
        self.set_rows(self.checkpoint.result.rows)

    def __enter__(self) -> Output:
        self._stack = contextlib.ExitStack()
        try:
            with os_error_as_input_error(self.name):
                self._make()
                self._stack.enter_context(locked(self.path, self._refuse_busy))
                # Shows now, not after an epoch, whether files can be made.
                tempfile.TemporaryFile(dir=self.path).close()
            for name in FILES:
                remove_temporary(self.path / name)
            if self.resume:
                self._go_on()
            else:
                self._refuse_results()  # those of a command that has ended since
                self._stack.callback(self._forget_start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        wanted = self.path
        made = [folder for folder in wanted.absolute().parents if not folder.exists()]
        self._stack.callback(remove_empty, made)
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            try:
                self.path.mkdir()
                self._stack.callback(remove_empty, [self.path])
                return
            except FileExistsError:
                if not self.new:
                    return
            self.path = wanted.with_name(f"{wanted.name}-{number}")

    def _refuse_busy(self) -> None:
        raise InputError(f"{self.name}: another run is writing its results there; choose another folder")

    def _forget_start(self) -> None:
        if not self._rows and not self._earlier:
            (self.path / CHECKPOINT).unlink(missing_ok=True)

    def __exit__(self, *exception: object) -> None:
        if self.tensorboard:
            self._try(FOLDER, self.tensorboard.close)
        self._stack.close()

    def add(self, row: EpochRow) -> None:
        """Write a row. The first takes the place of earlier results, so they are there until it is."""
        first = not self._rows
        self._rows.append(_line(row))
        if first or ROWS in self.failures:
            self._write(ROWS, self._write_rows)
            if first and ROWS not in self.failures:
                self._earlier = [name for name in self._earlier if name != ROWS]
                self.delete_earlier()
        else:
            self._try(ROWS, self._append_row)
        if tensorboard := self.tensorboard:
            self._try(FOLDER, lambda: tensorboard.add(self.events, row))

    def set_rows(self, rows: Iterable[EpochRow]) -> None:
        """Write ``rows`` in the place of those that are there."""
        self._rows = [_line(row) for row in rows]
        if self._rows:
            self._write(ROWS, self._write_rows)

    def delete_earlier(self) -> None:
        """Delete the results that are to be replaced."""
        self._try(FOLDER, lambda: remove_events(self.path))
        for name in self._earlier:
            if name == PARTS:
                shutil.rmtree(self.path / name, ignore_errors=True)
            else:
                (self.path / name).unlink(missing_ok=True)
        self._earlier = []

    def _write_rows(self, temporary: Path) -> None:
        temporary.write_text("".join(self._rows))

    def _append_row(self) -> None:
        with open(self.path / ROWS, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            line = self._rows[-1].encode()
            try:
                if file.write(line) < len(line):
                    raise OSError("No space left on device")
            except OSError:
                file.truncate(size)  # no half line stays
                raise

    def save(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint.pt``; where there are earlier results, not before the first row replaces them."""
        if self._rows or not self._earlier:
            self._write(CHECKPOINT, checkpoint.save)

    def finish(self, result: Result, test_labels: np.ndarray) -> None:
        """Write what a training leaves, small files first; ``result.unwritten`` gets what could not be.

        ``test_labels`` ``[N]`` go with the logits, where they were to be kept.
        """
        if ROWS in self.failures:
            self._write(ROWS, self._write_rows)
        self._write(SUMMARY, lambda temporary: temporary.write_text(json.dumps(result.summary(), indent=2) + "\n"))
        self._write(MODEL, lambda temporary: torch.save(result.checkpoint(), temporary))
        if result.logits:
            self._write(LOGITS, lambda temporary: _save_logits(result, test_labels, temporary))
        self._write(CURVES, lambda temporary: draw_curves(result.rows, result.recipe, result.title(), temporary))
        self.failures.pop(CHECKPOINT, None)
        if not {ROWS, SUMMARY, MODEL, LOGITS} & self.failures.keys():  # else they are in the checkpoint alone
            (self.path / CHECKPOINT).unlink(missing_ok=True)
        result.unwritten.extend(self.failures.values())

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        def whole() -> None:
            with atomic_write(self.path / name) as temporary:
                write(temporary)

        self._try(name, whole)

    def _try(self, name: str, write: Callable[[], object]) -> None:
        try:
            write()
            self.failures.pop(name, None)
        except Exception as error:  # a full disk is a RuntimeError in torch.save, and matplotlib has its own
            if name not in self.failures:
                self.failures[name] = f"{self.path / name} could not be written ({first_line(error)})"
                self.report(self.failures[name])


def _line(row: EpochRow) -> str:
    return json.dumps(dataclasses.asdict(row)) + "\n"


def _save_logits(result: Result, test_labels: np.ndarray, path: Path) -> None:
    seeds = np.array([run.seed for run in result.runs])
    with open(path, "wb") as file:  # to a path without the suffix numpy would add it
        np.savez(file, logits=torch.stack(result.logits).numpy(), labels=test_labels, seeds=seeds)

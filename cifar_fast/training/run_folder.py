"""The folder of a training: a folder for each run, and the files made from all runs.

    training.json        options, data set and environment, written before the first epoch
    run-0/checkpoint.pt  state of the run between two epochs, until the run has ended; beside it
                         checkpoint-previous.pt, the one before
    run-0/result.json    rows and accuracies of the finished run; logits.npz beside it with ``save_logits``
    run-0/model.pt       weights of the finished run
    metrics.jsonl        the rows of all runs, each written at the end of its epoch
    model.pt             weights of the last finished run, written when all runs have ended
    summary.json, curves.png, confusion.png, logits.npz    written when all runs have ended

A run that diverged has ended, and ``result.json`` has the step. A run without ``result.json`` is missing. Resuming a
training and sharing it among processes both train missing runs.

The order of the operations makes a process that is killed, or a power cut, leave a folder that can be resumed at any
moment. Each file is written to a draft, synced, and renamed, and its folder is synced, before the next operation
begins. Rows are appended and synced.

    first epoch      training.json
    with overwrite   at the first row, or at the start of several processes, training.json and then the other earlier
                     files move into a hidden folder; the new training.json is written; after the row the hidden folder
                     is deleted. Without a row the next command moves the earlier files back
    epoch            its row is appended to metrics.jsonl; the new checkpoint is written to a draft; checkpoint.pt is
                     renamed to checkpoint-previous.pt, and the draft to checkpoint.pt
    end of a run     model.pt, logits.npz, then result.json, which makes the run count; then the checkpoints are deleted
    end of all runs  metrics.jsonl in the order of the runs, model.pt, logits.npz, curves.png, confusion.png, then
                     summary.json, which makes the training count as finished
    resume           rows without a checkpoint leave metrics.jsonl, because their epochs are trained again

A checkpoint names its rows by their digest. Rows that could not be written, on a full disk, get no checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_fast.training.checkpoint import Checkpoint, Unfinished
from cifar_fast.training.metrics import EpochRow
from cifar_fast.training.plots import draw_confusion, draw_curves
from cifar_fast.training.results import DivergedResult, Result, RunReader, RunResult
from cifar_fast.training.tensorboard import FOLDER, TensorBoard, remove_events
from cifar_fast.utils.errors import InputError, option, write_reason
from cifar_fast.utils.files import (
    CHECKPOINT,
    CONFUSION,
    CURVES,
    LOGITS,
    MODEL,
    MODEL_SAFETENSORS,
    PREVIOUS_CHECKPOINT,
    ROWS,
    RUN_RESULT,
    SUMMARY,
    TRAINING,
    append_lines,
    as_path,
    atomic_write,
    check_writable,
    locked,
    made_folder,
    os_error_as_input_error,
    remove_drafts,
    remove_empty,
    save_tensors,
    sync_folder,
)
from cifar_fast.utils.progress import LOGGER

FILES = (TRAINING, SUMMARY, ROWS, MODEL, MODEL_SAFETENSORS, LOGITS, CURVES, CONFUSION)

CHECKPOINTS = (PREVIOUS_CHECKPOINT, CHECKPOINT)

REPLACED = ".replaced-"
"""Start of the name of the hidden folder that holds earlier results while new ones replace them."""


class RunFolder(RunReader):
    """The folder that a training writes to. Inside a ``with`` block this process owns it: other trainings are refused.

    Each file is whole or absent. A file that cannot be written is reported in a line, in ``failures`` too, and
    everything else is still written. A folder made here is removed if nothing was written.

    Args:
        overwrite: replace existing results, which are otherwise an error. They stay until the first row is written.
        new: make a new folder, with a number after its name if the name is taken.
        resume: continue the training in the folder.

    Attributes:
        earlier: result of the training that is resumed, without its runs; else None.
        failures: a line for each file that could not be written, by its name.
        tensorboard: also gets the rows, if set.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, *, new: bool = False, resume: bool = False) -> None:
        argument = "resume" if resume else "output"
        super().__init__(path, f"{option(argument)} {as_path(path, argument)}")
        self.overwrite, self.new = overwrite, new
        self.failures: dict[str, str] = {}
        self.tensorboard: TensorBoard | None = None
        self._result: Result | None = None
        self._pending: list[str] = []  # rows that could not be written yet
        self._rows_of: dict[int, list[str]] = {}  # all rows of the runs under way
        self._replaced: list[Path] = []  # earlier results, to be replaced
        self._hidden: list[Path] = []  # folders with those that were replaced
        self._diverged: list[tuple[Result, DivergedResult]] = []  # runs that diverged before that
        self._good: set[int] = set()  # runs whose checkpoint.pt this process has read or written
        if resume and any(self.path.glob(f"{REPLACED}*")):
            with os_error_as_input_error(self.name), locked(self.path, self._refuse_busy):
                self._restore_replaced()
        self.earlier = self.training() if resume else None
        if not (resume or new):
            self._refuse_results()
        check_writable(self.path, self.name)

    @property
    def resumable(self) -> bool:
        """Whether a training can be resumed from the folder."""
        return not self._replaced and (self.path / TRAINING).exists()

    def _refuse_results(self) -> None:
        with os_error_as_input_error(self.name):
            found = [self.path / name for name in FILES if (self.path / name).exists()]
            found += sorted(folder for folder in self.path.glob("run-*/") if any(folder.iterdir()))
        if found and not self.overwrite:
            resume = f"{option('resume')} to continue it, " if (self.path / TRAINING).exists() else ""
            raise InputError(
                f"{self.path} already holds results ({found[0].name}); choose another {option('output')}, or give "
                f"{resume}{option('overwrite')} to replace them"
            )
        self._replaced = found

    def __enter__(self) -> RunFolder:
        self._stack = contextlib.ExitStack()
        try:
            with os_error_as_input_error(self.name):
                self._make()
                self._stack.enter_context(locked(self.path, self._refuse_busy))
                tempfile.TemporaryFile(dir=self.path).close()  # refuses now, not after an epoch
            self._restore_replaced()
            for folder in (self.path, *self.path.glob("run-*")):
                remove_drafts(folder, *FILES, *CHECKPOINTS, RUN_RESULT)
            if self.earlier:
                self.earlier = self.training()  # another process may have continued it
                self._resume(self.earlier.config.runs)
            else:
                self._refuse_results()  # another command may have written some
                self._stack.callback(self._leave)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self.tensorboard:
            self._try(FOLDER, self.tensorboard.close)
        self._stack.close()

    def join(self, path: Path) -> None:
        """Write to the folder ``path``, which another process owns."""
        self.path, self._replaced = path, []

    def _make(self) -> None:
        wanted = self.path
        self._stack.enter_context(made_folder(wanted.absolute().parent))
        for number in itertools.count(2):
            try:
                self.path.mkdir()
                self._stack.callback(remove_empty, [self.path])
                sync_folder(self.path.parent)
                return
            except FileExistsError:
                if not self.new:
                    return
            self.path = wanted.with_name(f"{wanted.name}-{number}")

    def _refuse_busy(self) -> None:
        raise InputError(f"{self.name}: another run is writing its results there; choose another folder")

    def _leave(self) -> None:
        """Leave the files of a training that has a row, or else those that were there before it."""
        if not self._replaced:  # otherwise training.json is that of the earlier results
            self._forget_start()
        self._restore_replaced()

    def _forget_start(self) -> None:
        """Remove ``training.json`` of a training without a row and without a run that has ended."""
        with contextlib.suppress(OSError):  # the folder may be gone
            rows = self.path / ROWS
            has_rows = rows.exists() and rows.stat().st_size > 0
            if not has_rows and not any(self.path.glob(f"run-*/{RUN_RESULT}")):
                (self.path / TRAINING).unlink(missing_ok=True)

    def _resume(self, runs: int) -> None:
        """Remove what a killed process left: rows later than their checkpoint, and checkpoints of runs that ended."""
        rows: list[EpochRow] = []
        for run in range(runs):
            ended = self.run_result(run, logits=False)
            if ended:
                self._remove_checkpoints(run)
            found = ended or self.unfinished(run)
            rows += found.rows if found else []
        self._write_rows(rows)

    def _restore_replaced(self) -> None:
        """Delete the results that were replaced, or move them back if no new training has a row."""
        for hidden in self.path.glob(f"{REPLACED}*"):
            if hidden.is_symlink() or not hidden.is_dir():
                continue
            self._forget_start()
            if not (self.path / TRAINING).exists():
                with os_error_as_input_error(self.name):
                    for path in sorted(hidden.iterdir(), key=lambda path: path.name == TRAINING):
                        os.replace(path, self.path / path.name)
            self._delete(hidden)

    def _delete(self, hidden: Path) -> None:
        shutil.rmtree(hidden, ignore_errors=True)
        sync_folder(self.path)

    def has_result(self, run: int) -> bool:
        return not self._replaced and super().has_result(run)

    def unfinished(self, run: int) -> Unfinished | None:
        found = None if self._replaced else super().unfinished(run)
        if found:
            self._rows_of[run] = [row.to_json() for row in found.rows]
            if found.file == CHECKPOINT:
                self._good.add(run)
        return found

    def begin(self, result: Result) -> None:
        """Write ``training.json``, or remember it until the first row replaces earlier results."""
        self._result = result
        if not self._replaced:
            self._write_training()

    def _write_training(self) -> None:
        if self._result:
            self._write_json(self.path / TRAINING, self._result.to_dict)

    def _restore_start(self) -> None:
        """Write ``training.json`` if it is gone or could not be written, because all other files need it.

        A folder that was removed is made again: the results of hours are worth more than a folder too many.
        """
        if self._result and not (self.path / TRAINING).exists():
            if not self.path.exists():
                LOGGER.info(f"{self.path} was removed during the training; it is made again, without its earlier files")
            self._try(TRAINING, lambda: self.path.mkdir(parents=True, exist_ok=True))
            self._write_training()

    def replace_earlier(self) -> None:
        """Move the earlier results away, if there are any, and write the new ``training.json``."""
        if not self._replaced:
            return
        with os_error_as_input_error(self.name):
            hidden = Path(tempfile.mkdtemp(prefix=REPLACED, dir=self.path))
            self._hidden.append(hidden)
            while self._replaced:
                path = self._replaced[0]
                os.replace(path, hidden / path.name)
                del self._replaced[0]
            sync_folder(hidden)
            sync_folder(self.path)
        self._try(FOLDER, lambda: remove_events(self.path))
        self._write_training()
        for result, run in self._diverged:
            self.finish_run(result, run)

    @contextlib.contextmanager
    def run_lock(self, run: int) -> Iterator[None]:
        """Lock the folder of a run, because a process of an earlier launch may still write to it."""
        folder = self.of_run(run)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a full disk is reported when the files are written
                self._make_folder(folder)
                stack.callback(remove_empty, [folder])
                stack.enter_context(locked(folder, self._refuse_busy))
            yield

    def add_row(self, row: EpochRow) -> None:
        """Append a row to ``metrics.jsonl``. The first one replaces earlier results."""
        self.replace_earlier()
        self._restore_start()
        line = row.to_json()
        self._rows_of.setdefault(row.run, []).append(line)
        self._pending.append(line)
        if not (self.path / ROWS).exists():  # the first row, or the file was removed
            self._pending = list(dict.fromkeys([*itertools.chain(*self._rows_of.values()), *self._pending]))
        self._try(ROWS, self._append_rows)
        if self._hidden and not self.failures:
            self._delete(self._hidden.pop())
        if tensorboard := self.tensorboard:
            self._try(FOLDER, lambda: tensorboard.add(self.path, row))

    def _append_rows(self) -> None:
        append_lines(self.path / ROWS, "".join(self._pending))
        self._pending = []

    def _write_rows(self, rows: Iterable[EpochRow]) -> None:
        text, path = "".join(row.to_json() for row in rows), self.path / ROWS
        if not text:
            path.unlink(missing_ok=True)
        elif not (path.is_file() and path.read_bytes() == text.encode()):
            self._write(path, lambda temporary: temporary.write_text(text))

    def save_checkpoint(self, run: int, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint.pt`` of a run, and keep the one before. Do nothing if its rows could not be written."""
        newest, previous = (self.of_run(run) / name for name in (CHECKPOINT, PREVIOUS_CHECKPOINT))

        def write(draft: Path) -> None:
            checkpoint.save(draft)
            if run in self._good:  # a damaged one must not replace the one before it
                self._good.remove(run)
                with contextlib.suppress(FileNotFoundError):  # somebody has removed it
                    os.replace(newest, previous)

        if not self._pending and self._write(newest, write):
            self._good.add(run)

    def _remove_checkpoints(self, run: int) -> None:
        self._rows_of.pop(run, None)
        found = [path for path in (self.of_run(run) / name for name in CHECKPOINTS) if path.exists()]
        for path in found:
            path.unlink(missing_ok=True)
        if found:
            sync_folder(self.of_run(run))

    def finish_run(self, result: Result, run: RunResult | DivergedResult) -> None:
        """Write the files of a run that has ended. ``result.json`` is written last and replaces the checkpoint.

        ``result`` has the weights of a finished run. A run that diverged does not replace earlier results.
        """
        if self._replaced and isinstance(run, DivergedResult):
            self._diverged.append((result, run))
            return
        self._restore_start()
        folder = self.of_run(run.run.run)
        written = isinstance(run, DivergedResult) or self._write_finished(folder, result, run)
        if written and self._write_json(folder / RUN_RESULT, run.to_dict):
            self._remove_checkpoints(run.run.run)

    def _write_finished(self, folder: Path, result: Result, run: RunResult) -> bool:
        """Write weights and logits of a finished run, and return whether ``result.json`` may be written too.

        Without its weights a run counts as missing, and a resume finishes it from its checkpoint.
        """
        written = self._write(folder / MODEL, lambda temporary: save_tensors(result.checkpoint(), temporary))
        if run.logits is not None:
            logits = run.logits.numpy()
            written &= self._write(folder / LOGITS, lambda temporary: _savez(temporary, logits=logits))
        return written

    def finish(self, result: Result, test_labels: np.ndarray) -> None:
        """Write the files made from the runs. ``result.unwritten`` gets a line for each failure.

        ``test_labels`` ``[N]`` are stored beside the logits.
        """
        if self._replaced:  # all runs diverged before the first row
            return
        weights = self.of_run(result.runs[-1].run) / MODEL if result.runs else None
        if weights and weights.exists():
            self._write(self.path / MODEL, lambda temporary: shutil.copyfile(weights, temporary))
        if not result.missing:  # otherwise the rows of an unfinished run would be lost
            self._write_rows(row for run in result.ended for row in run.rows)
        if result.logits:
            logits, seeds = torch.stack(result.logits).numpy(), np.array([run.seed for run in result.runs])
            self._write(
                self.path / LOGITS, lambda temporary: _savez(temporary, logits=logits, labels=test_labels, seeds=seeds)
            )
        if result.rows:
            self._write(
                self.path / CURVES, lambda temporary: draw_curves(result.rows, result.recipe, result.title(), temporary)
            )
            names = result.dataset["class_names"]
            self._write(
                self.path / CONFUSION,
                lambda temporary: draw_confusion(result.confusion, names, result.title(), temporary),
            )
        self._write_json(self.path / SUMMARY, result.summary)
        result.unwritten.extend(line for name, line in self.failures.items() if name != CHECKPOINT)

    def _write_json(self, path: Path, make: Callable[[], dict[str, Any]]) -> bool:
        def write(temporary: Path) -> None:
            text = json.dumps(make(), indent=2)
            # A row of a matrix is one line. No string of JSON holds a line break.
            text = re.sub(r"\[\n[\d\s,]+\]", lambda row: row[0].replace("\n", "").replace(" ", ""), text)
            temporary.write_text(text + "\n")

        return self._write(path, write)

    @staticmethod
    def _make_folder(folder: Path) -> None:
        if not folder.exists():
            folder.mkdir(exist_ok=True)  # another process may make it at the same time
            sync_folder(folder.parent)

    def _write(self, path: Path, write: Callable[[Path], object]) -> bool:
        def whole() -> None:
            self._make_folder(path.parent)  # replacing earlier results moved it
            with atomic_write(path) as temporary:
                write(temporary)

        # All checkpoints share one entry, because later ones replace those that failed.
        return self._try(CHECKPOINT if path.name == CHECKPOINT else str(path.relative_to(self.path)), whole)

    def _try(self, name: str, write: Callable[[], object]) -> bool:
        try:
            write()
            self.failures.pop(name, None)
        except Exception as error:  # a full disk is a RuntimeError in torch.save, and matplotlib has its own errors
            if name not in self.failures:
                self.failures[name] = f"{self.path / name} could not be written ({write_reason(error)})"
                LOGGER.info(self.failures[name])
        return name not in self.failures


def _savez(path: Path, **arrays: np.ndarray) -> None:
    with open(path, "wb") as file:  # numpy adds a suffix to a path without one
        np.savez(file, allow_pickle=False, **arrays)

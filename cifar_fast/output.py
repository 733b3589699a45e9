"""The folder of a training's results: rows as they come, then summary, weights and curves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from cifar_fast.curves import draw_curves
from cifar_fast.errors import InputError, first_line
from cifar_fast.files import atomic_write, check_writable, locked, writing
from cifar_fast.progress import Log, silent
from cifar_fast.results import EpochRow, Result

ROWS = "metrics.jsonl"
FILES = (ROWS, "summary.json", "model.pt", "curves.png")


class Output:
    """The folder that a command writes to, its own while it does.

    Rows go out as they come, each line whole; the other files appear at the end, whole or not at all. What cannot be
    written is told in a line, in ``report`` and in ``failures``, and takes nothing else with it. If nothing was
    written, a folder made for it goes away again. Another command's results are kept unless ``overwrite``; then they
    are deleted when the first new row is there. With ``new`` the folder is made anew, with a number after its name
    where that is taken.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, *, new: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.overwrite, self.new = overwrite, new
        self.report: Log = silent
        self.failures: dict[str, str] = {}
        self._rows: list[str] = []
        if not new:
            self._refuse_results()
        check_writable(self.path, self.name)

    @property
    def name(self) -> str:
        return f"--output {self.path}"

    def _refuse_results(self) -> None:
        with writing(self.name):
            found = [name for name in FILES if (self.path / name).exists()]
        if found and not self.overwrite:
            raise InputError(
                f"{self.path} already holds results ({found[0]}); choose another --output, or give "
                "--overwrite to replace them"
            )

    def __enter__(self) -> Output:
        self._stack = contextlib.ExitStack()
        try:
            with writing(self.name):
                self._make()
                self._stack.enter_context(locked(self.path, self._refuse_busy))
                # Shows now, not after an epoch, whether files can be made.
                tempfile.TemporaryFile(dir=self.path).close()
            self._refuse_results()  # those of a command that has ended since
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        wanted = self.path
        made = [folder for folder in wanted.absolute().parents if not folder.exists()]
        self._stack.callback(_remove_empty, made)
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            try:
                self.path.mkdir()
                self._stack.callback(_remove_empty, [self.path])
                return
            except FileExistsError:
                if not self.new:
                    return
            self.path = wanted.with_name(f"{wanted.name}-{number}")

    def _refuse_busy(self) -> None:
        raise InputError(f"{self.name}: another run is writing its results there; choose another folder")

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, row: EpochRow) -> None:
        """Write a row. The first takes the place of earlier results, so they are there until it is."""
        first = not self._rows
        self._rows.append(json.dumps(dataclasses.asdict(row)) + "\n")
        if first or ROWS in self.failures:
            self._write(ROWS, self._write_rows)
            if first and ROWS not in self.failures:
                for name in FILES[1:]:
                    (self.path / name).unlink(missing_ok=True)
        else:
            self._try(ROWS, self._append_row)

    def _write_rows(self, draft: Path) -> None:
        draft.write_text("".join(self._rows))

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

    def finish(self, result: Result) -> None:
        """Write what a training leaves, small files first; ``result.unwritten`` gets what could not be."""
        if ROWS in self.failures:
            self._write(ROWS, self._write_rows)
        self._write("summary.json", lambda draft: draft.write_text(json.dumps(result.summary(), indent=2) + "\n"))
        self._write("model.pt", lambda draft: torch.save(result.checkpoint(), draft))
        self._write("curves.png", lambda draft: draw_curves(result, draft))
        result.unwritten.extend(self.failures.values())

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        def whole() -> None:
            with atomic_write(self.path / name) as draft:
                write(draft)

        self._try(name, whole)

    def _try(self, name: str, write: Callable[[], object]) -> None:
        try:
            write()
            self.failures.pop(name, None)
        except Exception as error:  # a full disk is a RuntimeError in torch.save, and matplotlib has its own
            if name not in self.failures:
                self.failures[name] = f"{self.path / name} could not be written ({first_line(error)})"
                self.report(self.failures[name])


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of ``folders`` that are empty, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()

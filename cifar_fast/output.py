"""The folder of a training's results: rows as they come, then summary, curves and weights."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from cifar_fast.errors import InputError
from cifar_fast.files import atomic_write, writing
from cifar_fast.results import EpochRow, Result

FILES = ("metrics.jsonl", "summary.json", "curves.png", "model.pt")


class Output:
    """The folder that a command writes to.

    Rows go out as they come, each line whole; the other files appear at the end, whole or not at all.
    If nothing was written, a folder made for it goes away again. Another command's results are kept unless
    ``overwrite``; then they are deleted when training starts.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.name = f"--output {self.path}"
        with writing(self.name):
            found = [name for name in FILES if (self.path / name).exists()]
            above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if found and not overwrite:
            raise InputError(
                f"{self.path} already holds results ({found[0]}); choose another --output, or give "
                "--overwrite to replace them"
            )
        if not above.is_dir():
            raise InputError(f"{self.name}: {above} is not a directory; choose another folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"{self.name}: {above} cannot be written to; choose another folder")

    def __enter__(self) -> Output:
        self._made = [folder for folder in (self.path, *self.path.absolute().parents) if not folder.exists()]
        try:
            with writing(self.name):
                self.path.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(
                    dir=self.path
                ).close()  # shows now, not after an epoch, whether files can be made
                for name in FILES:
                    (self.path / name).unlink(missing_ok=True)
        except InputError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def add(self, row: EpochRow) -> None:
        with writing(self.name), open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def finish(self, result: Result) -> None:
        with writing(self.name):
            with atomic_write(self.path / "model.pt") as draft:
                torch.save(result.state_dict, draft)
            with atomic_write(self.path / "curves.png") as draft:
                draw_curves(result, draft)
            with atomic_write(self.path / "summary.json") as draft:
                draft.write_text(json.dumps(result.summary(), indent=2) + "\n")


def draw_curves(result: Result, path: Path) -> None:
    """Loss and accuracies over epochs, the learning rate under them, a line for each run; as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    alpha = max(0.15, len(result.runs) ** -0.5)
    for run in result.runs:
        rows = [row for row in result.rows if row.run == run.run]
        epochs = [row.epoch for row in rows]
        first = run is result.runs[0]
        for axes, name, label, color in (
            (loss, "train_loss", "training loss", "C0"),
            (accuracy, "train_accuracy", "training accuracy, augmented images", "C0"),
            (accuracy, "test_accuracy", "test accuracy", "C1"),
        ):
            axes.plot(
                epochs,
                [getattr(row, name) for row in rows],
                ".-",
                color=color,
                alpha=alpha,
                label=label if first else None,
            )
    recipe = result.recipe
    times = np.array(recipe.lr_knots) * recipe.epochs / recipe.lr_knots[-1]
    rate.plot(times, recipe.lr_values, color="C2")
    for axes, label in ((loss, "loss"), (accuracy, "accuracy (%)"), (rate, "learning rate")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    loss.legend()
    accuracy.legend(loc="lower right")
    rate.set_xlabel("epoch")
    runs = f"{len(result.runs)} runs" if len(result.runs) > 1 else "1 run"
    figure.suptitle(
        f"{result.dataset['name']}, {result.backend} backend, {result.dtype}, "
        f"{result.environment['device_name']}, {runs}"
    )
    figure.savefig(path, dpi=120, format="png")

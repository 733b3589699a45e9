"""Curves of a training: loss and accuracy of each run over the epochs, and the learning rate below them.

Figures use matplotlib's default style. The caller's parameters and backend stay unchanged.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from cifar_fast.recipe import Recipe
from cifar_fast.training.metrics import EpochRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_drawing = threading.Lock()
"""Held while a thread draws, because matplotlib's parameters belong to the process."""


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Set matplotlib's parameters to their defaults inside the block, or in the function that this decorates."""
    matplotlib = _import_matplotlib()
    with _drawing, matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def _import_matplotlib() -> Any:
    """Import matplotlib even if ``$MPLBACKEND`` names a backend that is not installed, as a notebook's may be."""
    try:
        import matplotlib
    except ValueError:
        backend = os.environ.pop("MPLBACKEND")
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # left by the failed import
        try:
            import matplotlib
        finally:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


@default_style()
def save_figure(figure: Figure, file: Path | IO[bytes], dpi: int) -> None:
    """Write ``figure`` to ``file`` as a PNG."""
    figure.savefig(file, dpi=dpi, format="png")


def draw_curves(rows: Sequence[EpochRow], recipe: Recipe, title: str, file: Path | IO[bytes]) -> None:
    """Write the figure of :func:`curves_figure` to ``file`` as a PNG."""
    save_figure(curves_figure(rows, recipe, title), file, dpi=120)


@default_style()
def curves_figure(rows: Sequence[EpochRow], recipe: Recipe, title: str) -> Figure:
    """Return a figure with the curves of all runs in ``rows`` and the learning rate of ``recipe``."""
    from matplotlib.figure import Figure  # pyplot would start a window system and keep global state

    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, accuracy, learning_rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    runs = list(dict.fromkeys(row.run for row in rows))
    alpha = max(0.15, max(1, len(runs)) ** -0.5)
    for run in runs:
        own = [row for row in rows if row.run == run]
        epochs = [row.epoch for row in own]
        for axes, name, label, color in (
            (loss, "train_loss", "training loss", "C0"),
            (accuracy, "train_accuracy", "training accuracy, augmented images", "C0"),
            (loss, "test_loss", "test loss", "C1"),
            (accuracy, "test_accuracy", "test accuracy", "C1"),
            (loss, "validation_loss", "validation loss", "C3"),
            (accuracy, "validation_accuracy", "validation accuracy", "C3"),
        ):
            values = [getattr(row, name) for row in own]
            if all(value is None for value in values):
                continue
            axes.plot(epochs, values, ".-", color=color, alpha=alpha, label=label if run == runs[0] else None)
    times = np.array(recipe.lr_knots) * recipe.epochs / recipe.lr_knots[-1]
    learning_rate.plot(times, recipe.lr_values, color="C2")
    for axes, label in ((loss, "loss"), (accuracy, "accuracy (%)"), (learning_rate, "learning rate")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if runs:
        loss.legend()
        accuracy.legend(loc="lower right")
    learning_rate.set_xlabel("epoch")
    figure.suptitle(title).set_parse_math(False)  # a name may contain dollar signs
    return figure


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], title: str, file: Path | IO[bytes]) -> None:
    """Write the figure of :func:`confusion_figure` to ``file`` as a PNG."""
    save_figure(confusion_figure(matrix, class_names, title), file, dpi=120)


@default_style()
def confusion_figure(matrix: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Return a figure of the confusion ``matrix``: the share of each class, a row, that is classified as each class.

    A class without images has an empty row.
    """
    from matplotlib.figure import Figure

    count = len(class_names)
    with np.errstate(invalid="ignore"):
        percent = 100 * matrix / matrix.sum(axis=1, keepdims=True)
    side = min(max(6.0, 2.5 + 0.5 * count), 20.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if count <= 20:
        for row, column in np.argwhere(matrix):
            share = percent[row, column]
            text, color = f"{share:.0f}" if share >= 10 else f"{share:.1f}", "white" if share > 50 else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize="small")
    size = "medium" if count <= 20 else "xx-small"
    axes.set_xticks(range(count), class_names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), class_names, fontsize=size)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class of the test image")
    axes.set_title("test images in % of their class", fontsize="medium")
    figure.suptitle(title).set_parse_math(False)
    return figure

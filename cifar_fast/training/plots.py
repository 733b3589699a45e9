"""Figures that embed their fonts, and the curves of a training: loss, accuracy and learning rate over the epochs.

Figures follow matplotlib's parameters. ``curves.png`` alone has its default style, in which it can be drawn anywhere.
The caller's parameters and backend stay unchanged.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from cifar_fast.recipe import Recipe
from cifar_fast.training.metrics import EpochRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES_AT_MOST = 50
"""Runs that each have a line of their own. More are a band, because a figure of 1,000 lines takes seconds."""

_drawing = threading.RLock()
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


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure. Its PDFs hold TrueType fonts, because many journals refuse matplotlib's Type 3."""
    matplotlib = _import_matplotlib()
    from matplotlib.figure import Figure  # pyplot would start a window system and keep global state

    class FigureWithFonts(Figure):
        def savefig(self, *file: Any, **how: Any) -> None:
            with _drawing, matplotlib.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42}):
                super().savefig(*file, **how)

    return FigureWithFonts(figsize=(width, height), layout="constrained")


@default_style()
def draw_curves(rows: Sequence[EpochRow], recipe: Recipe, title: str, file: Path | IO[bytes]) -> None:
    """Write the figure of :func:`curves_figure` to ``file`` as a PNG in matplotlib's default style."""
    curves_figure(rows, recipe, title).savefig(file, dpi=120, format="png")


def curves_figure(rows: Sequence[EpochRow], recipe: Recipe, title: str) -> Figure:
    """Return a figure with the curves of all runs in ``rows``, their mean, and the learning rate of ``recipe``.

    More than 50 runs have a band from their minimum to their maximum in place of their curves.
    """
    figure = new_figure(8, 9)
    from matplotlib.ticker import MaxNLocator

    loss, accuracy, learning_rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    runs: dict[int, list[EpochRow]] = {}
    for row in rows:
        runs.setdefault(row.run, []).append(row)
    alpha = max(0.15, 0.6 * len(runs) ** -0.5) if len(runs) > 1 else 1.0
    for axes, name, label, color in (
        (loss, "train_loss", "training loss", "C0"),
        (accuracy, "train_accuracy", "training accuracy, augmented images", "C0"),
        (loss, "test_loss", "test loss", "C1"),
        (accuracy, "test_accuracy", "test accuracy", "C1"),
        (loss, "validation_loss", "validation loss", "C3"),
        (accuracy, "validation_accuracy", "validation accuracy", "C3"),
    ):
        if all(getattr(row, name) is None for row in rows):
            continue
        by_epoch: dict[int, list[float]] = {}
        for run_rows in runs.values():
            epochs, values = zip(*((row.epoch, getattr(row, name)) for row in run_rows))
            if len(runs) <= LINES_AT_MOST:
                axes.plot(epochs, values, ".-", color=color, alpha=alpha, label=label if len(runs) == 1 else None)
            for epoch, value in zip(epochs, values):
                if value is not None:  # a loss that is not finite
                    by_epoch.setdefault(epoch, []).append(value)
        if len(runs) > 1:
            epochs, found = zip(*sorted(by_epoch.items()))
            if len(runs) > LINES_AT_MOST:
                axes.fill_between(epochs, list(map(min, found)), list(map(max, found)), color=color, alpha=0.2, lw=0)
            means = list(map(statistics.fmean, found))
            axes.plot(epochs, means, color=color, lw=2, label=f"{label}, mean of {len(runs)} runs")
    learning_rate.plot(*recipe.rate_curve(), color="C2")
    for axes, label in ((loss, "loss"), (accuracy, "accuracy (%)"), (learning_rate, "learning rate")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if runs:
        for axes in (loss, accuracy):  # above the data
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize="small")
    learning_rate.set_xlabel("epoch")
    learning_rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A name may contain dollar signs.
    figure.suptitle(textwrap.fill(title, 80), fontsize="medium").set_parse_math(False)
    return figure


@default_style()
def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], title: str, file: Path | IO[bytes]) -> None:
    """Write the figure of :func:`confusion_figure` to ``file`` as a PNG in matplotlib's default style."""
    confusion_figure(matrix, class_names, title).savefig(file, dpi=120, format="png")


def confusion_figure(matrix: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Return a figure of the confusion ``matrix``: the share of each class, a row, that is classified as each class.

    A class without images has an empty row.
    """
    count = len(class_names)
    with np.errstate(invalid="ignore"):
        percent = 100 * matrix / matrix.sum(axis=1, keepdims=True)
    side = min(max(6.0, 2.5 + 0.5 * count), 20.0)
    figure = new_figure(side, side)
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

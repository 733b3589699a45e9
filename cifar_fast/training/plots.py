"""The curves of a training: loss and accuracies over epochs, the learning rate under them, a line for each run.

In matplotlib's own style, whatever the caller's, whose parameters and backend stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cifar_fast.training.results import Result


def draw_curves(result: Result, file: Path | IO[bytes]) -> None:
    """Write the curves to ``file`` as a PNG."""
    with own_style():
        _draw(result).savefig(file, dpi=120, format="png")


def curves_figure(result: Result) -> Figure:
    """The curves as a figure, which ``savefig`` writes in the format that a file's name tells."""
    with own_style():
        return _draw(result)


_drawing = threading.Lock()
"""matplotlib's parameters are the process's."""


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Have matplotlib's parameters at their defaults meanwhile, for what is drawn on a ``Figure`` without pyplot."""
    matplotlib = _matplotlib()
    with _drawing, matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def _matplotlib() -> Any:
    """The module, which refuses to be imported where ``$MPLBACKEND`` names what is not here, as a notebook's may."""
    try:
        import matplotlib
    except ValueError:
        before = os.environ.pop("MPLBACKEND")
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # what the import that failed has left
        try:
            import matplotlib
        finally:
            os.environ["MPLBACKEND"] = before
    return matplotlib


def _draw(result: Result) -> Figure:
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
    figure.suptitle(result.title()).set_parse_math(False)  # a name may have dollar signs
    return figure

"""What training gives: rows, runs, and their summary."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cifar_fast.recipe import Recipe
from cifar_fast.training.metrics import EpochRow, Run, confidence_interval_95
from cifar_fast.training.plots import curves_figure, draw_curves
from cifar_fast.utils.files import LOGITS, MODEL, ROWS, SUMMARY

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FORMAT = 1
"""Of ``model.pt``; raised when what it holds changes its meaning."""


@dataclass(frozen=True)
class Result:
    """Everything that :func:`cifar_fast.fit` did. A notebook shows it as a table of its runs with the curves.

    ``auto``: why what was left to us was chosen so, and what failed before it. ``environment``: as
    :func:`cifar_fast.utils.device.environment` gives it. ``dataset``: as :meth:`cifar_fast.Dataset.metadata`.
    ``settings``: the rest of what was asked for, by the names of the flags.
    ``mean`` and ``std``: of the training images' 0..255 values, per channel, which the model's input is normalized
    with. ``state_dict``: the last run's weights, for a plain ``CNN``. ``unwritten``: a line for each file of
    ``output`` that could not be written. ``logits``: where they were to be kept, of the test images, float16
    ``[N, classes]`` for each run, by the plain model. ``notes``: what the recipe changes about data or
    backend, a line each. ``model``: the class of the caller's own, to which ``state_dict`` then belongs; None is the
    recipe's network. ``parameters``: how many numbers are trained.
    """

    recipe: Recipe
    environment: dict[str, Any]
    backend: str
    dtype: str
    memory_format: str
    auto: list[str]
    dataset: dict[str, Any]
    settings: dict[str, Any]
    rows: list[EpochRow]
    runs: list[Run]
    mean: list[float]
    std: list[float]
    state_dict: dict[str, torch.Tensor]
    unwritten: list[str] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model: str | None = None
    parameters: int | None = None  # which results of before lack

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """What a training that has ended wrote to ``folder``, curves aside; OSError where a file is missing."""
        folder = Path(folder)
        summary = json.loads((folder / SUMMARY).read_text())
        rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
        saved = torch.load(folder / MODEL, map_location="cpu", weights_only=True)
        found = {field.name: summary[field.name] for field in dataclasses.fields(cls) if field.name in summary}
        found |= {name: saved[name] for name in ("mean", "std", "state_dict")}
        if summary["settings"].get("save_logits"):
            with np.load(folder / LOGITS) as arrays:
                found["logits"] = list(torch.from_numpy(arrays["logits"]))
        return restored(found | {"rows": rows[: len(summary["runs"]) * summary["recipe"]["epochs"]]})

    def __repr__(self) -> str:
        return f"<Result: {self.title()}, test accuracy {self.summary()['test_accuracy_mean']:.2f} %>"

    def _repr_html_(self) -> str:
        """What a notebook shows: a row for each run as it ended, and the curves."""
        sets = ("training", "test", *map(html.escape, self.runs[0].also_test))
        head = ["run", "seed", "epochs", "loss", *(f"{name} accuracy" for name in sets), "training time"]
        lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"]
        for run in self.runs:
            last = [row for row in self.rows if row.run == run.run][-1]
            accuracies = (last.train_accuracy, run.test_accuracy, *run.also_test.values())
            percent = (f"{accuracy:.2f} %" for accuracy in accuracies)
            cells = [run.run, run.seed, last.epoch, f"{last.train_loss:.3f}", *percent, f"{run.train_seconds:.2f} s"]
            lines.append(f"<tr><td>{'</td><td>'.join(map(str, cells))}</td></tr>")
        png = io.BytesIO()
        draw_curves(self.rows, self.recipe, self.title(), png)
        return (
            f"<table>{''.join(lines)}</table><p>{html.escape(self.summary_line())}</p>"
            f'<img alt="curves" width="640" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
        )

    def figure(self) -> Figure:
        """The curves of ``curves.png`` as a matplotlib figure: ``result.figure().savefig("curves.pdf")``."""
        return curves_figure(self.rows, self.recipe, self.title())

    def title(self) -> str:
        """What was trained, and where, in a line."""
        runs = f"{len(self.runs)} runs" if len(self.runs) > 1 else "1 run"
        return (
            f"{self.dataset['name']}, {self.backend} backend, {self.dtype}, {self.environment['device_name']}, {runs}"
        )

    def checkpoint(self) -> dict[str, Any]:
        """What ``model.pt`` holds: the weights, and all that is needed to use them."""
        return {
            "format": FORMAT,
            "model": self.model,
            "state_dict": self.state_dict,
            "recipe": dataclasses.asdict(self.recipe),
            "class_names": list(self.dataset["class_names"]),
            "mean": self.mean,
            "std": self.std,
        }

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds. Of one run alone there is no deviation and no interval: None."""
        accuracies = [run.test_accuracy for run in self.runs]
        seconds = [run.train_seconds for run in self.runs]
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model,
            "parameters": self.parameters,
            "environment": self.environment,
            "backend": self.backend,
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "auto": self.auto,
            "notes": self.notes,
            "dataset": self.dataset,
            "settings": self.settings,
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "test_accuracy_mean": statistics.fmean(accuracies),
            "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "test_accuracy_ci95": confidence_interval_95(accuracies),
            "also_test_mean": {
                name: statistics.fmean(run.also_test[name] for run in self.runs) for name in self.runs[0].also_test
            },
            "train_seconds_mean": statistics.fmean(seconds),
            "train_seconds_median": statistics.median(seconds),
            "train_seconds_min": min(seconds),
        }

    def summary_line(self) -> str:
        """The summary in a line, for a person."""
        summary = self.summary()
        accuracy = f"test accuracy {summary['test_accuracy_mean']:.2f} %"
        if summary["test_accuracy_ci95"]:
            low, high = summary["test_accuracy_ci95"]
            accuracy += f" (mean of {len(self.runs)} runs, 95 % interval {low:.2f} to {high:.2f})"
        setup, evaluation = (
            statistics.median(getattr(run, f"{part}_seconds") for run in self.runs) for part in ("setup", "evaluation")
        )
        return (
            f"{accuracy}, training time {summary['train_seconds_median']:.2f} s"
            f"{' (median)' if len(self.runs) > 1 else ''}, besides {setup:.2f} s of set-up and "
            f"{evaluation:.2f} s of evaluation"
        )


def plain(result: Result) -> dict[str, Any]:
    """``result`` as dicts, lists and numbers."""
    return dataclasses.asdict(result)


def restored(values: dict[str, Any]) -> Result:
    """The result that :func:`plain` was given."""
    recipe = Recipe(**values["recipe"])
    rows, runs = [EpochRow(**row) for row in values["rows"]], [Run(**run) for run in values["runs"]]
    return Result(**values | dict(recipe=recipe, rows=rows, runs=runs))

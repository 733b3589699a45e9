"""What training gives: rows, runs, their summary, and the files and curves made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_fast.errors import InputError
from cifar_fast.files import replacing
from cifar_fast.recipe import Recipe

FILES = ("metrics.jsonl", "summary.json", "curves.png", "model.pt")


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one run: accuracies in per cent, ``train_seconds`` since the run's first step."""

    run: int
    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    train_seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:2d}  train loss {self.train_loss:.3f}  train acc {self.train_accuracy:.2f}"
            f"  test acc {self.test_accuracy:.2f}  training time {self.train_seconds:.2f}"
        )


@dataclass(frozen=True)
class Run:
    """One training from scratch: its last test accuracy in per cent, and where its seconds went."""

    run: int
    seed: int
    test_accuracy: float
    train_seconds: float
    setup_seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class Result:
    """Everything that :func:`cifar_fast.fit` did. ``state_dict``: the last run's weights, for a plain ``CNN``."""

    recipe: Recipe
    environment: dict[str, Any]
    backend: str
    dtype: str
    memory_format: str
    dataset: dict[str, Any]
    rows: list[EpochRow]
    runs: list[Run]
    state_dict: dict[str, torch.Tensor] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds. Of one run alone there is no deviation and no interval: None."""
        accuracies = [run.test_accuracy for run in self.runs]
        seconds = [run.train_seconds for run in self.runs]
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "environment": self.environment,
            "backend": self.backend,
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "dataset": self.dataset,
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "test_accuracy_mean": statistics.fmean(accuracies),
            "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "test_accuracy_ci95": confidence_interval_95(accuracies),
            "train_seconds_mean": statistics.fmean(seconds),
            "train_seconds_median": statistics.median(seconds),
            "train_seconds_min": min(seconds),
        }

    def closing_line(self) -> str:
        """The summary in a line, for a person."""
        summary = self.summary()
        accuracy = f"test accuracy {summary['test_accuracy_mean']:.2f} %"
        if summary["test_accuracy_ci95"]:
            low, high = summary["test_accuracy_ci95"]
            accuracy += f" (mean of {len(self.runs)} runs, 95 % interval {low:.2f} to {high:.2f})"
        setup, evaluation = (statistics.median(getattr(run, f"{part}_seconds") for run in self.runs) for part in ("setup", "evaluation"))
        return (
            f"{accuracy}, training time {summary['train_seconds_median']:.2f} s"
            f"{' (median)' if len(self.runs) > 1 else ''}, besides {setup:.2f} s of set-up and {evaluation:.2f} s of evaluation"
        )


def confidence_interval_95(values: list[float]) -> list[float] | None:
    """Student's 95 % interval ``[low, high]`` of the mean; None for fewer than two values.

    With t = sqrt(k) tan(angle), the density of Student's t with k degrees of freedom is that of
    cos(angle)^(k - 1), which is summed here up to its share of 0.95.
    """
    freedom = len(values) - 1
    if freedom < 1:
        return None
    angles = np.linspace(0, np.pi / 2, 100_001)
    share = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (freedom - 1))
    quantile = freedom**0.5 * np.tan(np.interp(0.95, share / share[-1], angles[1:]))
    mean = statistics.fmean(values)
    margin = float(quantile) * statistics.stdev(values) / len(values) ** 0.5
    return [mean - margin, mean + margin]


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code: versions, device, threads."""
    import torchvision

    try:
        import triton
    except ImportError:
        triton = None
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": triton and triton.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Output:
    """The folder that a command writes to.

    Rows go out as they come, each line whole; the other files appear at the end, whole or not at all.
    If nothing was written, a folder made for it goes away again. Another command's results are kept
    unless ``overwrite``; then they are deleted when training starts.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser()
        with self._written():
            found = [name for name in FILES if (self.path / name).exists()]
            above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if found and not overwrite:
            raise InputError(
                f"{self.path} already holds results ({found[0]}); choose another --output, or give --overwrite to replace them"
            )
        if not above.is_dir():
            raise InputError(f"--output {self.path}: {above} is not a directory; choose another folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"--output {self.path}: {above} cannot be written to; choose another folder")

    def __enter__(self) -> Output:
        self._made = [folder for folder in (self.path, *self.path.absolute().parents) if not folder.exists()]
        try:
            with self._written():
                self.path.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.path).close()  # shows now, not after an epoch, whether files can be made
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
        with self._written(), open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def finish(self, result: Result) -> None:
        with self._written():
            with replacing(self.path / "model.pt") as draft:
                torch.save(result.state_dict, draft)
            with replacing(self.path / "curves.png") as draft:
                draw_curves(result, draft)
            with replacing(self.path / "summary.json") as draft:
                draft.write_text(json.dumps(result.summary(), indent=2) + "\n")

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"--output {self.path}: cannot be written to ({error.strerror or error}); choose another folder") from None


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
            (accuracy, "train_accuracy", "training accuracy, augmented pictures", "C0"),
            (accuracy, "test_accuracy", "test accuracy", "C1"),
        ):
            axes.plot(epochs, [getattr(row, name) for row in rows], ".-", color=color, alpha=alpha, label=label if first else None)
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
    figure.suptitle(f"{result.dataset['name']}, {result.backend} backend, {result.dtype}, {result.environment['device_name']}, {runs}")
    figure.savefig(path, dpi=120, format="png")

"""The :class:`Result` of a training, and :class:`RunReader`, which reads it from a folder."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cifar_fast.recipe import IMAGE_CHANNELS, Recipe
from cifar_fast.training.checkpoint import Checkpoint, Unfinished
from cifar_fast.training.config import TrainConfig
from cifar_fast.training.metrics import DivergedRun, EpochRow, Run, confidence_interval_95, rows_digest, rows_of
from cifar_fast.training.plots import confusion_figure, curves_figure, draw_curves
from cifar_fast.utils.device import AFFECTS_FIGURES
from cifar_fast.utils.errors import InputError, first_line, option, out_of_memory
from cifar_fast.utils.files import (
    CHECKPOINT,
    CONFUSION,
    CURVES,
    LOGITS,
    MODEL,
    PREVIOUS_CHECKPOINT,
    ROWS,
    RUN_RESULT,
    SUMMARY,
    TRAINING,
    as_path,
    load_tensors,
    regular,
)
from cifar_fast.utils.progress import LOGGER
from cifar_fast.utils.provenance import without_names
from cifar_fast.utils.typed import are_finite, check_types, check_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATASET = {
    **dict.fromkeys(("name", "digest", "source"), str),
    **dict.fromkeys(("train_images", "validation_images", "test_images"), int),
    **{"class_names": list[str], "options": dict[str, Any], "also_test": dict[str, dict[str, Any]]},
}
"""Types of the description of the data set, by key."""

FORMAT = 1
"""Version of the format of ``model.pt``, increased when the meaning of its contents changes."""


@dataclass(frozen=True)
class RunResult:
    """A finished run with its rows, backend and environments.

    ``environments`` are the values of :func:`cifar_fast.utils.device.environment` in their order, each with the
    ``first_epoch`` that was trained there. There are several if the run was resumed in another environment.
    ``confusion`` counts the test images of each class, a row, that the plain model classifies as each class, a column.
    ``logits`` holds its logits of the test images ``[N, classes]`` in the dtype of the weights, or None if they were
    not kept.
    """

    run: Run
    rows: list[EpochRow]
    backend: str
    environments: list[dict[str, Any]]
    confusion: list[list[int]]
    logits: torch.Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``result.json`` holds: all but the logits."""
        values = dataclasses.asdict(dataclasses.replace(self, logits=None))
        del values["logits"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunResult:
        """Return the run that :meth:`to_dict` stored, without logits."""
        run = Run(**values["run"])
        found = cls(
            run, rows_of(run.run, values["rows"]), values["backend"], values["environments"], values["confusion"]
        )
        check_run(found)
        if not found.rows:
            raise ValueError("it has no epoch")
        return found


@dataclass(frozen=True)
class DivergedResult:
    """A run that diverged, with the rows of the epochs before. Its ``result.json`` is that of a finished run."""

    run: DivergedRun
    rows: list[EpochRow]
    backend: str
    environments: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``result.json`` holds."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DivergedResult:
        """Return the run that :meth:`to_dict` stored."""
        run = DivergedRun(**values["run"])
        found = cls(run, rows_of(run.run, values["rows"]), values["backend"], values["environments"])
        check_run(found)
        return found


def check_run(result: RunResult | DivergedResult) -> None:
    """Raise ValueError if a value of ``result``, which was read from a file, has a wrong type."""
    check_types(result)
    check_types(result.run)


@dataclass(frozen=True)
class Result:
    """The options, runs and weights of a training. A notebook shows a table of the runs, and the curves.

    Attributes:
        config: the options; ``auto`` is replaced by the backend, device, dtype and memory format that were used.
        environment: the value of :func:`cifar_fast.utils.device.environment` on rank 0 when the training began. Each
            run has its own.
        auto: a line with the reason for the choice of ``auto``, and a line for each backend that failed before
            one worked.
        dataset: the value of :meth:`cifar_fast.Dataset.metadata`, ``source``, and ``also_test``: for each extra test
            set its ``digest`` and the number of ``images`` that are evaluated.
        mean, std: mean and standard deviation of each channel of the training images, whose values are 0 to 255. They
            normalize the model's input.
        notes: a line for each effect of the recipe on data or backend.
        model: class name of the custom model that ``state_dict`` belongs to; None for the recipe's network.
        parameters: number of trained values.
        model_digest: the value of :attr:`cifar_fast.model.CustomModel.digest`; None for the recipe's network.
        paths: absolute paths of the data set and the extra test sets, by the paths that were given.
        run_results: the finished runs, in order, without those that diverged.
        state_dict: weights of the last finished run; empty if there is none.
        unwritten: a line for each file that could not be written.
        diverged_results: the runs that diverged, in order.
        command: the command line of the training; None for one from Python.
        started: date and time of its first start, in UTC.
    """

    config: TrainConfig
    environment: dict[str, Any]
    auto: list[str]
    dataset: dict[str, Any]
    mean: list[float]
    std: list[float]
    notes: list[str]
    model: str | None
    parameters: int
    paths: dict[str, str] = field(default_factory=dict)
    run_results: list[RunResult] = field(default_factory=list)
    state_dict: dict[str, torch.Tensor] = field(default_factory=dict)
    unwritten: list[str] = field(default_factory=list)
    model_digest: str | None = None
    diverged_results: list[DivergedResult] = field(default_factory=list)
    command: str | None = None
    started: str | None = None

    @classmethod
    def load(cls, folder: str | Path, weights: bool = True) -> Result:
        """Read the runs in ``folder`` that have ended, and the weights of the last finished run if ``weights``.

        Raises:
            InputError: the folder holds no training or no run that has ended, or a file cannot be read.
        """
        return RunReader(folder).result(weights)

    @property
    def recipe(self) -> Recipe:
        return self.config.recipe

    @property
    def backend(self) -> str:
        return self.config.backend

    @property
    def dtype(self) -> str:
        return self.config.dtype

    @property
    def memory_format(self) -> str:
        return self.config.memory_format

    @property
    def settings(self) -> dict[str, Any]:
        """The options without an attribute of their own, by name."""
        own = ("backend", "dtype", "memory_format")
        return {name: getattr(self.config, name) for name in self.config.names() if name not in own}

    @property
    def runs(self) -> list[Run]:
        return [result.run for result in self.run_results]

    @property
    def diverged(self) -> list[DivergedRun]:
        return [result.run for result in self.diverged_results]

    @property
    def ended(self) -> list[RunResult | DivergedResult]:
        """The runs that finished or diverged, in order."""
        both: list[RunResult | DivergedResult] = [*self.run_results, *self.diverged_results]
        return sorted(both, key=lambda result: result.run.run)

    @property
    def missing(self) -> list[int]:
        """Indices of the runs that have not ended."""
        ended = {result.run.run for result in self.ended}
        return [run for run in range(self.config.runs) if run not in ended]

    @property
    def rows(self) -> list[EpochRow]:
        """All epochs of the finished runs, in order."""
        return [row for result in self.run_results for row in result.rows]

    @property
    def logits(self) -> list[torch.Tensor]:
        """Logits of the test images ``[N, classes]``, in the dtype of the weights, for each run that kept them."""
        return [result.logits for result in self.run_results if result.logits is not None]

    @property
    def confusion(self) -> np.ndarray:
        """Sum of ``RunResult.confusion`` over the finished runs, int64 ``[classes, classes]``."""
        classes = len(self.dataset["class_names"])
        return sum((np.array(one.confusion) for one in self.run_results), np.zeros((classes, classes), np.int64))

    @property
    def class_accuracy(self) -> dict[str, float | None]:
        """Accuracy in % on the test images of each class, over all finished runs; None for a class without any."""
        rows = zip(self.dataset["class_names"], self.confusion.tolist())
        return {name: 100 * row[k] / sum(row) if sum(row) else None for k, (name, row) in enumerate(rows)}

    def with_runs(self, ended: Iterable[RunResult | DivergedResult]) -> Result:
        """Return the training with these runs in place of its own.

        Raises:
            InputError: a run is of another training.
        """
        ended = list(ended)
        classes, sets = len(self.dataset["class_names"]), None
        for one in ended:
            if not isinstance(one, RunResult):
                continue
            logits = (self.dataset["test_images"], classes)
            sets = list(one.run.also_test) if sets is None else sets
            if (
                [len(row) for row in one.confusion] != [classes] * classes
                or (one.logits is not None and tuple(one.logits.shape) != logits)
                or list(one.run.also_test) != sets
            ):
                raise InputError(
                    f"run {one.run.run} has other classes, test images or extra test sets than this training; "
                    "move its folder away to train it again"
                )
        finished: list[RunResult] = []
        diverged: list[DivergedResult] = []
        for result in ended:
            if isinstance(result, RunResult):
                finished.append(result)
            else:
                diverged.append(result)
        return dataclasses.replace(self, run_results=finished, diverged_results=diverged)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``training.json``: everything known before the first epoch."""
        after = ("run_results", "state_dict", "unwritten", "diverged_results")
        values = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in after
        }
        return values | {"config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """Return the result that :meth:`to_dict` stored, without runs."""
        result = cls(**values | {"config": TrainConfig.from_dict(values["config"])})
        check_types(result)
        check_types(result.config)
        check_values(result.dataset, DATASET)
        check_values(result.environment, dict.fromkeys(AFFECTS_FIGURES, Any))
        if not (are_finite(result.mean, IMAGE_CHANNELS) and are_finite(result.std, IMAGE_CHANNELS)):
            raise ValueError("mean or std is no list of three numbers")
        for one in result.dataset["also_test"].values():
            check_values(one, {"digest": str, "images": int})
        return result

    def __repr__(self) -> str:
        return f"<Result: {self.title()}, {self._accuracy()}>"

    def _repr_html_(self) -> str:
        """Return a table with a row for each run, and the curves, for a notebook."""
        validated = ("validation",) if self.dataset["validation_images"] else ()
        sets = ("training", *validated, "test", *map(html.escape, self._also_test_names()))
        head = ["run", "seed", "epochs", "loss", "test loss", *(f"{name} accuracy" for name in sets), "training time"]
        lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>"]
        for result in self.run_results:
            run, last = result.run, result.rows[-1]
            held_out = () if run.validation_accuracy is None else (run.validation_accuracy,)
            accuracies = (last.train_accuracy, *held_out, run.test_accuracy, *run.also_test.values())
            test_loss = "not finite" if run.test_loss is None else f"{run.test_loss:.3f}"
            percent = (f"{accuracy:.2f} %" for accuracy in accuracies)
            losses = (f"{last.train_loss:.3f}", test_loss)
            cells = [run.run, run.seed, last.epoch, *losses, *percent, f"{run.train_seconds:.2f} s"]
            lines.append(f"<tr><td>{'</td><td>'.join(map(str, cells))}</td></tr>")
        png = io.BytesIO()
        draw_curves(self.rows, self.recipe, self.title(), png)
        return (
            f"<table>{''.join(lines)}</table><p>{html.escape(self.summary_line())}</p>"
            f'<img alt="curves" width="640" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
        )

    def figure(self) -> Figure:
        """Return the curves of ``curves.png`` as a matplotlib figure: ``result.figure().savefig("curves.pdf")``."""
        return curves_figure(self.rows, self.recipe, self.title())

    def confusion_figure(self) -> Figure:
        """Return the confusion matrix of ``confusion.png`` as a matplotlib figure."""
        return confusion_figure(self.confusion, self.dataset["class_names"], self.title())

    def title(self) -> str:
        """Return data set, network, backend, dtype, device and number of finished runs in one line."""
        finished, total = len(self.runs), self.config.runs
        runs = f"{finished} of {total} runs" if finished < total else f"{total} runs" if total > 1 else "1 run"
        devices = " and ".join(self.environment_values("device_name"))
        name = self.dataset["name"]
        data = f"{name} {Path(self.dataset['source']).name}" if name in ("npz", "folder") else name
        recipe = self.recipe
        widths = " ".join(map(str, recipe.widths))
        network = self.model or ("network " if recipe.network == "cnn" else f"network {recipe.network} ") + widths
        network += "" if recipe.optimizer == "sgd" else f", {recipe.optimizer}"
        return f"{data}, {network}, {self.backend} backend, {self.dtype}, {devices}, {runs}"

    def environment_values(self, name: str) -> list[str]:
        """Return the different values of a part of the environments that the runs were trained in."""
        environments = [each for result in self.ended for each in result.environments] or [self.environment]
        return list(dict.fromkeys("none" if each.get(name) is None else str(each[name]) for each in environments))

    def environment_changes(self) -> list[str]:
        """Return a line for each part of the environment that the figures depend on and that changed between epochs."""
        found = {name: self.environment_values(name) for name in AFFECTS_FIGURES}
        return [f"{name} was not always the same: {', '.join(values)}" for name, values in found.items() if values[1:]]

    def checkpoint(self) -> dict[str, Any]:
        """Return the contents of ``model.pt``: the weights, and everything needed to use them."""
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
        """Return the contents of ``summary.json``.

        Deviation and interval are None for a single finished run. All statistics are None if there is none.
        """
        seconds = [run.train_seconds for run in self.runs]
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model,
            "model_digest": self.model_digest,
            "parameters": self.parameters,
            "environment": self.environment,
            "command": self.command,
            "started": self.started,
            "backend": self.backend,
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "auto": self.auto,
            "notes": self.notes,
            "dataset": without_names(self.dataset),
            "settings": without_names(self.settings),
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "environments": [{"run": result.run.run} | each for result in self.ended for each in result.environments],
            **self.not_finished(),
            **self._statistics("validation"),
            **self._statistics("test"),
            "class_accuracy": self.class_accuracy,
            "confusion": self.confusion.tolist(),
            "also_test_mean": {
                name: statistics.fmean(run.also_test[name] for run in self.runs) for name in self._also_test_names()
            },
            "train_seconds_mean": statistics.fmean(seconds) if seconds else None,
            "train_seconds_median": statistics.median(seconds) if seconds else None,
            "train_seconds_min": min(seconds, default=None),
        }

    def _statistics(self, split: str) -> dict[str, Any]:
        """Return the statistics of ``split``, validation or test, over the runs; None where a run has no value."""
        accuracies, losses = ([getattr(run, f"{split}_{what}") for run in self.runs] for what in ("accuracy", "loss"))
        accuracies = [] if None in accuracies else accuracies
        return {
            f"{split}_accuracy_mean": statistics.fmean(accuracies) if accuracies else None,
            f"{split}_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            f"{split}_accuracy_ci95": confidence_interval_95(accuracies),
            f"{split}_loss_mean": statistics.fmean(losses) if losses and None not in losses else None,
        }

    def not_finished(self) -> dict[str, list[dict[str, Any]]]:
        """Return the runs that ``diverged`` and those that are ``missing``, as ``summary.json`` holds them."""
        missing = [{"run": run, "seed": self.config.seed + run} for run in self.missing]
        return {"diverged": [dataclasses.asdict(run) for run in self.diverged], "missing": missing}

    def not_finished_line(self) -> str:
        """Return a line about the runs that diverged or are missing, for a person; empty if all have finished."""
        if len(self.runs) == self.config.runs:
            return ""
        steps = [f"seed {run.seed} at step {run.step}" for run in self.diverged]
        missing = [f"seed {self.config.seed + run}" for run in self.missing]
        parts = {"diverged": steps, "missing": missing}
        lists = [f"{what}: {shortened(runs)}" for what, runs in parts.items() if runs]
        return f"{len(self.runs)} of {self.config.runs} runs have finished; {'; '.join(lists)}"

    def problems(self) -> list[str]:
        """Return a line for each run that diverged and each file that could not be written, with marked options."""
        return [*(run.error(self.config.runs).message for run in self.diverged), *self.unwritten]

    def _also_test_names(self) -> list[str]:
        return list(self.runs[0].also_test) if self.runs else []

    def _accuracy(self) -> str:
        mean = self.summary()["test_accuracy_mean"]
        return "no run has finished" if mean is None else f"test accuracy {mean:.2f} %"

    def class_line(self) -> str:
        """Return the accuracy by class in one line, for a person; empty if no run has finished."""
        known = {name: percent for name, percent in self.class_accuracy.items() if percent is not None}
        shown = [f"{name} {known[name]:.2f} %" for name in sorted(known, key=lambda name: known[name])]
        return f"accuracy by class, lowest first: {shortened(shown, most=10)}" if shown else ""

    def summary_line(self) -> str:
        """Return the summary in one line, for a person."""
        unfinished = self.not_finished_line()
        if not self.runs:
            return unfinished

        def median(name: str) -> str:
            return f"{statistics.median(getattr(run, name) for run in self.runs):.2f} s"

        accuracy, note, summary = self._accuracy(), " (median)" if len(self.runs) > 1 else "", self.summary()
        if interval := summary["test_accuracy_ci95"]:
            accuracy += f" (mean of {len(self.runs)} runs, 95 % interval {interval[0]:.2f} to {interval[1]:.2f})"
        if (held_out := summary["validation_accuracy_mean"]) is not None:
            accuracy += f", validation accuracy {held_out:.2f} %"
        return (
            f"{accuracy}, training time {median('train_seconds')}{note}, plus {median('setup_seconds')} of "
            f"set-up and {median('evaluation_seconds')} of evaluation{unfinished and '; '}{unfinished}"
        )


def shortened(items: list[str], most: int = 6) -> str:
    """Return a list for a person, which counts the items after the first ones."""
    more = len(items) - most + 1
    return ", ".join(items if more < 2 else [*items[: most - 1], f"{more} more"])


def again(run: int) -> str:
    """Return what a person can do about a damaged file of a run."""
    return f"restore it, or move the folder run-{run} away to train that run again"


class RunReader:
    """Reader of the folder of a training. Errors call the folder ``name``."""

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = as_path(path, "folder")
        self.name = name or str(path)
        self._told: set[str] = set()

    def of_run(self, run: int) -> Path:
        """Return the folder of the run with that index."""
        return self.path / f"run-{run}"

    def training(self) -> Result:
        """Return the result in ``training.json``, without runs and weights."""
        path = self.path / TRAINING
        try:
            return Result.from_dict(json.loads(regular(path).read_text()))
        except FileNotFoundError:
            raise InputError(
                f"{self.name}: holds no {TRAINING}; there is nothing to resume or repeat, start with {option('output')}"
            ) from None
        except Exception as error:  # a damaged file may raise any exception
            raise InputError(
                f"{self.name}: {TRAINING} cannot be read ({first_line(error)}); restore it, or train into another "
                f"folder with {option('output')}"
            ) from None

    def run_result(self, run: int, logits: bool = True) -> RunResult | DivergedResult | None:
        """Return the result of a run that has ended, else None. ``logits``: also read its logits, if there are any."""
        if not self.has_result(run):
            return None
        path = self.of_run(run) / RUN_RESULT
        with self._readable(path, again(run)):
            values = json.loads(regular(path).read_text())
            if values["run"]["run"] != run:
                raise ValueError(f"it is of run {values['run']['run']}")
            if "step" in values["run"]:
                return DivergedResult.from_dict(values)
            result = RunResult.from_dict(values)
        if logits and (file := path.with_name(LOGITS)).exists():
            with self._readable(file, again(run)), np.load(regular(file)) as arrays:
                result = dataclasses.replace(result, logits=torch.from_numpy(arrays["logits"]))
        return result

    def unfinished(self, run: int) -> Unfinished | None:
        """Return the newest checkpoint of an unfinished run that can be read, or None if the run has none.

        A line tells that the newest one cannot be read.
        """
        problems = []
        for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
            path = self.of_run(run) / name
            try:
                checkpoint = Checkpoint.load(path)
                found = Unfinished(checkpoint, self._rows(run, checkpoint), name)
            except FileNotFoundError:  # also if the process was killed between the two renames
                continue
            except InputError as error:
                problems.append(error.message)
                continue
            except Exception as error:  # a damaged file may raise any exception
                if out_of_memory(error):
                    raise
                problems.append(f"{path.relative_to(self.path)} cannot be read ({first_line(error)})")
                continue
            for problem in {*problems} - self._told:
                self._told.add(problem)
                LOGGER.info(
                    f"{self.path}: {problem}; the run continues from the checkpoint before it, after epoch "
                    f"{checkpoint.epoch}"
                )
            return found
        if problems:
            raise InputError(f"{self.name}: {problems[0]}; {again(run)}")
        return None

    def _rows(self, run: int, checkpoint: Checkpoint) -> list[EpochRow]:
        """Return the rows in ``metrics.jsonl`` that ``checkpoint`` continues."""
        by_epoch: dict[int, EpochRow] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in regular(self.path / ROWS).read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):  # a process was killed while it wrote the line
                    row = EpochRow(**json.loads(line))
                    if row.run == run:
                        by_epoch[row.epoch] = row
        rows = [row for epoch, row in sorted(by_epoch.items()) if epoch <= checkpoint.epoch]
        if rows_digest(rows) != checkpoint.rows_digest:
            raise InputError(f"{ROWS} lacks rows that a checkpoint of run {run} continues, or they were changed")
        return rows

    @contextlib.contextmanager
    def _readable(self, path: Path, hint: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a damaged file may raise any exception
            if out_of_memory(error):
                raise
            name = path.relative_to(self.path)
            raise InputError(f"{self.name}: {name} cannot be read ({first_line(error)}); {hint}") from None

    def has_result(self, run: int) -> bool:
        """Return whether a run has finished or diverged."""
        return (self.of_run(run) / RUN_RESULT).exists()

    def missing(self, runs: int) -> list[int]:
        """Return the indices of the runs without a result."""
        return [run for run in range(runs) if not self.has_result(run)]

    def all_written(self, runs: int) -> bool:
        """Return whether all ``runs`` have ended without a checkpoint, and their files are there and of these runs."""
        checkpoints = ((run, name) for run in range(runs) for name in (CHECKPOINT, PREVIOUS_CHECKPOINT))
        if self.missing(runs) or any((self.of_run(run) / name).exists() for run, name in checkpoints):
            return False
        results = (self.run_result(run, logits=False) for run in range(runs))
        ended = self.training().with_runs(result for result in results if result)
        records = [list(map(dataclasses.asdict, found)) for found in (ended.runs, ended.diverged)]
        files = [ROWS, MODEL, CURVES, CONFUSION, *([LOGITS] if ended.config.save_logits else [])] if ended.runs else []
        try:
            summary = json.loads(regular(self.path / SUMMARY).read_text())
            return [summary["runs"], summary["diverged"]] == records and all(
                (self.path / one).exists() for one in files
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights in ``model.pt``."""
        with self._readable(self.path / MODEL, f"move it away, and {option('resume')} writes it again"):
            return load_tensors(self.path / MODEL)["state_dict"]

    def result(self, weights: bool = True) -> Result:
        """Return the result as :meth:`Result.load` does."""
        training = self.training()
        ended = [found for run in range(training.config.runs) if (found := self.run_result(run))]
        if not ended:
            raise InputError(f"{self.name}: no run of the training there has ended")
        result = training.with_runs(ended)
        return dataclasses.replace(result, state_dict=self.state_dict() if weights and result.runs else {})

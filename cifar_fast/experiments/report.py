"""Trainings beside each other: their means with intervals, and their differences to one of them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_fast.experiments.sweep import SWEEP, changes, variants_in
from cifar_fast.training.metrics import confidence_interval_95
from cifar_fast.training.plots import default_style
from cifar_fast.training.results import Result
from cifar_fast.utils.errors import InputError, first_line
from cifar_fast.utils.files import SUMMARY, atomic_write, os_error_as_input_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_AN_EPOCH = {
    "test_accuracy": "test accuracy (%)",
    "train_accuracy": "training accuracy (%)",
    "train_loss": "training loss",
}
"""What each row of a training has, and how a person reads it."""

VARIANTS_PICTURE, CURVES_PICTURE = "report-variants.png", "report-curves.png"


@dataclass(frozen=True)
class Variant:
    """A training's runs as figures. ``values``: the metric of each run; ``std`` is with n - 1; the intervals,
    ``[low, high]``, hold 95 %. ``changes`` of the recipe and ``difference``, this mean less the other, are to the
    baseline; None where there is nothing to differ or, of std, intervals and p, fewer than two runs to tell from.
    """

    name: str
    changes: str
    n: int
    values: list[float]
    mean: float
    std: float | None
    ci95: list[float] | None
    difference: float | None
    difference_ci95: list[float] | None
    welch_p: float | None
    train_seconds_median: float


@dataclass(frozen=True)
class Report:
    """What :func:`make_report` gives. ``warnings``: a line for each thing that the figures depend on and that the
    variants do not have in common.
    """

    metric: str
    baseline: str
    variants: list[Variant]
    warnings: list[str]
    results: Mapping[str, Result] = dataclasses.field(repr=False)

    @property
    def label(self) -> str:
        """The metric for a person."""
        return OF_AN_EPOCH.get(self.metric, f"accuracy on {self.metric} (%)")

    def markdown(self) -> str:
        """The table, with the warnings under it; "-" where a figure does not exist."""
        digits = 4 if self.metric == "train_loss" else 2
        header = ["variant", "changes", "n", self.label, "std", "95 % interval", "difference", "95 % interval"]
        lines = [[*header, "p (Welch)", "training time (s)"]]
        for one in self.variants:
            figures = [
                _number(one.mean, digits),
                _number(one.std, digits),
                _interval(one.ci95, digits),
                _number(one.difference, digits, "+"),
                _interval(one.difference_ci95, digits, "+"),
                "-" if one.welch_p is None else f"{one.welch_p:.2g}",
                f"{one.train_seconds_median:.2f}",
            ]
            lines.append([one.name, one.changes or "-", str(one.n), *figures])
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(2, *map(len, column)) for column in zip(*cells)]  # 2: of the rule's "-:"
        aligned = [[f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)] for line in cells]
        rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        table = [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]
        notes = [f"Differences are to {self.baseline}; training time is the runs' median."]
        return "\n".join([*table, "", *notes, *(f"Warning: {line}" for line in self.warnings)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """What ``report.json`` holds."""
        variants = [dataclasses.asdict(one) for one in self.variants]
        return {"metric": self.metric, "baseline": self.baseline, "variants": variants, "warnings": self.warnings}

    def variants_figure(self) -> Figure:
        """The metric by variant: a point for each run, beside it the mean with its 95 % interval."""
        return _figure(self._draw_variants, width=max(4.0, 1.5 + 1.1 * len(self.variants)))

    def curves_figure(self) -> Figure:
        """The metric over the epochs: the runs' mean, in a band from their minimum to their maximum. Of a test set
        that is tested at the end alone, the test accuracy.
        """
        return _figure(self._draw_curves, width=7.0)

    def _draw_variants(self, axes: Axes) -> None:
        for place, one in enumerate(self.variants):
            color = f"C{place % 10}"
            beside = place + np.linspace(-0.12, 0.12, one.n) if one.n > 1 else [place]
            axes.plot(beside, one.values, "o", color=color, alpha=0.6, markersize=5, markeredgewidth=0)
            margins = [[one.mean - one.ci95[0]], [one.ci95[1] - one.mean]] if one.ci95 else None
            axes.errorbar([place + 0.27], [one.mean], margins, fmt="D", color=color, markersize=5, capsize=4)
        axes.set_xticks(range(len(self.variants)), [f"{one.name}\nn = {one.n}" for one in self.variants])
        axes.tick_params(axis="x", rotation=30 if len(self.variants) > 4 else 0)
        axes.set_xlim(-0.6, len(self.variants) - 0.4)
        axes.set_ylabel(self.label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title("runs; mean with its 95 % interval", fontsize="medium")
        for label in axes.get_xticklabels():
            label.set_parse_math(False)  # a name may have dollar signs

    def _draw_curves(self, axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        column = self.metric if self.metric in OF_AN_EPOCH else "test_accuracy"
        for place, (name, result) in enumerate(self.results.items()):
            values = [[getattr(row, column) for row in result.rows if row.run == run.run] for run in result.runs]
            epochs = range(1, result.recipe.epochs + 1)
            color = f"C{place % 10}"
            axes.plot(epochs, np.mean(values, axis=0), ".-", color=color, label=name)
            if len(values) > 1:
                axes.fill_between(epochs, np.min(values, axis=0), np.max(values, axis=0), color=color, alpha=0.2, lw=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(OF_AN_EPOCH[column])
        axes.grid(alpha=0.3)
        axes.set_title("mean of the runs; band: minimum to maximum", fontsize="medium")
        for label in axes.legend().get_texts():
            label.set_parse_math(False)

    def write(self, folder: str | Path) -> None:
        """Write ``report.md``, ``report.json`` and the two pictures to ``folder``, each whole or not at all, in the
        place of an earlier report's; :class:`InputError` where that cannot be.
        """
        folder = Path(folder).expanduser()
        pictures = f"\n![{self.label} by variant]({VARIANTS_PICTURE})\n\n![Over the epochs]({CURVES_PICTURE})\n"
        files: dict[str, Callable[[Path], object]] = {
            VARIANTS_PICTURE: lambda temporary: _save(self.variants_figure(), temporary),
            CURVES_PICTURE: lambda temporary: _save(self.curves_figure(), temporary),
            "report.md": lambda temporary: temporary.write_text(f"# {self.label}\n\n{self.markdown()}{pictures}"),
            "report.json": lambda temporary: temporary.write_text(json.dumps(self.as_json(), indent=2) + "\n"),
        }
        with os_error_as_input_error(f"--output {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for name, write in files.items():
                with atomic_write(folder / name) as temporary:
                    write(temporary)


def _figure(draw: Callable[[Axes], None], width: float) -> Figure:
    with default_style():
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        figure = Figure(figsize=(width, 4.2), layout="constrained")
        draw(figure.subplots())
        return figure


def _save(figure: Figure, temporary: Path) -> None:
    with default_style():
        figure.savefig(temporary, dpi=200, format="png")


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _interval(ends: list[float] | None, digits: int, sign: str = "") -> str:
    return "-" if ends is None else " to ".join(_number(end, digits, sign) for end in ends)


def make_report(results: Mapping[str, Result], *, baseline: str | None = None, metric: str = "test_accuracy") -> Report:
    """Set ``results``, by the variants' names, beside each other.

    Args:
        baseline: the name of the one that the others differ from; the first where None.
        metric: test_accuracy, train_accuracy or train_loss after each run's last epoch, or the name of a set of
            ``also_test``.

    Means have Student's interval. Differences have Welch's, which lets the variants' deviations differ, as has the
    two-sided p of no difference (B. L. Welch, Biometrika 34, 1947), both by ``scipy.stats.ttest_ind``.

    Raises:
        InputError: scipy is missing, or a name is not there.
    """
    ttest_ind = welch()
    if not results:
        raise InputError("there is nothing to report; name a folder of results")
    baseline = next(iter(results)) if baseline is None else baseline
    if baseline not in results:
        raise InputError(f"there is no variant {baseline!r} for a baseline; there are {', '.join(results)}")
    values = {name: _values(name, result, metric) for name, result in results.items()}
    base = values[baseline]
    variants = []
    for name, result in results.items():
        own, n = values[name], len(values[name])
        other = name != baseline
        test = None
        if other and n > 1 and len(base) > 1 and (statistics.stdev(own) or statistics.stdev(base)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that runs which are all but equal are
                test = ttest_ind(own, base, equal_var=False)
        variants.append(
            Variant(
                name=name,
                changes=changes(result.recipe, results[baseline].recipe),
                n=n,
                values=own,
                mean=statistics.fmean(own),
                std=statistics.stdev(own) if n > 1 else None,
                ci95=confidence_interval_95(own, math.inf if metric == "train_loss" else 100.0),
                difference=statistics.fmean(own) - statistics.fmean(base) if other else None,
                difference_ci95=[float(end) for end in test.confidence_interval(0.95)] if test else None,
                welch_p=float(test.pvalue) if test else None,
                train_seconds_median=statistics.median(run.train_seconds for run in result.runs),
            )
        )
    return Report(metric, baseline, variants, _unlike(results), results)


def welch() -> Any:
    """``scipy.stats.ttest_ind``; :class:`InputError` where scipy, an extra, is missing."""
    try:
        from scipy.stats import ttest_ind
    except ImportError:
        raise InputError("a report needs scipy: pip install 'cifar_fast[report]'") from None
    return ttest_ind


def _values(name: str, result: Result, metric: str) -> list[float]:
    if metric in OF_AN_EPOCH:
        last = {row.run: row for row in result.rows}
        return [getattr(last[run.run], metric) for run in result.runs]
    also = list(result.runs[0].also_test)
    if metric not in also:
        raise InputError(f"{name}: there is no metric {metric!r}; there are {', '.join([*OF_AN_EPOCH, *also])}")
    return [run.also_test[metric] for run in result.runs]


def _unlike(results: Mapping[str, Result]) -> list[str]:
    """A line for each thing that ``results`` do not have in common and that their figures depend on."""
    lines = []
    for what, of in {
        "data sets": lambda result: f"{result.dataset['name']} ({result.dataset['digest'][:12]})",
        "models": lambda result: result.model or "the recipe's network",
        "epochs": lambda result: str(result.recipe.epochs),
        "backends": lambda result: f"{result.backend} in {result.dtype}, {result.memory_format}",
        "devices": lambda result: result.environment["device_name"],
    }.items():
        names: dict[str, list[str]] = {}
        for name, result in results.items():
            names.setdefault(of(result), []).append(name)
        if len(names) > 1:
            lines.append(f"different {what}: {'; '.join(f'{value} ({_few(have)})' for value, have in names.items())}")
    return lines


def _few(names: list[str]) -> str:
    return ", ".join(names if len(names) < 4 else [*names[:2], f"{len(names) - 2} more"])


def read_results(folders: list[str | Path]) -> tuple[dict[str, Result], list[str]]:
    """The results in ``folders``, by the names of the folders, or by their paths where two have one name; a sweep's
    folder stands for its variants. Besides, a line for each variant of a sweep that has none yet.
    """
    found: dict[Path, Result] = {}
    lines = []
    for folder in map(Path, folders):
        folder = folder.expanduser()
        for one in [folder / name for name in variants_in(folder)] if (folder / SWEEP).exists() else [folder]:
            if one in found:
                raise InputError(f"{one} is given twice; leave one out")
            if one != folder and not (one / SUMMARY).exists():
                lines.append(f"{one.name} has no run that has ended, and is left out")
                continue
            found[one] = _read(one)
    names = [folder.resolve().name for folder in found]
    own = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, found)]
    return dict(zip(own, found.values())), lines


def _read(folder: Path) -> Result:
    try:
        return Result.load(folder)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise InputError(
            f"{folder}: holds no {missing}; name the folder of a training that has ended, or of a sweep"
        ) from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise InputError(f"{folder}: the results there cannot be read ({first_line(error)}); train again") from None

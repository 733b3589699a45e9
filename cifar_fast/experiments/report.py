"""Comparison of trainings: means with confidence intervals, and differences from a baseline."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_fast.data.class_names import ClassNames
from cifar_fast.experiments.ranking import (
    EPOCH_METRICS,
    default_metric,
    is_loss,
    metric_values,
    ranking,
    ranking_line,
    source,
)
from cifar_fast.experiments.sweep import SWEEP, changes, variants_in
from cifar_fast.training.metrics import Run, confidence_interval_95
from cifar_fast.training.plots import new_figure
from cifar_fast.training.results import Result, RunReader, RunResult
from cifar_fast.utils.device import AFFECTS_FIGURES
from cifar_fast.utils.errors import InputError, option, require_instance, visible
from cifar_fast.utils.files import RUN_RESULT, TRAINING, atomic_write, expand_home, os_error_as_input_error, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENVIRONMENT = {"device_name": "devices", "threads": "numbers of CPU threads"}
"""Parts of the environment that are no versions, with their names in warnings."""

LINES, MARKERS = ("-", "--", "-.", ":"), "os^Dv<>"
"""Styles of lines and markers, which more variants than a color cycle need."""

MAX_WIDTH = 60.0
"""Inches of the widest figure: a PNG has at most 2 ** 16 pixels in a row, and each of them takes time."""
MAX_LABELS = 100
"""The largest number of variants that a figure names. In one of more variants, some or all names are left out."""

VARIANTS_FIGURE, CURVES_FIGURE = "report-variants.png", "report-curves.png"


@dataclass(frozen=True)
class Variant:
    """Statistics of one training.

    ``changes`` lists the constants of the recipe that differ from the baseline's. ``n`` is the number of finished runs
    and ``values`` their metric; ``mean`` and ``std`` (with n - 1) are over these runs. ``difference`` is the mean minus
    the baseline's mean, None for the baseline itself. Intervals are ``[low, high]`` and hold the true value with 95 %
    confidence. ``test_accuracy_mean`` is there whatever the metric is. A statistic is None if there are too few runs
    for it. ``diverged`` and ``missing`` list the other runs as ``summary.json`` does.
    """

    name: str
    changes: str
    n: int
    values: list[float]
    mean: float | None
    std: float | None
    ci95: list[float] | None
    difference: float | None
    difference_ci95: list[float] | None
    welch_p: float | None
    train_seconds_median: float | None
    test_accuracy_mean: float | None
    diverged: list[dict[str, Any]]
    missing: list[dict[str, Any]]

    @property
    def count(self) -> str:
        """``n`` for a person, such as "3 of 4" if a run diverged or is missing."""
        others = len(self.diverged) + len(self.missing)
        return f"{self.n} of {self.n + others}" if others else str(self.n)


@dataclass(frozen=True)
class Report:
    """The result of :func:`make_report`.

    ``warnings`` has a line for each variant without all its runs, and for each setting that affects the figures and
    differs between the variants. ``repeated`` has a line for equal runs, which are counted once.
    """

    metric: str
    baseline: str
    variants: list[Variant]
    warnings: list[str]
    repeated: list[str]
    results: Mapping[str, Result] = dataclasses.field(repr=False)

    @property
    def label(self) -> str:
        """Label of the metric for axes and tables."""
        return EPOCH_METRICS.get(self.metric, f"accuracy on {self.metric} (%)")

    def markdown(self) -> str:
        """Return the table as Markdown, with the warnings below it. A "-" marks a missing statistic."""
        digits = 4 if is_loss(self.metric) else 2
        by_validation = self.metric.startswith("validation_")
        header = ["variant", "changes", "n", self.label, "std", "95 % interval", "difference", "95 % interval"]
        lines = [[*header, "p (Welch)", *(["test accuracy (%)"] if by_validation else []), "training time (s)"]]
        for variant in self.variants:
            numbers = [
                _number(variant.mean, digits),
                _number(variant.std, digits),
                _interval(variant.ci95, digits),
                _number(variant.difference, digits, "+"),
                _interval(variant.difference_ci95, digits, "+"),
                "-" if variant.welch_p is None else f"{variant.welch_p:.2g}",
                *([_number(variant.test_accuracy_mean, 2)] if by_validation else []),
                _number(variant.train_seconds_median, 2),
            ]
            lines.append([variant.name, variant.changes or "-", variant.count, *numbers])
        cells = [[visible(cell).replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(2, *map(len, column)) for column in zip(*cells)]  # "-:" below the header takes 2
        aligned = [[f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)] for line in cells]
        rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        table = [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]
        note = f"Differences are relative to {self.baseline}; the training time is the median of the runs."
        ranked = ranking_line(self.results, self.metric)
        note += (
            f" {ranked[0].upper()}{ranked[1:]}." if ranked else f" The metric is {source(self.results, self.metric)}."
        )
        lines_below = [note, *(f"Counted once: {line}" for line in self.repeated)]
        lines_below += [f"Warning: {line}" for line in self.warnings]
        return "\n".join([*table, "", *map(visible, lines_below)]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``report.json``."""
        variants = [dataclasses.asdict(variant) for variant in self.variants]
        lines = {"warnings": self.warnings, "repeated": self.repeated}
        lines["ranking"] = [name for name, _ in ranking(self.results, self.metric)]
        return {"metric": self.metric, "baseline": self.baseline, "variants": variants, **lines}

    def variants_figure(self) -> Figure:
        """Return a figure of the metric by variant: a point for each run, and the mean with its 95 % interval."""
        count = len(self.variants)
        figure = new_figure(min(max(4.0, 1.5 + 1.1 * count), MAX_WIDTH), 4.2)
        axes = figure.subplots()
        colors = distinct_colors(count)
        for place, variant in enumerate(self.variants):
            if variant.mean is None:
                continue
            color = colors[place]
            beside = place + np.linspace(-0.12, 0.12, variant.n) if variant.n > 1 else [place]
            axes.plot(beside, variant.values, "o", color=color, alpha=0.6, markersize=5, markeredgewidth=0)
            mean, ci95 = variant.mean, variant.ci95
            margins = [[mean - ci95[0]], [ci95[1] - mean]] if ci95 else None
            axes.errorbar([place + 0.27], [mean], margins, fmt="D", color=color, markersize=5, capsize=4)
        labels = [f"{variant.name}\nn = {variant.count}" for variant in self.variants]
        every = math.ceil(count / MAX_LABELS)
        axes.set_xticks(range(0, count, every), labels[::every])
        axes.tick_params(axis="x", rotation=30 if count > 4 else 0)
        axes.set_xlim(-0.6, count - 0.4)
        axes.set_ylabel(self.label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title("runs, and mean with its 95 % interval", fontsize="medium")
        for label in axes.get_xticklabels():
            label.set_parse_math(False)  # a name may contain dollar signs
        return figure

    def curves_figure(self) -> Figure:
        """Return a figure of the metric over the epochs: the mean of the runs, and a band from minimum to maximum.

        For an extra test set, which is evaluated only after the last epoch, the figure shows the test accuracy.
        """
        from matplotlib.ticker import MaxNLocator

        columns = math.ceil(len(self.results) / 16)
        has_legend = len(self.results) <= MAX_LABELS
        figure = new_figure(7.0 + 1.6 * columns * has_legend, 4.2)
        axes = figure.subplots()
        column = self.metric if self.metric in EPOCH_METRICS else "test_accuracy"
        colors = distinct_colors(len(self.results))
        for place, (name, result) in enumerate(self.results.items()):
            by_epoch: dict[int, list[float]] = {}
            for row in result.rows:  # a run that was stopped early has fewer epochs
                if (value := getattr(row, column)) is not None:
                    by_epoch.setdefault(row.epoch, []).append(value)
            if not by_epoch:  # all runs diverged, or there are no validation images
                continue
            epochs, values = zip(*sorted(by_epoch.items()))
            color, line = colors[place], LINES[place % len(LINES)]
            means = list(map(statistics.fmean, values))
            axes.plot(epochs, means, color=color, linestyle=line, marker=MARKERS[place % len(MARKERS)], label=name)
            if len(result.runs) > 1:  # the outline tells bands apart where they overlap
                lows, highs = list(map(min, values)), list(map(max, values))
                fill, edge = (color, 0.15), (color, 0.7)
                axes.fill_between(epochs, lows, highs, facecolor=fill, edgecolor=edge, linestyle=line, lw=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(EPOCH_METRICS[column])
        axes.grid(alpha=0.3)
        axes.set_title("mean of the runs; band: minimum to maximum", fontsize="medium")
        if axes.lines and has_legend:  # nobody finds one of hundreds of lines by its color
            for label in figure.legend(loc="outside right upper", ncols=columns, fontsize="small").get_texts():
                label.set_parse_math(False)
        return figure

    def write(self, folder: str | Path) -> None:
        """Write ``report.md``, ``report.json`` and the two figures to ``folder``. Replace an earlier report.

        Raises:
            InputError: the folder or a file cannot be written. No file is left half-written.
        """
        folder = expand_home(folder)
        figures = f"\n![{self.label} by variant]({VARIANTS_FIGURE})\n\n![Over the epochs]({CURVES_FIGURE})\n"
        files: dict[str, Callable[[Path], object]] = {
            VARIANTS_FIGURE: lambda temporary: save_png(self.variants_figure(), temporary),
            CURVES_FIGURE: lambda temporary: save_png(self.curves_figure(), temporary),
            "report.md": lambda temporary: temporary.write_text(f"# {self.label}\n\n{self.markdown()}{figures}"),
        }
        what = f"{option('output')} {folder}"
        with os_error_as_input_error(what):
            folder.mkdir(parents=True, exist_ok=True)
            for name, write in files.items():
                with atomic_write(folder / name) as temporary:
                    write(temporary)
        write_json(folder / "report.json", self.to_dict(), what, "choose another folder")


def distinct_colors(count: int) -> list[Any]:
    """Return ``count`` different colors: those of matplotlib's cycle, or of a color map if there are more."""
    import matplotlib

    cycle = matplotlib.rcParams["axes.prop_cycle"].by_key().get("color", [])
    colors = list(dict.fromkeys(cycle))
    return (
        colors[:count] if count <= len(colors) else list(matplotlib.colormaps["turbo"](np.linspace(0.02, 0.98, count)))
    )


def save_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG, in 200 dots per inch unless matplotlib's parameters have another number."""
    import matplotlib

    dpi = matplotlib.rcParams["savefig.dpi"]
    figure.savefig(path, dpi=200 if dpi == "figure" else dpi, format="png")


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _interval(ends: list[float] | None, digits: int, sign: str = "") -> str:
    return "-" if ends is None else " to ".join(_number(end, digits, sign) for end in ends)


def make_report(
    results: Mapping[str, Result],
    *,
    baseline: str | None = None,
    metric: str | None = None,
    left_out: Sequence[str] = (),
) -> Report:
    """Compare the runs of several trainings.

    Equal runs are one observation. The first is counted, and a line of ``Report.repeated`` names the others. A variant
    without any other run is left out.

    Means have Student's confidence interval. Differences have the interval and the two-sided p-value of Welch's
    t-test, which allows unequal variances (B. L. Welch, Biometrika 34, 1947).

    Args:
        results: the trainings, by the names of the variants.
        baseline: the name of the variant that the others are compared with; None for the first one.
        metric: test_accuracy, validation_accuracy, train_accuracy, test_loss, validation_loss or train_loss after the
            last epoch of each run, or the name of an extra test set of ``also_test``. None is validation_accuracy if
            all trainings held out validation images, and test_accuracy otherwise.
        left_out: lines about trainings that are not among the results, for the warnings.

    Raises:
        InputError: scipy is not installed, or a name does not exist.
    """
    welch_test = welch()
    require_instance("results", results, Mapping, "results by their names, such as {'baseline': result}")
    for name, result in results.items():
        require_instance(f"results[{name!r}]", result, Result, "a Result, as fit and Result.load return one")
    if not results:
        raise InputError("there are no results to report")
    all_results = results
    results, repeated = _counted_once(results)
    baseline = next(iter(results)) if baseline is None else baseline
    if baseline not in results:
        equal = "".join(f" ({line})" for line in repeated)
        raise InputError(
            f"{option('baseline')} {baseline!r} is not a variant; the variants are {', '.join(results)}{equal}"
        )
    metric = default_metric(results) if metric is None else metric
    values = {name: metric_values(result, metric) for name, result in results.items()}
    if all(own is None for own in values.values()):
        names = dict.fromkeys(name for result in results.values() for run in result.runs for name in run.also_test)
        held_out = any(result.dataset["validation_images"] for result in results.values())
        choices = ", ".join([*(name for name in EPOCH_METRICS if held_out or "validation" not in name), *names])
        raise InputError(f"{baseline}: {option('metric')} {metric!r} does not exist; the choices are {choices}")
    base = values[baseline] or []
    variants = []
    for name, result in results.items():
        own = values[name] or []
        n, is_baseline = len(own), name == baseline
        test = None
        if not is_baseline and n > 1 and len(base) > 1 and (statistics.stdev(own) or statistics.stdev(base)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scipy's warning that the values are nearly equal
                test = welch_test(own, base)
        variants.append(
            Variant(
                name=name,
                changes=changes(result.recipe, results[baseline].recipe),
                n=n,
                values=own,
                mean=statistics.fmean(own) if own else None,
                std=statistics.stdev(own) if n > 1 else None,
                ci95=confidence_interval_95(own, math.inf if is_loss(metric) else 100.0),
                difference=statistics.fmean(own) - statistics.fmean(base) if own and base and not is_baseline else None,
                difference_ci95=[float(end) for end in test.confidence_interval(0.95)] if test else None,
                welch_p=float(test.pvalue) if test else None,
                train_seconds_median=statistics.median(run.train_seconds for run in result.runs) if own else None,
                test_accuracy_mean=statistics.fmean(run.test_accuracy for run in result.runs) if result.runs else None,
                **all_results[name].not_finished(),
            )
        )
    unfinished = {name: all_results[name].not_finished_line() for name in results}
    lines = [*left_out, *(f"{name}: {line}" for name, line in unfinished.items() if line)]
    lines += [f"{name}: was not tested on {metric}" for name, own in values.items() if own is None]
    return Report(metric, baseline, variants, [*lines, *_differing_settings(results)], repeated, results)


def welch() -> Callable[..., Any]:
    """Return Welch's t-test: ``scipy.stats.ttest_ind`` with unequal variances, a function of two samples.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        from scipy.stats import ttest_ind
    except ImportError:
        raise InputError("a report needs scipy: pip install 'cifar_fast[report]'") from None
    return functools.partial(ttest_ind, equal_var=False)


def _counted_once(results: Mapping[str, Result]) -> tuple[dict[str, Result], list[str]]:
    """Return ``results`` without runs that repeat another, and a line for each pair of variants with such runs.

    Two runs of one variant are equal if their seeds are. Runs of two variants are equal if settings, data and rows are
    equal too. A copied folder is an example, and so is a training that was repeated with the same bits.
    """
    counted: dict[str, Result] = {}
    found_in: dict[Any, str] = {}
    lines = []
    for name, result in results.items():
        seen, kept = set(), []
        repeated: dict[str, list[str]] = {}  # seeds, by the name of the variant that holds the same runs
        for run_result in result.run_results:
            seeds = _drawn_seeds(result, run_result.run)
            observation = _observation(result, run_result, seeds)
            first = name if seeds in seen else found_in.get(observation)
            if first is None:
                kept.append(run_result)
                found_in[observation] = name
            else:
                repeated.setdefault(first, []).append(str(run_result.run.seed))
            seen.add(seeds)
        for first, numbers in repeated.items():
            of = "another run of it" if first == name else f"the same runs of {first}"
            what = f"{name}, seed {', '.join(numbers)}" if len(numbers) == 1 else f"{name}, seeds {', '.join(numbers)}"
            lines.append(f"{what}: equal to {of}")
        if kept or not result.run_results:
            counted[name] = dataclasses.replace(result, run_results=kept)
    return counted, lines


def _drawn_seeds(result: Result, run: Run) -> tuple[int | None, ...]:
    """Return the seeds that the random numbers of a run come from. A custom model may draw some by itself."""
    if run.init_seed is None:
        return (run.seed,)
    own = run.seed if result.model else None
    return run.init_seed, run.order_seed, run.augment_seed if result.recipe.augments else None, own


def _observation(result: Result, run_result: RunResult, seeds: tuple[int | None, ...]) -> tuple[Any, ...]:
    """Return all that equal runs share. Times, the index of the run and other test sets may differ."""
    rows = [dataclasses.replace(row, run=0, train_seconds=0.0, evaluation_seconds=0.0) for row in run_result.rows]
    model = result.model, result.model_digest
    how = result.backend, result.dtype, result.memory_format, model, result.dataset["digest"]
    return seeds, result.recipe, how, repr(rows)  # text, because NaN differs from itself


def _differing_settings(results: Mapping[str, Result]) -> list[str]:
    """Return a line for each setting that affects the figures and differs between ``results``."""
    sources: dict[str, str] = {}  # equal data has the name that it has first
    for result in results.values():
        sources.setdefault(result.dataset["digest"], result.dataset["name"])

    def dataset(result: Result) -> list[str]:
        digest = result.dataset["digest"]
        return [f"{sources[digest]} ({digest[:12]})"]

    def model(result: Result) -> list[str]:
        digest = f" ({result.model_digest[:12]})" if result.model_digest else ""
        return [(result.model or "the recipe's network") + digest]

    def extra_set(name: str) -> Callable[[Result], list[str]]:
        def value_of(result: Result) -> list[str]:
            found = result.dataset["also_test"].get(name)
            return [f"{found['images']} images, {found['digest'][:12]}"] if found else []

        return value_of

    def part(name: str) -> Callable[[Result], list[str]]:
        return lambda result: result.environment_values(name)

    extra_sets = dict.fromkeys(name for result in results.values() for name in result.dataset["also_test"])
    settings: dict[str, Callable[[Result], list[str]]] = {
        "data sets": dataset,
        "numbers of validation images": lambda result: [str(result.dataset["validation_images"])],
        "class names": lambda result: [str(ClassNames(result.dataset["class_names"]))],
        **{f"test sets {name}": extra_set(name) for name in extra_sets},
        "models": model,
        "epochs": lambda result: [str(result.recipe.epochs)],
        "seeding schemes": lambda result: [_seeding(result)],
        "backends": lambda result: [f"{result.backend} in {result.dtype}, {result.memory_format}"],
        **{ENVIRONMENT.get(name, f"versions of {name}"): part(name) for name in AFFECTS_FIGURES},
    }
    lines = []
    for setting, values_of in settings.items():
        variants: dict[tuple[str, ...], list[str]] = {}
        for name, result in results.items():
            if values := values_of(result):
                variants.setdefault(tuple(values), []).append(name)
        if len({value for values in variants for value in values}) > 1:
            shown = "; ".join(f"{' and '.join(values)} ({_shorten(names)})" for values, names in variants.items())
            lines.append(f"different {setting}: {shown}")
    return lines


def _seeding(result: Result) -> str:
    """Return which random numbers have a seed of their own, the same in all runs."""
    names = ("init_seed", "order_seed", "augment_seed")
    fixed = [f"{name} {value}" for name in names if (value := getattr(result.config, name)) is not None]
    return " and ".join(fixed) or "one stream from the seed of each run"


def _shorten(names: list[str]) -> str:
    return ", ".join(names if len(names) < 4 else [*names[:2], f"{len(names) - 2} more"])


@dataclass
class Found:
    """Trainings in folders.

    Attributes:
        results: by the names of the folders, or by their paths if two folders have the same name.
        repeated: a line for each folder that is given twice, which is read once.
        unfinished: a line for each training without a run that has ended.
        unreadable: a line for each folder or run that cannot be read.
    """

    results: dict[str, Result] = dataclasses.field(default_factory=dict)
    repeated: list[str] = dataclasses.field(default_factory=list)
    unfinished: list[str] = dataclasses.field(default_factory=list)
    unreadable: list[str] = dataclasses.field(default_factory=list)


def read_results(folders: Sequence[str | Path]) -> Found:
    """Read the results of trainings, as far as their runs have ended.

    Args:
        folders: folders of trainings or of sweeps; a sweep stands for all its variants.

    Raises:
        InputError: a folder does not exist, or none holds results that can be read.
    """
    found = Found()
    results: dict[Path, Result] = {}
    given: dict[Path, Path] = {}  # by the path without links
    for folder in (expand_home(folder) for folder in folders):
        is_sweep = (folder / SWEEP).exists()
        try:
            trainings = [folder / name for name in variants_in(folder)] if is_sweep else [folder]
        except InputError as error:
            found.unreadable.append(error.message)
            continue
        for training in trainings:
            first = given.setdefault(training.resolve(), training)
            if first is not training:
                same = "" if str(first) == str(training) else f" as {first}"
                found.repeated.append(f"{training} is given twice{same}; it is counted once")
            elif not (training / TRAINING).exists() and not is_sweep:
                line = f"{training}: holds no {TRAINING}; choose the folder of a training, or of a sweep"
                if not training.exists():
                    raise InputError(line)
                found.unreadable.append(line)
            elif not any(training.glob(f"run-*/{RUN_RESULT}")):
                found.unfinished.append(f"{training.name} has no finished run and is left out")
            elif result := _read_training(RunReader(training), found.unreadable):
                results[training] = result
    if not results:
        raise InputError([*found.unreadable, f"{folders[0]}: no run of the training there has ended"][0])
    names = [folder.resolve().name for folder in results]
    counts = Counter(names)
    keys = [name if counts[name] == 1 else str(folder) for name, folder in zip(names, results)]
    found.results = dict(zip(keys, results.values()))
    return found


def _read_training(reader: RunReader, unreadable: list[str]) -> Result | None:
    """Read the runs that have ended, if there are any. ``unreadable`` gets a line for each file that is damaged."""
    ended = []
    try:
        training = reader.training()
    except InputError as error:
        unreadable.append(error.message)
        return None
    for run in range(training.config.runs):
        try:
            result = reader.run_result(run, logits=False)
        except InputError as error:
            unreadable.append(error.message)
        else:
            ended += [result] if result else []
    try:
        return training.with_runs(ended) if ended else None
    except InputError as error:
        unreadable.append(f"{reader.name}: {error.message}")
        return None

"""Metrics that trainings are compared by, and their order by one of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from cifar_fast.training.results import Result

EPOCH_METRICS = {
    "validation_accuracy": "validation accuracy (%)",
    "test_accuracy": "test accuracy (%)",
    "train_accuracy": "training accuracy (%)",
    "validation_loss": "validation loss",
    "test_loss": "test loss",
    "train_loss": "training loss",
}
"""Metrics that each epoch's row has, with a label for axes and tables."""


def default_metric(results: Mapping[str, Result]) -> str:
    """Return validation_accuracy if all trainings held out validation images, else test_accuracy."""
    held_out = all(result.dataset["validation_images"] for result in results.values())
    return "validation_accuracy" if held_out else "test_accuracy"


def is_loss(metric: str) -> bool:
    """Return whether ``metric`` is a loss, whose low values are good."""
    return metric in EPOCH_METRICS and metric.endswith("_loss")


def metric_values(result: Result, metric: str) -> list[float] | None:
    """Return the metric of each run after its last epoch, or None for images that the runs were not tested on."""
    if metric in EPOCH_METRICS:
        last_row = {row.run: row for row in result.rows}
        values = [getattr(last_row[run.run], metric) for run in result.runs]
    else:
        values = [run.also_test.get(metric) for run in result.runs]
    return None if None in values else values


def ranking(results: Mapping[str, Result], metric: str) -> list[tuple[str, float]]:
    """Return the trainings with a finished run and their mean of the metric, the best first."""
    values = {name: metric_values(result, metric) for name, result in results.items()}
    means = [(name, statistics.fmean(own)) for name, own in values.items() if own]
    return sorted(means, key=lambda pair: pair[1] if is_loss(metric) else -pair[1])


def ranking_line(results: Mapping[str, Result], metric: str) -> str:
    """Return the ranking in one line, which says what images it is from; empty for fewer than two trainings."""
    ranked = ranking(results, metric)
    if len(ranked) < 2:
        return ""
    shown = ", ".join(f"{name} {mean:.4f}" if is_loss(metric) else f"{name} {mean:.2f} %" for name, mean in ranked)
    return f"ranked by {source(results, metric)}: {shown}"


def source(results: Mapping[str, Result], metric: str) -> str:
    """Return the metric and the images that it is from, for a person."""
    name = EPOCH_METRICS.get(metric, f"accuracy on {metric}").removesuffix(" (%)")
    if metric.startswith("validation_"):
        counts = sorted({result.dataset["validation_images"] for result in results.values()})
        return f"{name}, on {' or '.join(map(str, counts))} images held out of the training images"
    if metric in ("test_accuracy", "test_loss"):
        return f"{name}, on the test images (a choice made by them needs validation images for a fair figure)"
    return name

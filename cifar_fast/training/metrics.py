"""Measurements of a training: a row for each epoch, a record of each run, the confidence interval of the mean."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cifar_fast.utils.errors import Diverged
from cifar_fast.utils.typed import check_types


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one run. Accuracies are in %. Seconds are totals of the run so far.

    The losses on validation and test images are means of the loss that is trained, label smoothing included. They are
    None if they are not finite. The validation values are None without validation images.
    """

    run: int
    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    test_loss: float | None
    test_accuracy: float
    train_seconds: float
    evaluation_seconds: float

    @classmethod
    def before_first(cls, run: int) -> EpochRow:
        """Return the row of epoch 0, after which a run begins."""
        return cls(run, 0, 0.0, 0.0, None, None, 0.0, 0.0, 0.0, 0.0)

    def to_json(self) -> str:
        """Return the line of ``metrics.jsonl``."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    def __str__(self) -> str:
        def loss(value: float | None) -> str:
            return "not finite" if value is None else f"{value:.3f}"

        validation = ""
        if self.validation_accuracy is not None:
            validation = f"  val loss {loss(self.validation_loss)}  val acc {self.validation_accuracy:.2f}"
        return (
            f"epoch {self.epoch:2d}  train loss {self.train_loss:.3f}  train acc {self.train_accuracy:.2f}{validation}"
            f"  test loss {loss(self.test_loss)}  test acc {self.test_accuracy:.2f}"
            f"  training time {self.train_seconds:.2f}"
        )


def rows_digest(rows: Iterable[EpochRow], before: str = "") -> str:
    """Return the SHA-256 of a chain of rows. ``before`` is the digest of the rows before these, if there are any."""
    for row in rows:
        before = hashlib.sha256((before + row.to_json()).encode()).hexdigest()
    return before


def rows_of(run: int, values: Sequence[Mapping[str, Any]]) -> list[EpochRow]:
    """Return the rows of a file.

    Raises:
        ValueError, TypeError: they are not those of the epochs 1, 2, ... of the run with that index.
    """
    rows = [EpochRow(**one) for one in values]
    for row in rows:
        check_types(row)
    if [(row.run, row.epoch) for row in rows] != [(run, epoch) for epoch in range(1, len(rows) + 1)]:
        raise ValueError(f"its rows are not the epochs of run {run}")
    return rows


@dataclass(frozen=True)
class Run:
    """One training from scratch. ``run`` is its index, from 0.

    The seeds are the values of :meth:`cifar_fast.utils.seeds.Seeds.for_run`. Accuracies are in %, after the last epoch.
    They and the losses are as in :class:`EpochRow`.
    ``also_test`` has the accuracies on other test sets, by name. ``also_test_severities`` has those for each severity
    of a corruption. ``stopped`` is True if a callback ended the run early, by :class:`cifar_fast.StopTraining`.
    ``tta_accuracy`` is the test accuracy with test-time augmentation, if it was asked for.
    """

    run: int
    seed: int
    init_seed: int | None
    order_seed: int | None
    augment_seed: int | None
    test_accuracy: float
    train_seconds: float
    setup_seconds: float
    evaluation_seconds: float
    also_test: dict[str, float] = field(default_factory=dict)
    also_test_severities: dict[str, list[float]] = field(default_factory=dict)
    stopped: bool = False
    test_loss: float | None = None
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    tta_accuracy: float | None = None


@dataclass(frozen=True)
class DivergedRun:
    """A run that ended at ``step`` in ``epoch``, both counted from 1, because its loss was no longer finite.

    Index and seeds are as in :class:`Run`.
    """

    run: int
    seed: int
    init_seed: int | None
    order_seed: int | None
    augment_seed: int | None
    step: int | None
    epoch: int | None

    def error(self, runs: int) -> Diverged:
        """Return the error for a person, which names the run if it is one of several ``runs``."""
        error = Diverged.at(self.step, self.epoch)
        return error if runs == 1 else Diverged(f"run {self.run} of {runs}, seed {self.seed}: {error.message}")


def confidence_interval_95(values: list[float], highest: float = 100.0) -> list[float] | None:
    """Return Student's 95 % interval ``[low, high]`` of the mean, clipped to 0 and ``highest``.

    The default of ``highest`` is the largest accuracy in %. The result is None for fewer than two values.

    Substituting t = sqrt(k) tan(angle) turns the density of Student's t with k degrees of freedom into
    cos(angle)^(k - 1), up to a factor. Summing it over the angles gives the quantile.
    """
    freedom = len(values) - 1
    if freedom < 1:
        return None
    angles = np.linspace(0, np.pi / 2, 100_001)
    share = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (freedom - 1))
    quantile = freedom**0.5 * np.tan(np.interp(0.95, share / share[-1], angles[1:]))
    mean = statistics.fmean(values)
    margin = float(quantile) * statistics.stdev(values) / len(values) ** 0.5
    return [max(mean - margin, 0.0), min(mean + margin, highest)]

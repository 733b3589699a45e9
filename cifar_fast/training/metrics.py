"""Rows, runs and their intervals."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one run: accuracies in %, seconds of training and of evaluation since the run's first step."""

    run: int
    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    train_seconds: float
    evaluation_seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:2d}  train loss {self.train_loss:.3f}  train acc {self.train_accuracy:.2f}"
            f"  test acc {self.test_accuracy:.2f}  training time {self.train_seconds:.2f}"
        )


@dataclass(frozen=True)
class Run:
    """One training from scratch: its seeds as :meth:`cifar_fast.utils.seeds.Seeds.for_run` gives them, its last test
    accuracy in %, that on other test sets by their names, and where its seconds went.
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


def confidence_interval_95(values: list[float], highest: float = 100.0) -> list[float] | None:
    """Student's 95 % interval ``[low, high]`` of the mean, cut off at 0 and at ``highest``, which is that of an
    accuracy in %; None for fewer than two values.

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
    return [max(mean - margin, 0.0), min(mean + margin, highest)]

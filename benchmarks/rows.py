"""Rows of results: every measurement yields flat rows, and every report is a pivot of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cifar_fast.diagnostics.roofline import Pass, roofline_times


@dataclass(frozen=True)
class Row:
    """The values of one metric. They belong to a part of the run, a case in it, and a side, which is an implementation.

    ``values`` are in the order of measurement: sides that take turns have a value per turn.
    """

    part: str
    case: str
    side: str
    metric: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        """Return "median (min to max)", or the only value."""
        if len(self.values) == 1:
            return show(self.values[0])
        return f"{show(self.median)} ({show(min(self.values))} to {show(max(self.values))})"


def rows_of(results: dict[str, Any]) -> list[Row]:
    """Return all rows of a results.json."""
    return [Row(**row) for part in results["parts"].values() for row in part.get("rows", [])]


def show(value: float) -> str:
    """Format with four significant digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ratio(row: Row, base: Row) -> str:
    """Format ``row`` divided by ``base`` turn by turn."""
    turns = [a / b for a, b in zip(row.values, base.values)]
    return str(Row(row.part, row.case, row.side, "ratio", "", turns)) if turns else "-"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in (header, rule, *lines)
    )


def floor_rows(costs: Sequence[Pass], steps: int, bandwidth: float, flops: float) -> list[Row]:
    """Return the cost and the floors of a step, and the floors of a run of ``steps`` steps."""
    rows = [
        Row("floors", "step", "computed", "arithmetic", "GFLOP", [sum(cost.flop for cost in costs) / 1e9]),
        Row("floors", "step", "computed", "memory", "GB", [sum(cost.bytes for cost in costs) / 1e9]),
    ]
    for name, seconds in roofline_times(costs, bandwidth, flops).items():
        rows.append(Row("floors", "step", "computed", f"{name} floor", "ms", [seconds * 1e3]))
        rows.append(Row("floors", f"run of {steps} steps", "computed", f"{name} floor", "s", [seconds * steps]))
    return rows


def floor_table(costs: Sequence[Pass], bandwidth: float, flops: float) -> str:
    """Format each pass of a step. MB are 10^6 bytes."""
    lines = []
    for cost in costs:
        times = roofline_times([cost], bandwidth, flops)
        bound = "arithmetic" if times["arithmetic"] > times["memory"] else "memory"
        figures = f"{cost.flop / 1e9:.3f}", f"{cost.bytes / 1e6:.3f}", f"{cost.flop / cost.bytes:.1f}"
        parameters = f"{cost.parameters:,}" if cost.parameters else "-"
        lines.append((cost.layer, cost.name, parameters, *figures, f"{times['overlapped'] * 1e6:.2f}", bound))
    return markdown(("layer", "pass", "parameters", "GFLOP", "MB", "FLOP/byte", "floor us", "bound by"), lines)

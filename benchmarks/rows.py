"""What a measurement gives: flat rows, which all reports pivot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One quantity of one side of a case.

    ``part`` is the part of a run, ``case`` what is measured, ``side`` who does it, ``metric`` and ``unit`` what of it.
    ``values`` are in the order measured; those of sides that took turns belong together by their place.
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
        """median (min to max), or the one value."""
        if len(self.values) == 1:
            return show(self.values[0])
        return f"{show(self.median)} ({show(min(self.values))} to {show(max(self.values))})"


def rows_of(results: dict[str, Any]) -> list[Row]:
    """All rows of a results.json."""
    return [Row(**row) for part in results["parts"].values() for row in part.get("rows", [])]


def show(value: float) -> str:
    """Four significant digits, without an exponent where that can be read."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ratio(row: Row, base: Row) -> str:
    """``row`` over ``base`` turn by turn: median (min to max)."""
    turns = [a / b for a, b in zip(row.values, base.values)]
    return str(Row(row.part, row.case, row.side, "ratio", "", turns)) if turns else "-"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in (header, rule, *lines)
    )

"""``python -m benchmarks report``: make results.md and pictures from the rows of each results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, markdown, ratio, rows_of
from cifar_fast.utils.files import atomic_write

RESULTS = Path(__file__).parent / "results"


def pivot(rows: list[Row]) -> str:
    """Format a line per case and side, a column per metric, and the first metric relative to ``auto`` or ``fused``."""
    metrics = list(dict.fromkeys((row.metric, row.unit) for row in rows if row.values))
    cells = {(row.case, row.side, (row.metric, row.unit)): row for row in rows}
    pairs = list(dict.fromkeys((row.case, row.side) for row in rows))
    sides = {side for _, side in pairs}
    base = next((name for name in ("auto", "fused") if name in sides and len(sides) > 1), None)
    header = ["case", "side", *(f"{metric}, {unit}" if unit else metric for metric, unit in metrics)]
    lines = []
    for case, side in pairs:
        line = [case, side, *(str(cells.get((case, side, metric), "-")) for metric in metrics)]
        if base:
            row, other = (cells.get((case, name, metrics[0])) for name in (side, base))
            line.append(ratio(row, other) if row and other else "-")
        lines.append(line)
    wrong = [f"\n\n{row.case}, {row.side}: {row.metric}" for row in rows if not row.values]
    return markdown(header + ([f"times {base}"] if base else []), lines) + "".join(wrong)


def report(results: dict[str, Any]) -> str:
    """Format every part of ``results`` as a table, and name the parts that were not measured."""
    facts, settings = results["environment"], results["settings"]
    versions = ("torch", "triton", "cuda", "cudnn", "python")
    known = ", ".join(f"{name} {facts[name]}" for name in versions if facts.get(name))
    blocks = [
        f"# {facts['device_name']}, {facts['threads']} threads",
        f"{known}; {settings['dtype']}; data: {settings['dataset']['name']}. median (min to max).",
    ]
    if note := settings.get("note"):
        blocks.append(note)
    rows = rows_of(results)
    for name in dict.fromkeys(row.part for row in rows):
        blocks += [f"## {name.capitalize()}", pivot([row for row in rows if row.part == name])]
    reasons = {name: part.get("skipped") or part.get("failed") for name, part in results["parts"].items()}
    if missing := [f"{name} ({reason})" for name, reason in reasons.items() if reason]:
        blocks.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(blocks)


def write_report(folder: Path) -> None:
    """Write ``results.md`` and ``steps.png`` from the ``results.json`` of ``folder``."""
    results = json.loads((folder / "results.json").read_text())
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(report(results) + "\n")
    if rows := [row for row in rows_of(results) if row.part == "profile" and row.metric == "time"]:
        with atomic_write(folder / "steps.png") as temporary:
            draw_steps(rows, temporary)


def draw_steps(rows: list[Row], path: Path) -> None:
    """Draw a bar per backend that shows where the time of a step goes."""
    from matplotlib.figure import Figure

    sides, kinds = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("side", "case"))
    figure = Figure(figsize=(9, 2.5 + 0.7 * len(sides)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(sides, 0.0)
    for i, kind in enumerate(kinds):
        widths = [next((row.median for row in rows if (row.case, row.side) == (kind, side)), 0.0) for side in sides]
        color = "0.85" if kind == "idle" else f"C{i}"
        axes.barh(sides, widths, left=list(left.values()), label=kind, color=color)
        left = {side: start + width for (side, start), width in zip(left.items(), widths)}
    axes.set_xlabel("ms/step, profiled")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, format="png", dpi=120)

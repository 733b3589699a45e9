"""The floors of a step and of a run as rows and as a table: :mod:`cifar_fast.floors` says what they are."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rows import Row, markdown
from cifar_fast.diagnostics.roofline import Pass, floors


def floor_rows(some: Sequence[Pass], steps: int, bandwidth: float, flops: float) -> list[Row]:
    """What a step of ``some`` passes computes and moves, and the floors of it and of a run of ``steps``."""
    rows = [
        Row("floors", "step", "computed", "arithmetic", "GFLOP", [sum(one.flop for one in some) / 1e9]),
        Row("floors", "step", "computed", "memory", "GB", [sum(one.bytes for one in some) / 1e9]),
    ]
    for name, seconds in floors(some, bandwidth, flops).items():
        rows.append(Row("floors", "step", "computed", f"{name} floor", "ms", [seconds * 1e3]))
        rows.append(Row("floors", f"run of {steps} steps", "computed", f"{name} floor", "s", [seconds * steps]))
    return rows


def table(some: Sequence[Pass], bandwidth: float, flops: float) -> str:
    """Each pass of a step: parameters, GFLOP, MB (10^6 bytes), FLOP/byte, its floor and what bounds it."""
    lines = []
    for one in some:
        floor = floors([one], bandwidth, flops)
        bound = "arithmetic" if floor["arithmetic"] > floor["memory"] else "memory"
        figures = f"{one.flop / 1e9:.3f}", f"{one.bytes / 1e6:.3f}", f"{one.flop / one.bytes:.1f}"
        parameters = f"{one.parameters:,}" if one.parameters else "-"
        lines.append((one.layer, one.name, parameters, *figures, f"{floor['overlapped'] * 1e6:.2f}", bound))
    return markdown(("layer", "pass", "parameters", "GFLOP", "MB", "FLOP/byte", "floor us", "bound by"), lines)

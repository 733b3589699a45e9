"""The floors of a step and of a run as rows and as a table: :mod:`cifar_fast.floors` says what they are."""

from __future__ import annotations

import torch

from benchmarks.rows import Row, markdown
from cifar_fast import InputError, Recipe
from cifar_fast.floors import floors, passes


def steps(recipe: Recipe, images: int) -> int:
    """Training steps of a run; the images of an epoch that fill no batch are dropped."""
    if images < recipe.batch_size:
        raise InputError(f"{images} images are fewer than one batch of {recipe.batch_size}")
    return recipe.epochs * (images // recipe.batch_size)


def floor_rows(
    recipe: Recipe, images: int, classes: int, dtype: torch.dtype, bandwidth: float, flops: float
) -> list[Row]:
    """The floors of a step and of a run as rows, with what a step computes and moves."""
    some, run = passes(recipe, classes, dtype), steps(recipe, images)
    step, whole = floors(some, bandwidth, flops), floors(some, bandwidth, flops, run)
    rows = [
        Row("floors", "step", "computed", "arithmetic", "GFLOP", [sum(one.flop for one in some) / 1e9]),
        Row("floors", "step", "computed", "memory", "GB", [sum(one.bytes for one in some) / 1e9]),
    ]
    for name in ("arithmetic", "memory", "overlapped", "no_overlap"):
        rows.append(Row("floors", "step", "computed", f"{name} floor", "ms", [getattr(step, name) * 1e3]))
        rows.append(Row("floors", f"run of {run} steps", "computed", f"{name} floor", "s", [getattr(whole, name)]))
    return rows


def table(recipe: Recipe, classes: int, dtype: torch.dtype, bandwidth: float, flops: float) -> str:
    """Each pass of a step: parameters, GFLOP, MB (10^6 bytes), FLOP/byte, its floor and what bounds it."""
    lines = []
    for one in passes(recipe, classes, dtype):
        floor = floors([one], bandwidth, flops)
        bound = "arithmetic" if floor.arithmetic > floor.memory else "memory"
        figures = f"{one.flop / 1e9:.3f}", f"{one.bytes / 1e6:.3f}", f"{one.flop / one.bytes:.1f}"
        parameters = f"{one.parameters:,}" if one.parameters else "-"
        lines.append((one.layer, one.name, parameters, *figures, f"{floor.overlapped * 1e6:.2f}", bound))
    return markdown(("layer", "pass", "parameters", "GFLOP", "MB", "FLOP/byte", "floor us", "bound by"), lines)

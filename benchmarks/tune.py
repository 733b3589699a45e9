"""``python -m benchmarks tune``: tune the entries of ``kernels/launch.json`` on this GPU, or predict for another one.

Training only reads the table. For each entry a few candidates are tried at the shapes of the recipe that use it, and
the sum of the operators' times decides. Entries are tried in the order of the file, each with the best of the entries
before it. A candidate must agree with plain torch, spill nothing, and access large tensors by 128 bits. ``--predict``
uses the minimum time of the compiled code (:meth:`benchmarks.instructions.Counted.seconds`), and half of the warps of a
multiprocessor must fit.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable

import torch
from triton.errors import TritonError

from benchmarks.compile import compile_launch
from benchmarks.instructions import CARDS, count_launch
from benchmarks.parts import measure_kernel
from benchmarks.rows import markdown
from cifar_fast import Recipe
from cifar_fast.diagnostics.kernel_cases import TimedCase, WrongResult, kernel_cases
from cifar_fast.kernels.launch import TABLE, Launch, Table, table, using
from cifar_fast.utils.files import atomic_write

Entry = dict[str, int]
TILES = ((16, 64), (32, 64), (64, 64), (32, 128))  # rows, channels


def candidates(key: str, current: Entry) -> list[Entry]:
    """Return the entries to try for ``key`` besides the ``current`` one."""
    if key == "augment":
        grid = [dict(block=block, num_warps=warps) for block in (512, 1024, 2048) for warps in (2, 4, 8)]
    elif key.endswith(".merge"):
        grid = [dict(channels=channels, num_warps=warps) for channels in (1, 2, 4, 8) for warps in (2, 4, 8)]
    else:
        grid = [dict(rows=rows, channels=channels) for rows, channels in TILES]
        if "splits" in current:
            grid = [tile | dict(splits=int(current["splits"] * by)) for tile in grid for by in (0.5, 1, 2)]
        if "blocks" in current:
            grid = [tile | dict(blocks=blocks) for tile in grid for blocks in (1, 2, 4, 8, 16)]
        grid = [tile | dict(num_warps=warps) for tile in grid for warps in (4, 8)]
    return [entry for entry in grid if entry != current]


def choose(current: Entry, twice: tuple[float, float], others: list[tuple[Entry, float]]) -> Entry:
    """Return the fastest entry if its gain is at least twice the noise, else the ``current`` one.

    The noise is the difference between the two times of the current entry. The time of an unusable entry is infinite.
    """
    best, time = min(others, key=lambda other: other[1])
    gain, noise = min(twice) - time, abs(twice[0] - twice[1])  # NaN if the current entry is unusable
    return current if gain <= 0 or gain < 2 * noise or math.isinf(time) else best


def cases_of(key: str, shape_class: str, cases: list[TimedCase], entries: Table) -> list[TimedCase]:
    """Return the cases whose launches depend on the entry of ``key`` for ``shape_class``."""

    def planned(case: TimedCase, entry: Entry) -> list[object]:
        with using(entries | {key: entries[key] | {shape_class: entry}}):
            return [(launch.grid, launch.constants, launch.num_warps) for launch in case.launches()]

    current = entries[key][shape_class]
    other = current | {"num_warps": 2 * current["num_warps"]}
    return [case for case in cases if planned(case, current) != planned(case, other)]


def layout(entries: Table) -> str:
    """Format ``entries`` as in ``launch.json``, with an entry per line."""
    return re.sub(r"{[^{}]*}", lambda entry: json.dumps(json.loads(entry[0])), json.dumps(entries, indent=2)) + "\n"


def check_compiled(case: TimedCase, launch: Launch, target: str) -> None:
    """Raise :class:`WrongResult` if ``launch`` spills or has narrow accesses when compiled for ``target``."""
    for problem in compile_launch(case.name, launch, target).problems():
        raise WrongResult(problem)


def time_case(case: TimedCase, trial: Table) -> float:
    """Return the microseconds of our kernel on the current GPU with the table ``trial``, if it is fit."""
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    with using(trial):
        for launch in case.launches():
            check_compiled(case, launch, target)
        time, *_ = measure_kernel(case, "fused")
    if not time.values:
        raise WrongResult(time.metric)
    return time.median


def predicting(target: str) -> Callable[[TimedCase, Table], float]:
    """Return a :func:`time_case` that predicts the time on the card of ``target`` from compiled code."""
    counted: dict[str, float] = {}

    def seconds(case: TimedCase, launch: Launch) -> float:
        check_compiled(case, launch, target)
        row = count_launch("", case.name, 1, launch, arch=target)
        if row.occupancy < 0.5:
            raise WrongResult(f"{row.kernel}: {row.occupancy:.0%} of the warps fit")
        return row.seconds(CARDS[target])

    def time_case(case: TimedCase, trial: Table) -> float:
        with using(trial):
            launches = case.launches()
        total = 0.0
        for launch in launches:
            tensors = [
                one if one is None else (one.dtype, one.shape) for one in (launch.reads | launch.writes).values()
            ]
            key = f"{launch.kernel.__name__} {launch.grid} {launch.num_warps} {launch.constants} {tensors}"
            if key not in counted:
                counted[key] = seconds(case, launch)
            total += 1e6 * counted[key]
        return total

    return time_case


def tune(dtype: torch.dtype, write: bool, time_case: Callable[[TimedCase, Table], float] = time_case) -> None:
    """Tune every entry and print the times. If ``write`` is true, write the best entries to ``kernels/launch.json``."""
    entries, cases = copy.deepcopy(table()), kernel_cases(Recipe(), dtype)

    def time(key: str, shape_class: str, entry: Entry) -> float:
        trial = entries | {key: entries[key] | {shape_class: entry}}
        try:
            return sum(time_case(case, trial) for case in cases_of(key, shape_class, cases, entries))
        except (TritonError, WrongResult) as error:
            print(f"{key} {entry}: unfit: {' '.join(str(error).split())[:60]}")
            return math.inf

    for key, shape_class in [(key, name) for key, of in entries.items() for name in of]:
        current = entries[key][shape_class]
        tried = [current, *candidates(key, current), current]  # the second time of the current entry shows the drift
        times = [time(key, shape_class, entry) for entry in tried]
        best = choose(current, (times[0], times[-1]), list(zip(tried[1:-1], times[1:-1])))
        entries[key][shape_class] = best
        lines = [
            (key, shape_class, str(entry), f"{us:.2f}", "best" * (entry == best)) for entry, us in zip(tried, times)
        ]
        print(markdown(("kernel", "class", "entry", "us", ""), lines) + "\n", flush=True)
    if write:
        with atomic_write(TABLE) as temporary:
            temporary.write_text(layout(entries))
        print(f"written to {TABLE}")

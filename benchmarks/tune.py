"""``python -m benchmarks tune``: the entries of ``kernels/launch.json``, tuned on this GPU, or predicted for another.

For offline use: what runs reads the table and times nothing. For each entry a few others are tried at the recipe's
shapes that take it; the sum of the operators' times decides. Entries are tried in the file's order, each with the best
of those before it. A candidate must agree with plain torch, spill nothing, and access large tensors by 128 bits. With
``--predict`` the times are those that the compiled code takes at the least
(:meth:`benchmarks.instructions.Counted.seconds`), and half of a multiprocessor's warps must fit.
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
from cifar_fast.diagnostics.kernel_cases import Case, Wrong, kernel_cases
from cifar_fast.kernels.launch import TABLE, Launch, Table, table, using
from cifar_fast.utils.files import atomic_write

Entry = dict[str, int]
TILES = ((16, 64), (32, 64), (64, 64), (32, 128))  # rows, channels


def candidates(key: str, current: Entry) -> list[Entry]:
    """The entries to try for ``key`` beside the ``current`` one."""
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
    """The fastest entry; the ``current``, timed ``twice``, unless the gain is at least twice its times' difference.

    Times are infinite where an entry cannot be used.
    """
    best, time = min(others, key=lambda other: other[1])
    gain, noise = min(twice) - time, abs(twice[0] - twice[1])  # not a number where the current one cannot be used
    return current if gain <= 0 or gain < 2 * noise or math.isinf(time) else best


def cases_of(key: str, shape_class: str, cases: list[Case], by: Table) -> list[Case]:
    """Those of ``cases`` whose launches are others under another entry of ``key`` for ``shape_class``."""

    def planned(case: Case, entry: Entry) -> list[object]:
        with using(by | {key: by[key] | {shape_class: entry}}):
            return [(launch.grid, launch.constants, launch.num_warps) for launch in case.launches()]

    current = by[key][shape_class]
    other = current | {"num_warps": 2 * current["num_warps"]}
    return [case for case in cases if planned(case, current) != planned(case, other)]


def layout(entries: Table) -> str:
    """``entries`` as the text of ``launch.json``: an entry per line."""
    return re.sub(r"{[^{}]*}", lambda entry: json.dumps(json.loads(entry[0])), json.dumps(entries, indent=2)) + "\n"


def compiled_for(case: Case, launch: Launch, target: str) -> None:
    """Raise :class:`Wrong` where ``launch`` is not compiled for ``target`` as a kernel must be."""
    for problem in compile_launch(case.name, launch, target).problems():
        raise Wrong(problem)


def time_case(case: Case, trial: Table) -> float:
    """Microseconds of the fused ``case`` planned by ``trial``, on the current GPU; :class:`Wrong` where it is unfit."""
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    with using(trial):
        for launch in case.launches():
            compiled_for(case, launch, target)
        time, *_ = measure_kernel(case, "fused")
    if not time.values:
        raise Wrong(time.metric)
    return time.median


def predicting(target: str) -> Callable[[Case, Table], float]:
    """As :func:`time_case`, on ``target``'s card, from what is compiled for it; each launch is counted once."""
    counted: dict[str, float] = {}

    def seconds(case: Case, launch: Launch) -> float:
        compiled_for(case, launch, target)
        row = count_launch("", case.name, 1, launch, target)
        if row.resident < 0.5:
            raise Wrong(f"{row.kernel}: {row.resident:.0%} of the warps fit")
        return row.seconds(CARDS[target])

    def time_case(case: Case, trial: Table) -> float:
        with using(trial):
            launches = case.launches()
        total = 0.0
        for launch in launches:
            tensors = {
                name: (one.dtype, one.shape) for name, one in (launch.reads | launch.writes).items() if one is not None
            }
            key = f"{launch.kernel.__name__} {launch.grid} {launch.num_warps} {launch.constants} {tensors}"
            if key not in counted:
                counted[key] = seconds(case, launch)
            total += 1e6 * counted[key]
        return total

    return time_case


def tune(dtype: torch.dtype, write: bool, time_case: Callable[[Case, Table], float] = time_case) -> None:
    """Tune every entry of the table and print what was timed; ``write`` the best to ``kernels/launch.json``."""
    entries, cases = copy.deepcopy(table()), kernel_cases(Recipe(), dtype)
    for key, shape_class in [(key, name) for key, of in entries.items() for name in of]:
        taken = cases_of(key, shape_class, cases, entries)

        def time(entry: Entry, key: str = key, shape_class: str = shape_class, taken: list[Case] = taken) -> float:
            trial = entries | {key: entries[key] | {shape_class: entry}}
            try:
                return sum(time_case(case, trial) for case in taken)
            except (TritonError, Wrong) as error:
                print(f"{key} {entry}: unfit: {' '.join(str(error).split())[:60]}")
                return math.inf

        current = entries[key][shape_class]
        tried = [current, *candidates(key, current), current]  # its second time has met any drift
        times = [time(entry) for entry in tried]
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

"""``python -m benchmarks tune``: the entries of ``kernels/launch.json``, tuned on this GPU.

For offline use: what runs reads the table and times nothing. For each entry a few others are tried at the recipe's
shapes that take it; the sum of the operators' times decides. Entries are tried in the file's order, each with the best
of those before it. A candidate must agree with plain torch and spill nothing; it is timed in a CUDA graph of many calls
that rotate over inputs of twice the L2 cache.
"""

from __future__ import annotations

import copy
import json
import math
import statistics

import torch
import triton
from triton.errors import TritonError

from benchmarks.cases import Case, Wrong, check, input_sets, kernel_cases
from benchmarks.compile import compile_launch
from benchmarks.rows import markdown
from benchmarks.timing import LAUNCHES, capture, replay_times
from cifar_fast import Recipe
from cifar_fast.files import atomic_write
from cifar_fast.kernels.launch import TABLE, Table, table, using

Entry = dict[str, int]
TILES = ((16, 64), (32, 64), (64, 64), (32, 128))  # rows, channels
# In which direction of the operator a key's kernel runs.
DIRECTIONS = {
    "augment": "forward",
    "batch_norm_celu.statistics": "forward",
    "batch_norm_celu.backward_sums": "backward",
    "batch_norm_celu.merge": "both",
    "batch_norm_celu.apply": "forward",
    "batch_norm_celu.pool_apply": "inference",
    "batch_norm_celu.backward_apply": "backward",
}


def candidates(key: str, current: Entry) -> list[Entry]:
    """The entries to try for ``key`` beside the ``current`` one."""
    if key == "augment":
        grid = [dict(block=block, num_warps=warps) for block in (512, 1024, 2048) for warps in (2, 4, 8)]
    elif key.endswith(".merge"):
        grid = [dict(channels=channels, num_warps=warps) for channels in (4, 8, 16) for warps in (4, 8)]
    else:
        grid = [dict(rows=rows, channels=channels) for rows, channels in TILES]
        if "splits" in current:
            grid = [tile | dict(splits=int(current["splits"] * by)) for tile in grid for by in (0.5, 1, 2)]
        grid = [tile | dict(num_warps=warps) for tile in grid for warps in (4, 8)]
    return [entry for entry in grid if entry != current]


def choose(current: Entry, twice: tuple[float, float], others: list[tuple[Entry, float]]) -> Entry:
    """The fastest entry; the ``current`` one, timed ``twice``, unless the gain is at least double its times'
    difference.

    Times are infinite where an entry cannot be used.
    """
    best, time = min(others, key=lambda other: other[1], default=(current, math.inf))
    if not math.isfinite(max(twice)):
        return best
    gain, noise = min(twice) - time, abs(twice[0] - twice[1])
    return best if gain > 0 and gain >= 2 * noise else current


def cases_of(key: str, shape_class: str, cases: list[Case], by: Table) -> list[Case]:
    """Those of ``cases`` in which the entry of ``key`` for ``shape_class`` is taken."""
    found = []
    for case in cases:
        if case.direction == DIRECTIONS[key] and (key == "augment") == case.name.startswith("augment"):
            channels = "*" if key == "augment" else str(triton.next_power_of_2(case.block.c_out))
            pooled = key != "batch_norm_celu.pool_apply" or case.block.pool == 2
            if pooled and (channels if channels in by[key] else "*") == shape_class:
                found.append(case)
    return found


def layout(entries: Table) -> str:
    """``entries`` as the text of ``launch.json``: an entry per line."""
    blocks = [
        f"  {json.dumps(key)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in of.items())
        + "\n  }"
        for key, of in entries.items()
    ]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def time_case(case: Case, trial: Table) -> list[float]:
    """Check the fused ``case`` planned by ``trial``, then time it on the current GPU: microseconds of a call."""
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    stream, target = torch.cuda.Stream(), "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    with using(trial), torch.cuda.stream(stream):
        for launch in case.launches():
            if spills := compile_launch(case.name, launch, target).spills:
                raise Wrong(f"{launch.kernel.__name__} spills {spills} bytes")
        sets = case.inputs(input_sets(case, cache), device)
        calls = case.calls("fused", sets)
        check(case, calls[0](), case.truth(sets[0]))
        graph, _, count = capture(calls, LAUNCHES, stream)
        return [seconds * 1e6 / count for seconds in replay_times(graph)]


def tune(dtype: torch.dtype, write: bool) -> None:
    """Tune every entry of the table and print what was timed; ``write`` the best to ``kernels/launch.json``."""
    entries, cases = copy.deepcopy(table()), kernel_cases(Recipe(), dtype)
    for key, shape_class in [(key, name) for key, of in entries.items() for name in of]:
        taken = cases_of(key, shape_class, cases, entries)

        def median(entry: Entry, key: str = key, shape_class: str = shape_class, taken: list[Case] = taken) -> float:
            trial = copy.deepcopy(entries)
            trial[key][shape_class] = entry
            try:
                return sum(statistics.median(time_case(case, trial)) for case in taken)
            except (TritonError, Wrong) as error:
                print(f"{key} {entry}: unfit: {' '.join(str(error).split())[:60]}")
                return math.inf

        current = entries[key][shape_class]
        tried = [current, *candidates(key, current), current]  # its second time has met any drift
        times = [median(entry) for entry in tried]
        best = choose(current, (times[0], times[-1]), list(zip(tried[1:-1], times[1:-1])))
        entries[key][shape_class] = best
        lines = [
            (key, shape_class, str(entry), f"{us:.2f}", "best" * (entry == best)) for entry, us in zip(tried, times)
        ]
        print(markdown(("kernel", "class", "entry", "us", ""), lines) + "\n", flush=True)
    if write:
        with atomic_write(TABLE) as draft:
            draft.write_text(layout(entries))
        print(f"written to {TABLE}")

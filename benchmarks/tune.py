"""``python -m benchmarks.tune [--dtype float16] [--write]``: the block sizes of ``kernels/launch.json``, tuned on this GPU.

For offline use: what runs reads the table and times nothing. For each entry of the table a few others
are tried at the recipe's shapes that take it, and the sum of their times decides; to tune a class of
its own, give it a line in the file first. Entries are tried in the file's order, each with the best of
those before it. A candidate must first agree with the operator in plain torch, on fresh random data
and into poisoned outputs, without a spill. It is then timed in a CUDA graph of many launches that
rotates over copies of its tensors, twice the L2 cache together, so that it starts from cold memory. A
reduction is timed with its merge, which pays for every stretch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
from triton.errors import TritonError

import kernels.launch
from benchmarks.launches import EPS, Case, recipe_cases
from benchmarks.predict import markdown, moved, touched
from cifar_fast import Recipe
from cifar_fast.files import replacing
from kernels.augment import augment_reference
from kernels.batch_norm_celu import batch_norm_celu_reference
from kernels.launch import FP_FUSION, TABLE, Launch

Entry = dict[str, int]
Table = dict[str, dict[str, Entry]]
TILES = ((16, 64), (32, 64), (64, 64), (32, 128))  # rows, channels
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-4}  # of ||result - expected|| / ||expected||
# The kernels whose time decides an entry of each key.
TIMED = {
    "augment": ("augment_kernel",),
    "batch_norm_celu.statistics": ("statistics_kernel", "merge_statistics_kernel"),
    "batch_norm_celu.backward_sums": ("backward_sums_kernel", "merge_sums_kernel"),
    "batch_norm_celu.merge": ("merge_statistics_kernel", "merge_sums_kernel"),
    "batch_norm_celu.apply": ("apply_kernel",),
    "batch_norm_celu.pool_apply": ("apply_kernel",),
    "batch_norm_celu.backward_apply": ("backward_apply_kernel",),
}
LAUNCHES = 50  # a graph, at least
REPLAYS = 15
WARM_UP = 3  # replays that do not count


class Unfit(Exception):
    """A candidate that may not be used."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds that the timed launches of a class take, median and range over replays, and the bytes they move."""

    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    moved: int = 0

    def __add__(self, other: Timing) -> Timing:
        return Timing(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


def candidates(key: str, current: Entry) -> list[Entry]:
    """The entries to try for ``key`` beside the ``current`` one."""
    if key == "augment":
        grid = [dict(block=block, num_warps=warps) for block in (512, 1024, 2048) for warps in (2, 4, 8)]
    elif key.endswith(".merge"):
        grid = [dict(channels=channels, num_warps=warps) for channels in (4, 8, 16) for warps in (4, 8)]
    else:
        grid = [dict(rows=rows, channels=channels) for rows, channels in TILES]
        if "stretches" in current:
            grid = [tile | dict(stretches=int(current["stretches"] * by)) for tile in grid for by in (0.5, 1, 2)]
        grid = [tile | dict(num_warps=warps) for tile in grid for warps in (4, 8)]
    return [entry for entry in grid if entry != current]


def choose(current: Entry, twice: tuple[float, float], others: list[tuple[Entry, float]]) -> Entry:
    """The fastest entry; the ``current`` one, timed ``twice``, unless the gain is at least double the difference of its times.

    Times are in microseconds, and infinite where the current entry cannot be used.
    """
    best, time = min(others, key=lambda other: other[1], default=(current, math.inf))
    if not math.isfinite(max(twice)):
        return best
    gain, noise = min(twice) - time, abs(twice[0] - twice[1])
    return best if gain > 0 and gain >= 2 * noise else current


def layout(table: Table) -> str:
    """``table`` as the text of ``launch.json``: an entry a line."""

    def block(entries: dict[str, Entry]) -> str:
        return ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())

    blocks = ",\n".join(f"  {json.dumps(key)}: {{\n{block(entries)}\n  }}" for key, entries in table.items())
    return f"{{\n{blocks}\n}}\n"


@contextlib.contextmanager
def planning_by(table: Table) -> Iterator[None]:
    """Planners read ``table`` in the place of the checked-in one."""
    before = kernels.launch._table
    kernels.launch._table = lambda: table
    try:
        yield
    finally:
        kernels.launch._table = before


def timed(key: str, launches: list[Launch]) -> list[Launch]:
    """Those of ``launches`` whose time the entries of ``key`` decide."""
    pools = {"batch_norm_celu.apply": (1,), "batch_norm_celu.pool_apply": (2,)}.get(key, (1, 2))
    return [launch for launch in launches if launch.kernel.__name__ in TIMED[key] and launch.constants.get("POOL", 1) in pools]


def cases_of(key: str, shape_class: str, table: Table, cases: list[Case]) -> list[Case]:
    """The cases whose launches take the entry of ``key`` for ``shape_class``."""

    def of(case: Case) -> str | None:
        channels = {str(triton.next_power_of_2(launch.constants["C"])) for launch in timed(key, case.launches())}
        return next((c if c in table[key] else "*" for c in channels), None)

    return [case for case in cases if of(case) == shape_class]


def on_memory(launches: list[Launch], device: torch.device) -> list[Launch]:
    """``launches`` on tensors that exist: random where a kernel reads before any has written, poisoned elsewhere."""
    made: dict[int, torch.Tensor] = {}
    placed = []
    for launch in launches:
        reads, _ = touched(launch)
        arguments = dict(launch.arguments)
        for name, meta in launch.arguments.items():
            if isinstance(meta, torch.Tensor):
                if id(meta) not in made:
                    tensor = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
                    made[id(meta)] = _random(name, tensor, launch) if name in reads else _poisoned(tensor)
                arguments[name] = made[id(meta)]
        placed.append(dataclasses.replace(launch, arguments=arguments))
    return placed


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def _random(name: str, tensor: torch.Tensor, launch: Launch) -> torch.Tensor:
    if tensor.is_floating_point():
        tensor.normal_(0 if name == "dy" else 1, 2)  # about 0, lest float16 overflow in the sums over dy
        if name == "statistics":
            tensor[1].uniform_(0.5, 2)
            tensor[2] = (tensor[1] + EPS).rsqrt()
        return tensor
    settings, given = launch.constants, launch.arguments
    below = {
        "images": 256,
        "indices": len(given["images"]),
        "crop": (settings["PADDING"] + 1) ** 2,
        "flip": 2,
        "cutout": (settings["S"] - settings["CUTOUT"] + 1) ** 2,
        "labels": 10,
        "step": len(given["indices"]) // len(given["out"]),
    }
    return tensor.random_(below[name])


def execute(launches: list[Launch]) -> None:
    """Run ``launches``, as ``kernels.launch.run`` does; raise :class:`Unfit` where one spills."""
    for launch in launches:
        compiled = launch.kernel[launch.grid](
            **launch.arguments, **launch.constants, num_warps=launch.num_warps, enable_fp_fusion=FP_FUSION
        )
        if spilled := getattr(compiled, "n_spills", 0):
            raise Unfit(f"{launch.kernel.__name__} spills {spilled}")


def check(launches: list[Launch]) -> None:
    """Raise :class:`Unfit` unless ``launches``, which have run, left what the operator in plain torch gives."""
    given: dict[str, torch.Tensor] = {}
    for launch in launches:
        given = launch.arguments | given  # "x" is the operator's where kernels after the first have another
    constants = {name: value for launch in reversed(launches) for name, value in launch.constants.items()}
    expected = _augmented(given, constants) if "images" in given else _normed(given, constants)
    for name, right in expected.items():
        result = given[name].to(right.dtype)
        error = ((result - right).norm() / right.norm()).item() if right.is_floating_point() else float(not torch.equal(result, right))
        limit = 0.0 if "images" in given else LIMITS[given[name].dtype]
        if not error <= limit:  # NaN, which what none wrote holds, is none either
            raise Unfit(f"{name} is off by {error:.1e}")


def _augmented(given: dict[str, torch.Tensor], constants: dict[str, int]) -> dict[str, torch.Tensor]:
    batch = len(given["out"])
    first = int(given["step"]) * batch
    choices = [given[name][first : first + batch] for name in ("indices", "crop", "flip", "cutout")]
    settings = dict(out_channels=constants["OUT_CHANNELS"], padding=constants["PADDING"], cutout_size=constants["CUTOUT"])
    out = augment_reference(given["images"], *choices, given["table"], **settings).permute(0, 2, 3, 1)
    return {"out": out.float(), "out_labels": given["labels"][choices[0]]}


def _normed(given: dict[str, torch.Tensor], constants: dict[str, int]) -> dict[str, torch.Tensor]:
    training = "dy" in given
    inputs = [given[name].double().requires_grad_(training) for name in ("x", "weight", "bias")]
    mean, var = given["statistics"][:2].double()  # a copy: training updates them
    settings = dict(training=training, eps=EPS, alpha=constants["ALPHA"], pool=constants["POOL"])
    y = batch_norm_celu_reference(*inputs, mean, var, **settings)
    gradients = torch.autograd.grad(y, inputs, given["dy"].double()) if training else ()
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients)))


def measure(key: str, case: Case, table: Table) -> Timing:
    """Check ``case`` planned by ``table``, then time its launches of ``key``, on the GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    with planning_by(table):
        launches = on_memory(case.launches(), device)
    execute(launches)
    check(launches)
    part = timed(key, launches)
    size = moved(part)
    sets = 1 + math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / size)
    calls = []
    for _ in range(sets):
        # In one call, so that a tensor which two launches share stays one tensor.
        own = copy.deepcopy([launch.arguments for launch in part])
        calls.append(partial(execute, [dataclasses.replace(launch, arguments=arguments) for launch, arguments in zip(part, own)]))
    for call in calls:
        call()
    graph, _, count = capture(calls, LAUNCHES / len(part))
    times = [seconds * 1e6 / count for seconds in replay_times(graph)]
    return Timing(statistics.median(times), min(times), max(times), size)


def capture(
    calls: Sequence[Callable[[], Any]], least: float, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, list[Any], int]:
    """A CUDA graph in which ``calls``, each of which has run before, take turns until there are ``least``.

    What a call gives is kept until its next turn, so that outputs rotate through memory as inputs do.

    Args:
        stream: where to capture, if not on one that torch chooses.

    Returns:
        The graph, what each call gave in the last turn, and how many calls the graph holds.
    """
    count = len(calls) * math.ceil(least / len(calls))
    outputs: list[Any] = [None] * len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            outputs[i % len(calls)] = calls[i % len(calls)]()
    return graph, outputs, count


def replay_times(graph: torch.cuda.CUDAGraph) -> list[float]:
    """Seconds of each of several replays, after some that do not count."""
    times = []
    for _ in range(WARM_UP + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times[WARM_UP:]


def tune(key: str, shape_class: str, table: Table, cases: list[Case]) -> Entry:
    """Time the entry and its candidates over ``cases``, print them, and give the one to use."""

    def time(entry: Entry) -> Timing | str:
        trial = copy.deepcopy(table)
        trial[key][shape_class] = entry
        try:
            return sum((measure(key, case, trial) for case in cases), Timing())
        except (TritonError, Unfit) as error:
            return f"unfit: {' '.join(str(error).split())[:60]}"

    current = table[key][shape_class]
    tried = [(entry, time(entry)) for entry in (current, *candidates(key, current), current)]  # its second time has met any drift
    medians = [timing.median if isinstance(timing, Timing) else math.inf for _, timing in tried]
    others = [(entry, median) for (entry, _), median in zip(tried[1:-1], medians[1:-1]) if median < math.inf]
    best = choose(current, (medians[0], medians[-1]), others)
    rows = []
    for entry, timing in tried:
        mark = ", ".join(name for name, marked in (("current", current), ("best", best)) if entry == marked)
        spread, rate = timing, ""
        if isinstance(timing, Timing):
            spread, rate = f"{timing.median:.2f} ({timing.low:.2f} to {timing.high:.2f})", f"{timing.moved / timing.median / 1e3:.0f}"
        rows.append((key, shape_class, " ".join(f"{name} {value}" for name, value in entry.items()), mark, spread, rate))
    print(markdown(("kernel", "class", "entry", "", "us, median (min to max)", "GB/s"), rows, 4) + "\n", flush=True)
    return best


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own); gives the exit code, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--write", action="store_true", help="write the best entries to kernels/launch.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: tuning needs a CUDA GPU", file=sys.stderr)
        return 2
    if kernels.launch.interpreted():
        print("error: TRITON_INTERPRET=1 is set, under which nothing is compiled; unset it", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{properties.name}, L2 {properties.L2_cache_size / 1e6:.0f} MB, {versions}, {args.dtype}, batch {Recipe().batch_size}\n")
    cases = recipe_cases(Recipe(), getattr(torch, args.dtype))
    table: Table = json.loads(TABLE.read_text())
    for key, entries in table.items():
        for shape_class in entries:
            if own := cases_of(key, shape_class, table, cases):
                entries[shape_class] = tune(key, shape_class, table, own)
            else:
                print(f"{key}, {shape_class}: no shape of the recipe takes this entry; it stays\n")
    if args.write:
        with replacing(TABLE) as draft:
            draft.write_text(layout(table))
        print(f"written to {TABLE}; python -m benchmarks.aot shows whether other GPUs spill with it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

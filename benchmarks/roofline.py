"""``python -m benchmarks.roofline``: what a training step computes and moves, and the times that this takes at the least.

For a batch of B pictures, a 3x3 convolution from C_in to C_out channels at H x W takes, forward, for the data gradient
and for the weight gradient, each

    9 C_in C_out H W B multiply-adds = 18 C_in C_out H W B FLOP,

products with the zeros of the padding among them, as is usual. The first layer needs no data gradient. A linear layer
from C to K takes C K B multiply-adds each. The arithmetic of norm, CELU, pool and optimiser, of which matrix units do
none, is not counted. With F FLOP and M bytes, at f FLOP a second (matrix rate) and b bytes a second (copy bandwidth),

    floor of a pass = max(F / f, M / b)        (the roofline of Williams, Waterman and Patterson, 2009)

and a step has three: arithmetic alone, sum F / f; each pass overlapping its own memory, the sum of the passes' floors;
and nothing overlapping, sum F / f + sum M / b, a floor for what overlaps nothing. They are computed: of the recipe
nothing is timed.

M counts each tensor that a pass reads or writes once, in the passes that our kernels make. With X the values that enter
a convolution, Y those that leave it, and P those that the pool leaves (Y, where there is none):

    convolution    forward reads X, writes Y; data gradient reads dY, writes dX; weight gradient reads dY and X;
                   the first two also read the weights, the third writes their gradient
    norm + CELU    forward: statistics read Y, and with a pool write P and its argmax (a byte a value); apply reads P, writes as many
                   backward: reduce reads dP and P; apply reads both, with a pool the argmax too, and writes dY
    head           its pool reads Y and writes P and the argmax, backward the reverse; its linear layer as a convolution
    augmentation   reads a picture's bytes, its four draws and its label (int64); writes its three channels and the label
    optimiser      reads weights, gradients and momentum, writes weights and momentum

Weights have the activations' dtype, but float32 with bfloat16, as the trainer has them. Left out: the norms' values that
are one a channel, under a thousandth of a step at the reference; the reductions' partial results, whose number the
choice of blocks decides; the loss; an epoch's draws; launches; evaluation. What a cache keeps from one pass to the next
saves its trip: where a layer's tensors fit into one, memory can take less than M / b.

    python -m benchmarks.roofline [--device cuda] [--dtype float16] [--batch-size 512] [--json FILE]
    python -m benchmarks.roofline --bandwidth 4.3e12 --flops 790e12     # ceilings of a GPU that need not be here
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.launches import PICTURES
from benchmarks.predict import markdown, rate
from cifar_fast import Recipe
from cifar_fast.choose import DTYPES, choose
from cifar_fast.errors import InputError
from cifar_fast.flags import Parser, run_command
from cifar_fast.recipe import IMAGE_SIZE
from cifar_fast.results import environment

COPY_BYTES = {"cuda": 2**29, "cpu": 2**28}  # of a buffer; there are four, more than a cache holds
MATRIX_SIZE = {"cuda": 8192, "cpu": 4096}
TIMED = {"cuda": (50, 50), "cpu": (2, 7)}  # runs that do not count, while clocks rise, and runs that do


@dataclass(frozen=True)
class Pass:
    """One pass of a layer over a whole batch.

    ``phase``: augmentation, forward, backward or optimiser. ``parameters``: those the layer has, at its
    forward pass only, so that passes sum to the model's. Bytes are read and written ones together, and
    weights' are those of weights, their gradients and momentum.
    """

    layer: str
    name: str
    phase: str
    multiply_adds: int
    activation_bytes: int
    weight_bytes: int = 0
    parameters: int = 0

    @property
    def flop(self) -> int:
        return 2 * self.multiply_adds

    @property
    def bytes(self) -> int:
        return self.activation_bytes + self.weight_bytes


@dataclass(frozen=True)
class Ceilings:
    """Bytes and FLOP a second that a device reaches: medians, with the slowest and the fastest; no range where given."""

    bandwidth: float
    flops: float
    bandwidth_range: tuple[float, float] | None = None
    flops_range: tuple[float, float] | None = None

    def __str__(self) -> str:
        def shown(rate: float, unit: str, limits: tuple[float, float] | None) -> str:
            how = "measured, {:,.1f} to {:,.1f}".format(*(limit / 1e9 for limit in limits)) if limits else "given"
            return f"{rate / 1e9:,.1f} {unit} ({how})"

        copy, product = shown(self.bandwidth, "GB/s", self.bandwidth_range), shown(self.flops, "GFLOP/s", self.flops_range)
        return f"copy bandwidth {copy}, matrix rate {product}"


@dataclass(frozen=True)
class Floors:
    """Seconds of some passes: all FLOP at the matrix rate, all bytes at the copy bandwidth, and the longer of the two pass by pass."""

    arithmetic: float
    memory: float
    overlapped: float

    @property
    def no_overlap(self) -> float:
        return self.arithmetic + self.memory

    @property
    def bound(self) -> str:
        return "arithmetic" if self.arithmetic > self.memory else "memory"


def layers(recipe: Recipe, classes: int, dtype: torch.dtype) -> list[Pass]:
    """Every pass of a training step over a batch, layer by layer; the module's docstring says what is counted.

    ``dtype`` is the activations'. Raises :class:`InputError` for fewer than two classes.
    """
    if classes < 2:
        raise InputError(f"classes must be at least 2, not {classes}")
    batch, element = recipe.batch_size, dtype.itemsize
    weight_element = 4 if dtype == torch.bfloat16 else element
    passes: list[Pass] = []

    def add_product(layer: str, x: int, y: int, weights: int, multiply_adds: int, first: bool = False) -> None:
        """A convolution or linear layer: each of its passes moves as many values, those it takes (x), gives (y) and learns."""
        moved = (x + y) * element, weights * weight_element
        passes.append(Pass(layer, "forward", "forward", multiply_adds, *moved, parameters=weights))
        gradients = ("weight gradient",) if first else ("data gradient", "weight gradient")
        passes.extend(Pass(layer, name, "backward", multiply_adds, *moved) for name in gradients)

    picture = 3 * IMAGE_SIZE**2
    passes.append(Pass("augmentation", "gather", "augmentation", 0, batch * (picture * (1 + element) + 6 * 8)))
    size, c_in = IMAGE_SIZE, 3
    for i, (c_out, pools) in enumerate(zip(recipe.widths, recipe.pools), 1):
        x, y = batch * c_in * size**2, batch * c_out * size**2
        p, argmax = (y // 4, y // 4) if pools else (y, 0)
        add_product(f"conv{i} {c_in}->{c_out} {size}x{size}", x, y, 9 * c_in * c_out, 9 * c_in * y, first=i == 1)
        norm = f"norm{i} {c_out}x{size}x{size}{', pool' if pools else ''}"
        kept = p * element + argmax if pools else 0
        passes.append(Pass(norm, "forward", "forward", 0, (y + 2 * p) * element + kept, parameters=2 * c_out))
        passes.append(Pass(norm, "backward", "backward", 0, (4 * p + y) * element + argmax))
        size, c_in = size // (1 + pools), c_out

    pooled = batch * c_in
    if size > 1:
        moved = (pooled * size**2 + pooled) * element + pooled  # the argmax
        passes += [Pass(f"head pool {c_in}x{size}x{size}", phase, phase, 0, moved) for phase in ("forward", "backward")]
    add_product(f"head linear {c_in}->{classes}", pooled, batch * classes, c_in * classes, pooled * classes)
    update = 5 * sum(row.parameters for row in passes) * weight_element
    return [*passes, Pass("optimiser", "update", "optimiser", 0, 0, update)]


def steps(recipe: Recipe, pictures: int) -> int:
    """Training steps of a run; the pictures of an epoch that fill no batch are dropped."""
    if pictures < recipe.batch_size:
        raise InputError(f"{pictures} pictures are fewer than one batch of {recipe.batch_size}")
    return recipe.epochs * (pictures // recipe.batch_size)


def floors(passes: Sequence[Pass], ceilings: Ceilings, repeats: int = 1) -> Floors:
    """The floors of ``passes``, all of them done ``repeats`` times."""
    times = [(row.flop / ceilings.flops, row.bytes / ceilings.bandwidth) for row in passes]
    arithmetic, memory = (math.fsum(column) for column in zip(*times))
    return Floors(arithmetic * repeats, memory * repeats, math.fsum(map(max, times)) * repeats)


def ceilings(device: torch.device, dtype: torch.dtype, bandwidth: float | None = None, flops: float | None = None) -> Ceilings:
    """What is not given is measured: a copy's bytes a second, read and written ones, and FLOP a second of a product in ``dtype``."""
    if flops is None and (device.type, dtype) == ("cpu", torch.float16):
        raise InputError("a CPU's float16 products take minutes, and are no ceiling; use --dtype bfloat16 or float32, or give --flops")
    bandwidth_range = flops_range = None
    if bandwidth is None:
        bandwidth, bandwidth_range = _median_and_range(_copy_rates(device))
    if flops is None:
        flops, flops_range = _median_and_range(_product_rates(device, dtype))
    return Ceilings(bandwidth, flops, bandwidth_range, flops_range)


def _median_and_range(values: list[float]) -> tuple[float, tuple[float, float]]:
    return statistics.median(values), (min(values), max(values))


def _copy_rates(device: torch.device) -> list[float]:
    size = COPY_BYTES[device.type]
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    pairs = [(source, source.clone()), (source.clone(), source.clone())]  # in turn, lest a copy find what the last one left in a cache
    return [2 * size / seconds for seconds in _timed(lambda i: pairs[i % 2][1].copy_(pairs[i % 2][0]), device)]


def _product_rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    size = MATRIX_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))  # not zeros, which draw less power and so run faster
    out, before = torch.empty_like(a), torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions of float32 use on a GPU unless told not to
    try:
        return [2 * size**3 / seconds for seconds in _timed(lambda i: torch.mm(a, b, out=out), device)]
    finally:
        torch.set_float32_matmul_precision(before)


def _timed(call: Callable[[int], object], device: torch.device) -> list[float]:
    """Seconds of each of several runs of ``call``, which takes the run's number."""
    warm_up, runs = TIMED[device.type]
    if device.type == "cpu":
        times = []
        for i in range(warm_up + runs):
            start = time.perf_counter()
            call(i)
            times.append(time.perf_counter() - start)
        return times[warm_up:]
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(warm_up + runs + 1)]
        events[0].record()
        for i, event in enumerate(events[1:]):
            call(i)
            event.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in zip(events[warm_up:], events[warm_up + 1 :])]


def report(recipe: Recipe, passes: Sequence[Pass], ceilings: Ceilings, run: int) -> str:
    """Two tables, of the passes and of the totals for a step and for a run of ``run`` steps; MB and GB are 10^6 and 10^9 bytes."""
    header = ("layer", "pass", "parameters", "GFLOP", "MB", "FLOP/byte", "floor us", "bound by")
    rows = []
    for row in passes:
        floor = floors([row], ceilings)
        figures = f"{row.flop / 1e9:.3f}", f"{row.bytes / 1e6:.3f}", f"{row.flop / row.bytes:.1f}", f"{floor.overlapped * 1e6:.2f}"
        rows.append((row.layer, row.name, f"{row.parameters:,}" if row.parameters else "-", *figures, floor.bound))

    phases = {phase: [row for row in passes if row.phase == phase] for phase in dict.fromkeys(row.phase for row in passes)}
    totals = []
    for name, part, repeats in (*((*phase, 1) for phase in phases.items()), ("a step", passes, 1), (f"a run, {run:,} steps", passes, run)):
        floor = floors(part, ceilings, repeats)
        sums = (repeats * sum(getattr(row, what) for row in part) for what in ("flop", "activation_bytes", "weight_bytes"))
        seconds = floor.arithmetic, floor.memory, floor.overlapped, floor.no_overlap
        totals.append((name, *(f"{value / 1e9:,.3f}" for value in sums), *(f"{value * 1e3:,.3f}" for value in seconds)))
    times = ("arithmetic ms", "memory ms", "overlap in a pass ms", "no overlap ms")
    columns = ("total", "GFLOP", "activations GB", "weights GB", *times)

    kinds = {"convolutions": "conv", "batch norm": "norm", "linear": "head"}
    counts = {kind: sum(row.parameters for row in passes if row.layer.startswith(start)) for kind, start in kinds.items()}
    forward, both = (sum(row.multiply_adds for row in part) / recipe.batch_size for part in (phases["forward"], passes))
    return "\n\n".join(
        (
            "### Floors, a pass over a batch",
            markdown(header, rows, 2),
            "### Floors, a step and a run",
            markdown(columns, totals, 1),
            f"{sum(counts.values()):,} parameters ({' + '.join(f'{kind} {count:,}' for kind, count in counts.items())}). "
            f"A picture: {forward / 1e6:,.1f} M multiply-adds = {2 * forward / 1e9:.3f} GFLOP forward, "
            f"{2 * both / 1e9:.3f} GFLOP forward and backward.",
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own); gives the exit code, 2 for bad input."""
    return run_command(lambda: _command(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the ceilings that are not given are measured"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16; where a CPU is measured, bfloat16 or float32")
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--pictures", type=int, default=PICTURES, metavar="N", help=f"training pictures (default: {PICTURES})")
    parser.add_argument("--bandwidth", type=rate, metavar="X", help="bytes a second of a copy, reads and writes both counted")
    parser.add_argument("--flops", type=rate, metavar="Y", help="FLOP a second of a matrix product in the dtype")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    for flag, nargs in (("--batch-size", None), ("--widths", "+"), ("--epochs", None)):
        parser.add_argument(flag, type=int, nargs=nargs, metavar="N", help="of the recipe (default: the reference's)")
    return parser


def _command(args: argparse.Namespace) -> int:
    changes = {name: getattr(args, name) for name in ("batch_size", "widths", "epochs")}
    recipe = dataclasses.replace(Recipe(), **{name: value for name, value in changes.items() if value is not None})
    where, facts, dtype = "given ceilings", None, getattr(torch, args.dtype or "float16")
    given = args.bandwidth and args.flops
    if not given:
        choice = choose("eager", args.device, args.dtype or "auto")
        facts, dtype = environment(choice.device), choice.dtype
        where = facts["device_name"]
    passes, run = layers(recipe, args.classes, dtype), steps(recipe, args.pictures)  # before a measurement, lest it be in vain
    limits = Ceilings(args.bandwidth, args.flops) if given else ceilings(choice.device, dtype, args.bandwidth, args.flops)
    name = str(dtype).removeprefix("torch.")
    if args.json:
        figures: dict[str, Any] = {"what": "floors, from sizes and two ceilings; nothing of the recipe was timed", "environment": facts}
        figures |= {"recipe": asdict(recipe), "dtype": name, "classes": args.classes, "pictures": args.pictures, "steps": run}
        figures |= {"ceilings": asdict(limits), "step": _facts(floors(passes, limits)), "run": _facts(floors(passes, limits, run))}
        figures["passes"] = [asdict(row) | {"flop": row.flop, "bytes": row.bytes} | _facts(floors([row], limits)) for row in passes]
        try:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"--json {args.json}: cannot be written ({error.strerror or error})") from None
    print(f"## Floors for {where}, {name}, batch {recipe.batch_size}: no measurement of the recipe\n\n{limits}\n")
    print(report(recipe, passes, limits, run))
    return 0


def _facts(floor: Floors) -> dict[str, Any]:
    return asdict(floor) | {"no_overlap": floor.no_overlap, "bound": floor.bound}


if __name__ == "__main__":
    sys.exit(main())

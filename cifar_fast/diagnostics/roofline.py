"""What a training step computes and moves, and the times that this takes at the least.

For a batch of B images, a 3x3 convolution from C_in to C_out channels at H x W takes, forward, for the data gradient
and for the weight gradient, each

    9 C_in C_out H W B multiply-adds = 18 C_in C_out H W B FLOP,

products with the zeros of the padding among them, as is usual. The first layer needs no data gradient. A linear layer
from C to K takes C K B multiply-adds each. The arithmetic of norm, CELU, pool and optimizer, of which matrix units do
none, is not counted. With F FLOP and M bytes, at f FLOP/s (matrix rate) and b bytes/s (copy bandwidth),

    floor of a pass = max(F / f, M / b)        (the roofline of Williams, Waterman and Patterson, 2009)

and a step has three: arithmetic alone, sum F / f; each pass overlapping its own memory, the sum of the passes' floors;
and nothing overlapping, sum F / f + sum M / b. They are computed: of the recipe nothing is timed.

M counts each tensor that a pass reads or writes once, in the passes that our kernels make. A convolution's or linear
layer's three passes take one of input, weights and output from the other two; norm and augmentation move what the
docstrings in kernels/ list; the head's pool reads its input and writes its output and a byte per value of argmax,
backward the reverse; the optimizer reads weights, gradients and momentum, and writes weights and momentum. Weights have
the activations' dtype, but float32 with bfloat16, as the trainer has them. Left out: values per channel, under a
thousandth of a step at the reference; the reductions' partial results; the loss; an epoch's draws; launches;
evaluation. What a cache keeps from one pass to the next saves its trip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cifar_fast.model import parameter_dtype
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE, Recipe
from cifar_fast.utils.device import device_timer
from cifar_fast.utils.errors import InputError

COPY_BYTES = {"cuda": 2**29, "cpu": 2**28}  # of a buffer; there are four, more than a cache holds
MATRIX_SIZE = {"cuda": 8192, "cpu": 4096}
RUNS = {"cuda": (50, 50), "cpu": (2, 7)}  # those that do not count, while clocks rise, and those that do


@dataclass(frozen=True)
class Pass:
    """One pass of a layer over a batch. ``parameters``: those of the layer, at its forward pass only."""

    layer: str
    name: str
    flop: int
    bytes: int
    parameters: int = 0


def passes(recipe: Recipe, classes: int, dtype: torch.dtype) -> list[Pass]:
    """Every pass of a training step over a batch, layer by layer. ``dtype`` is the activations'."""
    batch, element = recipe.batch_size, dtype.itemsize
    weight_element = parameter_dtype(dtype).itemsize
    found: list[Pass] = []

    def add_product(layer: str, x: int, y: int, weights: int, flop: int, first: bool = False) -> None:
        """A convolution or linear layer: each of its passes moves as many values."""
        size = (x + y) * element + weights * weight_element
        found.append(Pass(layer, "forward", flop, size, weights))
        gradients = ("weight gradient",) if first else ("data gradient", "weight gradient")
        found.extend(Pass(layer, name, flop, size) for name in gradients)

    image = IMAGE_CHANNELS * IMAGE_SIZE**2
    found.append(Pass("augmentation", "gather", 0, batch * (image * (1 + element) + 6 * 8)))
    for block in recipe.blocks():
        x, y = batch * block.c_in * block.size**2, batch * block.c_out * block.size**2
        p, argmax = y // block.pool**2, y // 4 if block.pool == 2 else 0
        name = f"conv{block.index} {block.c_in}->{block.c_out} {block.size}x{block.size}"
        weights = 9 * block.c_in * block.c_out
        add_product(name, x, y, weights, 18 * block.c_in * y, first=block.index == 1)
        kept = p * element + argmax if block.pool == 2 else 0
        norm = f"norm{block.index} {block.name}"
        found.append(Pass(norm, "forward", 0, (y + 2 * p) * element + kept, 2 * block.c_out))
        found.append(Pass(norm, "backward", 0, (4 * p + y) * element + argmax))

    channels, size = recipe.widths[-1], recipe.final_size
    pooled = batch * channels
    if size > 1:
        moved = (pooled * size**2 + pooled) * element + pooled  # the argmax
        found += [Pass(f"head pool {channels}x{size}x{size}", name, 0, moved) for name in ("forward", "backward")]
    add_product(f"head linear {channels}->{classes}", pooled, batch * classes, channels * classes, 2 * pooled * classes)
    update = 5 * sum(one.parameters for one in found) * weight_element
    return [*found, Pass("optimizer", "update", 0, update)]


def floors(some: Sequence[Pass], bandwidth: float, flops: float) -> dict[str, float]:
    """The least seconds of some passes at bytes/s and FLOP/s, by what may overlap."""
    times = [(one.flop / flops, one.bytes / bandwidth) for one in some]
    arithmetic, memory = (math.fsum(column) for column in zip(*times))
    overlapped = math.fsum(map(max, times))
    return dict(arithmetic=arithmetic, memory=memory, overlapped=overlapped, no_overlap=arithmetic + memory)


def copy_bandwidth(device: torch.device, runs: tuple[int, int] | None = None) -> list[float]:
    """Bytes/s of copies, read and written ones counted."""
    size = COPY_BYTES[device.type]
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    # In turn, so that no copy finds in a cache what the last one left there.
    pairs = [(source, source.clone()), (source.clone(), source.clone())]
    return [2 * size / seconds for seconds in _timed(lambda i: pairs[i % 2][1].copy_(pairs[i % 2][0]), device, runs)]


def matmul_flops(
    device: torch.device, dtype: torch.dtype, runs: tuple[int, int] | None = None, size: int | None = None
) -> list[float]:
    """FLOP/s of a product of square matrices of random numbers, ``size`` a side; in float32 on a GPU with TF32, which
    convolutions use too.
    """
    if (device.type, dtype) == ("cpu", torch.float16):
        raise InputError("a CPU's float16 products take minutes, and are no ceiling; use --dtype bfloat16 or float32")
    size = size or MATRIX_SIZE[device.type]
    # Not zeros, which draw less power and so run faster.
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, before = torch.empty_like(a), torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        return [2 * size**3 / seconds for seconds in _timed(lambda i: torch.mm(a, b, out=out), device, runs)]
    finally:
        torch.set_float32_matmul_precision(before)


def _timed(call: Callable[[int], object], device: torch.device, runs: tuple[int, int] | None) -> list[float]:
    """Seconds of each of several ``runs`` of ``call``, which takes the run's number; by default as RUNS says."""
    warm_up, counted = runs or RUNS[device.type]
    clock, seconds = device_timer(device), []
    for i in range(warm_up + counted):
        start = clock()
        call(i)
        seconds.append(clock() - start)
    return seconds[warm_up:]

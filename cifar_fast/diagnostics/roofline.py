"""Cost of a training step in FLOP and bytes, and lower bounds of its time from the roofline model.

A 3x3 convolution from C_in to C_out channels at H x W on a batch of B images has three passes: forward, data gradient
and weight gradient. Each takes

    9 C_in C_out H W B multiply-adds = 18 C_in C_out H W B FLOP.

This counts products with the zeros of the padding, as is usual. The first layer needs no data gradient. A linear layer
from C to K features takes C K B multiply-adds in each pass. The arithmetic of norm, CELU, pool and optimizer is not
counted, because matrix units do none of it. For F FLOP and M bytes, at f FLOP/s (of a matrix product) and b bytes/s
(of a copy),

    floor of a pass = max(F / f, M / b)        (the roofline of Williams, Waterman and Patterson, 2009).

A step has three lower bounds. Arithmetic alone: sum F / f. If each pass overlaps only its own memory traffic: the sum
of the floors. If nothing overlaps: sum F / f + sum M / b. All are computed; nothing of the recipe is timed.

M counts each tensor once for each pass that reads it and once for each that writes it. The passes are those of our
kernels. The three passes of a convolution or linear layer each access input, weights and output, or their gradients.
Norm and augmentation access what the docstrings in kernels/ list. The pool of the head reads its input and writes its
output and an argmax byte per value; backward is the reverse. The optimizer reads weights, gradients and momentum, and
writes weights and momentum. Weights have the dtype of the activations, except float32 weights with bfloat16
activations.

Left out are: values per channel (less than a thousandth of a step of the reference), partial results of reductions,
the loss, the random draws, launches and evaluation. A cache may keep a tensor from one pass to the next, which saves
its traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cifar_fast.backends.optimizers import NEWTON_SCHULZ_STEPS
from cifar_fast.model import parameter_dtype
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE, WHITENED_CHANNELS, WHITENING_SIZE, Recipe
from cifar_fast.utils.device import device_timer
from cifar_fast.utils.errors import InputError, option

COPY_BYTES = {"cuda": 2**29, "cpu": 2**28}  # of each of four buffers, which together exceed any cache
MATRIX_SIZE = {"cuda": 8192, "cpu": 4096}
RUNS = {"cuda": (50, 50), "cpu": (2, 7)}  # warm-up runs, in which clocks rise, and timed runs


@dataclass(frozen=True)
class Pass:
    """One pass of a layer over a batch. ``parameters`` is the layer's count in its forward pass and 0 in others."""

    layer: str
    name: str
    flop: int
    bytes: int
    parameters: int = 0


def layer_costs(recipe: Recipe, num_classes: int, dtype: torch.dtype) -> list[Pass]:
    """Return every pass of a training step, layer by layer. ``dtype`` is the dtype of the activations."""
    batch, element = recipe.batch_size, dtype.itemsize
    weight_element = parameter_dtype(dtype).itemsize
    costs: list[Pass] = []

    def add_product(layer: str, x: int, y: int, weights: int, flop: int, first: bool = False) -> None:
        """Add a convolution or linear layer, all of whose passes move the same number of bytes."""
        size = (x + y) * element + weights * weight_element
        costs.append(Pass(layer, "forward", flop, size, weights))
        gradients = ("weight gradient",) if first else ("data gradient", "weight gradient")
        costs.extend(Pass(layer, name, flop, size) for name in gradients)

    image = IMAGE_CHANNELS * IMAGE_SIZE**2
    trained = 2 if recipe.network == "cnn" else 1  # values of a norm for each channel
    costs.append(Pass("augmentation", "gather", 0, batch * (image * (1 + element) + 6 * 8)))
    if recipe.network == "whitened":  # its filters are fixed
        size = IMAGE_SIZE + 1 - WHITENING_SIZE
        x, y = batch * image, batch * WHITENED_CHANNELS * size**2
        weights = WHITENED_CHANNELS * IMAGE_CHANNELS * WHITENING_SIZE**2
        flop = 2 * IMAGE_CHANNELS * WHITENING_SIZE**2 * y
        costs.append(Pass("whitening", "forward", flop, (x + y) * element + weights * weight_element))
    for block in recipe.blocks():
        x, y = batch * block.c_in * block.size**2, batch * block.c_out * block.size**2
        p, argmax = y // block.pool**2, y // 4 if block.pool == 2 else 0
        name = f"conv{block.index} {block.c_in}->{block.c_out} {block.size}x{block.size}"
        weights = 9 * block.c_in * block.c_out
        add_product(name, x, y, weights, 18 * block.c_in * y, first=block.index == 1 and recipe.network == "cnn")
        saved = p * element + argmax if block.pool == 2 else 0
        norm = f"norm{block.index} {block.name}"
        costs.append(Pass(norm, "forward", 0, (y + 2 * p) * element + saved, trained * block.c_out))
        costs.append(Pass(norm, "backward", 0, (4 * p + y) * element + argmax))

    channels, size = recipe.widths[-1], recipe.final_size
    pooled = batch * channels
    if size > 1:
        moved = (pooled * size**2 + pooled) * element + pooled  # the last term is the argmax
        costs += [Pass(f"head pool {channels}x{size}x{size}", name, 0, moved) for name in ("forward", "backward")]
    weights = channels * num_classes
    add_product(f"head linear {channels}->{num_classes}", pooled, batch * num_classes, weights, 2 * batch * weights)
    update = 5 * sum(cost.parameters for cost in costs) * weight_element
    return [*costs, Pass("optimizer", "update", _muon_flop(recipe) if recipe.optimizer == "muon" else 0, update)]


def _muon_flop(recipe: Recipe) -> int:
    """Return the operations of :func:`cifar_fast.backends.optimizers.orthogonalize` in a step."""
    total = 0
    for block in recipe.blocks():
        rows, columns = sorted((block.c_out, 9 * block.c_in))
        total += NEWTON_SCHULZ_STEPS * (4 * rows**2 * columns + 2 * rows**3)
    return total


def roofline_times(costs: Sequence[Pass], bandwidth: float, flops: float) -> dict[str, float]:
    """Return lower bounds in seconds at ``bandwidth`` bytes/s and ``flops`` FLOP/s. Each key says what may overlap."""
    times = [(cost.flop / flops, cost.bytes / bandwidth) for cost in costs]
    arithmetic, memory = (math.fsum(column) for column in zip(*times))
    overlapped = math.fsum(map(max, times))
    return dict(arithmetic=arithmetic, memory=memory, overlapped=overlapped, no_overlap=arithmetic + memory)


def copy_bandwidth(device: torch.device, runs: tuple[int, int] | None = None) -> list[float]:
    """Measure the bytes/s of copies, counting reads and writes.

    ``runs``: the number of warm-up runs and the number of timed runs.
    """
    size = COPY_BYTES[device.type]
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    # Alternate, so that no copy finds its buffers in a cache.
    pairs = [(source, source.clone()), (source.clone(), source.clone())]
    return [2 * size / seconds for seconds in _timed(lambda i: pairs[i % 2][1].copy_(pairs[i % 2][0]), device, runs)]


def matmul_flops(
    device: torch.device, dtype: torch.dtype, runs: tuple[int, int] | None = None, size: int | None = None
) -> list[float]:
    """Measure the FLOP/s of products of random square matrices of ``size`` rows.

    In float32 on a GPU they use TF32, as the convolutions do. ``runs``: the number of warm-up runs and the number of
    timed runs.
    """
    if (device.type, dtype) == ("cpu", torch.float16):
        raise InputError(f"float16 products take minutes on a CPU; set {option('dtype')} to bfloat16 or float32")
    size = size or MATRIX_SIZE[device.type]
    # Random numbers, because products of zeros draw less power and run faster.
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, before = torch.empty_like(a), torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        return [2 * size**3 / seconds for seconds in _timed(lambda i: torch.mm(a, b, out=out), device, runs)]
    finally:
        torch.set_float32_matmul_precision(before)


def _timed(call: Callable[[int], object], device: torch.device, runs: tuple[int, int] | None) -> list[float]:
    """Return the seconds of each timed run of ``call``, which takes the number of the run."""
    warm_up, counted = runs or RUNS[device.type]
    return [wall(partial(call, i), device) for i in range(warm_up + counted)][warm_up:]


def wall(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of ``call``, including the work of the device."""
    clock = device_timer(device)
    start = clock()
    call()
    return clock() - start

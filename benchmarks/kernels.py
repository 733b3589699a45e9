"""Device time of the recipe's kernels, of eager torch and of torch.compile of the same expression, each checked first.

A case is an operator at one of the recipe's shapes, in one direction; an implementation gives calls of it,
one an input set. :func:`measure` refuses a call whose result is not that of plain torch in float64 (bit for
bit, where the operator only moves pixels), and then times it in two ways:

    in a loop    many calls in one CUDA graph, over input sets in turn that touch twice the L2 cache together; outputs take turns too
    cold         a graph of one call, after a buffer larger than the L2 cache was written; the graph's own launch is in it

The loop is checked as well: its outputs are poisoned, and must be right after one more replay.

Bytes are those of ``benchmarks/predict.py``: ``ideal`` is the operator's, whoever computes it; ``moved`` is known
of our kernels alone. A rate over the ideal bytes thus compares implementations, and over the moved ones shows
how well our kernels use the memory. In training no implementation keeps running statistics, which are a few
values a channel that the compiled step updates on its own. Norm parameters are float32 with bfloat16, as in the trainer; the
prediction has them in bfloat16, which is under a thousandth of the bytes.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.launches import EPS, PICTURES, augment_launches, evaluation_launches, norm_launches
from benchmarks.predict import KERNELS, ideal, moved
from benchmarks.tune import LAUNCHES, LIMITS, REPLAYS, WARM_UP, capture, replay_times
from cifar_fast import Draws, Recipe
from cifar_fast.augment import augment as augment_in_torch
from cifar_fast.recipe import IMAGE_SIZE
from kernels.augment import augment, augment_reference
from kernels.batch_norm_celu import batch_norm_celu, batch_norm_celu_reference
from kernels.launch import Launch

IMPLEMENTATIONS = ("fused", "eager", "compiled")
# Of ||result - expected|| / ||expected||. Eager's float16 rounds what enters CELU's steep exponential: 0.9 of the tuner's limit was seen.
TOLERANCES = LIMITS | {torch.float16: 5e-3}
DIRECTIONS = ("forward", "backward", "both")
Tensors = dict[str, torch.Tensor]
Call = Callable[[], Tensors]
"""A run of a case on an input set that it holds; gives the outputs by name, in new memory."""


class Wrong(Exception):
    """A result that may not be timed."""


@dataclass(frozen=True)
class Augmentation:
    """A batch out of a data set of ``pictures``, in ``out_channels`` channels."""

    recipe: Recipe
    dtype: torch.dtype
    out_channels: int
    pictures: int = PICTURES
    direction: str = "forward"
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        return f"augment to {self.out_channels} channels"

    def launches(self) -> list[Launch]:
        """The planned launch, on tensors without memory."""
        return augment_launches(self.recipe, self.dtype, self.out_channels)

    def inputs(self, sets: int, device: torch.device) -> list[Tensors]:
        """``sets`` batches' choices, all of them out of one data set of random bytes."""
        options = (self.recipe.crop_padding + 1) ** 2, 2, (IMAGE_SIZE + 1 - self.recipe.cutout_size) ** 2
        shared = {
            "images": torch.randint(256, (self.pictures, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, device=device),
            "labels": torch.randint(10, (self.pictures,), device=device),
            "table": torch.randn(3, 256, device=device).to(self.dtype),
        }
        size, found = self.recipe.batch_size, []
        for _ in range(sets):
            choices = (torch.randint(below, (size,), device=device) for below in (self.pictures, *options))
            found.append(shared | dict(zip(("indices", "crop", "flip", "cutout"), choices)))
        return found

    def calls(self, implementation: str, sets: Sequence[Tensors]) -> list[Call]:
        """A call for each of ``sets``."""
        settings = dict(padding=self.recipe.crop_padding, cutout_size=self.recipe.cutout_size, out_channels=self.out_channels)

        def in_torch(labels: torch.Tensor, indices: torch.Tensor, **tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return augment_reference(indices=indices, **tensors, **settings), labels[indices]

        def fused(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return augment(**tensors, **settings)

        function = {"fused": fused, "eager": in_torch}.get(implementation) or _compiled(in_torch)

        def call(given: Tensors) -> Call:
            return lambda: dict(zip(("out", "out_labels"), function(**given)))

        return [call(given) for given in sets]

    def truth(self, given: Tensors) -> Tensors:
        """By the eager backend's augmentation, which gathers normalised pictures."""
        indices, channels = given["indices"], torch.arange(3, device=given["images"].device)
        normalised = given["table"][channels, given["images"][indices].long()]
        draws = Draws(torch.arange(len(indices), device=indices.device), given["crop"], given["flip"], given["cutout"])
        batch = augment_in_torch(normalised, draws, self.recipe)
        return {"out": F.pad(batch, (0, 0, 0, 0, 0, self.out_channels - 3)), "out_labels": given["labels"][indices]}


@dataclass(frozen=True)
class Norm:
    """(Max-pool,) batch norm and CELU of x ``[N, C, H, W]``: ``shape``, before the pool.

    ``direction``: forward, backward or both, in training; or evaluation.
    """

    shape: tuple[int, int, int, int]
    pool: int
    alpha: float
    dtype: torch.dtype
    direction: str

    @property
    def name(self) -> str:
        _, channels, height, width = self.shape
        return f"{channels}x{height}x{width}{', pool' if self.pool == 2 else ''}"

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    def launches(self) -> list[Launch]:
        """The planned launches of this direction, on tensors without memory."""
        if self.direction == "evaluation":
            return evaluation_launches(self.shape, self.pool, self.dtype, self.alpha)
        launches = norm_launches(self.shape, self.pool, self.dtype, self.alpha)
        return [launch for launch in launches if self.direction in ("both", KERNELS[launch.kernel.__name__][0])]

    def inputs(self, sets: int, device: torch.device) -> list[Tensors]:
        """``sets`` of random tensors, whose memory none shares."""
        n, channels, height, width = self.shape
        parameters = torch.float32 if self.dtype == torch.bfloat16 else self.dtype

        def activations(height: int, width: int, mean: float) -> torch.Tensor:
            tensor = torch.empty(n, height, width, channels, dtype=self.dtype, device=device)
            return tensor.normal_(mean, 2).permute(0, 3, 1, 2)

        def values(mean: float, deviation: float) -> torch.Tensor:
            return torch.empty(channels, dtype=parameters, device=device).normal_(mean, deviation)

        found = []
        for _ in range(sets):
            given = {"x": activations(height, width, 1), "weight": values(1, 0.3), "bias": values(0, 0.3)}
            if self.direction == "evaluation":
                given |= {"running_mean": values(1, 0.3), "running_var": values(4, 0.3).abs()}
            elif self.direction != "forward":
                given["dy"] = activations(height // self.pool, width // self.pool, 0)  # lest float16 overflow in the sums over it
            found.append(given)
        return found

    def calls(self, implementation: str, sets: Sequence[Tensors]) -> list[Call]:
        """A call for each of ``sets``; for a backward pass, after the forward pass that it needs."""
        operator = batch_norm_celu if implementation == "fused" else batch_norm_celu_reference

        def forward(*tensors: torch.Tensor | None) -> torch.Tensor:
            return self._apply(operator, *tensors)

        if implementation == "compiled":
            forward = _compiled(forward)
        return [self._call(forward, given) for given in sets]

    def truth(self, given: Tensors) -> Tensors:
        """In plain torch and float64."""

        def forward(*tensors: torch.Tensor | None) -> torch.Tensor:
            return self._apply(batch_norm_celu_reference, *tensors)

        return self._call(forward, {name: tensor.double() for name, tensor in given.items()})()

    def _apply(self, operator: Callable[..., torch.Tensor], *tensors: torch.Tensor | None) -> torch.Tensor:
        return operator(*tensors, training=self.direction != "evaluation", eps=EPS, alpha=self.alpha, pool=self.pool)

    def _call(self, forward: Callable[..., torch.Tensor], given: Tensors) -> Call:
        learnt = [given[name].detach().requires_grad_(self.direction != "evaluation") for name in ("x", "weight", "bias")]
        tensors = *learnt, given.get("running_mean"), given.get("running_var")

        def gradients(y: torch.Tensor, again: bool) -> Tensors:
            return dict(zip(("dx", "dweight", "dbias"), torch.autograd.grad(y, learnt, given["dy"], retain_graph=again)))

        def both() -> Tensors:
            y = forward(*tensors)
            return {"y": y} | gradients(y, again=False)

        if self.direction == "both":
            return both
        if self.direction == "backward":
            with _saved_tensors_kept():
                y = forward(*tensors)

            def backward() -> Tensors:
                with _saved_tensors_kept():
                    return gradients(y, again=True)

            return backward
        return lambda: {"y": forward(*tensors)}


Case = Augmentation | Norm


def cases(recipe: Recipe, dtype: torch.dtype) -> list[Case]:
    """Every distinct shape at which ``recipe`` augments and norms, in each direction; evaluation where that takes another kernel."""
    found: list[Case] = [Augmentation(recipe, dtype, channels) for channels in (3, 4, 8)]
    size, shapes = IMAGE_SIZE, []
    for channels, pooled in zip(recipe.widths, recipe.pools):
        shapes.append(((recipe.batch_size, channels, size, size), 1 + pooled))
        size //= 1 + pooled
    for shape, pool in dict.fromkeys(shapes):
        directions = (*DIRECTIONS, "evaluation") if pool == 2 else DIRECTIONS
        found += [Norm(shape, pool, recipe.celu_alpha, dtype, direction) for direction in directions]
    return found


def check(case: Case, outputs: Tensors, expected: Tensors) -> None:
    """Raise :class:`Wrong` unless ``outputs`` are what ``case.truth`` expects: all of them, in shape, type and value."""
    if outputs.keys() != expected.keys():
        raise Wrong(f"{case.name}, {case.direction}: gave {', '.join(outputs)} and not {', '.join(expected)}")
    for name, right in expected.items():
        result = outputs[name].detach()
        if result.shape != right.shape:
            raise Wrong(f"{case.name}, {case.direction}: {name} has the shape {list(result.shape)} and not {list(right.shape)}")
        if name in ("y", "dx", "out") and result.dtype != case.dtype:
            raise Wrong(f"{case.name}, {case.direction}: {name} is {result.dtype} and not {case.dtype}")
        result, right = result.double(), right.detach().double()
        error = ((result - right).norm() / right.norm()).item()
        if not error <= case.tolerance:  # NaN, which what none wrote holds, is none either
            raise Wrong(f"{case.name}, {case.direction}: {name} is off by {error:.1e}")


def check_replay(case: Case, graph: torch.cuda.CUDAGraph, outputs: Tensors, expected: Tensors) -> None:
    """Raise :class:`Wrong` unless a replay of ``graph`` writes ``outputs``, poisoned before, and writes them right."""
    for tensor in outputs.values():
        tensor.detach().fill_(math.nan if tensor.is_floating_point() else -1)
    graph.replay()
    check(case, outputs, expected)


def bytes_of(case: Case) -> tuple[int, int]:
    """Bytes that ``case`` needs to move, each of its tensors once in a direction, and that our kernels move."""
    launches = case.launches()
    parts = [[launch for launch in launches if KERNELS[launch.kernel.__name__][0] == part] for part in ("augment", "forward", "backward")]
    return sum(map(ideal, parts)), moved(launches)


def input_sets(case: Case, cache: int) -> int:
    """How many input sets touch twice a ``cache`` of so many bytes before the first of them comes again."""
    return 1 + math.ceil(2 * cache / bytes_of(case)[0])


def measure(case: Case, implementation: str, copy_bandwidth: float) -> dict[str, Any]:
    """Check ``implementation`` of ``case``, then time it, on the current GPU.

    Gives what :func:`figures` makes of the times. ``copy_bandwidth``: bytes a second, those read and those
    written. Raises :class:`Wrong`.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    torch.manual_seed(0)
    stream = torch.cuda.Stream()  # a backward pass runs where its forward pass did, and must not leave the capture
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sets = case.inputs(input_sets(case, cache), device)
        calls, expected = case.calls(implementation, sets), case.truth(sets[0])
        check(case, calls[0](), expected)
        for call in calls:
            call()
        graph, outputs, count = capture(calls, LAUNCHES, stream)
        times = [time / count for time in replay_times(graph)]
        check_replay(case, graph, outputs[0], expected)
        cold = cold_times(calls[0], cache, stream)
        launches = count_launches(calls[0])  # last, so that no profiler has been there when a time is taken
    torch.cuda.current_stream().wait_stream(stream)
    return figures(case, implementation, times, cold, launches, copy_bandwidth)


def cold_times(call: Callable[[], object], cache: int, stream: torch.cuda.Stream) -> list[float]:
    """Seconds of single runs of ``call``, each after a buffer of four times the L2 ``cache``, 256 MiB at least, was written."""
    graph, _, _ = capture([call], 1, stream)
    buffer = torch.empty(max(4 * cache, 2**28) // 4, dtype=torch.int32, device=stream.device)
    events = []
    for i in range(WARM_UP + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.fill_(i)  # which takes longer than to enqueue what follows
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events[WARM_UP:]]


def count_launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that ``call`` puts on the GPU; None where the profiler sees nothing of it."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    # an annotation spans the kernels that ran in it, which are there themselves
    return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in trace.events()) or None


def figures(
    case: Case, implementation: str, times: Sequence[float], cold: Sequence[float], launches: int | None, copy_bandwidth: float
) -> dict[str, Any]:
    """What is said of a case. ``times``: seconds of a call in the loop, one figure a replay, and ``seconds`` their median.

    Rates are of that median, in 10^9 bytes a second: ``gbps`` and ``percent_of_copy`` count the ideal bytes, ``moved_gbps``
    and ``moved_percent_of_copy`` those that our kernels move, unknown (None) of others. ``launches`` were counted, ``planned_launches``
    are our kernels; the rest of an operator's launches are torch's.
    """
    least, all_bytes = bytes_of(case)
    warm, ours = statistics.median(times), implementation == "fused"
    rate, moved_rate = least / warm, all_bytes / warm if ours else None
    return {
        "case": f"{case.name}, {case.direction}",
        "dtype": str(case.dtype).removeprefix("torch."),
        "implementation": implementation,
        "times": list(times),
        "seconds": warm,
        "ideal_bytes": least,
        "moved_bytes": all_bytes if ours else None,
        "gbps": rate / 1e9,
        "percent_of_copy": 100 * rate / copy_bandwidth,
        "moved_gbps": moved_rate and moved_rate / 1e9,
        "moved_percent_of_copy": moved_rate and 100 * moved_rate / copy_bandwidth,
        "copy_gbps": copy_bandwidth / 1e9,
        "cold_seconds": statistics.median(cold),
        "cold_percent_of_copy": 100 * least / statistics.median(cold) / copy_bandwidth,
        "launches": launches,
        "planned_launches": len(case.launches()) if ours else None,
    }


class DeviceClock:
    """A timer for pytest-benchmark that shows device time: it stands still but for what is added to it, in seconds."""

    __name__ = "device"  # under which pytest-benchmark names it

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # graphs of earlier cases would count against the limit of recompilations
    return torch.compile(function, fullgraph=True, dynamic=False)


def _saved_tensors_kept() -> contextlib.AbstractContextManager[None]:
    """Compiled meanwhile, a backward pass writes into nothing that its forward pass saved, and so can run again."""
    return torch._functorch.config.patch(donated_buffer=False)

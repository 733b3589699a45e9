"""Show where the time of a training step goes: a trace to look at, and a table with a line for each kind of work.

:func:`profile` trains a few steps under torch.profiler. On a GPU the name of a kernel decides its line, because kernels
that are replayed from a CUDA graph belong to no operator. On a CPU, the time that an operator spends itself belongs to
the line that its name selects. If the name selects none, the time belongs to the line of the caller. Eager makes a
batch with operators of many uses, so the profiler marks that part of a step.

Time in which nothing ran is ``idle``. The profiler adds to the step, so a step takes a little longer here than in
training. If the host has to launch every kernel, this shows as idle time.

The lines sum to the step. Idle time is the wall time minus the union of the intervals in which a kernel ran. Kernels
that overlap last longer together than that union. The other lines are therefore the kernels' durations,
multiplied by one factor: the length of the union divided by the sum of the durations. Without overlap the factor is 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from cifar_fast.backends.base import Backend
from cifar_fast.data.augment import Draws
from cifar_fast.utils.device import device_guard, environment, short_name
from cifar_fast.utils.errors import InputError, option
from cifar_fast.utils.files import atomic_write, check_writable, expand_home, os_error_as_input_error, write_json
from cifar_fast.utils.progress import LOGGER
from cifar_fast.utils.torch_defaults import torch_defaults

WARM_UP_STEPS = 2
NAMES = re.compile(rb'("(?:host_name|traceName)": *)"[^"]*"')
"""Names of host and folder in a trace."""

AUGMENT = "our kernels: augmentation"
NORM_FORWARD = "our kernels: batch norm + activation forward"
NORM_BACKWARD = "our kernels: batch norm + activation backward"
CONV_FORWARD = "convolutions forward"
CONV_DATA = "convolutions data gradient"
CONV_WEIGHT = "convolutions weight gradient"
CONV_BACKWARD = "convolutions backward"  # on a CPU one operator computes both gradients
CONV_UNKNOWN_PASS = "convolutions, unknown pass"  # Winograd and FFT kernels serve several passes
BATCH = "augmentation"
POOL = "max-pool"
PLAIN_NORM_FORWARD = "batch norm forward"
PLAIN_NORM_BACKWARD = "batch norm backward"
ACTIVATION = "activation"
LINEAR = "linear layer"
LOSS = "loss and accuracy"
LAYOUT = "layout changes"
OPTIMIZER = "optimizer"
OTHER = "other"
IDLE = "idle"
LINES = (
    *(CONV_FORWARD, CONV_DATA, CONV_WEIGHT, CONV_BACKWARD, CONV_UNKNOWN_PASS, LAYOUT),
    *(AUGMENT, NORM_FORWARD, NORM_BACKWARD, BATCH, POOL, PLAIN_NORM_FORWARD, PLAIN_NORM_BACKWARD, ACTIVATION),
    *(LINEAR, LOSS, OPTIMIZER, OTHER, IDLE),
)

KERNELS = (  # the first pattern that matches the name of a kernel decides
    (AUGMENT, r"^augment_kernel$"),
    (NORM_FORWARD, r"^(statistics|merge_statistics|apply)_kernel$"),
    (NORM_BACKWARD, r"^(backward_sums|merge_sums|backward_apply)_kernel$"),
    (OTHER, r"^triton_"),  # torch.compile names its kernels after the operators around them, even convolutions
    (OPTIMIZER, r"multi_tensor_apply_kernel|FusedSgd"),
    (CONV_WEIGHT, r"[wW]grad|scudnn_\w*stridedB_splitK"),
    (CONV_DATA, r"[dD]grad|scudnn_\w*stridedB"),
    (LAYOUT, r"(nchw|nhwc|Nhwc)To[A-Z]|nhwcAddPadding"),
    (CONV_UNKNOWN_PASS, r"winograd|fft2d|gcgemm|flip_filter|im2col|cask\w*::compute|cudnn\w*::reduction"),
    (CONV_FORWARD, r"[fF]prop|convFwd|convolve|conv2d|scudnn"),
)
OPERATORS = (
    (AUGMENT, r"cifar_fast::augment"),
    (NORM_BACKWARD, r"cifar_fast(::|_)batch_norm_act\w*[bB]ackward"),
    (NORM_FORWARD, r"cifar_fast::batch_norm_act"),
    (CONV_BACKWARD, r"conv(olution|2d)_backward|ConvolutionBackward"),
    (CONV_FORWARD, r"::\w*conv(olution|2d)"),
    (OPTIMIZER, r"^Optimizer\.|::_fused_sgd_|::_foreach_"),
    (BATCH, rf"^{BATCH}$"),
    (POOL, r"max_pool2d|MaxPool2D"),
    (PLAIN_NORM_BACKWARD, r"batch_norm_backward|BatchNormBackward"),
    (PLAIN_NORM_FORWARD, r"batch_norm"),
    (ACTIVATION, r"::(celu|elu|relu|gelu|silu|threshold)|(Celu|Elu|Relu|Gelu|Silu|Threshold)Backward"),
    (LOSS, r"cross_entropy|nll_loss|NllLoss|log_softmax|LogSoftmax"),
    (LINEAR, r"::(linear|addmm|mm)$|(Linear|Addmm|Mm)Backward"),
)
OPERATORS_WITHOUT_CALLER = ((LOSS, r"::(argmax|eq|sum|where|mul)$|(Where|Sum|Mul)Backward"),)
"""Operators of many uses, which compute the loss if no other line called them."""


@dataclass(frozen=True)
class Row:
    """One line of the table, per step. ``share`` is a fraction of the step, 0 to 1.

    ``launches`` counts kernels. On a CPU it counts operators whose caller does not belong to the same line.
    """

    line: str
    milliseconds: float
    share: float
    launches: float


@dataclass(frozen=True)
class Table:
    """The content of ``profile.json``. The rows sum to ``step_milliseconds``, the wall time of a step."""

    environment: dict[str, Any]
    backend: str
    dtype: str
    batch_size: int
    steps: int
    step_milliseconds: float
    rows: list[Row]

    def __str__(self) -> str:
        rows = [*self.rows, Row("step", self.step_milliseconds, 1.0, sum(row.launches for row in self.rows))]
        facts = f"{self.backend}, {self.dtype}, {self.environment['device_name']}"
        lines = [f"{self.steps} steps of {self.batch_size} images, {facts}"]
        lines.append(f"{'':46} {'ms/step':>9} {'share':>8} {'launches':>9}")
        lines += [f"{row.line:46} {row.milliseconds:9.3f} {row.share:8.1%} {row.launches:9.1f}" for row in rows]
        return "\n".join(lines)


def classify_kernel(name: str) -> str:
    """Return the line of a kernel, copy or fill on a GPU, by its name in the profiler."""
    return next((line for line, pattern in KERNELS if re.search(pattern, name)), OTHER)


def classify_operator(name: str) -> str:
    """Return the line of an operator on a CPU by its name alone, or ``OTHER``."""
    return next((line for line, pattern in OPERATORS if re.search(pattern, name)), OTHER)


def profile(backend: Backend, draws: Draws, directory: str | Path, steps: int = 5) -> Table:
    """Train and trace ``steps`` steps of ``backend``, which must have been reset.

    Write ``trace.json``, for https://ui.perfetto.dev or chrome://tracing, and the table as ``profile.json``. Log the
    lines of the table.

    Args:
        draws: the random draws of an epoch, on the device of the backend. They are used again if the epoch is short.
        directory: folder of the two files, which are replaced.
        steps: number of traced steps.

    Raises:
        InputError: the directory cannot be written to, or the profiler sees no kernel on the GPU.
    """
    directory = expand_home(directory)
    what = f"{option('output')} {directory}"
    with os_error_as_input_error(what):
        directory.mkdir(parents=True, exist_ok=True)
    check_writable(directory, what)

    cuda = backend.device.type == "cuda"
    finish = torch.cuda.synchronize if cuda else lambda: None
    training = itertools.chain.from_iterable(backend.train_epoch(draws) for _ in range(WARM_UP_STEPS + steps))
    with device_guard(backend.device), torch_defaults(backend.device):
        for _ in itertools.islice(training, WARM_UP_STEPS):
            pass
        finish()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines, "gpuGetDeviceCount failed" too
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with marked_batches(backend), torch.profiler.profile(activities=activities, acc_events=True) as trace:
            start = time.perf_counter()
            for _ in itertools.islice(training, steps):
                pass
            finish()
            wall = 1e6 * (time.perf_counter() - start)

    table = Table(
        environment=environment(backend.device),
        backend=backend.name,
        dtype=short_name(backend.dtype),
        batch_size=backend.recipe.batch_size,
        steps=steps,
        step_milliseconds=wall / steps / 1000,
        rows=table_rows(*(kernel_work if cuda else operator_work)(trace.events()), wall, steps),
    )
    with os_error_as_input_error(what), atomic_write(directory / "trace.json") as temporary:
        trace.export_chrome_trace(str(temporary))
        _blank_names(temporary)
    write_json(directory / "profile.json", dataclasses.asdict(table), what, "choose another folder")
    for line in str(table).splitlines():
        LOGGER.info(line)
    return table


def _blank_names(trace: Path) -> None:
    """Replace the names of host and folder, near the start and the end of a trace, by as many spaces."""
    with open(trace, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        for start in (0, max(0, size - 65536)):
            file.seek(start)
            block = file.read(65536)
            file.seek(start)
            file.write(NAMES.sub(lambda found: (found[1] + b'""').ljust(len(found[0])), block))


@contextlib.contextmanager
def marked_batches(backend: Backend) -> Iterator[None]:
    """Mark the operators on a CPU that make a batch, inside the block. One operator of ours makes it in ``fused``."""
    if backend.device.type != "cpu" or backend.name == "fused":
        yield
        return
    make = backend.batch

    def batch(draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.profiler.record_function(BATCH):
            return make(draws)

    backend.batch = batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backend.batch


Work = list[tuple[str, float, bool]]
"""Line, microseconds, and whether this counts as a launch."""


def gpu_events(events: Iterable[FunctionEvent]) -> list[FunctionEvent]:
    """Return the kernels, copies and fills on a GPU."""
    # An annotation spans kernels that have events of their own.
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def kernel_work(events: Iterable[FunctionEvent]) -> tuple[Work, float]:
    """Return the work of the GPU, and the microseconds in which any kernel ran."""
    kernels = gpu_events(events)
    if not kernels:
        raise InputError(
            "the profiler saw no kernel on the GPU; it needs CUPTI and permission to use the GPU's counters"
        )
    work = [(classify_kernel(event.name), event.time_range.elapsed_us(), True) for event in kernels]
    return work, covered((event.time_range.start, event.time_range.end) for event in kernels)


def operator_work(events: Iterable[FunctionEvent]) -> tuple[Work, float]:
    """Return the work of the CPU, each operator without the operators that it called, and the sum of microseconds."""
    work = []
    for event in events:
        line, parent = _line(event), event.cpu_parent
        work.append((line, event.self_cpu_time_total, parent is None or _line(parent) != line))
    return work, sum(microseconds for _, microseconds, _ in work)


def _line(event: FunctionEvent) -> str:
    """Return the line of an operator, or of its nearest caller that has one."""
    line = classify_operator(event.name)
    if line != OTHER:
        return line
    if event.cpu_parent and (line := _line(event.cpu_parent)) != OTHER:
        return line
    return next((line for line, pattern in OPERATORS_WITHOUT_CALLER if re.search(pattern, event.name)), OTHER)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of ``intervals``, each a start and an end."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def table_rows(work: Work, busy: float, wall: float, steps: int) -> list[Row]:
    """Return the lines that occurred, including the idle time, from the microseconds of ``steps`` steps."""
    busy = min(busy, wall)  # the clocks of device and host may differ by a little
    times: dict[str, float] = defaultdict(float, {IDLE: wall - busy})
    launches: Counter[str] = Counter()
    factor = busy / (sum(microseconds for _, microseconds, _ in work) or 1)
    for line, microseconds, launch in work:
        times[line] += microseconds * factor
        launches[line] += launch
    return [
        Row(line, times[line] / steps / 1000, times[line] / wall, launches[line] / steps)
        for line in LINES
        if line in times
    ]

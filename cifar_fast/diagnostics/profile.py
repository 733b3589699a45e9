"""Where the time of a training step goes: a trace to look at, and a table with a line for each kind of work.

:func:`profile` trains a few steps under torch.profiler. On a GPU a kernel's time goes to the line that its name
tells, because kernels replayed from a CUDA graph belong to no operator. On a CPU an operator's own time goes to
the line that its name tells, or, where that tells none, to the line of whatever called it. Time in which nothing
ran is the line ``idle``. The profiler's own cost is in the step, so that a step is a little longer here than in
training; where the host has to launch every kernel, that shows as idle time.

The lines sum to the step. Idle time is the wall time less the union of the intervals in which a kernel ran. Kernels
that overlap last longer together than that union, so all other lines are the kernels' durations times one factor, the
length of the union over the sum of the durations: 1 where nothing overlaps.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
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
from cifar_fast.utils.errors import InputError
from cifar_fast.utils.files import atomic_write, check_writable, os_error_as_input_error
from cifar_fast.utils.progress import LOGGER
from cifar_fast.utils.torch_defaults import torch_defaults

UNTRACED = 2  # steps before the trace, for what only the first ones do

AUGMENT = "our kernels: augmentation"
NORM_FORWARD = "our kernels: batch norm + CELU forward"
NORM_BACKWARD = "our kernels: batch norm + CELU backward"
CONV_FORWARD = "convolutions forward"
CONV_DATA = "convolutions data gradient"
CONV_WEIGHT = "convolutions weight gradient"
CONV_BACKWARD = "convolutions backward"  # on a CPU one operator gives both gradients
CONV_UNKNOWN_PASS = "convolutions, unknown pass"  # Winograd and FFT serve several
LAYOUT = "layout changes"
OPTIMISER = "optimiser"
OTHER = "other"
IDLE = "idle"
LINES = (
    *(CONV_FORWARD, CONV_DATA, CONV_WEIGHT, CONV_BACKWARD, CONV_UNKNOWN_PASS, LAYOUT),
    *(AUGMENT, NORM_FORWARD, NORM_BACKWARD, OPTIMISER, OTHER, IDLE),
)

KERNELS = (  # the first pattern found in a kernel's name decides
    (AUGMENT, r"^augment_kernel$"),
    (NORM_FORWARD, r"^(statistics|merge_statistics|apply)_kernel$"),
    (NORM_BACKWARD, r"^(backward_sums|merge_sums|backward_apply)_kernel$"),
    (OTHER, r"^triton_"),  # the compiler's, named after the operators next to them, convolutions too
    (OPTIMISER, r"multi_tensor_apply_kernel|FusedSgd"),
    (CONV_WEIGHT, r"[wW]grad|scudnn_\w*stridedB_splitK"),
    (CONV_DATA, r"[dD]grad|scudnn_\w*stridedB"),
    (LAYOUT, r"(nchw|nhwc|Nhwc)To[A-Z]|nhwcAddPadding"),
    (CONV_UNKNOWN_PASS, r"winograd|fft2d|gcgemm|flip_filter|im2col|cask\w*::compute|cudnn\w*::reduction"),
    (CONV_FORWARD, r"[fF]prop|convFwd|convolve|conv2d|scudnn"),
)
OPERATORS = (
    (AUGMENT, r"cifar_fast::augment"),
    (NORM_BACKWARD, r"cifar_fast(::|_)batch_norm_celu\w*[bB]ackward"),
    (NORM_FORWARD, r"cifar_fast::batch_norm_celu"),
    (CONV_BACKWARD, r"conv(olution|2d)_backward|ConvolutionBackward"),
    (CONV_FORWARD, r"::\w*conv(olution|2d)"),
    (OPTIMISER, r"^Optimizer\.|::_fused_sgd_|::_foreach_"),
)


@dataclass(frozen=True)
class Row:
    """One line: milliseconds and launches (on a CPU: operators called from outside the line) a step, and the share of
    the step, 0 to 1.
    """

    line: str
    milliseconds: float
    share: float
    launches: float


@dataclass(frozen=True)
class Table:
    """What ``profile.json`` holds. ``step_milliseconds``: wall time of a step, which the rows sum to; ``steps``: how
    many were traced.
    """

    environment: dict[str, Any]
    backend: str
    dtype: str
    batch_size: int
    steps: int
    step_milliseconds: float
    rows: list[Row]

    def __str__(self) -> str:
        rows = [*self.rows, Row("step", self.step_milliseconds, 1.0, sum(row.launches for row in self.rows))]
        return "\n".join(
            [
                f"{self.steps} steps of {self.batch_size} images, {self.backend}, {self.dtype}, "
                f"{self.environment['device_name']}",
                f"{'':46} {'ms/step':>9} {'share':>8} {'launches':>9}",
                *(f"{row.line:46} {row.milliseconds:9.3f} {row.share:8.1%} {row.launches:9.1f}" for row in rows),
            ]
        )


def classify_kernel(name: str) -> str:
    """The line of a kernel, copy or fill on a GPU, by its name as the profiler gives it."""
    return next((line for line, pattern in KERNELS if re.search(pattern, name)), OTHER)


def classify_operator(name: str) -> str:
    """The line of an operator on a CPU, by its name alone; ``OTHER`` where that tells nothing."""
    return next((line for line, pattern in OPERATORS if re.search(pattern, name)), OTHER)


def profile(backend: Backend, draws: Draws, directory: str | Path, steps: int = 5) -> Table:
    """Trace ``steps`` training steps of ``backend``, which was reset, and leave it that much further trained.

    Writes ``trace.json``, for https://ui.perfetto.dev or chrome://tracing, and ``profile.json``, the table, to
    ``directory``, replacing those there; ``log`` gets the table's lines. ``draws`` are an epoch's, on the
    backend's device; where an epoch has too few steps the next one follows on the same draws.

    Raises:
        InputError: the directory cannot be written to, or the profiler sees nothing of the GPU.
    """
    directory = Path(directory).expanduser()
    with os_error_as_input_error(f"--output {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
    check_writable(directory, f"--output {directory}")

    cuda = backend.device.type == "cuda"
    finish = torch.cuda.synchronize if cuda else lambda: None
    training = itertools.chain.from_iterable(backend.train_epoch(draws) for _ in range(UNTRACED + steps))
    with device_guard(backend.device), torch_defaults(backend.device):
        for _ in itertools.islice(training, UNTRACED):
            pass
        finish()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
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
    with os_error_as_input_error(f"--output {directory}"):
        with atomic_write(directory / "trace.json") as temporary:
            trace.export_chrome_trace(str(temporary))
        with atomic_write(directory / "profile.json") as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(table), indent=2) + "\n")
    for line in str(table).splitlines():
        LOGGER.info(line)
    return table


Work = list[tuple[str, float, bool]]  # line, microseconds, whether it counts as a launch


def kernel_work(events: Iterable[FunctionEvent]) -> tuple[Work, float]:
    """What ran on the GPU, and the microseconds in which anything did."""
    # an annotation spans the kernels that ran in it, which are there themselves
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    if not kernels:
        raise InputError(
            "the profiler saw no kernel on the GPU; it needs CUPTI, and permission to use the GPU's counters"
        )
    work = [(classify_kernel(event.name), event.time_range.elapsed_us(), True) for event in kernels]
    return work, covered((event.time_range.start, event.time_range.end) for event in kernels)


def operator_work(events: Iterable[FunctionEvent]) -> tuple[Work, float]:
    """What ran on the CPU, each operator without those it called, and the sum of its microseconds."""
    work = []
    for event in events:
        line, parent = _line(event), event.cpu_parent
        work.append((line, event.self_cpu_time_total, parent is None or _line(parent) != line))
    return work, sum(microseconds for _, microseconds, _ in work)


def _line(event: FunctionEvent) -> str:
    """The line of an operator, or of the nearest of those that called it."""
    line = classify_operator(event.name)
    return _line(event.cpu_parent) if line == OTHER and event.cpu_parent else line


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of ``intervals``, start and end each."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def table_rows(work: Work, busy: float, wall: float, steps: int) -> list[Row]:
    """The lines that occurred, and the idle time, from microseconds of ``steps`` steps."""
    busy = min(busy, wall)  # two clocks: where nothing is idle, they may differ by a little
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

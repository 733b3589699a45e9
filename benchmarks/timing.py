"""Timers: CUDA graphs over rotating inputs, and sides that take turns."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity

from cifar_fast.diagnostics.profile import gpu_events

LAUNCHES = 50
"""Minimum number of calls in a graph, enough to hide the host."""
REPLAYS = 15
WARM_UP = 3
"""Runs that are not timed, while clocks rise and caches fill."""
T = TypeVar("T")


def interleave(
    sides: Mapping[str, Callable[[], T]], rounds: int, enough: Callable[[], bool] = lambda: False, warm_up: int = 1
) -> dict[str, list[T]]:
    """Return the values of each side in each round. The sides take turns, so slow drift affects all of them alike.

    The first ``warm_up`` rounds are dropped. After two more rounds ``enough`` may end the loop.
    """
    values: dict[str, list[T]] = {name: [] for name in sides}
    for turn in range(-warm_up, rounds):
        for name, side in sides.items():
            value = side()
            if turn >= 0:
                values[name].append(value)
        if turn >= 1 and enough():
            break
    return values


def capture(
    calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, list[Any], int]:
    """Capture ``calls`` in turn; each must have run before.

    Return the graph, the last result of each call, and the number of captured calls. The result of a call is kept until
    its next turn, so that outputs rotate through memory as inputs do.
    """
    count = len(calls) * math.ceil(LAUNCHES / len(calls))
    outputs: list[Any] = [None] * len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            outputs[i % len(calls)] = calls[i % len(calls)]()
    return graph, outputs, count


def replay_times(graph: torch.cuda.CUDAGraph) -> list[float]:
    """Return the seconds of each of ``REPLAYS`` replays, after a warm-up."""
    events = []
    for _ in range(WARM_UP + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events[WARM_UP:]]


def device_work(call: Callable[[], object]) -> list[str]:
    """Return the names of the kernels, copies and fills of ``call`` in order, or none if the profiler sees nothing."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return [event.name for event in sorted(gpu_events(trace.events()), key=lambda event: event.time_range.start)]


def child(arguments: Sequence[str], **variables: str) -> str:
    """Return the output of a Python process, or raise RuntimeError with the last line of its errors.

    ``variables`` are added to the environment.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:80]} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return done.stdout

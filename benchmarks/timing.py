"""The stopwatch: wall clock, CUDA graphs over rotating inputs, and sides in turn."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

LAUNCHES = 50
"""Calls in a graph, at least: enough to hide the host."""
REPLAYS = 15
WARM_UP = 3
"""Runs that do not count, while clocks rise and caches fill."""


def interleave(
    sides: Mapping[str, Callable[[], float]], rounds: int, enough: Callable[[], bool] = lambda: False
) -> dict[str, list[float]]:
    """What each of ``sides`` gives in each of ``rounds``, sides in turn, so that a drifting machine slows all of them.

    A first round does not count. After two rounds that count, ``enough`` ends it.
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, rounds):
        for name, side in sides.items():
            value = side()
            if turn >= 0:
                values[name].append(value)
        if turn >= 1 and enough():
            break
    return values


def wall(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``call``, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def capture(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, list, int]:
    """A CUDA graph in which ``calls``, each of which has run before, take turns until there are ``LAUNCHES``.

    What a call gives is kept until its next turn, so that outputs rotate through memory as inputs do. Gives the graph,
    what each call gave in the last turn, and how many calls the graph holds.
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
    """Seconds of each of several replays, after some that do not count."""
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
    """Names of the kernels, copies and fills that ``call`` puts on the GPU, in order; none where no profiler sees."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    # An annotation spans the kernels that ran in it, which are there themselves.
    found = [event for event in trace.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return [event.name for event in sorted(found, key=lambda event: event.time_range.start)]


def child(arguments: Sequence[str]) -> str:
    """What a Python process with ``arguments`` prints; RuntimeError with its last line of error where it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:80]} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return done.stdout

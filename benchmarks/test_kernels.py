"""``pytest benchmarks/test_kernels.py``: our kernels, eager torch and torch.compile, case by case, in device time.

A group is a case of :mod:`benchmarks.kernels` in one dtype, and a row an implementation of it. The seconds are those of
a call inside a captured loop; ``extra_info`` has the cold time, bytes, rates and launches. A wrong result fails and has no row.

    pytest benchmarks/ -k "64x32x32-forward-float16" --benchmark-json now.json
"""

import itertools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernels import IMPLEMENTATIONS, DeviceClock, cases, measure
from cifar_fast import Recipe

CASES = {f"{case.name}-{case.direction}".replace(", ", "-").replace(" ", "-"): i for i, case in enumerate(cases(Recipe(), torch.float16))}
clock = DeviceClock()


@pytest.mark.gpu
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark: BenchmarkFixture, copy_bandwidth: float, case: str, dtype: str, implementation: str) -> None:
    measured = measure(cases(Recipe(), getattr(torch, dtype))[CASES[case]], implementation, copy_bandwidth)
    show(benchmark, f"{case}, {dtype}", measured)


def show(benchmark: BenchmarkFixture, group: str, measured: dict) -> None:
    """Have pytest-benchmark report the device times of ``measured``, a round each, and the rest of it as ``extra_info``."""
    benchmark.group = group
    benchmark.extra_info |= {name: value for name, value in measured.items() if name != "times"}
    seconds = itertools.cycle(measured["times"])
    benchmark.pedantic(lambda: clock.advance(next(seconds)), rounds=len(measured["times"]))

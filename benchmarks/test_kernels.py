"""``pytest benchmarks/test_kernels.py``: time our operators, torch.compile and eager torch, case by case.

A group is a case in one dtype, with a row for each implementation: seconds of a call in a loop, which is captured on a
GPU. The other metrics are in ``extra_info``. A wrong result fails and has no row. On a CPU the batch has 128 images and
one implementation is timed after the other. In
``python -m benchmarks run --only kernels`` they take turns, with 512 images.

    pytest benchmarks/ -k "64x32x32-forward-float16" --benchmark-json now.json
"""

import itertools
import statistics

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.parts import measure_kernel, measure_on_cpu
from benchmarks.rows import Row
from cifar_fast import Recipe
from cifar_fast.diagnostics.kernel_cases import IMPLEMENTATIONS, TimedCase, cpu_cases, kernel_cases
from cifar_fast.diagnostics.roofline import copy_bandwidth
from cifar_fast.kernels.launch import interpreted
from cifar_fast.utils.device import tune_malloc

CPU_RECIPE = Recipe(batch_size=128)


def by_name(cases: list[TimedCase]) -> dict[str, int]:
    """Return the indices of ``cases`` by the names that the tests have."""
    return {case.name.replace(", ", "-").replace(" ", "-"): i for i, case in enumerate(cases)}


CASES = by_name(kernel_cases(Recipe(), torch.float16))
CPU_CASES = by_name(cpu_cases(CPU_RECIPE, torch.float32))
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
here = torch.cuda.is_available() and not interpreted()
elapsed: list[float] = []  # measured seconds; the timer returns their sum
measured_before = pytest.mark.benchmark(timer=lambda: sum(elapsed))


@pytest.mark.skipif(not here, reason="needs a CUDA GPU, and TRITON_INTERPRET unset")
@pytest.mark.gpu
@measured_before
@implementations
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark: BenchmarkFixture, case: str, dtype: str, implementation: str) -> None:
    """Time one implementation of a case in one dtype on the GPU."""
    rows = measure_kernel(kernel_cases(Recipe(), getattr(torch, dtype))[CASES[case]], implementation)
    report(benchmark, f"{case}, {dtype}", rows)


@pytest.fixture(scope="module")
def copy_rate() -> float:
    """Bytes/s of a copy on this CPU."""
    return statistics.median(copy_bandwidth(torch.device("cpu")))


@pytest.mark.skipif(interpreted(), reason="needs TRITON_INTERPRET unset")
@measured_before
@implementations
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CPU_CASES)
def test_cpu_kernel(benchmark: BenchmarkFixture, copy_rate: float, case: str, dtype: str, implementation: str) -> None:
    """Time one implementation of a case in one dtype on the CPU."""
    tune_malloc()
    chosen = cpu_cases(CPU_RECIPE, getattr(torch, dtype))[CPU_CASES[case]]
    report(benchmark, f"CPU, {case}, {dtype}", measure_on_cpu(chosen, [implementation], copy_rate))


def report(benchmark: BenchmarkFixture, group: str, rows: list[Row]) -> None:
    """Give the measured times to pytest-benchmark."""
    first, *others = rows
    assert first.values, first.metric
    benchmark.group = group
    benchmark.extra_info |= {f"{row.metric} {row.unit}": row.median for row in others}
    seconds = itertools.cycle(us / 1e6 for us in first.values)
    benchmark.pedantic(lambda: elapsed.append(next(seconds)), rounds=len(first.values))

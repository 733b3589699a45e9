"""``pytest benchmarks/test_kernels.py``: time our kernels, torch.compile and eager torch on the device, case by case.

A group is a case in one dtype, with a row for each implementation: seconds of a call inside a captured loop. The other
metrics are in ``extra_info``. A wrong result fails and has no row.

    pytest benchmarks/ -k "64x32x32-forward-float16" --benchmark-json now.json
"""

import itertools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.parts import measure_kernel
from cifar_fast import Recipe
from cifar_fast.diagnostics.kernel_cases import IMPLEMENTATIONS, kernel_cases
from cifar_fast.kernels.launch import interpreted

CASES = {
    case.name.replace(", ", "-").replace(" ", "-"): i for i, case in enumerate(kernel_cases(Recipe(), torch.float16))
}
here = torch.cuda.is_available() and not interpreted()
elapsed: list[float] = []  # seconds on the device; the timer returns their sum


@pytest.mark.skipif(not here, reason="needs a CUDA GPU, and TRITON_INTERPRET unset")
@pytest.mark.gpu
@pytest.mark.benchmark(timer=lambda: sum(elapsed))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark: BenchmarkFixture, case: str, dtype: str, implementation: str) -> None:
    """Time one implementation of a case in one dtype."""
    first, *others = measure_kernel(kernel_cases(Recipe(), getattr(torch, dtype))[CASES[case]], implementation)
    assert first.values, first.metric
    benchmark.group = f"{case}, {dtype}"
    benchmark.extra_info |= {f"{row.metric} {row.unit}": row.median for row in others}
    seconds = itertools.cycle(us / 1e6 for us in first.values)
    benchmark.pedantic(lambda: elapsed.append(next(seconds)), rounds=len(first.values))

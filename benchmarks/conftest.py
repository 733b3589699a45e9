"""What the benchmarks under pytest share: which of them can run here, and the copy bandwidth they are held against."""

import math

import pytest
import torch

from benchmarks.roofline import ceilings
from kernels.launch import interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "no CUDA GPU here"
    elif interpreted():
        reason = "TRITON_INTERPRET=1 is set, under which nothing is compiled; unset it"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written ones, measured once a session."""
    device = torch.device("cuda", torch.cuda.current_device())
    return ceilings(device, torch.float16, flops=math.inf).bandwidth  # a rate that is given is not measured

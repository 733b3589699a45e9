"""Conversions in kernels, interpreted without a GPU and compiled with one, and the import of kernels."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from cifar_fast.kernels.launch import convert
from tests.helpers import DEVICE, ROOT


@triton.jit
def convert_kernel(x, y, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offset, convert(tl.load(x + offset), y.dtype.element_ty))


def float32_values():
    """Return random bits, all middles between two bfloat16 values, and their neighbors, ``[3 * 2**16]``."""
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    random = torch.randint(2**16, (2**16,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    neighbor = 0x8000 + random % 3 - 1
    return torch.cat([upper | random, upper | 0x8000, upper | neighbor]).view(torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_kernels_convert_as_torch_does(source, dtype):
    x = float32_values().to(DEVICE, source)
    y = torch.empty_like(x, dtype=dtype)
    convert_kernel[(3,)](x, y, 2**16)
    expected = x.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.slow  # a process of its own
@pytest.mark.parametrize("module", ["kernels", "kernels.launch"])
def test_import_of_kernels_says_to_import_cifar_fast_kernels(module):
    """A second copy would register the operators again, so the first copy must keep working."""
    code = f"""
import torch
from cifar_fast.kernels import BatchNormAct2d
try:
    import {module}
except ImportError as error:
    print(error)
print(BatchNormAct2d(2, alpha=0.1)(torch.zeros(2, 2, 2, 2)).sum().item())
"""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.stdout, done.stderr) == ("import cifar_fast.kernels, not kernels\n0.0\n", "")

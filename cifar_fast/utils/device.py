"""Devices: which one, what it can do, what it is called, its clock."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cifar_fast.utils.errors import InputError
from cifar_fast.utils.files import check_writable

if TYPE_CHECKING:
    pass
import contextlib
import ctypes
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code: versions, device, threads."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # which is a class of torch's own
        "torchvision": _version("torchvision"),
        "triton": _version("triton"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    """The installed version, without an import that may be slow or fail; None where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


OLDEST_GPU = (7, 5)
"""The lowest compute capability that the kernels are compiled for in the tests."""


def short_name(of_torch: torch.dtype | torch.memory_format) -> str:
    """The name without "torch." before it."""
    return str(of_torch).removeprefix("torch.")


def check_caches() -> None:
    """Raise :class:`InputError` where a compiler's cache cannot be written. torch makes its own with the import of its
    compiler, which its optimizers and torchvision do too.
    """
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        if folder := os.environ.get(variable):
            check_writable(Path(folder), f"${variable} ({folder})", "name a folder that can be, or unset it")


def fused_unavailable_reason(device: torch.device) -> str | None:
    """Why the fused backend cannot run on ``device``, as far as can be told before it is set up; None where it may."""
    try:
        from cifar_fast.kernels.launch import interpreted
    except ImportError as error:
        return f"its kernels cannot be imported: {error}"
    if device.type == "cpu":
        return (
            None if interpreted() else "its kernels need a CUDA GPU; TRITON_INTERPRET=1 runs them without one, slowly"
        )
    if interpreted():
        return "TRITON_INTERPRET=1 is set, and a CUDA graph cannot hold interpreted kernels"
    if torch.version.hip:
        return "an AMD GPU, and its kernels are made for NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return "a GPU of compute capability {}.{}, and its kernels need {}.{}".format(*capability, *OLDEST_GPU)
    return None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"unknown device {name!r}; there are auto, cpu, cuda, cuda:0, cuda:1, ...")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"--device {name}: no CUDA GPU is here that this torch can use; try --device cpu")
        if device.index is not None and device.index >= count:
            raise InputError(f"--device {name}: there are {count} CUDA GPUs here, counted from 0")
    return device


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX-512 BF16, AMX, or Arm's BF16)."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def device_timer(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has done what it was given."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` the current GPU meanwhile, where it is one: streams and graphs belong to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def tune_malloc() -> None:
    """Have the C library keep freed memory for the next tensor instead of handing it back to the system.

    A CPU step frees and allocates its activations, hundreds of megabytes, and each fresh page costs a fault: measured
    at 15 to 30 % of a step. Only glibc has the call; elsewhere nothing happens. It holds for the whole process, whose
    memory then stays at its peak, so the commands call it and the library does not.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)

"""Devices: how one is chosen, what it can do, how work runs on it, and how a report describes it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_fast import __version__
from cifar_fast.utils.errors import InputError, did_you_mean, option
from cifar_fast.utils.files import check_writable
from cifar_fast.utils.progress import LOGGER
from cifar_fast.utils.provenance import commit

OLDEST_GPU = (7, 5)
"""The lowest compute capability for which the tests compile the kernels."""


AFFECTS_FIGURES = ("cifar_fast", "torch", "triton", "cuda", "cudnn", "device_name", "threads")
"""Parts of :func:`environment` that the last bits of a training, or more, depend on."""


def resolve_device(name: str) -> torch.device:
    """Return the device that ``name`` means: auto, cpu, cuda or cuda:N. ``auto`` prefers a CUDA GPU.

    Raises:
        InputError: no such device exists here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        hint = did_you_mean(name, ("auto", "cpu", "cuda"))
        raise InputError(f"unknown device {name!r}; the choices are auto, cpu, cuda, cuda:0, cuda:1, ...{hint}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"{option('device')} {name}: this torch finds no CUDA GPU; use cpu")
        if device.index is not None and device.index >= count:
            raise InputError(f"{option('device')} {name}: this machine has {count} CUDA GPUs, counted from 0")
    return device


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively (AVX-512 BF16, AMX, or Arm's BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def default_dtype(device: torch.device) -> tuple[str, str]:
    """Return what the dtype ``auto`` means on ``device``, and the reason."""
    if device.type == "cuda":
        return "float16", "float16 as the reference"
    if cpu_has_bfloat16():
        return "bfloat16", "this CPU computes in bfloat16"
    return "float32", "this CPU has no bfloat16 arithmetic"


def fused_unavailable_reason(device: torch.device) -> str | None:
    """Return why the fused backend cannot run on ``device``, or None if nothing is known to prevent it."""
    from cifar_fast.kernels.launch import MISSING, interpreted

    if device.type == "cpu":
        return None  # compiled C++, Triton's interpreter or plain torch
    if MISSING:
        return MISSING
    if interpreted():
        return "TRITON_INTERPRET=1 is set, and a CUDA graph cannot hold interpreted kernels"
    if torch.version.hip:
        return "its kernels are written for NVIDIA GPUs, not AMD"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return "a GPU of compute capability {}.{}, and its kernels need {}.{}".format(*capability, *OLDEST_GPU)
    return None


def slow_on_cpu_reason(dtype: torch.dtype) -> str | None:
    """Return why the fused backend would be slow on a CPU, or None. The first call may compile its kernels."""
    from cifar_fast.kernels import cpu
    from cifar_fast.kernels.launch import interpreted

    return "TRITON_INTERPRET=1 is set" if interpreted() else cpu.unavailable_reason(dtype)


def check_caches() -> None:
    """Raise :class:`InputError` if a compiler's cache folder from the environment is not writable.

    torch creates its cache folder when its compiler is imported. torch's optimizers and torchvision import the
    compiler.
    """
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        if folder := os.environ.get(variable):
            check_writable(Path(folder), f"${variable} ({folder})", "set it to a writable folder, or unset it")


def ensure_triton_cache() -> None:
    """Give Triton a private temporary folder if it cannot write to its own one, below the home folder.

    Triton could not compile without it. The folder is removed when Python ends, so each start compiles again.
    """
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    if os.environ.get("TRITON_CACHE_DIR"):
        return
    try:
        check_writable(Path(home, ".triton", "cache"), home)
    except InputError as error:
        folder = tempfile.TemporaryDirectory(prefix="cifar_fast-triton-")
        atexit.register(folder.cleanup)
        os.environ["TRITON_CACHE_DIR"] = folder.name
        LOGGER.info(f"{error}, such as by $TRITON_CACHE_DIR: until then each start compiles Triton's kernels")


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` the current GPU, which owns new CUDA streams and graphs. Do nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def device_timer(device: torch.device) -> Callable[[], float]:
    """Return a clock that waits until ``device`` is idle and returns the time in seconds."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def tune_malloc() -> None:
    """Make glibc keep freed memory for the next tensor. Do nothing with another C library.

    A CPU step frees and allocates hundreds of megabytes of activations. By default glibc returns them to the system,
    and each new page costs a page fault: 15 to 30 % of a step, measured. The setting holds for the whole process and
    keeps its memory at the peak, so only the commands use it, never the library.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)


def short_name(torch_constant: torch.dtype | torch.memory_format) -> str:
    """Return the name without its prefix "torch."."""
    return str(torch_constant).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions, the device and the number of threads, which measurements depend on."""
    cuda = device.type == "cuda"
    return {
        "cifar_fast": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which torch.load with weights_only refuses
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
    """Return the installed version of ``package`` without importing it, or None if it is not installed."""
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

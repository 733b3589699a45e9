"""The operators on a CPU: compile ``cpu.cpp`` on first use, once for each dtype, and call its functions.

The file includes no header of torch, so one call of the compiler takes three to four seconds, and the result works with
every release of torch. The compiled libraries are kept in ``$CIFAR_FAST_CACHE``, by default in
``~/.cache/cifar_fast``. If that cannot be written to, each process compiles them again. They are compiled for the
instruction set that torch itself uses here, see ``torch.backends.cpu.get_cpu_capability``. Their parallel loops run on
torch's own OpenMP threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOGGER = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")

TYPES = {torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float32: "float", torch.float64: "double"}
"""Names of the dtypes in ``cpu.cpp``."""

FLAGS = "-std=c++17 -O3 -shared -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=off -fno-strict-aliasing"
"""Flags of the compiler. No contraction of a * b + c: forward and backward must round alike."""

INSTRUCTIONS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512",
    "AVX2": "-mavx2 -mfma",
}
"""Flags for the instruction sets of x86 by torch's name of the capability."""


class Shape(ctypes.Structure):
    """Sizes of the tensor before the pool, and the number of threads: ``Shape`` of ``cpu.cpp``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("n", "c", "h", "w", "pool", "threads")]

    @classmethod
    def of(cls, x: Tensor, pool: int) -> Shape:
        return cls(*x.shape, pool, torch.get_num_threads())

    @property
    def rows(self) -> int:
        """Number of pixels after the pool, over all images."""
        return self.n * (self.h // self.pool) * (self.w // self.pool)


def call(function: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call ``function`` of the library for ``dtype``.

    Pass tensors as pointers, ints as int64, floats as double, and a :class:`Shape` by reference.

    Raises:
        RuntimeError: there is no such library, see :func:`unavailable_reason`.
    """
    library, reason = _load(dtype)
    if library is None:
        raise RuntimeError(f"the operators need a C++ compiler on a CPU ({reason})")
    entry = getattr(library, function)
    entry.restype = None
    entry(*(_as_c(argument) for argument in arguments))


@torch.compiler.assume_constant_result
def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Return why the library for ``dtype`` cannot be compiled or loaded here, or None. The first call may compile."""
    return _load(dtype)[1]


def forget() -> None:
    """Forget which libraries were loaded, so that the next call looks for a compiler again."""
    _load.cache_clear()


def _as_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, Shape):
        return ctypes.byref(argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@functools.cache
def _load(dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library for ``dtype``, or the reason why there is none, which is logged once."""
    try:
        return _library(dtype), None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        lines = [line for line in output.splitlines() if "error" in line] or output.splitlines() or [repr(error)]
        reason = f"{type(error).__name__}: {lines[0]}"
        LOGGER.info(f"{SOURCE.name} cannot be compiled or loaded, so plain torch computes instead ({reason})")
        return None, reason


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """Load the library for ``dtype``. Compile it unless the cache has it."""
    capability = torch.backends.cpu.get_cpu_capability()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    parallel = "-fopenmp" if platform.system() == "Linux" else "-fopenmp-simd"  # Apple's compiler has no OpenMP
    flags = f"{FLAGS} {INSTRUCTIONS.get(capability, '')} {parallel} -DDTYPE={TYPES[dtype]}".split()
    key = hashlib.sha256(repr((SOURCE.read_bytes(), compiler, flags, platform.machine())).encode()).hexdigest()[:16]
    name = f"{TYPES[dtype]}-{key}.so"
    cache = os.environ.get("CIFAR_FAST_CACHE") or os.path.expanduser("~/.cache/cifar_fast")
    library = Path(cache, name)
    if not library.exists():
        LOGGER.info(f"compiling the CPU kernels for {str(dtype).removeprefix('torch.')}, a few seconds")
        with _private_folder(cache) as (folder, is_cached):  # another process may compile at the same time
            result = Path(folder, name)
            command = [*compiler, *flags, str(SOURCE), "-o", str(result)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            if not is_cached:
                return ctypes.CDLL(str(result))  # stays loaded when its file is gone
            result.replace(library)
    return ctypes.CDLL(str(library))


@contextlib.contextmanager
def _private_folder(cache: str) -> Iterator[tuple[str, bool]]:
    """Yield a new folder that no other user can write to: in ``cache``, or elsewhere if that cannot be written to.

    The second value says whether it is in ``cache``. The folder is removed after the block.
    """
    with contextlib.ExitStack() as stack:
        try:
            if cache.startswith("~"):
                raise FileNotFoundError(errno.ENOENT, "the home folder is unknown")
            Path(cache).mkdir(parents=True, exist_ok=True)
            folder, is_cached = stack.enter_context(tempfile.TemporaryDirectory(dir=cache)), True
        except OSError as error:
            folder, is_cached = stack.enter_context(tempfile.TemporaryDirectory()), False
            LOGGER.info(
                f"{cache} cannot be written to ({error.strerror}), so each start compiles; set $CIFAR_FAST_CACHE to a "
                "writable folder"
            )
        yield folder, is_cached

"""What is to run: what ``auto`` means on this machine, settled once and handed on as a value, and its set-up."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cifar_fast.backends import Backend, Compiled, Eager
from cifar_fast.data import Dataset
from cifar_fast.errors import InputError, first_cause, first_line, out_of_memory
from cifar_fast.files import check_writable
from cifar_fast.names import BACKENDS, DTYPES, MEMORY_FORMATS
from cifar_fast.progress import Log
from cifar_fast.recipe import Recipe

if TYPE_CHECKING:
    from cifar_fast.own_model import OwnModel

SetUp = Callable[["Plan", Recipe, Dataset, Log], "tuple[Backend, list[str]]"]
"""Takes and gives what :func:`set_up` does."""

LOGGER = logging.getLogger(__name__)
"""At INFO it gives the traceback of each backend that failed before another was taken; --traceback shows it."""

OLDEST_GPU = (7, 5)
"""The lowest compute capability that the kernels are compiled for in the tests."""


@dataclass(frozen=True)
class Plan:
    """What is to run, and in ``reason`` why, where that was left to us.

    ``backends``: names of those to try to set up, in this order; more than one where ``auto`` may fall back.
    """

    backends: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    reason: str

    def __str__(self) -> str:
        """Backend, memory format and dtype, such as "fused, channels_last, float16"."""
        return f"{self.backends[0]}, {short_name(self.memory_format)}, {short_name(self.dtype)}"


def short_name(of_torch: torch.dtype | torch.memory_format) -> str:
    """The name without "torch." before it."""
    return str(of_torch).removeprefix("torch.")


def resolve(backend: str = "auto", device: str = "auto", dtype: str = "auto", memory_format: str = "auto") -> Plan:
    """Settle what ``auto`` means here; :class:`InputError` for what cannot work here."""
    for what, value, names in (
        ("backend", backend, BACKENDS),
        ("dtype", dtype, DTYPES),
        ("memory format", memory_format, MEMORY_FORMATS),
    ):
        if value not in ("auto", *names):
            raise InputError(f"unknown {what} {value!r}; there are auto, {', '.join(names)}")
    if backend == "fused" and memory_format == "contiguous_format":
        raise InputError("the fused backend's kernels need --memory-format channels_last; eager and compiled have both")
    check_caches()
    reasons = []

    where = _device(device)
    if device == "auto":
        reasons.append("a GPU is here" if where.type == "cuda" else "no CUDA GPU is here")

    if dtype == "auto" and where.type == "cuda":
        dtype = "float16"
        reasons.append("float16 as the reference")
    elif dtype == "auto":
        dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
        reasons.append(
            "this CPU computes in bfloat16" if dtype == "bfloat16" else "this CPU has no bfloat16 arithmetic"
        )

    if memory_format == "auto" and backend == "eager":
        memory_format = "contiguous_format"  # the reference script's
    elif memory_format == "auto":
        memory_format = "channels_last"
        if backend == "auto" and where.type == "cpu":
            reasons.append("channels_last was measured fastest on a CPU")

    backends: tuple[str, ...] = (backend,)
    unavailable = None if backend in ("eager", "compiled") else fused_unavailable_reason(where)
    if backend == "fused" and unavailable:
        raise InputError(f"the fused backend cannot run here ({unavailable}); use --backend compiled, eager or auto")
    if backend == "auto" and where.type == "cpu":
        backends = ("eager",)
        reasons.append("eager was measured faster than compiled on a CPU")
    elif backend == "auto" and memory_format == "contiguous_format":
        backends = ("compiled", "eager")
        reasons.append("the fused backend's kernels need channels_last, compiled instead")
    elif backend == "auto" and unavailable:
        backends = ("compiled", "eager")
        reasons.append(f"the fused backend cannot run here ({unavailable}), compiled instead")
    elif backend == "auto":
        backends = ("fused", "compiled", "eager")
        reasons.append("fused first, which has the least to do on the host")
    return Plan(backends, where, getattr(torch, dtype), getattr(torch, memory_format), "; ".join(reasons))


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


def set_up(
    plan: Plan, recipe: Recipe, dataset: Dataset, log: Log, own_model: OwnModel | None = None
) -> tuple[Backend, list[str]]:
    """The first backend of ``plan`` that works here, set up for every run to come, and what was said of those that
    failed.

    The backend holds throw-away weights: call ``reset`` before training. Where a backend fails and there is another,
    ``log`` gets a line; where there is none, :class:`InputError` is raised.
    """
    failures: list[str] = []
    for name, following in zip(plan.backends, (*plan.backends[1:], None)):
        if name != "eager":
            log(f"setting up the {name} backend, which compiles: a minute or so, less when it has been done before")
        try:
            backend = backend_class(name)(recipe, dataset, plan.device, plan.dtype, plan.memory_format, own_model)
        except InputError:
            raise
        except Exception as error:  # compiler, driver, memory: each layer below raises its own
            cannot = f"take the model {own_model.name}" if own_model else "be set up"
            failure = f"the {name} backend cannot {cannot} here ({_why(error, recipe.batch_size)})"
            if following is None:
                raise InputError(f"{failure}; see --backend for others, --traceback for where it failed") from error
            LOGGER.info("%s", failure, exc_info=error)
        else:
            for line in (*dataset.remarks, *backend.remarks):
                log(line)
            return backend, failures
        failures.append(f"{failure}, {following} instead")
        log(f"auto: {failures[-1]}")
        gc.collect()  # what failed holds its tensors in cycles, and the next backend needs the memory
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("a plan has at least one backend")


def _why(error: BaseException, batch_size: int) -> str:
    """The reason in a line. No variable of the caller's may hold the cause, whose frames hold the backend's memory."""
    cause = first_cause(error)
    if out_of_memory(cause):
        return f"out of memory at --batch-size {batch_size}"
    return f"{type(cause).__name__}: {first_line(cause)}"


def backend_class(name: str) -> Callable[..., Backend]:
    """The class of the backend ``name``; fused imports Triton, which not every machine has."""
    if name == "fused":
        from cifar_fast.fused import Fused

        return Fused
    return Eager if name == "eager" else Compiled


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

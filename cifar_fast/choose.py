"""What ``auto`` means on this machine, and what cannot work on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cifar_fast.backends import Compiled, Eager
from cifar_fast.errors import InputError

BACKENDS = ("eager", "compiled", "fused")
DTYPES = ("float16", "bfloat16", "float32")
MEMORY_FORMATS = ("contiguous_format", "channels_last")
OLDEST_GPU = (7, 5)
"""The lowest compute capability that the kernels are compiled for in the tests."""


@dataclass(frozen=True)
class Choice:
    """What is to run, and in ``reason`` why, where that was left to us.

    ``backends``: those to try to set up, in this order; more than one where ``auto`` may fall back.
    """

    backends: tuple[type[Eager], ...]
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    reason: str


def choose(backend: str = "auto", device: str = "auto", dtype: str = "auto", memory_format: str = "auto") -> Choice:
    """Settle what ``auto`` means here; :class:`InputError` for what cannot work here."""
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"unknown backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"unknown dtype {dtype!r}; there are auto, {', '.join(DTYPES)}")
    if memory_format not in ("auto", *MEMORY_FORMATS):
        raise InputError(f"unknown memory format {memory_format!r}; there are auto, {', '.join(MEMORY_FORMATS)}")
    if backend == "fused" and memory_format == "contiguous_format":
        raise InputError("the fused backend's kernels need --memory-format channels_last; eager and compiled have both")
    reasons = []

    where = _device(device)
    if device == "auto":
        reasons.append("a GPU is here" if where.type == "cuda" else "no CUDA GPU is here")

    if dtype == "auto" and where.type == "cuda":
        dtype = "float16"
        reasons.append("float16 as the reference")
    elif dtype == "auto":
        dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
        reasons.append("this CPU computes in bfloat16" if dtype == "bfloat16" else "this CPU has no bfloat16 arithmetic")

    if memory_format == "auto" and backend == "eager":
        memory_format = "contiguous_format"  # the reference script's
    elif memory_format == "auto":
        memory_format = "channels_last"
        reasons += ["channels_last was measured fastest on a CPU"] if backend == "auto" and where.type == "cpu" else []

    if backend == "auto" and where.type == "cpu":
        backends = (Eager,)
        reasons.append("eager was measured faster than compiled on a CPU")
    elif backend == "auto":
        trouble = "its kernels need channels_last" if memory_format == "contiguous_format" else fused_trouble(where)
        backends = (Compiled, Eager) if trouble else (_fused(), Compiled, Eager)
        reasons.append(
            f"the fused backend cannot run here ({trouble}), compiled instead"
            if trouble
            else "fused first, which has the least to do on the host"
        )
    elif backend == "fused":
        if trouble := fused_trouble(where):
            raise InputError(f"the fused backend cannot run here ({trouble}); use --backend compiled, eager or auto")
        backends = (_fused(),)
    else:
        backends = ({"eager": Eager, "compiled": Compiled}[backend],)
    return Choice(backends, where, getattr(torch, dtype), getattr(torch, memory_format), "; ".join(reasons))


def _fused() -> type[Eager]:
    from cifar_fast.fused import Fused  # imports Triton, which not every machine has

    return Fused


def fused_trouble(device: torch.device) -> str | None:
    """Why the fused backend cannot run on ``device``, as far as can be told before it is set up; None where it may."""
    try:
        from kernels.launch import interpreted
    except ImportError as error:
        return f"no Triton: {error}"
    if device.type == "cpu":
        return None if interpreted() else "its kernels need a CUDA GPU; TRITON_INTERPRET=1 runs them without one, slowly"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, and a CUDA graph cannot hold interpreted kernels"
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

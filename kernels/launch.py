"""How kernels are launched: descriptions that run here, or are compiled for a GPU that is not here.

A planner (``plan_*`` in an operator's file) takes tensors, on the ``meta`` device too, and gives the
launches that compute the result. Running them is one use; ``benchmarks/aot.py`` reads the same
descriptions to compile every kernel at every shape of the recipe without a GPU.

Block sizes come from ``launch.json``, keyed by kernel and shape class, never from timing at run
time: they set the order of a reduction, and so the last bits of its result.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("launch.json")

FP_FUSION = False
"""No contraction of a * b + c: its default differs between Triton releases, and what forward and backward both compute must be equal."""


@dataclass(frozen=True)
class Launch:
    """One launch of a ``@triton.jit`` function: its grid, run-time arguments, compile-time constants, and warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, torch.Tensor | int | float | None]
    constants: dict[str, Any]
    num_warps: int = 4


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run ``launches`` in turn on ``device``."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.constants, num_warps=launch.num_warps, enable_fp_fusion=FP_FUSION)


def parameters(kernel: str, shape_class: int | str) -> dict[str, int]:
    """The entry of the checked-in table for ``kernel`` at ``shape_class``, or the kernel's ``"*"`` entry."""
    entries = _table()[kernel]
    return entries.get(str(shape_class), entries["*"])


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text())


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on tensors of any device, as TRITON_INTERPRET=1 asks."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_device(device: torch.device) -> None:
    """Raise where no kernel can run: a CPU tensor without the interpreter."""
    if device.type not in ("cuda", "meta") and not interpreted():
        raise RuntimeError(
            f"Triton kernels need tensors on a GPU, not on {device}; set TRITON_INTERPRET=1 before Python starts to run them here"
        )

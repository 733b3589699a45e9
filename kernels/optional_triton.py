"""Triton, or stand-ins where it is not installed, such as on macOS and Windows.

The stand-ins let the kernels' modules be imported. The operators then run on CPUs only, in C++ or plain torch.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

MISSING: str | None = None
"""Why Triton cannot be imported, or None if it can."""

try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError as error:
    MISSING = f"Triton cannot be imported: {error}"
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value: value)

"""``model.safetensors``: what ``model.pt`` holds, in a format that other programs read and that can execute nothing.

The weights are contiguous, under the names of the plain model. The header has two texts beside them: ``cifar_fast``,
the rest as JSON, and ``sha256``, a sum over both, because the format itself has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cifar_fast.utils.errors import InputError

KEY = "cifar_fast"
"""Name of our JSON text in every exported file."""

SUFFIX = ".safetensors"


def to_bytes(state_dict: Mapping[str, torch.Tensor], metadata: str) -> bytes:
    """Return the file with ``state_dict`` and the JSON text ``metadata``.

    Raises:
        ImportError: the package safetensors is not installed.
    """
    from safetensors.torch import save

    weights = {  # a copy of each, because the package refuses tensors that share memory
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()
    }
    return save(weights, {KEY: metadata, "sha256": _digest(weights, metadata)})


def read(path: Path) -> dict[str, Any]:
    """Return what ``path`` holds, with the keys of ``model.pt``. The weights are on the CPU.

    Raises:
        InputError: safetensors is not installed, or the file was not written by cifar_fast, or has changed since.
        OSError: it cannot be read.
        Exception: it is damaged.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise InputError(f"{path}: reading it needs safetensors: pip install safetensors") from None
    with safe_open(path, "pt") as file:
        texts = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    if KEY not in texts:
        return {}
    if texts.get("sha256") != _digest(weights, texts[KEY]):
        raise InputError(f"{path}: has changed since it was written; copy or export it again")
    return json.loads(texts[KEY]) | {"state_dict": weights}


def _digest(weights: Mapping[str, torch.Tensor], metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

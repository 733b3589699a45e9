"""``model.safetensors``: what ``model.pt`` holds, in a format that other programs read and that can execute nothing.

The weights are contiguous, under the names of the plain model. The header has a text under ``cifar_fast``: the rest as
JSON, with a sum over all, ``sha256``, because the format itself has none.
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


def to_bytes(state_dict: Mapping[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    """Return the file with ``state_dict`` and ``metadata``, which JSON can hold.

    Raises:
        ImportError: the package safetensors is not installed.
    """
    from safetensors.torch import save

    weights = {  # a copy of each, because the package refuses tensors that share memory
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()
    }
    return save(weights, {KEY: json.dumps(metadata | {"sha256": _digest(weights, metadata)})})


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
    metadata = json.loads(texts[KEY])
    if metadata.pop("sha256", None) != _digest(weights, metadata):
        raise InputError(f"{path}: has changed since it was written; copy or export it again")
    return metadata | {"state_dict": weights}


def _digest(weights: Mapping[str, torch.Tensor], metadata: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

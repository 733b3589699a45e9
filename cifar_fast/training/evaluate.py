"""Evaluate a backend on other test sets."""

from __future__ import annotations

import numpy as np
import torch

from cifar_fast.backends.base import Backend
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.eval_sets import EvalSet
from cifar_fast.model import make_model


@torch.no_grad()
def plain_logits(
    backend: Backend,
    dataset: Dataset,
    normalization: tuple[torch.Tensor, torch.Tensor],
    images: np.ndarray,
    places: np.ndarray | None = None,
) -> torch.Tensor:
    """Logits ``[N, classes]`` of ``images``, uint8 ``[N, 32, 32, 3]``, or of those at ``places``, by the plain model in
    the dtype of ``backend``, with the weights that it holds; on its device.

    ``normalization``: mean and deviation of the training images, as :func:`cifar_fast.data.tensors.channel_statistics`.
    """
    recipe, device, dtype = backend.recipe, backend.device, backend.dtype
    model = make_model(recipe, dataset, device, dtype, backend.custom_model).to(memory_format=backend.memory_format)
    model.load_state_dict(backend.state_dict())
    model.eval()
    mean, std = normalization
    places = np.arange(len(images)) if places is None else places
    logits = []
    for start in range(0, len(places), recipe.batch_size):
        batch = images[places[start : start + recipe.batch_size]]
        batch = torch.tensor(np.ascontiguousarray(batch), device=device)
        batch = ((batch - mean) / std).to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=backend.memory_format)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            logits.append(model(batch))
    return torch.cat(logits)


def accuracy(
    backend: Backend, dataset: Dataset, normalization: tuple[torch.Tensor, torch.Tensor], test: EvalSet
) -> float:
    """The accuracy in % on ``test`` by :func:`plain_logits`."""
    logits = plain_logits(backend, dataset, normalization, test.images, test.indices)
    right = logits.argmax(dim=1).cpu().numpy() == test.labels[test.indices]
    return 100 * int(right.sum()) / len(right)

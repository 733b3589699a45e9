"""Evaluate a backend on other test sets."""

from __future__ import annotations

import numpy as np
import torch

from cifar_fast.backends.base import Backend, autocast
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.eval_sets import EvalSet
from cifar_fast.model import build_model


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

    ``normalization``: mean and deviation of the training images, as in :class:`cifar_fast.data.tensors.Normalization`.
    """
    recipe, device, dtype = backend.recipe, backend.device, backend.dtype
    model = build_model(recipe, dataset.num_classes, device, dtype, backend.custom_model)
    model.to(memory_format=backend.memory_format)
    model.load_state_dict(backend.state_dict())
    model.eval()
    mean, std = normalization
    places = np.arange(len(images)) if places is None else places
    logits = []
    for start in range(0, len(places), recipe.batch_size):
        batch = images[places[start : start + recipe.batch_size]]
        batch = torch.tensor(np.ascontiguousarray(batch), device=device)
        batch = ((batch - mean) / std).to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=backend.memory_format)
        with autocast(device, dtype):
            logits.append(model(batch))
    return torch.cat(logits)


def accuracy(
    backend: Backend, dataset: Dataset, normalization: tuple[torch.Tensor, torch.Tensor], test: EvalSet
) -> float:
    """The accuracy in % on ``test`` by :func:`plain_logits`."""
    logits = plain_logits(backend, dataset, normalization, test.images, test.places)
    right = logits.argmax(dim=1).cpu().numpy() == test.labels[test.places]
    return 100 * int(right.sum()) / len(right)

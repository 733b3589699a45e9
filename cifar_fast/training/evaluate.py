"""Logits and accuracy on images other than the test images that a backend holds."""

from __future__ import annotations

import numpy as np
import torch

from cifar_fast.backends.base import Backend
from cifar_fast.data.eval_sets import EvalSet
from cifar_fast.model import parameter_dtype


@torch.no_grad()
def plain_logits(backend: Backend, images: np.ndarray, indices: np.ndarray | None = None) -> torch.Tensor:
    """Return the logits ``[N, classes]`` of uint8 ``images`` ``[N, 32, 32, 3]``, or only of the images at ``indices``.

    The plain model computes them on the device of ``backend``, with its weights and in their dtype.
    """
    device, dtype, memory_format = backend.device, parameter_dtype(backend.dtype), backend.memory_format
    model = backend.new_model(torch.Generator()).to(dtype).to(device).to(memory_format=memory_format)
    model.load_state_dict(backend.state_dict())
    model.eval()
    indices = np.arange(len(images)) if indices is None else indices
    logits = []
    for start in range(0, len(indices), backend.recipe.batch_size):
        batch = images[indices[start : start + backend.recipe.batch_size]]
        pixels = torch.tensor(np.ascontiguousarray(batch), device=device)
        pixels = backend.data.normalization.apply(pixels, dtype).permute(0, 3, 1, 2)
        logits.append(model(pixels.contiguous(memory_format=memory_format)))
    return torch.cat(logits)


def confusion_matrix(labels: np.ndarray, logits: torch.Tensor) -> list[list[int]]:
    """Return how many images of each class, a row, are classified as each class, a column."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=1).cpu().numpy()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes).tolist()


def accuracy(backend: Backend, images: EvalSet) -> float:
    """Return the accuracy in % on ``images`` by :func:`plain_logits`."""
    logits = plain_logits(backend, images.images, images.indices)
    correct = logits.argmax(dim=1).cpu().numpy() == images.labels[images.indices]
    return 100 * int(correct.sum()) / len(correct)

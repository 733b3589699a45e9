"""Logits and accuracy on images other than the test images that a backend holds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast.backends.base import Backend
from cifar_fast.data.dataset import lacking_classes
from cifar_fast.data.eval_sets import EvalSet
from cifar_fast.model import build_model, parameter_dtype
from cifar_fast.training.time_to_go import EVALUATED, TimeToGo
from cifar_fast.utils.progress import LOGGER


@torch.no_grad()
def plain_logits(
    backend: Backend, images: np.ndarray, indices: np.ndarray | None = None, tta: bool = False
) -> torch.Tensor:
    """Return the logits ``[N, classes]`` of uint8 ``images`` ``[N, 32, 32, 3]``, or only of the images at ``indices``.

    The plain model computes them on the device of ``backend``, with its weights and in their dtype. ``tta`` averages
    them over the views of :func:`averaged`.
    """
    device, dtype, memory_format = backend.device, parameter_dtype(backend.dtype), backend.memory_format
    model = build_model(backend.recipe, backend.data.num_classes, device, dtype, backend.custom_model)
    model.to(memory_format=memory_format)
    model.load_state_dict(backend.state_dict())
    model.eval()
    indices = np.arange(len(images)) if indices is None else indices
    logits = []
    for start in range(0, len(indices), backend.recipe.batch_size):
        batch = images[indices[start : start + backend.recipe.batch_size]]
        pixels = torch.tensor(np.ascontiguousarray(batch), device=device)
        pixels = backend.data.normalization.apply(pixels, dtype).permute(0, 3, 1, 2)
        pixels = pixels.contiguous(memory_format=memory_format)
        logits.append(averaged(model, pixels, memory_format) if tta else model(pixels))
    return torch.cat(logits)


VIEWS = 6
"""Passes of :func:`averaged` over the images."""


def averaged(model: nn.Module, images: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Return the logits of ``images`` ``[B, C, S, S]``, averaged over six views: test-time augmentation.

    Half of the weight has the image, and a quarter each the image shifted by a pixel up and left, and down and right.
    Each is averaged with its mirror image. airbench94_muon by Keller Jordan has the same views. The model gets a copy
    of each in ``memory_format``, since it may write into its input.
    """

    def with_mirror(view: torch.Tensor) -> torch.Tensor:
        view, mirror = (one.clone(memory_format=memory_format) for one in (view, view.flip(-1)))
        return (model(view) + model(mirror)) / 2

    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    shifted = with_mirror(padded[:, :, :-2, :-2]) + with_mirror(padded[:, :, 2:, 2:])
    return with_mirror(images) / 2 + shifted / 4


def also_accuracies(
    backend: Backend, eval_sets: Sequence[EvalSet], class_names: Sequence[str], to_go: TimeToGo
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the accuracy in % on each of ``eval_sets`` by name, and for each severity of those that have several.

    A folder of corruptions also has the means over its corruptions: NAME/mean, and NAME/severity-1 to NAME/severity-5.
    Log lines tell all of them, and the classes of ``class_names`` that a set lacks. ``to_go`` counts the work.
    """
    accuracies: dict[str, float] = {}
    severities: dict[str, list[float]] = {}
    for one in eval_sets:
        to_go.status = f"testing on {one.name}"
        logits = plain_logits(backend, one.images, one.indices)
        to_go.add(EVALUATED * len(one.indices))
        correct = logits.argmax(dim=1).cpu().numpy() == one.labels[one.indices]
        percent = accuracies[one.name] = 100 * int(correct.sum()) / len(correct)
        if one.severities > 1:
            severity = one.indices // (len(one.images) // one.severities)
            severities[one.name] = [100 * float(correct[severity == k].mean()) for k in range(one.severities)]
        by_severity = _by_severity(severities.get(one.name, []))
        lacking = lacking_classes(one.labels[one.indices], class_names)
        lacking = lacking and f" ({lacking})"
        LOGGER.info(f"also tested on {one.name}, {len(correct)} images: {percent:.2f} %{by_severity}{lacking}")
    for group in dict.fromkeys(one.group for one in eval_sets if one.group):
        members = [one.name for one in eval_sets if one.group == group]
        members = [one.name for one in eval_sets if one.group == group and one.in_mean] or members
        mean = accuracies[f"{group}/mean"] = statistics.fmean(accuracies[name] for name in members)
        of_each = [statistics.fmean(values) for values in zip(*(severities.get(name, []) for name in members))]
        accuracies |= {f"{group}/severity-{k}": value for k, value in enumerate(of_each, 1)}
        LOGGER.info(f"mean over {len(members)} corruptions of {group}: {mean:.2f} %{_by_severity(of_each)}")
    return accuracies, severities


def _by_severity(values: Sequence[float]) -> str:
    return f"; severity 1 to {len(values)}: {' '.join(f'{value:.2f}' for value in values)}" if values else ""


def confusion_matrix(labels: np.ndarray, logits: torch.Tensor) -> list[list[int]]:
    """Return how many images of each class, a row, are classified as each class, a column."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=1).cpu().numpy()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes).tolist()

"""Repeat a training step from the same state, and compare the bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cifar_fast.backends.base import Backend, Step


def repeat_step(backend: Backend, step: Step, i: int) -> tuple[tuple[torch.Tensor, torch.Tensor], list[str]]:
    """Train step ``i`` of an epoch twice from the same state.

    All states are copied to the CPU, so the device is waited for.

    Returns:
        Losses and correct predictions of the second time, and the names of all that has other bits than the first
        time: the loss, weights and statistics by their names in the model, the momentum of a weight.
    """
    before, generators = backend.training_state(), _generators(backend.device)
    seeds = [generator.get_state() for generator in generators]  # a custom model may draw from them
    first = _everything(backend, *step(i))
    backend.load_training_state(before)
    backend.rewind(i)
    for generator, seed in zip(generators, seeds):
        generator.set_state(seed)
    results = step(i)
    second = _everything(backend, *results)
    differing = [name for name, tensor in second.items() if not _same_bits(tensor, first[name])]
    return results, differing


def _everything(backend: Backend, loss: torch.Tensor, correct: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copy to the CPU all that a step has changed, by name."""
    return {
        "loss": loss.cpu().clone(),
        "correct": correct.cpu().clone(),
        **dict(_named(backend, backend.training_state())),
    }


def _named(backend: Backend, state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, value) for name, value in state["model"].items() if isinstance(value, torch.Tensor))
    for (name, _), momentum in zip(backend.model.named_parameters(), state["momentum"]):
        if momentum is not None:
            yield f"momentum of {name}", momentum


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)


def _generators(device: torch.device) -> list[torch.Generator]:
    """Return torch's default generators of the CPU and of ``device``."""
    of_device = [torch.cuda.default_generators[torch.cuda.current_device()]] if device.type == "cuda" else []
    return [torch.default_generator, *of_device]

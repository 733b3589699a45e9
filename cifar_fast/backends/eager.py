"""The eager and compiled backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from cifar_fast.backends.base import (
    Resumable,
    compile_loss_fn,
    evaluate_by_batches,
    make_loss_fn,
    make_sgd,
    warm_up_draws,
)
from cifar_fast.data.augment import Draws, augment
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.tensors import normalized_tensors
from cifar_fast.model import make_model
from cifar_fast.recipe import Recipe

if TYPE_CHECKING:
    from cifar_fast.model import CustomModel


class Eager(Resumable):
    """The reference: the same operations on the same numbers in the same order, and in the same memory format.

    On CIFAR-10 the script's batches are NCHW in memory, ``torch.contiguous_format``; in channels_last other kernels
    give other last bits, and on a CPU take less time.
    """

    name = "eager"

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        custom_model: CustomModel | None = None,
    ) -> None:
        self.recipe, self.device, self.dtype, self.memory_format = recipe, device, dtype, memory_format
        self.custom_model = custom_model
        self.data = normalized_tensors(dataset, device, dtype, memory_format)
        self.model = make_model(recipe, dataset, device, dtype, custom_model)
        self.score = make_loss_fn(self.model, recipe, device, dtype)
        self.reset(self.model)

    def reset(self, model: nn.Module) -> None:
        self.epoch = 0
        self.model.load_state_dict(model.state_dict())
        self.optimizer = make_sgd(self.model, self.recipe)

    def train_epoch(self, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch += 1
        return train_by_steps(self, draws, (self.epoch - 1) % self.recipe.epochs)

    def evaluate(self) -> torch.Tensor:
        return evaluate_by_batches(self.model, self.score, self.data, self.recipe.batch_size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


class Compiled(Resumable):
    """The same model under torch.compile, with the compiler's own kernels alone; in channels_last unless told."""

    name = "compiled"

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        custom_model: CustomModel | None = None,
    ) -> None:
        self.recipe, self.device, self.dtype, self.memory_format = recipe, device, dtype, memory_format
        self.custom_model = custom_model
        self.data = normalized_tensors(dataset, device, dtype, memory_format)
        # The compiled code holds this model's tensors; each run copies its weights into them.
        self.model = make_model(recipe, dataset, device, dtype, custom_model).to(memory_format=memory_format)
        # Whole, or where it is anybody's, in pieces with Python between them.
        self.score = compile_loss_fn(make_loss_fn(self.model, recipe, device, dtype), whole=custom_model is None)
        self.reset(self.model)
        next(self.train_epoch(warm_up_draws(len(dataset.train_images), device)))
        self.evaluate()

    def reset(self, model: nn.Module) -> None:
        self.epoch = 0
        self.model.load_state_dict(model.state_dict())
        self.model.zero_grad()
        self.optimizer = make_sgd(self.model, self.recipe)

    def train_epoch(self, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch += 1
        return train_by_steps(self, draws, (self.epoch - 1) % self.recipe.epochs)

    def evaluate(self) -> torch.Tensor:
        return evaluate_by_batches(self.model, self.score, self.data, self.recipe.batch_size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


def train_by_steps(backend: Eager | Compiled, draws: Draws, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Train epoch number ``epoch``, from 0, with the host launching each step's operations."""
    recipe, data, size = backend.recipe, backend.data, backend.recipe.batch_size
    steps = len(draws) // size
    backend.model.train()
    for i in range(steps):
        for group in backend.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(epoch * steps + i + 1, steps)
        batch = draws.slice(i * size, (i + 1) * size)
        images = augment(data.train_images, batch, recipe, backend.memory_format)
        loss, correct = backend.score(images, data.train_labels[batch.permutation])
        backend.model.zero_grad()
        loss.sum().backward()
        backend.optimizer.step()
        yield loss.detach(), correct

"""The eager and compiled backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from cifar_fast.backends.base import Backend, Step, autocast, compile_loss_fn, warm_up_draws
from cifar_fast.backends.optimizers import make_optimizer
from cifar_fast.data.augment import Draws, augment
from cifar_fast.model import build_model, loss_and_correct, start_epoch

Normalize: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""A function of the uint8 pixels ``[..., C]`` of training images."""


class Eager(Backend):
    """The reference: the script's operations on the same numbers in the same order.

    The script's batches are NCHW in memory, ``torch.contiguous_format``. In channels_last torch uses other kernels,
    which give other last bits and are faster on a CPU.
    """

    name = "eager"
    compiles = False

    def _set_up(self) -> None:
        recipe, device = self.recipe, self.device
        self.normalize: Normalize = functools.partial(self.data.normalization.apply, dtype=self.dtype)
        self.model = model = build_model(recipe, self.data.num_classes, device, self.dtype, self.custom_model)

        def loss_fn(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with autocast(device, images.dtype):
                return loss_and_correct(model(images), labels, recipe)

        self.loss_fn = loss_fn
        self.reset(model)

    def batch(self, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        images = augment(self.data.train_images, draws, self.recipe, self.memory_format, self.normalize)
        return images, self.data.train_labels[draws.permutation]

    def reset(self, model: nn.Module) -> None:
        super().reset(model)
        self.model.zero_grad()
        self.optimizer = make_optimizer(self.model, self.recipe)

    def begin_epoch(self, draws: Draws) -> Step:
        recipe, size = self.recipe, self.recipe.batch_size
        steps = len(draws) // size
        epoch = self.epoch % recipe.epochs
        rates = recipe.learning_rates(steps)[epoch * steps :]
        start_epoch(self.model, epoch)
        self.epoch += 1
        self.model.train()

        def step(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            for group in self.optimizer.param_groups:
                group["lr"] = float(rates[i, group["rate"]])
            loss, correct = self.loss_fn(*self.batch(draws.slice(i * size, (i + 1) * size)))
            self.model.zero_grad()
            loss.sum().backward()
            self.optimizer.step()
            return loss.detach(), correct

        return step

    def evaluate(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._evaluate_in_batches(self.loss_fn, self.recipe.batch_size)


class Compiled(Eager):
    """The same model under ``torch.compile``, without our kernels.

    The compiled code holds the tensors of one model. Each run copies its weights into them.
    """

    name = "compiled"
    compiles = True

    def _set_up(self) -> None:
        super()._set_up()
        self.model.to(memory_format=self.memory_format)
        # A caller's model may need Python between its compiled parts.
        self.loss_fn = compile_loss_fn(self.loss_fn, fullgraph=self.custom_model is None)
        phases = {start_epoch(self.model, epoch): epoch for epoch in reversed(range(self.recipe.epochs))}
        for self.epoch in phases.values():
            next(self.train_epoch(warm_up_draws(len(self.data.train_images), self.device)))
        self.evaluate()

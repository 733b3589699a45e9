"""The optimizers of the recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cifar_fast.recipe import Recipe

NEWTON_SCHULZ_STEPS = 3
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315
"""Coefficients of X, X X^T X and (X X^T)^2 X. They make small singular values grow fast, instead of converging to 1."""


def make_optimizer(
    model: nn.Module, recipe: Recipe, *, fused: bool | None = None, lr: torch.Tensor | None = None
) -> torch.optim.SGD:
    """Return the recipe's optimizer for the parameters of ``model``.

    The loss is a sum over the batch, so the weight decay is multiplied by the batch size. Each group of parameters has
    its index in ``recipe.groups`` as ``rate``.

    Args:
        model: the recipe's network, or a custom model.
        recipe: the optimizer's name and constants.
        fused: argument of ``torch.optim.SGD``. None, as in the reference script, selects the multi-tensor
            implementation on a GPU.
        lr: learning rates ``[groups]`` on the device, read at each step. None: they are 0 until they are set.
    """
    groups = _muon_groups(model, recipe) if recipe.optimizer == "muon" else _sgd_groups(model, recipe)
    for group in groups:
        group["lr"] = 0.0 if lr is None else lr[group["rate"] : group["rate"] + 1]
    make: Callable[..., torch.optim.SGD] = Muon if recipe.optimizer == "muon" else torch.optim.SGD
    decay = recipe.weight_decay * recipe.batch_size
    return make(groups, momentum=recipe.momentum, weight_decay=decay, nesterov=recipe.nesterov, fused=fused)


def _sgd_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    if recipe.decay_norms_and_biases:
        return [{"params": list(model.parameters()), "rate": 0}]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]  # one value per channel
    return [{"params": matrices, "rate": 0}, {"params": vectors, "weight_decay": 0.0, "rate": 0}]


def _muon_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    members: list[list[nn.Parameter]] = [[] for _ in recipe.groups]
    for name, parameter in model.named_parameters():
        if name == "whiten.bias":
            members[1].append(parameter)
        elif parameter.requires_grad:
            members[{4: 0, 1: 2}.get(parameter.dim(), 3)].append(parameter)
    decay = recipe.weight_decay * recipe.batch_size
    groups: list[dict[str, Any]] = [{"params": members[0], "momentum": recipe.muon_momentum, "filters": True}]
    rates = recipe.bias_lr, recipe.bias_lr, recipe.head_lr  # learning rate times weight decay is the same for all
    groups += [{"params": params, "weight_decay": decay / rate} for params, rate in zip(members[1:], rates)]
    return [group | {"rate": rate} for rate, group in enumerate(groups) if group["params"]]


class Muon(torch.optim.SGD):
    """SGD whose groups with ``filters=True`` follow Muon: their updates have singular values near 1.

    The filters ``[out, in, height, width]`` are matrices of ``out`` rows here. Each is scaled to the Frobenius norm
    sqrt(out), and then moves by the learning rate times its orthogonalized momentum. From airbench94_muon by Keller
    Jordan. ``torch.optim.Muon`` takes matrices only, and has no such scaling.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("filters")]
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("filters"):
                self._step_filters(group)
        return result

    def _step_filters(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():
            updates = orthogonalize(torch.stack([self._momentum(each, group).flatten(1) for each in parameters]))
            for parameter, update in zip(parameters, updates):
                norm = parameter.norm()
                parameter.mul_(torch.where(norm > 0, len(parameter) ** 0.5 / norm, norm))
                lr = group["lr"]
                if isinstance(lr, torch.Tensor):  # on the device; torch's alpha would have to be a number
                    parameter.copy_(parameter - lr * update.view(parameter.shape).to(lr.dtype))
                else:
                    parameter.add_(update.view(parameter.shape), alpha=-lr)

    def _momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        """Update the momentum of ``parameter``, and return the direction of its step."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        return gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices with the same singular vectors and singular values near 1 (0.5 to 1.5), ``[B, rows, columns]``.

    A Newton-Schulz iteration in bfloat16, from airbench94_muon by Keller Jordan. Matrices in float64 stay float64.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices if matrices.dtype == torch.float64 else matrices.bfloat16()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)  # then no singular value is above 1
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

"""The recipe's kernel launches, on tensors without memory: what is compiled, predicted and measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cifar_fast import Recipe
from cifar_fast.recipe import IMAGE_SIZE
from kernels import batch_norm_celu
from kernels.launch import Launch


@dataclass(frozen=True)
class Case:
    """One operator at one shape: ``x`` is ``[N, C, H, W]`` before the pool."""

    name: str
    shape: tuple[int, int, int, int]
    pool: int
    dtype: torch.dtype
    alpha: float
    training: bool

    def launches(self) -> list[Launch]:
        """Forward and backward in training; the one pass in evaluation."""
        n, channels, height, width = self.shape
        x = torch.empty(n, height, width, channels, dtype=self.dtype, device="meta").permute(0, 3, 1, 2)
        y, pooled, argmax, statistics = batch_norm_celu._outputs(x, self.pool)
        weight, bias = (torch.empty(channels, dtype=self.dtype, device="meta") for _ in range(2))
        values = dict(statistics=statistics, weight=weight, bias=bias)
        eps = torch.nn.BatchNorm2d(1).eps
        if not self.training:
            return batch_norm_celu.plan_apply(x, y, values, self.alpha, self.pool)
        kept = x if self.pool == 1 else pooled
        partial = statistics.new_empty(2, batch_norm_celu.stretches(x, self.pool, "statistics"), channels)
        dy, dx, dweight, dbias = (torch.empty_like(tensor) for tensor in (y, x, weight, bias))
        totals = statistics.new_empty(2, channels)
        return [
            *batch_norm_celu.plan_statistics(x, pooled, argmax, partial, statistics, eps, self.pool),
            *batch_norm_celu.plan_apply(kept, y, values, self.alpha, 1),
            *batch_norm_celu.plan_backward(dy, kept, argmax, values, partial, totals, dx, dweight, dbias, True, self.alpha, self.pool),
        ]


def recipe_cases(recipe: Recipe, dtype: torch.dtype) -> list[Case]:
    """Every distinct shape at which the recipe norms, in training and in evaluation."""
    cases: dict[Case, None] = {}
    size = IMAGE_SIZE
    for channels, pooled in zip(recipe.widths, recipe.pools):
        shape = (recipe.batch_size, channels, size, size)
        pool = 2 if pooled else 1
        for training in (True, False):
            name = f"{channels}x{size}x{size}{', pool' if pooled else ''}{'' if training else ', eval'}"
            cases[Case(name, shape, pool, dtype, recipe.celu_alpha, training)] = None
        size //= pool
    return list(cases)

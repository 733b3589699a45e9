"""The recipe's kernel launches, on tensors without memory: what is compiled, predicted and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cifar_fast import Recipe
from cifar_fast.recipe import IMAGE_SIZE
from kernels.augment import plan_augment
from kernels.batch_norm_celu import _outputs, plan_apply, plan_backward, plan_statistics, stretches
from kernels.launch import Launch

EPS = torch.nn.BatchNorm2d(1).eps
PICTURES = 50_000


@dataclass(frozen=True)
class Case:
    """One operator at one shape; ``launches()`` plans it."""

    name: str
    launches: Callable[[], list[Launch]]


def recipe_cases(recipe: Recipe, dtype: torch.dtype) -> list[Case]:
    """Every distinct shape at which the recipe augments and norms; in evaluation, where that takes another kernel."""
    cases = {f"augment to {c} channels": partial(augment_launches, recipe, dtype, c) for c in (3, 4, 8)}
    size = IMAGE_SIZE
    for channels, pooled in zip(recipe.widths, recipe.pools):
        shape = (recipe.batch_size, channels, size, size)
        name = f"{channels}x{size}x{size}{', pool' if pooled else ''}"
        cases[name] = partial(norm_launches, shape, 1 + pooled, dtype, recipe.celu_alpha)
        if pooled:
            cases[f"{name}, eval"] = partial(evaluation_launches, shape, 2, dtype, recipe.celu_alpha)
        size //= 1 + pooled
    return [Case(name, launches) for name, launches in cases.items()]


def _meta(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def augment_launches(recipe: Recipe, dtype: torch.dtype, out_channels: int) -> list[Launch]:
    """A batch's augmentation out of a data set of 50,000 pictures, addressed by a step counter."""
    images = _meta(PICTURES, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    labels, *epoch = (_meta(PICTURES, dtype=torch.int64) for _ in range(5))
    out = _meta(recipe.batch_size, IMAGE_SIZE, IMAGE_SIZE, out_channels, dtype=dtype)
    out_labels, step = _meta(recipe.batch_size, dtype=torch.int64), _meta(1, dtype=torch.int64)
    table = _meta(3, 256, dtype=dtype)
    settings = dict(padding=recipe.crop_padding, cutout_size=recipe.cutout_size)
    return plan_augment(images, *epoch, table, out, labels=labels, step=step, out_labels=out_labels, **settings)


def norm_launches(shape: tuple[int, int, int, int], pool: int, dtype: torch.dtype, alpha: float) -> list[Launch]:
    """Forward and backward in training; ``shape`` is ``[N, C, H, W]`` before the pool."""
    n, channels, height, width = shape
    x = _meta(n, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
    y, pooled, argmax, statistics = _outputs(x, pool)
    kept = x if pool == 1 else pooled
    weight, bias, dweight, dbias = (_meta(channels, dtype=dtype) for _ in range(4))
    values = dict(statistics=statistics, weight=weight, bias=bias)
    dy, dx = torch.empty_like(y), torch.empty_like(x)
    sums = statistics.new_empty(2, stretches(x, pool, "backward_sums"), channels)
    partials = statistics.new_empty(2 * stretches(x, pool, "statistics") + 1, channels)
    totals = statistics.new_empty(2, channels)
    return [
        *plan_statistics(x, pooled, argmax, partials, statistics, EPS, pool),
        *plan_apply(kept, y, values, alpha, 1),
        *plan_backward(dy, kept, argmax, values, sums, totals, dx, dweight, dbias, True, alpha, pool),
    ]


def evaluation_launches(shape: tuple[int, int, int, int], pool: int, dtype: torch.dtype, alpha: float) -> list[Launch]:
    """The one pass of evaluation."""
    n, channels, height, width = shape
    x = _meta(n, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
    y, _, _, statistics = _outputs(x, pool)
    weight, bias = (_meta(channels, dtype=dtype) for _ in range(2))
    return plan_apply(x, y, dict(statistics=statistics, weight=weight, bias=bias), alpha, pool)

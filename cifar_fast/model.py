"""The reference's network and loss."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from cifar_fast.recipe import Recipe


class CNN(nn.Module):
    """Convolutions 3x3, each followed by (max-pool,) batch norm and CELU; then max-pool and a linear layer.

    The pool stands before the norm, where it cuts the norm's traffic by four. With ``recipe.residual`` each block of
    convolution, norm and activation with as many channels going in as out, which has no pool, adds its input to its
    output, and the sum is not activated again: with the reference's widths blocks 3, 4, 7 and 8.

    Names in the state dict are those of the reference script's model, whatever the recipe leaves out: an Identity
    stands in its place. Made on the CPU in float32, with initial weights drawn from ``generator`` (default: torch's
    own) as torch's layers draw theirs, times ``recipe.init_scale``.
    """

    def __init__(self, recipe: Recipe, num_classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.output_scale = recipe.output_scale
        where: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
        layers: list[nn.Module] = []
        self.skips: dict[int, int] = {}  # first and last layer of each block whose input is added to its output
        for block in recipe.blocks():
            first = len(layers)
            layers.append(skip_init(nn.Conv2d, block.c_in, block.c_out, 3, padding=1, bias=False, **where))
            if block.pool > 1:
                layers.append(nn.MaxPool2d(block.pool))
            layers.append(nn.BatchNorm2d(block.c_out, **where) if recipe.batch_norm else nn.Identity())
            layers.append(make_activation(recipe))
            if recipe.residual and block.keeps_shape:
                self.skips[first] = len(layers) - 1
        linear = skip_init(nn.Linear, recipe.widths[-1], num_classes, bias=False, **where)
        self.seq = nn.Sequential(*layers, nn.MaxPool2d(recipe.final_size), nn.Flatten(), linear)
        for layer in self.seq:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):  # what their reset_parameters does, which takes no generator
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                layer.weight.data.mul_(recipe.init_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of normalized images ``[B, 3, 32, 32]``."""
        return self.outputs(x) * self.output_scale

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """The logits before their scale."""
        for i, layer in enumerate(self.seq):
            if i in self.skips:
                kept = x
            x = layer(x)
            if i in self.skips.values():
                x = x + kept
        return x


def make_activation(recipe: Recipe) -> nn.Module:
    """The recipe's activation."""
    if recipe.activation == "celu":
        return nn.CELU(alpha=recipe.celu_alpha)
    return {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[recipe.activation]()


def loss_and_correct(logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image's loss, and whether its largest logit is its label's; both ``[B]``, the second bool."""
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=recipe.label_smoothing)
    return loss, logits.argmax(dim=1) == labels

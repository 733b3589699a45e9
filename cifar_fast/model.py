"""The reference's network and loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast.recipe import Recipe


class CNN(nn.Module):
    """Convolutions 3x3, each followed by (max-pool,) batch norm and CELU; then max-pool and a linear layer.

    The pool stands before the norm, where it cuts the norm's traffic by four. Names in the state
    dict are those of the reference script's model.
    """

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        super().__init__()
        self.output_scale = recipe.output_scale
        layers: list[nn.Module] = []
        for block in recipe.blocks():
            layers.append(nn.Conv2d(block.c_in, block.c_out, kernel_size=3, padding=1, bias=False))
            if block.pool > 1:
                layers.append(nn.MaxPool2d(block.pool))
            layers += [nn.BatchNorm2d(block.c_out), nn.CELU(alpha=recipe.celu_alpha)]
        head = [nn.MaxPool2d(recipe.final_size), nn.Flatten(), nn.Linear(recipe.widths[-1], num_classes, bias=False)]
        self.seq = nn.Sequential(*layers, *head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of normalized images ``[B, 3, 32, 32]``."""
        return self.seq(x) * self.output_scale


def loss_and_correct(logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image's loss, and whether its largest logit is its label's; both ``[B]``, the second bool."""
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=recipe.label_smoothing)
    return loss, logits.argmax(dim=1) == labels

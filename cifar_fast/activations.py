"""The activations of the networks."""

from __future__ import annotations

from torch import nn

from cifar_fast.recipe import Recipe


def make_activation(recipe: Recipe) -> nn.Module:
    """Return the recipe's activation."""
    if recipe.activation == "celu":
        return nn.CELU(alpha=recipe.celu_alpha)
    return {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[recipe.activation]()

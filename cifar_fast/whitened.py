"""The network ``whitened``: a fixed convolution that whitens patches, groups of two convolutions, a linear layer."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from cifar_fast.activations import make_activation
from cifar_fast.recipe import IMAGE_CHANNELS, WHITENED_CHANNELS, WHITENING_SIZE, Recipe

IMAGES = 5000
"""Number of training images whose patches are whitened: the first ones."""

REGULARIZATION = 5e-4
"""Added to the eigenvalues of the patches' covariance, for normalized images."""


class Whitened(nn.Module):
    """A 2x2 convolution that whitens patches, then groups of two 3x3 convolutions, and a linear layer.

    A group is a convolution, 2x2 max-pool, batch norm, activation, convolution, batch norm, activation. The norms train
    a bias and have no weight. The names in the state dict are those of airbench94_muon by Keller Jordan, from whose
    published program the structure, the initialization and all constants are.

    Args:
        recipe: its widths (of the groups), activation and scale define the network.
        num_classes: number of logits.
        generator: draws the initial weights. None is torch's default generator. The weights are float32 on the CPU.
            :meth:`prepare` sets those of the first convolution.
    """

    def __init__(self, recipe: Recipe, num_classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.output_scale = recipe.output_scale
        self.bias_epochs = recipe.whitening_bias_epochs
        factory: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
        self.whiten = skip_init(nn.Conv2d, IMAGE_CHANNELS, WHITENED_CHANNELS, WHITENING_SIZE, **factory)
        self.whiten.weight.requires_grad_(False)
        nn.init.kaiming_uniform_(self.whiten.weight, a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(IMAGE_CHANNELS * WHITENING_SIZE**2)
        nn.init.uniform_(self.whiten.bias, -bound, bound, generator=generator)

        groups, c_in = [], WHITENED_CHANNELS
        for c_out in recipe.widths:
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for i in (1, 2):
                layers[f"conv{i}"] = conv = skip_init(nn.Conv2d, c_in, c_out, 3, padding=1, bias=False, **factory)
                nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5), generator=generator)
                nn.init.dirac_(conv.weight.data[:c_in])  # the first filters pass their input channel on
                if i == 1:
                    layers["pool"] = nn.MaxPool2d(2)
                layers[f"norm{i}"] = norm = nn.BatchNorm2d(c_out, eps=1e-12, momentum=0.4, **factory)
                norm.weight.requires_grad_(False)
                layers[f"activation{i}"] = make_activation(recipe)
                c_in = c_out
            groups.append(nn.Sequential(layers))
        self.layers = nn.Sequential(make_activation(recipe), *groups, nn.MaxPool2d(recipe.final_size))
        self.head = skip_init(nn.Linear, recipe.widths[-1], num_classes, bias=False, **factory)
        nn.init.kaiming_uniform_(self.head.weight, a=math.sqrt(5), generator=generator)
        self.head.weight.data.div_(self.head.weight.data.std())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, num_classes]`` for normalized images ``[B, 3, 32, 32]``."""
        return self.outputs(x) * self.output_scale

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits before they are scaled."""
        return self.head(self.layers(self.whiten(x)).flatten(1))

    @torch.no_grad()
    def prepare(self, images: torch.Tensor) -> None:
        """Set the first convolution so that its outputs on patches of ``images`` are white, and their negatives.

        Args:
            images: normalized training images ``[N, 3, 32, 32]``, float32 on the CPU. The first 5,000 are used.
        """
        products, count = torch.zeros(()), 0
        for some in images[:IMAGES].split(500):
            patches = F.unfold(some, WHITENING_SIZE)  # [N, 12, patches of an image]
            products = products + (patches @ patches.mT).sum(0)
            count += len(patches) * patches.shape[2]
        values, vectors = torch.linalg.eigh(products / count, UPLO="U")
        directions = (vectors / (values + REGULARIZATION).sqrt()).T.reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat((directions, -directions)))

    def start_epoch(self, epoch: int) -> bool:
        """Select what is trained in an epoch, counted from 0. Return whether it is all parameters."""
        trains_bias = epoch < self.bias_epochs
        self.whiten.bias.requires_grad_(trains_bias)
        return trains_bias

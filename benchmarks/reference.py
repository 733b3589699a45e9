"""A second, plain and slow implementation of the reference recipe, to compare results and speed with.

It shares neither code nor constants with ``cifar_fast``. There is one pass for each possible draw of a transformation.
It changes the images with that draw. An epoch has 25 crops, 2 flips and 625 cutouts, which are 652 passes. The network
is written layer by layer, and the learning rate is computed from the definition of the schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]
SIDE, PAD, HOLE = 32, 4, 8
WIDTHS = (64, 128, 128, 128, 256, 512, 512, 512)


def normalized(train: np.ndarray, test: np.ndarray, dtype: torch.dtype, device: str = "cpu") -> Pair:
    """Normalize uint8 ``[N, 32, 32, 3]`` to ``[N, 3, 32, 32]`` by the mean and deviation of the training images.

    The script trains on torchvision's CIFAR-10, a transposed view of ``[N, 3, 32, 32]``. torch.tensor keeps its
    strides, so everything after it is NCHW in memory.
    """
    train_pixels, test_pixels = (
        torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1), device=device)
        for images in (train, test)
    )
    deviation, mean = torch.std_mean(train_pixels.float(), dim=(0, 1, 2), unbiased=True, keepdim=True)
    scaled = [(pixels - mean) / deviation for pixels in (train_pixels, test_pixels)]
    return scaled[0].to(dtype).permute(0, 3, 1, 2), scaled[1].to(dtype).permute(0, 3, 1, 2)


def augmented_epoch(images: torch.Tensor, labels: torch.Tensor) -> Pair:
    """Return a shuffled, augmented copy of the whole set. It draws from the default generator of the device."""
    order = torch.randperm(len(images), device=images.device)
    images, labels = images[order], labels[order]

    drawn = torch.randint((PAD + 1) ** 2, (len(images),), device=images.device)
    for x in range(PAD + 1):
        for y in range(PAD + 1):
            mine = drawn == x * (PAD + 1) + y
            images[mine] = F.pad(images[mine], (PAD,) * 4, mode="reflect")[:, :, y : y + SIDE, x : x + SIDE]

    drawn = torch.randint(2, (len(images),), device=images.device)
    for mirror in (True, False):
        mine = drawn == (0 if mirror else 1)
        images[mine] = images[mine].flip(3) if mirror else images[mine]

    places = SIDE - HOLE + 1
    drawn = torch.randint(places**2, (len(images),), device=images.device)
    for x in range(places):
        for y in range(places):
            mine = drawn == x * places + y
            chosen = images[mine]
            chosen[:, :, y : y + HOLE, x : x + HOLE] = 0
            images[mine] = chosen
    return images, labels


class Network(nn.Module):
    """The network, with the state dict names ``seq.N.*``, for eight widths."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, classes: int = 10) -> None:
        super().__init__()
        a, b, c, d, e, f, g, h = widths

        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        celu = functools.partial(nn.CELU, 0.075)
        half = nn.MaxPool2d
        self.seq = nn.Sequential(
            *(conv(3, a), nn.BatchNorm2d(a), celu()),
            *(conv(a, b), half(2), nn.BatchNorm2d(b), celu()),
            *(conv(b, c), nn.BatchNorm2d(c), celu()),
            *(conv(c, d), nn.BatchNorm2d(d), celu()),
            *(conv(d, e), half(2), nn.BatchNorm2d(e), celu()),
            *(conv(e, f), half(2), nn.BatchNorm2d(f), celu()),
            *(conv(f, g), nn.BatchNorm2d(g), celu()),
            *(conv(g, h), nn.BatchNorm2d(h), celu()),
            *(half(4), nn.Flatten(), nn.Linear(h, classes, bias=False)),
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Pair:
        logits = self.seq(images) / 8
        loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
        return loss, (logits.argmax(1) == labels) * 100


class Training:
    """The training of the reference, set up as in its script."""

    def __init__(
        self, *, seed: int, epochs: int, batch_size: int, dtype: torch.dtype, device: str = "cpu", **network: Any
    ) -> None:
        torch.manual_seed(seed)
        self.network = Network(**network).to(dtype).to(device)
        self.epochs, self.batch_size, self.done = epochs, batch_size, 0
        self.sgd = torch.optim.SGD(
            self.network.parameters(), lr=0, momentum=0.9, weight_decay=5e-4 * batch_size, nesterov=True
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor, steps_per_epoch: int) -> Pair:
        self.done += 1
        self.network.train()
        knots, rates = [0, self.epochs / 5, self.epochs], [0.1 / self.batch_size, 0.6 / self.batch_size, 0]
        self.sgd.param_groups[0]["lr"] = float(np.interp([self.done / steps_per_epoch], knots, rates)[0])
        loss, correct = self.network(images, labels)
        self.network.zero_grad()
        loss.sum().backward()
        self.sgd.step()
        return loss.detach(), correct

    def batches(self, images: torch.Tensor, labels: torch.Tensor) -> Iterator[Pair]:
        """Yield the full batches of an augmented epoch."""
        images, labels = augmented_epoch(images, labels)
        for i in range(len(images) // self.batch_size):
            part = slice(i * self.batch_size, (i + 1) * self.batch_size)
            yield images[part], labels[part]

    def epoch(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Train one epoch; return its mean loss and its accuracy in percent."""
        steps = len(images) // self.batch_size
        losses, correct = zip(*(self.step(*batch, steps) for batch in self.batches(images, labels)))
        return torch.cat(losses).float().mean().item(), torch.cat(correct).float().mean().item()

    def evaluate(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Return the accuracy in percent. The last batch may be short."""
        self.network.eval()
        with torch.no_grad():
            batches = zip(images.split(self.batch_size), labels.split(self.batch_size))
            return torch.cat([self.network(*batch)[1] for batch in batches]).float().mean().item()

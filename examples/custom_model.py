"""Train a network of your own with the recipe.

    OMP_NUM_THREADS=1 python examples/custom_model.py    # ten seconds; threads do not help so narrow a network
    python examples/custom_model.py --dataset cifar10 --epochs 24 --runs 5           # on a GPU

The network can be any module that maps images [B, 3, 32, 32] to logits [B, classes]. On a GPU it is trained as one
captured step if it can be captured. A module that reads a tensor's value on the host (.item(), an if on a tensor)
cannot be; the next backend then trains it. The script prints the chosen backend and the reason.

In bfloat16 the weights stay float32, under autocast. In the recipe's float16 the weights are float16 too, which some
networks do not tolerate.
"""

import argparse

import torch
from torch import nn

from cifar_fast import Recipe, fit, load_dataset


class Bottleneck(nn.Module):
    """A depthwise convolution, then a pointwise convolution, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.pointwise(self.norm(self.depthwise(x)).relu())


class MyNet(nn.Module):
    """A small network of bottleneck blocks."""

    def __init__(self, classes: int, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=4, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*[Bottleneck(width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a network of your own with the recipe.")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()

    dataset = load_dataset(args.dataset)
    dtype = "bfloat16" if torch.cuda.is_available() else "auto"
    recipe = Recipe(epochs=args.epochs, batch_size=128, lr_values=(0.02, 0.1, 0.0))
    # The function makes a fresh model for each run, under the run's seed.
    result = fit(recipe, dataset, model=lambda: MyNet(dataset.num_classes), runs=args.runs, dtype=dtype, log=None)
    print(f"{result.model}, {result.parameters:,} parameters, by the {result.backend} backend in {result.dtype}")
    print(*result.auto, sep="\n")
    print(result.summary_line())


if __name__ == "__main__":
    main()

"""Measure augmented images/s: cifar_fast.Loader, and torchvision's transforms in torch's DataLoader.

    python examples/loader_speed.py                          # 10,000 images, 5 rounds: a minute on two cores
    python examples/loader_speed.py --images 1000 --rounds 2 # some seconds

All of them make the recipe's images, which are cropped with reflection, mirrored, normalized and cut out. They return
float32 batches of 512 on the device, and take turns: one epoch each in every round. The first round starts the workers
and is not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cifar_fast import Loader, load_dataset

CUT = 8


def cutout(image: torch.Tensor) -> torch.Tensor:
    y, x = torch.randint(33 - CUT, (2,)).tolist()
    image[:, y : y + CUT, x : x + CUT] = 0
    return image


def torchvision_transform(mean: torch.Tensor, std: torch.Tensor) -> Callable:
    """Return the recipe's augmentation. ``padding=4`` would be another crop, with 81 places instead of 25."""
    steps = [transforms.RandomCrop(32, padding=(4, 4, 0, 0), padding_mode="reflect"), transforms.RandomHorizontalFlip()]
    normalize = transforms.Normalize((mean / 255).tolist(), (std / 255).tolist())
    return transforms.Compose([*steps, transforms.ToTensor(), normalize, cutout])


class Pictures(Dataset):
    """Returns a transformed PIL image and its label, as torchvision's CIFAR10 does."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Callable) -> None:
        self.images, self.labels, self.transform = images.cpu().numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def images_per_second(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> float:
    start, seen = time.perf_counter(), 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        seen += len(labels)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return seen / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=int, default=10_000, help="images of an epoch, at most 10,000 (default: 10,000)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted epochs of each loader (default: 5)")
    args = parser.parse_args()

    ours = Loader(load_dataset("synthetic"), min(512, args.images))
    ours.images, ours.labels = ours.images[: args.images], ours.labels[: args.images]
    theirs = Pictures(ours.images, ours.labels, torchvision_transform(ours.mean.cpu(), ours.std.cpu()))

    loaders: dict[str, Iterable] = {"cifar_fast.Loader": ours}
    for workers in (0, 2):
        options: dict[str, Any] = dict(
            num_workers=workers, persistent_workers=workers > 0, shuffle=True, drop_last=True
        )
        loaders[f"torchvision, {workers} workers"] = DataLoader(theirs, ours.batch_size, **options)
    measured: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(1 + args.rounds):
        for name, batches in loaders.items():
            measured[name].append(images_per_second(batches, ours.device))
    print(f"{torch.get_num_threads()} threads, {ours.device}, {args.rounds} rounds; images/s, median (min to max)")
    for name, (_, *rates) in measured.items():
        ratios = [our_rate / rate for our_rate, rate in zip(measured["cifar_fast.Loader"][1:], rates)]
        print(f"{name}: {spread(rates, ',.0f')}; Loader has {spread(ratios, '.1f')} times as many")


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()

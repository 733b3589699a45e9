"""Parity of the recipe airbench94 with the program that it comes from: python -m benchmarks.airbench94 PROGRAM.

PROGRAM is ``airbench94_muon.py`` of a checkout of github.com/KellerJordan/cifar10-airbench. It runs unchanged, but for
its batch size. Around it, CUDA calls go to the CPU, its random calls return the draws of our epochs, and its initial
weights are ours. Its whitening convolution is its own, and the other parts are compared with the same one.

Both compute in float64, also what is bfloat16 in Muon: a difference of one rounding grows tenfold with each step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast.backends.eager import Eager
from cifar_fast.data.augment import Draws, draw_epoch
from cifar_fast.data.dataset import ARRAYS, Dataset
from cifar_fast.data.sources import load_dataset
from cifar_fast.data.tensors import device_data
from cifar_fast.recipe import Recipe
from cifar_fast.whitened import Whitened

CPU = torch.device("cpu")


def main(argv: list[str]) -> int:
    """Print the largest differences of a training of 32 steps."""
    if len(argv) != 1 or not Path(argv[0]).is_file():
        print(__doc__)
        return 2
    dataset = load_dataset("synthetic", log=None)
    parts = {name: getattr(dataset, name)[:400] for name in ARRAYS}
    for name, difference in compare(Path(argv[0]), dataclasses.replace(dataset, **parts)).items():
        print(f"{name:40} {difference:.1e}")
    return 0


def compare(program: Path, dataset: Dataset, batch_size: int = 100, seed: int = 0) -> dict[str, float]:
    """Return the largest differences of losses (absolute) and of weights and statistics (relative, by their norms)."""
    recipe = dataclasses.replace(Recipe.load("airbench94"), batch_size=batch_size)
    eager = Eager(recipe, device_data(dataset, CPU), CPU, torch.float64, torch.channels_last)
    model = cast(Whitened, eager.new_model(torch.Generator().manual_seed(seed)))
    whitening = model.whiten.weight.detach().clone()
    epochs = [
        draw_epoch(len(dataset.train_images), device=CPU, recipe=recipe, generator=generator, epoch=epoch)
        for generator in [torch.Generator().manual_seed(seed)]
        for epoch in range(recipe.epochs)
    ]
    theirs, other, other_whitening = run_program(program, dataset, model, epochs, recipe, eager)
    with torch.no_grad():
        model.whiten.weight.copy_(other_whitening)
    eager.reset(model)
    ours = [loss.mean() for draws in epochs for loss, _ in eager.train_epoch(draws)]

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))

    losses = (torch.stack(ours) - torch.tensor(theirs, dtype=torch.float64)).abs()
    signs = (whitening * other_whitening).sum(dim=(1, 2, 3), keepdim=True).sign()  # an eigenvector has no sign
    result = {f"whitening of {len(dataset.train_images)} images": relative(whitening * signs, other_whitening)}
    result |= {"loss of the first step": float(losses[0]), f"loss of {len(losses)} steps": float(losses.max())}
    own = eager.state_dict()
    return result | {name: relative(own[name], tensor) for name, tensor in other.items() if tensor.is_floating_point()}


def run_program(
    program: Path, dataset: Dataset, start: nn.Module, epochs: list[Draws], recipe: Recipe, eager: Eager
) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
    """Return the program's losses by step, its final state dict, and its whitening filters."""
    source = program.read_text().replace("batch_size = 2000", f"batch_size = {recipe.batch_size}")
    module = types.ModuleType("airbench94_muon")
    losses: list[float] = []
    with redirected(epochs), tempfile.TemporaryDirectory() as folder, inside(folder):
        Path("cifar10").mkdir()
        for name, split in (("train", "train"), ("test", "test")):
            images, labels = (torch.tensor(getattr(dataset, f"{split}_{part}")) for part in ("images", "labels"))
            torch.save(
                dict(images=images, labels=labels, classes=list(map(str, dataset.class_names))), f"cifar10/{name}.pt"
            )
        with mock.patch.object(sys, "argv", [str(program)]):
            exec(compile(source, str(program), "exec"), module.__dict__)
        space: Any = module
        normalization = eager.data.normalization

        def normalize(images: torch.Tensor) -> torch.Tensor:  # the program divides by 255 first, with other last bits
            pixels = normalization.apply((images * 255).round().permute(0, 2, 3, 1).byte(), torch.float64)
            return pixels.permute(0, 3, 1, 2)

        space.T = types.SimpleNamespace(Normalize=lambda mean, std: normalize)
        space.F = types.SimpleNamespace(**vars(F))
        space.print_columns = lambda *args, **kwargs: None

        def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
            loss = F.cross_entropy(logits, labels, **options)
            losses.append(loss.item() / len(labels))
            return loss

        space.F.cross_entropy = cross_entropy
        model = space.CifarNet().to(memory_format=torch.channels_last)
        whitening: list[torch.Tensor] = []

        def reset() -> None:
            names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
            state = {name: tensor for name, tensor in start.state_dict().items() if name in names}
            model.load_state_dict(state)

        def init_whiten(images: torch.Tensor) -> None:
            space.CifarNet.init_whiten(model, images)
            whitening.append(model.whiten.weight.detach().clone())

        model.reset, model.init_whiten = reset, init_whiten
        space.main(0, model)
    return losses, model.state_dict(), whitening[0]


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Make ``folder`` the working directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def redirected(epochs: list[Draws]) -> Iterator[None]:
    """Send CUDA to the CPU, compute in float64, and return the draws of ``epochs`` from torch's random functions.

    The program mirrors images before the first epoch, then pads and crops, and mirrors all again in odd epochs. Our
    draws crop first, so the columns of their offsets have the other sign where the image was mirrored first.
    """
    upcoming = iter(epochs)
    current: list[Draws] = []
    first = epochs[0]
    mirrored = torch.zeros(len(first), dtype=torch.bool)
    mirrored[first.permutation] = first.flip == 0
    load = torch.load

    def randint(low: int, high: int, size: tuple[int, int], device: Any = None) -> torch.Tensor:
        current[:] = [next(upcoming)]
        draws, reach = current[0], high - 1
        count = 2 * reach + 1
        shifts = torch.zeros(size, dtype=torch.int64)
        shifts[draws.permutation, 0] = draws.crop % count - reach
        shifts[draws.permutation, 1] = draws.crop // count - reach
        shifts[mirrored, 1] *= -1
        return shifts

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def elapsed_time(self, other: object) -> float:
            return 0.0

    patches: list[Any] = [
        mock.patch.object(torch, "compile", lambda function=None, **options: function),
        mock.patch.object(torch, "load", lambda path, map_location: load(path, map_location=CPU)),
        mock.patch.object(torch, "rand", lambda n, device=None: (~mirrored).float()),
        mock.patch.object(torch, "randint", randint),
        mock.patch.object(torch, "randperm", lambda n, device=None: current[0].permutation),
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "synchronize", lambda: None),
        mock.patch.object(torch.Tensor, "half", torch.Tensor.double),
        mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double),
        mock.patch.object(nn.Module, "half", nn.Module.double),
        mock.patch.object(nn.Module, "float", nn.Module.double),
    ]
    benchmark = torch.backends.cudnn.benchmark
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))

"""``python -m benchmarks.cpu``: a step and an epoch's augmentation on this CPU, beside the reference's own settings.

    python -m benchmarks.cpu [--rounds 3] [--steps 3] [--batch-size 512] [--reference-script PATH] [--json FILE]

Each side runs in a process of its own, since what one asks of the C library's memory would hold for
the other too; the processes take turns, so that a machine whose speed drifts slows all of them.
Ratios are taken turn by turn. Ours runs twice a turn: the ratio of the two is the noise. Before a
figure is given, our batches are checked against the reference's, bit for bit, and each timed step's
loss for being finite; that our steps compute what the reference's do is the test suite's matter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import reference
from cifar_fast import CNN, Dataset, Recipe, draw_epoch
from cifar_fast.augment import augment
from cifar_fast.backends import keep_freed_memory, normalize
from cifar_fast.choose import choose
from cifar_fast.results import environment

PICTURES = 50_000


def pictures() -> Dataset:
    """As many pictures as CIFAR-10 has: noise, which costs what pictures cost."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (PICTURES, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(PICTURES) % 10
    return Dataset("noise", "noise", images, labels, images[:100], labels[:100])


def measure_reference(recipe: Recipe, steps: int) -> dict[str, float]:
    """The reference as ``benchmarks/reference.py`` states it: float32, eager, 652 masked passes an epoch."""
    dataset = pictures()
    images, _ = reference.normalized(dataset.train_images, dataset.test_images, torch.float32)
    labels = torch.tensor(dataset.train_labels)
    training = reference.Training(seed=0, epochs=recipe.epochs, batch_size=recipe.batch_size, dtype=torch.float32)
    start = time.perf_counter()
    batches = training.batches(images, labels)
    batch = next(batches)
    augmentation = time.perf_counter() - start
    return {"augment": augmentation, "step": _timed_steps(lambda: training.step(*batch, PICTURES // recipe.batch_size)[0], steps)}


def measure_ours(recipe: Recipe, steps: int) -> dict[str, float]:
    """What ``auto`` picks on a CPU."""
    dataset = pictures()
    choice = choose(device="cpu")
    keep_freed_memory()
    backend = choice.backends[0](recipe, dataset, choice.device, choice.dtype, choice.memory_format)
    torch.manual_seed(0)
    backend.prepare(CNN(recipe, 10))
    _check_batches(dataset, choice.dtype, recipe)

    n, size = PICTURES, recipe.batch_size
    timed = []
    for _ in range(3):
        start = time.perf_counter()
        draws = draw_epoch(n, device=choice.device, recipe=recipe)
        for i in range(0, n - n % size, size):
            augment(backend.train_images, draws.slice(i, i + size), recipe)
        timed.append(time.perf_counter() - start)

    one = draws.slice(0, size)

    def step() -> torch.Tensor:  # an epoch of one step: augmentation, which the reference's step has not, included
        return next(backend.train_epoch(0, one))[0]

    return {"augment": statistics.median(timed), "step": _timed_steps(step, steps)}


def _timed_steps(step: Callable[[], torch.Tensor], steps: int) -> float:
    """Median seconds of ``steps`` steps after two that do not count; the loss must be finite."""
    times = []
    for _ in range(2 + steps):
        start = time.perf_counter()
        losses = step()
        times.append(time.perf_counter() - start)
        if not losses.isfinite().all():
            raise SystemExit("the timed step's loss is not finite: no figure is given")
    return statistics.median(times[2:])


def _check_batches(dataset: Dataset, dtype: torch.dtype, recipe: Recipe) -> None:
    """Our augmentation of the first 2,000 pictures against the reference's masked passes."""
    few = dataclasses.replace(dataset, train_images=dataset.train_images[:2000], train_labels=dataset.train_labels[:2000])
    images, _ = normalize(few, torch.device("cpu"), dtype)
    theirs, _ = reference.normalized(few.train_images, few.test_images, dtype)
    torch.manual_seed(1)
    expected, _ = reference.augmented_epoch(theirs, torch.tensor(few.train_labels))
    torch.manual_seed(1)
    # the values are compared, not the layout, which is not the same
    if not torch.equal(augment(images, draw_epoch(2000, device="cpu", recipe=recipe), recipe), expected):
        raise SystemExit("our batches are not the reference's: no figure is given")


def measure_script(script: Path, npz: Path, recipe: Recipe, steps: int) -> dict[str, float]:
    """The reference's own script as a black box, which prints its seconds; the mean of its steps, the first included."""
    flags = f"--data {npz} --device cpu --dtype float32 --batch-size {recipe.batch_size} --max-steps {steps + 2}"
    printed = _run([str(script), *flags.split()])
    found = re.search(r"augment ([\d.]+) s an epoch, ([\d.]+) s a step", printed)
    if not found:
        raise SystemExit(f"{script} did not print what was expected of it: {printed!r}")
    return {"augment": float(found[1]), "step": float(found[2])}


def matrix_rate() -> float:
    """FLOP/s of a 4096 x 4096 x 4096 bfloat16 product of random numbers, the median of five."""
    a, b = (torch.randn(4096, 4096).bfloat16() for _ in range(2))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 4096**3 / statistics.median(times[2:])


def _run(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns that each side takes (default: 3)")
    parser.add_argument("--steps", type=int, default=3, help="steps timed a turn, after two that are not (default: 3)")
    parser.add_argument("--batch-size", type=int, default=Recipe().batch_size)
    parser.add_argument("--reference-script", type=Path, metavar="PATH", help="time the reference's own script too, as a black box")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--side", choices=("reference", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    recipe = Recipe(batch_size=args.batch_size)
    if args.side:
        print(json.dumps({"reference": measure_reference, "ours": measure_ours}[args.side](recipe, args.steps)))
        return

    def side(name: str) -> dict[str, float]:
        return json.loads(_run(f"-m benchmarks.cpu --side {name} --steps {args.steps} --batch-size {args.batch_size}".split()))

    sides: dict[str, Callable[[], dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.reference_script:
            data = pictures()
            npz = Path(folder, "noise.npz")
            names = ("train_images", "train_labels", "test_images", "test_labels")
            np.savez(npz, **{name: getattr(data, name) for name in names})
            sides["the reference's script"] = lambda: measure_script(args.reference_script, npz, recipe, args.steps)
        sides |= {"the reference, restated": lambda: side("reference"), "ours": lambda: side("ours"), "ours again": lambda: side("ours")}
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn in range(args.rounds):
            for name, measure in sides.items():
                figures[name].append(measure())
                print(f"turn {turn + 1}, {name}: {figures[name][-1]}", file=sys.stderr)
    rate = matrix_rate()
    report(recipe, figures, rate)
    if args.json:
        facts: dict[str, Any] = {"environment": environment(torch.device("cpu")), "recipe": dataclasses.asdict(recipe)}
        args.json.write_text(json.dumps(facts | {"matrix_flops": rate, "seconds": figures}, indent=2) + "\n")


def report(recipe: Recipe, figures: dict[str, list[dict[str, float]]], rate: float) -> None:
    """Print the table: medians, and ratios to ours turn by turn with their smallest and largest."""
    facts, choice = environment(torch.device("cpu")), choose(device="cpu")
    print(f"torch {facts['torch']}, {facts['device_name']}, {facts['threads']} threads, batch {recipe.batch_size}; ours: {choice.reason}")
    print(f"a 4096^3 bfloat16 matrix product: {rate / 1e9:.0f} GFLOP/s")
    for what, unit in (("step", "s a step"), ("augment", "s an epoch's augmentation")):
        print(f"\n{unit:28s}  median     min     max   times ours (min to max)")
        for name, turns in figures.items():
            seconds = [turn[what] for turn in turns]
            ratios = [turn[what] / ours[what] for turn, ours in zip(turns, figures["ours"])]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{name:28s} {statistics.median(seconds):7.3f} {min(seconds):7.3f} {max(seconds):7.3f}   {spread}")


if __name__ == "__main__":
    main()

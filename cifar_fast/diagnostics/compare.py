"""Run two backends in lockstep and measure how far apart each layer is.

Before each step, the weights, statistics and momentum of the second backend are copied to the first. If ``drift`` is
set, they are copied before the first step only. Both train on the same images and random draws. After the step the
relative difference |a - b| / |b|, Euclidean over a tensor, is reported for the loss and, in each layer, for

* statistics: the running mean and variance of a norm, which come from the activations of the layer;
* gradients and weights.

The tolerance is relative to eager's rounding error. Each row shows the difference between the backends, the difference
between eager in this dtype and in the next higher precision, and the errors of the first backend and of eager against
eager in float64. Eager runs here in the memory format of the first backend, because the order and the dtype of torch's
sums depend on the format: a CPU's batch norm sums in float64 in the contiguous format and in float32 in channels_last.
All sides see the same images, rounded to the dtype. A row passes if the first number is at most ``tolerance`` times the
second, plus a quarter of the last bit for rows in which eager happens to be exact.

Loss and statistics must pass at every step. For a gradient, and for the weight that it updates, the median over the
steps must pass. If two pixels of a max-pool are equal except for rounding, the backends may pick either, and the whole
gradient of a narrow model changes. A wrong formula is wrong at every step.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from cifar_fast.backends.base import Backend
from cifar_fast.backends.eager import Eager
from cifar_fast.backends.select import BackendConfig, build_backend
from cifar_fast.data.augment import draw_epoch
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.tensors import device_data
from cifar_fast.recipe import Recipe
from cifar_fast.utils.device import device_guard, environment, short_name
from cifar_fast.utils.errors import InputError, option
from cifar_fast.utils.files import write_json
from cifar_fast.utils.seeds import make_generators
from cifar_fast.utils.torch_defaults import convolutions_in_tf32, torch_defaults

TOLERANCE = 3.0
"""If two backends have equal errors in random directions, their difference is 1.4 errors. If one error is twice as
large, it is 2.2.
"""


@dataclass(frozen=True)
class TensorDiff:
    """Relative differences of one tensor of one layer after one step.

    Attributes:
        difference: between the two backends.
        eager_difference: between eager and eager in the next higher precision.
        error: of the first backend against eager in float64.
        eager_error: of eager against eager in float64.
        ratio: of ``difference`` to ``eager_difference``. It fails above the tolerance.
    """

    step: int
    layer: str
    quantity: str
    difference: float
    eager_difference: float
    error: float
    eager_error: float
    ratio: float


def compare(
    recipe: Recipe,
    dataset: Dataset,
    first: BackendConfig,
    second: BackendConfig,
    *,
    seed: int = 0,
    steps: int = 4,
    drift: bool = False,
) -> Iterator[list[TensorDiff]]:
    """Run two backends in lockstep and yield the differences after each of ``steps`` steps.

    Convolutions in float32 use IEEE arithmetic here, not TF32 as torch does by default on a GPU.

    Raises:
        InputError: the backends have different devices or dtypes.
    """
    differences = _compare(recipe, dataset, first, second, seed, steps, drift)
    while True:
        with device_guard(first.device), torch_defaults(first.device), convolutions_in_tf32(False):
            step = next(differences, None)
        if step is None:
            return
        yield step


def _compare(
    recipe: Recipe, dataset: Dataset, first: BackendConfig, second: BackendConfig, seed: int, steps: int, drift: bool
) -> Iterator[list[TensorDiff]]:
    device, dtype = first.device, first.dtype
    if (second.device, second.dtype) != (device, dtype):
        backends = " against ".join(f"{config.device} in {short_name(config.dtype)}" for config in (first, second))
        raise InputError(f"two backends can be compared on one device and in one dtype, not on {backends}")
    dataset = dataset.for_recipe(recipe)
    dataset.check_trainable(recipe.batch_size)
    steps_per_epoch, n = dataset.steps_per_epoch(recipe.batch_size), len(dataset.train_images)
    # No side evaluates, so two test images are enough.
    dataset = dataclasses.replace(
        dataset,
        test_images=dataset.test_images[:2],
        test_labels=dataset.test_labels[:2],
        validation_images=None,
        validation_labels=None,
    )
    data = device_data(dataset, device)

    def eager_in(dtype: torch.dtype) -> Eager:
        return Eager(recipe, data, device, dtype, first.memory_format)

    def normalize_as_eager(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda pixels: eager.normalize(pixels).to(dtype)

    ours, theirs = (build_backend(config, recipe, data)[0] for config in (first, second))
    is_eager = theirs.name == "eager" and theirs.memory_format == first.memory_format
    eager = cast(Eager, theirs) if is_eager else eager_in(dtype)
    higher = eager_in(higher_precision(dtype))
    exact = higher if higher.dtype == torch.float64 else eager_in(torch.float64)
    for one in (higher, exact):
        one.normalize = normalize_as_eager(one.dtype)
    roles: tuple[Backend, ...] = (ours, theirs, eager, higher, exact)
    sides = list(dict.fromkeys(roles))  # a backend may have two roles
    weights, generator = make_generators(seed, device)
    model = theirs.new_model(weights)
    for side in sides:
        side.reset(model)

    for step in range(1, steps + 1):
        if (step - 1) % steps_per_epoch == 0:
            draws = draw_epoch(
                n, device=device, recipe=recipe, generator=generator, epoch=(step - 1) // steps_per_epoch
            )
            training = {side: side.train_epoch(draws) for side in sides}
        if step == 1 or not drift:
            for side in sides:
                if side is not theirs:
                    copy_state(theirs, side)
        tensors = {side: _tensors(side, next(training[side])[0]) for side in sides}
        yield [_diff(step, *key, [tensors[side][key] for side in roles], dtype) for key in tensors[theirs]]


def higher_precision(dtype: torch.dtype) -> torch.dtype:
    """Return the next higher precision that eager can run in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def copy_state(source: Backend, target: Backend) -> None:
    """Copy weights, statistics and momentum in place, in the dtypes of ``target``."""
    target.model.load_state_dict(source.model.state_dict())
    for own, other in zip(target.model.parameters(), source.model.parameters()):
        if other in source.optimizer.state and own in target.optimizer.state:  # there is no momentum before a step
            mine = target.optimizer.state[own]["momentum_buffer"]
            its = source.optimizer.state[other]["momentum_buffer"]
            _common(mine, its).copy_(_common(its, mine))


def _common(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` without input channels that ``other`` lacks. Fused pads its first weight with zeros."""
    return tensor[:, : other.shape[1]] if tensor.dim() > 1 else tensor


def _tensors(side: Backend, loss: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """Return the tensors to compare after a step, by layer and quantity."""
    tensors = {("loss", "of each image"): loss}
    counts: dict[str, int] = {}
    for module in side.model.modules():
        every = dict(module.named_parameters(recurse=False))
        parameters = {name: each for name, each in every.items() if each.requires_grad}
        if not every:
            continue
        kind = "norm" if hasattr(module, "running_mean") else "conv" if hasattr(module, "kernel_size") else "linear"
        counts[kind] = counts.get(kind, 0) + 1
        layer = f"{kind} {counts[kind]}"
        if kind == "norm":
            tensors |= {(layer, f"statistics, {name}"): getattr(module, f"running_{name}") for name in ("mean", "var")}
        for name, parameter in parameters.items():
            assert parameter.grad is not None  # after a step
            tensors[layer, f"gradient of {name}"] = parameter.grad
        tensors |= {(layer, name): parameter for name, parameter in parameters.items()}
    return {key: tensor.detach().double() for key, tensor in tensors.items()}


def _diff(step: int, layer: str, quantity: str, by_role: list[torch.Tensor], dtype: torch.dtype) -> TensorDiff:
    """Compare the tensors of both backends, eager, eager in higher precision, and eager in float64."""
    ours, theirs, eager, higher, exact = (_common(tensor, by_role[-1]) for tensor in by_role)

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        distance, size = float((a - b).norm()), float(b.norm())
        return distance / size if size else distance

    difference, eager_difference = relative(ours, theirs), relative(eager, higher)
    excess = max(difference - torch.finfo(dtype).eps / 4, 0.0)  # this order of arguments keeps NaN
    ratio = excess / eager_difference if eager_difference else math.inf if excess else 0.0
    errors = relative(ours, exact), relative(eager, exact)
    return TensorDiff(step, layer, quantity, difference, eager_difference, *errors, ratio)


def failures(diffs: list[TensorDiff], tolerance: float) -> list[tuple[str, str, float]]:
    """Return layer, quantity and ratio of each tensor that fails."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for diff in diffs:
        ratios.setdefault((diff.layer, diff.quantity), []).append(diff.ratio)
    failed = []
    for (layer, quantity), of_steps in ratios.items():
        continuous = layer == "loss" or quantity.startswith("statistics")
        ratio = max(of_steps) if continuous else statistics.median(of_steps)
        if not ratio <= tolerance or not all(map(math.isfinite, of_steps)):
            failed.append((layer, quantity, ratio))
    return failed


@dataclass
class Comparison:
    """The lines, the verdict and the report of a comparison."""

    first: BackendConfig
    second: BackendConfig
    tolerance: float = TOLERANCE
    rows: list[TensorDiff] = field(default_factory=list)

    def heading(self) -> str:
        facts, dtype = environment(self.first.device), short_name(self.first.dtype)
        sides = f"{self.first.backends[0]} against {self.second.backends[0]}"
        return f"torch {facts['torch']}, {facts['device_name']}, {sides}, {dtype}; relative differences"

    def add(self, step: list[TensorDiff]) -> str:
        """Add the rows of a step and return them as a table."""
        self.rows += step
        first, second = self.first.backends[0], self.second.backends[0]
        higher = short_name(higher_precision(self.first.dtype))
        columns = f"{first}-{second}", f"eager-{higher}", f"{first}-float64", "eager-float64"
        lines = ["", f"step {step[0].step:<24}" + "".join(f"{column:>17}" for column in columns)]
        for row in step:
            values = row.difference, row.eager_difference, row.error, row.eager_error
            figures = "".join(f"{value:17.1e}" for value in values)
            past = "" if row.ratio <= self.tolerance else "   past the tolerance"
            lines.append(f"{row.layer:8} {row.quantity:20}{figures}{past}")
        return "\n".join(lines)

    @property
    def within(self) -> bool:
        """Whether every tensor passes."""
        return not failures(self.rows, self.tolerance)

    def verdict(self) -> str:
        """Return a line for each tensor that fails, and a last line with their number."""
        steps, failed = self.rows[-1].step, failures(self.rows, self.tolerance)
        tensors = len(self.rows) // steps
        passed = tensors - len(failed)
        lines = [f"{layer}, {quantity}: {ratio:.1f} times eager's own difference" for layer, quantity, ratio in failed]
        rule = f"{self.tolerance:g} times eager's own difference plus a quarter of the last bit"
        within = f"{passed} of {tensors} tensors are within {rule}"
        return "\n".join(["", *lines, f"{within}, over {steps} steps"])


def write_report(
    path: Path, comparison: Comparison, recipe: Recipe, dataset: Dataset, *, seed: int, drift: bool
) -> None:
    """Write every figure of ``comparison`` as JSON."""
    first, second = comparison.first, comparison.second
    report: dict[str, Any] = {
        "environment": environment(first.device),
        "recipe": dataclasses.asdict(recipe),
        "dataset": dataset.for_recipe(recipe).metadata(),
        "backend": first.backends[0],
        "against": second.backends[0],
        "dtype": short_name(first.dtype),
        "higher_precision": short_name(higher_precision(first.dtype)),
        "memory_formats": [short_name(config.memory_format) for config in (first, second)],
        "seed": seed,
        "drift": drift,
        "tolerance": comparison.tolerance,
        "within": comparison.within,
        "rows": [dataclasses.asdict(row) for row in comparison.rows],
    }
    write_json(path, report, f"{option('json')} {path}")

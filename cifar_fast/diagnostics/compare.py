"""``python -m cifar_fast.compare``: run two backends in lockstep, and tell how far apart each layer is.

    python -m cifar_fast.compare --backend fused --against eager --steps 4

Both take each step from the same weights, statistics and momentum (those of ``--against``, brought to
all sides before the step; with ``--drift`` only before the first), on the same draws and images. After
it the relative difference |a - b| / |b|, Euclidean over a tensor, is told of the loss, and in each layer of

* statistics: the running mean and variance of a norm, which are those of the layer's activations;
* gradients and weights.

How large may it be? As large as the error that eager itself makes in the first side's memory format, since torch sums
in other orders and types in each (on a CPU its batch norm adds up in double where the format is contiguous, and in
single in channels_last): beside each difference stands that of eager in the dtype from eager in the next higher
precision, and the error of both against eager in float64. The images are rounded to the dtype once, for all. A
difference is within ``--tolerance`` times eager's own, plus a quarter of the last bit for where eager happens to be
exact, or past it.

Loss and statistics must be within it at every step. Of a gradient, and of the weight made with it, the
median over the steps must be: where two pixels of a max-pool are equal but for rounding, the sides may
pick either, and a narrow model's whole gradient changes. A wrong formula is wrong at every step. If one
is past the tolerance the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
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
from cifar_fast.model import CNN
from cifar_fast.recipe import Recipe
from cifar_fast.utils.device import device_guard, environment, short_name
from cifar_fast.utils.errors import InputError
from cifar_fast.utils.files import atomic_write, writing
from cifar_fast.utils.seeds import make_generators
from cifar_fast.utils.torch_defaults import convolutions_in_tf32, torch_defaults

TOLERANCE = 3.0
"""Of two sides that err alike in different directions, the difference is 1.4 errors; of one that errs twice as much,
2.2.
"""


@dataclass(frozen=True)
class Row:
    """One tensor of one layer after one step; every figure a relative difference.

    ``difference``: between the two backends. ``yardstick``: between eager and eager in the next higher
    precision. ``error`` and ``eager_error``: of the first backend and of eager, against eager in float64.
    ``ratio``: of the difference to what eager's own allows; above the tolerance it is past it.
    """

    step: int
    layer: str
    quantity: str
    difference: float
    yardstick: float
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
) -> Iterator[list[Row]]:
    """Run the two plans in lockstep for ``steps`` steps; gives each step's rows as it is done. :class:`InputError`
    where they are of different devices or dtypes.

    Convolutions in float32 are IEEE's here, without TF32, which torch else takes on a GPU.
    """
    found = _compare(recipe, dataset, first, second, seed, steps, drift)
    while True:
        with device_guard(first.device), torch_defaults(first.device), convolutions_in_tf32(False):
            rows = next(found, None)
        if rows is None:
            return
        yield rows


def _compare(
    recipe: Recipe,
    dataset: Dataset,
    first: BackendConfig,
    second: BackendConfig,
    seed: int,
    steps: int,
    drift: bool,
) -> Iterator[list[Row]]:
    device, dtype = first.device, first.dtype
    if (second.device, second.dtype) != (device, dtype):
        raise InputError(
            f"a comparison is of one device and dtype, not of {device} in {short_name(dtype)} against {second.device} "
            f"in {short_name(second.dtype)}; give both plans the same"
        )
    dataset = dataset.for_recipe(recipe)
    steps_per_epoch = dataset.steps_per_epoch(recipe.batch_size)
    dataset = dataclasses.replace(
        dataset, test_images=dataset.test_images[:2], test_labels=dataset.test_labels[:2]
    )  # none is needed
    next_higher = higher_precision(dtype)
    weights, generator = make_generators(seed, device)
    data = device_data(dataset, device)
    model = CNN(recipe, dataset.num_classes, weights)
    ours, theirs = (build_backend(plan, recipe, data)[0] for plan in (first, second))
    layout = first.memory_format
    same_layout = isinstance(theirs, Eager) and theirs.memory_format == layout
    eager = theirs if same_layout else Eager(recipe, data, device, dtype, layout)
    assert isinstance(eager, Eager)
    higher = Eager(recipe, data, device, next_higher, layout)
    truth = higher if next_higher == torch.float64 else Eager(recipe, data, device, torch.float64, layout)
    for side in (higher, truth):
        side.train_images = eager.train_images.to(side.dtype)
    five: tuple[Backend, ...] = (ours, theirs, eager, higher, truth)
    sides = list({id(one): one for one in five}.values())
    for one in sides:
        one.reset(model)
    followers = [one for one in sides if one is not theirs]

    for step in range(1, steps + 1):
        if (step - 1) % steps_per_epoch == 0:
            draws = draw_epoch(len(dataset.train_images), device=device, recipe=recipe, generator=generator)
            training = [one.train_epoch(draws) for one in sides]
        if step == 1 or not drift:
            for one in followers:
                _follow(one, theirs)
        losses = [next(trained)[0] for trained in training]
        seen = {id(one): _tensors(one, loss) for one, loss in zip(sides, losses)}
        yield [_row(step, *key, [seen[id(one)][key] for one in five], dtype) for key in seen[id(theirs)]]


def higher_precision(dtype: torch.dtype) -> torch.dtype:
    """The next higher precision that eager can be run in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _follow(side: Backend, leader: Backend) -> None:
    """Give ``side`` the weights, statistics and momentum of ``leader``, in place and in its own types."""
    side.model.load_state_dict(leader.model.state_dict())
    for mine, its in zip(side.model.parameters(), leader.model.parameters()):
        if its in leader.optimizer.state and mine in side.optimizer.state:  # not before a first step
            own, other = (one.optimizer.state[p]["momentum_buffer"] for one, p in ((side, mine), (leader, its)))
            _common(own, other).copy_(_common(other, own))


def _common(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``tensor`` without the input channels that ``other`` has not: fused's first weight has more, which are zeros."""
    return tensor[:, : other.shape[1]] if tensor.dim() > 1 else tensor


def _tensors(side: Backend, loss: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """What is compared after a step, under layer and quantity."""
    found = {("loss", "of each image"): loss}
    counts: dict[str, int] = {}
    for module in cast(CNN, side.model).seq:
        parameters = dict(module.named_parameters())
        if not parameters:
            continue
        kind = "norm" if hasattr(module, "running_mean") else "conv" if hasattr(module, "kernel_size") else "linear"
        counts[kind] = counts.get(kind, 0) + 1
        layer = f"{kind} {counts[kind]}"
        if kind == "norm":
            found |= {(layer, f"statistics, {name}"): getattr(module, f"running_{name}") for name in ("mean", "var")}
        for name, parameter in parameters.items():
            assert parameter.grad is not None  # after a step
            found[layer, f"gradient of {name}"] = parameter.grad
        found |= {(layer, name): parameter.detach() for name, parameter in parameters.items()}
    return {key: tensor.detach().double() for key, tensor in found.items()}


def _row(
    step: int,
    layer: str,
    quantity: str,
    of_sides: list[torch.Tensor],
    dtype: torch.dtype,
) -> Row:
    """``of_sides``: by ours, theirs, eager in ours' memory format, eager in higher precision, and eager in float64."""
    ours, theirs, eager, higher, truth = (_common(one, of_sides[-1]) for one in of_sides)

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        distance, size = float((a - b).norm()), float(b.norm())
        return distance / size if size else distance

    difference, yardstick = relative(ours, theirs), relative(eager, higher)
    excess = max(difference - torch.finfo(dtype).eps / 4, 0.0)  # stays what it is where that is no number
    ratio = excess / yardstick if yardstick else math.inf if excess else 0.0
    return Row(step, layer, quantity, difference, yardstick, relative(ours, truth), relative(eager, truth), ratio)


def past_tolerance(rows: list[Row], tolerance: float) -> list[tuple[str, str, float]]:
    """Layer, quantity and ratio of what makes the comparison fail."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.layer, row.quantity), []).append(row.ratio)
    bad = []
    for (layer, quantity), ratios in found.items():
        continuous = layer == "loss" or quantity.startswith("statistics")
        ratio = max(ratios) if continuous else statistics.median(ratios)
        if not ratio <= tolerance or not all(map(math.isfinite, ratios)):
            bad.append((layer, quantity, ratio))
    return bad


@dataclass
class Comparison:
    """What the command tells of a comparison: its lines, its verdict and its report."""

    first: BackendConfig
    second: BackendConfig
    tolerance: float = TOLERANCE
    rows: list[Row] = field(default_factory=list)

    def heading(self) -> str:
        facts = environment(self.first.device)
        sides = f"{self.first.backends[0]} against {self.second.backends[0]}"
        return (
            f"torch {facts['torch']}, {facts['device_name']}, {sides}, {short_name(self.first.dtype)}; "
            "relative differences"
        )

    def add(self, step: list[Row]) -> str:
        """Take the rows of a step; gives the table of them."""
        self.rows += step
        first, second = self.first.backends[0], self.second.backends[0]
        higher = short_name(higher_precision(self.first.dtype))
        sides = f"{first}-{second}", f"eager-{higher}", f"{first}-float64", "eager-float64"
        lines = ["", f"step {step[0].step:<24}" + "".join(f"{side:>17}" for side in sides)]
        for row in step:
            figures = "".join(
                f"{figure:17.1e}" for figure in (row.difference, row.yardstick, row.error, row.eager_error)
            )
            past = "" if row.ratio <= self.tolerance else "   past the tolerance"
            lines.append(f"{row.layer:8} {row.quantity:20}{figures}{past}")
        return "\n".join(lines)

    @property
    def bad(self) -> list[tuple[str, str, float]]:
        return past_tolerance(self.rows, self.tolerance)

    @property
    def within(self) -> bool:
        return not self.bad

    def verdict(self) -> str:
        steps = self.rows[-1].step
        tensors = len(self.rows) // steps
        lines = [
            f"{layer}, {quantity}: {ratio:.1f} times eager's own difference" for layer, quantity, ratio in self.bad
        ]
        within = (
            f"{tensors - len(self.bad)} of {tensors} tensors are within {self.tolerance:g} times eager's own difference"
        )
        return "\n".join(["", *lines, f"{within}, over {steps} steps"])


def write_report(
    path: Path, comparison: Comparison, recipe: Recipe, dataset: Dataset, *, seed: int, drift: bool
) -> None:
    """Every figure of ``comparison`` as JSON, which has no number for what is not finite: null."""
    report: dict[str, Any] = {
        "environment": environment(comparison.first.device),
        "recipe": dataclasses.asdict(recipe),
        "dataset": dataset.for_recipe(recipe).facts(),
        "backend": comparison.first.backends[0],
        "against": comparison.second.backends[0],
        "dtype": short_name(comparison.first.dtype),
        "higher_precision": short_name(higher_precision(comparison.first.dtype)),
        "memory_formats": [short_name(plan.memory_format) for plan in (comparison.first, comparison.second)],
        "seed": seed,
        "drift": drift,
        "tolerance": comparison.tolerance,
        "within": comparison.within,
        "rows": [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in vars(row).items()
            }
            for row in comparison.rows
        ],
    }
    with writing(f"--json {path}", "choose another file"), atomic_write(path) as draft:
        draft.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")

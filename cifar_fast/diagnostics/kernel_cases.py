"""Each kernel at each shape of the recipe, and the one check of its results against plain torch.

The error of a result against float64 may be twice the error of plain torch in the same dtype, plus one unit in the last
place of the largest value. A norm in float32 gets 4 such units in these cases. Our results in half precision must be
the exact ones, rounded once; plain torch rounds after each operation. Outputs that are only copied or counted must be
those of plain torch bit for bit. ``cifar-fast check``, the tests and the benchmarks all use this check. The benchmarks
time no result that fails it.

Every case has four methods. ``launches()`` returns our launches, on meta tensors. ``inputs(device)`` returns random
tensors by name. ``call(implementation, given)`` returns a function that computes the outputs, by name and in new
memory, and can be called again. ``expected(given)`` returns the outputs of plain torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch._functorch.config
import torch.nn.functional as F

from cifar_fast.backends.base import copy_code_object
from cifar_fast.backends.fused import PADDED_CHANNELS
from cifar_fast.data.augment import draw_epoch
from cifar_fast.kernels.augment import augment, augment_reference
from cifar_fast.kernels.augment import example_launches as augment_launches
from cifar_fast.kernels.batch_norm_act import activate_reference, batch_norm_act, batch_norm_act_reference
from cifar_fast.kernels.batch_norm_act import example_launches as norm_launches
from cifar_fast.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from cifar_fast.kernels.cross_entropy import example_launches as cross_entropy_launches
from cifar_fast.kernels.launch import Launch, interpreted
from cifar_fast.kernels.record_step import StepState, record, record_reference
from cifar_fast.kernels.record_step import example_launches as record_launches
from cifar_fast.model import loss_dtype, parameter_dtype
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE, Block, Recipe

DIRECTIONS = ("forward", "backward", "inference")
IMAGES = 50_000
IMPLEMENTATIONS = ("fused", "compiled", "eager")
STEPS = 4
MISROUNDED = 0.05
"""The largest share of half precision results that may be rounded wrongly, because the arithmetic is not exact."""

Tensors = dict[str, torch.Tensor]
Function = Callable[..., Any]
Call = Callable[[], Tensors]


class WrongResult(Exception):
    """A result differs too much from plain torch."""


@dataclass(frozen=True)
class Expected:
    """Outputs of plain torch.

    Attributes:
        eager: outputs in the dtype of the case, one item for each way to compute them in plain torch.
        exact: outputs in float64. An output that is missing here must have the bits of ``eager``.
        ulps: additional tolerance in units in the last place.
    """

    eager: Sequence[Tensors]
    exact: Tensors = field(default_factory=dict)
    ulps: float = 1


def check(outputs: Tensors, expected: Expected, *, rounded_once: bool = False, factor: float = 2) -> str:
    """Return the largest error in words, or raise :class:`WrongResult`.

    An error may be ``factor`` times eager's plus ``expected.ulps`` units in the last place, both for the largest
    element and in the Euclidean norm. Eager may overflow although the exact result does not. Then any finite result
    passes.

    ``rounded_once``: results in half precision must also be the exact ones, rounded to nearest even. Only one element
    and ``MISROUNDED`` of all may differ. This finds a wrong rounding, which the error alone does not show.
    """
    plain = expected.eager[0]
    if outputs.keys() != plain.keys():
        raise WrongResult(f"gave {', '.join(outputs)} and not {', '.join(plain)}")
    worst, text = 0.0, "bit for bit as plain torch"
    for name, eager in plain.items():
        result = outputs[name].detach()
        if result.shape != eager.shape:
            raise WrongResult(f"{name} has the shape {list(result.shape)} and not {list(eager.shape)}")
        if result.dtype != eager.dtype:
            raise WrongResult(f"{name} is {result.dtype} and not {eager.dtype}")
        if name not in expected.exact:
            if not torch.equal(result, eager):
                raise WrongResult(f"{name} differs from plain torch")
            continue
        exact = expected.exact[name].detach()
        finite = exact.to(eager.dtype).isfinite()  # a float16 running variance may overflow
        if not torch.equal(result.isfinite(), finite):
            raise WrongResult(f"{name} is finite where the exact result is not, or not finite where it is")
        if not finite.any():
            continue
        exact = exact[finite]
        sides = [side.detach()[finite].double() for side in (result, *(one[name] for one in expected.eager))]
        for size in (lambda tensor: tensor.abs().max(), torch.Tensor.norm):
            error, *errors = (float(size(side - exact)) for side in sides)
            own = max(value if math.isfinite(value) else math.inf for value in errors)
            scale = float(size(exact))
            limit = factor * own + expected.ulps * torch.finfo(eager.dtype).eps * scale
            errors_in_words = f"{error / (scale or 1):.1e} against float64, eager by {own / (scale or 1):.1e}"
            allowed = f"{limit / (scale or 1):.1e} allowed"
            if error > limit:
                rule = f"more than {factor:g} times eager's plus {expected.ulps:g} in the last place"
                raise WrongResult(f"{name} is off by {errors_in_words}: {rule} ({allowed})")
            if limit and error / limit > worst:
                worst, text = error / limit, f"{name} is off by {errors_in_words}, {allowed}"
        if rounded_once and eager.element_size() == 2:
            normal = exact.abs() >= torch.finfo(eager.dtype).tiny
            wrong = int((normal & (result[finite] != exact.to(eager.dtype))).sum())
            if wrong > 1 + MISROUNDED * exact.numel():
                raise WrongResult(f"{name} has {wrong} of {exact.numel()} elements that are rounded wrongly")
    return text


def norm_formula(
    *tensors: Any,
    training: bool,
    activation: str = "celu",
    alpha: float = 1.0,
    pool: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Compute what ``batch_norm_act_reference`` computes, in separate operations of the dtype of ``tensors``.

    In float64 it is exact; torch's CELU gradient on a CPU is not. In float32 it sums in float32; torch's batch norm on
    a CPU sums in float64.
    """
    x, weight, bias, running_mean, running_var = tensors
    pooled = F.max_pool2d(x, pool) if pool > 1 else x
    mean, var = running_mean, running_var
    if training:
        mean, var = pooled.mean((0, 2, 3)), pooled.var((0, 2, 3), unbiased=False)
        if running_mean is not None:
            m = pooled.numel() // len(mean)
            with torch.no_grad():
                running_mean.mul_(1 - momentum).add_(mean * momentum)
                running_var.mul_(1 - momentum).add_(var * (m / (m - 1)) * momentum)
    mean, var, weight, bias = (values[:, None, None] for values in (mean, var, weight, bias))
    z = (pooled - mean) / (var + eps).sqrt() * weight + bias
    if activation == "celu":
        return torch.where(z > 0, z, alpha * torch.expm1(z.clamp(max=0) / alpha))
    return activate_reference(z, activation)


@dataclass(frozen=True)
class Augmentation:
    """The second batch of an epoch over ``images`` images, in ``out_channels`` channels."""

    recipe: Recipe
    dtype: torch.dtype
    out_channels: int
    images: int = IMAGES

    @property
    def name(self) -> str:
        return f"augment to {self.out_channels} channels, forward"

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the operator."""
        recipe = self.recipe
        settings = dict(padding=recipe.crop_padding, cutout_size=recipe.cutout_size, both_sides=recipe.crop_both_sides)
        return settings | dict(out_channels=self.out_channels)

    def launches(self) -> list[Launch]:
        size = self.recipe.batch_size
        return augment_launches(n=self.images, batch_size=size, size=IMAGE_SIZE, dtype=self.dtype, **self.settings)

    def inputs(self, device: torch.device) -> Tensors:
        return {
            "images": torch.randint(256, (self.images, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, device=device),
            "labels": torch.randint(10, (self.images,), device=device),
            "table": torch.randn(3, 256, device=device).to(self.dtype),
            "step": torch.ones(1, dtype=torch.int64, device=device),
            "draws": draw_epoch(self.images, device=device, recipe=self.recipe).tensor,
        }

    def plain(self) -> Function:
        """Return the function in plain torch."""
        settings = self.settings

        def function(images: torch.Tensor, draws: torch.Tensor, table: torch.Tensor, labels: torch.Tensor) -> Tensors:
            return {"images": augment_reference(images, draws, table, **settings), "labels": labels[draws[0]]}

        return function

    def call(self, implementation: str, given: Tensors) -> Call:
        size = self.recipe.batch_size
        if implementation == "fused":
            arguments: dict[str, Any] = given | self.settings | {"batch_size": size}
            return lambda: dict(zip(("images", "labels"), cast(Any, augment(**arguments))))
        function = compiled(self) if implementation == "compiled" else self.plain()
        batch = given["draws"][:, size : 2 * size]
        return lambda: function(given["images"], batch, given["table"], given["labels"])

    def expected(self, given: Tensors) -> Expected:
        return Expected([self.call("eager", given)()])


@dataclass(frozen=True)
class Norm:
    """Max-pool (if the block has one), batch norm and activation of a block in one of ``DIRECTIONS``.

    Forward and backward are those of training. ``statistics``: the forward pass also updates running statistics. The
    benchmarks leave them out: they are a few values per channel, and each replay would change them.
    """

    block: Block
    batch_size: int
    alpha: float
    dtype: torch.dtype
    direction: str
    activation: str = "celu"
    statistics: bool = False

    @property
    def name(self) -> str:
        return f"{self.block.name}, {self.direction}"

    @property
    def section(self) -> str:
        """The part of a training that runs this case: a step, or an evaluation."""
        return "evaluation" if self.direction == "inference" else "step"

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the operator, for training and for inference."""
        return dict(activation=self.activation, alpha=self.alpha, pool=self.block.pool)

    def launches(self) -> list[Launch]:
        shape = self.batch_size, self.block.c_out, self.block.size, self.block.size
        dtypes: dict[str, Any] = dict(dtype=self.dtype, parameter_dtype=parameter_dtype(self.dtype))
        return norm_launches(shape, direction=self.direction, **dtypes, **self.settings)

    def inputs(self, device: torch.device) -> Tensors:
        block = self.block

        def activations(size: int, mean: float) -> torch.Tensor:
            tensor = torch.empty(self.batch_size, size, size, block.c_out, dtype=self.dtype, device=device)
            return tensor.normal_(mean, 2).permute(0, 3, 1, 2)

        def values(mean: float, deviation: float) -> torch.Tensor:
            return torch.empty(block.c_out, dtype=parameter_dtype(self.dtype), device=device).normal_(mean, deviation)

        given = {"x": activations(block.size, 1), "weight": values(1, 0.3), "bias": values(0, 0.3)}
        if self.direction == "inference" or self.statistics:
            given |= {"running_mean": values(1, 0.3), "running_var": values(4, 0.3).abs()}
        if self.direction == "backward":
            given["dy"] = activations(block.out_size, 0)  # of mean 0: the sums over it must fit float16
        return given

    def plain(self, implementation: str = "eager") -> Function:
        """Return an implementation, which may also be "formula", as a function of tensors alone."""
        operators: dict[str, Function] = {
            "fused": batch_norm_act,
            "eager": batch_norm_act_reference,
            "formula": norm_formula,
        }
        operator, training, settings = operators[implementation], self.direction != "inference", self.settings

        def function(*tensors: torch.Tensor | None) -> torch.Tensor:
            return operator(*tensors, training=training, **settings)

        return function

    def call(self, implementation: str, given: Tensors) -> Call:
        """The forward pass before a backward pass is not part of the call."""
        function = compiled(self) if implementation == "compiled" else self.plain(implementation)
        requires_grad = self.direction != "inference"
        learned = [given[name].detach().requires_grad_(requires_grad) for name in ("x", "weight", "bias")]
        running = {name: given[name] for name in ("running_mean", "running_var") if name in given}

        def forward() -> Tensors:
            if not self.statistics:
                return {"y": function(*learned, *(running.values() or (None, None)))}
            updated = {name: tensor.clone() for name, tensor in running.items()}
            return {"y": function(*learned, *updated.values())} | updated

        if self.direction != "backward":
            return forward
        # Otherwise compiled backward passes overwrite saved tensors and cannot run again.
        keep_saved = torch._functorch.config.patch(donated_buffer=False)
        with keep_saved:
            y = forward()["y"]

        def backward() -> Tensors:
            with keep_saved:
                gradients = torch.autograd.grad(y, learned, given["dy"].to(y.dtype), retain_graph=True)
            return dict(zip(("dx", "dweight", "dbias"), gradients))

        return backward

    def expected(self, given: Tensors) -> Expected:
        exact = self.call("formula", {name: tensor.double() for name, tensor in given.items()})()
        eager = self.call("eager", given)()
        if self.dtype != torch.float32:
            return Expected([eager], exact)
        # The order of a sum over a batch decides more than the last bit of float32.
        return Expected([eager, self.call("formula", given)()], exact, ulps=4)


@dataclass(frozen=True)
class Head:
    """The loss and the record of ``STEPS + 1`` steps, one more than an epoch. Both are too small to time."""

    recipe: Recipe
    dtype: torch.dtype
    classes: int = 10
    name = "loss and record"

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the loss."""
        return dict(label_smoothing=self.recipe.label_smoothing, scale=self.recipe.output_scale)

    def launches(self) -> list[Launch]:
        size = self.recipe.batch_size
        loss = cross_entropy_launches(size, self.classes, dtype=self.dtype, **self.settings)
        return loss + record_launches(size, dtype=loss_dtype(self.dtype))

    def inputs(self, device: torch.device) -> Tensors:
        """Return logits ``[STEPS + 1, B, classes]`` and labels."""
        shape = STEPS + 1, self.recipe.batch_size
        logits = 8 * torch.randn(*shape, self.classes, device=device)
        return {"x": logits.to(self.dtype), "labels": torch.randint(self.classes, shape, device=device)}

    def call(self, implementation: str, given: Tensors) -> Call:
        loss_operator, record_operator = cross_entropy_reference, record_reference
        if implementation == "fused":
            loss_operator, record_operator = cross_entropy, record

        def steps() -> Tensors:
            results = [loss_operator(*step, **self.settings) for step in zip(given["x"], given["labels"])]
            losses, correct, dx = map(torch.stack, zip(*results))
            schedule = torch.linspace(1, 2, 2 * STEPS, device=dx.device)[:, None]
            state = StepState.initial(schedule, STEPS, self.recipe.batch_size, losses.dtype)
            for step in zip(losses, correct):
                record_operator(*step, state)
            return state._asdict() | {"dx": dx}

        return steps

    def expected(self, given: Tensors) -> Expected:
        eager, exact = (self.call("eager", given | {"x": x})() for x in (given["x"], given["x"].double()))
        return Expected([eager], {name: exact[name] for name in ("losses", "dx")})


TimedCase = Augmentation | Norm
Case = TimedCase | Head


def kernel_cases(recipe: Recipe, dtype: torch.dtype) -> list[TimedCase]:
    """Return the cases that the benchmarks time: every distinct shape of augmentation and norm, in each direction."""
    return [*(Augmentation(recipe, dtype, channels) for channels in (3, 4, 8)), *norm_cases(recipe, dtype)]


def cpu_cases(recipe: Recipe, dtype: torch.dtype) -> list[TimedCase]:
    """Return the cases that the benchmarks time on a CPU, where a batch has no channels of zeros.

    The data set is small, because a batch accesses few of its images and each set of inputs has a data set.
    """
    return [Augmentation(recipe, dtype, IMAGE_CHANNELS, 4 * recipe.batch_size), *norm_cases(recipe, dtype)]


def norm_cases(recipe: Recipe, dtype: torch.dtype) -> dict[Norm, int]:
    """Return the norms of :func:`kernel_cases`, each with the number of blocks of that shape."""
    names = [block.name for block in recipe.blocks()]
    return {
        Norm(block, recipe.batch_size, recipe.celu_alpha, dtype, direction, recipe.activation): names.count(name)
        for name, block in {block.name: block for block in recipe.blocks()}.items()
        for direction in DIRECTIONS
    }


def check_cases(recipe: Recipe, dtype: torch.dtype) -> dict[str, Case]:
    """Return the cases of ``cifar-fast check``: every kernel, and norms with and without a max-pool."""
    cases: dict[str, Case] = {"augmentation": Augmentation(recipe, dtype, PADDED_CHANNELS, 4 * recipe.batch_size)}
    batch_size = 2 if interpreted() else recipe.batch_size
    for block in {block.pool: block for block in reversed(recipe.blocks())}.values():
        for direction in DIRECTIONS:
            settings: dict[str, Any] = dict(activation=recipe.activation, statistics=direction == "forward")
            norm = Norm(block, batch_size, recipe.celu_alpha, dtype, direction, **settings)
            cases[f"norm {norm.name}"] = norm
    return cases | {Head.name: Head(recipe, dtype)}


def check_kernel(case: Case, device: torch.device) -> str:
    """Check our kernel on random numbers that are the same in every call; return its error in words."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        given = case.inputs(device)
    return check(case.call("fused", given)(), case.expected(given), rounded_once=isinstance(case, Norm))


def check_replay(replay: Callable[[], object], outputs: Tensors, expected: Expected) -> None:
    """Raise :class:`WrongResult` unless ``replay`` fills the overwritten ``outputs`` with the right values."""
    for tensor in outputs.values():
        tensor.detach().fill_(math.nan if tensor.is_floating_point() else -1)
    replay()
    check(outputs, expected)


def bytes_moved(launches: Sequence[Launch]) -> int:
    """Return the bytes that ``launches`` read and write."""
    return sum(launch.bytes_read + launch.bytes_written for launch in launches)


def input_sets(case: TimedCase, cache: int) -> int:
    """Return how many input sets are needed so that together they access more than twice ``cache`` bytes."""
    return 1 + math.ceil(2 * cache / bytes_moved(case.launches()))


@functools.cache
def compiled(case: TimedCase) -> Function:
    """Return the function of ``case`` under torch.compile, not counted as a recompilation of another case."""
    return torch.compile(copy_code_object(case.plain()), fullgraph=True, dynamic=False)

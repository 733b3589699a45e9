"""What is measured: each operator at each shape of the recipe, by each implementation, checked before it is timed.

A case's ``calls`` give one call per input set; :func:`check` refuses a call whose result is not that of plain torch in
float64 (bit for bit for the augmentation, which only moves pixels). In training no implementation keeps running
statistics, which are a few values per channel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch._functorch.config

from cifar_fast.backends.base import copy_code_object
from cifar_fast.kernels.augment import augment, augment_reference
from cifar_fast.kernels.augment import example_launches as augment_launches
from cifar_fast.kernels.batch_norm_celu import batch_norm_celu, batch_norm_celu_reference
from cifar_fast.kernels.batch_norm_celu import example_launches as norm_launches
from cifar_fast.kernels.cross_entropy import example_launches as cross_entropy_launches
from cifar_fast.kernels.launch import Launch
from cifar_fast.kernels.record_step import example_launches as record_launches
from cifar_fast.model import loss_dtype, parameter_dtype
from cifar_fast.recipe import IMAGE_SIZE, Block, Recipe

DIRECTIONS = ("forward", "backward", "inference")
IMAGES = 50_000
IMPLEMENTATIONS = ("fused", "compiled", "eager")
# Of ||result - expected|| / ||expected||. Eager's float16 rounds what enters CELU's steep exponential: 1.8e-3 was seen.
TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-4}
Tensors = dict[str, torch.Tensor]
Call = Callable[[], Tensors]
"""A run of a case on an input set that it holds; gives the outputs by name, in new memory."""


class Wrong(Exception):
    """A result that may not be timed."""


@dataclass(frozen=True)
class Augmentation:
    """A batch out of a data set of ``images``, in ``out_channels`` channels."""

    recipe: Recipe
    dtype: torch.dtype
    out_channels: int
    images: int = IMAGES

    @property
    def name(self) -> str:
        return f"augment to {self.out_channels} channels, forward"

    @property
    def settings(self) -> dict[str, int]:
        """What the operator is told beside tensors."""
        recipe = self.recipe
        return dict(padding=recipe.crop_padding, cutout_size=recipe.cutout_size, out_channels=self.out_channels)

    def launches(self) -> list[Launch]:
        """Our launch, on tensors without memory."""
        size = self.recipe.batch_size
        return augment_launches(n=self.images, batch_size=size, size=IMAGE_SIZE, dtype=self.dtype, **self.settings)

    def inputs(self, sets: int, device: torch.device) -> list[Tensors]:
        """``sets`` batches' draws, all of them out of one data set of random bytes."""
        options = (self.images, (self.recipe.crop_padding + 1) ** 2, 2, (IMAGE_SIZE + 1 - self.recipe.cutout_size) ** 2)
        shared = {
            "images": torch.randint(256, (self.images, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, device=device),
            "labels": torch.randint(10, (self.images,), device=device),
            "table": torch.randn(3, 256, device=device).to(self.dtype),
        }
        size = self.recipe.batch_size
        draws = [torch.stack([torch.randint(below, (size,), device=device) for below in options]) for _ in range(sets)]
        return [shared | {"draws": drawn} for drawn in draws]

    def calls(self, implementation: str, sets: Sequence[Tensors]) -> list[Call]:
        """A call for each of ``sets``."""

        def in_torch(images: torch.Tensor, draws: torch.Tensor, table: torch.Tensor, labels: torch.Tensor) -> Tensors:
            return {"out": augment_reference(images, draws, table, **self.settings), "out_labels": labels[draws[0]]}

        def fused(**given: torch.Tensor) -> Tensors:
            return dict(zip(("out", "out_labels"), augment(**given, **self.settings)))

        function = {"fused": fused, "eager": in_torch}.get(implementation) or compiled(in_torch)
        return [lambda given=given: function(**given) for given in sets]

    def truth(self, given: Tensors) -> Tensors:
        """In plain torch."""
        return self.calls("eager", [given])[0]()


@dataclass(frozen=True)
class Norm:
    """(Max-pool,) batch norm and CELU of a block in one of ``DIRECTIONS``; forward and backward are of training."""

    block: Block
    batch_size: int
    alpha: float
    dtype: torch.dtype
    direction: str

    @property
    def name(self) -> str:
        return f"{self.block.name}, {self.direction}"

    @property
    def part(self) -> str:
        """Of what it is a part: a training step, or an evaluation."""
        return "evaluation" if self.direction == "inference" else "step"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, self.block.c_out, self.block.size, self.block.size

    @property
    def settings(self) -> dict[str, float]:
        """What the operator is told beside tensors."""
        return dict(alpha=self.alpha, pool=self.block.pool)

    def launches(self) -> list[Launch]:
        """Our launches of this direction, on tensors without memory."""
        types = dict(dtype=self.dtype, parameter_dtype=parameter_dtype(self.dtype))
        return norm_launches(self.shape, direction=self.direction, **types, **self.settings)

    def inputs(self, sets: int, device: torch.device) -> list[Tensors]:
        """``sets`` of random tensors, whose memory none shares."""
        n, channels, size, _ = self.shape

        def activations(size: int, mean: float) -> torch.Tensor:
            tensor = torch.empty(n, size, size, channels, dtype=self.dtype, device=device)
            return tensor.normal_(mean, 2).permute(0, 3, 1, 2)

        def values(mean: float, deviation: float) -> torch.Tensor:
            return torch.empty(channels, dtype=parameter_dtype(self.dtype), device=device).normal_(mean, deviation)

        found = []
        for _ in range(sets):
            given = {"x": activations(size, 1), "weight": values(1, 0.3), "bias": values(0, 0.3)}
            if self.direction == "inference":
                given |= {"running_mean": values(1, 0.3), "running_var": values(4, 0.3).abs()}
            elif self.direction == "backward":
                given["dy"] = activations(self.block.out_size, 0)  # of mean 0: the sums over it must fit float16
            found.append(given)
        return found

    def calls(self, implementation: str, sets: Sequence[Tensors]) -> list[Call]:
        """A call for each of ``sets``; for a backward pass, after the forward pass that it needs."""
        forward = self._forward(batch_norm_celu if implementation == "fused" else batch_norm_celu_reference)
        if implementation == "compiled":
            forward = compiled(forward)
        return [self._call(forward, given) for given in sets]

    def truth(self, given: Tensors) -> Tensors:
        """In plain torch and float64."""
        forward = self._forward(batch_norm_celu_reference)
        return self._call(forward, {name: tensor.double() for name, tensor in given.items()})()

    def _forward(self, operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(*tensors: torch.Tensor | None) -> torch.Tensor:
            return operator(*tensors, training=self.direction != "inference", **self.settings)

        return forward

    def _call(self, forward: Callable[..., torch.Tensor], given: Tensors) -> Call:
        learns = self.direction != "inference"
        learnt = [given[name].detach().requires_grad_(learns) for name in ("x", "weight", "bias")]
        tensors = *learnt, given.get("running_mean"), given.get("running_var")

        if self.direction != "backward":
            return lambda: {"y": forward(*tensors)}
        with _saved_tensors_kept():
            y = forward(*tensors)

        def backward() -> Tensors:
            with _saved_tensors_kept():
                gradients = torch.autograd.grad(y, learnt, given["dy"], retain_graph=True)
            return dict(zip(("dx", "dweight", "dbias"), gradients))

        return backward


@dataclass(frozen=True)
class Head:
    """What a step launches after the network: too small to be timed, but compiled and counted."""

    recipe: Recipe
    dtype: torch.dtype
    classes: int = 10
    name = "loss and bookkeeping"

    def launches(self) -> list[Launch]:
        size, loss = self.recipe.batch_size, loss_dtype(self.dtype)
        settings = dict(label_smoothing=self.recipe.label_smoothing, scale=self.recipe.output_scale)
        first = cross_entropy_launches(size, self.classes, dtype=self.dtype, **settings)
        return first + record_launches(size, dtype=loss)


Case = Augmentation | Norm


def kernel_cases(recipe: Recipe, dtype: torch.dtype) -> list[Case]:
    """Every distinct shape at which ``recipe`` augments and norms, in each direction."""
    return [*(Augmentation(recipe, dtype, channels) for channels in (3, 4, 8)), *norm_cases(recipe, dtype)]


def norm_cases(recipe: Recipe, dtype: torch.dtype) -> dict[Norm, int]:
    """The norms of :func:`kernel_cases`, and how many of the blocks have that shape."""
    names = [block.name for block in recipe.blocks()]
    return {
        Norm(block, recipe.batch_size, recipe.celu_alpha, dtype, direction): names.count(name)
        for name, block in {block.name: block for block in recipe.blocks()}.items()
        for direction in DIRECTIONS
    }


def moved(launches: Sequence[Launch]) -> int:
    """Bytes that ``launches`` read and write."""
    return sum(launch.bytes_read + launch.bytes_written for launch in launches)


def input_sets(case: Case, cache: int) -> int:
    """How many input sets touch twice a ``cache`` of so many bytes before the first of them comes again."""
    return 1 + math.ceil(2 * cache / moved(case.launches()))


def check(case: Case, outputs: Tensors, expected: Tensors) -> None:
    """Raise :class:`Wrong` unless ``outputs`` are what ``case.truth`` expects, in number, shape, type and value."""
    if outputs.keys() != expected.keys():
        raise Wrong(f"{case.name}: gave {', '.join(outputs)} and not {', '.join(expected)}")
    for name, right in expected.items():
        result = outputs[name].detach()
        if result.shape != right.shape:
            raise Wrong(f"{case.name}: {name} has the shape {list(result.shape)} and not {list(right.shape)}")
        if name in ("y", "dx", "out") and result.dtype != case.dtype:
            raise Wrong(f"{case.name}: {name} is {result.dtype} and not {case.dtype}")
        result, right = result.double(), right.detach().double()
        error = ((result - right).norm() / right.norm()).item()
        limit = TOLERANCES[case.dtype] if isinstance(case, Norm) else 0
        if not error <= limit:  # which also refuses the NaN that outputs hold where nothing wrote over the poison
            raise Wrong(f"{case.name}: {name} is off by {error:.1e}")


def check_replay(case: Case, replay: Callable[[], object], outputs: Tensors, expected: Tensors) -> None:
    """Raise :class:`Wrong` unless ``replay`` writes ``outputs``, poisoned before, and writes them right."""
    for tensor in outputs.values():
        tensor.detach().fill_(math.nan if tensor.is_floating_point() else -1)
    replay()
    check(case, outputs, expected)


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """``function`` under torch.compile, with a code object of its own: cases are no recompilations of each other."""
    return torch.compile(copy_code_object(function), fullgraph=True, dynamic=False)


def _saved_tensors_kept() -> contextlib.AbstractContextManager[None]:
    """Compiled meanwhile, a backward pass writes into nothing that its forward pass saved, and so can run again."""
    return torch._functorch.config.patch(donated_buffer=False)

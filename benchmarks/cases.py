"""What is measured: each operator at each shape of the recipe, by each implementation, checked before it is timed.

A case's ``calls`` give one call per input set; :func:`check` refuses a call whose result is not that of plain torch in
float64 (bit for bit, where the operator only moves pixels). In training no implementation keeps running statistics,
which are a few values per channel that the compiled step updates on its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch._functorch.config
import torch.nn.functional as F

from cifar_fast import Draws, Recipe
from cifar_fast.augment import augment as augment_in_torch
from cifar_fast.backends import fresh_code
from cifar_fast.kernels.augment import augment, augment_reference
from cifar_fast.kernels.augment import example_launches as augment_launches
from cifar_fast.kernels.batch_norm_celu import batch_norm_celu, batch_norm_celu_reference
from cifar_fast.kernels.batch_norm_celu import example_launches as norm_launches
from cifar_fast.kernels.launch import Launch
from cifar_fast.recipe import IMAGE_SIZE, Block

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
    direction: str = "forward"
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        return f"augment to {self.out_channels} channels"

    def launches(self) -> list[Launch]:
        """Our launch, on tensors without memory."""
        return augment_launches(
            n=self.images,
            batch_size=self.recipe.batch_size,
            size=IMAGE_SIZE,
            out_channels=self.out_channels,
            padding=self.recipe.crop_padding,
            cutout_size=self.recipe.cutout_size,
            dtype=self.dtype,
        )

    @property
    def ideal_bytes(self) -> int:
        """Each input and output once."""
        return moved(self.launches())

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
        recipe = self.recipe
        settings = dict(padding=recipe.crop_padding, cutout_size=recipe.cutout_size, out_channels=self.out_channels)

        def in_torch(images: torch.Tensor, draws: torch.Tensor, table: torch.Tensor, labels: torch.Tensor) -> Tensors:
            return {"out": augment_reference(images, draws, table, **settings), "out_labels": labels[draws[0]]}

        def fused(images: torch.Tensor, draws: torch.Tensor, table: torch.Tensor, labels: torch.Tensor) -> Tensors:
            return dict(zip(("out", "out_labels"), augment(images, draws, table, labels=labels, **settings)))

        function = {"fused": fused, "eager": in_torch}.get(implementation) or compiled(in_torch)
        return [lambda given=given: function(**given) for given in sets]

    def truth(self, given: Tensors) -> Tensors:
        """By the eager backend's augmentation, which gathers normalized images."""
        draws = given["draws"]
        channels = torch.arange(3, device=draws.device)
        normalized = given["table"][channels, given["images"][draws[0]].long()]
        in_order = torch.cat((torch.arange(draws.shape[1], device=draws.device)[None], draws[1:]))
        batch = augment_in_torch(normalized, Draws(in_order), self.recipe)
        return {"out": F.pad(batch, (0, 0, 0, 0, 0, self.out_channels - 3)), "out_labels": given["labels"][draws[0]]}


@dataclass(frozen=True)
class Norm:
    """(Max-pool,) batch norm and CELU of a block. ``direction``: forward, backward or both in training; inference."""

    block: Block
    batch_size: int
    alpha: float
    dtype: torch.dtype
    direction: str

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, self.block.c_out, self.block.size, self.block.size

    @property
    def parameter_dtype(self) -> torch.dtype:
        """As in training: bfloat16 has float32 weights."""
        return torch.float32 if self.dtype == torch.bfloat16 else self.dtype

    def launches(self) -> list[Launch]:
        """Our launches of this direction, on tensors without memory."""
        directions = ("forward", "backward") if self.direction == "both" else (self.direction,)
        return [
            launch
            for direction in directions
            for launch in norm_launches(
                self.shape,
                pool=self.block.pool,
                dtype=self.dtype,
                parameter_dtype=self.parameter_dtype,
                alpha=self.alpha,
                direction=direction,
            )
        ]

    @property
    def ideal_bytes(self) -> int:
        """Each tensor that enters or leaves a direction once: what one kernel with all else on the chip would move."""
        n, channels, size, _ = self.shape
        x = n * channels * size * size
        p = x // self.block.pool**2
        kept = p if self.block.pool == 2 else 0
        element = self.dtype.itemsize
        of = {
            "forward": (x + p + kept) * element + kept,
            "backward": (p + p + x) * element + kept,
            "inference": (x + p) * element,
        }
        return of["forward"] + of["backward"] if self.direction == "both" else of[self.direction]

    def inputs(self, sets: int, device: torch.device) -> list[Tensors]:
        """``sets`` of random tensors, whose memory none shares."""
        n, channels, size, _ = self.shape

        def activations(size: int, mean: float) -> torch.Tensor:
            tensor = torch.empty(n, size, size, channels, dtype=self.dtype, device=device)
            return tensor.normal_(mean, 2).permute(0, 3, 1, 2)

        def values(mean: float, deviation: float) -> torch.Tensor:
            return torch.empty(channels, dtype=self.parameter_dtype, device=device).normal_(mean, deviation)

        found = []
        for _ in range(sets):
            given = {"x": activations(size, 1), "weight": values(1, 0.3), "bias": values(0, 0.3)}
            if self.direction == "inference":
                given |= {"running_mean": values(1, 0.3), "running_var": values(4, 0.3).abs()}
            elif self.direction != "forward":
                given["dy"] = activations(self.block.out_size, 0)  # of mean 0: the sums over it must fit float16
            found.append(given)
        return found

    def calls(self, implementation: str, sets: Sequence[Tensors]) -> list[Call]:
        """A call for each of ``sets``; for a backward pass, after the forward pass that it needs."""
        operator = batch_norm_celu if implementation == "fused" else batch_norm_celu_reference

        def forward(*tensors: torch.Tensor | None) -> torch.Tensor:
            return self._apply(operator, *tensors)

        if implementation == "compiled":
            forward = compiled(forward)
        return [self._call(forward, given) for given in sets]

    def truth(self, given: Tensors) -> Tensors:
        """In plain torch and float64."""

        def forward(*tensors: torch.Tensor | None) -> torch.Tensor:
            return self._apply(batch_norm_celu_reference, *tensors)

        return self._call(forward, {name: tensor.double() for name, tensor in given.items()})()

    def _apply(self, operator: Callable[..., torch.Tensor], *tensors: torch.Tensor | None) -> torch.Tensor:
        return operator(*tensors, training=self.direction != "inference", alpha=self.alpha, pool=self.block.pool)

    def _call(self, forward: Callable[..., torch.Tensor], given: Tensors) -> Call:
        learns = self.direction != "inference"
        learnt = [given[name].detach().requires_grad_(learns) for name in ("x", "weight", "bias")]
        tensors = *learnt, given.get("running_mean"), given.get("running_var")

        def gradients(y: torch.Tensor, again: bool) -> Tensors:
            found = torch.autograd.grad(y, learnt, given["dy"], retain_graph=again)
            return dict(zip(("dx", "dweight", "dbias"), found))

        def both() -> Tensors:
            y = forward(*tensors)
            return {"y": y} | gradients(y, again=False)

        if self.direction == "both":
            return both
        if self.direction == "backward":
            with _saved_tensors_kept():
                y = forward(*tensors)

            def backward() -> Tensors:
                with _saved_tensors_kept():
                    return gradients(y, again=True)

            return backward
        return lambda: {"y": forward(*tensors)}


@dataclass(frozen=True)
class Convolution:
    """A pass of a block's convolution alone: forward, data gradient or weight gradient, with ``c_in`` channels of
    input.
    """

    block: Block
    c_in: int
    batch_size: int
    dtype: torch.dtype
    direction: str

    @property
    def name(self) -> str:
        return f"conv{self.block.index} {self.c_in}->{self.block.c_out} {self.block.size}x{self.block.size}"

    @property
    def flop(self) -> int:
        return 18 * self.c_in * self.block.c_out * self.block.size**2 * self.batch_size

    def call(self, device: torch.device, memory_format: torch.memory_format) -> Callable[[], object]:
        """A call on random tensors."""

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=self.dtype).contiguous(memory_format=memory_format)

        size, c_out = self.block.size, self.block.c_out
        x, weight = random(self.batch_size, self.c_in, size, size), random(c_out, self.c_in, 3, 3)
        dy = random(self.batch_size, c_out, size, size)
        settings = (
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
        )  # stride, padding, dilation, transposed, its padding, groups
        if self.direction == "forward":
            return lambda: torch.ops.aten.convolution(x, weight, None, *settings)
        mask = [self.direction == "data gradient", self.direction == "weight gradient", False]
        return lambda: torch.ops.aten.convolution_backward(dy, x, weight, None, *settings, mask)


Case = Augmentation | Norm


def kernel_cases(recipe: Recipe, dtype: torch.dtype) -> list[Case]:
    """Every distinct shape at which ``recipe`` augments and norms, in each direction."""
    shapes = {block.name: block for block in recipe.blocks()}.values()
    norms = [
        Norm(block, recipe.batch_size, recipe.celu_alpha, dtype, direction)
        for block in shapes
        for direction in ("forward", "backward", "both", "inference")
    ]
    return [*(Augmentation(recipe, dtype, channels) for channels in (3, 4, 8)), *norms]


def convolution_cases(recipe: Recipe, dtype: torch.dtype) -> list[Convolution]:
    """Each pass of each convolution; the first with 3, 4 and 8 channels of input, and no data gradient, which nobody
    needs.
    """
    return [
        Convolution(block, c_in, recipe.batch_size, dtype, direction)
        for block in recipe.blocks()
        for c_in in ((3, 4, 8) if block.index == 1 else (block.c_in,))
        for direction in ("forward", *(["data gradient"] if block.index > 1 else []), "weight gradient")
    ]


def moved(launches: Sequence[Launch]) -> int:
    """Bytes that ``launches`` read and write."""
    return sum(launch.bytes_read + launch.bytes_written for launch in launches)


def input_sets(case: Case, cache: int) -> int:
    """How many input sets touch twice a ``cache`` of so many bytes before the first of them comes again."""
    return 1 + math.ceil(2 * cache / case.ideal_bytes)


def check(case: Case, outputs: Tensors, expected: Tensors) -> None:
    """Raise :class:`Wrong` unless ``outputs`` are what ``case.truth`` expects, in number, shape, type and value."""
    what = f"{case.name}, {case.direction}"
    if outputs.keys() != expected.keys():
        raise Wrong(f"{what}: gave {', '.join(outputs)} and not {', '.join(expected)}")
    for name, right in expected.items():
        result = outputs[name].detach()
        if result.shape != right.shape:
            raise Wrong(f"{what}: {name} has the shape {list(result.shape)} and not {list(right.shape)}")
        if name in ("y", "dx", "out") and result.dtype != case.dtype:
            raise Wrong(f"{what}: {name} is {result.dtype} and not {case.dtype}")
        result, right = result.double(), right.detach().double()
        error = ((result - right).norm() / right.norm()).item()
        if not error <= case.tolerance:  # not (error > tolerance): unwritten, poisoned outputs hold NaN
            raise Wrong(f"{what}: {name} is off by {error:.1e}")


def check_replay(case: Case, replay: Callable[[], object], outputs: Tensors, expected: Tensors) -> None:
    """Raise :class:`Wrong` unless ``replay`` writes ``outputs``, poisoned before, and writes them right."""
    for tensor in outputs.values():
        tensor.detach().fill_(math.nan if tensor.is_floating_point() else -1)
    replay()
    check(case, outputs, expected)


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """``function`` under torch.compile, with a code object of its own: cases are no recompilations of each other."""
    return torch.compile(fresh_code(function), fullgraph=True, dynamic=False)


def _saved_tensors_kept() -> contextlib.AbstractContextManager[None]:
    """Compiled meanwhile, a backward pass writes into nothing that its forward pass saved, and so can run again."""
    return torch._functorch.config.patch(donated_buffer=False)

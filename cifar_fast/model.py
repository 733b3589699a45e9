"""The reference's network and loss."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from cifar_fast.data.dataset import Dataset
from cifar_fast.recipe import Recipe
from cifar_fast.utils.errors import InputError, first_line
from cifar_fast.utils.seeds import derive_seed

if TYPE_CHECKING:
    pass


class CNN(nn.Module):
    """Convolutions 3x3, each followed by (max-pool,) batch norm and CELU; then max-pool and a linear layer.

    The pool stands before the norm, where it cuts the norm's traffic by four. With ``recipe.residual`` each block of
    convolution, norm and activation with as many channels going in as out, which has no pool, adds its input to its
    output, and the sum is not activated again: with the reference's widths blocks 3, 4, 7 and 8.

    Names in the state dict are those of the reference script's model, whatever the recipe leaves out: an Identity
    stands in its place. Made on the CPU in float32, with initial weights drawn from ``generator`` (default: torch's
    own) as torch's layers draw theirs, times ``recipe.init_scale``.
    """

    def __init__(self, recipe: Recipe, num_classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.output_scale = recipe.output_scale
        where: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
        layers: list[nn.Module] = []
        self.skips: dict[int, int] = {}  # first and last layer of each block whose input is added to its output
        for block in recipe.blocks():
            first = len(layers)
            layers.append(skip_init(nn.Conv2d, block.c_in, block.c_out, 3, padding=1, bias=False, **where))
            if block.pool > 1:
                layers.append(nn.MaxPool2d(block.pool))
            layers.append(nn.BatchNorm2d(block.c_out, **where) if recipe.batch_norm else nn.Identity())
            layers.append(make_activation(recipe))
            if recipe.residual and block.keeps_shape:
                self.skips[first] = len(layers) - 1
        linear = skip_init(nn.Linear, recipe.widths[-1], num_classes, bias=False, **where)
        self.seq = nn.Sequential(*layers, nn.MaxPool2d(recipe.final_size), nn.Flatten(), linear)
        for layer in self.seq:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):  # what their reset_parameters does, which takes no generator
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                layer.weight.data.mul_(recipe.init_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of normalized images ``[B, 3, 32, 32]``."""
        return self.outputs(x) * self.output_scale

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """The logits before their scale."""
        for i, layer in enumerate(self.seq):
            if i in self.skips:
                kept = x
            x = layer(x)
            if i in self.skips.values():
                x = x + kept
        return x


def make_activation(recipe: Recipe) -> nn.Module:
    """The recipe's activation."""
    if recipe.activation == "celu":
        return nn.CELU(alpha=recipe.celu_alpha)
    return {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[recipe.activation]()


def loss_and_correct(logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image's loss, and whether its largest logit is its label's; both ``[B]``, the second bool."""
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=recipe.label_smoothing)
    return loss, logits.argmax(dim=1) == labels


Model: TypeAlias = nn.Module | Callable[[], nn.Module]


NOISE = 3
"""The stream of a run's seed that a model draws from while it trains, besides those of :class:`Seeds`."""


class CustomModel:
    """Makes models as ``given`` says: a module, whose weights each run starts from, or what makes one, a class or a
    function, called for each run under its seed.

    Called with the arguments of :class:`cifar_fast.CNN`, whose place it takes in the backends.
    """

    def __init__(self, given: Model) -> None:
        if isinstance(given, nn.Module):
            start = copy.deepcopy(given)
            self.make: Callable[[], nn.Module] = lambda: copy.deepcopy(start)
        elif callable(given):
            self.make = given
        else:
            raise InputError(f"model must be a torch.nn.Module or a function that makes one, not {given!r}")
        with self.preserve_rng(torch.device("cpu")):
            try:
                made = self.make()
            except Exception as error:  # whatever a function of anybody's raises
                why = f"{type(error).__name__}: {first_line(error)}"
                raise InputError(f"model cannot be made by calling {given!r} without arguments ({why})") from error
        if not isinstance(made, nn.Module):
            raise InputError(f"model must make a torch.nn.Module, not {type(made).__name__}")
        self.name = type(made).__name__
        if any(nn.parameter.is_lazy(tensor) for tensor in (*made.parameters(), *made.buffers())):
            raise InputError(f"model {self.name} has layers whose sizes are open; give it an image first")
        if not any(parameter.requires_grad for parameter in made.parameters()):
            raise InputError(f"model {self.name} has no parameter to train")

    def __call__(self, recipe: Recipe, num_classes: int, generator: torch.Generator) -> nn.Module:
        """A fresh model; one that draws its weights from torch's own generator of the CPU draws from ``generator``."""
        default = torch.default_generator
        before = default.get_state()
        default.set_state(generator.get_state())
        try:
            model = self.make()
            generator.set_state(default.get_state())
        finally:
            default.set_state(before)
        return model

    @contextlib.contextmanager
    def preserve_rng(self, device: torch.device) -> Iterator[None]:
        """Give torch's own generators back as they were: a model may draw from them, as dropout does."""
        with torch.random.fork_rng(
            [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
        ):
            yield

    def generators(self, device: torch.device, seed: int) -> list[torch.Generator]:
        """Torch's own, which a model draws from while it trains, at the start of the run of ``seed``."""
        found = [torch.default_generator]
        if device.type == "cuda":
            found.append(torch.cuda.default_generators[torch.cuda.current_device()])
        return [generator.manual_seed(derive_seed(seed, NOISE)) for generator in found]


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the weights of a step whose activations are of ``dtype``."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def make_model(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    dtype: torch.dtype,
    custom_model: CustomModel | None = None,
    change: Callable[[CNN], nn.Module] = lambda model: model,
) -> nn.Module:
    """A model with throw-away weights, the recipe's changed by ``change``, its weights of the type that goes with
    ``dtype``.
    """
    arguments = (recipe, dataset.num_classes, torch.Generator())
    model = custom_model(*arguments) if custom_model else change(CNN(*arguments))
    return model.to(parameter_dtype(dtype)).to(device)

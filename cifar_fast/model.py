"""The reference's network and loss, the choice of a recipe's network, and the caller's network if there is one."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from cifar_fast.activations import make_activation
from cifar_fast.recipe import Recipe
from cifar_fast.utils.errors import InputError, first_line, out_of_memory
from cifar_fast.utils.seeds import derive_seed
from cifar_fast.whitened import Whitened


class CNN(nn.Module):
    """Convolutions 3x3, each followed by (max-pool,) batch norm and activation; then max-pool and a linear layer.

    The max-pool comes before the norm, where it divides the norm's memory traffic by four. ``recipe.residual`` adds the
    input of a block (convolution, norm, activation) to its output if both have the same shape. The sum is not activated
    again. Blocks 3, 4, 7 and 8 have such shapes with the reference's widths.

    The names in the state dict are those of the reference script's model. A layer that the recipe leaves out is an
    ``Identity``, so the other names do not change.

    Args:
        recipe: its widths, activation, scales and switches define the network.
        num_classes: number of logits.
        generator: draws the initial weights, as torch's layers do; they are then multiplied by ``recipe.init_scale``.
            None is torch's default generator. The weights are float32 on the CPU.
    """

    def __init__(self, recipe: Recipe, num_classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.output_scale = recipe.output_scale
        factory: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
        layers: list[nn.Module] = []
        self.skips: dict[int, int] = {}  # first and last layer of each block with a residual connection
        for block in recipe.blocks():
            first = len(layers)
            layers.append(skip_init(nn.Conv2d, block.c_in, block.c_out, 3, padding=1, bias=False, **factory))
            if block.pool > 1:
                layers.append(nn.MaxPool2d(block.pool))
            layers.append(nn.BatchNorm2d(block.c_out, **factory) if recipe.batch_norm else nn.Identity())
            layers.append(make_activation(recipe))
            if recipe.residual and block.keeps_shape:
                self.skips[first] = len(layers) - 1
        linear = skip_init(nn.Linear, recipe.widths[-1], num_classes, bias=False, **factory)
        self.seq = nn.Sequential(*layers, nn.MaxPool2d(recipe.final_size), nn.Flatten(), linear)
        for layer in self.seq:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                # This is the same as their reset_parameters, which cannot be used because it takes no generator.
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                layer.weight.data.mul_(recipe.init_scale)

    def __prepare_scriptable__(self) -> Any:
        """Refuse ``torch.jit.script``, which calls this and cannot compile the network."""
        raise cannot_be_scripted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, num_classes]`` for normalized images ``[B, 3, 32, 32]``."""
        return self.outputs(x) * self.output_scale

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits before they are scaled."""
        for i, layer in enumerate(self.seq):
            if i in self.skips:
                block_input = x
            x = layer(x)
            if i in self.skips.values():
                x = x + block_input
        return x


NETWORKS: dict[str, type[CNN] | type[Whitened]] = {"cnn": CNN, "whitened": Whitened}
"""The class of each of a recipe's networks."""


def make_network(recipe: Recipe, num_classes: int, generator: torch.Generator | None = None) -> CNN | Whitened:
    """Return the recipe's network with initial weights from ``generator``, float32 on the CPU."""
    return NETWORKS[recipe.network](recipe, num_classes, generator)


def start_epoch(model: nn.Module, epoch: int) -> bool:
    """Select what ``model`` trains in an epoch, counted from 0. Return whether no parameter is left out of it."""
    inner = getattr(model, "_orig_mod", model)
    return inner.start_epoch(epoch) if isinstance(inner, Whitened) else True


def cannot_be_scripted() -> InputError:
    """Return the error for ``torch.jit.script``."""
    return InputError(
        "torch.jit.script cannot take this model; use torch.export.export(model, (images,)) or "
        "torch.jit.trace(model, images)"
    )


class Float32Linear(nn.Linear):
    """The ``linear`` layer, in float32 also under autocast.

    The two largest logits of about one image in a hundred are equal in bfloat16.
    """

    def __init__(self, linear: nn.Module) -> None:
        assert isinstance(linear, nn.Linear)
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def loss_and_correct(logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each image's loss ``[B]`` and whether its prediction is correct, bool ``[B]``."""
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=recipe.label_smoothing)
    return loss, logits.argmax(dim=1) == labels


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the weights for activations of ``dtype``."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the losses for activations of ``dtype``."""
    return torch.float16 if dtype == torch.float16 else torch.float32


Model: TypeAlias = nn.Module | Callable[[], nn.Module]

NOISE = 3
"""Number of the random stream that a model draws from in training, besides the streams of ``Seeds``."""


WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",  # torch.optim.swa_utils
}
"""Attribute with the module inside, for each of torch's classes that wrap a whole module."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside of torch's wrappers, which add a prefix to the names of its weights."""
    while type(model).__module__.startswith("torch.") and (inside := WRAPPERS.get(type(model).__name__)):
        model = getattr(model, inside)
    return model


def load_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load ``state_dict`` into ``model``.

    Raises:
        InputError: they do not fit. The message names the first key that is missing, unexpected or of another shape.
    """
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        own = model.state_dict()
        shapes = [(name, tuple(state_dict[name].shape), tuple(own[name].shape)) for name in own if name in state_dict]
        parts = [f"it lacks {name}" for name in own if name not in state_dict][:1]
        parts += [f"it has {name}, which the model lacks" for name in state_dict if name not in own][:1]
        parts += [f"{name} is {found}, not {wanted}" for name, found, wanted in shapes if found != wanted][:1]
        raise InputError(f"the state dict does not fit {type(model).__name__}: {'; '.join(parts) or error}") from error


class CustomModel:
    """The caller's network, which is trained instead of the recipe's. It makes a model for each run.

    A module that torch.compile, DataParallel or AveragedModel wraps is trained without the wrapper.

    Args:
        given: a module, whose weights each run starts from; or a class or function that makes a module, called for each
            run under the run's seed.

    Attributes:
        name: name of the class of the module.
        digest: SHA-256 of its layers with their settings and of the shapes of its state, in hexadecimal. The weights
            that each run starts from belong to it too, if ``given`` is a module. The code of the class does not.

    Raises:
        InputError: ``given`` makes no module with parameters to train.
    """

    def __init__(self, given: Model) -> None:
        if isinstance(given, nn.Module):
            start = copy.deepcopy(unwrap(given))
            self.make: Callable[[], nn.Module] = lambda: copy.deepcopy(start)
        elif callable(given):
            self.make = given
        else:
            raise InputError(f"model must be a torch.nn.Module or a function that makes one, not {given!r}")
        with self.preserve_rng(torch.device("cpu")):
            try:
                made = self.make()
            except Exception as error:  # the caller's function may raise anything
                why = f"{type(error).__name__}: {first_line(error)}"
                raise InputError(f"model cannot be made by calling {given!r} without arguments ({why})") from error
        if not isinstance(made, nn.Module):
            raise InputError(f"model must make a torch.nn.Module, not {type(made).__name__}")
        made = unwrap(made)
        self.name = type(made).__name__
        if any(nn.parameter.is_lazy(tensor) for tensor in (*made.parameters(), *made.buffers())):
            raise InputError(f"model {self.name} has lazy layers, whose sizes are not known; give it an image first")
        self.digest = _digest(made, with_weights=isinstance(given, nn.Module))
        if not any(parameter.requires_grad for parameter in made.parameters()):
            raise InputError(f"model {self.name} has no parameter to train")

    def __call__(self, recipe: Recipe, num_classes: int, generator: torch.Generator) -> nn.Module:
        """Return a fresh model, as :class:`CNN` does. Initial weights come from ``generator``, not torch's default."""
        default = torch.default_generator
        before = default.get_state()
        default.set_state(generator.get_state())
        try:
            model = unwrap(self.make())
            generator.set_state(default.get_state())
        finally:
            default.set_state(before)
        return model

    def preserve_rng(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Restore torch's default generators afterwards. A model may draw from them, as dropout does."""
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def generators(self, device: torch.device, seed: int) -> list[torch.Generator]:
        """Seed torch's default generators for a run, and return them. A model draws from them in training."""
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        return [generator.manual_seed(derive_seed(seed, NOISE)) for generator in generators]


def _digest(model: nn.Module, with_weights: bool) -> str:
    layers = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))  # addresses in the memory of this process
    digest = hashlib.sha256(layers.encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # a module may have other state
            continue
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if with_weights:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_model(
    recipe: Recipe,
    num_classes: int,
    device: torch.device,
    dtype: torch.dtype,
    custom_model: CustomModel | None = None,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    """Return a model on ``device`` for activations of ``dtype``, with weights that are to be overwritten.

    It is the custom model if there is one. Otherwise it is the recipe's network after ``change``. In bfloat16, that
    network computes its logits in float32.
    """
    generator = torch.Generator()
    if custom_model:
        model = custom_model(recipe, num_classes, generator)
    else:
        plain = make_network(recipe, num_classes, generator)
        if dtype == torch.bfloat16 and isinstance(plain, CNN):
            plain.seq[-1] = Float32Linear(plain.seq[-1])
        elif dtype == torch.bfloat16:
            plain.head = Float32Linear(cast(nn.Linear, plain.head))
        model = change(plain)
    return model.to(parameter_dtype(dtype)).to(device)

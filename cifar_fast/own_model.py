"""A model of the caller's own in the place of the recipe's network: what :func:`cifar_fast.fit` takes as ``model``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import nn

from cifar_fast.augment import mixed
from cifar_fast.backends import Backend, make_model
from cifar_fast.data import Dataset
from cifar_fast.errors import InputError, first_cause, first_line
from cifar_fast.plan import Plan, set_up
from cifar_fast.progress import Log
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE, Recipe

Model: TypeAlias = nn.Module | Callable[[], nn.Module]

NOISE = 3
"""The stream of a run's seed that a model draws from while it trains, besides those of :class:`Seeds`."""


class OwnModel:
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
        with self.forked(torch.device("cpu")):
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
    def forked(self, device: torch.device) -> Iterator[None]:
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
        return [generator.manual_seed(mixed(seed, NOISE)) for generator in found]

    def set_up(self, plan: Plan, recipe: Recipe, dataset: Dataset, log: Log) -> tuple[Backend, list[str]]:
        """As :func:`cifar_fast.plan.set_up`, for this model."""
        self._check_logits(plan, recipe, dataset)
        return set_up(plan, recipe, dataset, log, self)

    @torch.no_grad()
    def _check_logits(self, plan: Plan, recipe: Recipe, dataset: Dataset) -> None:
        """Raise :class:`InputError` unless the model makes logits of images."""
        model = make_model(recipe, dataset, plan.device, plan.dtype, self).to(memory_format=plan.memory_format).eval()
        shape = (2, IMAGE_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
        images = torch.zeros(shape, dtype=plan.dtype, device=plan.device).contiguous(memory_format=plan.memory_format)
        try:
            with torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.dtype == torch.bfloat16):
                logits = model(images)
        except Exception as error:  # whatever a model of anybody's raises
            cause = first_cause(error)
            raise InputError(
                f"model {self.name} cannot take images of shape {shape} in {plan.memory_format} "
                f"({type(cause).__name__}: {first_line(cause)})"
            ) from error
        is_tensor = isinstance(logits, torch.Tensor)
        wanted = (len(images), dataset.num_classes)
        if not is_tensor or tuple(logits.shape) != wanted or not logits.is_floating_point():
            came = f"{logits.dtype} of shape {tuple(logits.shape)}" if is_tensor else type(logits).__name__
            raise InputError(f"model {self.name} must give logits of shape {wanted} for two images, not {came}")

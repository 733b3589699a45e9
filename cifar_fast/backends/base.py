"""The base class of the backends, and the functions that they share."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from cifar_fast.data.augment import Draws
from cifar_fast.data.tensors import DeviceData
from cifar_fast.model import CustomModel, load_weights, make_network, parameter_dtype
from cifar_fast.recipe import Recipe
from cifar_fast.whitened import IMAGES as WHITENED_IMAGES
from cifar_fast.whitened import Whitened

Step: TypeAlias = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""A training step: from its number in the epoch to losses and correct predictions."""


class Backend(ABC):
    """A way to run the training steps and evaluations of a recipe.

    The constructor may take minutes, because it may compile. A backend then serves any number of runs; ``reset``
    starts each of them.

    Args:
        recipe: the training recipe.
        data: the data set, on ``device``.
        device: where everything is computed.
        dtype: dtype of the activations in training. In float16 and float32 the weights, the batch norm and the momentum
            have the same dtype, as in the reference. bfloat16 has too few bits to add a small update to a weight, so
            there the weights and their updates are float32, under autocast. An evaluation has the dtype of the weights.
        memory_format: memory format of the batches.
        custom_model: the caller's network; None trains the recipe's.

    Attributes:
        name: eager, compiled or fused.
        compiles: whether a compiler makes its set-up take minutes.
        model: the network in training. Its modules may differ from those of the plain model.
        optimizer: updates the parameters of ``model``.
        epoch: number of epochs trained in this run.
        notes: lines for the user about this recipe on this backend.
    """

    name: str
    compiles = True
    model: nn.Module
    optimizer: torch.optim.SGD
    notes: Sequence[str] = ()

    def __init__(
        self,
        recipe: Recipe,
        data: DeviceData,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        custom_model: CustomModel | None = None,
    ) -> None:
        self.recipe, self.data, self.custom_model = recipe, data, custom_model
        self.device, self.dtype, self.memory_format = device, dtype, memory_format
        self.epoch = 0
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Prepare images, model and optimizer, and compile."""

    @abstractmethod
    def begin_epoch(self, draws: Draws) -> Step:
        """Begin the next epoch, or a part of it with fewer draws, and return the function of its steps.

        Call it with 0, 1, 2, and so on. Each call trains on one batch, and returns the losses ``[batch_size]`` and, as
        bool ``[batch_size]``, which predictions are correct. They are on the device and stay valid until the next
        epoch. After the recipe's last epoch the learning rate schedule starts again.
        """

    def rewind(self, step: int) -> None:  # noqa: B027  (most backends count no steps)
        """Set the counters of steps back, so that ``step`` of the epoch can be called once more."""

    def train_epoch(self, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Train the next epoch as :meth:`begin_epoch` says, one step for each item that is requested."""
        step = self.begin_epoch(draws)
        yield from map(step, range(len(draws) // self.recipe.batch_size))

    @abstractmethod
    def batch(self, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the augmented images ``[B, C, S, S]`` and labels ``[B]`` that ``draws`` chooses."""

    @abstractmethod
    def evaluate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each evaluated image ``[N]``, and bool ``[N]``, which predictions are correct.

        They have the order of ``data.evaluated_images``, and are valid until the next evaluation.
        """

    @torch.no_grad()
    def _evaluate_in_batches(
        self,
        scores_fn: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]],
        batch_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses and correct predictions of ``scores_fn`` for all batches of evaluated images and labels.

        The last batch may be short.
        """
        self.model.eval()
        batches = zip(self._evaluated_batches(batch_size), self.data.evaluated_labels.split(batch_size))
        losses, correct = zip(*(scores_fn(images, labels) for images, labels in batches))
        return torch.cat(losses), torch.cat(correct)

    def _evaluated_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Yield all evaluated images, normalized, ``[B, C, S, S]``, in the dtype of the weights.

        No two evaluations share memory, because a custom model may write into its input.
        """
        dtype = parameter_dtype(self.dtype)
        for images in self.data.evaluated_images.split(batch_size):
            normalized = self.data.normalization.apply(images, dtype).permute(0, 3, 1, 2)
            yield normalized.contiguous(memory_format=self.memory_format)

    def new_model(self, generator: torch.Generator) -> nn.Module:
        """Return a fresh plain model for a run, on the CPU, with initial weights drawn from ``generator``."""
        if self.custom_model is not None:
            return self.custom_model(self.recipe, self.data.num_classes, generator)
        model = make_network(self.recipe, self.data.num_classes, generator)
        if isinstance(model, Whitened):
            images = self.data.normalization.apply(self.data.train_images[:WHITENED_IMAGES], torch.float32)
            model.prepare(images.permute(0, 3, 1, 2).cpu())
        return model

    def reset(self, model: nn.Module) -> None:
        """Start a run with the weights and statistics of ``model``, no momentum, and the schedule's first step."""
        self.epoch = 0
        self.model.load_state_dict(model.state_dict())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights and statistics under the names of the plain model."""
        return self.model.state_dict()

    def training_state(self) -> dict[str, Any]:
        """Copy to the CPU everything that the next epoch depends on, except its random draws."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.model.parameters()]
        momenta = [state.get("momentum_buffer") for state in states]  # None before the first gradient
        return {
            "epoch": self.epoch,
            "model": {name: _copy_to_cpu(tensor) for name, tensor in self.model.state_dict().items()},
            "momentum": [None if momentum is None else _copy_to_cpu(momentum) for momentum in momenta],
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Return to a state that ``training_state`` returned in this run or, after ``reset``, in another process."""
        self.epoch = state["epoch"]
        load_weights(self.model, state["model"])
        for parameter, momentum in zip(self.model.parameters(), state["momentum"], strict=True):
            if momentum is not None and momentum.shape != parameter.shape:
                raise ValueError(f"a momentum is {tuple(momentum.shape)}, not {tuple(parameter.shape)}")
            own = self.optimizer.state[parameter]
            if momentum is None:
                own.pop("momentum_buffer", None)
            elif "momentum_buffer" in own:
                own["momentum_buffer"].copy_(momentum)  # a CUDA graph may have captured the address
            else:
                own["momentum_buffer"] = momentum.to(parameter.device, copy=True)


def _copy_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context that computes in bfloat16 if ``dtype`` is bfloat16, and that changes nothing otherwise.

    The cache of cast weights is off. Inside an autocast block of the caller it would outlive the step.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)


def compile_loss_fn(function: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    """Compile ``function`` with ``torch.compile`` for each of its shapes."""
    return torch.compile(copy_code_object(function), dynamic=False, fullgraph=fullgraph)


def copy_code_object(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of ``function`` that has its own code object.

    The compiler counts recompilations per code object and gives up after a few. A function of another model or shape
    would count as a recompilation of the first.
    """
    own = types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def warm_up_draws(n: int, device: torch.device) -> Draws:
    """Return draws for ``n`` images in their order, for a warm-up. No random number is used."""
    permutation = torch.arange(n, device=device)
    return Draws(torch.stack((permutation, *torch.zeros(3, n, dtype=torch.int64, device=device))))

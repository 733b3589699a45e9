"""Ways to run the recipe: small objects with the same methods. Eager and compiled are here, fused in ``fused.py``.

They share the functions below. Constructors set up, which may take long and serves every run to come; ``reset`` copies
the numbers of a fresh model in and takes a run back to its start.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import nn

from cifar_fast.data.augment import Draws
from cifar_fast.data.tensors import Tensors
from cifar_fast.model import loss_and_correct
from cifar_fast.recipe import Recipe

if TYPE_CHECKING:
    from cifar_fast.model import CustomModel

LossFn = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes images ``[B, C, S, S]`` and labels ``[B]``; gives losses ``[B]`` and whether each is right, bool ``[B]``."""


Scoring = TypeVar("Scoring", bound=Callable[..., Any])


class Backend(Protocol):
    """What the trainer, the comparison and the profile need of a backend.

    ``dtype`` is that of the activations. float16 and float32 hold everything in that type, as the reference does:
    weights, batch norm, momentum. bfloat16, which has too few bits to add a small step to a weight, is the type of the
    activations and convolutions alone (autocast); weights and their updates are float32. ``notes``: what a person
    should know of how this recipe runs here, a line each. ``custom_model``: what stands in the place of the recipe's
    network, if anything.
    """

    name: str
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    model: nn.Module
    custom_model: CustomModel | None
    optimizer: torch.optim.SGD
    notes: Sequence[str]

    def reset(self, model: nn.Module) -> None:
        """Start a run: weights and statistics of ``model``, no momentum, the schedule's first step."""

    def train_epoch(self, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Train the next epoch, one step each time the next item is asked for.

        Gives the step's losses ``[batch_size]`` and whether each image was right, bool ``[batch_size]``, on the
        device; they hold until the next epoch. After the recipe's last epoch the schedule starts again.
        """

    def evaluate(self) -> torch.Tensor:
        """Whether the model is right, for each test image, bool ``[N]``; holds until the next evaluation."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the names of the plain model."""

    def training_state(self) -> dict[str, Any]:
        """A copy, on the CPU, of all that the run's next epoch depends on besides its draws."""

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from where ``training_state`` was taken, after a ``reset``."""


class Resumable:
    """The state of a backend's training, between two epochs: the model's, the optimizer's, and how many have been."""

    model: nn.Module
    optimizer: torch.optim.SGD
    epoch: int
    notes: Sequence[str] = ()

    def training_state(self) -> dict[str, Any]:
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.model.parameters()]
        momenta = [state.get("momentum_buffer") for state in states]  # None of what has had no gradient
        return {
            "epoch": self.epoch,
            "model": {name: _copied(tensor) for name, tensor in self.model.state_dict().items()},
            "momentum": [None if momentum is None else _copied(momentum) for momentum in momenta],
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        for parameter, momentum in zip(self.model.parameters(), state["momentum"], strict=True):
            if momentum is None:
                continue
            own = self.optimizer.state[parameter]
            if "momentum_buffer" in own:
                own["momentum_buffer"].copy_(momentum)  # where a graph has captured it
            else:
                own["momentum_buffer"] = momentum.to(parameter.device, copy=True)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


@torch.no_grad()
def evaluate_by_batches(model: nn.Module, score: LossFn, data: Tensors, batch_size: int) -> torch.Tensor:
    """Whether ``model`` is right, for each test image, bool ``[N]``; the last batch may be short."""
    model.eval()
    batches = zip(data.test_images.split(batch_size), data.test_labels.split(batch_size))
    return torch.cat([score(images, labels)[1] for images, labels in batches])


def make_loss_fn(model: nn.Module, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> LossFn:
    """Forward pass and loss of ``model``, under autocast where ``dtype`` is bfloat16."""
    autocast = dtype == torch.bfloat16

    def score(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Without the cache of casts, which outlives a step where the caller is in an autocast block too.
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            return loss_and_correct(model(images), labels, recipe)

    return score


def compile_loss_fn(score: Scoring, whole: bool = True) -> Scoring:
    """``score`` under torch.compile; ``whole`` refuses what the compiler would leave to Python."""
    return cast(Scoring, torch.compile(copy_code_object(score), dynamic=False, fullgraph=whole))


def copy_code_object(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a code object of its own.

    The compiler counts recompilations per code object and gives up after a few; functions made anew by the same lines
    are no recompilations of each other.
    """
    own = types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def make_sgd(
    model: nn.Module, recipe: Recipe, *, fused: bool | None = None, lr: float | torch.Tensor = 0.0
) -> torch.optim.SGD:
    """The recipe's optimizer, whose loss is a sum over the batch: weight decay times the batch size.

    ``fused`` None is torch's default, as the script has it: many tensors an operation on a GPU, which False turns off.
    All groups of parameters have the one ``lr``.
    """
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if not recipe.decay_norms_and_biases:  # which have a value a channel
        matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups,
        lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay * recipe.batch_size,
        nesterov=recipe.nesterov,
        fused=fused,
    )


def warm_up_draws(n: int, device: torch.device) -> Draws:
    """Draws for ``n`` images in their order, for a warm-up: no random number is used."""
    permutation = torch.arange(n, device=device)
    return Draws(torch.stack((permutation, *torch.zeros(3, n, dtype=torch.int64, device=device))))

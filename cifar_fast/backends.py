"""Ways to run the recipe: small objects with the same methods. Eager and compiled are here, fused in ``fused.py``.

They share the functions below. Constructors set up, which may take long and serves every run to come; ``reset`` copies
the numbers of a fresh model in and takes a run back to its start.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import nn

from cifar_fast.augment import Draws, augment
from cifar_fast.data import Dataset
from cifar_fast.errors import InputError
from cifar_fast.model import CNN, loss_and_correct
from cifar_fast.recipe import Recipe

if TYPE_CHECKING:
    from cifar_fast.own_model import OwnModel

Score = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes images ``[B, C, S, S]`` and labels ``[B]``; gives losses ``[B]`` and whether each is right, bool ``[B]``."""


Scoring = TypeVar("Scoring", bound=Callable[..., Any])


class Backend(Protocol):
    """What the trainer, the comparison and the profile need of a backend.

    ``dtype`` is that of the activations. float16 and float32 hold everything in that type, as the reference does:
    weights, batch norm, momentum. bfloat16, which has too few bits to add a small step to a weight, is the type of the
    activations and convolutions alone (autocast); weights and their updates are float32. ``remarks``: what a person
    should know of how this recipe runs here, a line each. ``own_model``: what stands in the place of the recipe's
    network, if anything.
    """

    name: str
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    model: nn.Module
    own_model: OwnModel | None
    optimizer: torch.optim.SGD
    remarks: Sequence[str]

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
    remarks: Sequence[str] = ()

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


class Tensors(NamedTuple):
    """A data set on the device, its images normalized.

    ``train_images`` are ``[N, S, S, C]``, to gather from, ``test_images`` ``[N, C, S, S]`` in the batches' memory
    format; labels are int64 ``[N]``.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


class Eager(Resumable):
    """The reference: the same operations on the same numbers in the same order, and in the same memory format.

    On CIFAR-10 the script's batches are NCHW in memory, ``torch.contiguous_format``; in channels_last other kernels
    give other last bits, and on a CPU take less time.
    """

    name = "eager"

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        own_model: OwnModel | None = None,
    ) -> None:
        self.recipe, self.device, self.dtype, self.memory_format = recipe, device, dtype, memory_format
        self.own_model = own_model
        self.data = normalized_tensors(dataset, device, dtype, memory_format)
        self.model = make_model(recipe, dataset, device, dtype, own_model)
        self.score = make_score(self.model, recipe, device, dtype)
        self.reset(self.model)

    def reset(self, model: nn.Module) -> None:
        self.epoch = 0
        self.model.load_state_dict(model.state_dict())
        self.optimizer = make_sgd(self.model, self.recipe)

    def train_epoch(self, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch += 1
        return train_by_steps(self, draws, (self.epoch - 1) % self.recipe.epochs)

    def evaluate(self) -> torch.Tensor:
        return evaluate_by_batches(self.model, self.score, self.data, self.recipe.batch_size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


class Compiled(Resumable):
    """The same model under torch.compile, with the compiler's own kernels alone; in channels_last unless told."""

    name = "compiled"

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        own_model: OwnModel | None = None,
    ) -> None:
        self.recipe, self.device, self.dtype, self.memory_format = recipe, device, dtype, memory_format
        self.own_model = own_model
        self.data = normalized_tensors(dataset, device, dtype, memory_format)
        # The compiled code holds this model's tensors; each run copies its weights into them.
        self.model = make_model(recipe, dataset, device, dtype, own_model).to(memory_format=memory_format)
        # Whole, or where it is anybody's, in pieces with Python between them.
        self.score = compile_score(make_score(self.model, recipe, device, dtype), whole=own_model is None)
        self.reset(self.model)
        next(self.train_epoch(warm_up_draws(len(dataset.train_images), device)))
        self.evaluate()

    def reset(self, model: nn.Module) -> None:
        self.epoch = 0
        self.model.load_state_dict(model.state_dict())
        self.model.zero_grad()
        self.optimizer = make_sgd(self.model, self.recipe)

    def train_epoch(self, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch += 1
        return train_by_steps(self, draws, (self.epoch - 1) % self.recipe.epochs)

    def evaluate(self) -> torch.Tensor:
        return evaluate_by_batches(self.model, self.score, self.data, self.recipe.batch_size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


def train_by_steps(backend: Eager | Compiled, draws: Draws, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Train epoch number ``epoch``, from 0, with the host launching each step's operations."""
    recipe, data, size = backend.recipe, backend.data, backend.recipe.batch_size
    steps = len(draws) // size
    backend.model.train()
    for i in range(steps):
        for group in backend.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(epoch * steps + i + 1, steps)
        batch = draws.slice(i * size, (i + 1) * size)
        images = augment(data.train_images, batch, recipe, backend.memory_format)
        loss, correct = backend.score(images, data.train_labels[batch.permutation])
        backend.model.zero_grad()
        loss.sum().backward()
        backend.optimizer.step()
        yield loss.detach(), correct


@torch.no_grad()
def evaluate_by_batches(model: nn.Module, score: Score, data: Tensors, batch_size: int) -> torch.Tensor:
    """Whether ``model`` is right, for each test image, bool ``[N]``; the last batch may be short."""
    model.eval()
    batches = zip(data.test_images.split(batch_size), data.test_labels.split(batch_size))
    return torch.cat([score(images, labels)[1] for images, labels in batches])


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the weights of a step whose activations are of ``dtype``."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def make_model(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    dtype: torch.dtype,
    own_model: OwnModel | None = None,
    change: Callable[[CNN], nn.Module] = lambda model: model,
) -> nn.Module:
    """A model with throw-away weights, the recipe's changed by ``change``, its weights of the type that goes with
    ``dtype``.
    """
    arguments = (recipe, dataset.num_classes, torch.Generator())
    model = own_model(*arguments) if own_model else change(CNN(*arguments))
    return model.to(parameter_dtype(dtype)).to(device)


def make_score(model: nn.Module, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Score:
    """Forward pass and loss of ``model``, under autocast where ``dtype`` is bfloat16."""
    autocast = dtype == torch.bfloat16

    def score(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Without the cache of casts, which outlives a step where the caller is in an autocast block too.
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            return loss_and_correct(model(images), labels, recipe)

    return score


def compile_score(score: Scoring, whole: bool = True) -> Scoring:
    """``score`` under torch.compile; ``whole`` refuses what the compiler would leave to Python."""
    return cast(Scoring, torch.compile(fresh_code(score), dynamic=False, fullgraph=whole))


def fresh_code(function: Callable[..., Any]) -> Callable[..., Any]:
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


def normalized_tensors(
    dataset: Dataset, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensors:
    """``dataset`` on ``device``, its images normalized in ``dtype``, the test images in ``memory_format``."""
    train_images, test_images = normalize(dataset, device, dtype)
    train_labels, test_labels = (
        torch.from_numpy(labels).to(device) for labels in (dataset.train_labels, dataset.test_labels)
    )
    test_images = test_images.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    return Tensors(train_images, train_labels, test_images, test_labels)


def normalize(dataset: Dataset, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test images ``[N, 32, 32, 3]`` as ``dtype`` on ``device``, less the mean, over the deviation.

    Both are those of the training images' 0..255 values, per channel, the deviation with N - 1.
    """
    train, test = (torch.tensor(images, device=device) for images in (dataset.train_images, dataset.test_images))
    mean, std = channel_statistics(train)
    if not std.all():
        raise InputError(
            f"{dataset.source}: a channel of train_images has the same value everywhere; it cannot be normalized"
        )
    return ((train - mean) / std).to(dtype), ((test - mean) / std).to(dtype)


def channel_statistics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (with N - 1) of the bytes ``images`` ``[N, S, S, C]``, float32 ``[C]`` each."""
    std, mean = torch.std_mean(planar(images).float(), dim=(0, 1, 2), unbiased=True)
    return mean, std


def planar(images: torch.Tensor) -> torch.Tensor:
    """The same ``[N, S, S, C]``, NCHW in memory as torchvision's arrays: sums over it have the script's bits."""
    return images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` the current GPU meanwhile, where it is one: streams and graphs belong to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor instead of handing it back to the system.

    A CPU step frees and allocates its activations, hundreds of megabytes, and each fresh page costs a fault: measured
    at 15 to 30 % of a step. Only glibc has the call; elsewhere nothing happens. It holds for the whole process, whose
    memory then stays at its peak, so the commands call it and the library does not.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)

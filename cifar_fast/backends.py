"""Ways to run the recipe in plain torch: small objects with the same four methods.

``prepare(model)`` starts a run from the weights of a fresh model, ``train_epoch(epoch, draws)`` trains
a step at a time and gives what each picture cost, ``evaluate()`` scores the test pictures, and
``state_dict()`` gives the weights under the names of the plain model. Set-up that is worth keeping
is done once and serves every later ``prepare``. ``fused.py`` has one more.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
from collections.abc import Iterator

import torch

from cifar_fast.augment import Draws, augment
from cifar_fast.data import Dataset
from cifar_fast.errors import InputError
from cifar_fast.model import CNN, loss_and_correct
from cifar_fast.recipe import Recipe


class Eager:
    """The reference: the same operations on the same numbers in the same order, and in the same layout of memory.

    On CIFAR-10 the script's batches are NCHW in memory, ``torch.contiguous_format``; in channels_last
    other kernels give other last bits, and on a CPU take less time.

    float16 and float32 hold everything in that type, as the reference does: weights, batch norm,
    momentum. bfloat16, which has too few bits to add a small step to a weight, is the type of the
    activations and convolutions alone (autocast); weights and their updates are float32.
    """

    name = "eager"
    model: CNN | None = None

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        self.recipe, self.device, self.dtype, self.memory_format = recipe, device, dtype, memory_format
        self.autocast = dtype == torch.bfloat16
        self.train_labels = torch.from_numpy(dataset.train_labels).to(device)
        self.test_labels = torch.from_numpy(dataset.test_labels).to(device)
        self.train_images, self.test_images = self._load(dataset)
        self.score = self._score

    def prepare(self, model: CNN) -> None:
        """Start a run from the weights of ``model``."""
        self.model = model.to(torch.float32 if self.autocast else self.dtype).to(self.device)
        self._new_optimizer()

    def train_epoch(self, epoch: int, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Train epoch number ``epoch``, from 0, one step each time the next item is asked for.

        Gives the step's losses ``[batch_size]``, and 100 where a picture was right, 0 where not; they
        hold until the next epoch.
        """
        size, steps = self.recipe.batch_size, len(draws) // self.recipe.batch_size
        self.model.train()
        for i in range(steps):
            self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate(epoch * steps + i + 1, steps)
            batch = draws.slice(i * size, (i + 1) * size)
            images = augment(self.train_images, batch, self.recipe, self.memory_format)
            loss, correct = self.score(images, self.train_labels[batch.permutation])
            self.model.zero_grad()
            loss.sum().backward()
            self.optimizer.step()
            yield loss.detach(), correct

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """For each test picture, 100 where the model is right and 0 where it is not; holds until the next evaluation."""
        self.model.eval()
        size = self.recipe.batch_size
        batches = zip(self.test_images.split(size), self.test_labels.split(size))
        return torch.cat([self.score(images, labels)[1] for images, labels in batches])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def _load(self, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Training pictures ``[N, 32, 32, C]`` to gather from, and test pictures ``[N, C, 32, 32]``, on the device."""
        train_images, test_images = normalize(dataset, self.device, self.dtype)
        return train_images, test_images.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)

    def _score(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return loss_and_correct(self.model(images), labels, self.recipe)

    def _new_optimizer(self, lr: float | torch.Tensor = 0.0, fused: bool = False) -> None:
        recipe = self.recipe
        how = dict(momentum=recipe.momentum, weight_decay=recipe.weight_decay * recipe.batch_size, nesterov=True, fused=fused)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, **how)


class Compiled(Eager):
    """The same model under torch.compile, with the compiler's own kernels alone; in channels_last unless told."""

    name = "compiled"

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__(recipe, dataset, device, dtype, memory_format)
        torch.compiler.reset()  # graphs of an earlier instance would count against the limit of recompilations

    def prepare(self, model: CNN) -> None:
        if self.model is None:  # what is set up refers to this copy: it stays, and each run gives it new numbers
            super().prepare(copy.deepcopy(model).to(memory_format=self.memory_format))
            self.score = torch.compile(self._score, dynamic=False, fullgraph=True)
            self._warm_up()
        self._restart(model)

    def _warm_up(self) -> None:
        """Compile for each shape that a run meets."""
        size = self.recipe.batch_size
        self.model.train()
        first = torch.arange(size, device=self.device)
        still = Draws(first, torch.zeros_like(first), torch.ones_like(first), torch.zeros_like(first))
        images = augment(self.train_images, still, self.recipe, self.memory_format)
        self.score(images, self.train_labels[:size])[0].sum().backward()
        self.evaluate()

    def _restart(self, model: CNN) -> None:
        """Weights and statistics as in ``model``, and all else as before the first step."""
        self.model.load_state_dict(model.state_dict())
        self.model.zero_grad()
        self._new_optimizer()


def normalize(dataset: Dataset, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test pictures ``[N, 32, 32, 3]`` as ``dtype`` on ``device``, less the mean, over the standard deviation.

    Both are those of the training pictures' 0..255 values, a channel each, the deviation with N - 1.
    """
    train, test = (torch.tensor(images, device=device) for images in (dataset.train_images, dataset.test_images))
    std, mean = torch.std_mean(planar(train).float(), dim=(0, 1, 2), unbiased=True, keepdim=True)
    if not std.all():
        raise InputError(f"{dataset.source}: a colour channel of train_images has the same value everywhere; it cannot be normalised")
    return ((train - mean) / std).to(dtype), ((test - mean) / std).to(dtype)


def planar(images: torch.Tensor) -> torch.Tensor:
    """The same ``[N, S, S, C]``, NCHW in memory, as torchvision's arrays are: a sum over them has the script's order and bits."""
    return images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` the current GPU meanwhile, where it is one: streams and graphs belong to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor instead of handing it back to the system.

    A CPU step frees and allocates its activations, hundreds of megabytes, and each fresh page costs a
    fault: measured at 15 to 30 % of a step. Only glibc has the call; elsewhere nothing happens. It
    holds for the whole process, whose memory then stays at its peak.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)

"""The fused backend: our kernels, torch.compile for the rest, and on a GPU a whole step in one CUDA graph.

Everything that a step needs lies on the device: the data set as bytes, the epoch's draws, the learning
rate of each step of the run, and the number of the step. One call of ``_step`` reads that number,
trains on its batch, files the losses under it and leaves it one higher. It takes nothing from the
host and gives nothing back, so that it is captured once and an epoch is its draws and a replay a step.
Without a GPU, under Triton's interpreter, the same function is called instead of replayed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from cifar_fast.augment import Draws
from cifar_fast.backends import Compiled, normalize, planar
from cifar_fast.data import Dataset
from cifar_fast.model import CNN
from cifar_fast.recipe import Recipe
from kernels import BatchNormCELU2d, augment, normalization_table

CHANNELS = 8
"""Channels of a batch: three colours and zeros, so that a pixel in half precision is one 128-bit access, as tensor cores want it.

Not chosen by measurement yet: 3 and 4 are the others to try.
"""

WARM_UP = 3
"""Runs before a capture: the first compiles, and the others find cuDNN's choices and the allocator's memory in place."""


class Fused(Compiled):
    """The same network with fused kernels; weights and their names are those of the plain model."""

    name = "fused"

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__(recipe, dataset, device, dtype, memory_format)
        n, size = len(dataset.train_images), recipe.batch_size
        self.steps = n // size
        self.draws = Draws(*(torch.zeros(n, dtype=torch.int64, device=device) for _ in range(4)))
        rates = [recipe.learning_rate(step + 1, self.steps) for step in range(recipe.epochs * self.steps)]
        self.schedule = torch.tensor(rates, dtype=torch.float32, device=device)
        self.rate = torch.zeros(1, device=device)
        self.done = torch.zeros(1, dtype=torch.int64, device=device)  # steps of this run
        self.position = torch.zeros_like(self.done)  # the same, of this epoch
        self.losses = torch.zeros(self.steps, size, device=device)
        self.corrects = torch.zeros(self.steps, size, dtype=torch.int64, device=device)
        self.test_corrects = torch.zeros(len(dataset.test_images), dtype=torch.int64, device=device)

    def prepare(self, model: CNN) -> None:
        super().prepare(fuse(copy.deepcopy(model)))

    def train_epoch(self, epoch: int, draws: Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for ours, drawn in zip(vars(self.draws).values(), vars(draws).values()):
            ours.copy_(drawn)
        self.done.fill_(epoch * self.steps)
        for i in range(self.steps):
            self.run_step()
            yield self.losses[i], self.corrects[i]

    def evaluate(self) -> torch.Tensor:
        self.run_evaluation()
        return self.test_corrects

    def _step(self) -> None:
        recipe = self.recipe
        self.model.train()
        torch.remainder(self.done, self.steps, out=self.position)
        torch.index_select(self.schedule, 0, self.done, out=self.rate)
        images, labels = augment(
            self.train_images,
            *vars(self.draws).values(),
            self.table,
            labels=self.train_labels,
            step=self.position,
            batch_size=recipe.batch_size,
            out_channels=CHANNELS,
            padding=recipe.crop_padding,
            cutout_size=recipe.cutout_size,
        )
        loss, correct = self.score(images, labels)
        self.model.zero_grad()
        loss.sum().backward()
        self.optimizer.step()
        self.losses.index_copy_(0, self.position, loss.detach().float()[None])
        self.corrects.index_copy_(0, self.position, correct[None])
        self.done.add_(1)

    def _evaluate(self) -> None:
        self.test_corrects.copy_(super().evaluate())

    def _load(self, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """The training pictures as they are, which :func:`kernels.augment` normalises, and the test pictures normalised."""
        test_images = normalize(dataset, self.device, self.dtype)[1]
        train_images = torch.from_numpy(dataset.train_images).to(self.device)
        self.table = normalization_table(planar(train_images), self.dtype)
        return train_images, F.pad(test_images, (0, CHANNELS - test_images.shape[3])).permute(0, 3, 1, 2)

    def _new_optimizer(self) -> None:
        on_gpu = self.device.type == "cuda"  # on a CPU torch 2.11's fused SGD is wrong in half precision
        super()._new_optimizer(self.rate, fused=on_gpu)
        for parameter in self.model.parameters():  # zeros are what the first step would make of having none
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _warm_up(self) -> None:
        torch.arange(len(self.draws), out=self.draws.permutation)
        self.run_step, self.run_evaluation = self._captured(self._step), self._captured(self._evaluate)

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """``function``, run until nothing in it is left to compile or choose; on a GPU the replay of its graph."""
        if self.device.type == "cpu":
            function()
            return function
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with fastest_deterministic_convolutions():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.done.zero_()  # a run may have fewer steps
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                function()
        return graph.replay

    def _restart(self, model: CNN) -> None:
        self.model.load_state_dict(model.state_dict())
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.done.zero_()


def fuse(model: CNN) -> CNN:
    """``model`` with each (max-pool,) batch norm and CELU as one operator, for pictures with channels of zeros appended.

    Changes ``model`` and gives it back. Modules keep their places, and so the state dict its names.
    """
    layers = list(model.seq)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            pool, celu = layers[i - 1], layers[i + 1]
            pooled = isinstance(pool, nn.MaxPool2d)
            fused = BatchNormCELU2d(layer.num_features, layer.eps, layer.momentum, alpha=celu.alpha, pool=pool.kernel_size if pooled else 1)
            fused.load_state_dict(layer.state_dict())
            model.seq[i], model.seq[i + 1] = fused, nn.Identity()
            if pooled:
                model.seq[i - 1] = nn.Identity()
    first = layers[0]
    how = dict(kernel_size=first.kernel_size, padding=first.padding, bias=False)
    model.seq[0] = skip_init(PaddedConv2d, first.in_channels, first.out_channels, **how)  # fresh weights would draw random numbers
    model.seq[0].load_state_dict(first.state_dict())
    return model


class PaddedConv2d(nn.Conv2d):
    """A convolution whose input may have channels of zeros after its ``in_channels``; the weight has none for them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, x.shape[1] - self.in_channels))
        return self._conv_forward(x, weight, self.bias)


@contextlib.contextmanager
def fastest_deterministic_convolutions() -> Iterator[None]:
    """Have cuDNN time the algorithms that give the same bits each time, and take the fastest for each shape."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark = cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before

"""Replays of the fused backend's step and evaluation, without a GPU.

``Recording`` records every operator below autograd once and replays it on the same memory, as a CUDA graph does. None
of our Python runs in a replay. A value that the host computes, or a tensor that is allocated anew, gives other results.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cifar_fast.backends.fused
from cifar_fast import CNN, Recipe
from cifar_fast.backends.fused import Fused, fastest_deterministic_convolutions
from cifar_fast.backends.optimizers import make_optimizer
from cifar_fast.data.augment import draw_epoch
from cifar_fast.data.tensors import device_data
from cifar_fast.kernels.launch import interpreted
from cifar_fast.utils.seeds import make_generators
from tests.helpers import small_dataset

interpreter = pytest.mark.skipif(not interpreted(), reason="on a GPU the graph itself is replayed")

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=3, batch_size=4, widths=(4, 8, 8, 16))


class Recording(TorchDispatchMode):
    """The operators that ``function`` calls, with the method ``replay`` of a ``torch.cuda.CUDAGraph``."""

    def __init__(self, function):
        super().__init__()
        self.calls = []
        with self:
            function()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, out in self.calls:
            for there, fresh in zip(tree_leaves(out), tree_leaves(operator(*args, **kwargs))):
                if isinstance(there, torch.Tensor) and there.data_ptr() != fresh.data_ptr():
                    there.copy_(fresh)


def make(dataset, device=CPU, dtype=torch.float32):
    return Fused(RECIPE, device_data(dataset, device), device, dtype, torch.channels_last)


def runs(backend, dataset, seeds=(0, 1)):
    """Return losses, counters, weights and momentum after each epoch of a run per seed."""
    seen = []
    for seed in seeds:
        weights, generator = make_generators(seed, backend.device)
        backend.reset(CNN(RECIPE, dataset.num_classes, weights))
        for _ in range(RECIPE.epochs):
            draws = draw_epoch(len(dataset.train_images), device=backend.device, recipe=RECIPE, generator=generator)
            for loss, correct in backend.train_epoch(draws):
                seen += [loss.clone(), correct.clone()]
            seen += [backend.evaluate()[1].clone(), backend.state.lr.clone(), backend.state.global_step.clone()]
            seen += [tensor.clone() for tensor in backend.state_dict().values()]
            seen += [state["momentum_buffer"].clone() for state in backend.optimizer.state.values()]
    return seen


@pytest.fixture
def fused_sgd(monkeypatch, uncompiled, few_programs):
    """Use the optimizer of a GPU, which reads the learning rate from the device. The CPU's reads it on the host."""
    monkeypatch.setattr(
        cifar_fast.backends.fused,
        "make_optimizer",
        lambda *what, fused, **how: make_optimizer(*what, fused=True, **how),
    )


def recorded(dataset):
    backend = make(dataset)
    backend.seek(0)
    backend.step_graphs, backend.evaluation_graph = {True: Recording(backend.train_step)}, Recording(backend.eval_step)
    return backend


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@interpreter
@pytest.mark.slow  # the interpreter
def test_replayed_runs_equal_called_runs_bit_for_bit(fused_sgd):
    dataset = small_dataset(train=10, test=7)
    called = runs(make(dataset), dataset)
    assert same(runs(recorded(dataset), dataset), called)
    assert len({loss.sum().item() for loss in called if loss.shape == (4,) and loss.is_floating_point()}) > 10


@interpreter
@pytest.mark.nightly  # the interpreter
@pytest.mark.parametrize("mistake", ["learning rate read on the host", "batch taken twice"])
def test_replays_of_a_wrong_step_differ_from_its_calls(fused_sgd, monkeypatch, mistake):
    dataset, step = small_dataset(train=10, test=7), Fused.train_step

    def broken(self):
        if mistake == "learning rate read on the host":
            self.optimizer.param_groups[0]["lr"] = torch.tensor([self.state.lr.item()])
            step(self)
        else:
            step(self)
            self.state.epoch_step.copy_(torch.tensor([self.state.epoch_step.item() * 0]))

    called = runs(make(dataset), dataset, seeds=(0,))
    monkeypatch.setattr(Fused, "train_step", broken)
    assert not same(runs(recorded(dataset), dataset, seeds=(0,)), called)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_replayed_graphs_equal_called_runs_bit_for_bit(dtype):
    dataset, device = small_dataset(train=10, test=7), torch.device("cuda", 0)
    replayed, called = make(dataset, device, dtype), make(dataset, device, dtype)
    called.step_graphs, called.evaluation_graph = {True: None}, None
    with fastest_deterministic_convolutions():
        assert same(runs(replayed, dataset), runs(called, dataset))

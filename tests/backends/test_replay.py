"""What a CUDA graph does, without a GPU: the step and the evaluation are recorded once, operator by operator, below
autograd, and then replayed on the same memory while none of our Python runs.

What a replay could not see, a number of the host's or a tensor made anew, shows as another result.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cifar_fast.backends.fused
from cifar_fast import CNN, Recipe
from cifar_fast.backends.base import make_sgd
from cifar_fast.backends.fused import Fused, fastest_deterministic_convolutions
from cifar_fast.data.augment import draw_epoch
from cifar_fast.data.tensors import device_data
from cifar_fast.kernels.launch import interpreted
from cifar_fast.utils.seeds import make_generators
from tests.helpers import small_dataset

interpreter = pytest.mark.skipif(not interpreted(), reason="on a GPU the graph itself is replayed")

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=3, batch_size=4, widths=(4, 8, 8, 16))


class Recording(TorchDispatchMode):
    """Stands in for a ``torch.cuda.CUDAGraph``: what ``function`` calls, and a ``replay`` of it."""

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
    """Everything that runs of three epochs leave behind, an epoch at a time."""
    seen = []
    for seed in seeds:
        weights, generator = make_generators(seed, backend.device)
        backend.reset(CNN(RECIPE, dataset.num_classes, weights))
        for _ in range(RECIPE.epochs):
            draws = draw_epoch(len(dataset.train_images), device=backend.device, recipe=RECIPE, generator=generator)
            for loss, correct in backend.train_epoch(draws):
                seen += [loss.clone(), correct.clone()]
            seen += [backend.evaluate().clone(), backend.lr.clone(), backend.global_step.clone()]
            seen += [tensor.clone() for tensor in backend.state_dict().values()]
            seen += [state["momentum_buffer"].clone() for state in backend.optimizer.state.values()]
    return seen


@pytest.fixture
def fused_sgd(monkeypatch, uncompiled, few_programs):
    """The optimizer of a GPU, which reads its rate from the device: the CPU's plain one asks for a number."""
    monkeypatch.setattr(
        cifar_fast.backends.fused, "make_sgd", lambda *what, fused, **how: make_sgd(*what, fused=True, **how)
    )


def recorded(dataset):
    backend = make(dataset)
    backend.seek(0)
    backend.step_graph, backend.evaluation_graph = Recording(backend.train_step), Recording(backend.eval_step)
    return backend


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@interpreter
@pytest.mark.slow  # the interpreter
def test_replays_of_two_runs_are_the_calls_bit_for_bit(fused_sgd):
    dataset = small_dataset(train=10, test=7)
    called = runs(make(dataset), dataset)
    assert same(runs(recorded(dataset), dataset), called)
    assert len({loss.sum().item() for loss in called if loss.shape == (4,) and loss.is_floating_point()}) > 10


@pytest.mark.nightly  # the interpreter
@interpreter
@pytest.mark.parametrize("mistake", ["the rate is the host's", "a batch is taken twice"])
def test_a_step_that_a_replay_cannot_repeat_is_told(fused_sgd, monkeypatch, mistake):
    dataset, step = small_dataset(train=10, test=7), Fused.train_step

    def broken(self):
        if mistake == "the rate is the host's":
            self.optimizer.param_groups[0]["lr"] = torch.tensor([self.lr.item()])
            step(self)
        else:
            step(self)
            self.epoch_step.copy_(torch.tensor([self.epoch_step.item() * 0]))

    called = runs(make(dataset), dataset, seeds=(0,))
    monkeypatch.setattr(Fused, "train_step", broken)
    assert not same(runs(recorded(dataset), dataset, seeds=(0,)), called)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_replays_of_the_graph_of_two_runs_are_the_calls_bit_for_bit(dtype):
    dataset, device = small_dataset(train=10, test=7), torch.device("cuda", 0)
    replayed, called = make(dataset, device, dtype), make(dataset, device, dtype)
    called.step_graph = called.evaluation_graph = None
    with fastest_deterministic_convolutions():
        assert same(runs(replayed, dataset), runs(called, dataset))

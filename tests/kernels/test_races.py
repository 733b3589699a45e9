"""Race conditions: the interpreter runs the programs of a launch in order, so these tests change the order."""

import numpy as np
import pytest
import torch

from cifar_fast import draw_epoch
from cifar_fast.kernels import augment, batch_norm_act, normalization_table
from cifar_fast.kernels.launch import interpreted
from tests.kernels.test_batch_norm_act import everything, make

pytestmark = pytest.mark.skipif(not interpreted(), reason="changes the order of the interpreter")


def run_programs_in(monkeypatch, order):
    """Make the interpreter run the programs of each launch in another order: ``order(n)`` permutes range(n)."""
    from triton.runtime.interpreter import interpreter_builder

    real = interpreter_builder.set_grid_idx

    def set_grid_idx(x, y, z):
        sizes = interpreter_builder.grid_dim
        real(*(int(order(size)[index]) for size, index in zip(sizes, (x, y, z))))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)


ORDERS = {
    "backwards": lambda n: np.arange(n)[::-1],
    "shuffled": lambda n: np.random.RandomState(n).permutation(n),
}


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pool", [1, 2])
def test_norm_does_not_depend_on_the_order_of_programs(order, pool, monkeypatch, small_blocks):
    """A program that reads or writes what another program of its launch writes would change the result."""
    tensors = make((3, 12, 6, 5), torch.float32)
    expected = everything(batch_norm_act, tensors, training=True, pool=pool)
    run_programs_in(monkeypatch, ORDERS[order])
    result = everything(batch_norm_act, tensors, training=True, pool=pool)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("order", ORDERS)
def test_augmentation_does_not_depend_on_the_order_of_programs(order, monkeypatch):
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    draws = draw_epoch(20, device="cpu")
    table, labels = normalization_table(images, torch.float32), torch.arange(20)

    def batch():
        return augment(images, draws.tensor, table, labels=labels, padding=4, cutout_size=8)

    expected, expected_labels = batch()
    run_programs_in(monkeypatch, ORDERS[order])
    result, result_labels = batch()
    assert torch.equal(result, expected) and torch.equal(result_labels, expected_labels)


def test_the_order_of_programs_changes(monkeypatch):
    """A launch with a race gives another result, so the tests above can fail."""
    import triton
    import triton.language as tl

    @triton.jit
    def chain(values):
        i = tl.program_id(0)
        tl.store(values + i + 1, tl.load(values + i) + 1.0)

    forward, backward = torch.zeros(5), torch.zeros(5)
    chain[(4,)](forward)
    run_programs_in(monkeypatch, ORDERS["backwards"])
    chain[(4,)](backward)
    assert forward.tolist() == [0, 1, 2, 3, 4]
    assert backward.tolist() == [0, 1, 1, 1, 1]

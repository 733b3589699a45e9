"""The interpreter runs programs one after another, so that a race never shows. What one would need is tested instead."""

import numpy as np
import pytest
import torch

import kernels.launch
from cifar_fast import draw_epoch
from kernels import augment, normalization_table
from tests.test_kernels_batch_norm_celu import batch_norm_celu, everything, make

pytestmark = pytest.mark.skipif(not kernels.launch.interpreted(), reason="rearranges what the interpreter does")


def rearranged(monkeypatch, order):
    """Have the interpreter run the programs of each launch in another order: ``order(n)`` permutes range(n)."""
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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pool", [1, 2])
def test_norm_does_not_depend_on_the_order_of_programs(order, pool, monkeypatch, small_blocks):
    """A program that read what another of its launch writes, or wrote where another does, would show."""
    tensors = make((3, 20, 6, 7), torch.float32)
    expected = everything(batch_norm_celu, tensors, training=True, pool=pool)
    rearranged(monkeypatch, ORDERS[order])
    result = everything(batch_norm_celu, tensors, training=True, pool=pool)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("order", ORDERS)
def test_augmentation_does_not_depend_on_the_order_of_programs(order, monkeypatch):
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    draws = draw_epoch(20, device="cpu")
    arguments = (images, draws.permutation, draws.crop, draws.flip, draws.cutout, normalization_table(images, torch.float32))
    expected, labels = augment(*arguments, labels=torch.arange(20))
    rearranged(monkeypatch, ORDERS[order])
    result, result_labels = augment(*arguments, labels=torch.arange(20))
    assert torch.equal(result, expected) and torch.equal(result_labels, labels)


def test_the_order_is_really_another(monkeypatch):
    """A launch in which each program adds to what the one before it wrote changes with the order: the tests above can fail."""
    import triton
    import triton.language as tl

    @triton.jit
    def chain(values):
        i = tl.program_id(0)
        tl.store(values + i + 1, tl.load(values + i) + 1.0)

    forward, backward = torch.zeros(5), torch.zeros(5)
    chain[(4,)](forward)
    rearranged(monkeypatch, ORDERS["backwards"])
    chain[(4,)](backward)
    assert forward.tolist() == [0, 1, 2, 3, 4]
    assert backward.tolist() == [0, 1, 1, 1, 1]

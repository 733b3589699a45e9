"""What may be timed: every case by every implementation passes its check, and what is wrong does not."""

import math

import pytest
import torch

from benchmarks.parts import measure_kernel
from cifar_fast import Recipe
from cifar_fast.diagnostics.kernel_cases import (
    DIRECTIONS,
    Augmentation,
    Norm,
    Wrong,
    check,
    check_replay,
    input_sets,
    kernel_cases,
    moved,
)
from cifar_fast.recipe import Block
from tests.helpers import DEVICE

SMALL = Recipe(batch_size=6, widths=(4, 8, 8))


def case(name, dtype=torch.float32, direction="forward"):
    """A small case of a name: augmentation, norm or pool."""
    if name == "augmentation":
        return Augmentation(SMALL, dtype, out_channels=4, images=20)
    return Norm(Block(2, 3, 4, 6, 2 if name == "pool" else 1), 5, 0.075, dtype, direction)


ALL = ["augmentation", *((name, direction) for name in ("norm", "pool") for direction in DIRECTIONS)]


def made(which, dtype=torch.float32):
    return case(which, dtype) if isinstance(which, str) else case(which[0], dtype, which[1])


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("which", ALL, ids=str)
@pytest.mark.parametrize(
    ("implementation", "dtype"), [("fused", torch.float32), ("fused", torch.float16), ("eager", torch.float32)], ids=str
)
def test_results_pass_the_check(which, implementation, dtype, few_programs):
    one = made(which, dtype)
    sets = one.inputs(2, DEVICE)
    calls = one.calls(implementation, sets)
    for call, given in zip(calls, sets):
        for _ in range(2):  # a backward pass can be called again
            check(one, call(), one.truth(given))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["augmentation", ("pool", "forward"), ("pool", "backward")], ids=str)
def test_compiled_results_pass_the_check(which):
    one = made(which)
    sets = one.inputs(1, DEVICE)
    for _ in range(2):
        check(one, one.calls("compiled", sets)[0](), one.truth(sets[0]))


@pytest.mark.parametrize("which", ["augmentation", ("norm", "backward")], ids=str)
@pytest.mark.parametrize("wrong", [1e3, math.nan])
def test_a_single_wrong_value_in_any_output_is_refused(which, wrong, few_programs):
    one = made(which)
    sets = one.inputs(1, DEVICE)
    expected = one.truth(sets[0])
    for name in expected:
        outputs = one.calls("eager", sets)[0]()
        outputs[name] = outputs[name].detach().clone()
        outputs[name][(0,) * outputs[name].dim()] = wrong if outputs[name].is_floating_point() else 77
        with pytest.raises(Wrong, match=f"{name} is off by"):
            check(one, outputs, expected)


def test_a_wrong_shape_type_or_number_of_outputs_is_refused():
    one = made("norm", torch.float16)
    sets = one.inputs(1, DEVICE)
    expected, (call,) = one.truth(sets[0]), one.calls("eager", sets)
    for outputs, words in (
        ({}, "gave  and not y"),
        ({"y": call()["y"][1:]}, "y has the shape"),
        ({"y": call()["y"].float()}, "y is torch.float32 and not torch.float16"),
    ):
        with pytest.raises(Wrong, match=words):
            check(one, outputs, expected)


def test_a_replay_that_writes_nothing_is_refused():
    one = made("norm")
    sets = one.inputs(1, DEVICE)
    (call,) = one.calls("eager", sets)
    outputs, expected = {name: tensor.detach() for name, tensor in call().items()}, one.truth(sets[0])
    check_replay(one, lambda: outputs["y"].copy_(call()["y"]), outputs, expected)
    with pytest.raises(Wrong, match="y is off by nan"):
        check_replay(one, lambda: None, outputs, expected)


def test_input_sets_and_what_is_computed_of_them_share_no_memory(few_programs):
    one = made(("pool", "backward"))
    sets = one.inputs(2, DEVICE)
    tensors = [tensor for given in sets for tensor in given.values()]
    tensors += [tensor for call in one.calls("fused", sets) for tensor in call().values()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_every_norm_of_the_recipe_is_a_case():
    names = [one.name for one in kernel_cases(Recipe(), torch.float16)]
    assert len(set(names)) == len(names) == 3 + 6 * 3
    assert {"augment to 8 channels, forward", "128x32x32, pool, backward", "512x4x4, inference"} <= set(names)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("pool", [1, 2])
def test_our_kernels_read_and_write_large_tensors_once_a_pass(direction, pool):
    one = Norm(Block(1, 3, 64, 16, pool), 64, 0.075, torch.float16, direction)
    x = 64 * 64 * 16 * 16 * 2
    p, argmax = x // pool**2, (pool - 1) * x // 8
    once = {
        "forward": x + p + p + (pool - 1) * p + argmax,
        "backward": 4 * p + x + argmax,
        "inference": x + p,
    }[direction]
    assert once <= moved(one.launches()) <= 1.1 * once


def test_input_sets_touch_more_than_twice_the_cache_before_one_comes_again():
    one = made("norm")
    assert input_sets(one, moved(one.launches()) * 3) == 7


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["fused", "compiled", "eager"])
def test_a_case_is_measured(implementation):
    (one,) = (c for c in kernel_cases(Recipe(batch_size=64), torch.float16) if c.name == "512x4x4, backward")
    rows = {row.metric: row for row in measure_kernel(one, implementation)}
    assert rows["in a loop"].median > 0 and rows["our bytes"].median > 0

"""The cases of the kernels: every implementation of every case passes the check, and wrong results do not."""

import math

import pytest
import torch

from benchmarks import parts
from benchmarks.parts import measure_kernel, measure_on_cpu
from cifar_fast import Recipe
from cifar_fast.diagnostics import kernel_cases as definitions
from cifar_fast.diagnostics.kernel_cases import (
    DIRECTIONS,
    Augmentation,
    Head,
    Norm,
    WrongResult,
    bytes_moved,
    check,
    check_kernel,
    check_replay,
    cpu_cases,
    input_sets,
    kernel_cases,
)
from cifar_fast.recipe import Block
from tests.helpers import DEVICE

SMALL = Recipe(batch_size=6, widths=(4, 8, 8))


def make_case(name, dtype=torch.float32, direction="forward", **options):
    """Return a small case: augmentation, head, norm or pool."""
    if name == "head":
        return Head(SMALL, dtype)
    if name == "augmentation":
        return Augmentation(SMALL, dtype, out_channels=4, images=20)
    return Norm(Block(2, 3, 4, 6, 2 if name == "pool" else 1), 5, 0.075, dtype, direction, **options)


NORMS = [(name, direction) for name in ("norm", "pool") for direction in DIRECTIONS]
names = pytest.mark.parametrize(("name", "direction"), [("augmentation", "forward"), ("head", "forward"), *NORMS])


@pytest.mark.slow  # the interpreter
@names
@pytest.mark.parametrize(
    ("implementation", "dtype"), [("fused", torch.float32), ("fused", torch.float16), ("eager", torch.float32)], ids=str
)
def test_results_pass_the_check(name, direction, implementation, dtype, few_programs):
    case = make_case(name, dtype, direction)
    for given in (case.inputs(DEVICE) for _ in range(2)):
        call = case.call(implementation, given)
        for _ in range(2):  # a backward pass can be called again
            check(call(), case.expected(given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "direction"), [("augmentation", "forward"), ("pool", "forward"), ("pool", "backward")]
)
def test_compiled_results_pass_the_check(name, direction):
    case = make_case(name, direction=direction)
    for _ in range(2):
        given = case.inputs(DEVICE)
        check(case.call("compiled", given)(), case.expected(given))


@names
@pytest.mark.parametrize("wrong", [1e3, math.nan])
def test_a_single_wrong_value_in_any_output_is_refused(name, direction, wrong):
    case = make_case(
        name, direction=direction, **{"statistics": True} if (name, direction) == ("norm", "forward") else {}
    )
    given = case.inputs(DEVICE)
    expected = case.expected(given)
    for output in expected.eager[0]:
        outputs = {name: tensor.detach().clone() for name, tensor in case.call("eager", given)().items()}
        first = outputs[output][(0,) * outputs[output].dim()]
        first.fill_(wrong if first.is_floating_point() else not first if first.dtype == torch.bool else 77)
        with pytest.raises(WrongResult, match=f"{output} (is off by|is finite|differs)"):
            check(outputs, expected)


def test_a_wrong_shape_dtype_or_number_of_outputs_is_refused():
    case = make_case("norm", torch.float16)
    given = case.inputs(DEVICE)
    expected, call = case.expected(given), case.call("eager", given)
    for outputs, words in (
        ({}, "gave  and not y"),
        ({"y": call()["y"][1:]}, "y has the shape"),
        ({"y": call()["y"].float()}, "y is torch.float32 and not torch.float16"),
    ):
        with pytest.raises(WrongResult, match=words):
            check(outputs, expected)


def test_a_replay_that_writes_nothing_is_refused():
    case = make_case("norm")
    given = case.inputs(DEVICE)
    call = case.call("eager", given)
    outputs, expected = {name: tensor.detach() for name, tensor in call().items()}, case.expected(given)
    check_replay(lambda: outputs["y"].copy_(call()["y"]), outputs, expected)
    with pytest.raises(WrongResult, match="y is finite where the exact result is not, or not finite where it is"):
        check_replay(lambda: None, outputs, expected)


def test_input_sets_and_outputs_share_no_memory(few_programs):
    case = make_case("pool", direction="backward")
    sets = [case.inputs(DEVICE) for _ in range(2)]
    tensors = [tensor for given in sets for tensor in given.values()]
    tensors += [tensor for given in sets for tensor in case.call("fused", given)().values()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_check_of_a_kernel_keeps_the_random_state(few_programs):
    before = torch.get_rng_state()
    assert check_kernel(make_case("augmentation"), DEVICE) == "bit for bit as plain torch"
    assert torch.equal(torch.get_rng_state(), before)


def test_every_norm_of_the_recipe_is_a_case():
    names = [case.name for case in kernel_cases(Recipe(), torch.float16)]
    assert len(set(names)) == len(names) == 3 + 6 * 3
    assert {"augment to 8 channels, forward", "128x32x32, pool, backward", "512x4x4, inference"} <= set(names)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("pool", [1, 2])
def test_our_kernels_read_and_write_large_tensors_once_a_pass(direction, pool):
    case = Norm(Block(1, 3, 64, 16, pool), 64, 0.075, torch.float16, direction)
    x = 64 * 64 * 16 * 16 * 2
    p, argmax = x // pool**2, (pool - 1) * x // 8
    once = {
        "forward": x + p + p + (pool - 1) * p + argmax,
        "backward": 4 * p + x + argmax,
        "inference": x + p,
    }[direction]
    assert once <= bytes_moved(case.launches()) <= 1.1 * once


def test_input_sets_access_more_than_twice_the_cache_before_one_is_used_again():
    case = make_case("norm")
    assert input_sets(case, bytes_moved(case.launches()) * 3) == 7


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["fused", "compiled", "eager"])
def test_a_case_is_measured(implementation):
    (case,) = (one for one in kernel_cases(Recipe(batch_size=64), torch.float16) if one.name == "512x4x4, backward")
    rows = {row.metric: row for row in measure_kernel(case, implementation)}
    assert rows["in a loop"].median > 0 and rows["our bytes"].median > 0


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the test's tensors are on a GPU")
@pytest.mark.parametrize(
    ("name", "direction"), [("augmentation", "forward"), ("pool", "forward"), ("pool", "backward")]
)
def test_sides_take_turns_on_a_cpu_and_give_rates(name, direction, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(parts.COPY_BYTES, "cpu", 2**16)
    case = make_case(name, torch.bfloat16, direction)
    rows = {(row.side, row.metric): row for row in measure_on_cpu(case, ["fused", "eager"], copy_rate=2e9)}
    for side in ("fused", "eager"):
        microseconds, rates, shares = (
            rows[side, metric].values for metric in ("in a loop", "our bytes", "of a copy's rate")
        )
        assert len(microseconds) == parts.CPU_ROUNDS
        moved = bytes_moved(case.launches())
        assert rates == pytest.approx([moved / time / 1e3 for time in microseconds])  # B / us / 1e3 = GB/s
        assert shares == pytest.approx([100 * rate / 2 for rate in rates])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the test's tensors are on a GPU")
def test_a_wrong_operator_is_not_timed_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(parts.COPY_BYTES, "cpu", 2**10)
    case = make_case("norm", direction="backward")
    right = definitions.batch_norm_act

    def doubled(*tensors, **settings):
        return 2 * right(*tensors, **settings)

    monkeypatch.setattr(definitions, "batch_norm_act", doubled)
    rows = measure_on_cpu(case, ["fused", "eager"], copy_rate=1e9)
    assert rows[0].side == "fused" and rows[0].metric.startswith("wrong: dx is off by") and not rows[0].values
    assert [row.side for row in rows[1:]] == ["eager"] * 3


def test_every_norm_of_the_recipe_is_a_case_on_a_cpu():
    names = [case.name for case in cpu_cases(Recipe(), torch.float32)]
    assert len(set(names)) == len(names) == 1 + 6 * 3 and "augment to 3 channels, forward" in names

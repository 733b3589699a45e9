"""The cost and minimum time of a training step, compared with the model, torch's count of FLOP and our kernels."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from cifar_fast import CNN, Recipe
from cifar_fast.diagnostics.roofline import Pass, layer_costs, roofline_times
from cifar_fast.kernels.batch_norm_act import example_launches

RECIPE = Recipe()
SMALL = [
    Recipe(batch_size=2, widths=(4, 8, 8, 16)),
    Recipe(batch_size=3, widths=(6, 5)),  # the first layer has a pool
    Recipe(batch_size=2, widths=(6, 12, 24, 48, 96)),  # the head has nothing to pool
    Recipe(batch_size=2, widths=(7,)),
]
every_small = pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: str(recipe.widths))


def total(costs, what, kind="", name=""):
    return sum(getattr(cost, what) for cost in costs if cost.layer.startswith(kind) and cost.name.startswith(name))


def test_size_and_cost_of_the_reference():
    costs = layer_costs(RECIPE, 10, torch.float16)
    assert [total(costs, "parameters", kind) for kind in ("conv", "norm", "head")] == [6_563_520, 4_480, 5_120]
    assert total(costs, "flop", name="forward") / 512 == pytest.approx(2 * 379e6, rel=1e-3)
    assert total(costs, "flop") / 512 == pytest.approx(2.27e9, rel=1e-3)
    assert total(costs, "flop") * 24 * 97 == pytest.approx(2.71e15, rel=1e-3)


@every_small
@pytest.mark.parametrize("classes", [2, 100])
def test_parameters_equal_the_models(recipe, classes):
    counted = sum(parameter.numel() for parameter in CNN(recipe, classes).parameters())
    assert total(layer_costs(recipe, classes, torch.float16), "parameters") == counted


@every_small
def test_flop_equal_torchs_count(recipe):
    model, costs = CNN(recipe, 10), layer_costs(recipe, 10, torch.float32)
    with FlopCounterMode(display=False) as forward:
        logits = model(torch.randn(recipe.batch_size, 3, 32, 32))
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert total(costs, "flop", name="forward") == forward.get_total_flops()
    assert total(costs, "flop") - total(costs, "flop", name="forward") == backward.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", [RECIPE, *SMALL], ids=lambda recipe: str(recipe.widths))
def test_bytes_of_norms_equal_our_kernels_except_values_per_channel(recipe, dtype):
    costs = layer_costs(recipe, 10, dtype)
    for block in recipe.blocks():
        for direction in ("forward", "backward"):
            launches = example_launches(
                (recipe.batch_size, block.c_out, block.size, block.size),
                pool=block.pool,
                dtype=dtype,
                parameter_dtype=dtype,
                alpha=recipe.celu_alpha,
                direction=direction,
            )
            large = ("x", "dy", "pooled", "argmax", "y", "dx")
            moved = [
                tensor.numel() * tensor.element_size()
                for launch in launches
                for name, tensor in (launch.reads | launch.writes).items()
                if name in large and tensor is not None
            ]
            assert total(costs, "bytes", f"norm{block.index} ", direction) == sum(moved)


def test_floor_of_a_pass_is_the_longer_of_arithmetic_and_memory():
    costs = [Pass("conv", "forward", flop=1000, bytes=100), Pass("norm", "forward", flop=0, bytes=800)]
    times = roofline_times(costs, bandwidth=100, flops=200)
    assert times == dict(arithmetic=5, memory=9, overlapped=13, no_overlap=14)


def test_command_lists_every_pass_and_says_that_nothing_was_timed(capsys):
    assert main(["floors", "--bandwidth", "4.3e12", "--flops", "790e12"]) == 0
    shown = capsys.readouterr().out
    assert "nothing of the recipe is timed" in shown and "conv8 512->512 4x4" in shown
    assert "run of 2328 steps" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("floors --bandwidth fast", "must be a number above 0, not fast"),
        ("floors --flops -1", "must be a number above 0, not -1"),
        ("tune", "tuning needs a CUDA GPU"),
        ("compile", "TRITON_INTERPRET is set"),
        ("run", "--output"),
        ("run --output x --only peers", "--only: invalid choice: 'peers' (choose from"),
        ("run --output x --reference-script none.py", "--reference-script none.py: no such file"),
        ("run --output x --minutes 0", "must be a number above 0, not 0"),
        ("nothing", "invalid choice: 'nothing'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
def test_bad_input_is_one_line_and_exit_code_2(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())

"""The CPU part: what it refuses to time, and that both front ends run on CIFAR-10 as it is published."""

import pytest

from benchmarks.parts import CPU_SIDES, Wrong, check_backend, cpu_calls, cpu_side
from cifar_fast import Recipe, load_dataset
from cifar_fast.backends.select import build_backend, resolve_backend
from cifar_fast.data.tensors import device_data
from tests.helpers import NARROW, small_dataset

RECIPE = Recipe(batch_size=8, widths=NARROW)


def backend(dataset, recipe=RECIPE, dtype="float32", memory_format="auto"):
    plan = resolve_backend("eager", "cpu", dtype, memory_format)
    return build_backend(plan, recipe, device_data(dataset, plan.device))[0]


@pytest.mark.parametrize("side", CPU_SIDES[:-1])
def test_each_side_gives_seconds(tmp_path, side):
    small_dataset(40, 8, 10).save(tmp_path / "x.npz")
    seconds = cpu_side(RECIPE, tmp_path / "x.npz", side)
    assert set(seconds) == {"step", "augmentation of an epoch"} and min(seconds.values()) > 0


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [("float32", "contiguous_format"), ("float32", "channels_last"), ("bfloat16", "channels_last")],
)
def test_a_backend_that_trains_the_recipe_passes(small, dtype, memory_format):
    check_backend(backend(small, dtype=dtype, memory_format=memory_format), small)


def test_a_backend_with_other_images_is_refused(small):
    other = backend(small)
    other.train_images[0, 0, 0, 0] += 1
    with pytest.raises(Wrong, match="batches are not the reference's"):
        check_backend(other, small)


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_a_backend_with_another_network_is_refused(small, memory_format):
    other = backend(small, Recipe(batch_size=8, widths=NARROW, celu_alpha=0.1), memory_format=memory_format)
    with pytest.raises(Wrong, match="first losses are off the reference's by"):
        check_backend(other, small)


def test_a_step_whose_loss_is_not_finite_has_no_figure(tmp_path):
    small_dataset(40, 8, 10).save(tmp_path / "x.npz")
    wild = Recipe(batch_size=8, widths=NARROW, lr_values=(1e30, 1e30, 0))
    with pytest.raises(Wrong, match="not finite"):
        cpu_side(wild, tmp_path / "x.npz", "auto")


@pytest.mark.parametrize("side", CPU_SIDES)
def test_each_side_runs_on_cifar10_as_it_is_published(cifar10, side):
    step, augment_epoch = cpu_calls(RECIPE, load_dataset("cifar10", cifar10, log=None), side)
    assert step().isfinite().all()
    augment_epoch()


@pytest.mark.nightly  # a benchmark's own length
def test_pytest_benchmarks_runs_its_cpu_part_on_cifar10_as_it_is_published(cifar10, capfd):
    flags = ["benchmarks/", "-p", "no:cacheprovider", "-m", "not gpu", "--dataset", "cifar10"]
    assert pytest.main([*flags, "--data-dir", str(cifar10)]) == 0
    assert "6 passed" in capfd.readouterr().out

"""The CPU part: it refuses to time wrong results, and runs on CIFAR-10 in its published form."""

import dataclasses

import pytest

from benchmarks.parts import CPU_SIDES, check_backend, cpu_calls, cpu_side
from cifar_fast import Recipe, load_dataset
from cifar_fast.backends.select import build_backend, resolve_backend
from cifar_fast.data.tensors import device_data
from cifar_fast.diagnostics.kernel_cases import WrongResult
from tests.helpers import NARROW, small_dataset

RECIPE = Recipe(batch_size=8, widths=NARROW)


def backend(dataset, recipe=RECIPE, dtype="float32", memory_format="auto"):
    config = resolve_backend("eager", "cpu", dtype, memory_format)
    return build_backend(config, recipe, device_data(dataset, config.device))[0]


@pytest.mark.parametrize("side", CPU_SIDES[:-1])
def test_each_side_is_timed(tmp_path, side):
    small_dataset(40, 8, 10).save(tmp_path / "x.npz")
    seconds = cpu_side(RECIPE, tmp_path / "x.npz", side)
    assert set(seconds) == {"step", "augmentation of an epoch"} and min(seconds.values()) > 0


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [("float32", "contiguous_format"), ("float32", "channels_last"), ("bfloat16", "channels_last")],
)
def test_correct_backend_passes(small, dtype, memory_format):
    check_backend(backend(small, dtype=dtype, memory_format=memory_format), small)


def test_backend_with_other_images_is_refused(small):
    other = backend(small)
    images = other.data.train_images.clone()
    images[0, 0, 0, 0] += 1
    other.data = dataclasses.replace(other.data, train_images=images)
    with pytest.raises(WrongResult, match="batches are not the reference's"):
        check_backend(other, small)


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_backend_with_another_network_is_refused(small, memory_format):
    other = backend(small, Recipe(batch_size=8, widths=NARROW, celu_alpha=0.1), memory_format=memory_format)
    with pytest.raises(WrongResult, match="first losses are off the reference's by"):
        check_backend(other, small)


def test_step_with_an_infinite_loss_is_refused(tmp_path):
    small_dataset(40, 8, 10).save(tmp_path / "x.npz")
    wild = Recipe(batch_size=8, widths=NARROW, lr_values=(1e30, 1e30, 0))
    with pytest.raises(WrongResult, match="not finite"):
        cpu_side(wild, tmp_path / "x.npz", "auto")


@pytest.mark.parametrize("side", CPU_SIDES)
def test_each_side_runs_on_published_cifar10(cifar10, side):
    step, augment_epoch = cpu_calls(RECIPE, load_dataset("cifar10", cifar10, log=None), side)
    assert step().isfinite().all()
    augment_epoch()


@pytest.mark.nightly  # takes as long as the benchmark
def test_pytest_benchmarks_runs_on_published_cifar10(cifar10, capfd):
    flags = ["benchmarks/", "-p", "no:cacheprovider", "-m", "not gpu", "--dataset", "cifar10"]
    assert pytest.main([*flags, "--data-dir", str(cifar10)]) == 0
    assert "6 passed" in capfd.readouterr().out

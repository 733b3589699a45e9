"""The loop of a run, its results in memory, and errors of options, compilers and memory."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from cifar_fast import CNN, Dataset, Diverged, InputError, Recipe, draw_epoch, fit
from cifar_fast.backends.eager import Compiled, Eager
from cifar_fast.backends.select import BackendConfig
from cifar_fast.cli.train import main
from cifar_fast.data.tensors import Normalization, device_data
from cifar_fast.utils.device import cpu_has_bfloat16
from tests.helpers import HOW, NARROW, fit_with, small_dataset

RECIPE = Recipe(epochs=2, batch_size=32, widths=NARROW)


def train(dataset, recipe=RECIPE, **options):
    return fit(recipe, dataset, **HOW | options)


def untimed(rows):
    return [dataclasses.replace(row, run=0, train_seconds=0, evaluation_seconds=0) for row in rows]


def test_run_i_equals_a_single_run_with_seed_plus_i(small):
    both = train(small, seed=4, runs=2)
    assert [run.seed for run in both.runs] == [4, 5]
    for i in range(2):
        single = train(small, seed=4 + i)
        assert untimed(single.rows) == untimed(row for row in both.rows if row.run == i)
    assert all(torch.equal(single.state_dict[name], tensor) for name, tensor in both.state_dict.items())
    assert both.rows[0].train_loss != both.rows[2].train_loss


def test_result_holds_rows_runs_and_data_set(small):
    result = train(small, runs=2)
    assert [(row.run, row.epoch) for row in result.rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for run in result.runs:
        rows = [row for row in result.rows if row.run == run.run]
        assert rows[0].train_seconds < rows[1].train_seconds == run.train_seconds
        assert run.test_accuracy == rows[1].test_accuracy
        assert run.setup_seconds > 0 and run.evaluation_seconds > 0
    assert result.dataset["digest"] == small.digest
    assert (result.dataset["train_images"], result.dataset["test_images"]) == (96, 40)


def test_weights_give_the_reported_accuracy(small):
    result = train(small, backend="eager", dtype="float32")
    model = CNN(RECIPE, small.num_classes)
    model.load_state_dict(result.state_dict)
    model.eval()
    pixels = torch.tensor(small.train_images).float()
    std, mean = torch.std_mean(pixels, dim=(0, 1, 2))
    with torch.no_grad():
        logits = model(((torch.tensor(small.test_images) - mean) / std).permute(0, 3, 1, 2))
    accuracy = 100 * (logits.argmax(1) == torch.tensor(small.test_labels)).float().mean().item()
    assert accuracy == pytest.approx(result.runs[0].test_accuracy)


@pytest.mark.slow  # a CPU without bfloat16 instructions takes seconds
def test_bfloat16_keeps_float32_weights_and_trains(small):
    result = train(small, dtype="bfloat16", recipe=dataclasses.replace(RECIPE, epochs=6))
    assert {tensor.dtype for tensor in result.state_dict.values()} == {torch.float32, torch.int64}
    assert result.rows[-1].train_loss < result.rows[0].train_loss
    exact = train(small, dtype="float32", recipe=dataclasses.replace(RECIPE, epochs=6))
    assert result.rows[0].train_loss == pytest.approx(exact.rows[0].train_loss, rel=0.02)


def test_epoch_drops_leftover_images_and_evaluation_does_not():
    dataset = small_dataset(train=100, test=40)
    cpu = torch.device("cpu")
    backend = Eager(RECIPE, device_data(dataset, cpu), cpu, torch.float32, torch.contiguous_format)
    backend.reset(CNN(RECIPE, dataset.num_classes))
    scores = list(backend.train_epoch(draw_epoch(100, device="cpu")))
    assert [(loss.shape, correct.shape) for loss, correct in scores] == [((32,), (32,))] * 3
    assert backend.evaluate()[1].shape == (40,)


def test_diverged_run_is_an_error_that_names_the_step(small):
    wild = Recipe(epochs=2, batch_size=32, widths=NARROW, lr_values=(1e30, 1e30, 0))
    with pytest.raises(Diverged, match=r"the loss is not finite at step \d+ \(epoch 1\); try smaller lr_values"):
        train(small, recipe=wild)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(runs=0), "runs must be at least 1"),
        (dict(seed=-1), "seed must lie between 0"),
        (dict(seed=2**63), "seed must lie between 0"),
        (dict(backend="jit"), "unknown backend 'jit'"),
        (dict(dtype="int8"), "unknown dtype 'int8'"),
        (dict(dtype="float16"), "float16 needs a GPU"),
        (dict(device="tpu"), "unknown device 'tpu'"),
        (dict(device="cpu:3"), "unknown device 'cpu:3'"),
        (dict(recipe=Recipe()), "96 training images are fewer than one batch of 512; give a smaller batch_size"),
    ],
)
def test_invalid_argument_is_refused(small, options, words):
    with pytest.raises(InputError, match=words):
        train(small, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_missing_gpu_is_refused(small):
    with pytest.raises(InputError, match=r"^device cuda: this torch finds no CUDA GPU"):
        train(small, device="cuda")


def test_auto_on_a_cpu_logs_its_choice_and_the_reason(small, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    lines = []
    result = fit(RECIPE, small, device="cpu", log=lines.append)
    assert result.dtype == ("bfloat16" if cpu_has_bfloat16() else "float32")
    assert f"backend fused, channels_last, {result.dtype}" in lines[0]
    assert "bfloat16" in lines[1] and "fused was measured fastest" in lines[1]


def test_images_of_one_color_are_refused(small):
    black = dataclasses.replace(small, train_images=small.train_images * 0)
    with pytest.raises(InputError, match="the same value everywhere"):
        train(black)


@pytest.fixture(scope="module")
def compiler():
    """Skip the test if torch.compile finds no C++ compiler."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")


@pytest.mark.nightly  # compiles for minutes; test_cifar.py has a shorter test
def test_compiled_backend_trains_like_eager(small, compiler):
    """Compiled arithmetic differs in its last bits, and each step makes the difference larger.

    The tolerance is therefore small for the first epoch and larger for the second.
    """
    # A batch size of 30 leaves a short last batch of 10 test images.
    recipe = dataclasses.replace(RECIPE, batch_size=30, lr_values=(0.1, 0.2, 0))
    eager = train(small, recipe=recipe, runs=2)
    compiled = train(small, recipe=recipe, runs=2, backend="compiled")
    for row, expected in zip(compiled.rows, eager.rows, strict=True):
        assert row.train_loss == pytest.approx(expected.train_loss, rel=1e-4 if expected.epoch == 1 else 1e-2)
    weights, expected = (
        torch.cat([tensor.double().flatten() for tensor in result.state_dict.values()]) for result in (compiled, eager)
    )
    assert (weights - expected).norm() <= 0.02 * expected.norm()


def test_building_the_compiled_backend_changes_no_state(small, uncompiled):
    torch.manual_seed(0)
    model = CNN(RECIPE, small.num_classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    cpu = torch.device("cpu")
    backend = Compiled(RECIPE, device_data(small, cpu), cpu, torch.float32, torch.channels_last)
    backend.reset(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(backend.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in backend.model.parameters())
    assert not backend.optimizer.state


def test_missing_compiler_is_an_error_with_the_reason(monkeypatch, small):
    def fail(*args, **options):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(
        InputError,
        match=r"the compiled backend cannot be set up here \(RuntimeError: no compiler\); choose another backend",
    ):
        train(small, backend="compiled")


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("can't allocate memory"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]
PHASES = {
    "data": (Normalization, "of", "out of memory for the images of small.npz, 0 MB and up to twice as much again"),
    "noise": (Dataset, "for_recipe", "out of memory for the images of small.npz"),
    "set-up": (Eager, "__init__", r"out of memory for the weights of the network\); choose smaller widths"),
    "training": (Eager, "begin_epoch", "out of memory in training at batch_size 32; try a smaller one"),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_out_of_memory_names_what_needs_it(monkeypatch, small, phase, error):
    def fail(*args, **options):
        raise error

    place, name, words = PHASES[phase]
    monkeypatch.setattr(place, name, fail)
    with pytest.raises(InputError, match=words) as caught:
        train(small)
    assert "\n" not in str(caught.value) and (phase == "training") == ("batch_size" in str(caught.value))


def test_data_too_large_for_memory_is_not_called_damaged(tmp_path, small, monkeypatch, capfd):
    small.save(tmp_path / "big.npz")

    def fail(*args, **options):
        raise MemoryError("Unable to allocate 57.2 GiB for an array")

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", fail)
    assert main(f"--dataset npz --data-dir {tmp_path}/big.npz --device cpu --output {tmp_path}/out".split()) == 2
    error = capfd.readouterr().err
    assert error == f"error: {tmp_path}/big.npz: cannot be read (Unable to allocate 57.2 GiB for an array)\n"


def test_variants_share_the_images_that_are_left_and_held_out(small):
    first, second = (small.for_recipe(Recipe(epochs=epochs), 0.25) for epochs in (1, 2))
    assert first.train_images is second.train_images and first.validation_images is second.validation_images
    assert small.for_recipe(Recipe(), 0.25, 1).train_images is not first.train_images


def test_fallback_reports_the_first_cause_and_logs_the_traceback(monkeypatch, small, caplog):
    """The compiler wraps the cause in an error whose first line does not name it."""

    class CompilerFailed(RuntimeError):
        inner_exception = ValueError("an unsupported type\nand more")

    def failing_compile(*args, **options):
        raise CompilerFailed("backend='inductor' raised:\nValueError: an unsupported type")

    monkeypatch.setattr(torch, "compile", failing_compile)
    backend_config = BackendConfig(("compiled", "eager"), torch.device("cpu"), torch.float32, torch.channels_last, "")
    with caplog.at_level("DEBUG", "cifar_fast"):
        result = fit_with(backend_config, RECIPE, small)
    reason = "the compiled backend cannot be set up here (ValueError: an unsupported type)"
    assert result.auto == [f"{reason}, so eager is used instead"]
    assert reason in caplog.text and "in failing_compile" in caplog.text


SLOW = [("fused", "bfloat16"), ("fused", "float32")]
"""Backends and dtypes that take seconds."""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, marks=[pytest.mark.slow] * (backend == "compiled" or (backend, dtype) in SLOW))
        for backend in ("eager", "compiled", "fused")
        for dtype in ("float16", "bfloat16", "float32")
    ],
)
def test_every_backend_trains_on_a_gpu(backend, dtype):
    dataset = small_dataset(train=18, test=7)
    result = fit(Recipe(epochs=3, batch_size=8), dataset, backend=backend, device="cuda", dtype=dtype, log=None)
    assert result.rows[-1].train_loss < result.rows[0].train_loss

import dataclasses
import shutil

import pytest
import torch

from cifar_fast import CNN, Diverged, InputError, Recipe, draw_epoch, fit
from cifar_fast.backends.eager import Compiled, Eager
from cifar_fast.backends.select import BackendConfig
from cifar_fast.data.tensors import device_data
from cifar_fast.training.fit import fit_plan
from cifar_fast.utils.device import cpu_has_bfloat16
from tests.helpers import HOW, NARROW, small_dataset

RECIPE = Recipe(epochs=2, batch_size=32, widths=NARROW)


def train(dataset, **how):
    return fit(how.pop("recipe", RECIPE), dataset, **HOW | how)


def untimed(rows):
    return [dataclasses.replace(row, run=0, train_seconds=0, evaluation_seconds=0) for row in rows]


def test_run_i_is_the_single_run_with_seed_s_plus_i(small):
    both = train(small, seed=4, runs=2)
    assert [run.seed for run in both.runs] == [4, 5]
    for i in range(2):
        alone = train(small, seed=4 + i)
        assert untimed(alone.rows) == untimed(row for row in both.rows if row.run == i)
    assert all(torch.equal(alone.state_dict[name], tensor) for name, tensor in both.state_dict.items())
    assert both.rows[0].train_loss != both.rows[2].train_loss


def test_the_result_tells_of_rows_runs_and_data(small):
    result = train(small, runs=2)
    assert [(row.run, row.epoch) for row in result.rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for run in result.runs:
        rows = [row for row in result.rows if row.run == run.run]
        assert rows[0].train_seconds < rows[1].train_seconds == run.train_seconds
        assert run.test_accuracy == rows[1].test_accuracy
        assert run.setup_seconds > 0 and run.evaluation_seconds > 0
    assert result.dataset["digest"] == small.digest
    assert (result.dataset["train_images"], result.dataset["test_images"]) == (96, 40)


def test_the_weights_load_into_the_plain_model_and_score_what_the_run_scored(small):
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


@pytest.mark.slow  # bfloat16, which this kind of CPU may lack
def test_bfloat16_keeps_float32_weights_and_trains(small):
    result = train(small, dtype="bfloat16", recipe=dataclasses.replace(RECIPE, epochs=6))
    assert {tensor.dtype for tensor in result.state_dict.values()} == {torch.float32, torch.int64}
    assert result.rows[-1].train_loss < result.rows[0].train_loss
    exact = train(small, dtype="float32", recipe=dataclasses.replace(RECIPE, epochs=6))
    assert result.rows[0].train_loss == pytest.approx(exact.rows[0].train_loss, rel=0.02)


def test_the_images_left_over_are_dropped_and_the_last_test_batch_is_not():
    dataset = small_dataset(train=100, test=40)
    cpu = torch.device("cpu")
    backend = Eager(RECIPE, device_data(dataset, cpu), cpu, torch.float32, torch.contiguous_format)
    backend.reset(CNN(RECIPE, dataset.num_classes))
    scores = list(backend.train_epoch(draw_epoch(100, device="cpu")))
    assert [(loss.shape, correct.shape) for loss, correct in scores] == [((32,), (32,))] * 3
    assert backend.evaluate().shape == (40,)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(small):
    wild = Recipe(epochs=2, batch_size=32, widths=NARROW, lr_values=(1e30, 1e30, 0))
    with pytest.raises(Diverged, match=r"the loss is not finite at step \d+ \(epoch 1\); try smaller --lr-values"):
        train(small, recipe=wild)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(runs=0), "runs must be at least 1"),
        (dict(seed=-1), "seed must lie between 0"),
        (dict(seed=2**63), "seed must lie between 0"),
        (dict(backend="jit"), "unknown backend 'jit'"),
        (dict(dtype="int8"), "unknown dtype 'int8'"),
        (dict(dtype="float16"), "float16 needs a GPU"),
        (dict(device="tpu"), "unknown device 'tpu'"),
        (dict(device="cpu:3"), "unknown device 'cpu:3'"),
        (dict(recipe=Recipe()), "96 training images are fewer than one batch of 512; give a smaller --batch-size"),
    ],
)
def test_a_training_that_cannot_work_is_refused(small, how, words):
    with pytest.raises(InputError, match=words):
        train(small, **how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
def test_a_gpu_that_is_not_here_is_refused(small):
    with pytest.raises(InputError, match="--device cuda: no CUDA GPU is here"):
        train(small, device="cuda")


def test_auto_on_a_cpu_says_what_it_picked_and_why(small):
    lines = []
    result = fit(RECIPE, small, device="cpu", log=lines.append)
    assert result.dtype == ("bfloat16" if cpu_has_bfloat16() else "float32")
    assert f"backend eager, channels_last, {result.dtype}" in lines[0]
    assert "bfloat16" in lines[1] and "eager was measured faster" in lines[1]


def test_images_of_one_color_cannot_be_normalized(small):
    black = dataclasses.replace(small, train_images=small.train_images * 0)
    with pytest.raises(InputError, match="the same value everywhere"):
        train(black)


# -- compiled


@pytest.fixture(scope="module")
def compiler():
    """Skips where torch.compile has no C++ compiler to call; with one there, its failure is a failure."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        pytest.skip("no C++ compiler here, which torch.compile needs on a CPU")


@pytest.mark.nightly  # test_cifar.py has a shorter one
def test_compiled_trains_as_eager_does_and_its_set_up_leaves_no_trace(small, compiler):
    """Compiled arithmetic differs in its last bits, which each step makes larger: tight after one epoch, loose after
    two.
    """
    recipe = dataclasses.replace(
        RECIPE, batch_size=30, lr_values=(0.1, 0.2, 0)
    )  # 10 test images in the last, short batch
    eager = train(small, recipe=recipe, runs=2)
    compiled = train(small, recipe=recipe, runs=2, backend="compiled")
    for mine, its in zip(compiled.rows, eager.rows, strict=True):
        assert mine.train_loss == pytest.approx(its.train_loss, rel=1e-4 if its.epoch == 1 else 1e-2)
    mine, its = (
        torch.cat([tensor.double().flatten() for tensor in result.state_dict.values()]) for result in (compiled, eager)
    )
    assert (mine - its).norm() <= 0.02 * its.norm()


def test_setting_up_the_compiled_backend_changes_no_weight_statistic_or_generator(small, uncompiled):
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


def test_a_compiler_that_is_missing_is_said(monkeypatch, small):
    def broken(*args, **how):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        InputError,
        match=r"the compiled backend cannot be set up here \(RuntimeError: no compiler\); choose another backend",
    ):
        train(small, backend="compiled")


@pytest.mark.parametrize("where", ["set-up", "training"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_names_the_batch_size(monkeypatch, small, where, error):
    def fail(*args, **how):
        raise error

    monkeypatch.setattr(Eager, "__init__" if where == "set-up" else "train_epoch", fail)
    with pytest.raises(InputError, match=r"out of memory.* at (--batch-size|batch_size) 32") as caught:
        train(small)
    assert "\n" not in str(caught.value)


def test_the_first_cause_is_told_and_the_traceback_can_be_had(monkeypatch, small, caplog):
    """The compiler raises an error of its own that hides the reason in its second line."""

    class CompilerFailed(RuntimeError):
        inner_exception = ValueError("a type that it lacks\nand more")

    def broken(*args, **how):
        raise CompilerFailed("backend='inductor' raised:\nValueError: a type that it lacks")

    monkeypatch.setattr(torch, "compile", broken)
    plan = BackendConfig(("compiled", "eager"), torch.device("cpu"), torch.float32, torch.channels_last, "")
    with caplog.at_level("DEBUG", "cifar_fast"):
        result = fit_plan(RECIPE, small, plan)
    said = "the compiled backend cannot be set up here (ValueError: a type that it lacks)"
    assert result.auto == [f"{said}, eager instead"]
    assert said in caplog.text and "in broken" in caplog.text


SLOW = [("fused", "bfloat16"), ("fused", "float32")]


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

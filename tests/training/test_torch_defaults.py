"""The caller's torch settings neither change the bits of a training nor are changed by it."""

import contextlib
import dataclasses
import threading
import warnings

import matplotlib
import numpy as np
import pytest
import torch

from cifar_fast import CNN, Recipe, fit
from cifar_fast.backends.eager import Eager
from cifar_fast.backends.select import resolve_backend
from cifar_fast.data.augment import draw_epoch
from cifar_fast.data.tensors import device_data
from cifar_fast.diagnostics.compare import compare
from cifar_fast.diagnostics.profile import profile
from tests.helpers import NARROW, small_dataset

RECIPE = Recipe(epochs=2, batch_size=32, widths=NARROW)


def train(dataset, seed=3, dtype="float32", **how):
    result = fit(RECIPE, dataset, backend="eager", device="cpu", dtype=dtype, seed=seed, log=None, **how)
    rows = [dataclasses.replace(row, train_seconds=0, evaluation_seconds=0) for row in result.rows]
    return rows, {name: tensor.double().sum().item() for name, tensor in result.state_dict.items()}


@contextlib.contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
        assert get() == value, "the caller's setting was not restored"
    finally:
        put(before)


@contextlib.contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        yield
        assert list(warnings.filters) == before


@contextlib.contextmanager
def new_precision_api():
    matmul = torch.backends.mkldnn.matmul
    with setting(lambda: matmul.fp32_precision, lambda value: setattr(matmul, "fp32_precision", value), "bf16"):
        yield


def set_determinism(value):
    torch.use_deterministic_algorithms(value)


CALLER_SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast, disabled": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "device": lambda: torch.device("meta"),
    "default device": lambda: setting(lambda: torch.get_default_device().type, torch.set_default_device, "meta"),
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "determinism": lambda: setting(torch.are_deterministic_algorithms_enabled, set_determinism, True),
    "anomaly": lambda: setting(torch.is_anomaly_enabled, lambda on: torch.autograd.set_detect_anomaly(on), True),
    "precision": lambda: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "precision, new": new_precision_api,
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 2),
    "oneDNN off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "numpy's errors": lambda: np.errstate(all="raise"),
    "warnings": warnings_as_errors,
}


@pytest.mark.slow  # whole trainings
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in CALLER_SETTINGS), ("autocast", "bfloat16"), ("autocast, disabled", "bfloat16")],
)
def test_callers_settings_do_not_change_the_result(small, name, dtype, alone={}):  # noqa: B006
    if dtype not in alone:
        alone[dtype] = train(small, dtype=dtype)
    with CALLER_SETTINGS[name]():
        assert train(small, dtype=dtype) == alone[dtype]


def test_training_in_bfloat16_learns_inside_an_autocast_block(small):
    with torch.autocast("cpu", torch.bfloat16):
        rows, _ = train(small, dtype="bfloat16")
    assert rows[1].train_loss < rows[0].train_loss


def test_compare_restores_the_callers_settings_between_its_rows(small):
    plans = [resolve_backend("eager", "cpu", "float32", layout) for layout in ("channels_last", "contiguous_format")]
    alone = list(compare(RECIPE, small, *plans, steps=2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen = []
        for rows in compare(RECIPE, small, *plans, steps=2):
            seen.append(rows)
            torch.rand(7)
            assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert seen == alone


def test_profile_ignores_and_restores_the_callers_settings(small, tmp_path):
    def weights():
        cpu = torch.device("cpu")
        backend = Eager(RECIPE, device_data(small, cpu), cpu, torch.float32, torch.contiguous_format)
        backend.reset(CNN(RECIPE, small.num_classes, torch.Generator().manual_seed(1)))
        draws = draw_epoch(96, device="cpu", generator=torch.Generator().manual_seed(2))
        profile(backend, draws, tmp_path / "profile", steps=1)
        return {name: tensor.clone() for name, tensor in backend.state_dict().items()}

    alone = weights()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        surrounded = weights()
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert all(torch.equal(surrounded[name], tensor) for name, tensor in alone.items())


def test_training_does_not_touch_the_callers_random_numbers(small):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(small)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_trainings_in_two_threads_equal_separate_trainings(small):
    """A third thread draws random numbers at the same time."""
    alone = [train(small, seed) for seed in range(4)]
    found, done = [None] * 4, threading.Event()

    def run(seed):
        found[seed] = train(small, seed)

    def draw():
        while not done.is_set():
            torch.rand(10)

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        for pair in ((0, 1), (2, 3)):
            threads = [threading.Thread(target=run, args=(seed,)) for seed in pair]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        done.set()
        drawing.join()
    assert found == alone


def test_settings_are_restored_when_the_last_of_several_calls_ends(small):
    """Settings of the process are the same for all threads, so the first call that ends must not restore them."""
    with setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        inside, finish = threading.Event(), threading.Event()

        def wait(line):
            inside.set()
            assert finish.wait(60)

        slow = threading.Thread(
            target=fit, args=(RECIPE, small), kwargs=dict(backend="eager", device="cpu", dtype="float32", log=wait)
        )
        slow.start()
        assert inside.wait(60)
        train(small)
        assert torch.get_default_dtype() == torch.float32, "the other call is still running"
        finish.set()
        slow.join()


def test_generator_draws_the_same_epoch_as_the_default_generator_with_that_seed():
    torch.manual_seed(5)
    expected = draw_epoch(50, device="cpu")
    drawn = draw_epoch(50, device="cpu", generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn.tensor, expected.tensor)


@pytest.mark.slow
def test_curves_ignore_the_callers_matplotlib_style(tmp_path):
    dataset = small_dataset()
    dataset = dataclasses.replace(dataset, name="a $ and a $x^$")
    train(dataset, output=tmp_path / "plain")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "savefig.dpi": 10}):
        train(dataset, output=tmp_path / "styled")
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "plain/curves.png").read_bytes() == (tmp_path / "styled/curves.png").read_bytes()


@pytest.mark.gpu
def test_training_does_not_touch_the_generators_of_any_gpu(small):
    torch.cuda.manual_seed_all(9)
    states = [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())]
    for device in ("cpu", "cuda:0"):
        fit(RECIPE, small, backend="eager", device=device, dtype="float32", log=None)
    for device, state in enumerate(states):
        assert torch.equal(torch.cuda.get_rng_state(device), state)

"""Whatever surrounds a call, the same seed gives the same bits, and what the caller had set stays set."""

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
        assert get() == value, "what the caller had set is another"
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


SURROUNDINGS = {
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
    [*((name, "float32") for name in SURROUNDINGS), ("autocast", "bfloat16"), ("autocast, disabled", "bfloat16")],
)
def test_what_surrounds_the_call_changes_nothing(small, name, dtype, alone={}):  # noqa: B006
    if dtype not in alone:
        alone[dtype] = train(small, dtype=dtype)
    with SURROUNDINGS[name]():
        assert train(small, dtype=dtype) == alone[dtype]


def test_an_autocast_block_does_not_keep_bfloat16_from_learning(small):
    with torch.autocast("cpu", torch.bfloat16):
        rows, _ = train(small, dtype="bfloat16")
    assert rows[1].train_loss < rows[0].train_loss


def test_compare_gives_the_same_rows_and_the_callers_state_between_them(small):
    plans = [resolve_backend("eager", "cpu", "float32", layout) for layout in ("channels_last", "contiguous_format")]
    alone = list(compare(RECIPE, small, *plans, steps=2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen = []
        for rows in compare(RECIPE, small, *plans, steps=2):
            seen.append(rows)
            torch.rand(7)
            assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert seen == alone


def test_a_profile_trains_as_alone_and_gives_the_callers_state_back(small, tmp_path):
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


def test_the_callers_random_numbers_go_on_as_if_nothing_had_been(small):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(small)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_runs_in_two_threads_are_those_of_their_seeds(small):
    """And a third thread draws all the while."""
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


def test_settings_come_back_when_the_last_of_several_calls_has_ended(small):
    """Each thread sees the state that is the process's own; the first call must not give it back under the second."""
    with setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        inside, go_on = threading.Event(), threading.Event()

        def wait(line):
            inside.set()
            assert go_on.wait(60)

        slow = threading.Thread(
            target=fit, args=(RECIPE, small), kwargs=dict(backend="eager", device="cpu", dtype="float32", log=wait)
        )
        slow.start()
        assert inside.wait(60)
        train(small)
        assert torch.get_default_dtype() == torch.float32, "the other call is still at work"
        go_on.set()
        slow.join()


def test_a_generators_epoch_is_that_of_the_same_seed():
    torch.manual_seed(5)
    expected = draw_epoch(50, device="cpu")
    drawn = draw_epoch(50, device="cpu", generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn.tensor, expected.tensor)


@pytest.mark.slow
def test_curves_are_drawn_in_matplotlibs_own_style(tmp_path):
    dataset = small_dataset()
    dataset = dataclasses.replace(dataset, name="a $ and a $x^$")
    train(dataset, output=tmp_path / "plain")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "savefig.dpi": 10}):
        train(dataset, output=tmp_path / "styled")
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "plain/curves.png").read_bytes() == (tmp_path / "styled/curves.png").read_bytes()


@pytest.mark.gpu
def test_every_gpus_generator_is_left_as_it_was(small):
    torch.cuda.manual_seed_all(9)
    states = [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())]
    for device in ("cpu", "cuda:0"):
        fit(RECIPE, small, backend="eager", device=device, dtype="float32", log=None)
    for device, state in enumerate(states):
        assert torch.equal(torch.cuda.get_rng_state(device), state)

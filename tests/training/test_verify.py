"""A repeated step that gives other bits ends the run. One that gives the same bits changes nothing."""

import dataclasses

import pytest
import torch
from torch import nn

from cifar_fast import InputError, Recipe, fit
from cifar_fast.backends.base import Backend
from cifar_fast.backends.fused import Fused
from cifar_fast.train import main
from cifar_fast.utils.errors import MissingRuns
from tests.helpers import HOW, untimed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings

FLAGS = "--dataset npz --widths 4 8 --epochs 2 --batch-size 8 --device cpu --dtype float32"
RECIPE = Recipe(epochs=2, batch_size=8, widths=(4, 8))
WHITENED = dataclasses.replace(Recipe.load("airbench94"), widths=(4, 8), batch_size=8, epochs=2)


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def flip_a_bit(monkeypatch, repetition):
    """Flip the lowest bit of a weight, as faulty memory would, before a step is repeated that often."""
    done = []

    def faulty(rewind):
        def rewind_and_flip(backend, step):
            rewind(backend, step)
            done.append(step)
            if len(done) == repetition:
                bits = next(backend.model.parameters()).data.view(torch.int32)
                bits[(0,) * bits.dim()] ^= 1

        return rewind_and_flip

    for kind in (Backend, Fused):
        monkeypatch.setattr(kind, "rewind", faulty(kind.rewind))


def assert_same_bits(one, other):
    """Check that two results have the same figures and weights."""
    rows = [[untimed(dataclasses.asdict(row)) for row in result.rows] for result in (one, other)]
    assert rows[0] == rows[1]
    assert all(torch.equal(one.state_dict[name], tensor) for name, tensor in other.state_dict.items())


@pytest.mark.parametrize("recipe", ["reference", "airbench94"])
@pytest.mark.parametrize("backend", ["eager", "compiled", "fused"])
def test_a_flipped_bit_ends_the_run_and_names_the_step(tmp_path, npz, monkeypatch, capfd, uncompiled, backend, recipe):
    flip_a_bit(monkeypatch, 2)
    flags = f"{FLAGS} --recipe {recipe} --backend {backend} --data-dir {npz} --output {tmp_path}/out"
    assert main(f"{flags} --verify-every 3".split()) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: step 6 (epoch 2) of run 0: other bits when it was repeated, in ")
    assert error.count("\n") == 1 and " more; the memory or the processor may be faulty" in error


@pytest.mark.parametrize("name", ["seq.0.weight", "seq.1.running_var", "momentum of seq.0.weight"])
def test_a_difference_in_each_kind_of_state_is_noticed(tiny, monkeypatch, name):
    copies, state_of = [], Backend.training_state

    def faulty(backend):
        state = state_of(backend)
        copies.append(state)
        if len(copies) == 3:  # after the repeated step
            tensor = state["momentum"][0] if "momentum" in name else state["model"][name]
            tensor.view(torch.int32)[(0,) * tensor.dim()] ^= 1
        return state

    monkeypatch.setattr(Backend, "training_state", faulty)
    with pytest.raises(MissingRuns, match=f"step 1 .* in {name}; "):
        fit(RECIPE, tiny, verify_every=1, **HOW)


@pytest.mark.parametrize("recipe", [RECIPE, WHITENED], ids=["reference", "airbench94"])
@pytest.mark.parametrize("backend", ["eager", "compiled", "fused"])
def test_verification_changes_no_bit(tiny, uncompiled, backend, recipe):
    options = HOW | dict(backend=backend)
    assert_same_bits(fit(recipe, tiny, verify_every=1, **options), fit(recipe, tiny, **options))


def test_a_step_that_draws_random_numbers_is_repeated_with_the_same_ones(tiny):
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3))
    assert_same_bits(*(fit(RECIPE, tiny, model=model, verify_every=every, **HOW) for every in (0, 1)))


def test_other_runs_are_trained_and_the_faulty_one_resumes_from_its_checkpoint(tmp_path, tiny, monkeypatch):
    out, lines = tmp_path / "out", []
    with monkeypatch.context() as patch, pytest.raises(MissingRuns, match=r"step 6 \(epoch 2\) of run 0"):
        flip_a_bit(patch, 2)
        fit(RECIPE, tiny, output=out, runs=2, verify_every=3, **HOW)
    assert [(out / f"run-{run}/result.json").exists() for run in (0, 1)] == [False, True]
    result = fit(RECIPE, tiny, resume=out, runs=2, verify_every=2, **HOW | dict(log=lines.append))
    assert len([line for line in lines if "resuming after epoch 1" in line]) == 1
    assert_same_bits(result, fit(RECIPE, tiny, runs=2, **HOW))


@pytest.mark.parametrize("wrong", [-1, 1.5, "often"])
def test_refuses_a_number_of_steps_that_is_none(tiny, wrong):
    with pytest.raises(InputError, match="verify_every must be"):
        fit(RECIPE, tiny, verify_every=wrong, **HOW)

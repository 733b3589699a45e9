"""The time to go: of all runs and epochs with their evaluations, on the first lines, and each minute."""

import time

import pytest

from cifar_fast import Recipe, Sweep, fit, fit_sweep
from cifar_fast.backends.eager import Eager
from cifar_fast.training import time_to_go
from cifar_fast.training.time_to_go import EVALUATED, TimeToGo
from cifar_fast.utils import progress
from cifar_fast.utils.progress import duration
from tests.helpers import HOW

RECIPE = Recipe(epochs=2, batch_size=16, widths=(4, 8))


@pytest.fixture
def clock(monkeypatch):
    """A clock of the estimate, to be set by hand."""
    now = [0.0]
    monkeypatch.setattr(time_to_go.time, "monotonic", lambda: now[0])
    return now


def test_estimate_covers_all_runs_epochs_and_evaluations(clock):
    run = 2 * (300 + EVALUATED * 90)
    to_go = TimeToGo({0: [run, run], 1: [run]})
    to_go.begin(0, run=0, runs=2)
    to_go.skip(0)
    assert to_go.line() == "run 0 of 2, setting up"
    with to_go.epoch(1, 2, steps=3, batch_size=100) as step:
        clock[0] = 4.0
        step()
    assert to_go.seconds() == pytest.approx(0.04 * (3 * run - 100))
    clock[0] = 200.0
    to_go.end()
    to_go.begin(1, run=0, runs=1)
    assert to_go.seconds() == pytest.approx(0.04 * 2 * run), "the set-up is no step, and the speed is that of the other"
    to_go.skip(run / 2)
    clock[0] += 10.0
    to_go.add(run / 2)
    to_go.end()
    assert to_go.seconds() == pytest.approx(0.04 * run)
    to_go.begin(0, run=1, runs=2)
    to_go.end(is_last=True)
    assert str(to_go) == ""


def test_first_lines_of_a_training_have_the_time_of_all_runs(tiny, monkeypatch):
    lines = []
    fit(RECIPE, tiny, runs=2, **HOW | {"log": lines.append})
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line.endswith(" s to go") for line in epochs] == [True, True, True, True]
    monkeypatch.setattr(time_to_go, "FIRST_SECONDS", 0.0)  # as in a long epoch
    lines.clear()
    fit(RECIPE, tiny, runs=2, **HOW | {"log": lines.append})
    (told,) = [line for line in lines if line.startswith("about ")]
    assert told.endswith(" s to go, with all runs, epochs and evaluations")
    assert lines.index(told) < lines.index(next(line for line in lines if line.startswith("epoch")))


def test_silent_minute_of_a_sweep_has_a_line_with_variant_and_run(tmp_path, npz, tiny, monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.1)
    evaluate = Eager.evaluate
    monkeypatch.setattr(Eager, "evaluate", lambda backend: (time.sleep(0.15), evaluate(backend))[1])
    sweep = Sweep(variants={"a": RECIPE}, output=str(tmp_path / "out"), dataset="npz", data_dir=str(npz), runs=2)
    lines = []
    fit_sweep(sweep, log=lines.append)
    told = [line for line in lines if line.startswith("a: run 1 of 2, epoch 1 of 2, evaluating, ")]
    assert told and told[0].endswith(" s to go")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3570, "1 h 00 min"), (7500, "2 h 05 min"), (200_000, "2 d 8 h")],
)
def test_time_for_a_person(seconds, shown):
    assert duration(seconds) == shown

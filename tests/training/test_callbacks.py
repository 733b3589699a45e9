"""``fit(on_epoch=)``: each row as its epoch ends, and runs that the callback stops."""

import dataclasses
import json

import pytest
import torch

from cifar_fast import Recipe, StopTraining, fit
from tests.helpers import HOW, contents, untimed

pytestmark = pytest.mark.usefixtures("no_curves")

RECIPE = Recipe(epochs=3, batch_size=16, widths=(4, 8))


def epochs(rows):
    return [(row.run, row.epoch) for row in rows]


def raise_after(run, epoch, error):
    """Return a callback that raises ``error`` after that epoch of that run."""

    def on_epoch(row):
        if (row.run, row.epoch) == (run, epoch):
            raise error

    return on_epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, no_curves):
    """The folder and the result of two runs that no callback disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, fit(RECIPE, tiny, runs=2, output=folder, **HOW)


def test_on_epoch_gets_each_row_as_its_epoch_ends(tiny):
    rows, lines, counts = [], [], []

    def on_epoch(row):
        rows.append(row)
        counts.append(sum(line.startswith("epoch") for line in lines))

    result = fit(RECIPE, tiny, runs=2, on_epoch=on_epoch, **HOW | {"log": lines.append})
    assert rows == result.rows
    assert epochs(rows) == [(run, epoch) for run in range(2) for epoch in (1, 2, 3)]
    assert counts == [1, 2, 3, 4, 5, 6]


def test_stop_training_ends_only_its_run(tmp_path, tiny, whole):
    folder, lines = tmp_path / "out", []
    stop = raise_after(0, 1, StopTraining("no hope"))
    result = fit(RECIPE, tiny, runs=2, output=folder, on_epoch=stop, **HOW | {"log": lines.append})
    assert "run 0 is stopped after epoch 1: no hope" in lines
    assert [run.stopped for run in result.runs] == [True, False]
    assert epochs(result.rows) == [(0, 1), (1, 1), (1, 2), (1, 3)]
    assert result.runs[0].test_accuracy == result.rows[0].test_accuracy

    undisturbed = whole[1]
    kept = [row for row in undisturbed.rows if row.run == 1 or row.epoch == 1]
    assert [untimed(vars(row)) for row in result.rows] == [untimed(vars(row)) for row in kept]
    assert untimed(vars(result.runs[1])) == untimed(vars(undisturbed.runs[1]))
    assert result.state_dict.keys() == undisturbed.state_dict.keys()
    assert all(torch.equal(tensor, undisturbed.state_dict[name]) for name, tensor in result.state_dict.items())

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["runs"] == [dataclasses.asdict(run) for run in result.runs]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [dataclasses.asdict(row) for row in result.rows]


def test_resume_does_not_continue_a_stopped_run(tmp_path, tiny):
    folder, lines, rows = tmp_path / "out", [], []
    first = fit(RECIPE, tiny, runs=2, output=folder, on_epoch=raise_after(0, 1, StopTraining()), **HOW)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = fit(RECIPE, tiny, runs=2, resume=folder, on_epoch=rows.append, **HOW | {"log": lines.append})
    assert rows == [] and len(lines) == 1 and lines[0].startswith("nothing to do: ")
    assert (again.runs, again.rows) == (first.runs, first.rows)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_training_resumes_with_the_same_bits_after_an_error_in_on_epoch(tmp_path, tiny, whole):
    with pytest.raises(RuntimeError, match="the logger is down"):
        fit(
            RECIPE,
            tiny,
            runs=2,
            output=tmp_path / "out",
            on_epoch=raise_after(0, 2, RuntimeError("the logger is down")),
            **HOW,
        )
    rows = []
    result = fit(RECIPE, tiny, runs=2, resume=tmp_path / "out", on_epoch=rows.append, **HOW)
    assert contents(tmp_path / "out") == contents(whole[0])
    assert epochs(rows) == [(0, 3), (1, 1), (1, 2), (1, 3)], "on_epoch gets only the new rows"
    assert rows == result.rows[2:]

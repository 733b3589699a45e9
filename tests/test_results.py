import json
import math
import statistics

import pytest
import torch
from PIL import Image

from cifar_fast import CNN, Diverged, InputError, Recipe, fit
from cifar_fast.output import Output
from cifar_fast.results import confidence_interval_95
from tests.conftest import NARROW

RECIPE = Recipe(epochs=2, batch_size=32, widths=NARROW)
HOW = dict(backend="eager", device="cpu", dtype="float32", log=None)


def test_the_files_of_a_training(tmp_path, small):
    output = tmp_path / "a" / "b"
    result = fit(RECIPE, small, runs=3, seed=2, output=output, **HOW)
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "metrics.jsonl", "model.pt", "summary.json"]

    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["epoch"]) for row in rows] == [(run, epoch) for run in range(3) for epoch in (1, 2)]
    assert set(rows[0]) == {
        "run",
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_accuracy",
        "train_seconds",
        "evaluation_seconds",
    }

    summary = json.loads((output / "summary.json").read_text())
    assert Recipe(**summary["recipe"]) == RECIPE
    assert (summary["backend"], summary["dtype"], summary["dataset"]["digest"]) == ("eager", "float32", small.digest)
    assert summary["environment"]["torch"] == torch.__version__
    accuracies = [run["test_accuracy"] for run in summary["runs"]]
    assert accuracies == [row["test_accuracy"] for row in rows if row["epoch"] == 2]
    assert [run["seed"] for run in summary["runs"]] == [2, 3, 4]
    assert summary["test_accuracy_mean"] == pytest.approx(statistics.mean(accuracies))
    assert summary["test_accuracy_std"] == pytest.approx(statistics.stdev(accuracies))
    low, high = summary["test_accuracy_ci95"]
    assert (low + high) / 2 == pytest.approx(summary["test_accuracy_mean"])
    seconds = sorted(run["train_seconds"] for run in summary["runs"])
    assert (summary["train_seconds_min"], summary["train_seconds_median"]) == (seconds[0], seconds[1])
    assert summary["train_seconds_mean"] == pytest.approx(sum(seconds) / 3)

    with Image.open(output / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and len(image.getcolors(1 << 20)) > 10
    model = CNN(RECIPE, small.num_classes)
    model.load_state_dict(torch.load(output / "model.pt", weights_only=True))
    assert all(torch.equal(tensor, result.state_dict[name]) for name, tensor in model.state_dict().items())


def test_one_run_has_no_deviation_and_no_interval(small):
    summary = fit(RECIPE, small, **HOW).summary()
    assert summary["test_accuracy_std"] is None
    assert summary["test_accuracy_ci95"] is None


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (3, 4.3027), (10, 2.2622), (40, 2.0227)])
def test_the_interval_is_students(n, quantile):
    """The quantiles are those of the tables."""
    values = [94.0 + 0.15 * math.sin(i) for i in range(n)]
    low, high = confidence_interval_95(values)
    assert (high - low) / 2 == pytest.approx(quantile * statistics.stdev(values) / n**0.5, rel=1e-3)


def test_results_that_are_there_are_kept_unless_told(tmp_path, small):
    fit(RECIPE, small, output=tmp_path / "out", **HOW)
    before = (tmp_path / "out/metrics.jsonl").read_text()
    with pytest.raises(InputError, match=r"already holds results .*--overwrite"):
        fit(RECIPE, small, output=tmp_path / "out", **HOW)
    assert (tmp_path / "out/metrics.jsonl").read_text() == before
    fit(RECIPE, small, output=tmp_path / "out", seed=1, overwrite=True, **HOW)
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2


def test_a_diverging_run_leaves_no_folder_behind(tmp_path, small):
    wild = Recipe(epochs=2, batch_size=32, widths=NARROW, lr_values=(1e30, 1e30, 0))
    with pytest.raises(Diverged, match="not finite"):
        fit(wild, small, output=tmp_path / "a" / "b", **HOW)
    assert not (tmp_path / "a").exists()


def test_a_disk_that_fills_up_is_said_in_a_line(tmp_path, small, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"--output .*: cannot be written to \(No space left on device\)"):
        fit(RECIPE, small, output=tmp_path / "out", **HOW)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]


def test_rows_can_be_read_while_the_run_goes_on(tmp_path, small):
    seen = []
    how = HOW | {
        "log": lambda line: (
            seen.append(len((tmp_path / "out/metrics.jsonl").read_text().splitlines())) if "epoch" in line else None
        )
    }
    fit(RECIPE, small, output=tmp_path / "out", **how)
    assert seen == [1, 2]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output"), Output(tmp_path / place):
        pass

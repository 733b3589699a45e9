"""The result of a training, its files, and how writing fails."""

import contextlib
import dataclasses
import html
import io
import json
import math
import re
import statistics
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from cifar_fast import CNN, Diverged, InputError, Recipe, fit, load_model
from cifar_fast.training.metrics import confidence_interval_95
from cifar_fast.training.run_folder import RunFolder
from tests.helpers import HOW, NARROW, files_in, files_of

RECIPE = Recipe(epochs=2, batch_size=32, widths=NARROW)


def test_training_writes_its_files(tmp_path, small):
    output = tmp_path / "a" / "b"
    result = fit(RECIPE, small, runs=3, seed=2, output=output, **HOW)
    assert files_in(output) == files_of(3)

    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["epoch"]) for row in rows] == [(run, epoch) for run in range(3) for epoch in (1, 2)]
    assert set(rows[0]) == {
        "run",
        "epoch",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
        "test_loss",
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
    assert low <= summary["test_accuracy_mean"] <= high
    seconds = sorted(run["train_seconds"] for run in summary["runs"])
    assert (summary["train_seconds_min"], summary["train_seconds_median"]) == (seconds[0], seconds[1])
    assert summary["train_seconds_mean"] == pytest.approx(sum(seconds) / 3)

    with Image.open(output / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and len(image.getcolors(1 << 20)) > 10
    saved = torch.load(output / "model.pt", weights_only=True)
    model = CNN(Recipe(**saved["recipe"]), len(saved["class_names"]))
    model.load_state_dict(saved["state_dict"])
    assert all(torch.equal(tensor, result.state_dict[name]) for name, tensor in model.state_dict().items())
    pixels = small.train_images.astype(np.float64)
    assert saved["mean"] == pytest.approx(pixels.mean((0, 1, 2)))
    assert saved["std"] == pytest.approx(pixels.std((0, 1, 2), ddof=1))
    assert saved["format"] == 1


def test_every_run_keeps_its_weights(tmp_path, small):
    fit(RECIPE, small, runs=2, seed=3, output=tmp_path / "out", **HOW)
    for run in range(2):
        alone = fit(RECIPE, small, seed=3 + run, **HOW).state_dict
        kept = load_model(tmp_path / f"out/run-{run}").model.state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in alone.items())


def test_notebook_shows_a_row_for_each_run_and_the_curves(tmp_path, small):
    np.savez(tmp_path / "test.npz", images=small.test_images, labels=small.test_labels)
    also_test = {"<shifted>": tmp_path / "test.npz"}
    result = fit(RECIPE, small, runs=2, seed=7, also_test=also_test, output=tmp_path / "out", **HOW)
    page = result._repr_html_()  # IPython's protocol
    header, *rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert "<th>&lt;shifted&gt; accuracy</th>" in header  # a name is text, not HTML
    for row, run, last in zip(rows, result.runs, result.rows[1::2], strict=True):
        assert f"<td>{run.seed}</td><td>2</td><td>{last.train_loss:.3f}</td>" in row
        assert f"<td>{last.train_accuracy:.2f} %</td><td>{run.test_accuracy:.2f} %</td>" in row
    assert html.escape(result.summary_line()) in page
    (png,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert b64decode(png) == (tmp_path / "out/curves.png").read_bytes()


def test_figure_has_the_curves_and_can_be_saved(small):
    result = fit(RECIPE, small, runs=2, **HOW)
    figure = result.figure()
    loss, accuracy, rate = figure.axes
    for axes, columns in ((loss, ["train_loss", "test_loss"]), (accuracy, ["train_accuracy", "test_accuracy"])):
        drawn = [list(line.get_ydata()) for line in axes.lines]
        expected = []
        for column in columns:
            runs = [[getattr(row, column) for row in result.rows if row.run == run] for run in (0, 1)]
            expected += [*runs, [statistics.fmean(values) for values in zip(*runs)]]
        assert drawn == expected
        figure.draw_without_rendering()
        assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 - 1, "it hides no data"
    assert all(float(text).is_integer() for text in rate.get_xticks())
    assert "small.npz, network " in figure.get_suptitle()
    assert list(rate.lines[0].get_ydata()) == list(RECIPE.lr_values)
    figure.savefig(svg := io.StringIO(), format="svg")
    assert "<svg" in svg.getvalue()


@pytest.mark.slow  # starts a process
def test_drawing_does_not_change_the_state_of_matplotlib():
    code = """
import sys, matplotlib
from tests.training.test_results import HOW, RECIPE, fit
from tests.helpers import small_dataset
matplotlib.rcParams["lines.linewidth"] = 7
before = list(dict.items(matplotlib.rcParams))  # rcParams.items() would choose a backend
result = fit(RECIPE, small_dataset(), **HOW)
result.figure(), result._repr_html_()
print(list(dict.items(matplotlib.rcParams)) == before, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


def test_result_prints_in_one_line(small):
    result = fit(RECIPE, small, runs=2, **HOW)
    mean = statistics.mean(run.test_accuracy for run in result.runs)
    device = result.environment["device_name"]
    network = f"npz small.npz, network {' '.join(map(str, RECIPE.widths))}"
    how = f"eager backend, float32, {device}, 2 runs"
    assert repr(result) == f"<Result: {network}, {how}, test accuracy {mean:.2f} %>"


def test_one_run_has_no_deviation_and_no_interval(small):
    summary = fit(RECIPE, small, **HOW).summary()
    assert summary["test_accuracy_std"] is None
    assert summary["test_accuracy_ci95"] is None


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (3, 4.3027), (10, 2.2622), (40, 2.0227)])
def test_confidence_interval_matches_tables_of_students_t(n, quantile):
    """The quantiles come from published tables of Student's t."""
    values = [50.0 + 0.15 * math.sin(i) for i in range(n)]
    low, high = confidence_interval_95(values)
    assert (high - low) / 2 == pytest.approx(quantile * statistics.stdev(values) / n**0.5, rel=1e-3)


def test_existing_results_are_kept_without_overwrite(tmp_path, small):
    fit(RECIPE, small, output=tmp_path / "out", **HOW)
    before = (tmp_path / "out/metrics.jsonl").read_text()
    with pytest.raises(InputError, match=r"already holds results .*overwrite"):
        fit(RECIPE, small, output=tmp_path / "out", **HOW)
    assert (tmp_path / "out/metrics.jsonl").read_text() == before
    fit(RECIPE, small, output=tmp_path / "out", seed=1, overwrite=True, **HOW)
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("accuracies", [[100.0, 90.0], [0.0, 10.0]])
def test_confidence_interval_stays_between_0_and_100(accuracies):
    low, high = confidence_interval_95(accuracies)
    assert 0 <= low < high <= 100


DISK_FULL = OSError(28, "No space left on device")
TORCH_DISK_FULL = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nand more lines")


@pytest.mark.slow  # whole trainings
@pytest.mark.parametrize(
    ("writer", "error", "lost"),
    [
        ((torch, "save"), TORCH_DISK_FULL, "model.pt"),
        ((torch, "save"), DISK_FULL, "model.pt"),
        ((Figure, "savefig"), ValueError("no such backend"), "curves.png"),
        ((Figure, "savefig"), ImportError("no PNG here"), "curves.png"),
        ((json, "dumps"), TypeError("not JSON"), "summary.json"),
    ],
)
def test_file_that_cannot_be_written_costs_no_other_file(tmp_path, small, monkeypatch, writer, error, lost):
    write = getattr(*writer)

    def fail(*args, **options):
        if lost == "summary.json" and "test_accuracy_mean" not in args[0]:  # json.dumps writes other files too
            return write(*args, **options)
        raise error

    lines = []
    monkeypatch.setattr(*writer, fail)
    result = fit(RECIPE, small, output=tmp_path / "out", runs=2, **HOW | {"log": lines.append})
    figures = {"curves.png", "confusion.png"}
    expected = {*files_of(2)} - (figures if lost in figures else {lost})
    if lost == "model.pt":  # the runs count as missing, and a resume writes their weights
        expected -= {*files_of(2)} - {*files_of(0)}
    assert {*files_in(tmp_path / "out")} == expected
    assert len(result.unwritten) == (1 if lost == "summary.json" else 2)
    assert lost in result.unwritten[0]
    for line in result.unwritten:
        assert "could not be written" in line and "\n" not in line and line in lines
    assert any(line.startswith("test accuracy") for line in lines)


@pytest.mark.slow  # whole trainings
def test_rows_that_could_not_be_written_are_written_later(tmp_path, small):
    """A folder named metrics.jsonl blocks the second row of each run."""
    lines, file, moved = [], tmp_path / "out/metrics.jsonl", tmp_path / "moved.jsonl"

    def log(line):
        lines.append(line)
        if moved.exists():
            file.rmdir()
            moved.rename(file)
        if "epoch  1" in line:
            file.rename(moved)
            file.mkdir()

    result = fit(RECIPE, small, runs=2, output=tmp_path / "out", **HOW | {"log": log})
    assert sum("metrics.jsonl could not be written" in line for line in lines) == 2
    assert result.unwritten == []
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["epoch"]) for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.nightly  # starts a process
def test_full_disk_leaves_no_half_line(tmp_path, small):
    """The limit on the size of a file simulates a full disk, because /dev/full cannot hold a folder."""
    resource = pytest.importorskip("resource")
    code = f"""
import resource, signal
from tests.training.test_results import HOW, RECIPE, fit
from tests.helpers import small_dataset
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, {resource.RLIM_INFINITY}))
result = fit(RECIPE, small_dataset(), runs=2, output={str(tmp_path / "out")!r}, **HOW)
print(len(result.rows), *result.unwritten, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, *unwritten = done.stdout.splitlines()
    assert count == "4" and any("metrics.jsonl could not be written" in line for line in unwritten)
    assert files_in(tmp_path / "out") == ["metrics.jsonl"]
    text = (tmp_path / "out/metrics.jsonl").read_text()
    assert text.endswith("\n") and all(json.loads(line) for line in text.splitlines())


def test_earlier_results_stay_until_the_first_new_row(tmp_path, small):
    output = tmp_path / "out"
    fit(RECIPE, small, output=output, **HOW)
    before = {name: (output / name).read_bytes() for name in files_in(output)}
    wild = dataclasses.replace(RECIPE, lr_values=(1e30, 1e30, 0))
    with pytest.raises(Diverged):
        fit(wild, small, output=output, overwrite=True, **HOW)
    assert {name: (output / name).read_bytes() for name in files_in(output)} == before

    def stop(line):
        if "epoch  1" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, small, output=output, seed=1, overwrite=True, **HOW | {"log": stop})
    assert files_in(output) == ["metrics.jsonl", "training.json"]
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow  # whole trainings
@pytest.mark.parametrize("overwrite", [False, True])
def test_second_training_in_the_same_folder_is_refused(tmp_path, small, overwrite):
    errors = []

    def start_second(line):
        if line.startswith("torch"):  # the first training has begun and has written nothing yet
            with pytest.raises(InputError, match=r"output .*: another run is writing its results there") as caught:
                fit(RECIPE, small, output=tmp_path / "out", overwrite=overwrite, **HOW)
            errors.append(caught.value)

    fit(RECIPE, small, output=tmp_path / "out", overwrite=overwrite, **HOW | {"log": start_second})
    assert len(errors) == 1
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2


def test_results_written_since_the_check_are_kept(tmp_path, small):
    folder = RunFolder(tmp_path / "out")
    fit(RECIPE, small, output=tmp_path / "out", **HOW)
    with pytest.raises(InputError, match="already holds results"), folder:
        pass


def test_new_folder_gets_a_number_if_the_name_is_taken(tmp_path):
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(RunFolder(tmp_path / "runs" / "x", new=True)) for _ in range(3)]
        assert [folder.path.name for folder in folders] == ["x", "x-2", "x-3"]
    assert not (tmp_path / "runs").exists()


def test_seed_and_runs_accept_numpy_integers(tmp_path, small):
    dataset = dataclasses.replace(small, name=Path("a/name"))  # a name may be any object that has a text
    result = fit(RECIPE, dataset, output=tmp_path / "out", seed=np.int64(3), runs=np.int32(1), **HOW)
    assert not result.unwritten
    assert json.loads((tmp_path / "out/summary.json").read_text())["runs"][0]["seed"] == 3
    with pytest.raises(InputError, match=r"seed must be a whole number, not 1\.0"):
        fit(RECIPE, small, seed=1.0, **HOW)


def test_log_without_a_letter_gets_it_escaped(tmp_path, small):
    lines = []

    def ascii_only(line):
        line.encode("ascii")
        lines.append(line)

    np.savez(tmp_path / "test.npz", images=small.test_images, labels=small.test_labels)
    fit(RECIPE, small, also_test={"ä": tmp_path / "test.npz"}, **HOW | {"log": ascii_only})
    assert any("also tested on \\xe4" in line for line in lines)


def test_rows_can_be_read_during_the_run(tmp_path, small):
    counts = []

    def log(line):
        if "epoch" in line:
            counts.append(len((tmp_path / "out/metrics.jsonl").read_text().splitlines()))

    fit(RECIPE, small, output=tmp_path / "out", **HOW | {"log": log})
    assert counts == [1, 2]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_folder_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output"), RunFolder(tmp_path / place):
        pass

"""A report's figures are scipy's; its table, warnings and pictures say what the results hold."""

import dataclasses
import io
import json
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from cifar_fast import Dataset, Recipe, fit, make_report
from cifar_fast.cli.main import main
from cifar_fast.data.synthetic import PATTERNS, textures
from cifar_fast.training.metrics import EpochRow, Run
from cifar_fast.training.results import Result
from cifar_fast.training.run_folder import Output
from cifar_fast.utils.progress import lines_to
from tests.helpers import cells, contents

pytestmark = pytest.mark.usefixtures("no_curves")

ACCURACIES = {"a": [93.1, 93.7, 93.4, 93.9], "b": [94.2, 94.0, 94.9], "c": [93.0]}


def made_up(accuracies, *, epochs=2, dataset="cifar10", device="A10", also=None, **recipe):
    """A result whose runs end with ``accuracies``, having had 10 less and twice the loss an epoch before."""
    rows, runs = [], []
    for run, accuracy in enumerate(accuracies):
        for epoch in range(1, epochs + 1):
            left = epochs - epoch
            rows.append(EpochRow(run, epoch, accuracy / 100 * 2**left, accuracy - 1, accuracy - 10 * left, epoch, 0.1))
        runs.append(
            Run(run, run, None, None, None, accuracy, 10.0 + run**2, 1.0, 0.2, {"other": accuracy / 2} if also else {})
        )
    facts = {"name": dataset, "digest": dataset * 9, "train_images": 9, "test_images": 9, "class_names": ["x"]}
    return Result(
        Recipe(epochs=epochs, **recipe), {"device_name": device}, "eager", "float32", "contiguous_format", [], facts,
        {"runs": len(runs)}, rows, runs, [0.0], [1.0], {"w": torch.zeros(1)},
    )  # fmt: skip


def write(folder, result):
    """What a training that gave ``result`` writes to ``folder``; gives its path as text."""
    with Output(folder) as output:
        for row in result.rows:
            output.add(row)
        output.finish(result, np.zeros(0, int))
    return str(folder)


@pytest.fixture
def no_pictures(monkeypatch):
    """What takes longest, where nobody looks at it."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **how: path.touch())


@pytest.fixture
def folders(tmp_path):
    return [write(tmp_path / name, made_up(values, also=True)) for name, values in ACCURACIES.items()]


def reported(tmp_path, *flags):
    """What ``report.json`` holds after the command with ``flags``, the variants by their names."""
    assert main(["report", *flags, "--output", str(tmp_path / "report")]) == 0
    found = json.loads((tmp_path / "report/report.json").read_text())
    return found | {"variants": {one["name"]: one for one in found["variants"]}}


@pytest.mark.parametrize("baseline", ["a", "b"])
def test_the_figures_are_scipys(tmp_path, folders, no_pictures, baseline):
    flags = ["--baseline", "b"] if baseline == "b" else []  # the first where none is named
    found = reported(tmp_path, *folders, *flags)
    assert found["baseline"] == baseline and list(found["variants"]) == ["a", "b", "c"]
    base = ACCURACIES[baseline]
    for name, values in ACCURACIES.items():
        one = found["variants"][name]
        assert (one["n"], one["values"], one["mean"]) == (len(values), values, pytest.approx(np.mean(values)))
        if len(values) > 1:
            assert one["std"] == pytest.approx(stats.tstd(values))
            interval = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
            assert one["ci95"] == pytest.approx(interval, rel=1e-5)
        if name != baseline:
            assert one["difference"] == pytest.approx(np.mean(values) - np.mean(base))
        if name != baseline and len(values) > 1:
            welch = stats.ttest_ind(values, base, equal_var=False)
            assert one["welch_p"] == pytest.approx(welch.pvalue)
            assert one["difference_ci95"] == pytest.approx(list(welch.confidence_interval()))
    absent = [found["variants"]["c"][key] for key in ("std", "ci95", "difference_ci95", "welch_p")]
    absent += [found["variants"][baseline][key] for key in ("difference", "difference_ci95", "welch_p")]
    assert absent == [None] * 7
    assert found["variants"]["a"]["train_seconds_median"] == 12.5


def test_the_table_has_a_line_for_each_variant_and_a_dash_for_what_does_not_exist(folders, capfd):
    assert main(["report", *folders]) == 0
    lines = capfd.readouterr().out.splitlines()
    rows = cells(lines[:5])
    assert [len(line) for line in rows] == [10] * 5 and set("".join(rows[1])) == {"-", ":"}
    welch = stats.ttest_ind(ACCURACIES["b"], ACCURACIES["a"], equal_var=False)
    low, high = welch.confidence_interval()
    assert rows[2] == ["a", "-", "4", "93.53", "0.35", "92.97 to 94.08", "-", "-", "-", "12.50"]
    assert rows[3][6:9] == ["+0.84", f"{low:+.2f} to {high:+.2f}", f"{welch.pvalue:.2g}"]
    assert rows[4] == ["c", "-", "1", "93.00", "-", "-", "-0.53", "-", "-", "10.00"]
    assert not any(line.startswith("Warning") for line in lines)


@pytest.mark.parametrize(
    ("metric", "of"),
    [
        ("train_accuracy", lambda accuracy: accuracy - 1),
        ("train_loss", lambda accuracy: accuracy / 100),
        ("other", lambda accuracy: accuracy / 2),
    ],
)
def test_another_metric(tmp_path, folders, no_pictures, metric, of):
    found = reported(tmp_path, *folders, "--metric", metric)
    assert found["metric"] == metric
    for name, values in ACCURACIES.items():
        assert found["variants"][name]["values"] == pytest.approx([of(value) for value in values])


def test_an_interval_of_losses_is_not_cut_off_as_one_of_accuracies_is():
    losses = make_report({"a": made_up([90.0, 30000.0])}, metric="train_loss").variants[0]
    accuracies = make_report({"a": made_up([90.0, 99.0])}).variants[0]
    assert losses.ci95[1] > 1000 and accuracies.ci95[1] == 100


def test_runs_without_any_spread_have_a_difference_and_no_p():
    one = make_report({"a": made_up([100.0, 100.0]), "b": made_up([99.0, 99.0])}).variants[1]
    assert (one.difference, one.difference_ci95, one.welch_p) == (-1.0, None, None)


def test_another_model_is_told_in_a_line():
    other = dataclasses.replace(made_up([90.0]), model="MyNet")
    report = make_report({"a": made_up([90.0]), "b": other})
    assert report.warnings == ["different models: the recipe's network (a); MyNet (b)"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dict(dataset="cifar100"), "different data sets: cifar10 (cifar10cifar) (a); cifar100 (cifar100cifa) (b)"),
        (dict(epochs=3), "different epochs: 2 (a); 3 (b)"),
        (dict(device="T4"), "different devices: A10 (a); T4 (b)"),
    ],
)
def test_what_is_not_alike_is_told_in_a_line(tmp_path, capfd, other, words):
    paths = [write(tmp_path / name, made_up([90.0], **how)) for name, how in {"a": {}, "b": other}.items()]
    assert main(["report", *paths]) == 0
    assert [line for line in capfd.readouterr().out.splitlines() if "Warning" in line] == [f"Warning: {words}"]


def test_what_a_variant_changes_stands_beside_its_name(tmp_path, capfd):
    a, b = (write(tmp_path / name, made_up([90.0], momentum=momentum)) for name, momentum in (("a", 0.9), ("b", 0.8)))
    assert main(["report", a, b]) == 0
    assert "| b       | momentum 0.8 |" in capfd.readouterr().out


def test_folders_of_one_name_are_told_by_their_paths_and_none_is_taken_twice(tmp_path, capfd):
    paths = [write(tmp_path / place / "same", made_up([90.0])) for place in ("x", "y")]
    assert main(["report", *paths, "--baseline", paths[1]]) == 0
    assert f"| {paths[0]} |" in capfd.readouterr().out
    assert main(["report", paths[0], paths[0]]) == 2
    assert f"{paths[0]} is given twice" in capfd.readouterr().err


def test_a_sweeps_folder_stands_for_its_variants_in_their_order(tmp_path, no_pictures, capfd):
    for name in ("z", "a"):
        write(tmp_path / "sweep" / name, made_up([90.0]))
    (tmp_path / "sweep/sweep.json").write_text('{"variants": {"z": {}, "late": {}, "a": {}}}')
    found = reported(tmp_path, str(tmp_path / "sweep"))
    assert list(found["variants"]) == ["z", "a"]
    assert capfd.readouterr().err == "late has no run that has ended, and is left out\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{folder}/a --baseline z", "there is no variant 'z' for a baseline; there are a"),
        (
            "{folder}/a --metric zzz",
            "a: there is no metric 'zzz'; there are test_accuracy, train_accuracy, train_loss, other",
        ),
        ("{folder}/none", "none: holds no summary.json; name the folder of a training that has ended, or of a sweep"),
        ("{folder}/a {folder}/damaged", "damaged: the results there cannot be read (Expecting value"),
        ("{folder}/sweep", "sweep.json: cannot be read ("),
        ("", "the following arguments are required: DIR"),
        ("{folder}/a --output {folder}/a/model.pt", "model.pt is not a directory"),
    ],
)
def test_what_cannot_be_reported_is_one_line_and_exit_code_2_and_writes_nothing(tmp_path, folders, capfd, flags, words):
    write(tmp_path / "damaged", made_up([90.0]))
    (tmp_path / "damaged/summary.json").write_text("")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text("{}")
    output = [] if "--output" in flags else ["--output", f"{tmp_path}/report"]
    assert main(["report", *flags.format(folder=tmp_path).split(), *output]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1
    assert shown.out == "" and not (tmp_path / "report").exists()


def test_without_scipy_a_line_says_so_before_anything_is_read(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert main(["report", "none"]) == 2
    assert capfd.readouterr().err == "error: a report needs scipy: pip install 'cifar_fast[report]'\n"


def test_the_files_of_a_report(tmp_path, folders, capfd):
    reported(tmp_path, *folders)
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["report-curves.png", "report-variants.png", "report.json", "report.md"]
    page = (tmp_path / "report/report.md").read_text()
    assert capfd.readouterr().out in page and all(f"]({name})" in page for name in names[:2])
    for name in names[:2]:
        with Image.open(tmp_path / "report" / name) as image:
            image.load()
            assert image.format == "PNG" and len(image.getcolors(1 << 22)) > 10


def test_the_pictures_show_runs_intervals_and_bands():
    before = dict(matplotlib.rcParams)
    results = {"a": made_up([90.0, 92.0]), "b": made_up([80.0])}
    report = make_report(results)
    (axes,) = report.variants_figure().axes
    points = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) > 1]
    assert points[0] == [90, 92] and [80] in [list(line.get_ydata()) for line in axes.lines]
    bars = [segment[:, 1].tolist() for collection in axes.collections for segment in collection.get_segments()]
    assert bars == [pytest.approx(report.variants[0].ci95)], "one run alone has no interval"
    (axes,) = report.curves_figure().axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[81, 91], [70, 80]]
    (band,) = axes.collections
    assert set(band.get_paths()[0].vertices[:, 1]) == {80, 82, 90, 92}
    assert dict(matplotlib.rcParams) == before


def test_a_name_with_dollar_signs_is_no_formula():
    report = make_report({r"$\none$": made_up([90.0]), "b": made_up([80.0])})
    for figure in (report.variants_figure(), report.curves_figure()):
        figure.savefig(svg := io.StringIO(), format="svg")  # a formula that is none is an error
        assert "<svg" in svg.getvalue()


@pytest.mark.slow  # four trainings, and all pictures
def test_a_small_sweep_through_both_commands_interrupted_in_the_middle(tmp_path, monkeypatch, capfd):
    data = Dataset("npz", "textures.npz", *textures(1000, seed=0), *textures(200, seed=1), tuple(PATTERNS))
    data.save(tmp_path / "textures.npz")  # the synthetic data set, a tenth of it
    (tmp_path / "spec.toml").write_text(f"""
        dataset = "npz"
        data_dir = "{tmp_path}/textures.npz"
        output = "{tmp_path}/sweep"
        runs = 2
        backend = "eager"
        device = "cpu"
        dtype = "float32"
        [recipe]
        epochs = 2
        widths = [6]
        batch_size = 100
        [variants.plain]
        [variants.no-cutout]
        cutout_size = 0
    """)

    def stop(line):
        if line.startswith("no-cutout: epoch  2"):
            raise KeyboardInterrupt

    with lines_to(stop):
        assert main(["sweep", f"{tmp_path}/spec.toml"]) == 130
    assert main(["sweep", f"{tmp_path}/spec.toml"]) == 0
    found = reported(tmp_path, f"{tmp_path}/sweep")
    how = dict(backend="eager", device="cpu", dtype="float32", runs=2, log=None)
    recipe = Recipe(epochs=2, widths=(6,), batch_size=100, cutout_size=0)
    fit(recipe, data, output=tmp_path / "alone", **how)
    assert contents(tmp_path / "sweep/no-cutout", "data_source") == contents(tmp_path / "alone", "data_source")
    runs = json.loads((tmp_path / "alone/summary.json").read_text())["runs"]
    one = found["variants"]["no-cutout"]
    assert one["values"] == [run["test_accuracy"] for run in runs] and one["changes"] == "cutout_size 0"
    assert one["difference_ci95"][0] < one["difference"] < one["difference_ci95"][1]
    assert found["variants"]["plain"]["n"] == 2 and found["warnings"] == []

"""``cifar-fast report``: statistics equal scipy's, and table, warnings and figures agree with the results."""

import dataclasses
import io
import json
import shutil
import sys

import matplotlib
import numpy as np
import pytest
import torch
from cycler import cycler
from matplotlib.colors import to_hex
from PIL import Image
from scipy import stats

from cifar_fast import Dataset, Recipe, fit, make_report
from cifar_fast.cli.main import main
from cifar_fast.data.synthetic import PATTERNS, textures
from cifar_fast.experiments.report import Report
from cifar_fast.training.config import TrainConfig
from cifar_fast.training.metrics import DivergedRun, EpochRow, Run
from cifar_fast.training.results import DivergedResult, Result, RunResult
from cifar_fast.training.run_folder import RunFolder
from cifar_fast.utils.device import AFFECTS_FIGURES
from cifar_fast.utils.progress import lines_to
from cifar_fast.utils.seeds import Seeds
from tests.helpers import cells, contents

pytestmark = pytest.mark.usefixtures("no_curves")

ACCURACIES = {"a": [93.1, 93.7, 93.4, 93.9], "b": [94.2, 94.0, 94.9], "c": [93.0]}


def made_up(accuracies, *, epochs=2, dataset="cifar10", device="A10", also=None, first_seed=0, fixed=(), **recipe):
    """Return a result whose runs end with ``accuracies``; an epoch earlier they have 10 less and twice the loss."""
    config = TrainConfig(
        recipe=Recipe(epochs=epochs, **recipe), backend="eager", dtype="float32", memory_format="contiguous_format",
        runs=len(accuracies),
    )  # fmt: skip
    environment, runs = dict.fromkeys(AFFECTS_FIGURES) | {"device_name": device}, []
    for index, accuracy in enumerate(accuracies):
        rows = []
        for epoch in range(1, epochs + 1):
            left = epochs - epoch
            numbers = accuracy / 100 * 2**left, accuracy - 1, None, None, accuracy, accuracy - 10 * left
            rows.append(EpochRow(index, epoch, *numbers, epoch, 0.1))
        also_test = {"other": accuracy / 2} if also else {}
        seeds = Seeds(first_seed, *fixed).for_run(index)
        run = Run(index, *dataclasses.astuple(seeds), accuracy, 10.0 + index**2, 1.0, 0.2, also_test)
        runs.append(RunResult(run, rows, "eager", [{"first_epoch": 1} | environment], [[1]]))
    metadata = {"name": dataset, "digest": dataset * 9, "train_images": 9, "validation_images": 0, "test_images": 9}
    metadata["source"] = dataset
    metadata |= {"class_names": ["x"], "also_test": {}, "options": {}}
    weights = {"w": torch.zeros(1)}
    return Result(config, environment, [], metadata, [0.0] * 3, [1.0] * 3, [], None, 1, {}, runs, weights)


def write(folder, result):
    """Write the files of a training with this result to ``folder`` and return its path as a string."""
    with RunFolder(folder) as output:
        output.begin(result)
        for run in result.ended:
            with output.run_lock(run.run.run):
                for row in run.rows:
                    output.add_row(row)
                output.finish_run(result, run)
        output.finish(result, np.zeros(0, int))
    return str(folder)


@pytest.fixture
def no_figures(monkeypatch):
    """Skip drawing, the slowest part, in tests that do not look at the figures."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **how: path.touch())


@pytest.fixture
def folders(tmp_path):
    return [write(tmp_path / name, made_up(values, also=True)) for name, values in ACCURACIES.items()]


def report_json(tmp_path, *flags):
    """Run the command with ``flags`` and return the content of ``report.json``, with the variants by name."""
    assert main(["report", *flags, "--output", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    return report | {"variants": {variant["name"]: variant for variant in report["variants"]}}


@pytest.mark.parametrize("baseline", ["a", "b"])
def test_statistics_equal_scipys(tmp_path, folders, no_figures, baseline):
    flags = ["--baseline", "b"] if baseline == "b" else []  # the default is the first variant
    report = report_json(tmp_path, *folders, *flags)
    assert report["baseline"] == baseline and list(report["variants"]) == ["a", "b", "c"]
    base = ACCURACIES[baseline]
    for name, values in ACCURACIES.items():
        variant = report["variants"][name]
        assert (variant["n"], variant["values"], variant["mean"]) == (
            len(values),
            values,
            pytest.approx(np.mean(values)),
        )
        if len(values) > 1:
            assert variant["std"] == pytest.approx(stats.tstd(values))
            interval = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
            assert variant["ci95"] == pytest.approx(interval, rel=1e-5)
        if name != baseline:
            assert variant["difference"] == pytest.approx(np.mean(values) - np.mean(base))
        if name != baseline and len(values) > 1:
            welch = stats.ttest_ind(values, base, equal_var=False)
            assert variant["welch_p"] == pytest.approx(welch.pvalue)
            assert variant["difference_ci95"] == pytest.approx(list(welch.confidence_interval()))
    absent = [report["variants"]["c"][key] for key in ("std", "ci95", "difference_ci95", "welch_p")]
    absent += [report["variants"][baseline][key] for key in ("difference", "difference_ci95", "welch_p")]
    assert absent == [None] * 7
    assert report["variants"]["a"]["train_seconds_median"] == 12.5


def test_table_has_a_line_per_variant_and_a_dash_for_missing_statistics(folders, capfd):
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
def test_report_of_another_metric(tmp_path, folders, no_figures, metric, of):
    report = report_json(tmp_path, *folders, "--metric", metric)
    assert report["metric"] == metric
    for name, values in ACCURACIES.items():
        assert report["variants"][name]["values"] == pytest.approx([of(value) for value in values])


def test_interval_is_limited_to_100_for_accuracies_but_not_for_losses():
    losses = make_report({"a": made_up([90.0, 30000.0])}, metric="train_loss").variants[0]
    accuracies = make_report({"a": made_up([90.0, 99.0])}).variants[0]
    assert losses.ci95[1] > 1000 and accuracies.ci95[1] == 100


def test_runs_without_spread_have_a_difference_but_no_p_value():
    variant = make_report({"a": made_up([100.0, 100.0]), "b": made_up([99.0, 99.0])}).variants[1]
    assert (variant.difference, variant.difference_ci95, variant.welch_p) == (-1.0, None, None)


def test_different_models_give_a_warning():
    other = dataclasses.replace(made_up([90.0]), model="MyNet")
    report = make_report({"a": made_up([90.0]), "b": other})
    assert report.warnings == ["different models: the recipe's network (a); MyNet (b)"]


def test_models_of_one_name_but_different_content_give_a_warning():
    a, b = (dataclasses.replace(made_up([90.0]), model="MyNet", model_digest=letter * 64) for letter in "xy")
    assert make_report({"a": a, "b": b}).warnings == [
        "different models: MyNet (xxxxxxxxxxxx) (a); MyNet (yyyyyyyyyyyy) (b)"
    ]


def with_dataset(seed=0, **facts):
    result = made_up([90.0], also=True, first_seed=seed)
    return dataclasses.replace(result, dataset=result.dataset | facts)


def test_extra_test_sets_of_one_name_but_different_content_give_a_warning(tmp_path, capfd):
    sets = [{"other": {"digest": letter * 64, "images": 7}} for letter in "xyx"]
    a, b, c = (with_dataset(seed, also_test=each) for seed, each in enumerate(sets))
    line = "different test sets other: 7 images, xxxxxxxxxxxx (a, c); 7 images, yyyyyyyyyyyy (b)"
    assert make_report({"a": a, "b": b, "c": c}, metric="other").warnings == [line]
    assert make_report({"a": a, "c": c, "d": made_up([90.0], first_seed=9)}).warnings == []
    paths = [write(tmp_path / name, result) for name, result in {"a": a, "b": b, "c": c}.items()]
    assert main(["report", *paths, "--output", str(tmp_path / "out")]) == 0
    assert f"Warning: {line}\n" in capfd.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["warnings"] == [line]


def test_data_sets_are_compared_by_content_and_class_names():
    renamed, other_names = with_dataset(1, name="folder"), with_dataset(2, class_names=["y"])
    assert make_report({"a": made_up([90.0]), "b": renamed}).warnings == []
    assert make_report({"a": renamed, "b": other_names}).warnings == ["different class names: x (a); y (b)"]


def test_environments_of_all_epochs_are_compared():
    mixed, same = made_up([90.0, 91.0]), made_up([90.0], first_seed=9)
    old = {"device_name": "A10", "cifar_fast": "0.0.1"}
    mixed.run_results[0].environments[:] = [old | {"first_epoch": 1}, old | {"first_epoch": 2, "device_name": "T4"}]
    versions = "different versions of cifar_fast: 0.0.1 and none (a); none (b)"
    assert make_report({"a": mixed, "b": same}).warnings == [versions, "different devices: A10 and T4 (a); A10 (b)"]
    assert make_report({"a": mixed}).warnings == [
        "different versions of cifar_fast: 0.0.1 and none (a)",
        "different devices: A10 and T4 (a)",
    ]
    assert "A10 and T4" in mixed.title()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dict(dataset="cifar100"), "different data sets: cifar10 (cifar10cifar) (a); cifar100 (cifar100cifa) (b)"),
        (dict(epochs=3), "different epochs: 2 (a); 3 (b)"),
        (dict(device="T4"), "different devices: A10 (a); T4 (b)"),
    ],
)
def test_different_settings_give_a_warning(tmp_path, capfd, other, words):
    paths = [write(tmp_path / "a", made_up([90.0])), write(tmp_path / "b", made_up([91.0], **other))]
    assert main(["report", *paths]) == 0
    assert [line for line in capfd.readouterr().out.splitlines() if "Warning" in line] == [f"Warning: {words}"]


def test_table_lists_the_changes_of_each_variant(tmp_path, capfd):
    a, b = (write(tmp_path / name, made_up([90.0], momentum=momentum)) for name, momentum in (("a", 0.9), ("b", 0.8)))
    assert main(["report", a, b]) == 0
    assert "| b       | momentum 0.8 |" in capfd.readouterr().out


def test_folders_with_equal_names_are_listed_by_path(tmp_path, capfd):
    paths = [write(tmp_path / place / "same", made_up([accuracy])) for place, accuracy in (("x", 90.0), ("y", 91.0))]
    assert main(["report", *paths, "--baseline", paths[1]]) == 0
    assert f"| {paths[0]} |" in capfd.readouterr().out


@pytest.mark.parametrize("second", ["a", "./a", "{folder}/a", "link", "sweep/../a", "sweep"])
def test_folder_that_is_given_twice_is_counted_once(tmp_path, capfd, monkeypatch, no_figures, second):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", made_up([90.0, 91.0]))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/a").symlink_to("../a")
    (tmp_path / "sweep/sweep.json").write_text('{"variants": {"a": {}}}')
    report = report_json(tmp_path, "a", second.format(folder=tmp_path))
    assert list(report["variants"]) == ["a"] and report["variants"]["a"]["n"] == 2
    error = capfd.readouterr().err
    assert "is given twice" in error and "counted once" in error and error.count("\n") == 1


def test_runs_of_a_copied_folder_are_counted_once(tmp_path, capfd, no_figures):
    whole = write(tmp_path / "whole", made_up([90.0, 91.0, 92.0]))
    copy = str(shutil.copytree(whole, tmp_path / "copy"))
    more = write(tmp_path / "more", made_up([92.0, 93.0], first_seed=2))
    report = report_json(tmp_path, whole, copy, more)
    assert {name: variant["values"] for name, variant in report["variants"].items()} == {
        "whole": [90.0, 91.0, 92.0],
        "more": [93.0],
    }
    lines = ["copy, seeds 0, 1, 2: equal to the same runs of whole", "more, seed 2: equal to the same runs of whole"]
    assert report["repeated"] == lines
    assert [f"Counted once: {line}" for line in lines] == capfd.readouterr().out.splitlines()[-2:]
    assert report["variants"]["more"]["welch_p"] is None
    assert main(["report", whole, copy, "--baseline", "copy"]) == 2
    assert "(copy, seeds 0, 1, 2: equal to the same runs of whole)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fixed", "recipe", "n"),
    [
        ((1, 2, 3), {}, 1),
        ((1, 2, None), dict(crop_padding=0, flip=False, cutout_size=0), 1),
        ((1, 2, None), {}, 3),
        ((), {}, 3),
    ],
)
def test_runs_with_equal_seeds_are_one_observation(fixed, recipe, n):
    report = make_report({"a": made_up([90.0, 90.5, 91.0], fixed=fixed, **recipe), "b": made_up([80.0, 81.0])})
    assert report.variants[0].n == n and (report.variants[0].ci95 is None) == (n == 1)
    assert report.variants[1].n == 2 and (report.variants[1].welch_p is None) == (n == 1)
    assert report.repeated == (["a, seeds 1, 2: equal to another run of it"] if n == 1 else [])
    assert report.to_dict()["repeated"] == report.repeated


@pytest.mark.parametrize(
    "other",
    [dict(momentum=0.8), dict(dataset="cifar100"), dict(first_seed=5), dict(fixed=(0, 0, 0)), dict(epochs=3)],
)
def test_runs_that_differ_in_seed_settings_or_data_are_two_observations(other):
    report = make_report({"a": made_up([90.0]), "b": made_up([90.0], **other)})
    assert [variant.n for variant in report.variants] == [1, 1] and not report.repeated


def test_seed_counts_for_a_model_that_draws_random_numbers():
    """The dropout of a model of one's own follows the seed of the run."""
    own = dataclasses.replace(made_up([90.0, 91.0], fixed=(1, 2, 3)), model="MyNet")
    assert make_report({"a": own}).variants[0].n == 2


def test_folder_of_a_sweep_means_its_variants_in_order(tmp_path, no_figures, capfd):
    for name, accuracy in (("z", 90.0), ("a", 91.0)):
        write(tmp_path / "sweep" / name, made_up([accuracy]))
    (tmp_path / "sweep/sweep.json").write_text('{"variants": {"z": {}, "late": {}, "a": {}}}')
    report = report_json(tmp_path, str(tmp_path / "sweep"))
    assert list(report["variants"]) == ["z", "a"]
    assert capfd.readouterr().err == "late has no finished run and is left out\n"
    assert report["warnings"] == ["late has no finished run and is left out"]


def without(result, diverged, missing=()):
    """Return ``result`` as if the runs ``diverged`` had diverged at step 7, and those ``missing`` had not ended."""
    lost = [DivergedRun(run, run, None, None, None, 7, 1) for run in diverged]
    kept = [run for run in result.run_results if run.run.run not in (*diverged, *missing)]
    return result.with_runs(
        [*kept, *(DivergedResult(run, [], "eager", [{"first_epoch": 1, "device_name": "A10"}]) for run in lost)]
    )


def test_report_names_the_runs_that_diverged_or_are_missing(tmp_path, capfd, no_figures):
    results = {"a": made_up([93.0, 93.2, 93.4, 93.6]), "b": without(made_up([94.0] * 4), [1, 2], [3])}
    paths = [write(tmp_path / name, result) for name, result in results.items()]
    report = report_json(tmp_path, *paths)
    a, b = report["variants"].values()
    assert (a["n"], a["diverged"], a["missing"]) == (4, [], [])
    assert (b["n"], b["values"], b["welch_p"], b["ci95"]) == (1, [94.0], None, None)
    assert [(run["seed"], run["step"]) for run in b["diverged"]] == [(1, 7), (2, 7)]
    assert b["missing"] == [{"run": 3, "seed": 3}]
    line = "b: 1 of 4 runs have finished; diverged: seed 1 at step 7, seed 2 at step 7; missing: seed 3"
    assert report["warnings"] == [line]
    for text in (capfd.readouterr().out, (tmp_path / "report/report.md").read_text()):
        assert f"Warning: {line}\n" in text and [row[2] for row in cells(text.splitlines())[2:]] == ["4", "1 of 4"]


@pytest.mark.parametrize("baseline", ["a", "b"])
def test_variant_of_which_all_runs_diverged_is_in_the_table(baseline):
    results = {"a": made_up([93.0, 93.2]), "b": without(made_up([94.0] * 2), [0, 1])}
    report = make_report(results, baseline=baseline)
    b = report.variants[1]
    assert (b.n, b.mean, b.difference, b.train_seconds_median, len(b.diverged)) == (0, None, None, None, 2)
    assert cells(report.markdown().splitlines())[3][2:] == ["0 of 2"] + ["-"] * 7
    for figure in (report.variants_figure(), report.curves_figure()):
        figure.savefig(io.BytesIO())


def test_damaged_results_cost_no_others(tmp_path, folders, capfd, no_figures):
    """A training, a sweep and a run are damaged."""
    write(tmp_path / "damaged", made_up([90.0]))
    (tmp_path / "damaged/training.json").write_text("")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text("{}")
    (tmp_path / "b/run-1/result.json").write_text("{")
    (tmp_path / "empty").mkdir()
    names = ("a", "damaged", "sweep", "empty", "b")
    assert main(["report", *(f"{tmp_path}/{name}" for name in names), "--output", f"{tmp_path}/report"]) == 1
    output, error = capfd.readouterr()
    assert [row[:3] for row in cells(output.splitlines())[2:]] == [["a", "-", "4"], ["b", "-", "2 of 3"]]
    for line, words in zip(
        error.splitlines(),
        ["damaged: training.json cannot", "sweep.json: cannot", "empty: holds no", "b: run-1/result.json cannot"],
        strict=True,
    ):
        assert line.startswith("error: ") and words in line
        assert words in output, "the table alone would not tell it"
    warnings = json.loads((tmp_path / "report/report.json").read_text())["warnings"]
    assert len(warnings) == 5 and "b: 2 of 3 runs have finished; missing: seed 1" in warnings


def test_variant_that_was_not_tested_on_the_metric_costs_no_other(tmp_path, capfd):
    results = {"a": made_up([90.0], also=True), "b": made_up([91.0])}
    report = make_report(results, metric="other")
    assert [variant.n for variant in report.variants] == [1, 0] and "b: was not tested on other" in report.warnings


def test_table_is_printed_even_if_a_file_cannot_be_written(tmp_path, folders, capfd, monkeypatch):
    monkeypatch.setattr(Report, "variants_figure", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["report", *folders, "--output", f"{tmp_path}/report"])
    assert "| variant |" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{folder}/a --baseline z", "--baseline 'z' is not a variant; the variants are a"),
        (
            "{folder}/a --metric zzz",
            "--metric 'zzz' does not exist; the choices are "
            "test_accuracy, train_accuracy, test_loss, train_loss, other",
        ),
        ("{folder}/none", "none: holds no training.json; choose the folder of a training, or of a sweep"),
        ("{folder}/a {folder}/none", "none: holds no training.json; choose the folder of a training, or of a sweep"),
        ("{folder}/damaged", "damaged: training.json cannot be read (Expecting value"),
        ("{folder}/sweep", "sweep.json: cannot be read ("),
        ("", "the following arguments are required: DIR"),
        ("{folder}/a --output {folder}/a/model.pt", "model.pt is not a directory"),
    ],
)
def test_bad_input_prints_one_line_exits_with_2_and_writes_nothing(tmp_path, folders, capfd, flags, words):
    write(tmp_path / "damaged", made_up([90.0]))
    (tmp_path / "damaged/training.json").write_text("")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text("{}")
    output = [] if "--output" in flags else ["--output", f"{tmp_path}/report"]
    assert main(["report", *flags.format(folder=tmp_path).split(), *output]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1
    assert shown.out == "" and not (tmp_path / "report").exists()


def test_missing_scipy_is_reported_before_anything_is_read(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert main(["report", "none"]) == 2
    assert capfd.readouterr().err == "error: a report needs scipy: pip install 'cifar_fast[report]'\n"


def test_report_writes_its_four_files(tmp_path, folders, capfd):
    report_json(tmp_path, *folders)
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["report-curves.png", "report-variants.png", "report.json", "report.md"]
    page = (tmp_path / "report/report.md").read_text()
    assert capfd.readouterr().out in page and all(f"]({name})" in page for name in names[:2])
    for name in names[:2]:
        with Image.open(tmp_path / "report" / name) as image:
            image.load()
            assert image.format == "PNG" and len(image.getcolors(1 << 22)) > 10


def test_figures_show_runs_intervals_and_bands():
    before = dict(matplotlib.rcParams)
    results = {"a": made_up([90.0, 92.0]), "b": made_up([80.0])}
    report = make_report(results)
    (axes,) = report.variants_figure().axes
    points = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) > 1]
    assert points[0] == [90, 92] and [80] in [list(line.get_ydata()) for line in axes.lines]
    bars = [segment[:, 1].tolist() for collection in axes.collections for segment in collection.get_segments()]
    assert bars == [pytest.approx(report.variants[0].ci95)], "a single run has no interval"
    (axes,) = report.curves_figure().axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[81, 91], [70, 80]]
    (band,) = axes.collections
    assert len(band.get_edgecolor()) and band.get_linewidth()[0] > 0, "an outline tells overlapping bands apart"
    assert set(band.get_paths()[0].vertices[:, 1]) == {80, 82, 90, 92}
    assert dict(matplotlib.rcParams) == before


def test_figures_of_many_variants_have_different_colors_and_a_legend_beside_the_axes():
    report = make_report(
        {f"variant-{i:02}": made_up([90.0 + i / 8, 91.0 + i / 8], first_seed=9 * i) for i in range(30)}
    )
    for figure in (report.variants_figure(), report.curves_figure()):
        (axes,) = figure.axes
        drawn = {to_hex(line.get_color()) for line in axes.lines if len(line.get_ydata()) > 1}
        assert len(drawn) == 30 and axes.get_legend() is None
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 30
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert figure.bbox.x1 >= legend.get_window_extent().x1 and figure.bbox.y0 <= legend.get_window_extent().y0


def test_figures_follow_the_callers_parameters_and_embed_truetype_fonts():
    report = make_report({"a": made_up([90.0, 92.0]), "b": made_up([80.0])})
    with matplotlib.rc_context({"axes.facecolor": "black", "axes.prop_cycle": cycler(color=["#ff0000", "#00ff00"])}):
        for figure in (report.variants_figure(), report.curves_figure()):
            assert to_hex(figure.axes[0].get_facecolor()) == "#000000"
            assert to_hex(figure.axes[0].lines[0].get_color()) == "#ff0000"
            figure.savefig(pdf := io.BytesIO(), format="pdf")
            assert b"/FontFile2" in pdf.getvalue() and b"/Type3" not in pdf.getvalue()


def test_different_seeding_schemes_and_threads_give_a_warning():
    a, b = made_up([90.0, 92.0]), made_up([80.0, 81.0], fixed=(5,))
    b = dataclasses.replace(b, config=b.config.replace(init_seed=5))
    for run in b.run_results:
        run.environments[0]["threads"] = 4
    assert make_report({"a": a, "b": b}).warnings == [
        "different seeding schemes: one stream from the seed of each run (a); init_seed 5 (b)",
        "different numbers of CPU threads: none (a); 4 (b)",
    ]


def test_curves_include_runs_that_were_stopped_early():
    result = made_up([90.0, 92.0])
    result.run_results[1].rows.pop()
    (axes,) = make_report({"a": result}, metric="train_loss").curves_figure().axes
    assert list(axes.lines[0].get_ydata()) == [pytest.approx(1.82), 0.9]


def test_dollar_signs_in_a_name_are_not_typeset_as_a_formula():
    report = make_report({r"$\none$": made_up([90.0]), "b": made_up([80.0])})
    for figure in (report.variants_figure(), report.curves_figure()):
        figure.savefig(svg := io.StringIO(), format="svg")  # an invalid formula would be an error
        assert "<svg" in svg.getvalue()


@pytest.mark.slow  # four trainings, and all figures
def test_interrupted_sweep_and_report_by_command_equal_separate_trainings(tmp_path, monkeypatch, capfd):
    data = Dataset("npz", "textures.npz", *textures(1000, seed=0), *textures(200, seed=1), tuple(PATTERNS))
    data.save(tmp_path / "textures.npz")  # a tenth of the synthetic data set
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
    report = report_json(tmp_path, f"{tmp_path}/sweep")
    how = dict(backend="eager", device="cpu", dtype="float32", runs=2, log=None)
    recipe = Recipe(epochs=2, widths=(6,), batch_size=100, cutout_size=0)
    fit(recipe, data, output=tmp_path / "alone", **how)
    assert contents(tmp_path / "sweep/no-cutout", "data_source") == contents(tmp_path / "alone", "data_source")
    runs = json.loads((tmp_path / "alone/summary.json").read_text())["runs"]
    variant = report["variants"]["no-cutout"]
    assert variant["values"] == [run["test_accuracy"] for run in runs] and variant["changes"] == "cutout_size 0"
    assert variant["difference_ci95"][0] < variant["difference"] < variant["difference_ci95"][1]
    assert report["variants"]["plain"]["n"] == 2 and report["warnings"] == []

"""The run of the benchmarks: its rows, its files, how it resumes, and the report."""

import json
import time

import pytest

import benchmarks.run
from benchmarks.__main__ import main
from benchmarks.parts import CPU_ROUNDS, Bench, Skip, norms, time_steps
from benchmarks.report import RESULTS, pivot, write_report
from benchmarks.rows import Row, ratio, rows_of
from benchmarks.run import run
from benchmarks.timing import interleave
from cifar_fast import InputError, Recipe
from cifar_fast.backends.select import resolve_backend
from cifar_fast.diagnostics.kernel_cases import WrongResult
from tests.helpers import NARROW, cells, small_dataset


def test_row_shows_median_and_range_and_ratios_pair_the_turns():
    a, b = (Row("steps", "step", side, "time", "s", values) for side, values in (("a", [1, 4, 2]), ("b", [2, 4, 1])))
    assert str(a) == "2 (1 to 4)" and str(Row("p", "c", "s", "m", "u", [12345.6])) == "12,346"
    assert ratio(a, b) == "1 (0.5 to 2)"


def test_report_pivots_sides_and_metrics_and_compares_with_auto():
    rows = [
        Row("cpu", "step", "reference, restated", "time", "s", [4.0, 6.0]),
        Row("cpu", "step", "auto", "time", "s", [2.0, 2.0]),
        Row("cpu", "step", "auto", "rate", "images/s", [256.0, 256.0]),
    ]
    lines = cells(pivot(rows).splitlines())
    assert lines[0] == ["case", "side", "time, s", "rate, images/s", "times auto"]
    assert lines[2] == ["step", "reference, restated", "5 (4 to 6)", "-", "2.5 (2 to 3)"]
    assert lines[3][3:] == ["256 (256 to 256)", "1 (1 to 1)"]


def test_sides_take_turns_and_the_first_round_is_dropped():
    seen, times = [], iter(range(100))
    sides = {name: lambda name=name: seen.append(name) or next(times) for name in "ab"}
    assert interleave(sides, rounds=3) == {"a": [2, 4, 6], "b": [3, 5, 7]}
    assert seen == list("abababab")
    assert len(interleave(sides, rounds=9, enough=lambda: True)["a"]) == 2


@pytest.fixture
def parts(monkeypatch):
    """Replace the parts by parts that take no time. Return them, and the list of those that ran."""
    ran = []

    def part(name):
        def gives(bench):
            ran.append(name)
            yield Row(name, "case", "side", "time", "s", [1.0])

        return gives

    made = {name: part(name) for name in ("ceilings", "parity", "steps", "kernels")}
    monkeypatch.setattr(benchmarks.run, "PARTS", made)
    return made, ran


def start(tmp_path, only=("steps", "kernels"), minutes=5, settings=None):
    recipe, small = Recipe(batch_size=16, widths=NARROW), small_dataset()
    deadline = time.perf_counter() + 60 * minutes
    bench = Bench(recipe, small, False, resolve_backend("auto", "cpu", "float32"), deadline, None, [])
    default = {"dtype": "float32", "dataset": small.metadata(), "recipe": {}}
    code = run(tmp_path, bench, settings or default, list(only))
    return code, json.loads((tmp_path / "results.json").read_text())


def test_parts_that_fail_or_cannot_run_are_reported_and_the_rest_runs(tmp_path, parts, capsys):
    made, _ = parts

    def cannot(bench):
        raise Skip("no GPU")
        yield

    def fails(bench):
        raise WrongResult("y is off")
        yield

    made |= {"trainings": cannot, "memory": fails}
    code, results = start(tmp_path, ["trainings", "memory", "steps"])
    assert code == 1 and results["parts"]["trainings"]["skipped"] == "no GPU"
    assert results["parts"]["memory"]["failed"] == "WrongResult: y is off" and results["parts"]["steps"]["rows"]
    assert "memory: WrongResult: y is off" in capsys.readouterr().out
    text = (tmp_path / "results.md").read_text()
    assert "Not measured: trainings (no GPU); memory (WrongResult: y is off)." in text and "## Steps" in text


def test_run_resumes(tmp_path, parts):
    made, ran = parts
    made["steps"] = lambda bench: (_ for _ in ()).throw(RuntimeError("a cable"))
    assert start(tmp_path)[0] == 1
    made["steps"] = lambda bench: iter([Row("steps", "case", "side", "time", "s", [2.0])])
    code, results = start(tmp_path)
    assert code == 0 and ran == ["ceilings", "parity", "kernels", "kernels"]
    assert {row.part for row in rows_of(results)} == {"ceilings", "parity", "steps", "kernels"}


def test_nothing_is_measured_if_parity_fails(tmp_path, parts):
    made, ran = parts
    made["parity"] = lambda bench: (_ for _ in ()).throw(RuntimeError("past the tolerance"))
    code, results = start(tmp_path)
    assert code == 1 and ran == ["ceilings"] and set(results["parts"]) == {"ceilings", "parity"}


def test_kernels_keep_earlier_rows_after_a_failure_and_a_wrong_result_is_exit_code_1(tmp_path, parts):
    made, _ = parts

    def fails_later(bench):
        yield Row("kernels", "norm", "fused", "in a loop", "us", [1.0])
        raise RuntimeError("out of memory")

    made["kernels"] = fails_later
    code, results = start(tmp_path)
    assert code == 1 and results["parts"]["kernels"]["failed"] == "RuntimeError: out of memory"
    made["kernels"] = lambda bench: iter([Row("kernels", "pool", "fused", "wrong: y is off", "", [])])
    code, results = start(tmp_path)
    assert code == 1 and [row["case"] for row in results["parts"]["kernels"]["rows"]] == ["norm", "pool"]
    assert "pool, fused: wrong: y is off" in (tmp_path / "results.md").read_text()


def test_data_flags_without_a_data_set_mean_cifar10(tmp_path, capsys):
    flags = f"--output {tmp_path}/out --data-url {tmp_path}/none.tar.gz --batch-size 20000"  # too large for synthetic
    assert main(["run", *flags.split()]) == 2
    assert "none.tar.gz" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_part_begins_without_minutes_left(tmp_path, parts, capsys):
    _, ran = parts
    assert start(tmp_path, minutes=0)[0] == 0
    assert ran == ["ceilings", "parity"] and "no minutes left" in capsys.readouterr().out


def test_results_of_other_settings_are_refused(tmp_path, parts):
    start(tmp_path)
    with pytest.raises(InputError, match="results of another machine, version or setting"):
        start(tmp_path, settings={"dtype": "bfloat16"})


def test_steps_of_a_backend_are_timed(monkeypatch):
    """A turn is three steps, which is less than an epoch."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    recipe, small = Recipe(batch_size=8, widths=NARROW), small_dataset(train=40)
    bench = Bench(recipe, small, False, resolve_backend("auto", "cpu", "float32"), time.perf_counter() + 60, None, [])
    assert list(bench.backends) == ["eager", "auto"]
    assert [len(values) for values in time_steps(bench, bench.backends, rounds=2).values()] == [2, 2]


def norm_rows():
    copy = Row("ceilings", "copy", "device", "bandwidth", "GB/s", [10.0])
    recipe = Recipe(batch_size=4, widths=NARROW)
    config = resolve_backend("eager", "cpu", "float32")
    return list(norms(Bench(recipe, small_dataset(), False, config, time.perf_counter() + 60, None, [copy])))


def test_norms_of_a_step_are_timed_in_turn_with_eager(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = {(row.case, row.side, row.metric): row.values for row in norm_rows()}
    for dtype in ("float32", "bfloat16"):
        case = f"8 norms, forward + backward, {dtype}"
        fused, eager = (rows[case, side, "time"] for side in ("fused", "eager"))
        assert len(fused) == CPU_ROUNDS >= 5
        assert rows[case, "fused", "of eager's time"] == pytest.approx([100 * a / b for a, b in zip(fused, eager)])
        assert rows[case, "fused", "our bytes"] and rows[case, "fused", "of a copy's rate"]


def test_norms_are_not_timed_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Skip, match="no compiled kernels for float32: TRITON_INTERPRET=1 is set"):
        norm_rows()


@pytest.mark.nightly  # a comparison and thirteen processes
def test_command_measures_a_cpu(tmp_path):
    flags = f"run --device cpu --output {tmp_path} --widths {' '.join(map(str, NARROW))} --batch-size 64 --minutes 9"
    assert main(f"{flags} --only cpu steps sweeps trainings".split()) == 0
    rows = rows_of(json.loads((tmp_path / "results.json").read_text()))
    assert {"ceilings", "floors", "parity", "cpu", "steps", "profile", "sweeps"} == {row.part for row in rows}
    assert (tmp_path / "steps.png").exists() and "## Steps" in (tmp_path / "results.md").read_text()


def test_stored_reports_match_the_stored_rows(tmp_path):
    files = sorted(RESULTS.glob("*/results.json"))
    assert files
    for file in files:
        (tmp_path / "results.json").write_text(file.read_text())
        write_report(tmp_path)
        assert (tmp_path / "results.md").read_text() == (file.parent / "results.md").read_text(), file

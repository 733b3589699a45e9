"""The suite as a resumable list of parts, and the tables made of its results."""

import json
import time

import pytest
import torch
from cifar_fast.choose import choose

import benchmarks.report
import benchmarks.suite
from benchmarks.report import RESULTS, TABLES, report, section, with_section, write_report
from benchmarks.suite import Skip, Suite, airbench_rows, main, parity, summary
from cifar_fast import Recipe
from cifar_fast.backends import Eager
from cifar_fast.results import environment

CEILINGS = dict(bandwidth=4e10, flops=8e11, bandwidth_range=[3e10, 5e10], flops_range=[7e11, 9e11], steps=456)
CEILINGS |= dict(
    step_flop=1e12,
    step_bytes=4e9,
    step_floor=1.25,
    step_floor_no_overlap=1.35,
    run_floor=570.0,
    run_floor_no_overlap=615.6,
)
PARITY = dict(flags="--device cpu", within=True, tolerance=3.0, median_ratio=1.0, n=67)


@pytest.fixture
def parts(monkeypatch):
    """Parts that take no time, and a record of those that ran."""
    ran = []

    def part(name, result):
        def run(suite):
            ran.append(name)
            if isinstance(result, BaseException):
                raise result
            return result

        return run

    fake = dict(
        ceilings=CEILINGS, parity=PARITY, cpu=Skip("no such CPU"), memory=dict(eager=dict(allocated=2e9, reserved=3e9))
    )
    for name in benchmarks.suite.PARTS:
        monkeypatch.setitem(benchmarks.suite.PARTS, name, part(name, fake.get(name, Skip("not in this test"))))

    def change(name, result):
        monkeypatch.setitem(benchmarks.suite.PARTS, name, part(name, result))

    return ran, change


def suite(tmp_path, flags=""):
    return main(f"--device cpu --output {tmp_path}/out {flags}".split())


def results(tmp_path):
    return json.loads((tmp_path / "out/results.json").read_text())


def test_each_part_is_told_with_its_result_or_the_reason_that_it_has_none(tmp_path, parts, capsys):
    assert suite(tmp_path) == 0
    found = results(tmp_path)
    assert found["schema"] == 1 and found["environment"]["torch"] == torch.__version__
    assert list(found["parts"]) == list(benchmarks.suite.PARTS)
    assert found["parts"]["ceilings"]["result"] == CEILINGS
    assert found["parts"]["cpu"]["skipped"] == "no such CPU"
    text = (tmp_path / "out/results.md").read_text()
    assert "no such CPU" in text and "| eager   |" in text and "2.00" in text
    assert "cpu: no such CPU" in capsys.readouterr().out


def test_an_interrupted_suite_leaves_what_it_had_and_goes_on_from_there(tmp_path, parts):
    ran, change = parts
    change("steps", KeyboardInterrupt())
    assert suite(tmp_path) == 130
    before = list(ran)
    assert list(results(tmp_path)["parts"]) == before[:-1] and before[-1] == "steps"
    assert (tmp_path / "out/results.md").exists()
    change("steps", Skip("later"))
    ran.clear()
    assert suite(tmp_path) == 0
    assert ran[0] == "cpu" and "ceilings" not in ran, (
        "what has a result is not measured again, what was skipped is tried again"
    )
    assert results(tmp_path)["parts"]["ceilings"]["result"] == CEILINGS


def test_nothing_is_measured_where_parity_fails(tmp_path, parts, capsys):
    ran, change = parts
    change("parity", PARITY | dict(within=False))
    assert suite(tmp_path) == 1
    assert ran == ["ceilings", "parity"]
    assert "nothing more is measured" in capsys.readouterr().err
    change("parity", RuntimeError("no comparison"))
    (tmp_path / "out/results.json").unlink()
    assert suite(tmp_path) == 1 and ran[-1] == "parity"


def test_a_part_that_fails_is_told_and_the_rest_runs(tmp_path, parts):
    ran, change = parts
    change("convolutions", RuntimeError("out of memory\nby far"))
    assert suite(tmp_path) == 1
    assert results(tmp_path)["parts"]["convolutions"]["failed"] == "RuntimeError: out of memory by far"
    assert ran[-1] == "epochs"


def test_without_minutes_left_no_part_begins(tmp_path, parts, capsys):
    ran, _ = parts
    assert suite(tmp_path, "--minutes 0.00001") == 0
    assert ran == ["ceilings", "parity"] and "no minutes left" in capsys.readouterr().out


def test_only_the_parts_asked_for_run_after_the_first_two(tmp_path, parts):
    ran, _ = parts
    assert suite(tmp_path, "--only memory") == 0
    assert ran == ["ceilings", "parity", "memory"]


def test_results_of_another_machine_are_not_mixed_with_these(tmp_path, parts, capsys):
    assert suite(tmp_path) == 0
    file = tmp_path / "out/results.json"
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    assert suite(tmp_path) == 2 and "another machine, version or setting" in capsys.readouterr().err
    file.write_text("{")
    assert suite(tmp_path) == 2 and "not a suite's results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--minutes 0", "--minutes must be above 0"),
        ("--only nothing", "invalid choice: 'nothing'"),
        ("--reference-script none.py", "none.py: no such file"),
        ("--data-dir none", "No such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, parts, capsys, flags, words):
    assert suite(tmp_path, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_summary_tells_middle_and_spread():
    assert summary([3.0, 1.0, 2.0]) == dict(
        median=2.0, mean=2.0, min=1.0, max=3.0, std=1.0, n=3, values=[3.0, 1.0, 2.0]
    )
    assert summary([3.0])["std"] is None


@pytest.mark.slow
def test_parity_is_the_real_comparison(monkeypatch):
    """Narrow and interpreted, of one step: the command that a person would type."""
    monkeypatch.setattr(Suite, "cuda", False)
    made = Suite(Recipe(), None, False, None, 0, None, {})
    found = parity(made)
    assert found["within"] and found["n"] == 134 and found["median_ratio"] > 0


@pytest.fixture
def like_a_gpu(monkeypatch, small):
    """A suite that believes in a GPU, with a tiny recipe and a CPU: what the parts do, not what they cost."""
    recipe = Recipe(epochs=1, batch_size=16, widths=(4, 8))
    monkeypatch.setattr(Suite, "cuda", True)
    monkeypatch.setattr(benchmarks.suite, "EPOCHS", (1, 2))
    monkeypatch.setattr(benchmarks.suite, "BATCH_SIZES", {"cpu": (8, 32, 64)})
    done = dict(ceilings=CEILINGS)
    made = Suite(recipe, small, True, choose("eager", "cpu", "float32"), time.perf_counter() + 1e6, None, done)
    made.backends = dict(eager=made.set_up(Eager, recipe), other=made.set_up(Eager, recipe))
    return made


def test_trainings_take_turns_with_a_seed_each(like_a_gpu):
    found = benchmarks.suite.trainings(like_a_gpu)
    assert list(found) == ["eager", "other"]
    assert found["eager"]["accuracy"]["values"] == found["other"]["accuracy"]["values"]
    assert len(set(found["eager"]["accuracy"]["values"])) > 1 and found["eager"]["seconds"]["n"] == 10
    assert found["eager"]["accuracy"]["ci95"][0] < found["eager"]["accuracy"]["mean"]


def test_steps_are_timed_in_turn_the_last_twice_and_profiled(like_a_gpu):
    found = benchmarks.suite.steps(like_a_gpu)
    assert list(found) == ["eager", "other", "other, again"]
    assert all(row["n"] == 10 and row["median"] > 0 for row in found.values())
    assert sum(line["milliseconds"] for line in found["other"]["profile"]) == pytest.approx(
        found["other"]["profiled_step_ms"]
    )
    assert found["eager"]["flops"] == CEILINGS["step_flop"] / found["eager"]["median"]


def test_batch_size_width_and_epochs_are_swept_with_the_fastest(like_a_gpu):
    sizes, wide = benchmarks.suite.batch_sizes(like_a_gpu), benchmarks.suite.widths(like_a_gpu)
    assert list(sizes["rows"]) == ["8", "32"], "64 would leave too few steps of the 96 pictures"
    assert list(wide["rows"]) == ["x 0.5", "x 1", "x 2"] and wide["backend"] == "eager"
    assert wide["rows"]["x 2"]["flop"] > 2 * wide["rows"]["x 1"]["flop"]
    found = benchmarks.suite.epochs(like_a_gpu)
    assert list(found) == ["1", "2"] and found["2"]["accuracy"]["n"] == 3


def test_each_convolution_is_timed_in_each_pass(like_a_gpu):
    rows = benchmarks.suite.convolutions(like_a_gpu)["rows"]
    names = [(row["layer"], row["channels"][0], row["name"]) for row in rows]
    first = [(1, channels, name) for channels in (3, 4, 8) for name in ("forward", "weight gradient")]
    assert names == first + [(2, 4, name) for name in ("forward", "data gradient", "weight gradient")]
    assert [row["size"] for row in rows][-1] == 32 and all(row["flops"] > 0 for row in rows)


def test_every_table_and_picture_can_be_made_of_what_the_parts_give(like_a_gpu, tmp_path):
    found = dict(ceilings=CEILINGS, parity=PARITY)
    for name in ("trainings", "steps", "batch_sizes", "widths", "convolutions", "epochs"):
        found[name] = benchmarks.suite.PARTS[name](like_a_gpu)
    found["peers"] = dict(airbench94=airbench_rows(AIRBENCH))
    found["memory"] = dict(eager=dict(allocated=1e9, reserved=2e9))
    found["cpu"] = dict(
        seconds={name: [dict(step=1.0, augment=0.5)] for name in ("theirs", "ours")}, matrix_flops=1e12, batch_size=512
    )
    facts = environment(torch.device("cpu"))
    settings = dict(dtype="float16", dataset=dict(name="synthetic"), recipe=dict(batch_size=16))
    made = dict(
        schema=1,
        environment=facts,
        settings=settings,
        parts={name: dict(result=result) for name, result in found.items()},
    )
    (tmp_path / "results.json").write_text(json.dumps(made))
    write_report(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert all(heading in text for name, (heading, _) in TABLES.items() if name != "kernels")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("steps.png", "roofline.png"))


def test_kernels_leave_half_of_the_minutes_and_go_on_where_they_were_cut_short(like_a_gpu, monkeypatch):
    import benchmarks.kernels as bench

    spent, asked = [], []

    def measure(case, implementation, bandwidth):
        spent.append(10.0)
        asked.append((f"{case.name}, {case.direction}", implementation))
        if len(asked) == 2:
            raise bench.Wrong("off by far")
        return dict(case=asked[-1][0], implementation=implementation)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(Suite, "left", lambda self: 100.0 - sum(spent))
    first = benchmarks.suite.kernels(like_a_gpu)
    assert first["cut_short"] and len(first["rows"]) == 5 and first["wrong"][0]["why"] == "off by far"
    spent.clear()
    like_a_gpu.done["kernels"] = first
    benchmarks.suite.kernels(like_a_gpu)
    assert len(asked) == len(set(asked)) == 12, "nothing is measured twice"
    assert {implementation for _, implementation in asked[:3]} == {"fused"}


def test_a_part_that_was_cut_short_goes_on(tmp_path, parts):
    ran, change = parts
    change("kernels", dict(rows=[], wrong=[], cut_short=True))
    assert suite(tmp_path) == 0
    ran.clear()
    assert suite(tmp_path) == 0
    assert "kernels" in ran and "ceilings" not in ran


AIRBENCH = """
|  run     |  epoch  |  train_loss  |  train_acc  |  val_acc  |  tta_val_acc  |  total_time_seconds  |
|       0  |      9  |      0.9310  |     0.9860  |   0.9312  |               |              3.2034  |
|          |   eval  |      0.9310  |     0.9860  |   0.9312  |       0.9403  |              3.2902  |
OURS 4.5
"""


def test_a_peers_own_table_is_read():
    found = airbench_rows(AIRBENCH)
    assert (found["accuracy"]["values"], found["own_clock"]["values"], found["our_clock"]["values"]) == (
        [pytest.approx(94.03)],
        [3.2902],
        [4.5],
    )


def test_the_readme_says_what_was_measured():
    """`python -m benchmarks.report` makes it so."""
    assert benchmarks.report.main(["--check"]) == 0


def test_a_figure_that_changes_is_noticed(tmp_path, monkeypatch):
    folder = tmp_path / "2026-01-01-here"
    folder.mkdir()
    facts = dict(device_name="A card", threads=2, torch="2.15")
    settings = dict(dtype="float16", dataset=dict(name="synthetic"), recipe=dict(batch_size=512))
    made = dict(
        environment=facts,
        settings=settings,
        parts=dict(memory=dict(result=dict(fused=dict(allocated=2e9, reserved=3e9)))),
    )
    (folder / "results.json").write_text(json.dumps(made))
    (tmp_path / "README.md").write_text(
        with_section(f"before\n{benchmarks.report.BEGIN}\n{benchmarks.report.END}\nafter", section(tmp_path))
    )
    monkeypatch.setattr(benchmarks.report, "ROOT", tmp_path)
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks.report, "section", lambda: section(tmp_path))
    assert benchmarks.report.main(["--check"]) == 0
    (folder / "results.json").write_text(json.dumps(made).replace("2000000000.0", "2500000000.0"))
    assert benchmarks.report.main(["--check"]) == 1
    assert benchmarks.report.main([]) == 0 and benchmarks.report.main(["--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter") and "2.50" in text


def test_every_folder_of_results_has_its_tables(tmp_path):
    folders = [file.parent for file in RESULTS.glob("*/results.json")]
    assert folders
    for folder in folders:
        found = json.loads((folder / "results.json").read_text())
        assert found["schema"] == 1 and {"environment", "settings", "parts"} <= set(found)
        assert (folder / "results.md").read_text() == report(found) + "\n"
        (tmp_path / "results.json").write_text(json.dumps(found))
        write_report(tmp_path)
        assert (tmp_path / "results.md").read_text() == report(found) + "\n"

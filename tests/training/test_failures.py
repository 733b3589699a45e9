"""A run that diverges or fails costs no other run, and is never mistaken for one that has finished."""

import dataclasses
import json
import shutil

import pytest
import torch

from cifar_fast import Diverged, InputError, Recipe, Result, fit, load_model
from cifar_fast.cli.main import main as command
from cifar_fast.train import main
from cifar_fast.training import fit as fit_module
from cifar_fast.utils.progress import lines_to
from tests.helpers import DEVICE, HOW, contents, diverge, files_in, files_of, save_npz, small_dataset, stop_after

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings

RECIPE = Recipe(epochs=2, batch_size=16, widths=(4, 8))
FLAGS = "--dataset npz --widths 4 8 --epochs 2 --batch-size 16 --device cpu --dtype float32 --backend eager --seed 3"
AT_STEP_1 = "the loss is not finite at step 1 (epoch 1); try smaller --lr-values, or --dtype float32"
NO_SEEDS = dict(init_seed=None, order_seed=None, augment_seed=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, no_curves):
    """The folder of three runs with seeds 3, 4 and 5, all finished, and their result."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, fit(RECIPE, tiny, runs=3, seed=3, output=folder, **HOW)


def read(path):
    return json.loads(path.read_text())


def test_diverged_run_is_recorded_and_the_others_are_trained(tmp_path, npz, whole, monkeypatch, capfd):
    diverge(monkeypatch, 4)
    out = tmp_path / "out"
    assert main(f"{FLAGS} --data-dir {npz} --runs 3 --output {out}".split()) == 1
    assert capfd.readouterr().err == f"error: run 1 of 3, seed 4: {AT_STEP_1}\n"
    record = dict(run=1, seed=4, **NO_SEEDS, step=1, epoch=1)
    summary, run = read(out / "summary.json"), read(out / "run-1/result.json")
    assert (run["run"], run["rows"], run["backend"]) == (record, [], "eager")
    assert (summary["diverged"], summary["missing"]) == ([record], [])
    finished = [whole[1].runs[index] for index in (0, 2)]
    assert [run["test_accuracy"] for run in summary["runs"]] == [run.test_accuracy for run in finished]
    assert summary["test_accuracy_mean"] == pytest.approx(sum(run.test_accuracy for run in finished) / 2)
    assert files_in(out) == files_of(3, diverged=[1])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["epoch"]) for row in rows] == [(0, 1), (0, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(("seeds", "last"), [([3], 5), ([5], 4), ([4, 5], 3)])
def test_weights_are_those_of_the_last_run_that_has_finished(tmp_path, tiny, monkeypatch, seeds, last):
    alone = fit(RECIPE, tiny, seed=last, **HOW)
    diverge(monkeypatch, *seeds)
    result = fit(RECIPE, tiny, runs=3, seed=3, output=tmp_path / "out", **HOW)
    assert [run.seed for run in result.diverged] == seeds and result.missing == []
    saved = load_model(tmp_path / "out").model.state_dict()
    for name, tensor in alone.state_dict.items():
        assert torch.equal(result.state_dict[name], tensor) and torch.equal(saved[name], tensor)
    assert files_in(tmp_path / "out") == files_of(3, diverged=[seed - 3 for seed in seeds])


def test_commands_use_what_has_finished_beside_a_diverged_run(tmp_path, npz, tiny, monkeypatch, capfd):
    diverge(monkeypatch, 5)
    out, images = tmp_path / "out", tmp_path / "images.npz"
    assert main(f"{FLAGS} --data-dir {npz} --runs 3 --output {out}".split()) == 1
    save_npz(images, tiny, train_images=None, train_labels=None)
    assert command(["predict", str(out), str(images), "--device", "cpu"]) == 0
    capfd.readouterr()
    assert command(["report", str(out)]) == 0
    output = capfd.readouterr().out
    assert "| 2 of 3 |" in output
    assert "Warning: out: 2 of 3 runs have finished; diverged: seed 5 at step 1\n" in output


def test_resume_counts_a_diverged_run_as_ended(tmp_path, npz, whole, monkeypatch, capfd):
    diverge(monkeypatch, 4)
    out = tmp_path / "out"
    with lines_to(stop_after((2, 1))):
        assert main(f"{FLAGS} --data-dir {npz} --runs 3 --output {out}".split()) == 130
    capfd.readouterr()
    assert main(["--resume", str(out)]) == 1
    output, error = capfd.readouterr()
    assert "run 2 of 3" in output and "run 1 of 3" not in output
    assert error == f"error: run 1 of 3, seed 4: {AT_STEP_1}\n"
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    assert main(["--resume", str(out)]) == 1, "the code tells that a run is not in the figures"
    output, again = capfd.readouterr()
    assert output.startswith("nothing to do: ") and output.count("\n") == 1 and again == error
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before
    assert main(["--resume", str(out), "--runs", "4"]) == 1
    assert [run["seed"] for run in read(out / "summary.json")["runs"]] == [3, 5, 6]
    assert Result.load(out).diverged[0].seed == 4


def test_rows_before_the_divergence_are_kept(tmp_path, tiny, monkeypatch):
    reset, models = fit_module.Backend.reset, []

    def remember(backend, model):
        reset(backend, model)
        models.append(backend.model)

    def break_after_first_epoch(row):
        if (row.run, row.epoch) == (0, 1):
            next(models[-1].parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(fit_module.Backend, "reset", remember)
    result = fit(RECIPE, tiny, runs=2, output=tmp_path / "out", on_epoch=break_after_first_epoch, **HOW)
    (diverged,) = result.diverged_results
    assert (diverged.run.step, diverged.run.epoch, len(diverged.rows)) == (3, 2, 1)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["epoch"]) for row in rows] == [(0, 1), (1, 1), (1, 2)]
    assert [row.run for row in result.rows] == [1, 1], "the finished runs alone"
    assert not (tmp_path / "out/run-0/checkpoint.pt").exists()


def test_training_of_which_all_runs_diverge(tmp_path, tiny, npz, monkeypatch, capfd):
    diverge(monkeypatch, 3, 4)
    out = tmp_path / "out"
    for where in (dict(output=out), dict(resume=out)):
        with pytest.raises(Diverged, match=r"run 0 of 2, seed 3: the loss is not finite at step 1"):
            fit(RECIPE, tiny, runs=2, seed=3, **where, **HOW)
    assert files_in(out) == ["run-0/result.json", "run-1/result.json", "summary.json", "training.json"]
    summary = read(out / "summary.json")
    assert (summary["runs"], summary["test_accuracy_mean"], len(summary["diverged"])) == ([], None, 2)
    result = Result.load(out)
    assert "no run has finished" in repr(result) and "<table>" in result._repr_html_()
    with pytest.raises(InputError, match="all runs of this training diverged"):
        load_model(out)
    assert main(["--resume", str(out), "--data-dir", str(npz)]) == 1
    assert capfd.readouterr().err.count("the loss is not finite at step 1") == 2


def test_diverged_run_is_recorded_when_a_later_run_replaces_earlier_results(tmp_path, tiny, whole, monkeypatch):
    out = shutil.copytree(whole[0], tmp_path / "out")
    diverge(monkeypatch, 8)
    fit(RECIPE, tiny, runs=2, seed=8, output=out, overwrite=True, **HOW)
    assert files_in(out) == files_of(2, diverged=[0]) and read(out / "run-0/result.json")["run"]["step"] == 1


def fail_in(monkeypatch, error, *runs):
    """Let ``runs`` fail with ``error`` before their first step."""
    train = fit_module.train

    def failing(*arguments, after, **options):
        if after.run in runs:
            raise error
        return train(*arguments, after=after, **options)

    monkeypatch.setattr(fit_module, "train", failing)


OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_run_that_fails_costs_no_other_run(tmp_path, npz, whole, monkeypatch, capfd, failing):
    out, seed = tmp_path / "out", 3 + failing
    with monkeypatch.context() as patch:
        fail_in(patch, OUT_OF_MEMORY, failing)
        assert main(f"{FLAGS} --data-dir {npz} --runs 3 --output {out}".split()) == 1
    output, error = capfd.readouterr()
    assert error == "error: out of memory in training at --batch-size 16; try a smaller one\n"
    assert f"run {failing} failed: out of memory in training at batch_size 16; try a smaller one; the " in output
    assert f"2 of 3 runs have finished; missing: seed {seed}" in output
    summary = read(out / "summary.json")
    assert [run["seed"] for run in summary["runs"]] == [each for each in (3, 4, 5) if each != seed]
    assert summary["missing"] == [dict(run=failing, seed=seed)] and load_model(out)
    assert main(["--resume", str(out)]) == 0
    assert contents(out, "data_source") == contents(whole[0], "data_source")


def test_errors_of_the_first_two_runs_leave_out_the_others(tmp_path, npz, monkeypatch, capfd):
    fail_in(monkeypatch, OUT_OF_MEMORY, 0, 1, 2, 3)
    assert main(f"{FLAGS} --data-dir {npz} --runs 4 --output {tmp_path}/out".split()) == 2
    output, error = capfd.readouterr()
    assert output.count("out of memory") == 2 and error.count("\n") == 1


def test_unexpected_error_is_raised_when_the_other_runs_have_ended(tmp_path, tiny, monkeypatch):
    fail_in(monkeypatch, TypeError("a fault of the program"), 1)
    with pytest.raises(TypeError, match="a fault of the program"):
        fit(RECIPE, tiny, runs=3, output=tmp_path / "out", **HOW)
    assert [run["seed"] for run in read(tmp_path / "out/summary.json")["runs"]] == [0, 2]


@pytest.mark.parametrize("error", [ValueError("enough"), InputError("enough"), RuntimeError("enough")])
def test_error_of_a_callback_ends_the_training_at_once(tiny, error):
    rows = []

    def on_epoch(row):
        rows.append(row)
        raise error

    with pytest.raises(type(error), match="enough"):
        fit(RECIPE, tiny, runs=3, on_epoch=on_epoch, **HOW)
    assert len(rows) == 1


def test_unreadable_extra_test_set_is_found_before_training(tmp_path, npz, capfd):
    cut_off = tmp_path / "extra.npz"
    cut_off.write_bytes(npz.read_bytes()[:-999])
    assert main(f"{FLAGS} --data-dir {npz} --also-test more={cut_off} --output {tmp_path}/out".split()) == 2
    output, error = capfd.readouterr()
    assert "epoch" not in output and f"{cut_off}: cannot be read" in error and not (tmp_path / "out").exists()


def test_summary_line_names_what_is_not_in_the_mean(whole):
    result = whole[1]
    fewer = dataclasses.replace(result, run_results=result.run_results[:1])
    assert fewer.title().endswith("1 of 3 runs")
    assert fewer.summary_line().endswith("; 1 of 3 runs have finished; missing: seed 4, seed 5")
    assert "have finished" not in result.summary_line()
    many = dataclasses.replace(result, config=result.config.replace(runs=12)).summary_line()
    assert many.endswith("missing: seed 6, seed 7, seed 8, seed 9, seed 10, 4 more")


@pytest.mark.parametrize("backend", ["compiled", "fused"])
def test_run_after_a_diverged_one_has_its_own_bits(monkeypatch, uncompiled, few_programs, backend):
    recipe = Recipe(epochs=2, batch_size=4, widths=(4, 8, 8, 16))
    dataset, options = small_dataset(train=8, test=4), HOW | dict(backend=backend, device=DEVICE.type)
    alone = fit(recipe, dataset, seed=4, **options)
    diverge(monkeypatch, 3)
    both = fit(recipe, dataset, seed=3, runs=2, **options)
    assert [run.seed for run in both.runs] == [4]
    assert all(torch.equal(both.state_dict[name], tensor) for name, tensor in alone.state_dict.items())

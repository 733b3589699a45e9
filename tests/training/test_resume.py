"""A training that was stopped at any moment resumes, and ends with the bits of an uninterrupted one."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cifar_fast import CNN, InputError, Recipe, Result, __version__, draw_epoch, fit, make_report
from cifar_fast.backends.fused import Fused
from cifar_fast.cli import flags, profile
from cifar_fast.cli.flags import interruptible
from cifar_fast.cli.main import main as command
from cifar_fast.data import download
from cifar_fast.data.tensors import device_data
from cifar_fast.train import main
from cifar_fast.training import fit as training_fit
from cifar_fast.training import trainer
from cifar_fast.training.checkpoint import Checkpoint
from cifar_fast.training.fit import Training
from cifar_fast.training.run_folder import RunFolder
from cifar_fast.utils.device import environment
from cifar_fast.utils.progress import lines_to
from tests.helpers import DEVICE, HOW, contents, files_in, files_of, save_npz, small_dataset, stop_after

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings

RECIPE = Recipe(epochs=3, batch_size=16, widths=(4, 8, 8, 16))
FLAGS = "--dataset npz --widths 4 8 8 16 --epochs 3 --batch-size 16 --device cpu --dtype float32 --seed 3"
FUSED = Recipe(epochs=2, batch_size=4, widths=(4, 8, 8, 16))


def stopped_and_resumed(recipe, dataset, folder, stops, **options):
    """Train, stop at each of ``stops``, resume each time, and return the result. See :func:`stop_after`."""
    options["log"] = stop_after(*stops)
    argument = "output"
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, dataset, **{argument: folder}, **options)
        argument = "resume"
    return fit(recipe, dataset, resume=folder, **options)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_resumed_training_has_the_bits_of_an_uninterrupted_one(tmp_path, tiny, uncompiled, backend, dtype):
    options = HOW | dict(backend=backend, dtype=dtype, runs=2, seed=4)
    fit(RECIPE, tiny, output=tmp_path / "whole", **options)
    stopped_and_resumed(RECIPE, tiny, tmp_path / "parts", [(0, 1), (0, 3), (1, 3)], **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow  # the interpreter
def test_resumed_fused_training_has_the_bits_of_an_uninterrupted_one(tmp_path, uncompiled, few_programs):
    dataset, options = small_dataset(train=8, test=4), HOW | dict(backend="fused", device=DEVICE.type)
    fit(FUSED, dataset, output=tmp_path / "whole", **options)
    stopped_and_resumed(FUSED, dataset, tmp_path / "parts", [(0, 2)], **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow  # the interpreter
def test_restored_state_keeps_the_addresses_that_the_graph_captured(uncompiled, few_programs):
    def addresses():
        momenta = [state["momentum_buffer"] for state in backend.optimizer.state.values()]
        return [tensor.data_ptr() for tensor in (*backend.model.parameters(), *backend.model.buffers(), *momenta)]

    backend = Fused(
        FUSED, device_data(small_dataset(train=4, test=4), DEVICE), DEVICE, torch.float32, torch.channels_last
    )
    backend.reset(CNN(FUSED, 3))
    before = addresses()
    backend.load_training_state(backend.training_state())
    assert addresses() == before


@pytest.mark.nightly
def test_resumed_compiled_training_has_the_bits_of_an_uninterrupted_one(tmp_path, tiny):
    options = HOW | dict(backend="compiled", runs=2)
    fit(RECIPE, tiny, output=tmp_path / "whole", **options)
    stopped_and_resumed(RECIPE, tiny, tmp_path / "parts", [(0, 3), (1, 2)], **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_resume_with_separate_seeds_and_extra_test_sets(tmp_path, tiny):
    np.savez(tmp_path / "test.npz", images=tiny.test_images, labels=tiny.test_labels)
    options = HOW | dict(runs=2, order_seed=9, also_test={"again": tmp_path / "test.npz"})
    fit(RECIPE, tiny, output=tmp_path / "whole", **options)
    stopped_and_resumed(RECIPE, tiny, tmp_path / "parts", [(0, 3), (1, 1)], **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("every", [0, 2])
def test_fewer_checkpoints_repeat_epochs_with_the_same_bits(tmp_path, tiny, every):
    options = HOW | dict(runs=2, checkpoint_every=every)
    fit(RECIPE, tiny, output=tmp_path / "whole", **options)
    lines = []
    stop = stop_after((0, 2), (1, 3))
    for argument in ("output", "resume"):
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, tiny, **{argument: tmp_path / "parts"}, **options | {"log": stop})
    rows = (tmp_path / "parts/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6, "a row is written before its checkpoint"
    fit(RECIPE, tiny, resume=tmp_path / "parts", **options | {"log": lines.append})
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == (["3"] if every else ["1", "2", "3"])
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_seconds_continue_after_resume(tmp_path, tiny):
    result = stopped_and_resumed(RECIPE, tiny, tmp_path / "out", [(0, 3)], **HOW)
    seconds = [row.train_seconds for row in result.rows]
    assert seconds == sorted(seconds) and len(set(seconds)) == 3
    evaluation = [row.evaluation_seconds for row in result.rows]
    assert evaluation == sorted(evaluation) and len(set(evaluation)) == 3


def train(npz, flags):
    """Run the command and return its exit code."""
    return main(f"{FLAGS} --data-dir {npz} {flags}".split())


@pytest.fixture(scope="module")
def original(tmp_path_factory, npz):
    """The folder of a training of two runs by the command, stopped in the second epoch of the second run."""
    folder = tmp_path_factory.mktemp("original") / "parts"
    with lines_to(stop_after((1, 2))):
        assert train(npz, f"--backend eager --runs 2 --output {folder}") == 130
    return folder


@pytest.fixture
def stopped(tmp_path, original):
    """A copy of that folder."""
    return shutil.copytree(original, tmp_path / "parts")


def test_resume_needs_no_other_flags(tmp_path, npz, stopped, capfd):
    assert main(["--resume", str(stopped)]) == 0
    output = capfd.readouterr().out
    assert "run 1 of 2, seed 4\nresuming after epoch 1\nepoch  2" in output and "run 0 of 2" not in output
    assert train(npz, f"--backend eager --runs 2 --output {tmp_path}/whole") == 0
    assert contents(stopped) == contents(tmp_path / "whole")


@pytest.mark.parametrize("epochs", [0, 1])
def test_interrupt_prints_how_to_resume_if_there_is_a_checkpoint(tmp_path, npz, monkeypatch, capfd, epochs):
    drawn = []

    def draw(*args, **options):
        if len(drawn) == epochs:
            raise KeyboardInterrupt
        drawn.append(draw_epoch(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(trainer, "draw_epoch", draw)
    assert train(npz, f"--output {tmp_path}/out") == 130
    hint = f"interrupted; to resume: cifar-fast train --resume {tmp_path}/out\n"
    assert capfd.readouterr().err == (hint if epochs else "interrupted before there was anything to resume\n")
    assert (tmp_path / "out").exists() == bool(epochs)


def test_resume_drops_an_incomplete_line(tmp_path, npz, stopped):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"run": 1, "epo')
    assert main(["--resume", str(stopped)]) == 0
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["epoch"]) for row in rows] == [(run, epoch) for run in (0, 1) for epoch in (1, 2, 3)]


@pytest.mark.parametrize("ended", [False, True])
def test_resume_with_more_runs(tmp_path, npz, stopped, ended):
    if ended:
        assert main(["--resume", str(stopped)]) == 0
    assert main(["--resume", str(stopped), "--runs", "3"]) == 0
    assert train(npz, f"--backend eager --runs 3 --output {tmp_path}/whole") == 0
    assert contents(stopped) == contents(tmp_path / "whole")


def test_resume_counts_an_added_run_that_ended_before_a_kill(tmp_path, tiny, monkeypatch):
    fit(RECIPE, tiny, output=tmp_path / "out", **HOW)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "finish", lambda *arguments: signal.raise_signal(signal.SIGINT))
        fit(RECIPE, tiny, resume=tmp_path / "out", runs=2, **HOW)
    assert len(json.loads((tmp_path / "out/summary.json").read_text())["runs"]) == 1
    fit(RECIPE, tiny, resume=tmp_path / "out", runs=2, **HOW)
    fit(RECIPE, tiny, output=tmp_path / "whole", runs=2, **HOW)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resume_of_a_finished_training_does_nothing(tmp_path, npz, stopped, capfd):
    assert main(["--resume", str(stopped)]) == 0
    before = {name: (stopped / name).read_bytes() for name in files_in(stopped)}
    capfd.readouterr()
    assert main(["--resume", str(stopped)]) == 0
    output, error = capfd.readouterr()
    assert output.startswith("nothing to do: ") and (output.count("\n"), error) == (1, "")
    assert {name: (stopped / name).read_bytes() for name in files_in(stopped)} == before
    assert main(["--resume", str(stopped), "--seed", "5"]) == 2


def test_result_is_read_back_equal(tmp_path, tiny):
    result = fit(RECIPE, tiny, output=tmp_path / "out", runs=2, **HOW)
    for again in (Result.load(tmp_path / "out"), fit(RECIPE, tiny, resume=tmp_path / "out", runs=2, **HOW)):
        assert (again.rows, again.runs, again.recipe) == (result.rows, result.runs, result.recipe)
        assert json.dumps(again.summary()) == json.dumps(result.summary())
        assert all(torch.equal(again.state_dict[name], tensor) for name, tensor in result.state_dict.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 4", "--seed was 3, not 4"),
        ("--init-seed 4", "--init-seed was not given, not 4"),
        ("--epochs 4", "--epochs was 3, not 4"),
        ("--widths 4 8", "--widths was 4 8 8 16, not 4 8"),
        ("--no-flip", "--flip was True, not False"),
        ("--recipe {folder}/recipe.json", "--epochs was 3, not 7"),
        ("--backend compiled", "--backend was eager, not compiled"),
        ("--dtype bfloat16", "--dtype was float32, not bfloat16"),
        ("--memory-format channels_last", "--memory-format was contiguous_format, not channels_last"),
        ("--also-test a={folder}/other.npz", "--also-test was not given, not a"),
        ("--runs 1", "--runs was 2, and may grow, but not shrink to 1"),
        ("--data-dir {folder}/other.npz", "is not the data set that was trained on"),
        ("--checkpoint-every -1", "--checkpoint-every must be at least 0, not -1"),
        ("--output {folder}/other", "give --resume alone, without --output and --overwrite"),
        ("--overwrite", "give --resume alone, without --output and --overwrite"),
    ],
)
def test_resume_with_changed_flags_is_an_error_and_changes_nothing(tmp_path, stopped, capfd, flags, words):
    save_npz(tmp_path / "other.npz", small_dataset(seed=1))
    Recipe(epochs=7).save(tmp_path / "recipe.json")
    before = {name: (stopped / name).read_bytes() for name in files_in(stopped)}
    capfd.readouterr()
    assert main(["--resume", str(stopped), *flags.format(folder=tmp_path).split()]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert {name: (stopped / name).read_bytes() for name in files_in(stopped)} == before


def test_resume_with_the_data_in_another_place(tmp_path, tiny, stopped):
    moved = save_npz(tmp_path / "moved.npz", tiny)
    assert main(["--resume", str(stopped), "--data-dir", str(moved)]) == 0


@pytest.fixture
def moved(tmp_path, tiny, cifar10, monkeypatch):
    """The working folder of a stopped training whose paths are relative; the current folder is another one."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    cifar10.rename(project / "data")
    save_npz(project / "test.npz", tiny, images=tiny.test_images, labels=tiny.test_labels % 3, class_names=None)
    monkeypatch.chdir(project)
    flags = "--widths 4 8 8 16 --epochs 3 --batch-size 16 --device cpu --dtype float32 --also-test more=test.npz"
    with lines_to(stop_after((0, 2))):
        assert main(f"{flags} --output out".split()) == 130
    monkeypatch.chdir(elsewhere)
    return project


def test_resume_from_another_working_folder_reads_the_same_files(tmp_path, moved, capfd, monkeypatch):
    assert main(["--resume", "../project/out"]) == 0
    assert "resuming after epoch 1" in capfd.readouterr().out and not list((tmp_path / "elsewhere").iterdir())
    training = json.loads((moved / "out/training.json").read_text())
    assert training["paths"] == {"data": str(moved / "data"), "test.npz": str(moved / "test.npz")}
    assert training["dataset"]["source"] == "data" and training["config"]["also_test"] == {"more": "test.npz"}


@pytest.mark.parametrize(("gone", "option"), [("data", "--data-dir"), ("test.npz", "--also-test")])
@pytest.mark.parametrize("place", ["elsewhere", "project"])
def test_resume_without_the_files_of_the_training_is_an_error_in_one_line(
    tmp_path, moved, capfd, monkeypatch, gone, option, place
):
    (moved / gone).rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / place)
    monkeypatch.setattr(download, "download", lambda *args: pytest.fail("downloads again"))
    assert main(["--resume", str(moved / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {moved / gone}: the training read it, but it is gone; ") and option in error
    assert error.count("\n") == 1 and not list((tmp_path / "elsewhere").iterdir())


def test_resume_does_not_download_into_a_folder_that_was_emptied(moved, capfd, monkeypatch):
    (moved / "data").rename(moved / "kept")
    (moved / "data").mkdir()
    monkeypatch.setattr(download, "download", lambda *args: pytest.fail("downloads again"))
    assert main(["--resume", "../project/out"]) == 2
    assert capfd.readouterr().err.startswith(f"error: {moved}/data: the training read it, but it is gone; ")
    (moved / "kept/cifar-10-batches-py").rename("cifar-10-batches-py")
    assert main(["--resume", "../project/out", "--data-dir", "."]) == 0


@pytest.mark.parametrize(("flag", "value"), [("--data-dir", "data"), ("--also-test", "more=test.npz")])
def test_data_that_is_named_for_a_finished_training_is_compared(moved, capfd, flag, value):
    assert main(["--resume", "../project/out"]) == 0
    shutil.copytree(moved / "data", "data") if flag == "--data-dir" else shutil.copy(moved / "test.npz", "other.npz")
    value = value.replace("test.npz", "other.npz")
    capfd.readouterr()
    assert main(["--resume", "../project/out", flag, value]) == 0
    assert capfd.readouterr().out.startswith("nothing to do: ")
    other = small_dataset(train=100, test=50, classes=10, seed=1)
    save_npz(Path("other.npz"), other, images=other.test_images, labels=other.test_labels)
    flags = "--dataset npz --data-dir other.npz" if flag == "--data-dir" else f"{flag} {value}"
    assert main(["--resume", "../project/out", *flags.split()]) == 2
    assert "is not the " in capfd.readouterr().err


def test_profile_of_a_resumed_training_reads_the_same_files(moved, monkeypatch):
    read = []
    monkeypatch.setattr(profile, "run", lambda args: read.append(args.data_dir) or 0)
    assert main(["--resume", "../project/out", "--profile", "trace"]) == 0
    assert read == [str(moved / "data")]


def test_resume_reads_a_moved_project(tmp_path, moved, capfd, monkeypatch):
    moved.rename(tmp_path / "renamed")
    monkeypatch.chdir(tmp_path / "renamed")
    assert main(["--resume", "out"]) == 0
    assert f"{moved / 'data'} is gone; data in this folder is read in its place" in capfd.readouterr().out
    paths = json.loads((tmp_path / "renamed/out/training.json").read_text())["paths"]
    assert paths["data"] == str(tmp_path / "renamed/data")


def test_sweep_from_another_working_folder_reads_the_same_files(tmp_path, cifar10, capfd, monkeypatch):
    """A variant that is added there reads them too."""
    work = cifar10.parent
    spec = (
        f'output = "{work}/sweep"\ndata_dir = "cifar10"\ndevice = "cpu"\ndtype = "float32"\n'
        "[recipe]\nepochs = 2\nbatch_size = 16\nwidths = [4, 8]\n[variants.a]\n"
    )
    monkeypatch.chdir(work)
    (work / "spec.toml").write_text(spec)
    assert command(["sweep", "spec.toml"]) == 0
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    (work / "spec.toml").write_text(f"{spec}[variants.b]\nmomentum = 0.8\n")
    assert command(["sweep", "../spec.toml"]) == 0, capfd.readouterr().err
    assert json.loads((work / "sweep/b/training.json").read_text())["paths"] == {"cifar10": str(cifar10)}
    assert not list((work / "elsewhere").iterdir())


@pytest.mark.parametrize("damage", ["empty", "cut off", "no archive", "foreign", "another format", "a folder"])
def test_damaged_checkpoint_is_an_error_in_one_line(stopped, capfd, damage):
    path = stopped / "run-1/checkpoint.pt"
    whole = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "foreign":
        torch.save({"format": 1, "state_dict": {}}, path)
    elif damage == "another format":
        torch.save(torch.load(path, weights_only=True) | {"format": 1}, path)
    else:
        path.write_bytes({"empty": b"", "cut off": whole[: len(whole) // 2], "no archive": b"hello\n" * 99}[damage])
    capfd.readouterr()
    assert main(["--resume", str(stopped)]) == 2
    error = capfd.readouterr().err
    assert (
        error.startswith(f"error: --resume {stopped}: run-1/checkpoint.pt cannot be read (") and error.count("\n") == 1
    )


def test_resume_without_a_training_is_an_error_and_writes_nothing(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        assert main(["--resume", f"{tmp_path}/{name}"]) == 2
        error = capfd.readouterr().err
        assert "holds no training.json" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not list((tmp_path / "empty").iterdir())


def test_checkpoint_holds_plain_tensors_and_numbers(stopped):
    saved = torch.load(stopped / "run-1/checkpoint.pt", weights_only=True)
    assert saved["state"]["epoch"] == 1 and isinstance(saved["rows_digest"], str)


def test_stopped_training_is_kept_without_overwrite(npz, stopped, capfd):
    assert train(npz, f"--output {stopped}") == 2
    assert "--resume to continue it, --overwrite to replace" in capfd.readouterr().err
    assert train(npz, f"--output {stopped} --overwrite --seed 7") == 0
    assert files_in(stopped) == files_of(1)
    assert json.loads((stopped / "summary.json").read_text())["runs"][0]["seed"] == 7


def test_folder_in_use_is_an_error(tmp_path, tiny):
    """A second process is refused while the first trains and while the first resumes."""
    refused = []

    def start_second(line):
        if line.startswith("epoch  2"):
            with pytest.raises(InputError, match=r"resume .*: another run is writing its results there"):
                fit(RECIPE, tiny, resume=tmp_path / "out", **HOW)
            refused.append(line)
        stop(line)

    stop = stop_after((0, 3))
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, output=tmp_path / "out", **HOW | {"log": start_second})
    fit(RECIPE, tiny, resume=tmp_path / "out", **HOW | {"log": start_second})
    assert len(refused) == 1 and len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 3


def test_resume_on_another_machine_prints_what_changed(stopped, capfd):
    saved = json.loads((stopped / "training.json").read_text())
    saved["environment"] |= {"torch": "2.0.0", "device_name": "another"}
    (stopped / "training.json").write_text(json.dumps(saved))
    assert main(["--resume", str(stopped)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert f"torch was 2.0.0, now {torch.__version__}: the last bits may differ" in lines
    assert any(line.startswith("device_name was another, now ") for line in lines)


def in_environment(monkeypatch, **facts):
    """Make trainings believe that they run in an environment with these facts."""
    monkeypatch.setattr(training_fit, "environment", lambda device: environment(device) | facts)


def test_run_keeps_each_environment_with_its_first_epoch(tmp_path, tiny, monkeypatch):
    folder, lines = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, output=folder, **HOW | {"log": stop_after((0, 2))})
    in_environment(monkeypatch, device_name="another", cifar_fast="0.2")
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, resume=folder, **HOW | {"log": stop_after((0, 3))})
    in_environment(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, resume=folder, **HOW | {"log": stop_after((0, 3))})
    here = environment(torch.device("cpu"))["device_name"]
    result = fit(RECIPE, tiny, resume=folder, **HOW | {"log": lines.append})
    found = [
        (each["first_epoch"], each["device_name"], each["cifar_fast"]) for each in result.run_results[0].environments
    ]
    assert found == [(1, here, __version__), (2, "another", "0.2"), (3, here, __version__)]
    assert f"device_name was another, now {here}: the last bits may differ" in lines
    assert f"device_name was not always the same: {here}, another" in lines and f"{here} and another" in result.title()

    stored = json.loads((folder / "run-0/result.json").read_text())["environments"]
    summary = json.loads((folder / "summary.json").read_text())
    assert stored == result.run_results[0].environments
    assert summary["environments"] == [{"run": 0} | each for each in stored]
    assert summary["environment"]["cifar_fast"] == __version__
    warnings = make_report({"out": Result.load(folder)}).warnings
    assert f"different devices: {here} and another (out)" in warnings
    assert f"different versions of cifar_fast: {__version__} and 0.2 (out)" in warnings


def test_added_run_keeps_its_own_environment(tmp_path, tiny, monkeypatch):
    fit(RECIPE, tiny, output=tmp_path / "out", **HOW)
    in_environment(monkeypatch, torch="9.9")
    result = fit(RECIPE, tiny, resume=tmp_path / "out", runs=2, **HOW)
    assert [each["torch"] for run in result.run_results for each in run.environments] == [torch.__version__, "9.9"]


def extra_set(path, dataset, **changes):
    return save_npz(path, dataset, images=dataset.test_images, labels=dataset.test_labels, **changes)


def test_extra_test_set_is_recognized_by_its_content(tmp_path, tiny):
    folder, path, moved = tmp_path / "out", tmp_path / "test.npz", tmp_path / "moved.npz"
    extra_set(path, tiny)
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, output=folder, also_test={"more": path}, **HOW | {"log": stop_after((0, 2))})
    path.rename(moved)
    before = (folder / "training.json").read_text()
    assert json.loads(before)["dataset"]["also_test"]["more"]["images"] == len(tiny.test_labels)
    for split, change in (("images", 255 - tiny.test_images), ("labels", (tiny.test_labels + 1) % tiny.num_classes)):
        changed = dataclasses.replace(tiny, **{f"test_{split}": change})
        with pytest.raises(InputError, match="the test set more is not the one that the training began with"):
            fit(RECIPE, tiny, resume=folder, also_test={"more": extra_set(path, changed)}, **HOW)
    assert (folder / "training.json").read_text() == before
    result = fit(RECIPE, tiny, resume=folder, also_test={"more": moved}, **HOW)
    assert list(result.runs[0].also_test) == ["more"]


def test_finished_training_is_not_returned_for_another_data_set(tmp_path, tiny):
    fit(RECIPE, tiny, output=tmp_path / "out", **HOW)
    other = dataclasses.replace(tiny, train_images=255 - tiny.train_images)
    with pytest.raises(InputError, match="is not the data set that was trained on"):
        fit(RECIPE, other, resume=tmp_path / "out", **HOW)


class Net(nn.Sequential):
    """A model whose class does not tell its layers."""

    def __init__(self, dropout=0.1):
        super().__init__(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.LazyLinear(3))
        self(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["function", "module"])
def test_custom_model_is_recognized_by_its_content(tmp_path, tiny, kind):
    def given(dropout=0.1):
        torch.manual_seed(1)
        return Net(dropout) if kind == "module" else lambda: Net(dropout)

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, output=folder, model=given(), **HOW | {"log": stop_after((0, 2))})
    others = [given(dropout=0.5)]
    if kind == "module":
        others.append(Net())  # other weights
    for other in others:
        with pytest.raises(InputError, match="the model Net has other layers or other initial weights"):
            fit(RECIPE, tiny, resume=folder, model=other, **HOW)
    result = fit(RECIPE, tiny, resume=folder, model=given(), **HOW)
    assert result.summary()["model_digest"] == result.model_digest is not None


@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (4, "cuda:3")])
def test_resume_of_a_gpu_run_with_fewer_gpus(stopped, monkeypatch, gpus, device):
    saved = json.loads((stopped / "training.json").read_text())
    saved["config"]["device"] = "cuda:3"
    (stopped / "training.json").write_text(json.dumps(saved))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    folder = RunFolder(stopped, resume=True)
    config = folder.earlier.config.replace(backend="auto", device="auto", dtype="auto", memory_format="auto")
    assert Training(config, folder).device == torch.device(device)


def test_resume_uses_the_same_number_of_threads(tmp_path, tiny):
    """Threads split the sums over a batch, so the last bits depend on their number."""
    recipe = Recipe(epochs=2, batch_size=32, widths=(4,))
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tiny, output=tmp_path / "out", threads=2, **HOW | {"log": stop_after((0, 2))})
    assert fit(recipe, tiny, resume=tmp_path / "out", **HOW).environment["threads"] == 2


def test_drafts_of_a_killed_process_are_removed(stopped):
    for name in (".training.json", "run-1/.checkpoint.pt"):
        (stopped / f"{name}.0123456789abcdef.draft").touch()
    assert main(["--resume", str(stopped)]) == 0
    assert files_in(stopped) == files_of(2)


def test_checkpoint_stays_if_the_weights_cannot_be_written(tmp_path, tiny, monkeypatch):
    save = torch.save

    def fail_for_weights(value, path):
        if "model.pt" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_for_weights)
        result = fit(RECIPE, tiny, output=tmp_path / "out", **HOW)
    assert len(result.unwritten) == 1 and (tmp_path / "out/run-0/checkpoint.pt").exists()
    fit(RECIPE, tiny, resume=tmp_path / "out", **HOW)
    fit(RECIPE, tiny, output=tmp_path / "whole", **HOW)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_fit_installs_no_signal_handler(tiny):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    during = []

    def log(line):
        during.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])

    fit(RECIPE, tiny, **HOW | {"log": log})
    assert all(seen == handlers for seen in during)


def test_command_restores_signal_handlers(tmp_path, npz):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train(npz, f"--output {tmp_path}/out") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_first_signal_is_answered_during_a_long_call_of_c_code(monkeypatch):
    told = []
    monkeypatch.setattr(flags.os, "write", lambda file, line: told.append((time.monotonic(), line.strip())))
    with interruptible() as on_step:
        on_step()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        ended = time.monotonic()
    ((at, line),) = told
    assert at < ended and line == b"finishing this step; to stop at once, press Ctrl-C again"


def test_first_signal_waits_for_the_step_and_second_does_not():
    with interruptible() as on_step:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # no step is under way
        on_step()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            on_step()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def start(flags):
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "cifar_fast.train", *flags.split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_command_after_its_step(tmp_path, npz, number):
    process = start(f"{FLAGS} --data-dir {npz} --output {tmp_path}/out --epochs 100000")
    for line in process.stdout:
        if line.startswith("epoch  2"):
            process.send_signal(number)
            break
    _, error = process.communicate(timeout=60)
    answer, hint = error.splitlines()
    assert answer.startswith("finishing this step") and ("Ctrl-C" in answer) == (number == signal.SIGINT)
    assert (process.returncode, hint) == (130, f"interrupted; to resume: cifar-fast train --resume {tmp_path}/out")
    rows = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    checkpoint = Checkpoint.load(tmp_path / "out/run-0/checkpoint.pt")
    assert checkpoint.epoch == len(rows) >= 2, "no epoch that ended is lost"


def whole_and_killed(tmp_path, npz, kills, seed):
    """Train once without interruption and once with kills at random moments. Return the contents of both folders."""
    flags = f"{FLAGS} --data-dir {npz} --backend eager --epochs 8 --runs 3"
    process = start(f"{flags} --output {tmp_path}/whole")
    process.stdout.readline()  # printed after the imports
    start_time = time.monotonic()
    assert process.communicate(timeout=120)[1] == ""
    seconds = time.monotonic() - start_time
    moments, command = random.Random(seed), f"{flags} --output {tmp_path}/parts"
    for _ in range(kills):
        process = start(command)
        process.stdout.readline()
        time.sleep(moments.uniform(0, seconds / kills))
        process.kill()
        process.communicate()
        if (tmp_path / "parts/training.json").exists():
            command = f"--resume {tmp_path}/parts"
    assert start(command).communicate(timeout=120)[1] == ""
    return contents(tmp_path / "whole"), contents(tmp_path / "parts")


@pytest.mark.nightly  # starts a process for each kill
def test_three_kills_at_random_moments_change_no_bit(tmp_path, npz):
    whole, parts = whole_and_killed(tmp_path, npz, kills=3, seed=0)
    assert parts == whole


@pytest.mark.nightly
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path, npz):
    whole, parts = whole_and_killed(tmp_path, npz, kills=20, seed=1)
    assert parts == whole

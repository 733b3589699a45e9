"""Kills, power cuts and damaged bits: files are whole, belong together, and damage never passes without a word."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitedTooLong

import numpy as np
import pytest
import torch

from cifar_fast import InputError, Recipe, fit
from cifar_fast.backends.base import Backend
from cifar_fast.cli.main import main
from cifar_fast.training import run_folder
from cifar_fast.training.checkpoint import Checkpoint
from cifar_fast.training.metrics import EpochRow
from cifar_fast.training.plots import curves_figure
from cifar_fast.training.run_folder import REPLACED, RunFolder
from cifar_fast.utils import files
from cifar_fast.utils.files import append_lines, atomic_write, load_tensors
from tests.helpers import HOW, contents, files_in, files_of, plain, stop_after

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings

RECIPE = Recipe(epochs=3, batch_size=16, widths=(4, 8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, no_curves):
    """The folder of a training that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    fit(RECIPE, tiny, output=folder, **HOW)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny, no_curves):
    """The folder of a training that was stopped in its last epoch, with two checkpoints."""
    folder = tmp_path_factory.mktemp("original") / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, output=folder, **HOW | {"log": stop_after((0, 3))})
    return folder


@pytest.fixture
def stopped(tmp_path, original):
    """A copy of that folder."""
    return shutil.copytree(original, tmp_path / "out")


def flip(path, position, bit=0):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def damage(path):
    """Flip a bit in the weights that torch saved to ``path``."""
    saved = torch.load(path, weights_only=True)
    weights = saved["state"]["model"] if "state" in saved else saved["state_dict"]
    flip(path, path.read_bytes().index(next(iter(weights.values())).numpy().tobytes()))


def test_equal_trainings_write_equal_bytes(tmp_path, tiny, whole):
    fit(RECIPE, tiny, output=tmp_path / "out", **HOW)
    for name in ("model.pt", "run-0/model.pt"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name


def test_each_file_is_synced_before_one_that_depends_on_it(tmp_path, tiny, monkeypatch):
    """A power cut may drop what is not synced: data of files, and names in folders."""
    sizes, changed, rows = {}, set(), tmp_path / "out/metrics.jsonl"
    replace = os.replace

    def fsync(descriptor):
        found = os.fstat(descriptor)
        sizes[found.st_ino] = found.st_size
        changed.discard(found.st_ino)

    def checked_replace(source, target):
        for path in (source, *([rows] if rows.exists() else [])):
            assert sizes[os.stat(path).st_ino] == os.stat(path).st_size, f"{path} is not synced"
        folder = os.stat(os.path.dirname(target)).st_ino
        assert changed <= {folder}, f"{target} depends on another folder, which is not synced"
        replace(source, target)
        changed.add(folder)
        if os.path.basename(target) != "checkpoint-previous.pt":
            done.append(os.path.basename(target))

    done = []
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", checked_replace)
    fit(RECIPE, tiny, output=tmp_path / "out", **HOW)
    end = ["model.pt", "result.json", "model.pt", "curves.png", "confusion.png", "summary.json"]
    assert done == ["training.json", *["checkpoint.pt"] * 3, *end] and not changed


def test_overwriting_never_mixes_two_trainings(tmp_path, tiny, stopped, monkeypatch):
    """Before each operation of the replacement the folder is copied, as a kill would leave it."""
    copies = []
    earlier = {name: (stopped / name).read_bytes() for name in files_in(stopped)}

    def copying(call):
        def copy_and_call(*args, **options):
            copies.append(shutil.copytree(stopped, tmp_path / f"copy-{len(copies)}"))
            return call(*args, **options)

        return copy_and_call

    def stop(line):
        if line.startswith("epoch"):
            patch.undo()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", copying(os.replace))
        patch.setattr(shutil, "rmtree", copying(shutil.rmtree))
        fit(RECIPE, tiny, output=stopped, overwrite=True, seed=5, **HOW | {"log": stop})
    *before, after = copies
    assert len(before) == 4, "three moves, and a new training.json"
    for copy in before:
        with pytest.raises(InputError, match="already holds results"), RunFolder(copy):
            pass
        with RunFolder(copy, overwrite=True):
            found = {name: (copy / name).read_bytes() for name in files_in(copy)}
        assert found == earlier and not list(copy.glob(f"{REPLACED}*")), "the earlier results are back"
    fit(RECIPE, tiny, resume=after, seed=5, **HOW)
    fit(RECIPE, tiny, output=tmp_path / "fresh", seed=5, **HOW)
    assert contents(after) == contents(tmp_path / "fresh"), "nothing of the earlier training is continued"
    assert files_in(stopped) == ["metrics.jsonl", "training.json"]


def test_overwriting_on_a_full_disk_keeps_the_earlier_results(tmp_path, tiny, whole, monkeypatch):
    """The new ``training.json`` still fits on the disk, and the first row does not."""
    out, before = shutil.copytree(whole, tmp_path / "out"), contents(whole)

    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "append_lines", full)
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, output=out, overwrite=True, seed=5, **HOW | dict(log=stop_after((0, 1))))
    assert contents(out) == before


def test_resume_moves_back_what_a_killed_overwrite_has_moved_away(tmp_path, whole, tiny):
    out = shutil.copytree(whole, tmp_path / "out")
    hidden = out / f"{REPLACED}x"
    hidden.mkdir()
    for path in [path for path in out.iterdir() if path != hidden]:
        path.rename(hidden / path.name)
    fit(RECIPE, tiny, resume=out, **HOW)
    assert contents(out) == contents(whole) and not hidden.exists()


def test_results_replaced_before_the_first_row_come_back_if_there_is_none(tmp_path, whole):
    """Several processes replace earlier results at their start."""
    out = shutil.copytree(whole, tmp_path / "out")
    with RunFolder(out, overwrite=True) as folder:
        folder.replace_earlier()
        assert files_in(out) == [name for name in files_in(out) if name.startswith(REPLACED)]
    assert {name: (out / name).read_bytes() for name in files_in(out)} == {
        name: (whole / name).read_bytes() for name in files_in(whole)
    }


def test_several_processes_keep_the_points_of_a_training_that_they_resume(stopped):
    points = stopped / "tensorboard/run-0/events.out.tfevents.1"
    points.parent.mkdir(parents=True)
    points.touch()
    with RunFolder(stopped, resume=True) as folder:
        folder.replace_earlier()
    assert points.exists()


def test_link_in_place_of_replaced_results_is_not_followed(tmp_path, whole):
    other = shutil.copytree(whole, tmp_path / "other")
    (tmp_path / "out").mkdir()
    (tmp_path / f"out/{REPLACED}x").symlink_to(other)
    with RunFolder(tmp_path / "out"):
        assert files_in(other) == files_of(1)


def test_unreadable_checkpoint_falls_back_to_the_one_before(stopped, whole, tiny, capfd):
    damage(stopped / "run-0/checkpoint.pt")
    lines = []

    def stop(line):
        lines.append(line)
        if line.startswith("epoch  3"):  # before its checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, resume=stopped, **HOW | {"log": stop})
    (told,) = [line for line in lines if "cannot be read" in line]
    assert told.startswith(f"{stopped}: run-0/checkpoint.pt cannot be read (") and "its checksum is wrong" in told
    assert told.endswith("; the run continues from the checkpoint before it, after epoch 1")
    epochs = [Checkpoint.load(stopped / f"run-0/checkpoint{name}.pt").epoch for name in ("", "-previous")]
    assert epochs == [2, 1], "the damaged one has not replaced the one before it"
    fit(RECIPE, tiny, resume=stopped, **HOW)
    assert contents(stopped) == contents(whole)


def test_kill_between_the_two_renames_costs_an_epoch(stopped, whole, tiny):
    (stopped / "run-0/checkpoint.pt").unlink()
    lines = []
    fit(RECIPE, tiny, resume=stopped, **HOW | {"log": lines.append})
    assert "resuming after epoch 1" in lines and not any("cannot be read" in line for line in lines)
    assert contents(stopped) == contents(whole)


def test_damaged_checkpoints_are_refused_without_advice_to_destroy(stopped, tiny):
    for name in ("checkpoint", "checkpoint-previous"):
        damage(stopped / f"run-0/{name}.pt")
    before = {name: (stopped / name).read_bytes() for name in files_in(stopped)}
    with pytest.raises(InputError, match=r"run-0/checkpoint\.pt cannot be read .*move the folder run-0 away") as caught:
        fit(RECIPE, tiny, resume=stopped, **HOW)
    assert "overwrite" not in str(caught.value) and "remove" not in str(caught.value)
    assert {name: (stopped / name).read_bytes() for name in files_in(stopped)} == before


@pytest.mark.parametrize(
    ("epoch", "words"), [(1, "metrics.jsonl lacks rows that a checkpoint of run 0 continues"), (2, None)]
)
def test_checkpoint_whose_rows_were_changed_is_not_continued(stopped, whole, tiny, epoch, words):
    path = stopped / "metrics.jsonl"
    path.write_text(path.read_text().replace(f'"epoch": {epoch}, "train_loss": ', f'"epoch": {epoch}, "train_loss": 1'))
    if words:
        with pytest.raises(InputError, match=words):
            fit(RECIPE, tiny, resume=stopped, **HOW)
    else:
        fit(RECIPE, tiny, resume=stopped, **HOW)
        assert contents(stopped) == contents(whole)


def test_full_memory_of_a_gpu_gives_no_advice_against_the_checkpoint(stopped, tiny, monkeypatch):
    def full(backend, state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(Backend, "load_training_state", full)
    with pytest.raises(InputError, match="out of memory") as caught:
        fit(RECIPE, tiny, resume=stopped, **HOW)
    assert "checkpoint" not in str(caught.value)


def test_checkpoint_does_not_grow_with_the_epochs(tmp_path, tiny):
    sizes = []
    recipe, place = Recipe(epochs=40, batch_size=32, widths=(4,)), tmp_path / "out/run-0/checkpoint.pt"
    fit(recipe, tiny, output=tmp_path / "out", on_epoch=lambda row: sizes.append(place.stat().st_size), **HOW)
    assert max(sizes) - min(sizes) < 100


def flips_of(path, count, seed):
    """Yield after each of ``count`` flips of one bit of ``path``, which is repaired in between."""
    data, random = path.read_bytes(), np.random.default_rng(seed)
    for position in random.integers(len(data), size=count):
        flip(path, position, random.integers(8))
        yield int(position)
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pt"])
def test_flipped_bit_is_found_or_changes_nothing(stopped, whole, tmp_path, name):
    path = shutil.copy((whole if name == "model.pt" else stopped / "run-0") / name, tmp_path / name)
    expected, refused = plain(load_tensors(path)), 0
    for position in flips_of(path, 150, seed=0):
        try:
            found = plain(load_tensors(path))
        except Exception:  # a reader tells it in a line
            refused += 1
        else:
            assert found == expected, f"a flip in byte {position} passes"
    assert refused > 75


def test_flipped_bit_in_the_weights_is_an_error_in_one_line(tmp_path, whole, tiny, capfd):
    out = shutil.copytree(whole, tmp_path / "out")
    np.savez(tmp_path / "images.npz", images=tiny.test_images)
    damage(out / "model.pt")
    assert main(["predict", str(out), f"{tmp_path}/images.npz", "--device", "cpu"]) == 2
    output, error = capfd.readouterr()
    assert error.startswith(f"error: {out}/model.pt: damaged") and (output, error.count("\n")) == ("", 1)
    with pytest.raises(InputError, match=r"model\.pt cannot be read \(.* its checksum is wrong\); move it away"):
        fit(RECIPE, tiny, resume=out, **HOW)


def test_report_reads_no_weights(tmp_path, whole, capfd):
    out = shutil.copytree(whole, tmp_path / "out")
    for path in (out / "model.pt", out / "run-0/model.pt"):
        path.write_bytes(b"damaged")
    assert main(["report", str(out)]) == 0 and capfd.readouterr().err == ""


@pytest.mark.parametrize("change", ["curves.png", "summary.json", "an earlier summary", "rows"])
def test_resume_writes_what_is_missing_or_of_other_runs(tmp_path, whole, tiny, change):
    out = shutil.copytree(whole, tmp_path / "out")
    if change == "an earlier summary":
        summary = json.loads((out / "summary.json").read_text())
        summary["runs"][0]["test_accuracy"] -= 1
        (out / "summary.json").write_text(json.dumps(summary))
    elif change == "rows":
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, tiny, resume=out, runs=2, **HOW | {"log": stop_after((1, 2))})
        fit(RECIPE, tiny, resume=out, runs=2, **HOW)
        fit(RECIPE, tiny, output=tmp_path / "two", runs=2, **HOW)
        assert contents(out) == contents(tmp_path / "two")
        return
    else:
        (out / change).unlink()
    fit(RECIPE, tiny, resume=out, **HOW)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("left", ["summary.json", "nothing"])
def test_checkpoint_of_a_run_that_has_ended_is_removed_on_resume(tmp_path, stopped, whole, tiny, left):
    """A process was killed after it wrote ``result.json``; ``left`` was not written, or another process wrote all."""
    out = shutil.copytree(whole, tmp_path / "killed")
    shutil.copy(stopped / "run-0/checkpoint.pt", out / "run-0")
    (out / left).unlink(missing_ok=True)
    fit(RECIPE, tiny, resume=out, **HOW)
    assert contents(out) == contents(whole)


def test_rows_that_could_not_be_written_get_no_checkpoint(tmp_path, tiny):
    out = tmp_path / "out"

    def log(line):
        if line.startswith("epoch  1"):
            (out / "metrics.jsonl").rename(tmp_path / "moved")
            (out / "metrics.jsonl").mkdir()

    def stop(row):
        if row.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tiny, output=out, on_epoch=stop, **HOW | {"log": log})
    assert Checkpoint.load(out / "run-0/checkpoint.pt").epoch == 1


def test_many_runs_are_drawn_as_a_band():
    def row(run, epoch):
        loss = None if run == 3 else 1.0 + run
        return EpochRow(run, epoch, 1.0, 50.0, None, None, loss, 60.0 + run % 7, 1.0, 1.0)

    figure = curves_figure([row(run, epoch) for run in range(60) for epoch in (1, 2)], RECIPE, "many")
    loss, accuracy, _ = figure.axes
    assert [len(axes.lines) for axes in (loss, accuracy)] == [2, 2] and len(accuracy.collections) == 2
    assert list(accuracy.lines[1].get_ydata()) == [pytest.approx(60 + sum(run % 7 for run in range(60)) / 60)] * 2
    points = accuracy.collections[1].get_paths()[0].vertices[:, 1]
    assert (points.min(), points.max()) == (60, 66)


def test_draft_of_a_dead_writer_is_removed_and_others_stay(tmp_path):
    stays, goes = tmp_path / ".out.json.swp", tmp_path / f".out.json.{'0' * 16}.draft"
    stays.touch()
    goes.touch()
    with atomic_write(tmp_path / "out.json") as draft, atomic_write(tmp_path / "out.json") as second:
        assert draft.exists() and second.exists(), "the first writer is alive"
        second.write_text("second")
        draft.write_text("first")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.json.swp", "out.json"]
    assert (tmp_path / "out.json").read_text() == "first"


def test_killed_writer_leaves_a_draft_until_the_next_write(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from cifar_fast.utils.files import atomic_write
with atomic_write(Path({str(tmp_path / "out.json")!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code])
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "out.json") as draft:
        draft.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_draft_follows_no_planted_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 16)
    (tmp_path / f".out.json.{'0' * 16}.draft").symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "out.json"):
        pass
    assert victim.read_text() == "mine" and not (tmp_path / "out.json").exists()


def test_lines_wait_for_those_of_another_process(tmp_path):
    """A writer that fails cuts its own lines off, so nobody may append at that time."""
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "rows").touch()
    with open(tmp_path / "rows", "a") as other, ThreadPoolExecutor() as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = pool.submit(append_lines, tmp_path / "rows", "mine\n")
        with pytest.raises(WaitedTooLong):
            done.result(timeout=0.2)
        fcntl.flock(other, fcntl.LOCK_UN)
        done.result(timeout=60)
    assert (tmp_path / "rows").read_text() == "mine\n"


def test_lines_are_appended_to_no_link_and_to_no_half_line(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        append_lines(tmp_path / "link", "x\n")
    assert not (tmp_path / "victim").exists()
    (tmp_path / "rows").write_text('{"half')
    append_lines(tmp_path / "rows", "x\n")
    assert (tmp_path / "rows").read_text() == '{"half\nx\n'


def test_files_have_the_permissions_that_the_user_chose(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a"):
            pass
        append_lines(tmp_path / "b", "x\n")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]

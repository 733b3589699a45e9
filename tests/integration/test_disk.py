"""Full disks, read-only folders, removed folders, closed outputs: one clear line, and nothing finished is lost."""

import builtins
import errno
import os
import pwd
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar_fast.cli.main import main
from cifar_fast.utils.device import ensure_triton_cache
from cifar_fast.utils.progress import lines_to
from tests.helpers import contents, files_in, files_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]  # whole trainings

OPTIONS = "--widths 4 8 --epochs 2 --batch-size 16 --device cpu --dtype float32 --backend eager"
FULL, READ_ONLY = "No space left on device", "Read-only file system"
UNPRINTED = f"error: lines cannot be printed ({FULL}); the work continues without them\n"


@pytest.fixture(scope="module")
def train(npz):
    """Return a function that runs ``cifar-fast train`` on ``tiny`` with more flags, and returns its exit code."""
    return lambda flags: main(f"train --dataset npz --data-dir {npz} {OPTIONS} {flags}".split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train, no_curves):
    """The folder of two runs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert train(f"--runs 2 --output {folder}") == 0
    return folder


@pytest.fixture
def fill(monkeypatch):
    """Return a function that puts standard streams on a full disk, and returns what they write to."""
    with open("/dev/full", "w") as full:

        def replace(*names):  # in the test itself, because pytest sets the streams before it
            for name in names:
                monkeypatch.setattr(sys, name, full)
            return full

        yield replace


def fail_writes(monkeypatch, name, number=errno.ENOSPC):
    """Let each write of a file whose path ends with ``name`` fail with the error ``number``."""

    def failing(function, path_of):
        def call(*arguments, **options):
            if (path := path_of(*arguments)) and str(path).endswith(name):
                raise OSError(number, os.strerror(number), str(path))
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(os, "replace", failing(os.replace, lambda source, target: target))
    opened = failing(builtins.open, lambda path, mode="r", *more: None if mode in ("r", "rb") else path)
    monkeypatch.setattr(builtins, "open", opened)
    opened = failing(os.open, lambda path, flags, *more: path if flags & (os.O_WRONLY | os.O_RDWR) else None)
    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize(
    "name",
    [
        "training.json",
        "metrics.jsonl",
        "run-0/checkpoint.pt",
        "run-1/model.pt",
        "run-1/result.json",
        "out/model.pt",
        "summary.json",
        "curves.png",
    ],
)
def test_each_file_of_a_training_may_fail_and_a_resume_completes_it(tmp_path, train, whole, monkeypatch, capfd, name):
    number, reason = (errno.EROFS, READ_ONLY) if name == "summary.json" else (errno.ENOSPC, FULL)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_writes(patch, name, number)
        code = train(f"--runs 2 --output {out}")
    file = out / name.removeprefix("out/")
    told = [] if "checkpoint" in name else [f"error: {file} could not be written ({reason})"]  # it was replaced
    assert (code, capfd.readouterr().err.splitlines()) == (len(told), told)
    lost = {str(file.relative_to(out))} | ({"model.pt", "run-1/result.json"} if name == "run-1/model.pt" else set())
    kept = {"run-1/checkpoint.pt", "run-1/checkpoint-previous.pt"} if name.startswith("run-1") else set()
    assert {*files_in(out)} == ({*files_of(2)} - lost) | kept
    if name == "training.json":  # nothing can be resumed without it
        return
    assert main(["train", "--resume", str(out)]) == 0
    assert contents(out) == contents(whole)


def test_description_of_a_training_is_written_as_soon_as_the_disk_has_room(tmp_path, train, whole, monkeypatch):
    with monkeypatch.context() as patch:
        fail_writes(patch, "training.json")

        def log(line):
            if line.startswith("epoch  2"):
                patch.undo()

        with lines_to(log):
            assert train(f"--runs 2 --output {tmp_path}/out") == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_full_disk_in_torch_save_has_a_plain_reason(tmp_path, train, monkeypatch, capfd):
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", lambda *arguments: (_ for _ in ()).throw(error))
    assert train(f"--output {tmp_path}/out") == 1
    assert capfd.readouterr().err == (
        f"error: {tmp_path}/out/run-0/model.pt could not be written (not all bytes could be written; the disk may be "
        "full)\n"
    )


@pytest.mark.parametrize("name", ["report.md", "report.json", "report-curves.png"])
def test_full_disk_ends_a_report_in_one_line_after_its_table(tmp_path, whole, monkeypatch, capfd, name):
    fail_writes(monkeypatch, name)
    assert main(["report", str(whole), "--output", str(tmp_path / "report")]) == 2
    output, error = capfd.readouterr()
    assert output.startswith("| variant") and f"--output {tmp_path}/report: cannot be written to ({FULL})" in error
    assert error.count("\n") == 1 and name not in files_in(tmp_path / "report")
    assert not [file for file in files_in(tmp_path / "report") if file.startswith(".")]


def test_full_disk_ends_predict_in_one_line_after_its_predictions(tmp_path, whole, npz, monkeypatch, capfd):
    fail_writes(monkeypatch, "out.json")
    assert main(["predict", str(whole), str(npz), "--json", f"{tmp_path}/out.json", "--device", "cpu"]) == 2
    output, error = capfd.readouterr()
    assert output.count("[") == 16 and files_in(tmp_path) == []
    assert error == f"error: --json {tmp_path}/out.json: cannot be written to ({FULL}); choose another file\n"


def test_images_are_trained_on_if_their_cache_cannot_be_written(tmp_path, monkeypatch, capfd):
    for path in (f"{split}/{name}/{i}.png" for split in ("train", "test") for name in "ab" for i in range(16)):
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.radial_gradient("L").convert("RGB").resize((32, 32)).save(tmp_path / "images" / path)
    fail_writes(monkeypatch, ".npz")
    flags = f"--dataset folder --data-dir {tmp_path}/images --output {tmp_path}/out {OPTIONS}"
    assert main(["train", *flags.split()]) == 0
    assert f"({FULL}); the next start decodes them again" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "images."))] == []


def test_archive_that_cannot_be_unpacked_leaves_nothing_half_done(cifar10, tmp_path, monkeypatch, capfd):
    before = files_in(cifar10)
    with monkeypatch.context() as patch:
        fail_writes(patch, "data_batch_2")
        assert main(f"train --data-dir {cifar10} --output {tmp_path}/out {OPTIONS}".split()) == 2
    error = capfd.readouterr().err
    assert FULL in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert {*files_in(cifar10)} - {*before} <= {
        f"cifar-10-batches-py/{name}" for name in ("data_batch_1", "batches.meta")
    }
    assert main(f"train --data-dir {cifar10} --output {tmp_path}/out {OPTIONS}".split()) == 0


def test_event_files_on_a_full_disk_end_nothing(tmp_path, train, monkeypatch, capfd):
    pytest.importorskip("tensorboard")
    fail_writes(monkeypatch, "tfevents.0000000000")
    assert train(f"--output {tmp_path}/out --log tensorboard") == 1
    assert capfd.readouterr().err == f"error: {tmp_path}/out/tensorboard could not be written ({FULL})\n"
    assert {*files_of(1)} == {*files_in(tmp_path / "out")}


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_folder_that_is_removed_during_a_training_is_made_again(tmp_path, train, whole, npz, capfd, command):
    folder, done = tmp_path / "sweep/out", []
    options = f'dataset = "npz"\ndata_dir = "{npz}"\noutput = "{tmp_path}/sweep"\nruns = 2\ndevice = "cpu"\n'
    recipe = 'dtype = "float32"\nbackend = "eager"\n[recipe]\nwidths = [4, 8]\nepochs = 2\nbatch_size = 16\n'
    (tmp_path / "spec.toml").write_text(f"{options}{recipe}[variants.out]\n")

    def log(line):
        if "epoch  2" in line and not done:
            done.append(line)
            shutil.rmtree(tmp_path / "sweep")

    with lines_to(log):
        spec = str(tmp_path / "spec.toml")
        assert (main(["sweep", spec]) if command == "sweep" else train(f"--runs 2 --output {folder}")) == 0
    output, error = capfd.readouterr()
    assert f"{folder} was removed during the training; it is made again" in output and error == ""
    assert contents(folder)[:2] == contents(whole)[:2]
    assert main(["sweep", spec] if command == "sweep" else ["train", "--resume", str(folder)]) == 0
    assert "nothing to do" in capfd.readouterr().out or command == "sweep"


def test_training_whose_folder_was_removed_can_be_resumed(tmp_path, npz, train, capfd):
    """The rows of its earlier epochs are written again, because a checkpoint needs them."""
    flags, out = f"--dataset npz --data-dir {npz} {OPTIONS} --epochs 5", tmp_path / "out"

    def log(line):
        if line.startswith("epoch  2"):
            shutil.rmtree(out)
        if line.startswith("epoch  4"):
            raise KeyboardInterrupt

    with lines_to(log):
        assert main(["train", *flags.split(), "--output", str(out)]) == 130
    assert main(["train", "--resume", str(out)]) == 0
    assert "resuming after epoch 3" in capfd.readouterr().out
    assert main(["train", *flags.split(), "--output", f"{tmp_path}/whole"]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_working_folder_that_was_removed_costs_no_results(tmp_path, npz, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def log(line):
        if line.startswith("epoch  1"):
            (tmp_path / "here").rmdir()

    with lines_to(log):
        assert main(f"train --dataset npz --data-dir {npz} {OPTIONS} --output {tmp_path}/out".split()) == 0
    assert files_in(tmp_path / "out") == files_of(1)


def test_folder_that_became_a_file_costs_no_line_and_no_traceback(tmp_path, train, capfd):
    out = tmp_path / "out"

    def log(line):
        if line.startswith("epoch  1"):
            shutil.rmtree(out)
            out.touch()

    with lines_to(log):
        assert train(f"--output {out}") == 1
    output, error = capfd.readouterr()
    assert "\ntest accuracy " in output and "Traceback" not in error
    assert all("could not be written" in line for line in error.splitlines())


def test_read_only_folder_is_refused_before_the_training(tmp_path, train, monkeypatch, capfd):
    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, READ_ONLY)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert train(f"--output {tmp_path}/out") == 2
    error = capfd.readouterr().err
    assert f"--output {tmp_path}/out: cannot be written to ({READ_ONLY}); choose another folder\n" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "predict", "report", "--help"])
def test_full_disk_behind_the_output_ends_no_command(tmp_path, train, whole, npz, fill, capfd, command):
    done = {
        "train": lambda: train(f"--runs 2 --output {tmp_path}/out"),
        "predict": lambda: main(["predict", str(whole), str(npz), "--json", f"{tmp_path}/out.json", "--device", "cpu"]),
        "report": lambda: main(["report", str(whole), "--output", f"{tmp_path}/report"]),
        "--help": lambda: main(["--help"]),
    }
    full = fill("stdout")
    assert (done[command](), capfd.readouterr().err) == (1, UNPRINTED)
    full.flush()  # Python does this at its end, and would fail
    if command == "train":
        assert contents(tmp_path / "out") == contents(whole)
    assert len(files_in(tmp_path)) == {"train": 10, "predict": 1, "report": 4, "--help": 0}[command]


def test_full_disk_behind_both_outputs_ends_no_training(tmp_path, train, fill):
    fill("stdout", "stderr")
    assert train(f"--output {tmp_path}/out") == 1
    assert files_in(tmp_path / "out") == files_of(1)


def test_closed_outputs_end_no_training(tmp_path, train, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert train(f"--output {tmp_path}/out") == 0
    assert sys.stdout.name == sys.stderr.name == os.devnull
    assert files_in(tmp_path / "out") == files_of(1)


def test_closed_pipe_ends_a_training_with_a_line_on_how_to_resume(tmp_path, train, whole, monkeypatch, capfd):
    reader, writer = os.pipe()

    def log(line):
        if line.startswith("epoch  2"):
            os.close(reader)

    with monkeypatch.context() as patch, open(writer, "w") as pipe:
        patch.setattr(sys, "stdout", pipe)
        with lines_to(log), pytest.raises(SystemExit) as end:
            train(f"--runs 2 --output {tmp_path}/out")
    assert end.value.code == 141
    resume = f"to resume: cifar-fast train --resume {tmp_path}/out\n"
    assert capfd.readouterr().err == f"the reader of the output is gone; {resume}"
    assert main(["train", "--resume", f"{tmp_path}/out"]) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_unknown_home_folder_is_an_error_only_for_a_path_that_needs_it(tmp_path, train, monkeypatch, capfd):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert train("--output ~/out") == 2
    assert capfd.readouterr().err == "error: ~/out: the home folder is unknown; write the path in full, or set $HOME\n"
    assert train(f"--output {tmp_path}/out") == 0


@pytest.mark.parametrize("home", ["/proc/none", "writable"])
def test_triton_gets_a_private_cache_if_the_home_folder_cannot_be_written_to(tmp_path, monkeypatch, caplog, home):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # restored afterwards
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setenv("HOME", home if home.startswith("/") else str(tmp_path))
    caplog.set_level("INFO")
    ensure_triton_cache()
    if home == "writable":
        assert not os.environ["TRITON_CACHE_DIR"] and not caplog.records
    else:
        assert Path(os.environ["TRITON_CACHE_DIR"]).stat().st_mode & 0o777 == 0o700
        assert "/proc/none: cannot be written to" in caplog.text and caplog.text.count("\n") == 1

"""``cifar-fast train`` at a terminal: its flags, its output, its errors."""

import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from datetime import datetime

import pytest
import torch

from cifar_fast import Recipe, __version__
from cifar_fast.cli.flags import recipe_of
from cifar_fast.cli.train import make_parser as train_parser
from cifar_fast.train import main
from cifar_fast.utils.progress import LOGGER
from tests.helpers import ROOT, contents

NARROW = "--widths 4 8 8 8 16 32 32 32 --epochs 2 --batch-size 32 --device cpu"


def run(flags, **settings):
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "cifar_fast.train", *flags.split()]
    return subprocess.run(command, capture_output=True, text=True, **settings)


@pytest.mark.slow  # starts a process
def test_command_prints_plain_lines_and_writes_its_files(tmp_path, npz):
    done = run(f"--dataset npz --data-dir {npz} --runs 2 --output {tmp_path}/out {NARROW}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("torch ") and "threads, backend eager" in lines[0]
    assert lines[1].startswith("auto: ")
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 4
    assert all(
        words in epochs[0] for words in ("epoch  1  train loss ", "  train acc ", "  test acc ", "  training time ")
    )
    assert "mean of 2 runs" in lines[-2] and lines[-1] == f"written to {tmp_path}/out"
    assert "\r" not in done.stdout + done.stderr and "it/s" not in done.stderr
    assert len(json.loads((tmp_path / "out/summary.json").read_text())["runs"]) == 2


@pytest.mark.slow  # starts a process
def test_redirected_output_has_each_line_at_once(tmp_path, npz):
    flags = f"--dataset npz --data-dir {npz} --output {tmp_path}/out {NARROW} --epochs 100000"
    with open(tmp_path / "log", "w") as log:
        training = subprocess.Popen([sys.executable, "-m", "cifar_fast.train", *flags.split()], stdout=log)
        try:
            deadline = time.monotonic() + 60
            while "epoch  2" not in (tmp_path / "log").read_text():
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
        finally:
            training.kill()
            training.wait()


@pytest.mark.slow  # starts a process
def test_closed_pipe_ends_the_command_with_a_line(tmp_path, npz):
    flags = f"--dataset npz --data-dir {npz} --output {tmp_path}/out {NARROW} --epochs 100000"
    command = f"{sys.executable} -m cifar_fast.train {flags} | head -5"  # two lines of the start, three epochs
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("torch ") and done.stdout.count("\n") == 5
    hint = f"the reader of the output is gone; to resume: cifar-fast train --resume {tmp_path}/out\n"
    assert (done.returncode, done.stderr) == (0, hint)


@pytest.mark.nightly  # starts processes
def test_jobs_that_start_together_have_a_folder_each(tmp_path, npz):
    """The names of new folders contain the second in which a job starts. These jobs get one name."""
    code = f"""
import sys
from cifar_fast.cli import train
train.default_output = lambda dataset: {str(tmp_path / "runs/same")!r}
sys.exit(train.main())
"""
    flags = f"--dataset npz --data-dir {npz} {NARROW}"
    jobs = [subprocess.Popen([sys.executable, "-c", code, *flags.split(), "--seed", str(seed)]) for seed in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    folders = list((tmp_path / "runs").iterdir())
    seeds = [json.loads((folder / "summary.json").read_text())["runs"][0]["seed"] for folder in folders]
    assert sorted(seeds) == [0, 1]
    assert {len((folder / "metrics.jsonl").read_text().splitlines()) for folder in folders} == {2}


@pytest.mark.nightly  # starts a process
def test_folder_name_that_the_terminal_cannot_show_is_escaped(tmp_path, npz):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run(f"--dataset npz --data-dir {npz} --output {tmp_path}/häuser {NARROW}", env=env)
    assert done.returncode == 0, done.stderr
    assert "h\\xe4user" in done.stdout.splitlines()[-1]
    assert (tmp_path / "häuser/summary.json").exists()


@pytest.mark.nightly  # starts a process
def test_curves_are_drawn_with_an_unknown_matplotlib_backend(tmp_path, npz):
    done = run(
        f"--dataset npz --data-dir {npz} --output {tmp_path}/out {NARROW}", env=os.environ | {"MPLBACKEND": "not there"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/curves.png").exists()


def test_unwritten_file_gives_exit_code_1(tmp_path, npz, monkeypatch, capfd):
    monkeypatch.setattr(torch, "save", lambda *args: 1 / 0)
    assert main(f"--dataset npz --data-dir {npz} --output {tmp_path}/out {NARROW}".split()) == 1
    output, error = capfd.readouterr()
    assert "\ntest accuracy " in output
    assert error == f"error: {tmp_path}/out/run-0/model.pt could not be written (division by zero)\n"


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_compiler_cache_that_cannot_be_written_is_named(tmp_path, npz, monkeypatch, capfd, variable):
    monkeypatch.setenv(variable, "/proc/none")
    assert main(f"--dataset npz --data-dir {npz} --output {tmp_path}/out {NARROW}".split()) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: ${variable} (/proc/none): cannot be written to") and error.count("\n") == 1


@pytest.mark.nightly  # starts processes
def test_torchvision_is_needed_only_for_its_data_sets(tmp_path, npz):
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"  # as if built for another torch
    (tmp_path / "path/torchvision").mkdir(parents=True)
    (tmp_path / "path/torchvision/__init__.py").write_text(broken)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}/path:{os.getcwd()}"}
    done = run(f"--dataset npz --data-dir {npz} --output {tmp_path}/out {NARROW}", env=env)
    assert done.returncode == 0, done.stderr
    done = run(f"--dataset cifar10 --data-dir {tmp_path}/none --output {tmp_path}/out2 {NARROW}", env=env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "which cannot be imported" in done.stderr and "install the torchvision for this torch" in done.stderr


@pytest.mark.slow  # starts a process
def test_terminal_shows_a_progress_bar_of_steps_with_variant_run_and_time_to_go(tmp_path, npz):
    options = f'dataset = "npz"\ndata_dir = "{npz}"\noutput = "{tmp_path}/out"\nruns = 2\n'
    recipe = "[recipe]\nwidths = [4, 8]\nepochs = 2\nbatch_size = 32\n[variants.small]\n"
    (tmp_path / "spec.toml").write_text(options + recipe)
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    flags = f"-m cifar_fast sweep {tmp_path}/spec.toml"
    with subprocess.Popen([sys.executable, *flags.split()], stdout=subprocess.DEVNULL, stderr=terminal):
        os.close(terminal)
        output = b""
        while True:
            try:
                output += os.read(reader, 4096)
            except OSError:  # the other end is closed
                break
    os.close(reader)
    assert b"small: run 1 of 2, epoch 1/2" in output and b"/1 [" in output and b" to go]" in output


@pytest.mark.slow  # whole trainings
def test_profile_reports_the_time_of_a_step_and_does_not_train(tmp_path, npz, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(f"--dataset npz --data-dir {npz} --profile traces {NARROW}".split()) == 0
    output = capsys.readouterr().out
    assert "convolutions forward" in output and "idle" in output and "optimizer" in output
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == ["profile.json", "trace.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["traces"]


def test_results_go_to_a_new_folder_under_runs_by_default(tmp_path, npz, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(f"--dataset npz --data-dir {npz} {NARROW}".split()) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("npz-") and (folder / "summary.json").exists()


def test_each_constant_of_the_recipe_is_a_flag_with_help(capsys):
    flags = (
        "--epochs 3 --batch-size 7 --widths 6 7 --celu-alpha 0.5 --output-scale 2 --label-smoothing 0.1 "
        "--momentum 0.8 --weight-decay 1e-3"
        " --lr-knots 0 2 --lr-values 1 0 --crop-padding 2 --no-flip --cutout-size 0"
    )
    recipe = Recipe(3, 7, (6, 7), 0.5, 2, 0.1, 0.8, 1e-3, (0, 2), (1, 0), 2, False, 0)
    assert recipe_of(train_parser().parse_args(flags.split())) == recipe
    assert recipe_of(train_parser().parse_args([])) == Recipe()
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in flags.split() if flag.startswith("--"))


def test_flags_override_the_recipe_file(tmp_path, capsys):
    Recipe(epochs=5, cutout_size=6).save(tmp_path / "r.json")
    assert main(["--recipe", str(tmp_path / "r.json"), "--epochs", "7", "--print-recipe"]) == 0
    assert Recipe.from_json(capsys.readouterr().out) == Recipe(epochs=7, cutout_size=6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset npz", "needs --data-dir"),
        ("--dataset npz --data-dir none.npz", "none.npz: no such file"),
        ("--dataset folder --data-dir none", "none/train: No such file or directory"),
        ("--dataset mnist", "invalid choice: 'mnist'"),
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        ("--epochs two", "invalid int value: 'two'"),
        ("--batch-size -3", "--batch-size must be at least 1"),
        ("--widths 8 0", "widths must be"),
        ("--lr-knots 0 5 1", "--lr-knots must increase"),
        ("--runs 0", "runs must be at least 1"),
        ("--seed -1", "seed must lie between 0"),
        ("--seed 9999999999999999999", "seed must lie between 0"),
        ("--dtype float16 --device cpu", "float16 needs a GPU"),
        ("--device cuda:99", "--device cuda:99: "),
        ("--backend fused --device cuda:98", "--device cuda:98: "),
        ("--batch-size 1 --widths 6 12 24 48 96", "--batch-size must be at least 2 with these widths"),
        ("--recipe none.json", "cannot read the recipe none.json"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag; --help lists the flags"),
        ("--lr 0.1", "unrecognized arguments: --lr 0.1; did you mean --lr-values?"),
        ("--epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs?"),
        ("--batch_size=3", "unrecognized arguments: --batch_size=3; did you mean --batch-size?"),
        ("--dtype fp16", "; did you mean float16?"),
        ("--device gpu", "; did you mean cuda?"),
        ("--dataset cifar-10", "; did you mean cifar10"),
        ("--output {file}/out", "is not a directory"),
        (
            "--dataset synthetic --batch-size 20000 --output out",
            "10000 training images are fewer than one batch of 20000",
        ),
    ],
)
def test_bad_input_is_one_error_line_and_writes_nothing(tmp_path, monkeypatch, capfd, flags, words):
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(work)
    narrow = "" if "--widths" in flags else "--widths 4 8 8 8 16 32 32 32 "
    assert main((narrow + flags.format(file=tmp_path / "file")).split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and words in error
    assert error.count("\n") == 1
    assert not list(work.iterdir())


def test_diverged_run_is_one_error_line_and_is_recorded(tmp_path, npz, capfd):
    flags = f"--dataset npz --data-dir {npz} {NARROW} --lr-values 1e30 1e30 0 --output {tmp_path}/out"
    assert main(flags.split()) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: the loss is not finite at step") and error.count("\n") == 1
    assert json.loads((tmp_path / "out/run-0/result.json").read_text())["run"]["step"] == int(error.split()[8])


def test_traceback_flag_shows_the_traceback_of_an_error(npz, capfd):
    assert main(f"--dataset npz --data-dir {npz} --batch-size 97 --traceback".split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1].startswith("error: ")
    assert LOGGER.level == logging.INFO, "the next command prints no tracebacks"


def test_folder_with_results_is_refused_before_the_data_are_read(tmp_path, npz, capsys):
    (tmp_path / "summary.json").write_text("{}")
    assert main(f"--dataset npz --data-dir none.npz --output {tmp_path}".split()) == 2
    assert "already holds results" in capsys.readouterr().err


@pytest.mark.slow  # starts a process
def test_bad_input_shows_no_traceback_in_a_process(tmp_path):
    done = run("--dataset npz --data-dir none.npz", cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 2
    assert done.stderr == "error: none.npz: no such file; --data-dir must name an .npz file\n"
    assert not list(tmp_path.iterdir())


def test_import_of_the_package_is_light_and_silent():
    code = "import sys, cifar_fast; print([name for name in ('torch', 'numpy', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_public_name_exists():
    import cifar_fast

    assert all(getattr(cifar_fast, name) is not None for name in cifar_fast.__all__)
    assert {"Recipe", "fit", "load_dataset", "draw_epoch"} <= set(dir(cifar_fast))
    with pytest.raises(AttributeError):
        _ = cifar_fast.nothing


@pytest.mark.slow
def test_demo_learns_the_synthetic_data_set(tmp_path):
    """`make demo` runs the same with wider layers and more epochs."""
    flags = "--dataset synthetic --widths 8 16 16 16 32 64 64 64 --epochs 1 --batch-size 128 --device cpu"
    done = run(f"{flags} --output {tmp_path}/demo")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "demo/summary.json").read_text())["test_accuracy_mean"] > 30  # of ten classes


def test_training_is_repeated_like_an_earlier_one_in_another_folder(tmp_path, npz, monkeypatch, no_curves):
    flags = "--widths 4 8 --epochs 2 --batch-size 16 --device cpu --seed 3 --runs 2 --save-logits --dtype float32"
    (tmp_path / "data.npz").write_bytes(npz.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(f"--dataset npz --data-dir data.npz --output first {flags} --memory-format channels_last".split()) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["--like", "../first", "--output", "again"]) == 0
    again, first = (contents(folder, "data_source") for folder in (tmp_path / "elsewhere/again", tmp_path / "first"))
    for values in (*again[2:4], *first[2:4]):
        del values["auto"]  # the second training is given what the first one chose
    assert again == first
    assert main(["--like", "../first", "--output", "more", "--epochs", "1", "--seed", "4"]) == 0
    summary = json.loads((tmp_path / "elsewhere/more/summary.json").read_text())
    assert (summary["recipe"]["epochs"], summary["recipe"]["widths"]) == (1, [4, 8])
    text = (tmp_path / "first/metrics.jsonl").read_text()
    assert max(map(len, re.findall(r'_(?:loss|accuracy)": ([\d.]+)', text))) <= 11, "float32 has nine digits at most"
    assert [run["seed"] for run in summary["runs"]] == [4, 5]


def test_summary_tells_how_to_repeat_the_training_and_names_no_user(tmp_path, npz, monkeypatch, capsys, no_curves):
    home = tmp_path / "home/somebody"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (home / "data.npz").write_bytes(npz.read_bytes())
    flags = f"--dataset npz --data-dir {home}/data.npz --widths 4 8 --epochs 1 --batch-size 16 --output {home}/out"
    assert main(f"{flags} --device cpu --momentum 0.85".split()) == 0
    text = (home / "out/summary.json").read_text()
    summary = json.loads(text)
    assert summary["command"].startswith("cifar-fast train --dataset npz --data-dir ~/data.npz --widths 4 8 ")
    assert abs(time.time() - datetime.fromisoformat(summary["started"]).timestamp()) < 60
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    commit = summary["environment"]["commit"]
    assert summary["environment"]["cifar_fast"] == __version__
    assert commit.removesuffix("-dirty") == head.stdout.strip() if head.returncode == 0 else commit is None
    assert "somebody" not in text
    capsys.readouterr()
    assert main(["--recipe", f"{home}/out/summary.json", "--epochs", "3", "--print-recipe"]) == 0
    recipe = Recipe.from_json(capsys.readouterr().out)
    assert (recipe.epochs, recipe.momentum, recipe.widths) == (3, 0.85, (4, 8))


def test_summary_shows_no_folder_outside_and_no_token(tmp_path, npz, monkeypatch, no_curves):
    """A path below the working folder is relative, and the last name of another one is kept."""
    (tmp_path / "here").mkdir()
    (tmp_path / "secret").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", "/nowhere")
    for place in ("here/data.npz", "secret/more.npz"):
        (tmp_path / place).write_bytes(npz.read_bytes())
    flags = f"--dataset npz --data-dir {tmp_path}/here/data.npz --also-test x={tmp_path}/secret/more.npz --widths 4 8"
    url = "https://me:s3cret@example.org/a.gz?sig=s3cret#s3cret"
    flags += f" --epochs 1 --batch-size 16 --device cpu --output out --data-url {url}"
    assert main(flags.split()) == 0
    text = (tmp_path / "here/out/summary.json").read_text()
    summary = json.loads(text)
    assert summary["dataset"]["source"] == "data.npz" and summary["settings"]["also_test"] == {"x": ".../more.npz"}
    assert summary["command"].endswith("--data-url 'https://example.org/a.gz?...'")
    assert "secret" not in text and str(tmp_path) not in text
    assert "s3cret" not in (tmp_path / "here/out/training.json").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "here/out", "--runs", "2"]) == 0, "the data is found from another folder"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--like {tmp}", "--like {tmp}: holds no training.json"),
        ("--like a --resume b", "give --like or --resume"),
        ("--recipe {tmp}/r.json", "{tmp}/r.json: the key recipe must hold a JSON object"),
    ],
)
def test_folder_that_cannot_be_repeated_is_one_line(tmp_path, capsys, flags, words):
    (tmp_path / "r.json").write_text('{"recipe": 3}')
    assert main(flags.format(tmp=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words.format(tmp=tmp_path)}") and error.count("\n") == 1

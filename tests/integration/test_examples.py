"""Run every example in its small form, and check its output."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_fast import load_dataset

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--epochs", "1", "--runs", "2", "--images", "320")


def run_example(name, *flags, **environment):
    """Return the lines that an example prints."""
    # Narrow networks gain nothing from more threads, which slow down the other processes.
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, EXAMPLES / name, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout.splitlines()


def test_every_example_has_a_test():
    text = Path(__file__).read_text()
    assert not [path.name for path in EXAMPLES.glob("*.py") if f'run_example("{path.name}"' not in text]


@pytest.mark.nightly
def test_result_has_rows_summary_and_weights():
    lines = run_example("train_and_read_result.py", "--small")
    assert [line.split(":")[0] for line in lines[:6]] == [
        f"run {run}, epoch {epoch}" for run in (0, 1) for epoch in (1, 2, 3)
    ]
    assert lines[6].startswith(("eager, ", "compiled, ", "fused, ")) and ": mean " in lines[6]
    assert lines[-1].startswith("first test image: class 'dots', predicted ")


@pytest.mark.slow
def test_own_images_train_from_folders_and_from_arrays(tmp_path):
    lines = run_example("own_images.py", tmp_path / "mine")
    assert "the same data in both forms: True" in lines
    assert lines[-2:] == ["folder: test accuracy 100.00 %", "npz: test accuracy 100.00 %"]
    folder = load_dataset("folder", tmp_path / "mine/images", log=None)
    assert folder.class_names == ("dark", "light")
    assert folder.digest == load_dataset("npz", tmp_path / "mine/images.npz").digest


@pytest.mark.nightly
def test_fused_norm_trains_another_model_like_the_plain_norm():
    lines = run_example("fused_norm_in_another_model.py")
    plain, fused = ([float(loss) for loss in line.split("losses ")[1].split()] for line in lines[:2])
    assert fused == pytest.approx(plain, rel=1e-4) and plain[-1] < plain[0]
    assert all(float(line.split("differ by ")[1].split()[0]) < 1e-3 for line in lines[2:])


@pytest.mark.nightly
def test_mean_of_runs_has_an_interval():
    lines = run_example("mean_of_runs.py", *SMALL)
    assert [line.split(":")[0] for line in lines[:2]] == ["run 1", "run 2"]
    assert "95 % interval" not in lines[0] and "95 % interval" in lines[1] and "standard deviation" in lines[2]


@pytest.mark.nightly
def test_a_table_tells_what_each_trick_is_worth_and_results_can_be_kept(tmp_path):
    lines = run_example("which_trick_matters.py", *SMALL, "--output", tmp_path / "sweep")
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    tricks = ["batch-norm", "augmentation", "warm-up", "label-smoothing"]
    assert names[0] == "as-published" and {f"no-{trick}" for trick in tricks} <= set(names) and len(names) == 7
    assert {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()} == set(names)


@pytest.mark.nightly
def test_standard_deviation_is_printed_for_each_source_of_random_numbers():
    lines = run_example("variance_by_seed.py", *SMALL)
    sources = [line.split(" varied: standard deviation ")[0] for line in lines]
    assert sources == ["init_seed", "order_seed", "augment_seed", "all three"]


@pytest.mark.nightly
def test_label_noise_is_trained_at_each_fraction():
    lines = run_example("label_noise.py", *SMALL, "--fractions", "0", "0.5")
    assert [line.split(" wrong labels: test accuracy ")[0] for line in lines] == ["0 %", "50 %"]


@pytest.mark.nightly
def test_custom_model_is_trained_and_its_backend_printed():
    lines = run_example("custom_model.py", "--epochs", "1", "--runs", "1")
    assert lines[0].startswith("MyNet, 6,154 parameters, by the ") and lines[-1].startswith("test accuracy ")


@pytest.mark.nightly
def test_loader_speed_is_printed_beside_torchvision():
    lines = run_example("loader_speed.py", "--images", "64", "--rounds", "1", TRITON_INTERPRET="0")
    sides = ["cifar_fast.Loader", "torchvision, 0 workers", "torchvision, 2 workers"]
    assert [line.split(": ")[0] for line in lines[1:]] == sides


@pytest.mark.nightly
def test_each_epoch_is_logged_to_a_file(tmp_path):
    lines = run_example("log_anywhere.py", *SMALL, "--csv", tmp_path / "epochs.csv")
    assert lines[0].startswith(f"2 epochs logged to {tmp_path}/epochs.csv; test accuracy ")
    with (tmp_path / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["epoch"]) for row in rows] == [("0", "1"), ("1", "1")]
    assert all(0 <= float(row["test_accuracy"]) <= 100 for row in rows)


@pytest.mark.nightly
def test_optuna_prunes_trials():
    pytest.importorskip("optuna", reason="optuna is not installed")
    lines = run_example("prune_with_optuna.py", "--epochs", "2", "--trials", "5", "--images", "320")
    assert [line.split(":")[0] for line in lines] == [*(f"trial {i}" for i in range(5)), "best"]
    assert all(": validation accuracy " in line for line in lines[:3])  # the pruner waits for three trials
    assert all(": validation accuracy " in line or ": stopped early at " in line for line in lines[3:5])


@pytest.mark.slow
def test_missing_optuna_is_one_line(tmp_path):
    (tmp_path / "optuna.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{EXAMPLES.parent}"}
    command = [sys.executable, EXAMPLES / "prune_with_optuna.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "this example needs Optuna: pip install optuna\n")

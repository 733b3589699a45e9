"""Every example runs to its end as a process, in its small form, and prints what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_fast import load_dataset

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name, *flags):
    """The lines that an example prints."""
    # One thread: networks this narrow gain nothing from more, and lose much where other processes want the cores.
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, EXAMPLES / name, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout.splitlines()


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    assert not [path.name for path in EXAMPLES.glob("*.py") if f'run_example("{path.name}"' not in text]


@pytest.mark.long  # a process of its own
@pytest.mark.slow  # a process of its own
@pytest.mark.slow
def test_training_from_python_gives_rows_and_a_summary_and_weights():
    lines = run_example("train_and_read_result.py", "--small")
    assert [line.split(":")[0] for line in lines[:6]] == [
        f"run {run}, epoch {epoch}" for run in (0, 1) for epoch in (1, 2, 3)
    ]
    assert lines[6].startswith(("eager, ", "compiled, ", "fused, ")) and ": mean " in lines[6]
    assert lines[-1].startswith("the first test image is 'dots', and taken for ")


@pytest.mark.slow  # a process of its own
def test_own_images_train_as_folders_and_as_arrays(tmp_path):
    lines = run_example("own_images.py", tmp_path / "mine")
    assert "the same data in both forms: True" in lines
    assert lines[-2:] == ["folder: test accuracy 100.00 %", "npz: test accuracy 100.00 %"]
    folder = load_dataset("folder", tmp_path / "mine/images", log=None)
    assert folder.class_names == ("dark", "light")
    assert folder.digest == load_dataset("npz", tmp_path / "mine/images.npz").digest


@pytest.mark.long  # a process of its own
@pytest.mark.slow  # a process of its own
@pytest.mark.slow
def test_the_fused_norm_trains_another_model_as_the_plain_one_does():
    lines = run_example("fused_norm_in_another_model.py")
    plain, fused = ([float(loss) for loss in line.split("losses ")[1].split()] for line in lines[:2])
    assert fused == pytest.approx(plain, rel=1e-4) and plain[-1] < plain[0]
    assert all(float(line.split("differ by ")[1].split()[0]) < 1e-3 for line in lines[2:])

"""The package where Triton is not installed, as on macOS and Windows: a process that cannot import it."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

HIDE = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
"""
TRAIN = """
from cifar_fast.cli.main import main

FLAGS = "train --dataset synthetic --train-subset 64 --batch-size 32 --epochs 1 --widths 4 8 --device cpu"

def train(backend):
    assert main([*FLAGS.split(), "--dtype", "float32", "--backend", backend, "--output", backend]) == 0
"""
ON_A_GPU = """
import torch
from cifar_fast.kernels import launch

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
assert main("train --dataset synthetic --backend fused --device cuda --output gpu".split()) == 2
try:
    launch.run([], torch.device("cuda"))
except RuntimeError as error:
    print(error, file=sys.stderr)
"""


def without_triton(code, folder):
    """Run ``code`` in ``folder``; return the lines on standard error."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", HIDE + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr.splitlines()


def final_rows(folder, *backends):
    return [json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in backends]


@pytest.mark.slow  # a process that trains
def test_eager_and_fused_train_on_a_cpu_and_fused_on_a_gpu_says_what_is_missing(tmp_path):
    refusal, operators = without_triton(f"{TRAIN}train('eager')\ntrain('fused')\n{ON_A_GPU}", tmp_path)
    eager, fused = final_rows(tmp_path, "eager", "fused")
    assert fused["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)
    summary = json.loads((tmp_path / "fused/summary.json").read_text())
    assert summary["backend"] == "fused" and not [note for note in summary["notes"] if "plain torch" in note]
    reason = "Triton cannot be imported: No module named 'triton'"
    assert refusal == f"error: the fused backend cannot run here ({reason}); choose --backend eager or auto"
    assert operators == f"the operators need Triton on cuda ({reason})"


@pytest.mark.nightly  # torch.compile
def test_compiled_trains_on_a_cpu(tmp_path):
    without_triton(f"{TRAIN}train('eager')\ntrain('compiled')\n", tmp_path)
    eager, compiled = final_rows(tmp_path, "eager", "compiled")
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)

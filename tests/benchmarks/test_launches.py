"""The launches of a captured step and evaluation: reading a log, and their number."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.launches import logged
from cifar_fast import Recipe
from tests.helpers import small_dataset

STEP, EVALUATION = 80, 200  # maximum; an evaluation has 10,000 images
LOG = """\
L triton s1 apply_kernel grid=9,1,1 block=128
C capture 1 begins on s1, mode 0
M cudaMalloc 2097152 (in capture)
N triton s1 apply_kernel grid=64,2,1 block=128
N triton s1 triton_poi_fused_0 grid=18,1,1 block=128
N library s1 cublasGemmEx grid=0,0,0 block=0
N library s1 cublasGemmEx grid=0,0,0 block=0
N aten s1 _ZN2at6native50_GLOBAL__N__169a_17_FusedSgdKernel_cu_a5525multi_tensor_apply_kernelINS1_ grid=7,1,1 block=512
C capture 1 ends: 5 nodes, 1 streams
C capture 2 begins on s1, mode 0
N memcpy s1 memcpy
C capture 2 ends: 1 nodes, 1 streams
"""
LISTED = """\
step: 5 launches
    apply_kernel grid=64,2,1
    triton_poi_fused_0 grid=18,1,1
    cublasGemmEx
    cublasGemmEx
    at::native::FusedSgdKernel grid=7,1,1
    2 cuDNN's and cuBLAS's kernels
    1 our Triton kernels
    1 the compiler's Triton kernels
    1 torch's own kernels

evaluation: 1 launches
    memcpy
    1 copies and fills
"""


def test_launches_are_listed_in_order_and_counted_by_kind(tmp_path, capsys):
    (tmp_path / "log").write_text(LOG)
    assert main(["launches", str(tmp_path / "log")]) == 0
    assert capsys.readouterr().out == LISTED


def test_incomplete_or_missing_log_is_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / "log").write_text(LOG.partition("C capture 2")[0])
    for name, words in (("log", "1 captures, not the two"), ("none", "No such file")):
        assert main(["launches", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.nightly  # the compiler
def test_number_of_launches_does_not_grow(simulator, tmp_path):
    log = tmp_path / "log"
    small_dataset(2 * Recipe().batch_size, 10_000, 10).save(tmp_path / "images.npz")
    flags = f"--dataset npz --data-dir {tmp_path}/images.npz --backend fused --device cuda --dtype float16 --epochs 1"
    flags += f" --output {tmp_path}/x"
    command = [sys.executable, simulator, "--log", log, "-m", "cifar_fast.train", *flags.split()]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    step, evaluation = map(len, logged(log))
    assert step <= STEP and evaluation <= EVALUATION, f"{step} in a step, {evaluation} in an evaluation"

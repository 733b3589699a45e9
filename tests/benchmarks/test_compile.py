"""Compilation for GPUs that are not here, and the choices of the tuner."""

import json
import math

import pytest
import torch

from benchmarks.tune import candidates, cases_of, choose, layout
from cifar_fast import Recipe
from cifar_fast.diagnostics.kernel_cases import kernel_cases
from cifar_fast.kernels.launch import TABLE, table
from tests.helpers import cells, compiler

SPILLS = """
import tempfile, torch, triton, triton.language as tl, sys
from benchmarks.compile import compile_launch
from cifar_fast.kernels.launch import Launch
source = '''
import triton, triton.language as tl
@triton.jit
def hoards(x, y, N: tl.constexpr):
    a = tl.load(x + tl.arange(0, N))
    b = tl.load(x + N + tl.arange(0, N))
    c = tl.cumsum(a * b, 0)
    tl.store(y + tl.arange(0, N), c + a - b)
'''
open(sys.argv[1], 'w').write(source)
sys.path.insert(0, sys.argv[1].rsplit('/', 1)[0])
from hoarding import hoards
x, y = (torch.empty(n, device='meta', dtype=torch.float32) for n in (1 << 14, 1 << 13))
launch = Launch(hoards, (1,), {'x': x}, {'y': y}, {}, {'N': 1 << 13}, num_warps=1)
print(compile_launch('case', launch, 'sm_87').problems())
"""


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        pytest.param("float16", "sm_75", marks=pytest.mark.nightly),
        pytest.param("bfloat16", "sm_80", marks=pytest.mark.nightly),
        pytest.param("float32", "sm_120", marks=pytest.mark.nightly),
    ],
)
def test_kernels_compile_for_old_and_new_targets_without_spills_and_with_wide_accesses(dtype, target):
    """Compile for one target each. All seven targets in three dtypes take `python -m benchmarks compile` minutes."""
    done = compiler("-m", "benchmarks", "compile", "--dtype", dtype, "--targets", target)
    assert done.stdout.splitlines()[-1] == "no spills, and 128 bits wherever a large tensor is read or written"
    header, _, *lines = cells(done.stdout.splitlines())
    rows = [dict(zip(header, line)) for line in lines]
    assert {row["kernel"] for row in rows} == {
        *("augment_kernel", "statistics_kernel", "merge_statistics_kernel", "apply_kernel"),
        *("backward_sums_kernel", "merge_sums_kernel", "backward_apply_kernel"),
        *("cross_entropy_kernel", "record_kernel"),
    }
    assert {row["target"] for row in rows} == {target}
    assert all(float(row[name]) > 0 for row in rows for name in ("registers", "MB written"))


@pytest.mark.slow  # a compiler
def test_spills_are_a_problem(tmp_path):
    done = compiler("-c", SPILLS, str(tmp_path / "hoarding.py"))
    assert "bytes spilled" in done.stdout


PREDICTS = """
import torch
from cifar_fast.diagnostics.kernel_cases import Norm
from benchmarks.tune import predicting
from cifar_fast import Recipe
from cifar_fast.kernels.launch import table
case = Norm(Recipe().blocks()[2], 512, 0.075, torch.float16, 'inference')
for changes in {}, {'blocks': 1}, {'rows': 16, 'num_warps': 8}, {'rows': 256}:
    name = 'batch_norm_act.apply'
    trial = table() | {name: {'*': table()[name]['*'] | changes}}
    try:
        print(predicting('sm_80')(case, trial))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow  # a compiler
def test_prediction_depends_on_the_entry_and_refuses_unfit_ones():
    first, second, narrow, large = compiler("-c", PREDICTS).stdout.splitlines()
    copied = 2 * 512 * 128 * 16 * 16 * 2 / 1.83e12 * 1e6  # us on an A100
    assert all(copied < float(line) < 1.2 * copied for line in (first, second)) and first != second
    assert narrow.startswith("WrongResult ") and "of x are 64 bits wide" in narrow
    assert large.startswith("WrongResult ") and ("bytes spilled" in large or "% of the warps fit" in large)


def test_unchanged_table_is_written_byte_for_byte():
    assert layout(json.loads(TABLE.read_text())) == TABLE.read_text()


def test_candidates_have_the_fields_of_the_current_entry_and_are_distinct():
    for key, entries in table().items():
        for entry in entries.values():
            found = candidates(key, entry)
            assert found and entry not in found
            assert all(set(candidate) == set(entry) for candidate in found)
            assert len({str(candidate) for candidate in found}) == len(found)


@pytest.mark.parametrize(
    ("twice", "others", "best"),
    [
        ((10.0, 10.1), [9.0, 9.5], 0),
        ((10.0, 11.0), [9.0, 9.5], None),  # the gain is not twice the noise
        ((10.0, 10.1), [10.5, 11.0], None),
        ((math.inf, math.inf), [12.0, 11.0], 1),
        ((10.0, 10.1), [math.inf, math.inf], None),
        ((math.inf, math.inf), [math.inf, math.inf], None),
    ],
)
def test_fastest_entry_is_chosen_if_its_gain_is_not_noise(twice, others, best):
    current, entries = {"block": 99}, [{"block": 1}, {"block": 2}]
    assert choose(current, twice, list(zip(entries, others))) == (current if best is None else entries[best])


def test_every_entry_of_the_table_is_used_by_a_case():
    cases = kernel_cases(Recipe(), torch.float16)
    for key, entries in table().items():
        used_by = [cases_of(key, shape_class, cases, table()) for shape_class in entries]
        assert all(used_by) and len({id(case) for some in used_by for case in some}) == sum(map(len, used_by))

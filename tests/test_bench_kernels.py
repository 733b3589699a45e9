"""The benchmark suite without a GPU: its cases, what it computes, what it refuses, its bytes, and what pytest-benchmark writes of it."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import kernels as bench
from benchmarks import report
from benchmarks.launches import recipe_cases
from benchmarks.predict import predict
from benchmarks.tune import capture
from cifar_fast import Recipe
from kernels.batch_norm_celu import batch_norm_celu_reference
from tests.conftest import NARROW

RECIPE = Recipe()
SMALL = Recipe(batch_size=2, widths=NARROW)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ROOT = Path(__file__).parents[1]


def named(recipe, dtype=torch.float16):
    """The cases of ``recipe`` by name and direction, with few pictures to augment."""
    found = {}
    for case in bench.cases(recipe, dtype):
        small = dataclasses.replace(case, pictures=20) if isinstance(case, bench.Augmentation) else case
        found[f"{case.name}, {case.direction}"] = small
    return found


AUGMENTATION, POOLED = "augment to 8 channels, forward", "8x32x32, pool"
SMALL_CASES = [
    AUGMENTATION,
    "4x32x32, both",
    *(f"{POOLED}, {direction}" for direction in (*bench.DIRECTIONS, "evaluation")),
]


def made(name, dtype=torch.float32, sets=1):
    torch.manual_seed(0)
    case = named(SMALL, dtype)[name]
    return case, case.inputs(sets, DEVICE)


# -- the cases


def test_every_norm_shape_of_the_recipe_is_a_case_in_each_direction():
    shapes = [case.name for case in recipe_cases(RECIPE, torch.float16) if not case.name.startswith("augment")]
    training = {
        f"{name}, {direction}" for name in shapes if "eval" not in name for direction in ("forward", "backward", "both")
    }
    evaluation = {f"{name}uation" for name in shapes if "eval" in name}
    assert {name for name in named(RECIPE) if "augment" not in name} == training | evaluation
    assert len(training) == 18 and len(evaluation) == 3


def test_the_augmentation_is_a_case_at_each_number_of_channels():
    assert [name for name in named(RECIPE) if "augment" in name] == [
        f"augment to {c} channels, forward" for c in (3, 4, 8)
    ]


def test_no_two_cases_have_one_name():
    assert len(named(RECIPE)) == len(bench.cases(RECIPE, torch.float16))


# -- results


@pytest.mark.parametrize("name", SMALL_CASES)
@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_pass_the_check(implementation, name, dtype, few_programs):
    case, sets = made(name, dtype, sets=2)
    for call, given in zip(case.calls(implementation, sets), sets):
        expected = case.truth(given)
        for _ in range(2):  # as in a loop: the first run must leave its inputs as they were
            bench.check(case, call(), expected)


@pytest.mark.parametrize("name", SMALL_CASES)
def test_results_of_what_torch_compile_traces_pass_the_check(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case, (given,) = made(name)
    (call,) = case.calls("compiled", [given])
    bench.check(case, call(), case.truth(given))


@pytest.mark.slow
def test_compiled_results_pass_the_check_each_time_a_backward_pass_repeats():
    case, (given,) = made(f"{POOLED}, backward")
    (call,) = case.calls("compiled", [given])
    for _ in range(3):
        bench.check(case, call(), case.truth(given))


def test_input_sets_and_outputs_share_no_memory():
    case, sets = made(f"{POOLED}, both", sets=2)
    calls = case.calls("eager", sets)
    tensors = [tensor for each in (*sets, calls[0](), calls[1](), calls[0]()) for tensor in each.values()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


# -- what is refused


@pytest.mark.parametrize("name", SMALL_CASES)
@pytest.mark.parametrize("wrong", [math.nan, 100])
def test_a_single_wrong_value_in_any_output_is_refused(name, wrong):
    case, (given,) = made(name)
    expected = case.truth(given)
    for output in expected:
        outputs = {name: tensor.detach().clone() for name, tensor in case.calls("eager", [given])[0]().items()}
        outputs[output][(0,) * outputs[output].dim()] = -1 if output == "out_labels" else wrong
        with pytest.raises(bench.Wrong, match=f": {output} is off by"):
            bench.check(case, outputs, expected)


def test_a_wrong_operator_is_refused(monkeypatch):
    case, (given,) = made(f"{POOLED}, forward")
    monkeypatch.setattr(
        bench, "batch_norm_celu", lambda *tensors, **how: batch_norm_celu_reference(*tensors, **how | {"alpha": 0.08})
    )
    with pytest.raises(bench.Wrong, match=r"8x32x32, pool, forward: y is off by"):
        bench.check(case, case.calls("fused", [given])[0](), case.truth(given))


def test_a_wrong_shape_type_or_number_of_outputs_is_refused():
    case, (given,) = made("4x32x32, both", torch.float16)
    expected = case.truth(given)
    outputs = case.calls("eager", [given])[0]()
    for changes, message in (
        ({"y": outputs["y"][:1]}, "shape"),
        ({"y": outputs["y"].double()}, "float64"),
        ({"dz": None}, "dz"),
    ):
        with pytest.raises(bench.Wrong, match=message):
            bench.check(case, outputs | changes, expected)
    with pytest.raises(bench.Wrong, match="gave y and not"):
        bench.check(case, {"y": outputs["y"]}, expected)


class Graph:
    """Stands in for a captured graph."""

    def __init__(self, replay):
        self.replay = replay


@pytest.mark.parametrize("name", [AUGMENTATION, f"{POOLED}, both"])
def test_a_replay_that_writes_nothing_is_refused(name):
    case, (given,) = made(name)
    (call,) = case.calls("eager", [given])
    outputs, expected = call(), case.truth(given)

    def again():
        for output, tensor in call().items():
            outputs[output].detach().copy_(tensor.detach())

    bench.check_replay(case, Graph(again), outputs, expected)
    with pytest.raises(bench.Wrong, match="is off by"):
        bench.check_replay(case, Graph(lambda: None), outputs, expected)


# -- bytes, rates, rotation


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_the_prediction(dtype):
    _, operators = predict(RECIPE, dtype, 4e12)
    rows = {(row.case, row.operator): (row.ideal, row.moved) for row in operators}
    for case in bench.cases(RECIPE, dtype):
        parts = {
            "both": [(case.name, "forward"), (case.name, "backward")],
            "evaluation": [(f"{case.name}, eval", "forward")],
            "backward": [(case.name, "backward")],
            "forward": [(case.name, "augment" if isinstance(case, bench.Augmentation) else "forward")],
        }[case.direction]
        assert bench.bytes_of(case) == tuple(map(sum, zip(*(rows[part] for part in parts)))), (
            case.name,
            case.direction,
        )


def test_input_sets_touch_more_than_twice_the_cache_before_one_comes_again():
    cache = 50 * 2**20
    for case in bench.cases(RECIPE, torch.float16):
        sets, size = bench.input_sets(case, cache), bench.bytes_of(case)[0]
        assert 2 * cache + size <= sets * size < 2 * cache + 2 * size


def test_rates_are_of_the_median_time():
    case = named(RECIPE)["64x32x32, forward"]
    least, moved = bench.bytes_of(case)
    facts = bench.figures(case, "fused", [1.0, 2.0, 9.0], [4.0, 8.0, 4.0], 3, copy_bandwidth=least)
    assert (facts["seconds"], facts["ideal_bytes"], facts["moved_bytes"]) == (2, least, moved)
    assert (facts["gbps"], facts["percent_of_copy"]) == (least / 2e9, 50)
    assert facts["moved_gbps"] == moved / 2e9 and facts["moved_percent_of_copy"] == pytest.approx(50 * moved / least)
    assert (facts["cold_seconds"], facts["cold_percent_of_copy"]) == (4, 25)
    assert (facts["launches"], facts["planned_launches"]) == (3, 3)


def test_what_others_move_is_unknown():
    facts = bench.figures(named(RECIPE)["64x32x32, both"], "compiled", [1.0], [1.0], None, 1e12)
    unknown = {"moved_bytes", "moved_gbps", "moved_percent_of_copy", "launches", "planned_launches"}
    assert {name for name, value in facts.items() if value is None} == unknown


def test_calls_take_turns_in_the_loop_and_what_they_give_is_kept_for_a_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    alive, ran = weakref.WeakSet(), []

    def call(i):
        assert len(alive) == min(len(ran), 3), "what a call gave must live until its next turn, and no longer"
        ran.append(i)
        alive.add(given := torch.zeros(1))
        return given

    _, outputs, count = capture([functools.partial(call, i) for i in range(3)], least=7)
    assert (ran, count, len(outputs)) == ([0, 1, 2] * 3, 9, 3)


def test_the_report_makes_a_line_of_a_case():
    facts = bench.figures(named(RECIPE)["64x32x32, forward"], "fused", [2e-5], [3e-5], None, 4e12)
    (line,) = (
        line
        for line in report.kernels({"rows": [facts], "wrong": [], "cut_short": False}, {}).splitlines()
        if "64x32x32" in line
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] + cells[-1:] == ["64x32x32, forward", "fused", "20.0", "30.0", "-"]


# -- under pytest

SHOWN = """
import math
import pytest
from benchmarks.test_kernels import clock, show

@pytest.mark.benchmark(timer=clock)
def test_shown(benchmark):
    show(benchmark, "a group", {"times": [1e-5, 3e-5, 2e-5], "launches": 3})
"""


RUNS = """
import sys
import pytest

first, second, *options = sys.argv[1:]
here = ["-k", "shown or test_augmentation and ours or 64x32x32-forward-float16", "--benchmark-json", first]
again = ["-k", "shown", "--benchmark-json", second, "--benchmark-compare", first, "--benchmark-compare-fail=median:1%"]
sys.exit(pytest.main([*options, *here]) or pytest.main([*options, *again]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What a run of ``pytest benchmarks/``, and one more that compares itself with it, print; and the JSON of the first."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "test_shown.py").write_text(SHOWN)
    options = ["benchmarks/", str(folder), "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RUNS, str(folder / "1.json"), str(folder / "2.json"), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, {row["name"]: row for row in json.loads((folder / "1.json").read_text())["benchmarks"]}


def test_the_json_of_pytest_benchmark_has_device_seconds_and_extra_info(runs):
    shown = runs[1]["test_shown"]
    assert (shown["group"], shown["extra_info"], shown["options"]["timer"]) == ("a group", {"launches": 3}, "device")
    assert [shown["stats"][name] for name in ("min", "median", "max")] == pytest.approx([1e-5, 2e-5, 3e-5])


def test_cpu_cases_run_wherever_pytest_does(runs):
    assert runs[1]["test_augmentation[ours]"]["extra_info"]["pictures"] == 2048


def test_a_run_can_be_compared_with_an_earlier_one(runs):
    assert "test_shown (NOW)" in runs[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here, on which the cases run")
def test_without_a_gpu_the_kernel_cases_are_skipped_with_the_reason(runs):
    (line,) = (line for line in runs[0].splitlines() if line.startswith("SKIPPED"))
    assert "SKIPPED [3] benchmarks/test_kernels.py" in line and line.endswith("no CUDA GPU here")


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", bench.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SMALL_CASES)
def test_a_case_is_measured(name, implementation):
    measured = bench.measure(named(SMALL)[name], implementation, 1e12)
    assert len(measured["times"]) == bench.REPLAYS and min(measured["times"]) > 0
    assert measured["cold_seconds"] > 0
    assert measured["launches"] is None or measured["launches"] >= (measured["planned_launches"] or 1)

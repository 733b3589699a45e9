"""What the benchmarks compute without a GPU: predicted bytes, the choice of block sizes, and what a compilation must show."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

import kernels.launch
from benchmarks import predict, tune
from benchmarks.aot import Compiled, problems
from benchmarks.launches import Case, augment_launches, evaluation_launches, norm_launches, recipe_cases
from cifar_fast import Recipe
from kernels.launch import TABLE

RECIPE = Recipe()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Recipe(batch_size=2)


@pytest.fixture(scope="module")
def launches():
    """The launches of a case of the recipe in float16, by the case's name and then the kernel's."""
    cases = {case.name: case.launches() for case in recipe_cases(RECIPE, torch.float16)}
    return {name: {launch.kernel.__name__: launch for launch in several} for name, several in cases.items()}


@pytest.fixture(scope="module")
def prediction():
    return predict.predict(RECIPE, torch.float16, 4e12)


def operator(prediction, case, name):
    (found,) = (row for row in prediction[1] if (row.case, row.operator) == (case, name))
    return found


def table_of(**changes):
    """The checked-in table with entries of the statistics kernel changed."""
    table = json.loads(TABLE.read_text())
    table["batch_norm_celu.statistics"]["*"] |= changes
    return table


# -- the prediction


def test_every_argument_of_every_kernel_is_counted_or_a_number(launches):
    for several in launches.values():
        for name, launch in several.items():
            _, reads, writes = predict.KERNELS[name]
            tensors = {argument for argument, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
            assert tensors == set(reads) | set(writes)


def test_apply_reads_and_writes_the_tensor_once_and_five_values_a_channel(launches):
    size = 512 * 64 * 32 * 32 * 2
    reads, writes = predict.touched(launches["64x32x32"]["apply_kernel"])
    # mean and 1 / sqrt(var + eps) in float32, weight and bias in float16
    assert reads == {"x": size, "statistics": 2 * 64 * 4, "weight": 64 * 2, "bias": 64 * 2}
    assert writes == {"y": size}


def test_statistics_write_the_pooled_tensor_and_a_byte_of_argmax_a_value_with_a_pool(launches):
    reads, writes = predict.touched(launches["128x32x32, pool"]["statistics_kernel"])
    assert reads == {"x": 512 * 128 * 32 * 32 * 2}
    assert (writes["pooled"], writes["argmax"]) == (512 * 128 * 16 * 16 * 2, 512 * 128 * 16 * 16)


def test_statistics_write_no_more_than_their_partial_results_without_a_pool(launches):
    launch = launches["64x32x32"]["statistics_kernel"]
    _, writes = predict.touched(launch)
    stretches = launch.grid[0]
    partial = {"means": stretches * 64 * 4, "squares": stretches * 64 * 4, "firsts": 64 * 4}
    assert writes == {"pooled": 0, "argmax": 0} | partial


def test_backward_with_a_pool_reads_pooled_tensors_and_writes_the_whole_gradient(launches):
    values = 512 * 128 * 16 * 16
    reads, writes = predict.touched(launches["128x32x32, pool"]["backward_apply_kernel"])
    assert (reads["dy"], reads["x"], reads["argmax"], reads["totals"]) == (values * 2, values * 2, values, 2 * 128 * 4)
    assert writes == {"dx": 4 * values * 2}


def test_backward_without_a_pool_reads_no_argmax(launches):
    reads, _ = predict.touched(launches["64x32x32"]["backward_apply_kernel"])
    assert reads["argmax"] == 0


def test_backward_in_evaluation_reads_no_totals(launches):
    launch = launches["64x32x32"]["backward_apply_kernel"]
    reads, _ = predict.touched(dataclasses.replace(launch, constants=launch.constants | {"TRAINING": False}))
    assert reads["totals"] == 0


def test_augmentation_reads_a_batch_of_the_data_set(launches):
    reads, writes = predict.touched(launches["augment to 3 channels"]["augment_kernel"])
    entries = dict.fromkeys(("indices", "crop", "flip", "cutout", "labels"), 512 * 8)
    assert reads == entries | {"images": 512 * 32 * 32 * 3, "table": 3 * 256 * 2, "step": 8}
    assert writes == {"out": 512 * 32 * 32 * 3 * 2, "out_labels": 512 * 8}


def test_augmentation_without_labels_or_step_counts_neither(launches):
    launch = launches["augment to 3 channels"]["augment_kernel"]
    missing = dict.fromkeys(("labels", "step", "out_labels"))
    reads, writes = predict.touched(dataclasses.replace(launch, arguments=launch.arguments | missing))
    assert not {"labels", "step"} & reads.keys() and "out_labels" not in writes


def test_the_ideal_of_forward_is_each_tensor_once_and_no_partial_result(prediction):
    values = 512 * 128 * 16 * 16
    small = 3 * 128 * 4 + 2 * 128 * 2  # statistics; weight and bias
    assert (
        operator(prediction, "128x32x32, pool", "forward").ideal
        == 4 * values * 2 + values * 2 + values + values * 2 + small
    )
    assert operator(prediction, "128x16x16", "forward").ideal == 2 * values * 2 + small


def test_the_ideal_of_backward_is_each_tensor_once_and_no_partial_result(prediction):
    values = 512 * 128 * 16 * 16
    small = 2 * 128 * 4 + 4 * 128 * 2  # mean and scale; weight, bias and their gradients
    assert (
        operator(prediction, "128x32x32, pool", "backward").ideal
        == values * 2 + values * 2 + values + 4 * values * 2 + small
    )
    assert operator(prediction, "128x16x16", "backward").ideal == 3 * values * 2 + small


def test_a_two_pass_norm_has_a_share_of_two_thirds_forward_and_three_fifths_backward(prediction):
    assert operator(prediction, "64x32x32", "forward").share == pytest.approx(2 / 3, abs=0.01)
    assert operator(prediction, "64x32x32", "backward").share == pytest.approx(3 / 5, abs=0.01)


def test_one_pass_is_its_own_ideal(prediction):
    for row in prediction[1]:
        assert row.ideal <= row.moved
        if "eval" in row.case or row.operator == "augment":
            assert row.ideal == row.moved


def test_time_is_bytes_over_bandwidth(prediction):
    kernels, operators = prediction
    assert all(row.us == pytest.approx((row.read + row.written) / 4e6) for row in kernels)
    assert all(
        row.us == pytest.approx(row.moved / 4e6) and row.ideal_us == pytest.approx(row.ideal / 4e6) for row in operators
    )


def test_operators_move_what_their_kernels_move(prediction):
    kernels, operators = prediction
    assert sum(row.moved for row in operators) == sum(row.read + row.written for row in kernels)


def test_a_step_counts_each_of_the_eight_layers(prediction):
    by_name = {row.case: 0 for row in prediction[1]}
    for row in prediction[1]:
        by_name[row.case] += row.moved
    names = [
        "64x32x32",
        "128x32x32, pool",
        "128x16x16",
        "128x16x16",
        "256x16x16, pool",
        "512x8x8, pool",
        "512x4x4",
        "512x4x4",
    ]
    total = predict.step(prediction[1])
    assert (total.layers, total.moved) == (8, sum(by_name[name] for name in names))
    assert total.us == pytest.approx(total.moved / 4e6)


@pytest.mark.parametrize(
    "recipe", [RECIPE, Recipe(widths=(4, 8, 8, 16)), Recipe(widths=(3, 6, 6))], ids=lambda recipe: str(recipe.widths)
)
def test_every_layer_of_a_recipe_has_its_case(recipe):
    names = {case.name for case in recipe_cases(recipe, torch.float16) if len(case.launches()) > 1}
    assert set(predict.layers(recipe)) == names
    assert predict.layers(recipe).total() == len(recipe.widths)


def test_float32_moves_twice_what_float16_does_where_nothing_is_bytes():
    moved = {
        dtype: predict.moved(evaluation_launches((512, 128, 32, 32), 2, dtype, 0.075))
        for dtype in (torch.float16, torch.float32)
    }
    assert moved[torch.float32] == pytest.approx(2 * moved[torch.float16], rel=1e-4)


def test_the_report_calls_its_figures_predicted(capsys):
    assert predict.main(["--bandwidth", "4.3e12", "--name", "NVIDIA H200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## Predicted for NVIDIA H200, float16, batch 512, at 4.3 TB/s: no measurement"
    assert all(line.startswith("### Predicted") for line in lines if line.startswith("###"))
    assert all("predicted MB" in line and "predicted us" in line for line in lines if line.startswith("| shape"))


def test_the_report_is_aligned_markdown(capsys):
    assert predict.main(["--bandwidth", "4.3e12"]) == 0
    tables = [block.splitlines() for block in capsys.readouterr().out.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len({len(line) for line in table}) == 1 and len({line.count("|") for line in table}) == 1


def test_the_json_file_holds_the_step_and_says_that_it_is_a_prediction(tmp_path, prediction):
    assert predict.main(["--bandwidth", "4e12", "--json", str(tmp_path / "predicted.json")]) == 0
    facts = json.loads((tmp_path / "predicted.json").read_text())
    assert facts["step"] == dataclasses.asdict(predict.step(prediction[1]))
    assert facts["what"].startswith("a prediction") and facts["bandwidth"] == 4e12


@pytest.mark.parametrize("bandwidth", ["0", "-4e12", "nan", "inf", "fast"])
def test_a_bandwidth_that_is_none_is_an_error_in_a_line(bandwidth, capsys):
    assert predict.main([f"--bandwidth={bandwidth}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument --bandwidth") and error.count("\n") == 1


def test_a_missing_bandwidth_is_an_error_in_a_line(capsys):
    assert predict.main([]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --bandwidth\n"


def test_a_json_file_that_cannot_be_written_is_an_error_in_a_line(tmp_path, capsys):
    assert predict.main(["--bandwidth", "4e12", "--json", str(tmp_path / "none" / "predicted.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --json") and error.count("\n") == 1


# -- tuning


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here, on which the command would tune")
def test_tuning_without_a_gpu_is_an_error_in_a_line(capsys):
    assert tune.main([]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: tuning needs a CUDA GPU\n")


def test_the_unchanged_table_is_written_byte_for_byte():
    assert tune.layout(json.loads(TABLE.read_text())) == TABLE.read_text()


def test_every_key_of_the_table_can_be_timed():
    assert set(tune.TIMED) == set(json.loads(TABLE.read_text()))


def test_candidates_have_the_fields_of_the_current_entry_and_are_neither_it_nor_repeated():
    for key, entries in json.loads(TABLE.read_text()).items():
        for current in entries.values():
            found = tune.candidates(key, current)
            assert all(list(entry) == list(current) for entry in found)
            assert current not in found and len({tuple(entry.values()) for entry in found}) == len(found) > 0


def test_candidates_have_sizes_that_are_powers_of_two():
    for key, entries in json.loads(TABLE.read_text()).items():
        sizes = [
            size for current in entries.values() for entry in tune.candidates(key, current) for size in entry.values()
        ]
        assert all(size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize(
    ("twice", "others", "best"),
    [
        ((10.0, 10.0), [12.0, 11.0], "current"),
        ((10.0, 10.0), [9.0, 8.0], 1),
        ((10.0, 10.5), [9.1], "current"),  # a gain of 0.9, where 1.0 is noise
        ((10.5, 10.0), [8.9], 0),
        ((10.0, 10.5), [9.0], 0),
        ((10.0, 10.0), [10.0], "current"),
        ((10.0, 10.0), [], "current"),
        ((math.inf, math.inf), [12.0], 0),
        ((math.inf, math.inf), [], "current"),
    ],
    ids=str,
)
def test_the_fastest_entry_is_chosen_where_its_gain_is_no_noise(twice, others, best):
    entries = [{"block": n} for n in range(len(others))]
    expected = {"block": 99} if best == "current" else entries[best]
    assert tune.choose({"block": 99}, twice, list(zip(entries, others))) == expected


def test_planners_read_the_table_of_the_trial_and_then_the_checked_in_one_again():
    before = kernels.launch.parameters("batch_norm_celu.statistics", 64)
    with pytest.raises(KeyboardInterrupt), tune.planning_by(table_of(rows=before["rows"] * 2)):
        launch = norm_launches((512, 64, 32, 32), 1, torch.float16, 0.075)[0]
        assert launch.constants["BLOCK_R"] == before["rows"] * 2
        raise KeyboardInterrupt
    assert kernels.launch.parameters("batch_norm_celu.statistics", 64) == before


def test_a_class_is_timed_at_the_shapes_that_take_its_entry():
    table = json.loads(TABLE.read_text())
    table["batch_norm_celu.statistics"] = dict.fromkeys(("*", "128", "512"), table["batch_norm_celu.statistics"]["*"])
    table["batch_norm_celu.pool_apply"] = {"*": table["batch_norm_celu.pool_apply"]["*"]}
    cases = recipe_cases(RECIPE, torch.float16)

    def names(key, shape_class):
        return [case.name for case in tune.cases_of(key, shape_class, table, cases)]

    assert names("batch_norm_celu.statistics", "*") == ["64x32x32", "256x16x16, pool"]
    assert names("batch_norm_celu.statistics", "128") == ["128x32x32, pool", "128x16x16"]
    assert names("batch_norm_celu.statistics", "512") == ["512x8x8, pool", "512x4x4"]
    assert names("batch_norm_celu.pool_apply", "*") == [
        "128x32x32, pool, eval",
        "256x16x16, pool, eval",
        "512x8x8, pool, eval",
    ]
    assert names("augment", "*") == ["augment to 3 channels", "augment to 4 channels", "augment to 8 channels"]


def test_a_reduction_is_timed_with_its_merge():
    launches = norm_launches((512, 64, 32, 32), 1, torch.float16, 0.075)
    timed = tune.timed("batch_norm_celu.backward_sums", launches)
    assert [launch.kernel.__name__ for launch in timed] == ["backward_sums_kernel", "merge_sums_kernel"]


SMALL_CASES = {
    "training": lambda: norm_launches((2, 8, 6, 6), 1, torch.float16, 0.075),
    "training with a pool": lambda: norm_launches((2, 8, 6, 6), 2, torch.float16, 0.075),
    "evaluation": lambda: evaluation_launches((2, 8, 6, 6), 2, torch.float16, 0.075),
    "augmentation": lambda: augment_launches(SMALL, torch.float16, 4),
}


@pytest.fixture
def small_case(request, monkeypatch):
    monkeypatch.setattr("benchmarks.launches.PICTURES", 10)
    torch.manual_seed(0)
    return tune.on_memory(SMALL_CASES[request.param](), DEVICE)


every_case = pytest.mark.parametrize("small_case", SMALL_CASES, indirect=True)


@every_case
def test_kernels_pass_the_check_before_timing(small_case):
    tune.execute(small_case)
    tune.check(small_case)


@every_case
def test_outputs_that_none_wrote_do_not_pass_the_check(small_case):
    with pytest.raises(tune.Unfit, match="is off by"):
        tune.check(small_case)


@pytest.mark.parametrize(
    ("small_case", "output"),
    [("training with a pool", name) for name in ("y", "dx", "dweight", "dbias")]
    + [("augmentation", name) for name in ("out", "out_labels")],
    indirect=["small_case"],
)
def test_a_single_wrong_value_does_not_pass_the_check(small_case, output):
    tune.execute(small_case)
    result = next(launch.arguments[output] for launch in small_case if output in launch.arguments)
    result[(0,) * result.dim()] += 1
    with pytest.raises(tune.Unfit, match=f"^{output} is off by"):
        tune.check(small_case)


def test_a_kernel_that_spills_is_unfit():
    class Spilling:
        __name__ = "spilling_kernel"

        def __getitem__(self, grid):
            return lambda **arguments: type("Compiled", (), {"n_spills": 4})

    with pytest.raises(tune.Unfit, match="spilling_kernel spills 4"):
        tune.execute([kernels.launch.Launch(Spilling(), (1,), {}, {})])


def tuned(monkeypatch, measure):
    """What ``tune`` chooses for the merge, and the table it was given, which must stay as it was."""
    monkeypatch.setattr(tune, "measure", measure)
    table = json.loads(TABLE.read_text())
    before = copy.deepcopy(table)
    cases = [Case("one", list), Case("two", list)]
    best = tune.tune("batch_norm_celu.merge", "*", table, cases)
    assert table == before
    return best, table["batch_norm_celu.merge"]["*"]


def test_the_sum_over_the_shapes_of_a_class_decides(monkeypatch, capsys):
    def measure(key, case, table):
        entry = table[key]["*"]
        fast = {"one": (4, 4), "two": (16, 8)}[case.name] == (entry["channels"], entry["num_warps"])
        both = (entry["channels"], entry["num_warps"]) == (16, 4)
        time = 5.0 if fast else 7.0 if both else 10.0  # 15, 14 or 20 in all
        return tune.Timing(time, time - 1, time + 1, 10**6)

    best, _ = tuned(monkeypatch, measure)
    assert best == {"channels": 16, "num_warps": 4}
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "| best" in line)
    assert [cell.strip() for cell in line.split("|")[3:-1]] == [
        "channels 16 num_warps 4",
        "best",
        "14.00 (12.00 to 16.00)",
        "143",
    ]


@pytest.mark.parametrize(
    "error", [tune.Unfit("y is off by 1.0"), OutOfResources(2, 1, "shared memory")], ids=["wrong", "too large"]
)
def test_a_candidate_that_is_unfit_is_reported_and_passed_over(error, monkeypatch, capsys):
    current = json.loads(TABLE.read_text())["batch_norm_celu.merge"]["*"]

    def measure(key, case, table):
        if table[key]["*"] != current:
            raise error
        return tune.Timing(1.0, 1.0, 1.0, 1)

    best, kept = tuned(monkeypatch, measure)
    assert best == kept
    printed = capsys.readouterr().out
    assert printed.count("unfit: ") == len(tune.candidates("batch_norm_celu.merge", current))
    assert printed.count("current, best") == 2


def test_an_error_of_the_gpu_itself_ends_the_tuning(monkeypatch):
    def measure(key, case, table):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuned(monkeypatch, measure)


@pytest.mark.gpu
def test_a_case_is_timed_on_the_gpu():
    timing = tune.measure(
        "batch_norm_celu.statistics", Case("", SMALL_CASES["training"]), json.loads(TABLE.read_text())
    )
    assert 0 < timing.low <= timing.median <= timing.high


# -- compiling for GPUs that are not here


def compiled(**changes):
    clean = Compiled("64x32x32", "apply_kernel", "sm_90", 40, 0, 0, 1.0, {"x": 128}, {"y": 128})
    return dataclasses.replace(clean, **changes)


def test_a_clean_compilation_has_no_problems():
    assert problems(compiled()) == []


def test_spills_are_a_problem_on_every_target():
    assert problems(compiled(spills=8)) == ["64x32x32, apply_kernel, sm_90: 8 bytes spilled"]
    assert problems(compiled(spills=8, target="gfx942")) == ["64x32x32, apply_kernel, gfx942: 8 bytes spilled"]


def test_loads_and_stores_under_128_bits_are_problems():
    assert problems(compiled(loads={"x": 64, "dy": 128}, stores={"y": 32})) == [
        "64x32x32, apply_kernel, sm_90: loads of x are 64 bits wide",
        "64x32x32, apply_kernel, sm_90: stores of y are 32 bits wide",
    ]


def test_single_bytes_of_the_data_set_are_no_problem():
    assert problems(compiled(loads={"images": 8})) == []


@pytest.mark.slow
def test_every_kernel_compiles_for_all_nine_targets_without_spills_and_with_wide_accesses():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or done.stdout
    assert done.stdout.splitlines()[-1] == "no spills, and 128 bits wherever a large tensor is read or written"

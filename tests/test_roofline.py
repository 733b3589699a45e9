"""The floors of a training step: their parameters, FLOP and bytes, the two ceilings, and the command."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import predict, roofline
from benchmarks.launches import augment_launches, norm_launches
from benchmarks.roofline import Ceilings, Pass, floors, layers, steps
from cifar_fast import CNN, Recipe
from cifar_fast.errors import InputError

RECIPE = Recipe()
HALF = torch.float16
CPU = torch.device("cpu")
GIVEN = Ceilings(bandwidth=4.3e12, flops=790e12)
GIVEN_FLAGS = ["--bandwidth", "4.3e12", "--flops", "790e12"]
SMALL = [
    Recipe(batch_size=2, widths=(4, 8, 8, 16)),
    Recipe(batch_size=3, widths=(6, 5)),  # the first layer pools
    Recipe(batch_size=2, widths=(6, 12, 24, 48, 96)),  # nothing is left for the head to pool
    Recipe(batch_size=2, widths=(7,)),
]
every_small = pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: str(recipe.widths))


@pytest.fixture(scope="module")
def reference():
    return layers(RECIPE, 10, HALF)


def total(passes, what, **where):
    return sum(
        getattr(row, what) for row in passes if all(getattr(row, name) == value for name, value in where.items())
    )


def named(passes, layer, name):
    (found,) = (row for row in passes if (row.layer, row.name) == (layer, name))
    return found


# -- parameters and FLOP


def test_the_reference_has_6573120_parameters_in_three_kinds_of_layer(reference):
    kinds = {
        kind: sum(row.parameters for row in reference if row.layer.startswith(kind))
        for kind in ("conv", "norm", "head")
    }
    assert kinds == {"conv": 6_563_520, "norm": 4_480, "head": 5_120}
    assert total(reference, "parameters") == 6_573_120


@every_small
@pytest.mark.parametrize("classes", [2, 100])
def test_parameters_are_those_of_the_model(recipe, classes):
    assert total(layers(recipe, classes, HALF), "parameters") == sum(
        value.numel() for value in CNN(recipe, classes).parameters()
    )


def test_a_picture_of_the_reference_takes_379_million_multiply_adds_forward(reference):
    forward = total(reference, "multiply_adds", phase="forward") / 512
    assert forward == pytest.approx(379e6, rel=1e-3)
    assert total(reference, "flop", phase="forward") / 512 == 2 * forward == pytest.approx(0.758e9, rel=1e-3)


def test_a_picture_of_the_reference_takes_2_27_gflop_forward_and_backward(reference):
    assert total(reference, "flop") / 512 == pytest.approx(2.27e9, rel=1e-3)


def test_a_run_of_the_reference_takes_2_71_pflop_in_2328_steps(reference):
    assert steps(RECIPE, 50_000) == 24 * 97
    assert total(reference, "flop") * steps(RECIPE, 50_000) == pytest.approx(2.71e15, rel=1e-3)


@every_small
def test_flop_forward_and_backward_are_those_that_torch_counts(recipe):
    model, passes = CNN(recipe, 10), layers(recipe, 10, torch.float32)
    with FlopCounterMode(display=False) as forward:
        logits = model(torch.randn(recipe.batch_size, 3, 32, 32))
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert total(passes, "flop", phase="forward") == forward.get_total_flops()
    assert total(passes, "flop", phase="backward") == backward.get_total_flops()


def test_every_convolution_but_the_first_has_a_data_gradient(reference):
    layers_with = {row.layer for row in reference if row.name == "data gradient"}
    convolutions = [row.layer for row in reference if row.layer.startswith("conv") and row.name == "forward"]
    assert [layer in layers_with for layer in convolutions] == [False] + [True] * 7


def test_fewer_than_two_classes_are_an_error():
    with pytest.raises(InputError, match="classes must be at least 2, not 1"):
        layers(RECIPE, 1, HALF)


# -- bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", [RECIPE, *SMALL], ids=lambda recipe: str(recipe.widths))
def test_the_norms_move_the_activations_that_our_kernels_move(recipe, dtype):
    passes, size = layers(recipe, 10, dtype), 32
    norms = [row for row in passes if row.layer.startswith("norm")]
    for (forward, backward), channels, pools in zip(
        zip(norms[::2], norms[1::2]), recipe.widths, recipe.pools, strict=True
    ):
        moved = {"forward": 0, "backward": 0}
        for launch in norm_launches((recipe.batch_size, channels, size, size), 1 + pools, dtype, recipe.celu_alpha):
            for side in predict.touched(launch):
                moved[predict.KERNELS[launch.kernel.__name__][0]] += sum(
                    side.get(name, 0) for name in ("x", "dy", "pooled", "argmax", "y", "dx")
                )
        assert (forward.name, forward.bytes, backward.name, backward.bytes) == (
            "forward",
            moved["forward"],
            "backward",
            moved["backward"],
        )
        size //= 1 + pools


def test_the_norms_values_of_a_channel_which_are_left_out_are_under_a_thousandth_of_a_step(reference):
    moved = 0
    for case in predict.recipe_cases(RECIPE, HALF):
        for launch in case.launches() * predict.layers(RECIPE)[case.name]:
            moved += sum(
                size for side in predict.touched(launch) for name, size in side.items() if name not in predict.SCRATCH
            )
    left_out = moved - sum(row.bytes for row in reference if row.layer.startswith("norm"))
    assert 0 < left_out < 1e-3 * total(reference, "bytes")


def test_augmentation_moves_what_our_kernel_does_without_its_table_and_step(reference):
    (launch,) = augment_launches(RECIPE, HALF, 3)
    sides = predict.touched(launch)
    assert named(reference, "augmentation", "gather").bytes == sum(
        size for side in sides for name, size in side.items() if name not in ("table", "step")
    )


@pytest.mark.parametrize("name", ["forward", "data gradient", "weight gradient"])
def test_a_pass_of_a_convolution_moves_both_activations_and_its_weights(reference, name):
    row = named(reference, "conv5 128->256 16x16", name)
    assert row.activation_bytes == 512 * (128 + 256) * 16 * 16 * 2
    assert row.weight_bytes == 9 * 128 * 256 * 2
    assert row.bytes == row.activation_bytes + row.weight_bytes


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_pool_of_the_head_moves_both_activations_and_a_byte_of_argmax_a_value(reference, name):
    assert named(reference, "head pool 512x4x4", name).bytes == 512 * 512 * (16 * 2 + 2 + 1)


def test_a_head_with_nothing_to_pool_does_not_pool():
    assert not [
        row for row in layers(Recipe(widths=(6, 12, 24, 48, 96)), 10, HALF) if row.layer.startswith("head pool")
    ]


def test_the_linear_layer_moves_its_pooled_input_its_logits_and_its_weights(reference):
    assert named(reference, "head linear 512->10", "forward").bytes == (512 * 512 + 512 * 10 + 512 * 10) * 2


def test_the_optimiser_reads_three_values_a_parameter_and_writes_two(reference):
    row = named(reference, "optimiser", "update")
    assert (row.weight_bytes, row.activation_bytes) == (5 * 6_573_120 * 2, 0)


def test_bfloat16_activations_have_float32_weights(reference):
    bfloat16 = layers(RECIPE, 10, torch.bfloat16)
    assert total(bfloat16, "activation_bytes") == total(reference, "activation_bytes")
    assert total(bfloat16, "weight_bytes") == 2 * total(reference, "weight_bytes")


def test_activations_of_the_reference_move_1_4_gb_forward_and_what_the_pools_keep(reference):
    pooled = 512 * (128 * 16 * 16 + 256 * 8 * 8 + 512 * 4 * 4)  # values that the pools of the convolutions leave
    assert total(reference, "activation_bytes", phase="forward") - pooled * (2 + 1) == pytest.approx(1.4e9, rel=0.01)


def test_activations_of_the_reference_move_2_4_gb_backward(reference):
    assert total(reference, "activation_bytes", phase="backward") == pytest.approx(2.4e9, rel=0.02)


# -- floors


def test_the_floor_of_a_pass_is_the_longer_of_arithmetic_and_memory():
    limits = Ceilings(bandwidth=10.0, flops=100.0)
    light = floors([Pass("a", "forward", "forward", multiply_adds=50, activation_bytes=20)], limits)
    heavy = floors([Pass("b", "forward", "forward", multiply_adds=150, activation_bytes=15, weight_bytes=5)], limits)
    assert (light.arithmetic, light.memory, light.overlapped, light.no_overlap, light.bound) == (1, 2, 2, 3, "memory")
    assert (heavy.arithmetic, heavy.memory, heavy.overlapped, heavy.no_overlap, heavy.bound) == (
        3,
        2,
        3,
        5,
        "arithmetic",
    )


def test_floors_of_several_passes_are_sums_and_grow_with_their_repeats():
    limits = Ceilings(bandwidth=10.0, flops=100.0)
    both = [Pass("a", "forward", "forward", 50, 20), Pass("b", "forward", "forward", 150, 20)]
    assert floors(both, limits) == roofline.Floors(arithmetic=4, memory=4, overlapped=5)
    assert floors(both, limits, 3) == roofline.Floors(arithmetic=12, memory=12, overlapped=15)


def test_a_step_at_790_tflops_and_4_3_tb_has_floors_of_1_47_and_2_4_ms_and_a_run_of_3_4_and_5_6_s(reference):
    step, run = floors(reference, GIVEN), floors(reference, GIVEN, steps(RECIPE, 50_000))
    assert (step.arithmetic, step.no_overlap) == (pytest.approx(1.47e-3, rel=0.005), pytest.approx(2.40e-3, rel=0.005))
    assert (run.arithmetic, run.no_overlap) == (pytest.approx(3.43, rel=0.005), pytest.approx(5.58, rel=0.005))
    assert step.arithmetic < step.overlapped < step.no_overlap


def test_a_run_drops_the_pictures_that_fill_no_batch():
    assert steps(Recipe(epochs=3, batch_size=10), 29) == 6


def test_fewer_pictures_than_a_batch_are_an_error():
    with pytest.raises(InputError, match="9 pictures are fewer than one batch of 10"):
        steps(Recipe(batch_size=10), 9)


# -- ceilings


@pytest.fixture
def small_sizes(monkeypatch):
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(roofline.MATRIX_SIZE, "cpu", 64)


def test_measured_ceilings_are_medians_within_their_ranges(small_sizes):
    limits = roofline.ceilings(CPU, torch.float32)
    assert 0 < limits.bandwidth_range[0] <= limits.bandwidth <= limits.bandwidth_range[1]
    assert 0 < limits.flops_range[0] <= limits.flops <= limits.flops_range[1]
    assert str(limits).count("measured") == 2 and "given" not in str(limits)


def test_a_copy_counts_bytes_read_and_written_and_a_product_two_flop_a_multiply_add(small_sizes, monkeypatch):
    monkeypatch.setattr(roofline, "_timed", lambda call, device: [4.0, 1.0, 2.0])
    assert roofline.ceilings(CPU, torch.float32) == Ceilings(2**16, 64**3, (2**15, 2**17), (64**3 / 2, 2 * 64**3))


def test_a_copy_takes_turns_between_two_pairs_of_buffers(small_sizes, monkeypatch):
    copied = []

    def run(call, device):
        copied.extend(call(i).data_ptr() for i in range(4))
        return [1.0]

    monkeypatch.setattr(roofline, "_timed", run)
    roofline.ceilings(CPU, torch.float32, flops=1e9)
    assert copied[:2] == copied[2:] and copied[0] != copied[1]


def test_the_product_is_of_different_random_matrices_of_the_dtype(small_sizes, monkeypatch):
    products = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append((a, b)))
    roofline.ceilings(CPU, torch.bfloat16, bandwidth=1e9)
    a, b = products[0]
    assert a.dtype == b.dtype == torch.bfloat16 and not torch.equal(a, b)
    assert (a != 0).float().mean() > 0.99 and (b != 0).float().mean() > 0.99


def test_runs_that_warm_up_are_not_timed(monkeypatch):
    monkeypatch.setitem(roofline.TIMED, "cpu", (2, 3))
    calls = []
    assert len(roofline._timed(calls.append, CPU)) == 3
    assert calls == [0, 1, 2, 3, 4]


def test_a_given_ceiling_is_kept_and_the_other_one_measured(small_sizes):
    limits = roofline.ceilings(CPU, torch.float32, bandwidth=5e9)
    assert (limits.bandwidth, limits.bandwidth_range) == (5e9, None) and limits.flops_range
    assert str(limits).startswith("copy bandwidth 5.0 GB/s (given), matrix rate") and "(measured, " in str(limits)


def test_the_matrix_rate_of_float16_on_a_cpu_is_an_error():
    with pytest.raises(InputError, match="bfloat16 or float32"):
        roofline.ceilings(CPU, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_ceilings_are_measured_on_the_gpu_and_the_precision_of_products_is_left_as_it_was(dtype):
    before = torch.get_float32_matmul_precision()
    limits = roofline.ceilings(torch.device("cuda"), dtype)
    assert 0 < limits.bandwidth_range[0] <= limits.bandwidth <= limits.bandwidth_range[1]
    assert 0 < limits.flops_range[0] <= limits.flops <= limits.flops_range[1]
    assert torch.get_float32_matmul_precision() == before


# -- the command


def test_the_command_says_that_ceilings_were_given_and_that_nothing_of_the_recipe_was_measured(capsys):
    assert roofline.main(GIVEN_FLAGS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## Floors for given ceilings, float16, batch 512: no measurement of the recipe"
    assert lines[2] == "copy bandwidth 4,300.0 GB/s (given), matrix rate 790,000.0 GFLOP/s (given)"
    assert "floor us" in "".join(lines) and "measured" not in "".join(lines)


def test_the_command_shows_every_pass_and_the_totals_as_aligned_tables(capsys, reference):
    assert roofline.main(GIVEN_FLAGS) == 0
    printed = capsys.readouterr().out
    tables = [block.splitlines() for block in printed.split("\n\n") if block.startswith("|")]
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in tables]
    assert [row[:2] for row in cells[0][2:]] == [[row.layer, row.name] for row in reference]
    assert cells[0][0][3:] == ["GFLOP", "MB", "FLOP/byte", "floor us", "bound by"]
    conv2 = ["73,728", "77.309", "201.474", "383.7", "97.86", "arithmetic"]
    assert next(row[2:] for row in cells[0] if row[:2] == ["conv2 64->128 32x32", "forward"]) == conv2
    assert [row[0] for row in cells[1][2:]] == [
        "augmentation",
        "forward",
        "backward",
        "optimiser",
        "a step",
        "a run, 2,328 steps",
    ]
    assert cells[1][-1][1:] == [
        "2,708,117.649",
        "9,016.276",
        "244.765",
        "3,427.997",
        "2,153.730",
        "4,704.958",
        "5,581.727",
    ]
    assert all(len({len(line) for line in table}) == 1 for table in tables)
    assert "6,573,120 parameters (convolutions 6,563,520 + batch norm 4,480 + linear 5,120)" in printed
    assert "379.3 M multiply-adds = 0.759 GFLOP forward, 2.272 GFLOP forward and backward" in printed


def test_the_command_measures_what_it_is_not_given_in_a_dtype_that_suits_the_device(small_sizes, capsys):
    assert roofline.main(["--device", "cpu"]) == 0
    heading, _, limits = capsys.readouterr().out.splitlines()[:3]
    assert ", bfloat16, " in heading or ", float32, " in heading
    assert limits.count("measured") == 2


def test_the_flags_of_the_recipe_reach_the_floors_and_the_json_file_holds_them(tmp_path, capsys):
    file = tmp_path / "floors.json"
    flags = [
        "--batch-size",
        "4",
        "--widths",
        "8",
        "16",
        "--epochs",
        "3",
        "--classes",
        "5",
        "--pictures",
        "41",
        "--dtype",
        "float32",
    ]
    assert roofline.main([*GIVEN_FLAGS, *flags, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    recipe = Recipe(batch_size=4, widths=(8, 16), epochs=3)
    passes = layers(recipe, 5, torch.float32)
    assert figures["what"].startswith("floors, ") and figures["environment"] is None
    assert Recipe.from_json(json.dumps(figures["recipe"])) == recipe
    assert (figures["dtype"], figures["classes"], figures["steps"]) == ("float32", 5, 30)
    assert [(row["layer"], row["flop"], row["bytes"]) for row in figures["passes"]] == [
        (row.layer, row.flop, row.bytes) for row in passes
    ]
    assert figures["step"]["no_overlap"] == floors(passes, GIVEN).no_overlap
    assert figures["run"]["no_overlap"] == floors(passes, GIVEN, 30).no_overlap


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--bandwidth", "0"], "argument --bandwidth: must be a number above 0, not 0"),
        (["--flops", "nan"], "argument --flops"),
        (["--flops", "inf"], "argument --flops"),
        (["--flops", "fast"], "argument --flops"),
        (["--dtype", "int8"], "argument --dtype"),
        (["--device", "abacus"], "argument --device"),
        ([*GIVEN_FLAGS, "--batch-size", "0"], "batch_size must be at least 1"),
        ([*GIVEN_FLAGS, "--widths", "0"], "widths must be"),
        ([*GIVEN_FLAGS, "--epochs", "0"], "epochs must be at least 1"),
        ([*GIVEN_FLAGS, "--classes", "1"], "classes must be at least 2"),
        ([*GIVEN_FLAGS, "--pictures", "511"], "511 pictures are fewer than one batch of 512"),
        (["--device", "cpu", "--dtype", "float16"], "a CPU's float16"),
        ([*GIVEN_FLAGS, "--json", "/dev/null/floors.json"], "--json /dev/null/floors.json: cannot be written"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_an_error_in_a_line_and_exit_code_2(flags, told, capsys):
    assert roofline.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {told}") and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
def test_a_gpu_that_is_not_here_is_an_error_unless_both_ceilings_are_given(capsys):
    assert roofline.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda: no CUDA GPU is here")
    assert roofline.main(["--device", "cuda", *GIVEN_FLAGS]) == 0

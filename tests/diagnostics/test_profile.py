import importlib
import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import cifar_fast.diagnostics.profile
from cifar_fast import CNN, InputError, Recipe, draw_epoch
from cifar_fast.backends.eager import Eager
from cifar_fast.backends.fused import Fused
from cifar_fast.data.tensors import device_data
from cifar_fast.diagnostics.profile import (
    ACTIVATION,
    AUGMENT,
    BATCH,
    CONV_BACKWARD,
    CONV_DATA,
    CONV_FORWARD,
    CONV_UNKNOWN_PASS,
    CONV_WEIGHT,
    IDLE,
    LAYOUT,
    LINEAR,
    LINES,
    LOSS,
    NORM_BACKWARD,
    NORM_FORWARD,
    OPTIMIZER,
    OTHER,
    PLAIN_NORM_BACKWARD,
    PLAIN_NORM_FORWARD,
    POOL,
    classify_kernel,
    classify_operator,
    covered,
    kernel_work,
    profile,
    table_rows,
)
from cifar_fast.utils.progress import lines_to
from tests.helpers import NARROW, compiler, small_dataset

CPU = torch.device("cpu")


def make(backend=Eager, train=64, batch_size=16, device=CPU, dtype=torch.float32, widths=NARROW):
    """Return a backend at the start of a run, and the draws of an epoch."""
    recipe, dataset = Recipe(epochs=1, batch_size=batch_size, widths=widths), small_dataset(train=train, test=4)
    made = backend(recipe, device_data(dataset, device), device, dtype, torch.channels_last)
    made.reset(CNN(recipe, dataset.num_classes))
    return made, draw_epoch(train, device=device, recipe=recipe)


def assert_sums_to_the_step(table):
    assert sum(row.milliseconds for row in table.rows) == pytest.approx(table.step_milliseconds)
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert all(row.milliseconds >= 0 and row.line in LINES for row in table.rows)


# The names are from profiles of Volta, Ampere, Ada and Hopper GPUs.
@pytest.mark.parametrize(
    ("line", "name"),
    [
        (CONV_FORWARD, "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_"
         "execute_segment_k_off_kernel__5x_cudnn"),
        (CONV_FORWARD, "sm80_xmma_fprop_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nchw_tilesize128x128x16_stage4"),
        (CONV_FORWARD, "sm80_xmma_fprop_image_first_layer_f16f16_f32_f16_nhwckrsc_nhwc"),
        (CONV_FORWARD, "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8>"
         "(cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8::Params)"),
        (CONV_FORWARD, "void cutlass_cudnn_infer::Kernel<cutlass_tensorop_s1688fprop_optimized_tf32_128x128_16x4_nhwc_align4>"),
        (CONV_FORWARD, "cudnn_generated_fort_native_sm80_convFwd_pointwise_pointwise_pointwise"),
        (CONV_FORWARD, "void cudnn::detail::implicit_convolve_sgemm<float, float, 128, 6, 7, 3, 3, 5, 1, true, false, true>(int)"),
        (CONV_FORWARD, "void implicit_convolve_sgemm<__half, __half, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(int, int, int)"),
        (CONV_FORWARD, "void explicit_convolve_sgemm<__half, int, 128, 6, 7, 3, 3, 5, 0, false>(int, int, int)"),
        (CONV_FORWARD, "void convolve_common_engine_float_NHWC<__half, __half, 128, 5, 5, 3, 3, 3, true, false, false, false, false>(int)"),
        (CONV_FORWARD, "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, false, false, 0, 0>(cudnnTensorStruct)"),
        (CONV_FORWARD, "_5x_cudnn_ampere_scudnn_128x32_relu_interior_nn_v1"),
        (CONV_DATA, "sm90_xmma_dgrad_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x64x32_warpgroupsize1x1x1_g1_"
         "execute_segment_k_on_kernel__5x_cudnn"),
        (CONV_DATA, "void cutlass_cudnn::Kernel<cutlass_tensorop_f16_s16816dgrad_optimized_f16_128x256_32x3_unity_stride>"
         "(cutlass_tensorop_f16_s16816dgrad_optimized_f16_128x256_32x3_unity_stride::Params)"),
        (CONV_DATA, "void cudnn::detail::dgrad_engine<float, 512, 6, 5, 3, 3, 3, false>(int, int, int, float const*, int)"),
        (CONV_DATA, "void dgrad2d_grouped_direct_kernel<float, float, float, true, 0, 1, (cudnnTensorFormat_t)0>(cudnnTensorStruct)"),
        (CONV_DATA, "volta_scudnn_128x64_stridedB_interior_nn_v1"),
        (CONV_WEIGHT, "sm80_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize64x64x64_stage4_warpsize1x1x4_g8_"
         "tensor16x8x16_execute_kernel__5x_cudnn"),
        (CONV_WEIGHT, "void cutlass_cudnn_train::Kernel<cutlass_tensorop_s1688wgrad_optimized_tf32_256x128_16x3_nhwc_align4>"),
        (CONV_WEIGHT, "void cudnn::cnn::wgrad_alg0_engine<float, 512, 6, 5, 3, 3, 3, false, 512>(int, int, int, float const*, int)"),
        (CONV_WEIGHT, "void wgrad2d_grouped_direct_kernel<__half, float, float, (cudnnTensorFormat_t)1>(cudnnTensorStruct)"),
        (CONV_WEIGHT, "void cudnn::cnn::reduce_wgrad_nchw_helper<float, __half>(float const*, __half*)"),
        (CONV_WEIGHT, "void cask_cudnn::computeWgradSplitKOffsetsKernel<false, true>(cask_cudnn::ComputeSplitKOffsetsParams)"),
        (CONV_WEIGHT, "volta_scudnn_128x64_stridedB_splitK_interior_nn_v1"),
        (CONV_WEIGHT, "_ZN13cutlass_cudnn6KernelINS_4conv6kernel23ImplicitGemmConvolutionINS1_11threadblock22ImplicitGemmMultistageINS_4"
         "gemm9GemmShapeILi64ELi256ELi32EEENS4_51Conv2dWgradOutputGradientTileAccessIteratorAnalyticINS_11MatrixShapeILi64ELi32EEE"),
        (CONV_UNKNOWN_PASS, "void cutlass_cudnn::Kernel<cutlass_cudnn::reduction::kernel::ReduceSplitK<cutlass_cudnn::MatrixShape<4, 256> > >"),
        (CONV_UNKNOWN_PASS, "_5x_cudnn_ampere_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1"),
        (CONV_UNKNOWN_PASS, "void cudnn::winograd_nonfused::winogradForwardData9x9_5x5<float, __half>(cudnn::winograd_nonfused::Params)"),
        (CONV_UNKNOWN_PASS, "void fft2d_r2c_32x32<__half, false, 5u, false>(float2*, __half const*, int, int, int, int, int, int, int, int)"),
        (CONV_UNKNOWN_PASS, "ampere_gcgemm_64x64_nt"),
        (CONV_UNKNOWN_PASS, "void cask__5x_cudnn::computeOffsetsKernel<false, false>(cask__5x_cudnn::ComputeOffsetsParams)"),
        (LAYOUT, "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>"),
        (LAYOUT, "void cudnn::engines_precompiled::nhwcToNchwKernel<float, float, float, true, false, (cudnnKernelDataType_t)0>"),
        (OPTIMIZER, "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<"
         "at::native::(anonymous namespace)::FusedOptimizerTensorListMetadata<3>, "
         "at::native::(anonymous namespace)::FusedSgdMathFunctor<c10::Half, 3>, float const*, double>"),
        (OPTIMIZER, "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<"
         "at::native::(anonymous namespace)::TensorListMetadata<2>, "
         "at::native::(anonymous namespace)::BinaryOpListAlphaFunctor<float, 2, 2, 0>, std::plus<float>, float>"),
        (OTHER, "triton_poi_fused_convolution_backward_native_batch_norm_backward_3"),
        (OTHER, "triton_red_fused__native_batch_norm_legit_functional_conv2d_7"),
        (OTHER, "void cudnn::bn_fw_tr_1C11_kernel_NCHW<__half, float, 512, true, 1, true>(cudnnTensorStruct, __half const*)"),
        (OTHER, "void at::native::(anonymous namespace)::max_pool_backward_nchw<float, float>(float const*, long const*, int, long, long)"),
        (OTHER, "ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_32x6_nn"),
        (OTHER, "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT"),
        (OTHER, "Memcpy DtoD (Device -> Device)"),
        (OTHER, "Memset (Device)"),
    ],
)  # fmt: skip
def test_kernel_name_decides_the_line(line, name):
    assert classify_kernel(name) == line


def test_our_kernels_have_our_lines():
    found = {AUGMENT: set(), NORM_FORWARD: set(), NORM_BACKWARD: set()}
    for module in ("augment", "batch_norm_act"):
        for name in vars(
            importlib.import_module(f"cifar_fast.kernels.{module}")
        ):  # the package gives the function under this name
            if name.endswith("_kernel"):
                found[classify_kernel(name)].add(name.removesuffix("_kernel"))
    assert found[AUGMENT] == {"augment"}
    assert found[NORM_FORWARD] == {"statistics", "merge_statistics", "apply"}
    assert found[NORM_BACKWARD] == {"backward_sums", "merge_sums", "backward_apply"}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (CONV_FORWARD, "aten::conv2d"),
        (CONV_FORWARD, "aten::convolution"),
        (CONV_FORWARD, "aten::_convolution"),
        (CONV_FORWARD, "aten::mkldnn_convolution"),
        (CONV_FORWARD, "mkldnn::_convolution_pointwise"),
        (CONV_FORWARD, "aten::_slow_conv2d_forward"),
        (CONV_BACKWARD, "aten::convolution_backward"),
        (CONV_BACKWARD, "aten::_slow_conv2d_backward"),
        (CONV_BACKWARD, "autograd::engine::evaluate_function: ConvolutionBackward0"),
        (AUGMENT, "cifar_fast::augment"),
        (NORM_FORWARD, "cifar_fast::batch_norm_act"),
        (NORM_BACKWARD, "cifar_fast::batch_norm_act_backward"),
        (
            NORM_BACKWARD,
            "autograd::engine::evaluate_function: GeneratedBackwardFor_cifar_fast_batch_norm_act_defaultBackward",
        ),
        (OPTIMIZER, "Optimizer.step#SGD.step"),
        (OPTIMIZER, "aten::_fused_sgd_"),
        (OPTIMIZER, "aten::_foreach_add_"),
        (OTHER, "aten::add_"),
        (PLAIN_NORM_FORWARD, "aten::native_batch_norm"),
        (PLAIN_NORM_BACKWARD, "aten::native_batch_norm_backward"),
        (ACTIVATION, "aten::threshold_backward"),
        (ACTIVATION, "aten::celu"),
        (ACTIVATION, "autograd::engine::evaluate_function: GeluBackward0"),
        (POOL, "aten::max_pool2d_with_indices_backward"),
        (LOSS, "aten::cross_entropy_loss"),
        (LOSS, "cifar_fast::cross_entropy"),
        (LINEAR, "aten::mm"),
        (OTHER, "Torch-Compiled Region: 0/0"),
    ],
)
def test_operator_name_decides_the_line(line, name):
    assert classify_operator(name) == line


def test_overlapping_intervals_are_counted_once():
    assert covered([(8, 9), (0, 4), (1, 2), (3, 6)]) == 7
    assert covered([]) == 0


def kernel(name, start, end, annotation=False, device=DeviceType.CUDA):
    time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=time_range, is_user_annotation=annotation, device_type=device)


def test_overlapping_kernels_share_the_busy_time_and_annotations_have_none():
    events = [
        kernel("augment_kernel", 0, 3000),
        kernel("sm90_xmma_fprop", 2000, 5000),
        kernel("Optimizer.step#SGD.step", 0, 9000, annotation=True),
        kernel("cudaLaunchKernel", 0, 9000, device=DeviceType.CPU),
    ]
    rows = {row.line: row for row in table_rows(*kernel_work(events), wall=8000, steps=2)}
    assert {line: row.milliseconds for line, row in rows.items()} == pytest.approx(
        {CONV_FORWARD: 1.25, AUGMENT: 1.25, IDLE: 1.5}
    )
    assert rows[IDLE].share == 3 / 8
    assert (rows[AUGMENT].launches, rows[IDLE].launches) == (0.5, 0)


def test_idle_time_is_not_negative_if_the_gpu_clock_is_fast():
    rows = table_rows(*kernel_work([kernel("augment_kernel", 0, 1001)]), wall=1000, steps=1)
    assert [(row.line, row.milliseconds) for row in rows] == [(AUGMENT, pytest.approx(1)), (IDLE, 0)]


def test_profile_without_a_kernel_is_an_error():
    with pytest.raises(InputError, match="saw no kernel"):
        kernel_work([kernel("aten::mm", 0, 1, device=DeviceType.CPU)])


def test_eager_profile_has_each_line_once_and_sums_to_the_step(tmp_path):
    table = profile(*make(), tmp_path, steps=2)
    launches = {row.line: row.launches for row in table.rows}
    named = {BATCH: 1, POOL: 8, PLAIN_NORM_FORWARD: 8, PLAIN_NORM_BACKWARD: 8, ACTIVATION: 16}
    assert list(launches) == [CONV_FORWARD, CONV_BACKWARD, *named, LINEAR, LOSS, OPTIMIZER, OTHER, IDLE]
    assert {line: launches[line] for line in named} == named
    assert (launches[CONV_FORWARD], launches[CONV_BACKWARD], launches[OPTIMIZER], launches[IDLE]) == (8, 8, 1, 0)
    assert all(row.milliseconds > 0 for row in table.rows)
    assert_sums_to_the_step(table)


@pytest.mark.slow  # starts a process
def test_command_on_a_cpu_explains_the_step_and_prints_no_line_of_the_profiler(tmp_path):
    widths = "--widths 16 32 32 32 64 128 128 128 --batch-size 64 --device cpu --dtype float32 --backend eager"
    done = compiler(*f"-m cifar_fast profile --dataset synthetic {widths} --output {tmp_path}".split())
    assert done.stderr == ""
    rows = {row["line"]: row["share"] for row in json.loads((tmp_path / "profile.json").read_text())["rows"]}
    assert rows[OTHER] < 0.15


def test_calls_of_the_optimizer_belong_to_the_optimizer(tmp_path):
    profile(*make(), tmp_path, steps=1)
    events = [
        event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event.get("ph") == "X"
    ]
    step = next(event for event in events if event["name"].startswith("Optimizer.step"))
    table = json.loads((tmp_path / "profile.json").read_text())
    optimizer = next(row["milliseconds"] for row in table["rows"] if row["line"] == OPTIMIZER)
    assert 1000 * optimizer == pytest.approx(step["dur"], rel=0.01)


@pytest.mark.slow  # the interpreter
def test_fused_profile_has_lines_for_our_kernels(tmp_path, monkeypatch, uncompiled, few_programs):
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here, see the test for it")
    monkeypatch.setattr(cifar_fast.diagnostics.profile, "WARM_UP_STEPS", 0)  # a step takes a second here
    table = profile(*make(Fused, train=4, batch_size=2), tmp_path, steps=1)
    launches = {row.line: row.launches for row in table.rows}
    assert [
        launches[line] for line in (CONV_FORWARD, CONV_BACKWARD, AUGMENT, NORM_FORWARD, NORM_BACKWARD, OPTIMIZER)
    ] == [8, 8, 1, 16, 8, 1]  # the forward pass of a norm has two operators: statistics, then the rest
    assert_sums_to_the_step(table)


def test_files_contain_the_trace_and_the_logged_table(tmp_path):
    lines = []
    with lines_to(lines.append):
        table = profile(*make(), tmp_path / "a" / "b", steps=1)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["profile.json", "trace.json"]
    assert json.loads((tmp_path / "a" / "b" / "profile.json").read_text()) == asdict(table)
    assert (table.backend, table.dtype, table.batch_size, table.steps) == ("eager", "float32", 16, 1)
    assert table.environment["torch"] == torch.__version__
    text = (tmp_path / "a" / "b" / "trace.json").read_text()
    trace = json.loads(text)
    assert trace.get("host_name", "") == "" and str(tmp_path) not in text
    assert "aten::convolution_backward" in {event.get("name") for event in trace["traceEvents"]}
    assert lines == str(table).splitlines()
    assert [line for line in LINES for text in lines if text.startswith(f"{line}  ")] == [
        row.line for row in table.rows
    ]


def test_two_steps_are_not_traced_and_a_short_epoch_starts_again(tmp_path, monkeypatch):
    backend, draws = make(train=48)  # three steps an epoch
    epochs, traced = [], []
    train_epoch = backend.train_epoch

    def watched(draws):
        epochs.append(backend.epoch)
        for scored in train_epoch(draws):
            traced.append(torch.autograd._profiler_enabled())
            yield scored

    monkeypatch.setattr(backend, "train_epoch", watched)
    profile(backend, draws, tmp_path, steps=5)
    assert traced == [False] * 2 + [True] * 5
    assert epochs == [0, 1, 2]


def test_unwritable_directory_is_an_error_before_any_step(tmp_path, monkeypatch):
    backend, draws = make()
    monkeypatch.setattr(backend, "train_epoch", lambda *args: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output .*file: cannot be written to \(File exists\); choose another folder"):
        profile(backend, draws, tmp_path / "file")


def test_failed_write_keeps_the_earlier_files(tmp_path, monkeypatch):
    made = make()
    (tmp_path / "trace.json").write_text("earlier")

    def replace(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(InputError, match="No space left on device"):
        profile(*made, tmp_path, steps=1)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("trace.json", "earlier")]


@pytest.mark.gpu
def test_fused_profile_on_a_gpu_separates_the_kernels_of_a_graph(tmp_path):
    backend, draws = make(
        Fused, train=512, batch_size=64, device=torch.device("cuda"), dtype=torch.float16, widths=Recipe().widths
    )
    table = profile(backend, draws, tmp_path, steps=3)
    launches = {row.line: row.launches for row in table.rows}
    assert launches[AUGMENT] == 1
    assert launches[NORM_FORWARD] == launches[NORM_BACKWARD] == 8 * 3
    assert sum(launches.get(line, 0) for line in (CONV_FORWARD, CONV_DATA, CONV_WEIGHT, CONV_UNKNOWN_PASS)) >= 8 + 7 + 8
    assert launches[OPTIMIZER] >= 1
    assert_sums_to_the_step(table)

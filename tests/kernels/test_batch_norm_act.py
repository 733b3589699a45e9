"""Max-pool, batch norm and activation as one operator: Triton interpreted or compiled, and C++ on a CPU."""

import ast
import copy
import inspect
import itertools
import pickle
import pwd
import shutil
import tempfile

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

from cifar_fast import CNN, Recipe, load_dataset
from cifar_fast.diagnostics.kernel_cases import Expected, check, norm_formula
from cifar_fast.kernels import cpu
from cifar_fast.kernels.batch_norm_act import (
    ACTIVATIONS,
    BatchNormAct2d,
    batch_norm_act,
    batch_norm_act_reference,
    example_launches,
    forward_op,
    inference_op,
    statistics_op,
)
from cifar_fast.kernels.fuse import unfuse_norms
from cifar_fast.kernels.launch import TABLE
from tests.helpers import DEVICE, normalize

pytestmark = pytest.mark.usefixtures("engine")

# The interpreter computes wrongly in bfloat16. The kernels compute in float32 only, and round by themselves.
DTYPES = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.bfloat16))]


@pytest.fixture(autouse=True)
def blocks(request):
    """Use few programs in the interpreter, which takes milliseconds for each, and the checked-in table on a GPU."""
    if DEVICE.type == "cpu":
        request.getfixturevalue("few_programs")


def everything(function, tensors, dtype=None, dy=None, alpha=0.075, **settings):
    """Output, gradients of x, weight and bias, and running statistics after ``function`` on copies of ``tensors``."""
    x, weight, bias, mean, var = (tensor.detach().to(dtype or tensor.dtype, copy=True) for tensor in tensors)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    y = function(x, weight, bias, mean, var, alpha=alpha, **settings)
    if dy is None:  # the same values in each dtype
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    dy = dy.to(y.dtype)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)))) | {
        "running_mean": mean,
        "running_var": var,
    }


def make(shape, dtype, seed=0, scale=1.0, shift=0.0, parameters=None):
    """x in channels_last, weight, bias, running mean and variance."""
    random = torch.Generator().manual_seed(seed)
    channels = shape[1]
    x = (
        (torch.randn(shape, generator=random) * scale + shift)
        .to(DEVICE, dtype)
        .contiguous(memory_format=torch.channels_last)
    )
    weight, bias = 1 + 0.3 * torch.randn(channels, generator=random), 0.3 * torch.randn(channels, generator=random)
    mean, var = torch.randn(channels, generator=random), 0.5 + torch.rand(channels, generator=random)
    return x, *(tensor.to(DEVICE, parameters or dtype) for tensor in (weight, bias, mean, var))


def assert_as_good_as_eager(tensors, ulps=1, rounded_once=True, **settings):
    """Check that results in half precision are rounded once, and errors against float64 at most twice eager's.

    ``ulps`` units in the last place are added, more for a tensor of few elements.
    """
    exact = everything(norm_formula, tensors, torch.float64, **settings)
    fused = everything(batch_norm_act, tensors, **settings)
    eager = [everything(batch_norm_act_reference, tensors, **settings)]
    if tensors[0].dtype == torch.float32:
        eager.append(everything(norm_formula, tensors, **settings))
    check(fused, Expected(eager, exact, ulps), rounded_once=rounded_once)
    assert fused["dx"].is_contiguous(memory_format=torch.channels_last)
    assert fused["y"].is_contiguous(memory_format=torch.channels_last)


CASES = {
    "normal": dict(),
    "mean a thousand deviations": dict(shift=1000.0),
    "deep in the tail": dict(scale=30.0),
    "small": dict(scale=1e-3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_that_of_eager_plus_a_last_place(dtype, pool, training, case):
    tensors = make((4, 24, 10, 6), dtype, **CASES[case])
    # Far from 0 the values themselves are rounded more coarsely than they differ, and float32 statistics are inexact.
    rounded_once = case != "mean a thousand deviations"
    assert_as_good_as_eager(tensors, rounded_once=rounded_once, training=training, pool=pool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "pool"), [((4, 24, 10, 6), 1), ((3, 6, 7, 9), 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_of_every_activation_is_at_most_twice_that_of_eager_plus_a_last_place(activation, shape, pool, dtype):
    assert_as_good_as_eager(make(shape, dtype, scale=2.0), training=True, activation=activation, alpha=0.5, pool=pool)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_parameter_may_be_missing_or_need_no_gradient(activation, frozen):
    x, weight, bias, *running = make((2, 4, 4, 4), torch.float32)
    parameters = dict(weight=torch.ones_like(weight), bias=torch.zeros_like(bias))
    trained = "bias" if frozen == "weight" else "weight"
    parameters[trained] = (weight if trained == "weight" else bias).requires_grad_()
    x.requires_grad_()
    results = []
    for constant in (parameters[frozen], None):
        given = parameters | {frozen: constant}
        y = batch_norm_act(x, given["weight"], given["bias"], *running, training=True, activation=activation)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, parameters[trained]))))
    assert all(torch.equal(mine, its) for mine, its in zip(*results))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [1, 2])
def test_constant_channels_and_a_huge_outlier(dtype, pool):
    x, *rest = make((4, 6, 8, 8), dtype)
    x[:, 0] = 0
    x[:, 1] = 3.25
    x[2, 2, 3, 5] = 3e4
    assert_as_good_as_eager((x, *rest), training=True, pool=pool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_overflow_of_the_variance_makes_no_nan(dtype):
    x, weight, bias, mean, var = make((4, 8, 6, 6), dtype, scale=3e19, parameters=torch.float32)
    y = batch_norm_act(x, weight, bias, mean, var, training=True, alpha=0.075)
    assert not y.isnan().any() and var.isinf().all()


@pytest.mark.parametrize("pool", [1, 2])
def test_float16_close_to_overflow(pool):
    x, *rest = make((4, 6, 8, 8), torch.float16, scale=1.0)
    assert_as_good_as_eager(((x * 15000).clamp(-65000, 65000), *rest), training=True, pool=pool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_around_the_kink_of_celu(dtype):
    """In evaluation with mean 0, variance 1 and a tiny eps, the norm does not change x."""
    steps = torch.cat([torch.linspace(-0.2, 0.2, 63), torch.tensor([0.0, -0.0, 1e-6, -1e-6, -60.0])])
    x = steps.repeat(2, 1).view(2, 1, 2, -1).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(1, device=DEVICE, dtype=dtype), torch.zeros(1, device=DEVICE, dtype=dtype)
    assert_as_good_as_eager((x, one, zero, zero, one), training=False, eps=1e-30)


@pytest.mark.parametrize("parameters", [torch.float32, torch.float16])
def test_parameters_may_have_another_dtype(parameters):
    tensors = make((3, 8, 6, 6), torch.float16, parameters=parameters)
    result = everything(batch_norm_act, tensors, training=True, pool=2)
    assert {result[name].dtype for name in ("dweight", "dbias", "running_mean", "running_var")} == {parameters}
    if parameters == torch.float32:  # the only other dtype that torch's batch norm accepts on a CPU
        assert_as_good_as_eager(tensors, training=True, pool=2)


SHAPES = [
    (1, 1, 1, 2),
    (2, 1, 1, 1),
    (3, 7, 25, 3),
    (5, 3, 7, 7),
    (2, 65, 3, 5),
    (1, 130, 2, 3),
    (2, 512, 2, 2),
    (33, 2, 1, 3),
    (1, 16, 9, 8),
]


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape):
    assert_as_good_as_eager(make(shape, torch.float32), training=True, pool=1)
    if min(shape[2:]) >= 2 and shape[0] * (shape[2] // 2) * (shape[3] // 2) > 1:
        assert_as_good_as_eager(make(shape, torch.float32), training=True, pool=2)


@pytest.mark.slow  # the interpreter
@settings(deadline=None, max_examples=15)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 80), st.integers(2, 9), st.integers(2, 9)),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from([torch.float16, torch.float32]),
    st.integers(0, 99),
)
def test_any_shape(shape, pool, training, dtype, seed):
    if shape[0] * (shape[2] // pool) * (shape[3] // pool) > 1:
        assert_as_good_as_eager(make(shape, dtype, seed), ulps=4, training=training, pool=pool)


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("shape", [(2, 9, 7, 5), (1, 8, 2, 4), (2, 17, 5, 3)])
def test_several_blocks_per_split_and_splits_per_channel(shape, pool, small_blocks):
    assert_as_good_as_eager(make(shape, torch.float32), training=True, pool=pool)
    assert_as_good_as_eager(make(shape, torch.float32, shift=1000), training=True, pool=pool)


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_activations(shared, dtype, few_programs):
    """Check the outputs of the first two convolutions of the model on real images; the first has a short last split."""
    dataset = load_dataset("npz", shared("data/cifar10-mini.npz"))
    images, _ = normalize(dataset, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    model = CNN(Recipe(), 10)
    with torch.no_grad():
        first = model.seq[0](images[:5].permute(0, 3, 1, 2))
        second = model.seq[3](model.seq[2](model.seq[1](first)))
    for x, pool in ((first, 1), (second, 2)):
        x = x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
        assert_as_good_as_eager((x, *make(x.shape, dtype)[1:]), training=True, pool=pool)


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize(("pool", "training"), list(itertools.product([1, 2], [True, False])))
def test_gradcheck_in_float64(pool, training):
    # In training with the pool, use four windows per channel and an odd height. Two windows have a gradient of zero.
    x, weight, bias, mean, var = make((2, 2, 5, 2) if training and pool == 2 else (1, 2, 3, 2), torch.float64)

    def function(x, weight, bias):
        return batch_norm_act(x, weight, bias, mean.clone(), var.clone(), training=training, alpha=0.075, pool=pool)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in (x, weight, bias)])


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("pool", [1, 2])
def test_uses_no_uninitialized_memory(pool, monkeypatch, small_blocks):
    """Fill all new memory with NaN or an invalid index."""
    tensors = make((3, 10, 7, 5), torch.float32)
    expected = everything(batch_norm_act, tensors, training=True, pool=pool)

    def poisoned(make_empty):
        def fill(*args, **kwargs):
            tensor = make_empty(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        return fill

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    result = everything(batch_norm_act, tensors, training=True, pool=pool)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_input_gives_the_same_bits(dtype, small_blocks):
    tensors = make((3, 10, 6, 4), dtype)
    first, second = (everything(batch_norm_act, tensors, training=True, pool=2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pools_ties_and_nan_like_torch():
    x = torch.randint(0, 2, (2, 5, 6, 7)).float().to(DEVICE)
    x[0, 0, 2, 2] = float("nan")
    x = x.contiguous(memory_format=torch.channels_last)
    parameters = make((2, 5, 6, 7), torch.float32)[1:]
    fused = everything(batch_norm_act, (x, *parameters), training=False, pool=2)
    eager = everything(batch_norm_act_reference, (x, *parameters), training=False, pool=2)
    assert torch.equal(fused["y"].isnan(), eager["y"].isnan()) and fused["y"].isnan().sum() == 1
    assert torch.equal(fused["dx"] != 0, eager["dx"] != 0)


def test_gradient_may_have_any_layout():
    tensors = make((3, 10, 6, 6), torch.float32)
    dy = torch.randn(3, 10, 6, 6, device=DEVICE)
    layouts = [dy, dy.contiguous(memory_format=torch.channels_last), dy.transpose(2, 3).contiguous().transpose(2, 3)]
    results = [everything(batch_norm_act, tensors, dy=layout, training=True) for layout in layouts]
    assert all(torch.equal(result["dx"], results[0]["dx"]) for result in results)

    x = tensors[0].requires_grad_()
    y = batch_norm_act(x, *tensors[1:], training=True, alpha=0.075)
    y.sum().backward()  # a gradient expanded from one number, with strides of 0
    assert x.grad.isfinite().all()


def test_running_statistics_are_required_in_evaluation_only():
    x, weight, bias, mean, var = make((3, 4, 5, 5), torch.float32)
    expected = batch_norm_act(x, weight, bias, mean, var, training=True, alpha=0.075)
    assert torch.equal(batch_norm_act(x, weight, bias, None, None, training=True, alpha=0.075), expected)
    with pytest.raises(TypeError, match="running_mean must be a tensor, not None"):
        batch_norm_act(x, weight, bias, None, None, training=False, alpha=0.075)


def test_evaluation_with_and_without_gradients_is_the_same():
    for pool in (1, 2):
        tensors = make((3, 10, 7, 7), torch.float16)
        with torch.no_grad():
            one_pass = batch_norm_act(*tensors, training=False, alpha=0.075, pool=pool)
        tensors[0].requires_grad_()
        assert torch.equal(batch_norm_act(*tensors, training=False, alpha=0.075, pool=pool), one_pass)


def test_double_backward_is_refused():
    x, *rest = make((2, 3, 4, 4), torch.float32)
    y = batch_norm_act(x.requires_grad_(), *rest, training=True, alpha=0.075)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="supports first derivatives only"):
        dx.sum().backward()


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_module_equals_batch_norm_and_shares_its_state_dict(momentum):
    fused = BatchNormAct2d(6, momentum=momentum, alpha=0.075, pool=2).to(DEVICE)
    plain = torch.nn.BatchNorm2d(6, momentum=momentum).to(DEVICE)
    plain.load_state_dict(fused.state_dict())
    for seed in range(3):
        x = make((4, 6, 6, 6), torch.float32, seed)[0]
        expected = F.celu(plain(F.max_pool2d(x, 2)), 0.075)
        assert torch.allclose(fused(x), expected, rtol=1e-5, atol=1e-6)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(fused.state_dict()[name], tensor, rtol=1e-5), name
    assert torch.allclose(fused.eval()(x), F.celu(plain.eval()(F.max_pool2d(x, 2)), 0.075), rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(affine=False),
        dict(bias=False),
        dict(track_running_stats=False),
        dict(affine=False, track_running_stats=False),
    ],
    ids=str,
)
def test_module_options_work_as_in_batch_norm(options, pool):
    if "bias" in options and "bias" not in inspect.signature(torch.nn.BatchNorm2d).parameters:
        pytest.skip("this torch's batch norm has no such option")
    fused = BatchNormAct2d(6, alpha=0.075, pool=pool, **options).to(DEVICE)
    plain = torch.nn.BatchNorm2d(6, **options).to(DEVICE)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for training in (True, False):
        fused.train(training), plain.train(training)
        x = make((4, 6, 6, 6), torch.float32)[0]
        xs = x.clone().requires_grad_(), x.clone().requires_grad_()
        ys = fused(xs[0]), F.celu(plain(F.max_pool2d(xs[1], pool)), 0.075)
        torch.testing.assert_close(*ys, rtol=1e-5, atol=1e-6)
        for y in ys:
            y.square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
    for mine, its in zip(fused.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["statistics to None", "no longer tracked", "tracked again"])
def test_tracking_of_statistics_may_change_later(change):
    modules = BatchNormAct2d(6, alpha=0.075).to(DEVICE), torch.nn.BatchNorm2d(6).to(DEVICE)
    for module in modules:
        if change == "statistics to None":
            torch.func.replace_all_batch_norm_modules_(module)
        else:
            module.track_running_stats = False
    for training in (True, False):
        if change == "tracked again":
            for module in modules:
                module.track_running_stats = True
        x = make((4, 6, 6, 6), torch.float32)[0]
        fused, plain = (module.train(training)(x) for module in modules)
        torch.testing.assert_close(fused, F.celu(plain, 0.075), rtol=1e-5, atol=1e-6)
    for name, tensor in modules[1].state_dict().items():
        torch.testing.assert_close(modules[0].state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["NCHW", "sliced", "every other channel", "reversed rows"])
def test_module_accepts_any_layout(layout):
    x = make((4, 12, 6, 6), torch.float32)[0]
    x = {
        "NCHW": lambda: x.contiguous()[:, :6].contiguous(),
        "sliced": lambda: x[:, 3:9, 1:5, 2:],
        "every other channel": lambda: x[:, ::2],
        "reversed rows": lambda: x[:, :6].transpose(2, 3),
    }[layout]()
    for training in (True, False):
        fused, plain = BatchNormAct2d(6, alpha=0.075).to(DEVICE), torch.nn.BatchNorm2d(6).to(DEVICE)
        y = fused.train(training)(x)
        torch.testing.assert_close(y, F.celu(plain.train(training)(x), 0.075), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_changes_what_it_changes_in_torch(pool, training, momentum):
    """Only the count of batches changes, and only in training."""
    modules = [fused_and_plain(pool, momentum=momentum)[i].train(training) for i in (0, 1)]
    for module in modules:
        x = torch.zeros(0, 6, 4, 4, device=DEVICE, requires_grad=True)
        y = module(x)
        assert y.shape == (0, 6, 4 // pool, 4 // pool)
        y.sum().backward()
        assert x.grad.shape == x.shape
    assert_same_state(*modules)
    assert modules[0].num_batches_tracked == int(training)
    for mine, its in zip(modules[0].parameters(), modules[1].parameters()):
        assert torch.equal(mine.grad, its.grad)


def test_cumulative_average_is_exact_in_float64():
    module = BatchNormAct2d(5, momentum=None, alpha=0.075, dtype=torch.float64, device=DEVICE)
    batches = [make((4, 5, 3, 3), torch.float64, seed)[0] for seed in range(7)]
    for batch in batches:
        module(batch)
    for mine, of_batches in (
        (module.running_mean, [batch.mean((0, 2, 3)) for batch in batches]),
        (module.running_var, [batch.var((0, 2, 3)) for batch in batches]),
    ):
        torch.testing.assert_close(mine, torch.stack(of_batches).mean(0), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize(
    "change", [lambda y, other: y.add_(other), lambda y, other: F.relu_(y), lambda y, other: y.mul_(2)]
)
def test_output_may_be_modified_in_place(change, pool):
    """A residual connection or an activation may do so, as after the operators of torch."""
    x, weight, bias, mean, var = make((3, 6, 4, 4), torch.float32)
    gradients = []
    for function in (batch_norm_act, batch_norm_act_reference):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        y = function(*inputs, mean.clone(), var.clone(), training=True, alpha=0.075, pool=pool)
        other = torch.ones_like(y) * 0.3
        change(y, other).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for mine, its in zip(*gradients):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def fused_and_plain(pool=2, **options):
    """Return our module and the same in torch's modules, with weights that are not all equal."""
    fused = BatchNormAct2d(6, alpha=0.075, pool=pool, **options).to(DEVICE)
    with torch.no_grad():
        for tensor in fused.parameters():
            tensor.copy_(torch.linspace(0.5, 1.5, 6))
    return fused, unfuse_norms(copy.deepcopy(fused))


def assert_same_state(fused, plain):
    for mine, its in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def named(module):
    return {name: tensor.detach() for name, tensor in module.named_parameters()}, dict(module.named_buffers())


def loss_of(module, state, x):
    return torch.func.functional_call(module, state, (x,)).square().sum()


def each_image(module, x):
    state = named(module)
    return torch.func.vmap(lambda x: torch.func.grad(lambda p: loss_of(module, (p, state[1]), x[None]))(state[0]))(x)


def ensemble(module, x, **how):
    stacked = torch.func.stack_module_state([copy.deepcopy(module) for _ in range(2)])
    result = torch.func.vmap(lambda p, b: torch.func.functional_call(module, (p, b), (x,)), **how)(*stacked)
    return result, stacked[1]


def tangent(module, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()))).tangent


def gradient(module, x):
    parameters, buffers = named(module)
    return torch.func.grad(lambda *state: loss_of(module, state, x))(parameters, buffers)


def second_derivative(module, x):
    parameters, buffers = named(module)
    name = next(iter(parameters))
    return torch.func.hessian(lambda w: loss_of(module, (parameters | {name: w}, buffers), x))(parameters[name])


def traced(module, x):
    return torch.jit.trace(module, x)(x)


TRANSFORMS = {
    "gradient": gradient,
    "jacobian": lambda module, x: torch.func.jacrev(module)(x[:1]),
    "forward jacobian": lambda module, x: torch.func.jacfwd(module)(x[:1, :, :2, :2]),
    "tangent": lambda module, x: torch.func.jvp(module, (x,), (x.cos(),)),
    "tangent without torch.func": tangent,
    "vector product": lambda module, x: torch.func.vjp(module, x)[1](module(x).cos()),
    "hessian": second_derivative,
    "gradients of each image": each_image,
    "vmap": lambda module, x: torch.func.vmap(module)(torch.stack((x, x.cos()))),
    "vmap in channels_last": lambda module, x: torch.func.vmap(module, 1)(torch.stack((x, x.cos()), 1)),
    "ensemble": ensemble,
    "ensemble with random numbers": lambda module, x: ensemble(module, x, randomness="different"),
    "batched gradients": lambda module, x: torch.autograd.functional.jacobian(module, x[:2], vectorize=True),
    "trace": traced,
}
IN_TRAINING = ("gradient", "tangent without torch.func", "ensemble", "ensemble with random numbers")


def transformed(module, transform, x):
    """Return the results of a transform, by their order, since the names of tensors differ."""
    leaves = torch.utils._pytree.tree_leaves(TRANSFORMS[transform](module, x))
    return [*map(torch.Tensor.detach, leaves), *module.state_dict().values()]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "error::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("transform", "training"), [*((name, False) for name in TRANSFORMS), *((name, True) for name in IN_TRAINING)]
)
def test_transforms_of_torch_work_as_with_the_norm_of_torch(transform, training):
    x = make((3, 6, 4, 4), torch.float32)[0]
    results = [transformed(module.train(training), transform, x) for module in fused_and_plain()]
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_vmap_in_training_needs_statistics_for_each_as_with_the_norm_of_torch():
    fused, plain = (module.train() for module in fused_and_plain())
    x = torch.stack([make((3, 6, 4, 4), torch.float32, seed)[0] for seed in (0, 1)])
    for module in (fused, plain):
        with pytest.raises(RuntimeError, match="running_mean or running_var, which will be updated in place"):
            torch.func.vmap(module)(x)
        torch.func.replace_all_batch_norm_modules_(module)
    torch.testing.assert_close(torch.func.vmap(fused)(x), torch.func.vmap(plain)(x), rtol=1e-4, atol=1e-5)


def network():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 6, 3, padding=1, bias=False), BatchNormAct2d(6, alpha=0.075, pool=2)
    return torch.nn.Sequential(*layers).to(DEVICE)


def test_tools_that_replace_norms_raise_an_error_with_the_cure():
    model = network()
    with pytest.raises(AttributeError, match=r"includes a max-pool and an activation.*unfuse_norms\(model\)"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(AttributeError, match="includes a max-pool and an activation"):
        fuse_conv_bn_eval(*model.eval())
    with pytest.raises(TypeError, match=r"unfuse_norms\(model\)"):
        torch.fx.symbolic_trace(model)
    assert "eps=1e-05" in repr(model) and type(copy.deepcopy(model)[1]) is BatchNormAct2d


def test_eps_is_an_attribute_that_does_not_exist():
    norm = BatchNormAct2d(6, eps=0.25, alpha=0.075)
    assert not hasattr(norm, "eps") and getattr(norm, "eps", 7) == 7 and norm.epsilon == 0.25
    assert "eps" not in dict(inspect.getmembers(norm))
    for other in (copy.copy(norm), copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert other.epsilon == 0.25
    norm.eps = 0.5
    assert norm.epsilon == 0.5 and not hasattr(norm, "eps")


def test_update_bn_works():
    model, plain = network(), network()
    batches = [make((4, 3, 8, 8), torch.float32, seed)[0] for seed in range(3)]
    plain[1] = torch.nn.Sequential(torch.nn.MaxPool2d(2), torch.nn.BatchNorm2d(6), torch.nn.CELU(0.075)).to(DEVICE)
    for each in (model, plain):
        each(make((4, 3, 8, 8), torch.float32, 9)[0])
        update_bn(batches, each)
    for name in ("running_mean", "running_var", "num_batches_tracked", "momentum"):
        torch.testing.assert_close(getattr(model[1], name), getattr(plain[1][1], name))


@pytest.mark.slow  # torch's whole check
@pytest.mark.parametrize(("pool", "gradient"), list(itertools.product([1, 2], [True, False])))
def test_opcheck_of_forward(pool, gradient):
    """Check in evaluation, because in training the gradient includes the path through the statistics argument."""
    x, weight, bias, mean, var = make((2, 5, 5, 4), torch.float32)
    _, pooled, argmax = statistics_op(x, None, None, None, False, 0.0, 1e-5, pool)
    for tensor in (x, weight, bias):
        tensor.requires_grad_(gradient)
    given = torch.stack((mean, var, (var + 1e-5).rsqrt()))
    torch.library.opcheck(forward_op, (x, pooled, argmax, given, weight, bias, False, "celu", 0.075, pool))


@pytest.mark.slow  # torch's whole check
@pytest.mark.parametrize(("pool", "running", "training"), list(itertools.product([1, 2], [True, False], [True, False])))
def test_opcheck_of_the_statistics(pool, running, training):
    x, _, _, mean, var = make((2, 5, 5, 4), torch.float32)
    tracked = (mean, var, torch.tensor(3, device=DEVICE)) if running else (None, None, None)
    torch.library.opcheck(statistics_op, (x, *tracked, training, 0.1, 1e-5, pool))


def test_opcheck_of_inference():
    torch.library.opcheck(inference_op, (*make((2, 5, 4, 4), torch.float32), 1e-5, "celu", 0.075, 2))


@pytest.mark.parametrize("direction", ["forward", "backward", "inference"])
@pytest.mark.parametrize("pool", [1, 2])
def test_launches_count_bytes_read_and_written(direction, pool):
    """Check the sum, except for partial results and values per channel, which may add a tenth."""
    settings = dict(pool=pool, dtype=torch.float16, parameter_dtype=torch.float16, alpha=0.075)
    launches = example_launches((512, 64, 8, 8), direction=direction, **settings)
    x = 512 * 64 * 8 * 8 * 2
    p, argmax = (x, 0) if pool == 1 else (x // 4, x // 8)
    saved = 0 if pool == 1 else p + argmax  # written by the first pass of forward
    expected = {"forward": x + saved + p + p, "backward": 4 * p + argmax + x, "inference": x + p}[direction]
    moved = sum(launch.bytes_read + launch.bytes_written for launch in launches)
    assert expected <= moved <= 1.1 * expected


@pytest.mark.slow
@pytest.mark.parametrize("pool", [1, 2])
def test_compiles_without_graph_break(pool):
    """The convolution before it lets the compiler choose strides, as in the model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1, bias=False), BatchNormAct2d(6, alpha=0.075, pool=pool)
    ).to(DEVICE)
    model = model.to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = make((2, 3, 6, 6), torch.float32)[0]

    def train(function):
        model.load_state_dict(before)
        model.zero_grad()
        y = function(x)
        y.square().sum().backward()
        return [
            y.detach(),
            *(parameter.grad for parameter in model.parameters()),
            *(buffer.clone() for buffer in model.buffers()),
        ]

    torch.compiler.reset()
    plain, compiled = train(model), train(torch.compile(model, fullgraph=True, dynamic=False))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(plain, compiled, strict=True))
    assert compiled[0].is_contiguous(memory_format=torch.channels_last)


def call(**changes):
    names = ("x", "weight", "bias", "running_mean", "running_var")
    arguments = dict(zip(names, make((2, 4, 4, 4), torch.float32))) | dict(training=True, alpha=0.075) | changes
    return batch_norm_act(*[arguments.pop(name) for name in names], **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(x=torch.zeros(2, 4, 4)), ValueError, r"x must have the shape \[N, C, H, W\], not \[2, 4, 4\]"),
        (
            dict(x=torch.zeros(2, 4, 4, 4, dtype=torch.int32)),
            TypeError,
            "x must be float16, bfloat16, float32 or float64, not torch.int32",
        ),
        (dict(x=torch.zeros(2, 4, 4, 4)), ValueError, "x must be in channels_last"),
        (dict(x=torch.zeros(0, 4, 1, 1), pool=2), ValueError, "at least one value per channel"),
        (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
        (dict(x=torch.zeros(2, 4, 1, 1), pool=2), ValueError, "at least one value per channel"),
        (dict(x=torch.zeros(1, 4, 1, 1)), ValueError, "Expected more than 1 value per channel when training"),
        (dict(x=torch.zeros(1, 4, 3, 3), pool=2), ValueError, "Expected more than 1 value per channel when training"),
        (dict(pool=3), ValueError, "pool must be 1 or 2, not 3"),
        (dict(alpha=0.0), ValueError, "alpha must be above 0 and finite, not 0.0"),
        (
            dict(activation="tanh"),
            ValueError,
            "activation must be one of none, celu, relu, gelu, gelu_tanh, silu, not .tanh.",
        ),
        (dict(weight=torch.ones(5)), ValueError, r"weight must have the shape \[4\], not \[5\]"),
        (dict(bias=torch.ones(4, dtype=torch.int64)), TypeError, "bias must be float16 or .*, not torch.int64"),
        (dict(bias="none"), TypeError, "bias must be a tensor, not 'none'"),
        (dict(running_mean=None), ValueError, "must both be given, or neither"),
        (dict(weight=torch.ones(4, device="meta")), RuntimeError, "weight must be on .* like x, not on meta"),
    ],
)
def test_refuses_wrong_arguments(changes, error, words):
    changes = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in changes.items()
    }
    with pytest.raises(error, match=words):
        call(**changes)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """Forget the compiled libraries, and let no compiler be found."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(tmp_path / "cache"))
    cpu.forget()
    yield
    cpu.forget()


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("home", ["/proc/none", None])
def test_library_is_compiled_elsewhere_if_its_cache_cannot_be_written_to(
    tmp_path, no_compiler, monkeypatch, caplog, home
):
    compiler = tmp_path / "compiler"  # of an empty library, in a moment
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "int x;" | cc -shared -x c -o "$2" -\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("CIFAR_FAST_CACHE")
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))
    caplog.set_level("INFO")
    assert cpu.unavailable_reason(torch.float32) is None
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2 and "so each start compiles; set $CIFAR_FAST_CACHE to a writable folder" in lines[1]
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for tensors on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_computes_without_a_compiler_and_one_line_says_so(dtype, no_compiler, caplog):
    tensors = make((3, 6, 4, 4), dtype, parameters=torch.float32)
    caplog.set_level("INFO")
    for pool in (1, 2):
        ours, plain = (
            everything(function, tensors, training=True, activation="silu", pool=pool)
            for function in (batch_norm_act, batch_norm_act_reference)
        )
        assert all(torch.equal(ours[name], plain[name]) for name in plain)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2 and "compiling" in lines[0] and "plain torch" in lines[1] and "no-compiler" in lines[1]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for tensors on a CPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [1, 2])
def test_number_of_threads_changes_no_bit(dtype, pool, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = make((40, 24, 16, 16), dtype)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(everything(batch_norm_act, tensors, training=True, activation="gelu", pool=pool))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize("path", sorted(TABLE.parent.glob("*.py")), ids=lambda path: path.name)
def test_masked_loads_have_a_default_and_nothing_is_atomic(path):
    """Without a default the interpreter loads zeros outside the mask, and a GPU anything."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            words = {keyword.arg for keyword in node.keywords}
            assert "mask" not in words or "other" in words, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert "atomic" not in ast.unparse(node.func), f"{path.name}:{node.lineno}"


RECIPE_SHAPES = [
    pytest.param((n, *shape), marks=[pytest.mark.slow] * (n == 512), id="x".join(map(str, (n, *shape))))
    for n in (8, 512)
    for shape in dict.fromkeys((block.c_out, block.size, block.size, block.pool) for block in Recipe().blocks())
]


slow_dtypes = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, *slow_dtypes])
@pytest.mark.parametrize("shape", RECIPE_SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_error_at_recipe_shapes_on_a_gpu(shape, dtype, training):
    assert_as_good_as_eager(make(shape[:4], dtype), training=training, pool=shape[4])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", RECIPE_SHAPES)
def test_replay_of_a_graph_equals_a_plain_call(shape):
    tensors = make(shape[:4], torch.float16)
    dy = torch.randn_like(batch_norm_act(*tensors, training=False, alpha=0.075, pool=shape[4]))
    expected = everything(batch_norm_act, tensors, dy=dy, training=True, pool=shape[4])
    x, weight, bias, mean, var = (tensor.clone() for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = batch_norm_act(*leaves, mean, var, training=True, alpha=0.075, pool=shape[4])
        gradients = torch.autograd.grad(y, leaves, dy)
    for tensor, start in zip((mean, var), tensors[3:]):
        tensor.copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    replayed = dict(zip(expected, (y.detach(), *gradients, mean, var)))
    assert all(torch.equal(replayed[name], expected[name]) for name in expected)

"""The cross entropy kernel, interpreted without a GPU and compiled with one."""

import pytest
import torch

from cifar_fast.diagnostics.kernel_cases import Expected, check
from cifar_fast.kernels import cross_entropy
from cifar_fast.kernels.cross_entropy import cross_entropy_reference
from tests.helpers import DEVICE

pytestmark = pytest.mark.usefixtures("engine")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def outputs_and_labels(size, classes, dtype, spread=8.0):
    generator = torch.Generator().manual_seed(size + classes)
    x = (torch.randn(size, classes, generator=generator) * spread).to(DEVICE, dtype)
    return x, torch.randint(classes, (size,), generator=generator).to(DEVICE)


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "classes"), [(512, 10), (37, 10), (5, 2), (3, 100)])
@pytest.mark.parametrize("spread", [1e-3, 8, 3000])
@pytest.mark.parametrize("scale", [0.125, 0.3])
def test_error_is_at_most_twice_that_of_eager_plus_a_last_place(size, classes, dtype, spread, scale):
    x, labels = outputs_and_labels(size, classes, dtype, spread)
    settings = dict(label_smoothing=0.2, scale=scale)
    ours, eager = (function(x, labels, **settings) for function in (cross_entropy, cross_entropy_reference))
    truth = cross_entropy_reference(x.double(), labels, **settings)
    ours, eager, truth = (dict(zip(("loss", "correct", "dx"), results)) for results in (ours, eager, truth))
    check(ours, Expected([eager], {name: truth[name] for name in ("loss", "dx")}), rounded_once=scale == 0.125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_class_is_always_right(dtype):
    loss, correct, dx = cross_entropy(*outputs_and_labels(3, 1, dtype), label_smoothing=0.2, scale=0.125)
    assert correct.all() and not loss.any() and dx.abs().max() < 1e-7


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_gradient_equals_finite_differences_of_the_summed_loss(smoothing):
    x, labels = outputs_and_labels(6, 10, torch.float32)
    _, _, gradient = cross_entropy(x, labels, label_smoothing=smoothing, scale=0.5)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 1e-2
    up, down = (
        cross_entropy(x + sign * step, labels, label_smoothing=smoothing, scale=0.5)[0].double().sum()
        for sign in (1, -1)
    )
    assert (gradient.double() * step).sum().item() == pytest.approx((up - down).item() / 2, rel=1e-3)


def test_prediction_is_the_first_of_equal_logits():
    x = torch.tensor([[1.0, 3, 3], [3, 1, 3], [2, 2, 2]], device=DEVICE)
    correct = [cross_entropy(x, torch.full((3,), label, device=DEVICE))[1].tolist() for label in range(3)]
    assert correct == [[False, True, True], [True, False, False], [False, False, False]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_the_largest_logit_as_in_torch(dtype):
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([[nan, nan, nan], [1, nan, 5], [inf, 1, nan], [9, nan, nan], [-inf, -inf, -inf]], dtype=dtype)
    x = x.to(DEVICE)
    assert x.argmax(dim=1).tolist() == [0, 1, 2, 1, 0]
    correct = [cross_entropy(x, torch.full((5,), label, device=DEVICE))[1].tolist() for label in range(3)]
    assert torch.tensor(correct).nonzero().tolist() == [[0, 0], [0, 4], [1, 1], [1, 3], [2, 2]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_give_the_same_as_torch(bad):
    x, labels = outputs_and_labels(4, 10, torch.float32)
    x[1, 3], labels[1] = bad, 3
    ours, eager = (how(x, labels, label_smoothing=0.2, scale=1.0) for how in (cross_entropy, cross_entropy_reference))
    assert torch.equal(ours[1], eager[1])
    for mine, its in zip(ours[::2], eager[::2]):
        assert torch.allclose(mine, its, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(x=torch.zeros(3)), ValueError, r"x must be a non-empty tensor of shape \[B, K\]"),
        (dict(x=torch.zeros(0, 10)), ValueError, r"x must be a non-empty tensor of shape \[B, K\]"),
        (dict(x=torch.zeros(3, 10, dtype=torch.float64)), TypeError, "x must be float16 or bfloat16 or float32"),
        (dict(x=torch.zeros(10, 3).T), ValueError, "x must be contiguous"),
        (dict(labels=torch.zeros(3)), TypeError, "labels must be int64"),
        (dict(labels=torch.zeros(4, dtype=torch.int64)), ValueError, r"labels must have the shape \[3\]"),
    ],
)
def test_refuses_wrong_arguments(changes, error, words):
    arguments = dict(x=torch.zeros(3, 10), labels=torch.zeros(3, dtype=torch.int64)) | changes
    with pytest.raises(error, match=words):
        cross_entropy(*(tensor.to(DEVICE) for tensor in arguments.values()))

"""Right and wrong calls of each operator give what plain torch gives, or one line."""

import pytest
import torch

from cifar_fast.kernels import StepState, augment, batch_norm_act, cross_entropy, record
from tests.kernels.misuse import OPERATORS, run

NORM_INPUT = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)


@pytest.fixture
def native(monkeypatch):
    """Let the operators run as on a CPU without Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_generated_calls_are_right_or_refused(operator, native):
    counts = run(operator, 40)
    assert counts["right"] > 10 and counts["refused"] > 2


@pytest.mark.nightly
@pytest.mark.parametrize("operator", OPERATORS)
def test_two_thousand_generated_calls_are_right_or_refused(operator, native):
    counts = run(operator, 2000)
    assert counts["right"] > 500 and counts["refused"] > 100


def state(**changes):
    return StepState.initial(torch.zeros(6, 1), steps=3, batch_size=5, dtype=torch.float32)._replace(**changes)


LOSS, COUNTER = torch.zeros(5), torch.zeros(1, dtype=torch.int64)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            dict(schedule=torch.zeros(0, 1)),
            ValueError,
            r"state.schedule must have the shape \[n, G\] with at least one",
        ),
        (
            dict(losses=torch.zeros(0, 5)),
            ValueError,
            r"state.losses must have the shape \[steps, B\] with at least one",
        ),
        (dict(global_step=COUNTER, epoch_step=COUNTER), ValueError, "global_step is changed, so it must not share"),
        (dict(epoch_step=COUNTER + 3), IndexError, "state.epoch_step must be at least 0 and below 3, not 3"),
        (dict(epoch_step=COUNTER - 1), IndexError, "state.epoch_step must be at least 0"),
        (dict(global_step=COUNTER - 1), IndexError, "state.global_step must be at least 0"),
        (dict(lr=None), TypeError, "state.lr must be a tensor, not None"),
    ],
)
def test_record_refuses_a_state_that_it_cannot_advance(changes, error, message):
    wrong = state(**changes)
    before = [None if tensor is None else tensor.clone() for tensor in wrong]
    with pytest.raises(error, match=message):
        record(LOSS, LOSS > 0, wrong)
    assert all(tensor is None or torch.equal(tensor, copy) for tensor, copy in zip(wrong, before))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("label", [-100, -1, 3])
def test_cross_entropy_refuses_a_label_out_of_range_as_torch_does(label):
    with pytest.raises(IndexError, match="labels must be between 0 and 2, but"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, label]))


IMAGES = dict(
    images=torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
    draws=torch.zeros(4, 2, dtype=torch.int64),
    table=torch.zeros(3, 256),
    padding=1,
    cutout_size=1,
)
CALLS = {
    "augment": (augment, IMAGES, ("images", "draws", "table", "padding", "cutout_size", "both_sides")),
    "cross_entropy": (
        cross_entropy,
        dict(x=torch.zeros(2, 3), labels=torch.tensor([0, 1])),
        ("x", "labels", "label_smoothing", "scale"),
    ),
    "record": (record, dict(loss=LOSS, correct=LOSS > 0, state=state()), ("loss", "correct", "state")),
    "batch_norm_act": (
        batch_norm_act,
        dict(x=NORM_INPUT, weight=None, bias=None, running_mean=None, running_var=None, training=True),
        ("x", "activation", "alpha", "momentum", "eps", "pool", "training"),
    ),
}


@pytest.mark.parametrize("wrong", [None, [1.0]], ids=["None", "list"])
@pytest.mark.parametrize(
    ("operator", "argument"), [(name, argument) for name, (_, _, arguments) in CALLS.items() for argument in arguments]
)
def test_none_and_a_list_are_refused_by_the_name_of_the_argument(operator, argument, wrong):
    function, given, _ = CALLS[operator]
    with pytest.raises((TypeError, ValueError), match=f"^(each row of )?{argument} must be .* not (None|list)"):
        function(**given | {argument: wrong})


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_require_a_gradient_are_refused_as_by_torch(name):
    given = dict(weight=None, bias=None, running_mean=torch.zeros(3), running_var=torch.ones(3), training=False)
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
        batch_norm_act(NORM_INPUT, **given)
    with torch.no_grad():
        batch_norm_act(NORM_INPUT, **given)


@pytest.mark.parametrize("momentum", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("other", ["weight", "running_var"])
def test_running_statistics_in_the_memory_of_another_argument_are_refused(other, momentum):
    given = {name: torch.ones(3) for name in ("weight", "bias", "running_mean", "running_var")}
    given["running_mean"] = given[other]
    with pytest.raises(ValueError, match=f"running_mean is changed, so it must not share memory with {other}; "):
        batch_norm_act(NORM_INPUT, **given, training=True, momentum=momentum)

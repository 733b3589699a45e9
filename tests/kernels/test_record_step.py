"""The kernel that ends a training step, interpreted without a GPU and compiled with one."""

import pytest
import torch

from cifar_fast.kernels import StepState, record
from cifar_fast.kernels.record_step import record_reference
from tests.helpers import DEVICE

pytestmark = pytest.mark.usefixtures("engine")


def initial_state(size=5, steps=3, dtype=torch.float32, epochs=2, groups=1):
    schedule = torch.arange(steps * epochs * groups, dtype=torch.float32, device=DEVICE).view(-1, groups) * 0.1
    return StepState.initial(schedule, steps, size, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "steps", "groups"), [(5, 3, 1), (1, 1, 4), (256, 2, 1), (300, 2, 3)])
def test_equals_plain_torch_over_a_run_and_one_step_more(size, steps, groups, dtype):
    ours, theirs = (initial_state(size, steps, dtype, groups=groups) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 * steps + 1):
        loss = torch.randn(size, generator=generator).to(DEVICE, dtype)
        record(loss, loss > 0, ours)
        record_reference(loss, loss > 0, theirs)
        for name, tensor in ours._asdict().items():
            assert torch.equal(tensor, getattr(theirs, name)), name
    assert ours.global_step.item() == 2 * steps + 1
    assert torch.equal(ours.losses[0], loss) and torch.equal(ours.lr, ours.schedule[-1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(losses=torch.zeros(3)), ValueError, r"state.losses must have the shape \[steps, B\]"),
        (dict(losses=torch.zeros(3, 5, dtype=torch.float64)), TypeError, "state.losses must be float32"),
        (dict(correct=torch.zeros(3, 5)), TypeError, "state.correct must be bool"),
        (dict(epoch_step=torch.zeros(1)), TypeError, "state.epoch_step must be int64"),
        (dict(lr=torch.zeros(2)), ValueError, r"state.lr must have the shape \[1\]"),
        (
            dict(global_step=torch.zeros(1, dtype=torch.int64, device="meta")),
            RuntimeError,
            "state.global_step must be on",
        ),
    ],
)
def test_refuses_wrong_arguments(changes, error, message):
    changes = {name: value.to(DEVICE) if value.device.type == "cpu" else value for name, value in changes.items()}
    loss = torch.zeros(5, device=DEVICE)
    with pytest.raises(error, match=message):
        record(loss, loss > 0, initial_state()._replace(**changes))

"""The bookkeeping of a step: under Triton's interpreter where there is no GPU, compiled where there is one."""

import pytest
import torch

from cifar_fast.kernels import record
from cifar_fast.kernels.record_step import record_reference
from tests.helpers import DEVICE


def tensors(size=5, steps=3, dtype=torch.float32, epochs=2):
    return dict(
        losses=torch.zeros(steps, size, dtype=dtype, device=DEVICE),
        answers=torch.zeros(steps, size, dtype=torch.bool, device=DEVICE),
        schedule=torch.arange(steps * epochs, dtype=torch.float32, device=DEVICE) * 0.1,
        rate=torch.zeros(1, device=DEVICE),
        done=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        position=torch.zeros(1, dtype=torch.int64, device=DEVICE),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "steps"), [(5, 3), (1, 1), (256, 2), (300, 2)])
def test_a_run_is_filed_as_by_plain_torch(size, steps, dtype):
    """To the run's end, and a step past it."""
    ours, theirs = tensors(size, steps, dtype), tensors(size, steps, dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 * steps + 1):
        loss = torch.randn(size, generator=generator).to(DEVICE, dtype)
        record(loss, loss > 0, **ours)
        record_reference(loss, loss > 0, **theirs)
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    assert ours["done"].item() == 2 * steps + 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(losses=torch.zeros(3)), ValueError, r"losses must have the shape \[steps, B\]"),
        (dict(losses=torch.zeros(3, 5, dtype=torch.float64)), TypeError, "losses must be float32"),
        (dict(answers=torch.zeros(3, 5)), TypeError, "answers must be bool"),
        (dict(position=torch.zeros(1)), TypeError, "position must be int64"),
        (dict(rate=torch.zeros(2)), ValueError, r"rate must have the shape \[1\]"),
        (dict(done=torch.zeros(1, dtype=torch.int64, device="meta")), RuntimeError, "done must be on"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, words):
    changes = {name: value.to(DEVICE) if value.device.type == "cpu" else value for name, value in changes.items()}
    loss = torch.zeros(5, device=DEVICE)
    with pytest.raises(error, match=words):
        record(loss, loss > 0, **tensors() | changes)

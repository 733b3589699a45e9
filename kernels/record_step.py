"""End of a captured training step in one launch: store its results, advance the counters, load the next learning rate.

    losses[epoch_step] = loss        correct[epoch_step] = correct of the step
    global_step += 1        epoch_step = (epoch_step + 1) mod steps        lr = schedule[min(global_step, end)]

A step has one learning rate for each group of parameters.
All tensors are on the device, so replays of a CUDA graph can read and write them. A single warp runs the kernel, so
every thread has read the counters before one of them changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch, operator, require, require_is_tensor, require_tensor, shown
from .optional_triton import tl, triton

BLOCK = 256


class StepState(NamedTuple):
    """The state of a training loop on the device, which :func:`record` updates in place.

    Args:
        losses: ``[steps, B]`` in float16, bfloat16 or float32, the losses of each step of the epoch.
        correct: bool ``[steps, B]``, which images of each step were classified correctly.
        schedule: float32 ``[n, G]``, the learning rates of G groups of parameters at each step of the run.
        lr: float32 ``[G]``, the learning rates of the current step.
        global_step: int64 ``[1]``, the number of finished steps of the run.
        epoch_step: int64 ``[1]``, the number of finished steps of the epoch.
    """

    losses: Tensor
    correct: Tensor
    schedule: Tensor
    lr: Tensor
    global_step: Tensor
    epoch_step: Tensor

    @classmethod
    def initial(cls, schedule: Tensor, steps: int, batch_size: int, dtype: torch.dtype) -> StepState:
        """Return the state before the first step, on the device of ``schedule``. The losses have ``dtype``."""
        return cls(
            losses=schedule.new_zeros(steps, batch_size, dtype=dtype),
            correct=schedule.new_zeros(steps, batch_size, dtype=torch.bool),
            schedule=schedule,
            lr=schedule[0].clone(),
            global_step=schedule.new_zeros(1, dtype=torch.int64),
            epoch_step=schedule.new_zeros(1, dtype=torch.int64),
        )


def record_reference(loss: Tensor, correct: Tensor, state: StepState) -> None:
    """Update ``state`` as :func:`record` does, in plain torch."""
    state.losses[state.epoch_step] = loss
    state.correct[state.epoch_step] = correct
    state.global_step.add_(1)
    state.epoch_step.copy_((state.epoch_step + 1) % len(state.losses))
    state.lr.copy_(state.schedule[state.global_step.clamp(max=len(state.schedule) - 1)][0])


@triton.jit
def record_kernel(
    step_loss,  # [B]
    step_correct,  # uint8 [B]
    losses,  # [steps, B]
    correct,  # uint8 [steps, B]
    schedule,  # [end + 1, GROUPS]
    lr,  # [GROUPS]
    global_step,  # [1]
    epoch_step,  # [1]
    size,  # B
    steps,
    end,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of BLOCK elements that cover B
    BLOCK: tl.constexpr,
):
    at = tl.load(epoch_step)
    count = tl.load(global_step) + 1
    for block in range(BLOCKS):
        lane = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(losses + at * size + lane, tl.load(step_loss + lane, mask=lane < size, other=0.0), mask=lane < size)
        tl.store(correct + at * size + lane, tl.load(step_correct + lane, mask=lane < size, other=0), mask=lane < size)
    for group in tl.static_range(GROUPS):
        tl.store(lr + group, tl.load(schedule + tl.minimum(count, end) * GROUPS + group))
    tl.store(global_step, count)
    tl.store(epoch_step, (at + 1) % steps)


def plan_record(step_loss: Tensor, step_correct: Tensor, *state: Tensor) -> list[Launch]:
    """Return the launch that updates ``state``, the tensors of a :class:`StepState`."""
    losses, correct, schedule, lr, global_step, epoch_step = state
    steps, size = losses.shape
    counters = dict(global_step=global_step, epoch_step=epoch_step)
    return [
        Launch(
            record_kernel,
            grid=(1,),
            reads=dict(step_loss=step_loss, step_correct=step_correct.view(torch.uint8), schedule=schedule, **counters),
            writes=dict(losses=losses, correct=correct.view(torch.uint8), lr=lr, **counters),
            scalars=dict(size=size, steps=steps, end=len(schedule) - 1),
            constants=dict(GROUPS=len(lr), BLOCKS=triton.cdiv(size, BLOCK), BLOCK=BLOCK),
            num_warps=1,
            accessed=dict(losses=size, correct=size, schedule=len(lr)),
        )
    ]


def record_outputs(
    step_loss: Tensor,
    step_correct: Tensor,
    losses: Tensor,
    correct: Tensor,
    schedule: Tensor,
    lr: Tensor,
    global_step: Tensor,
    epoch_step: Tensor,
) -> None:
    """Allocate nothing, because the operator works in place."""


def record_on_cpu(step_loss: Tensor, step_correct: Tensor, *state: Tensor) -> None:
    """Update ``state`` in plain torch, which is fast enough for so few numbers."""
    record_reference(step_loss, step_correct, StepState(*state))


def check_counters(step_loss, step_correct, losses, correct, schedule, lr, global_step, epoch_step) -> None:
    """Raise an IndexError for counters outside the epoch or the run."""
    for name, counter, end in (("epoch_step", epoch_step, len(losses)), ("global_step", global_step, 2**63 - 1)):
        value = int(counter)
        require(0 <= value < end, IndexError, f"state.{name} must be at least 0 and below {end}, not {value}")


record_op = operator(
    "record",
    record_outputs,
    plan_record,
    record_on_cpu,
    ("losses", "correct", "lr", "global_step", "epoch_step"),
    check_counters,
)


def record(loss: Tensor, correct: Tensor, state: StepState) -> None:
    """Store the results of a step in ``state``, advance its counters and load the next learning rate.

    After the last step of the run, ``state.lr`` keeps the last learning rate. A GPU does not check the values of the
    counters: a value out of range writes memory outside the tensors.

    Args:
        loss: the losses of the step, ``[B]`` in float16, bfloat16 or float32.
        correct: which images were classified correctly, bool ``[B]``.
        state: tensors to update, each in memory of its own. ``state.losses`` has the dtype of ``loss``. There is at
            least one step, and one row of ``state.schedule``.

    Raises:
        TypeError, ValueError: a dtype, shape or layout is not as above; tensors share memory.
        RuntimeError: the tensors are on different devices.
        IndexError: a counter is out of range, on a CPU.
    """
    require_is_tensor("loss", loss)
    require(isinstance(state, StepState), TypeError, f"state must be a StepState, not {shown(state)}")
    losses, schedule = state.losses, state.schedule
    for name, tensor, form in (("losses", losses, "[steps, B]"), ("schedule", schedule, "[n, G]")):
        require_is_tensor(f"state.{name}", tensor)
        message = f"state.{name} must have the shape {form} with at least one row, not {list(tensor.shape)}"
        require(tensor.dim() == 2 and len(tensor) > 0, ValueError, message)
    size = losses.shape[1]
    like = ("loss", loss)
    require_tensor("loss", loss, (torch.float16, torch.bfloat16, torch.float32), (size,), like)
    require_tensor("correct", correct, (torch.bool,), (size,), like)
    for name, dtype, shape in (
        ("losses", loss.dtype, losses.shape),
        ("correct", torch.bool, losses.shape),
        ("schedule", torch.float32, schedule.shape),
        ("lr", torch.float32, schedule.shape[1:]),
        ("global_step", torch.int64, (1,)),
        ("epoch_step", torch.int64, (1,)),
    ):
        require_tensor(f"state.{name}", getattr(state, name), (dtype,), tuple(shape), like)
    record_op(loss, correct, *state)


def example_launches(batch_size: int, *, dtype: torch.dtype) -> list[Launch]:
    """Return the launch of one call, on meta tensors, in a run of 24 epochs of 97 steps."""
    state = StepState.initial(torch.empty(24 * 97, 1, device="meta"), 97, batch_size, dtype)
    return plan_record(state.losses[0], state.correct[0], *state)

"""The bookkeeping of a captured step in one launch: its losses and answers are filed, and the next step is made ready.

    losses[position] = loss        answers[position] = correct
    done += 1        position = (position + 1) mod steps        rate = schedule[min(done, end)]

All of it lies on the device, where a CUDA graph's replays can read and write it. A single warp does it: every thread
has then read the counters before one of them is changed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, operator, require, require_tensor

BLOCK = 256


def record_reference(
    loss: Tensor,
    correct: Tensor,
    losses: Tensor,
    answers: Tensor,
    schedule: Tensor,
    rate: Tensor,
    done: Tensor,
    position: Tensor,
) -> None:
    """The same in plain torch."""
    losses[position] = loss
    answers[position] = correct
    done += 1
    position.copy_((position + 1) % len(losses))
    rate.copy_(schedule[done.clamp(max=len(schedule) - 1)])


@triton.jit
def record_kernel(
    loss,  # [B]
    correct,  # uint8 [B]
    losses,  # [steps, B]
    answers,  # uint8 [steps, B]
    schedule,  # [end + 1]
    rate,  # [1]
    done,  # [1]
    position,  # [1]
    size,  # B
    steps,
    end,
    BLOCKS: tl.constexpr,  # of BLOCK, for all of B
    BLOCK: tl.constexpr,
):
    at = tl.load(position)
    count = tl.load(done) + 1
    for block in range(BLOCKS):
        lane = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(losses + at * size + lane, tl.load(loss + lane, mask=lane < size, other=0.0), mask=lane < size)
        tl.store(answers + at * size + lane, tl.load(correct + lane, mask=lane < size, other=0), mask=lane < size)
    tl.store(rate, tl.load(schedule + tl.minimum(count, end)))
    tl.store(done, count)
    tl.store(position, (at + 1) % steps)


def plan_record(loss, correct, losses, answers, schedule, rate, done, position) -> list[Launch]:
    """The one launch."""
    steps, size = losses.shape
    return [
        Launch(
            record_kernel,
            grid=(1,),
            reads=dict(loss=loss, correct=correct.view(torch.uint8), schedule=schedule, done=done, position=position),
            writes=dict(losses=losses, answers=answers.view(torch.uint8), rate=rate, done=done, position=position),
            scalars=dict(size=size, steps=steps, end=len(schedule) - 1),
            constants=dict(BLOCKS=triton.cdiv(size, BLOCK), BLOCK=BLOCK),
            num_warps=1,
            touched=dict(losses=size, answers=size, schedule=1),
        )
    ]


def record_outputs(
    loss: Tensor,
    correct: Tensor,
    losses: Tensor,
    answers: Tensor,
    schedule: Tensor,
    rate: Tensor,
    done: Tensor,
    position: Tensor,
) -> None:
    """Nothing: all is done in place."""


record_op = operator("record", record_outputs, plan_record, ("losses", "answers", "rate", "done", "position"))


def record(
    loss: Tensor,
    correct: Tensor,
    *,
    losses: Tensor,
    answers: Tensor,
    schedule: Tensor,
    rate: Tensor,
    done: Tensor,
    position: Tensor,
) -> None:
    """File a step's results under its position in the epoch, and make the next step ready; in place.

    Args:
        loss, correct: ``[B]``, the latter bool.
        losses, answers: ``[steps, B]``, of the same types: a row for each step of an epoch.
        schedule: float32, the learning rate of each step of the run.
        rate: float32 ``[1]``, which gets the next step's; after the last the last one's again.
        done, position: int64 ``[1]``, the steps of the run and of the epoch. What they are is not checked: out of
            range, memory is written that is not theirs.

    Raises:
        TypeError, ValueError: a dtype, a shape or a layout is not as above.
        RuntimeError: tensors on more than one device, or on a CPU without Triton's interpreter.
    """
    require(losses.dim() == 2, ValueError, f"losses must have the shape [steps, B], not {list(losses.shape)}")
    steps, size = losses.shape
    like = ("loss", loss)
    require_tensor("losses", losses, (loss.dtype,), (steps, size), like)
    require_tensor("loss", loss, (torch.float16, torch.bfloat16, torch.float32), (size,), like)
    require_tensor("correct", correct, (torch.bool,), (size,), like)
    require_tensor("answers", answers, (torch.bool,), (steps, size), like)
    require_tensor("schedule", schedule, (torch.float32,), (schedule.numel(),), like)
    require_tensor("rate", rate, (torch.float32,), (1,), like)
    for name, counter in (("done", done), ("position", position)):
        require_tensor(name, counter, (torch.int64,), (1,), like)
    record_op(loss, correct, losses, answers, schedule, rate, done, position)


def example_launches(batch_size: int, *, dtype: torch.dtype, steps: int = 97, epochs: int = 24) -> list[Launch]:
    """The launch of one call, on tensors without memory."""

    def empty(*shape: int, of: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    rows = [empty(*shape, of=of) for shape in ((batch_size,), (steps, batch_size)) for of in (dtype, torch.bool)]
    counters = [empty(1, of=torch.int64) for _ in range(2)]
    schedule, rate = empty(steps * epochs, of=torch.float32), empty(1, of=torch.float32)
    return plan_record(*rows, schedule, rate, *counters)

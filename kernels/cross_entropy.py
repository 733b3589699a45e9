"""The head of a training step as one operator: loss, answer and gradient of each image, in one launch.

    z = scale * x                          the logits
    loss = log(sum exp z) - (1 - s) z[label] - s mean z
    correct = whether the first largest z is the label's
    dx = scale * (softmax(z) - (1 - s) onehot(label) - s / K)

That is ``torch.nn.functional.cross_entropy(z, label, reduction="none", label_smoothing=s)`` of K classes, and the
gradient of the losses' sum: who has it starts ``backward`` at ``x``, and no kernel for the loss follows. Computed in
float32; every exponent is taken of z less the row's largest, as by torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, operator, require, require_tensor

ROWS = 16  # a program


def cross_entropy_reference(
    x: Tensor, labels: Tensor, *, label_smoothing: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = x * scale
        # float32 for bfloat16, as under autocast
        wide = logits.float() if x.dtype == torch.bfloat16 else logits
        loss = F.cross_entropy(wide, labels, reduction="none", label_smoothing=label_smoothing)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), logits.argmax(dim=1) == labels, gradient


@triton.jit
def cross_entropy_kernel(
    x,  # [B, K]
    labels,  # int64 [B]
    loss,  # [B]
    correct,  # uint8 [B]
    dx,  # [B, K]
    size,  # B
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,  # power of two >= K
    SMOOTHING: tl.constexpr,
    SCALE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_K)[None, :]
    label = tl.load(labels + row, mask=row < size, other=0)
    offset = row.to(tl.int64)[:, None] * K + column
    exists = (row < size)[:, None] & (column < K)
    # Rounded as torch rounds the product, for the same ties.
    z = (tl.load(x + offset, mask=exists, other=0.0).to(tl.float32) * SCALE).to(x.dtype.element_ty).to(tl.float32)
    z = tl.where(column < K, z, float("-inf"))
    largest = tl.max(z, axis=1)
    shifted = z - largest[:, None]
    power = tl.exp(shifted)
    total = tl.sum(power, axis=1)
    hit = column == label[:, None]
    at_label = tl.sum(tl.where(hit, shifted, 0.0), axis=1)
    mean = tl.sum(tl.where(column < K, shifted, 0.0), axis=1) / K
    value = tl.log(total) - (1.0 - SMOOTHING) * at_label - SMOOTHING * mean
    first = tl.min(tl.where(z == largest[:, None], column, BLOCK_K), axis=1)
    tl.store(loss + row, value.to(loss.dtype.element_ty), mask=row < size)
    tl.store(correct + row, (first == label).to(tl.uint8), mask=row < size)
    gradient = power / total[:, None] - tl.where(hit, 1.0 - SMOOTHING, 0.0) - SMOOTHING / K
    tl.store(dx + offset, (gradient * SCALE).to(dx.dtype.element_ty), mask=exists)


def cross_entropy_outputs(
    x: Tensor, labels: Tensor, label_smoothing: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, correct, dx."""
    loss = x.new_empty(len(x), dtype=torch.float32 if x.dtype == torch.bfloat16 else x.dtype)
    return loss, x.new_empty(len(x), dtype=torch.bool), torch.empty_like(x)


def plan_cross_entropy(x, labels, label_smoothing, scale, loss, correct, dx) -> list[Launch]:
    """The one launch."""
    size, classes = x.shape
    return [
        Launch(
            cross_entropy_kernel,
            grid=(triton.cdiv(size, ROWS),),
            reads=dict(x=x, labels=labels),
            writes=dict(loss=loss, correct=correct.view(torch.uint8), dx=dx),
            scalars=dict(size=size),
            constants=dict(K=classes, BLOCK_R=ROWS, BLOCK_K=triton.next_power_of_2(classes))
            | dict(SMOOTHING=label_smoothing, SCALE=scale),
        )
    ]


cross_entropy_op = operator("cross_entropy", cross_entropy_outputs, plan_cross_entropy)


def cross_entropy(
    x: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, answers and the gradient of the losses' sum with respect to ``x``; not differentiable itself.

    Args:
        x: contiguous ``[B, K]``, float16, bfloat16 or float32, at least one row; the logits are ``scale * x``.
        labels: int64 ``[B]``, 0 to K - 1. What they are is not checked: another one counts as no class.
        label_smoothing: the share of the target that is spread over all classes.
        scale: of the logits, rounded to x's type.

    Returns:
        The losses ``[B]`` in x's type (float32 for bfloat16), whether the first largest logit is the label's, bool
        ``[B]``, and the gradient ``[B, K]`` in x's type.

    Raises:
        TypeError, ValueError: a dtype, a shape or a layout is not as above.
        RuntimeError: tensors on more than one device, or on a CPU without Triton's interpreter.
    """
    require(x.dim() == 2 and x.numel() > 0, ValueError, f"x must have the shape [B, K], not {list(x.shape)}")
    require_tensor("x", x, (torch.float16, torch.bfloat16, torch.float32), tuple(x.shape), ("labels", labels))
    require_tensor("labels", labels, (torch.int64,), (len(x),), ("x", x))
    return cross_entropy_op(x.detach(), labels, float(label_smoothing), float(scale))


def example_launches(
    batch_size: int, classes: int, *, dtype: torch.dtype, label_smoothing: float, scale: float
) -> list[Launch]:
    """The launch of one call, on tensors without memory."""
    x = torch.empty(batch_size, classes, dtype=dtype, device="meta")
    inputs = x, torch.empty(batch_size, dtype=torch.int64, device="meta"), label_smoothing, scale
    return plan_cross_entropy(*inputs, *cross_entropy_outputs(*inputs))

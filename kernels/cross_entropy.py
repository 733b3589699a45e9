"""Cross entropy in one launch: the loss, the correctness and the gradient of each image.

    z = scale * x                          the logits
    loss = log(sum exp z) - (1 - s) z[label] - s mean z
    correct = (argmax(z) == label)         the first maximum, if there are several; a NaN counts as the largest
    dx = scale * (softmax(z) - (1 - s) onehot(label) - s / K)

The loss is ``torch.nn.functional.cross_entropy(z, label, reduction="none", label_smoothing=s)`` for K classes, and dx
is the gradient of the sum of the losses. A training step starts its backward pass at ``x`` with dx, so it needs no
kernel for the backward pass of the loss. Everything is computed in float32. The largest z of the row is subtracted
before each exponential, as torch does.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Launch, convert, operator, require, require_is_tensor, require_number, require_tensor
from .optional_triton import tl, triton

ROWS = 16  # rows per program


def cross_entropy_reference(
    x: Tensor, labels: Tensor, *, label_smoothing: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same values as :func:`cross_entropy`, computed in plain torch."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = x * scale
        # Autocast to bfloat16 also computes the loss in float32.
        inputs = logits.float() if x.dtype == torch.bfloat16 else logits
        loss = F.cross_entropy(inputs, labels, reduction="none", label_smoothing=label_smoothing)
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
    # Rounding the product as torch does gives the same ties.
    z = convert(tl.load(x + offset, mask=exists, other=0.0).to(tl.float32) * SCALE, x.dtype.element_ty).to(tl.float32)
    z = tl.where(column < K, z, float("-inf"))
    largest = tl.max(z, axis=1)
    shifted = z - largest[:, None]
    power = tl.exp(shifted)
    total = tl.sum(power, axis=1)
    hit = column == label[:, None]
    at_label = tl.sum(tl.where(hit, shifted, 0.0), axis=1)
    mean = tl.sum(tl.where(column < K, shifted, 0.0), axis=1) / K
    value = tl.log(total) - (1.0 - SMOOTHING) * at_label - SMOOTHING * mean
    # A NaN comes before every number, as in torch's argmax. No row lacks both a NaN and a largest number.
    rank = tl.where(z != z, column, tl.where(z == largest[:, None], BLOCK_K + column, 2 * BLOCK_K))
    first = tl.min(rank, axis=1) % BLOCK_K
    tl.store(loss + row, convert(value, loss.dtype.element_ty), mask=row < size)
    tl.store(correct + row, (first == label).to(tl.uint8), mask=row < size)
    gradient = power / total[:, None] - tl.where(hit, 1.0 - SMOOTHING, 0.0) - SMOOTHING / K
    tl.store(dx + offset, convert(gradient * SCALE, dx.dtype.element_ty), mask=exists)


def cross_entropy_outputs(
    x: Tensor, labels: Tensor, label_smoothing: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate loss, correct and dx."""
    loss = x.new_empty(len(x), dtype=torch.float32 if x.dtype == torch.bfloat16 else x.dtype)
    return loss, x.new_empty(len(x), dtype=torch.bool), torch.empty_like(x)


def plan_cross_entropy(x, labels, label_smoothing, scale, loss, correct, dx) -> list[Launch]:
    """Return the launch that fills ``loss``, ``correct`` and ``dx``."""
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


def cross_entropy_on_cpu(x, labels, label_smoothing, scale, loss, correct, dx) -> None:
    """Fill ``loss``, ``correct`` and ``dx`` in plain torch, which is fast enough for so few numbers."""
    z = x * scale
    log_probability = F.log_softmax(z.float(), dim=1)
    at_label = log_probability.gather(1, labels[:, None])[:, 0]
    loss.copy_(-(1 - label_smoothing) * at_label - label_smoothing * log_probability.mean(dim=1))
    torch.eq(z.argmax(dim=1), labels, out=correct)
    gradient = log_probability.exp() - label_smoothing / x.shape[1]
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(x), 1), label_smoothing - 1))
    dx.copy_(gradient * scale)


def check_labels(x, labels, label_smoothing, scale) -> None:
    """Raise an IndexError, as torch does, for a label that is not a class."""
    low, high = (int(value) for value in labels.aminmax())
    last = x.shape[1] - 1
    message = f"labels must be between 0 and {last}, but the smallest is {low} and the largest {high}"
    require(low >= 0 and high <= last, IndexError, message)


cross_entropy_op = operator(
    "cross_entropy", cross_entropy_outputs, plan_cross_entropy, cross_entropy_on_cpu, check_values=check_labels
)


def cross_entropy(
    x: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, correctness and gradient of each row. The results are not differentiable.

    Args:
        x: contiguous ``[B, K]`` in float16, bfloat16 or float32, at least one row. The logits are ``scale * x``.
        labels: int64 ``[B]``, 0 to K - 1. A GPU does not check the values; a value out of range matches no class.
        label_smoothing: fraction of the target distribution that is uniform over the classes, 0 to 1.
        scale: factor of the logits, finite. The product is rounded to the dtype of ``x``.

    Returns:
        loss: ``[B]`` in the dtype of ``x`` (float32 for bfloat16).
        correct: bool ``[B]``, whether the label is the index of the first largest logit, or of the first NaN.
        dx: ``[B, K]`` in the dtype of ``x``, the gradient of the sum of the losses with respect to ``x``.

    Raises:
        TypeError, ValueError: a dtype, shape or layout is not as above.
        RuntimeError: the tensors are on different devices.
        IndexError: a label is out of range, on a CPU.
    """
    require_is_tensor("x", x)
    require_is_tensor("labels", labels)
    require_number("label_smoothing", label_smoothing, float, 0, 1)
    require_number("scale", scale, float, -sys.float_info.max, sys.float_info.max)
    message = f"x must be a non-empty tensor of shape [B, K], but has the shape {list(x.shape)}"
    require(x.dim() == 2 and x.numel() > 0, ValueError, message)
    require_tensor("x", x, (torch.float16, torch.bfloat16, torch.float32), tuple(x.shape), ("labels", labels))
    require_tensor("labels", labels, (torch.int64,), (len(x),), ("x", x))
    return cross_entropy_op(x.detach(), labels, float(label_smoothing), float(scale))


def example_launches(
    batch_size: int, classes: int, *, dtype: torch.dtype, label_smoothing: float, scale: float
) -> list[Launch]:
    """Return the launch of one call, on meta tensors."""
    x = torch.empty(batch_size, classes, dtype=dtype, device="meta")
    inputs = x, torch.empty(batch_size, dtype=torch.int64, device="meta"), label_smoothing, scale
    return plan_cross_entropy(*inputs, *cross_entropy_outputs(*inputs))

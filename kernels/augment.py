"""Data augmentation of a batch in one launch: gather, reflection pad, crop, flip, normalize, cutout, cast, and labels.

Let S be the height and width of an image, P the padding, and K the side of the cutout. A crop has D offsets in each
direction: P + 1, or 2 P + 1 with ``both_sides``. The draws of image b are

    permutation[b]                       the index of the image
    crop[b] = x0 D + y0                  0 <= x0, y0 < D, the offset of the crop in the padded image
    flip[b]                              0 mirrors left to right, 1 does not
    cutout[b] = x1 (S - K + 1) + y1      the upper left corner of the cutout square

Pixel (y, x) of channel c is 0 if y1 <= y < y1 + K and x1 <= x < x1 + K, or if c >= C. Otherwise

    out[b, c, y, x] = table[c, images[permutation[b], r(y + y0 - P), r(x' + x0 - P), c]]

with x' = S - 1 - x if flip[b] is 0, else x. r is the reflection, which does not repeat the border: r(i) = |i|, and
2 S - 2 - i past the opposite border, which only a crop with ``both_sides`` reaches. The table holds the normalized
value of each of the 256 bytes. The kernel does no arithmetic on colors, so normalizing first and moving pixels
afterwards gives the same bits.

Bytes moved for a batch of B: the kernel writes B S^2 OUT_CHANNELS elements in 128-bit stores, and reads at most
B S^2 C bytes. Each read is a single byte, because three channels, padding and flip allow no wider loads. Neighboring
threads share cache lines, and the table stays in the L1 cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .launch import (
    Launch,
    empty_channels_last,
    operator,
    parameters,
    require,
    require_is_tensor,
    require_number,
    require_tensor,
    shown,
)
from .optional_triton import tl, triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 8


def normalization_table(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(byte - mean) / std``, ``[C, 256]``, in ``dtype``: float16, bfloat16 or float32.

    Each channel has its own mean and standard deviation over all ``images``, uint8 ``[N, S, S, C]``, with Bessel's
    correction (N S S - 1).

    Raises:
        TypeError, ValueError: a dtype or the shape is not as above, or a channel has the same value everywhere.
    """
    require_is_tensor("images", images)
    require(images.dtype == torch.uint8, TypeError, f"images must be uint8, not {images.dtype}")
    require(images.ndim == 4, ValueError, f"images must have the shape [N, S, S, C], not {list(images.shape)}")
    require(dtype in DTYPES, TypeError, f"dtype must be float16, bfloat16 or float32, not {dtype}")
    std, mean = torch.std_mean(images.float(), dim=(0, 1, 2), unbiased=True, keepdim=True)
    if not (std > 0).all():  # also true for NaN, the deviation of a single pixel
        raise ValueError("a channel of images has the same value everywhere; it cannot be normalized")
    value = torch.arange(256, dtype=torch.uint8, device=images.device).view(1, 1, 256, 1)
    return ((value - mean) / std).to(dtype).view(256, -1).T.contiguous()


def crop_offsets(padding: int, both_sides: bool) -> int:
    """Return the number of offsets of a crop in each direction."""
    return (2 * padding if both_sides else padding) + 1


def reflect(index: Tensor, size: int) -> Tensor:
    """Reflect indices outside 0 to ``size - 1``: -1 becomes 1, ``size`` becomes ``size - 2``."""
    return size - 1 - (size - 1 - index.abs()).abs()


def augment_reference(
    images: Tensor,
    draws: Tensor,
    table: Tensor,
    *,
    out_channels: int,
    padding: int,
    cutout_size: int,
    both_sides: bool = False,
) -> Tensor:
    """Return the batch, computed in plain torch. See :func:`augment` without ``step`` for the arguments."""
    size, channels = images.shape[2:]
    corners, offsets = size + 1 - cutout_size, crop_offsets(padding, both_sides)
    pixel = torch.arange(size, device=images.device)
    x, y = pixel[None, None, :], pixel[None, :, None]
    permutation, crop, flip, cutout = (row[:, None, None] for row in draws)
    column = reflect(torch.where(flip == 0, size - 1 - x, x) + crop // offsets - padding, size)
    row = reflect(y + crop % offsets - padding, size)
    batch = table[torch.arange(channels, device=images.device), images[permutation, row, column].int()]
    from_left, from_top = x - cutout // corners, y - cutout % corners
    square = (from_left >= 0) & (from_left < cutout_size) & (from_top >= 0) & (from_top < cutout_size)
    batch = F.pad(batch.masked_fill(square[..., None], 0), (0, out_channels - channels))
    return batch.permute(0, 3, 1, 2)


@triton.jit
def augment_kernel(
    images,  # uint8 [N, S, S, C]
    draws,  # int64 [4, n]: permutation, crop, flip, cutout; n is B, or the images of an epoch if there is a step
    table,  # [C, 256], in the dtype of out
    labels,  # int64 [N], or None
    step,  # int64 [1], or None
    out,  # [B, S, S, OUT_CHANNELS]
    out_labels,  # int64 [B], or None
    row_stride,  # of draws, in elements
    S: tl.constexpr,
    C: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    PADDING: tl.constexpr,
    CUTOUT: tl.constexpr,
    BOTH_SIDES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    length: tl.constexpr = S * S * OUT_CHANNELS  # elements of an image in out
    corners: tl.constexpr = S + 1 - CUTOUT
    offsets: tl.constexpr = (2 * PADDING if BOTH_SIDES else PADDING) + 1

    b = tl.program_id(0).to(tl.int64)
    position = b
    if step is not None:
        position += tl.load(step) * tl.num_programs(0)
    index = tl.load(draws + position)
    if labels is not None:
        tl.store(out_labels + b, tl.load(labels + index), mask=tl.program_id(1) == 0)
    crop = tl.load(draws + row_stride + position).to(tl.int32)
    mirror = tl.load(draws + 2 * row_stride + position) == 0
    corner = tl.load(draws + 3 * row_stride + position).to(tl.int32)

    # Offsets inside an image fit in 32 bits, but the offset of an image may not.
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, pixel = offset % OUT_CHANNELS, offset // OUT_CHANNELS
    y, x = pixel // S, pixel % S
    from_top, from_left = y - corner % corners, x - corner // corners
    in_cutout = (from_top >= 0) & (from_top < CUTOUT) & (from_left >= 0) & (from_left < CUTOUT)
    visible = (channel < C) & (in_cutout == 0)
    if length % BLOCK != 0:
        visible = visible & (offset < length)

    row = tl.abs(y + crop % offsets - PADDING)
    column = tl.abs(tl.where(mirror, S - 1 - x, x) + crop // offsets - PADDING)
    if BOTH_SIDES:
        row, column = S - 1 - tl.abs(S - 1 - row), S - 1 - tl.abs(S - 1 - column)
    byte = tl.load(images + index * (S * S * C) + ((row * S + column) * C + channel), mask=visible, other=0)
    value = tl.load(table + (channel * 256 + byte.to(tl.int32)), mask=visible, other=0.0)
    if length % BLOCK == 0:
        tl.store(out + b * length + offset, value)
    else:
        tl.store(out + b * length + offset, value, mask=offset < length)


def augment_outputs(
    images: Tensor,
    draws: Tensor,
    table: Tensor,
    labels: Tensor | None,
    step: Tensor | None,
    batch_size: int,
    out_channels: int,
    padding: int,
    cutout_size: int,
    both_sides: bool,
) -> tuple[Tensor, Tensor]:
    """Allocate the batch ``[B, out_channels, S, S]`` in channels_last, and its labels (``[0]`` without ``labels``)."""
    size = images.shape[1]
    out = empty_channels_last(batch_size, out_channels, size, size, table.dtype, images.device)
    out_labels = torch.empty(0 if labels is None else batch_size, dtype=torch.int64, device=images.device)
    return out, out_labels


def plan_augment(
    images, draws, table, labels, step, batch_size, out_channels, padding, cutout_size, both_sides, out, out_labels
) -> list[Launch]:
    """Return the launch that fills ``out`` and ``out_labels``."""
    size, channels = images.shape[2:]
    entry = parameters("augment", "*")
    block = entry["block"]
    sizes = dict(S=size, C=channels, OUT_CHANNELS=out_channels, PADDING=padding, CUTOUT=cutout_size)
    sizes["BOTH_SIDES"] = both_sides
    return [
        Launch(
            augment_kernel,
            grid=(batch_size, triton.cdiv(size * size * out_channels, block)),
            reads=dict(images=images, draws=draws, table=table, labels=labels, step=step),
            writes=dict(out=out, out_labels=out_labels if labels is not None else None),
            scalars=dict(row_stride=draws.stride(0)),
            constants=sizes | dict(BLOCK=block),
            num_warps=entry["num_warps"],
            accessed=dict(images=batch_size * size * size * channels, draws=4 * batch_size, labels=batch_size),
        )
    ]


def augment_on_cpu(
    images, draws, table, labels, step, batch_size, out_channels, padding, cutout_size, both_sides, out, out_labels
) -> None:
    """Fill ``out`` and ``out_labels`` by compiled C++, or by plain torch if no compiler works."""
    start, (size, channels) = _first_column(step, batch_size), images.shape[2:]
    draws = draws[:, start : start + batch_size]
    if cpu.unavailable_reason(table.dtype):
        options = dict(padding=padding, cutout_size=cutout_size, both_sides=both_sides)
        out.copy_(augment_reference(images, draws, table, out_channels=out_channels, **options))
    else:
        sizes = batch_size, draws.stride(0), size, channels, out_channels, padding, cutout_size
        offsets = crop_offsets(padding, both_sides)
        cpu.call("augment", table.dtype, images, draws, table, out, *sizes, offsets, torch.get_num_threads())
    if labels is not None:
        torch.index_select(labels, 0, draws[0], out=out_labels)


def _first_column(step, batch_size: int) -> int:
    """Return the first column of ``draws`` that a batch uses, on a CPU."""
    return 0 if step is None else int(step) * batch_size


def check_draws(images, draws, table, labels, step, batch_size, out_channels, padding, cutout_size, both_sides) -> None:
    """Raise an IndexError for a step or a draw that is out of range."""
    start, columns = _first_column(step, batch_size), draws.shape[1]
    message = f"step {start // batch_size} of {batch_size} images is outside the {columns} columns of draws"
    require(0 <= start <= columns - batch_size, IndexError, message)
    batch = draws[:, start : start + batch_size]
    corners = images.shape[1] + 1 - cutout_size
    ends = torch.tensor([[len(images)], [crop_offsets(padding, both_sides) ** 2], [2], [corners**2]])
    wrong = ((batch < 0) | (batch >= ends)).any(dim=0)
    if wrong.any():
        raise IndexError(f"column {start + int(wrong.int().argmax())} of draws is out of range")


augment_op = operator("augment", augment_outputs, plan_augment, augment_on_cpu, check_values=check_draws)


def augment(
    images: Tensor,
    draws: Tensor,
    table: Tensor,
    *,
    labels: Tensor | None = None,
    step: Tensor | None = None,
    batch_size: int | None = None,
    out_channels: int | None = None,
    padding: int,
    cutout_size: int,
    both_sides: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return an augmented batch and its labels, made from the bytes of a data set on the device.

    All tensors must be contiguous and on one device; only the rows of ``draws`` may lie apart. A GPU does not check the
    values in ``draws`` and ``step``: a value out of range reads memory outside the tensors.

    Args:
        images: the images of the data set, uint8 ``[N, S, S, C]``.
        draws: int64 ``[4, B]``, one column per image of the batch. The rows are permutation, crop, flip and cutout, as
            the docstring of the module defines them.
        table: the output value of each byte, ``[C, 256]`` in float16, bfloat16 or float32; see
            :func:`normalization_table`.
        labels: the labels of the data set, int64 ``[N]``.
        step: int64, one element. If given, ``draws`` ``[4, n]`` are the draws of a whole epoch. The batch uses the
            columns ``step * batch_size`` to ``(step + 1) * batch_size``. The kernel reads ``step`` from the device, so
            replays of a CUDA graph can go through an epoch.
        batch_size: B. Required if ``step`` is given, not allowed otherwise.
        out_channels: C to 8, default C. Channels from C on are 0.
        padding: pixels of reflection padding on each side, 0 to S - 1.
        cutout_size: side of the square set to 0, in pixels, 0 to S.
        both_sides: whether crops also reach the lower and right border of the padded image.

    Returns:
        The batch, ``[B, out_channels, S, S]`` in channels_last and in the dtype of ``table``, and its labels, int64
        ``[B]``, or None without ``labels``.

    Raises:
        TypeError, ValueError: a dtype, shape or layout is not as above.
        RuntimeError: the tensors are on different devices.
        IndexError: a value in ``draws`` or ``step`` is out of range, on a CPU.
    """
    require_is_tensor("images", images)
    require_is_tensor("draws", draws)
    square = images.ndim == 4 and images.shape[1] == images.shape[2]
    message = f"images must be a non-empty tensor of shape [N, S, S, C], but has the shape {list(images.shape)}"
    require(square and images.numel() > 0, ValueError, message)
    n, size, _, channels = images.shape
    require(channels <= MAX_CHANNELS, ValueError, f"images must have at most {MAX_CHANNELS} channels, not {channels}")
    out_channels = channels if out_channels is None else out_channels
    for name, value, low, high in (
        ("out_channels", out_channels, channels, MAX_CHANNELS),
        ("padding", padding, 0, size - 1),
        ("cutout_size", cutout_size, 0, size),
    ):
        require_number(name, value, int, low, high)

    has_columns = draws.ndim == 2 and draws.shape[0] == 4 and draws.shape[1] > 0
    require(has_columns, ValueError, f"draws must have the shape [4, n] with n > 0, not {list(draws.shape)}")
    message = f"each row of draws must be contiguous, but draws has the strides {draws.stride()}"
    require(draws.stride(1) == 1, ValueError, message)
    columns = draws.shape[1]
    require((step is None) == (batch_size is None), ValueError, "step and batch_size must be given together")
    if batch_size is None:
        batch_size = columns
    require(isinstance(batch_size, int), TypeError, f"batch_size must be an int, not {shown(batch_size)}")
    message = f"batch_size must be between 1 and {columns}, the number of columns of draws, not {batch_size}"
    require(1 <= batch_size <= columns, ValueError, message)

    like = ("images", images)
    require_tensor("images", images, (torch.uint8,), tuple(images.shape), like)
    require_tensor("each row of draws", draws[0], (torch.int64,), (columns,), like)
    require_tensor("table", table, DTYPES, (channels, 256), like)
    if labels is not None:
        require_tensor("labels", labels, (torch.int64,), (n,), like)
    if step is not None:
        require_is_tensor("step", step)
        require_tensor("step", step, (torch.int64,), tuple(step.shape) if step.numel() == 1 else (1,), like)
    require(isinstance(both_sides, bool), TypeError, f"both_sides must be a bool, not {shown(both_sides)}")
    settings = batch_size, out_channels, padding, cutout_size, both_sides
    out, out_labels = augment_op(images, draws, table, labels, step, *settings)
    return out, out_labels if labels is not None else None


def example_launches(
    *,
    n: int,
    batch_size: int,
    size: int,
    out_channels: int,
    padding: int,
    cutout_size: int,
    both_sides: bool,
    dtype: torch.dtype,
) -> list[Launch]:
    """Return the launch for one batch of ``n`` three-channel images, with labels and a step, on meta tensors."""

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    images, table = meta(n, size, size, 3, dtype=torch.uint8), meta(3, 256, dtype=dtype)
    draws, labels, step = meta(4, n), meta(n), meta(1)
    inputs = images, draws, table, labels, step, batch_size, out_channels, padding, cutout_size, both_sides
    return plan_augment(*inputs, *augment_outputs(*inputs))

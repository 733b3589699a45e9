"""A batch in one launch: gather, reflection-padded crop, mirror, normalisation, cutout, cast, and labels.

With S the images' height and width, P the padding, K the cutout's side, and for image b of the batch its draws

    permutation[b]                       the image
    crop[b] = x0 (P + 1) + y0            0 <= x0, y0 <= P, the window's offset in the padded image
    flip[b]                              0 mirrors left to right, 1 does not
    cutout[b] = x1 (S - K + 1) + y1      the upper left corner of the square

pixel (y, x) of channel c is 0 where y1 <= y < y1 + K and x1 <= x < x1 + K, and where c >= C; elsewhere

    out[b, c, y, x] = table[c, images[permutation[b], |y + y0 - P|, |x' + x0 - P|, c]]

with x' = S - 1 - x where flip[b] is 0, else x. The absolute value is the reflection, which does not
repeat the border; the window never reaches past the far side. The table holds the normalised value of
each of the 256 bytes, so no arithmetic is done on a color, and the result has the bits of
normalising first and moving pixels afterwards.

Bytes moved for a batch of B: B S^2 OUT_CHANNELS times the type's size written, in 128-bit stores, and
at most B S^2 C read. The reads are of single bytes: three channels, padding and mirror leave a thread
nothing wider, but neighbours share their cache lines. The table stays in the L1 cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, empty_channels_last, operator, parameters, require, require_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 8


def normalization_table(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Each byte's normalized value ``[C, 256]`` in ``dtype``: less the mean, over the standard deviation.

    Both are those of ``images``, uint8 ``[N, S, S, C]``, per channel, the deviation with N S S - 1.
    """
    require(images.dtype == torch.uint8, TypeError, f"images must be uint8, not {images.dtype}")
    require(images.ndim == 4, ValueError, f"images must have the shape [N, S, S, C], not {list(images.shape)}")
    require(dtype in DTYPES, TypeError, f"dtype must be float16, bfloat16 or float32, not {dtype}")
    std, mean = torch.std_mean(images.float(), dim=(0, 1, 2), unbiased=True, keepdim=True)
    if not (std > 0).all():  # NaN, which a single pixel has, among them
        raise ValueError("a channel of images has the same value everywhere; it cannot be normalized")
    value = torch.arange(256, dtype=torch.uint8, device=images.device).view(1, 1, 256, 1)
    return ((value - mean) / std).to(dtype).view(256, -1).T.contiguous()


def augment_reference(
    images: Tensor, draws: Tensor, table: Tensor, *, out_channels: int, padding: int, cutout_size: int
) -> Tensor:
    """The batch in plain torch; arguments as for :func:`augment` without a step."""
    size, channels = images.shape[2:]
    corners = size + 1 - cutout_size
    pixel = torch.arange(size, device=images.device)
    x, y = pixel[None, None, :], pixel[None, :, None]
    permutation, crop, flip, cutout = (row[:, None, None] for row in draws)
    column = (torch.where(flip == 0, size - 1 - x, x) + crop // (padding + 1) - padding).abs()
    row = (y + crop % (padding + 1) - padding).abs()
    batch = table[torch.arange(channels, device=images.device), images[permutation, row, column].int()]
    from_left, from_top = x - cutout // corners, y - cutout % corners
    square = (from_left >= 0) & (from_left < cutout_size) & (from_top >= 0) & (from_top < cutout_size)
    batch = F.pad(batch.masked_fill(square[..., None], 0), (0, out_channels - channels))
    return batch.permute(0, 3, 1, 2)


@triton.jit
def augment_kernel(
    images,  # uint8 [N, S, S, C]
    draws,  # int64 [4, n]: permutation, crop, flip, cutout; n is B, or with a step an epoch's images
    table,  # [C, 256], of the type of out
    labels,  # int64 [N], or None
    step,  # int64 [1], or None
    out,  # [B, S, S, OUT_CHANNELS]
    out_labels,  # int64 [B], where there are labels
    row_stride,  # of draws, in elements
    S: tl.constexpr,
    C: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    PADDING: tl.constexpr,
    CUTOUT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    length: tl.constexpr = S * S * OUT_CHANNELS  # of an image in out
    corners: tl.constexpr = S + 1 - CUTOUT

    b = tl.program_id(0).to(tl.int64)
    position = b
    if step is not None:
        position += tl.load(step) * tl.num_programs(0)
    index = tl.load(draws + position)
    if labels is not None:
        tl.store(out_labels + b, tl.load(labels + index), mask=tl.program_id(1) == 0)
    window = tl.load(draws + row_stride + position).to(tl.int32)
    mirror = tl.load(draws + 2 * row_stride + position) == 0
    corner = tl.load(draws + 3 * row_stride + position).to(tl.int32)

    # Offsets inside an image fit 32 bits; where images start does not.
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, pixel = offset % OUT_CHANNELS, offset // OUT_CHANNELS
    y, x = pixel // S, pixel % S
    from_top, from_left = y - corner % corners, x - corner // corners
    square = (from_top >= 0) & (from_top < CUTOUT) & (from_left >= 0) & (from_left < CUTOUT)
    shown = (channel < C) & (square == 0)
    if length % BLOCK != 0:
        shown = shown & (offset < length)

    row = tl.abs(y + window % (PADDING + 1) - PADDING)
    column = tl.abs(tl.where(mirror, S - 1 - x, x) + window // (PADDING + 1) - PADDING)
    byte = tl.load(images + index * (S * S * C) + ((row * S + column) * C + channel), mask=shown, other=0)
    value = tl.load(table + (channel * 256 + byte.to(tl.int32)), mask=shown, other=0.0)
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
) -> tuple[Tensor, Tensor]:
    """The batch ``[B, out_channels, S, S]`` in channels_last; its labels int64 ``[B]``, ``[0]`` without ``labels``."""
    size = images.shape[1]
    out = empty_channels_last(batch_size, out_channels, size, size, table.dtype, images.device)
    out_labels = torch.empty(0 if labels is None else batch_size, dtype=torch.int64, device=images.device)
    return out, out_labels


def plan_augment(
    images, draws, table, labels, step, batch_size, out_channels, padding, cutout_size, out, out_labels
) -> list[Launch]:
    """The one launch that fills ``out`` and ``out_labels``."""
    size, channels = images.shape[2:]
    chosen = parameters("augment", "*")
    block = chosen["block"]
    sizes = dict(S=size, C=channels, OUT_CHANNELS=out_channels, PADDING=padding, CUTOUT=cutout_size)
    return [
        Launch(
            augment_kernel,
            grid=(batch_size, triton.cdiv(size * size * out_channels, block)),
            reads=dict(images=images, draws=draws, table=table, labels=labels, step=step),
            writes=dict(out=out, out_labels=out_labels if labels is not None else None),
            scalars=dict(row_stride=draws.stride(0)),
            constants=sizes | dict(BLOCK=block),
            num_warps=chosen["num_warps"],
            touched=dict(images=batch_size * size * size * channels, draws=4 * batch_size, labels=batch_size),
        )
    ]


augment_op = operator("augment", augment_outputs, plan_augment)


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
) -> tuple[Tensor, Tensor | None]:
    """An augmented batch and its labels, straight from the bytes of the data set.

    All tensors are contiguous, rows of ``draws`` excepted, and on one device. What the elements of ``draws`` and
    ``step`` are is not checked: out of range, they read memory that is not theirs.

    Args:
        images: the data set's images, uint8 ``[N, S, S, C]``.
        draws: int64 ``[4, B]``, a column per image: ``permutation``, which image; ``crop``,
            ``x0 * (padding + 1) + y0``, the window's offset in the padded image; ``flip``, 0 mirrors left to right,
            after the crop, 1 does not; ``cutout``, ``x0 * (S - cutout_size + 1) + y0``, the square's upper left corner.
        table: the value that stands for each byte, ``[C, 256]`` in float16, bfloat16 or float32; see
            :func:`normalization_table`.
        labels: the data set's labels, int64 ``[N]``.
        step: int64, one element. ``draws`` are then a whole epoch's, ``[4, n]``, and the batch is that of positions
            ``step * batch_size`` to ``(step + 1) * batch_size``. The kernel reads it, so that the replays of a CUDA
            graph can walk through an epoch.
        batch_size: B, given with ``step`` and only then.
        out_channels: C to 8, by default C; channels from C on are 0.
        padding: of the reflection, in pixels, 0 to S - 1.
        cutout_size: side of the square set to 0, in pixels, 0 to S.

    Returns:
        ``[B, out_channels, S, S]`` of the table's dtype in channels_last, and int64 ``[B]``, None without ``labels``.

    Raises:
        TypeError, ValueError: a dtype or a shape is not as above.
        RuntimeError: tensors on more than one device, or on a CPU without Triton's interpreter.
    """
    square = images.ndim == 4 and images.shape[1] == images.shape[2]
    shapes = f"images must have the shape [N, S, S, C], none of them 0, not {list(images.shape)}"
    require(square and images.numel() > 0, ValueError, shapes)
    n, size, _, channels = images.shape
    require(channels <= MAX_CHANNELS, ValueError, f"images must have at most {MAX_CHANNELS} channels, not {channels}")
    out_channels = channels if out_channels is None else out_channels
    for name, value, low, high in (
        ("out_channels", out_channels, channels, MAX_CHANNELS),
        ("padding", padding, 0, size - 1),
        ("cutout_size", cutout_size, 0, size),
    ):
        require(isinstance(value, int), TypeError, f"{name} must be an int, not {value!r}")
        require(low <= value <= high, ValueError, f"{name} must lie in {low} to {high}, not {value}")

    drawn = draws.ndim == 2 and draws.shape[0] == 4 and draws.shape[1] > 0
    require(drawn, ValueError, f"draws must have the shape [4, n], n at least 1, not {list(draws.shape)}")
    positions = draws.shape[1]
    require(draws.stride(1) == 1, ValueError, f"each row of draws must be contiguous, not of strides {draws.stride()}")
    require((step is None) == (batch_size is None), ValueError, "step and batch_size must be given together")
    if batch_size is None:
        batch_size = positions
    require(isinstance(batch_size, int), TypeError, f"batch_size must be an int, not {batch_size!r}")
    columns = f"batch_size must lie in 1 to {positions}, the columns of draws, not {batch_size}"
    require(1 <= batch_size <= positions, ValueError, columns)

    like = ("images", images)
    require_tensor("images", images, (torch.uint8,), tuple(images.shape), like)
    require_tensor("each row of draws", draws[0], (torch.int64,), (positions,), like)
    require_tensor("table", table, DTYPES, (channels, 256), like)
    if labels is not None:
        require_tensor("labels", labels, (torch.int64,), (n,), like)
    if step is not None:
        require_tensor("step", step, (torch.int64,), tuple(step.shape) if step.numel() == 1 else (1,), like)
    out, out_labels = augment_op(images, draws, table, labels, step, batch_size, out_channels, padding, cutout_size)
    return out, out_labels if labels is not None else None


def example_launches(
    *, n: int, batch_size: int, size: int, out_channels: int, padding: int, cutout_size: int, dtype: torch.dtype
) -> list[Launch]:
    """The launch of one batch out of ``n`` images of three channels, by a step counter, on tensors without memory."""

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    images, table = meta(n, size, size, 3, dtype=torch.uint8), meta(3, 256, dtype=dtype)
    inputs = images, meta(4, n), table, meta(n), meta(1), batch_size, out_channels, padding, cutout_size
    return plan_augment(*inputs, *augment_outputs(*inputs))

"""A batch in one launch: gather, reflection-padded crop, mirror, normalisation, cutout, cast, and labels.

With S the pictures' height and width, P the padding, K the cutout's side, and for picture b of the batch

    crop[b] = x0 (P + 1) + y0            0 <= x0, y0 <= P, the window's offset in the padded picture
    cutout[b] = x1 (S - K + 1) + y1      the upper left corner of the square

pixel (y, x) of channel c is 0 where y1 <= y < y1 + K and x1 <= x < x1 + K, and where c >= C; elsewhere

    out[b, c, y, x] = table[c, images[indices[b], |y + y0 - P|, |x' + x0 - P|, c]]

with x' = S - 1 - x where flip[b] is 0, else x. The absolute value is the reflection, which does not
repeat the border; the window never reaches past the far side. The table holds the normalised value of
each of the 256 bytes, so no arithmetic is done on a colour, and the result has the bits of
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

from kernels.launch import Launch, check_device, parameters, run

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 8


def normalization_table(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each byte's normalised value ``[C, 256]`` in ``dtype``: less the mean, over the standard deviation.

    Both are those of ``images``, uint8 ``[N, S, S, C]``, a channel each, the deviation with N S S - 1.
    """
    _need(images.dtype == torch.uint8, TypeError, f"images must be uint8, not {images.dtype}")
    _need(images.ndim == 4, ValueError, f"images must have the shape [N, S, S, C], not {list(images.shape)}")
    _need(dtype in DTYPES, TypeError, f"dtype must be float16, bfloat16 or float32, not {dtype}")
    std, mean = torch.std_mean(images.float(), dim=(0, 1, 2), unbiased=True, keepdim=True)
    if not (std > 0).all():  # NaN, which a single pixel has, among them
        raise ValueError("a channel of images has the same value everywhere; it cannot be normalised")
    value = torch.arange(256, dtype=torch.uint8, device=images.device).view(1, 1, 256, 1)
    return ((value - mean) / std).to(dtype).view(256, -1).T.contiguous()


def augment_reference(
    images: torch.Tensor,
    indices: torch.Tensor,
    crop: torch.Tensor,
    flip: torch.Tensor,
    cutout: torch.Tensor,
    table: torch.Tensor,
    *,
    out_channels: int = 3,
    padding: int = 4,
    cutout_size: int = 8,
) -> torch.Tensor:
    """The batch in plain torch; arguments as for :func:`augment`."""
    size, channels = images.shape[2:]
    corners = size + 1 - cutout_size
    x, y = torch.arange(size, device=images.device)[None, None, :], torch.arange(size, device=images.device)[None, :, None]
    crop, flip, cutout = (options[:, None, None] for options in (crop, flip, cutout))
    column = (torch.where(flip == 0, size - 1 - x, x) + crop // (padding + 1) - padding).abs()
    row = (y + crop % (padding + 1) - padding).abs()
    batch = table[torch.arange(channels, device=images.device), images[indices[:, None, None], row, column].int()]
    from_left, from_top = x - cutout // corners, y - cutout % corners
    square = (from_left >= 0) & (from_left < cutout_size) & (from_top >= 0) & (from_top < cutout_size)
    return F.pad(batch.masked_fill(square[..., None], 0), (0, out_channels - channels)).permute(0, 3, 1, 2)


@triton.jit
def augment_kernel(
    images,  # uint8 [N, S, S, C]
    indices,  # int64 [n]; n is B, or with a step an epoch's pictures
    crop,  # int64 [n]
    flip,  # int64 [n]
    cutout,  # int64 [n]
    table,  # [C, 256], of the type of out
    labels,  # int64 [N], or None
    step,  # int64 [1], or None
    out,  # [B, S, S, OUT_CHANNELS]
    out_labels,  # int64 [B], where there are labels
    S: tl.constexpr,
    C: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    PADDING: tl.constexpr,
    CUTOUT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    length: tl.constexpr = S * S * OUT_CHANNELS  # of a picture in out
    corners: tl.constexpr = S + 1 - CUTOUT

    b = tl.program_id(0).to(tl.int64)
    position = b
    if step is not None:
        position += tl.load(step) * tl.num_programs(0)
    index = tl.load(indices + position)
    if labels is not None:
        tl.store(out_labels + b, tl.load(labels + index), mask=tl.program_id(1) == 0)
    window = tl.load(crop + position).to(tl.int32)
    mirror = tl.load(flip + position) == 0
    corner = tl.load(cutout + position).to(tl.int32)

    # Offsets inside a picture fit 32 bits; where pictures start does not.
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


def plan_augment(
    images: torch.Tensor,
    indices: torch.Tensor,
    crop: torch.Tensor,
    flip: torch.Tensor,
    cutout: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    out_labels: torch.Tensor | None = None,
    padding: int = 4,
    cutout_size: int = 8,
) -> list[Launch]:
    """The one launch that fills ``out``, contiguous ``[B, S, S, out_channels]``, and ``out_labels`` ``[B]``."""
    batch_size, size, _, out_channels = out.shape
    chosen = parameters("augment", "*")
    constants = dict(S=size, C=images.shape[3], OUT_CHANNELS=out_channels, PADDING=padding, CUTOUT=cutout_size, BLOCK=chosen["block"])
    arguments = dict(images=images, indices=indices, crop=crop, flip=flip, cutout=cutout, table=table)
    arguments |= dict(labels=labels, step=step, out=out, out_labels=out_labels)
    blocks = triton.cdiv(size * size * out_channels, chosen["block"])
    return [Launch(augment_kernel, (batch_size, blocks), arguments, constants, chosen["num_warps"])]


@torch.library.custom_op("cifar_fast::augment", mutates_args=("out", "out_labels"), tags=(torch.Tag.needs_exact_strides,))
def _augment(
    images: torch.Tensor,
    indices: torch.Tensor,
    crop: torch.Tensor,
    flip: torch.Tensor,
    cutout: torch.Tensor,
    table: torch.Tensor,
    labels: torch.Tensor | None,
    step: torch.Tensor | None,
    out: torch.Tensor,
    out_labels: torch.Tensor | None,
    padding: int,
    cutout_size: int,
) -> None:
    check_device(images.device)
    options = dict(labels=labels, step=step, out_labels=out_labels, padding=padding, cutout_size=cutout_size)
    run(plan_augment(images, indices, crop, flip, cutout, table, out, **options), images.device)


@_augment.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None


def augment(
    images: torch.Tensor,
    indices: torch.Tensor,
    crop: torch.Tensor,
    flip: torch.Tensor,
    cutout: torch.Tensor,
    table: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    batch_size: int | None = None,
    out: torch.Tensor | None = None,
    out_labels: torch.Tensor | None = None,
    out_channels: int = 3,
    padding: int = 4,
    cutout_size: int = 8,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An augmented batch and its labels, straight from the bytes of the data set.

    All tensors are contiguous and on one device. What the elements of ``indices``, ``crop``, ``flip``,
    ``cutout`` and ``step`` are is not checked: out of range, they read memory that is not theirs.

    Args:
        images: the data set's pictures, uint8 ``[N, S, S, C]``.
        indices: which picture, int64 ``[B]``.
        crop: ``x0 * (padding + 1) + y0``, the window's offset in the padded picture, int64 ``[B]``.
        flip: 0 mirrors left to right, after the crop; 1 does not; int64 ``[B]``.
        cutout: ``x0 * (S - cutout_size + 1) + y0``, the square's upper left corner, int64 ``[B]``.
        table: the value that stands for each byte, ``[C, 256]`` in float16, bfloat16 or float32; see
            :func:`normalization_table`.
        labels: the data set's labels, int64 ``[N]``.
        step: int64, one element. The four choices are then a whole epoch's, ``[n]``, and the batch is that
            of positions ``step * batch_size`` to ``(step + 1) * batch_size``. The kernel reads it, so
            that the replays of a CUDA graph can walk through an epoch.
        batch_size: B, given with ``step`` and only then.
        out, out_labels: where to write, of the shapes, dtypes and layout returned; allocated where None.
        out_channels: C to 8; channels from C on are 0.
        padding: of the reflection, in pixels, 0 to S - 1.
        cutout_size: side of the square set to 0, in pixels, 0 to S.

    Returns:
        ``[B, out_channels, S, S]`` of the table's dtype, NHWC in memory, and int64 ``[B]``, or None
        without ``labels``.

    Raises:
        TypeError, ValueError: a dtype or a shape is not as above.
        RuntimeError: tensors on more than one device, or on a CPU without Triton's interpreter.
    """
    _need(images.dtype == torch.uint8, TypeError, f"images must be uint8, not {images.dtype}")
    _need(table.dtype in DTYPES, TypeError, f"table must be float16, bfloat16 or float32, not {table.dtype}")
    square = images.ndim == 4 and images.shape[1] == images.shape[2]
    _need(square and images.numel() > 0, ValueError, f"images must have the shape [N, S, S, C], none of them 0, not {list(images.shape)}")
    n, size, _, channels = images.shape
    _need(channels <= MAX_CHANNELS, ValueError, f"images must have at most {MAX_CHANNELS} channels, not {channels}")

    for name, value, low, high in (
        ("out_channels", out_channels, channels, MAX_CHANNELS),
        ("padding", padding, 0, size - 1),
        ("cutout_size", cutout_size, 0, size),
    ):
        _need(isinstance(value, int), TypeError, f"{name} must be an int, not {value!r}")
        _need(low <= value <= high, ValueError, f"{name} must lie in {low} to {high}, not {value}")

    positions = indices.numel()
    _need((step is None) == (batch_size is None), ValueError, "step and batch_size must be given together")
    if batch_size is None:
        batch_size = positions
    _need(isinstance(batch_size, int), TypeError, f"batch_size must be an int, not {batch_size!r}")
    _need(positions > 0, ValueError, "indices must not be empty")
    _need(1 <= batch_size <= positions, ValueError, f"batch_size must lie in 1 to {positions}, the length of indices, not {batch_size}")
    _need(out_labels is None or labels is not None, ValueError, "out_labels needs labels")

    if out is None:
        out = torch.empty(batch_size, size, size, out_channels, dtype=table.dtype, device=images.device).permute(0, 3, 1, 2)
    if out_labels is None and labels is not None:
        out_labels = torch.empty(batch_size, dtype=torch.int64, device=images.device)
    shape = (batch_size, out_channels, size, size)
    _need(tuple(out.shape) == shape, ValueError, f"out must have the shape {list(shape)}, not {list(out.shape)}")
    nhwc = out.permute(0, 2, 3, 1)
    _need(nhwc.is_contiguous(), ValueError, f"out must be NHWC in memory (channels_last), not of strides {out.stride()}")

    for name, tensor, dtype, shape in (
        ("images", images, torch.uint8, images.shape),
        ("indices", indices, torch.int64, (positions,)),
        ("crop", crop, torch.int64, (positions,)),
        ("flip", flip, torch.int64, (positions,)),
        ("cutout", cutout, torch.int64, (positions,)),
        ("table", table, table.dtype, (channels, 256)),
        ("labels", labels, torch.int64, (n,)),
        ("step", step, torch.int64, step.shape if step is not None and step.numel() == 1 else (1,)),
        ("out", nhwc, table.dtype, nhwc.shape),
        ("out_labels", out_labels, torch.int64, (batch_size,)),
    ):
        if tensor is not None:
            _need(tensor.dtype == dtype, TypeError, f"{name} must be {dtype}, not {tensor.dtype}")
            _need(tuple(tensor.shape) == tuple(shape), ValueError, f"{name} must have the shape {list(shape)}, not {list(tensor.shape)}")
            _need(tensor.is_contiguous(), ValueError, f"{name} must be contiguous, not of strides {tensor.stride()}")
            _need(tensor.device == images.device, RuntimeError, f"{name} must be on {images.device}, as images are, not on {tensor.device}")

    _augment(images, indices, crop, flip, cutout, table, labels, step, nhwc, out_labels, padding, cutout_size)
    return out, out_labels


def _need(condition: bool, error: type[Exception], message: str) -> None:
    if not condition:
        raise error(message)

"""Max-pool, batch norm and CELU as one operator, forward and backward, for channels_last tensors.

    p = maxpool(x)                       pool x pool windows, or p = x where pool is 1
    z = (p - mean) / sqrt(var + eps) * weight + bias
    y = z                                where z > 0
        alpha * (exp(z / alpha) - 1)     elsewhere

In training, mean and var are those of p over all but the channels (var biased); else the running
ones. With q = dy * y'(z), x^ the normalised p and m the number of values per channel, the gradients are

    dbias = sum q      dweight = sum q x^      dp = (q - dbias / m - x^ dweight / m) * weight / sqrt(var + eps)

and dx is dp where a window has its maximum (the first, should it have several), 0 elsewhere.

Reductions are two steps: the rows are split, a program reduces each split, and one more kernel merges their
partial results, in an order that depends on the shapes alone. Statistics are merged as (count, mean,
sum of squared deviations) by Chan, Golub and LeVeque's formula (1979), and in float32 and float64 taken of p less its
first value in the channel, so that a mean far above the deviation costs no accuracy. There are no atomics:
the same input gives the same bits. Partial results are merged in float64, which costs nothing: they are few.
Of n splits, split s has the blocks of rows s, s + n, s + 2 n, ..., so that the tensor is read from its first row to its
last; the pass that follows goes from the last to the first, and meets in the cache what was read last.

Passes over memory for a tensor of S bytes after the pool: training forward reads x, and with pool 2
writes p and its argmax; then reads p and writes y. Backward reads dy and p; then reads both again and
writes dx. Everything is computed in float32 (float64 for float64) and stored in the tensors' own types.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd import forward_ad

from .launch import Launch, empty_channels_last, operator, parameters, require, require_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch_norm_celu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    alpha: float,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: int = 1,
) -> Tensor:
    """The operator in plain torch; also updates the running statistics in training."""
    pooled = F.max_pool2d(x, pool) if pool > 1 else x
    normalized = F.batch_norm(pooled, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.celu(normalized, alpha)


LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
NEAR: tl.constexpr = tl.constexpr(0.01)


@triton.jit
def _tile(row_block, channel_block, rows, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row numbers [R, 1] and channels [1, C] of a tile, and which of its elements exist.

    The mask says nothing of channels where they fill their blocks: it is then one value a row, and the
    accesses along a row stay wide.
    """
    row = (row_block * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    channel = (channel_block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    if C % BLOCK_C == 0:
        exists = row < rows
    else:
        exists = (row < rows) & (channel < C)
    return row, channel, exists


@triton.jit
def _corner(x, row, channel, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Where the windows of pooled rows have their first pixel."""
    out_w: tl.constexpr = W // 2
    out_hw: tl.constexpr = (H // 2) * out_w
    n, pixel = row // out_hw, row % out_hw
    return x + ((n * H + pixel // out_w * 2) * W + pixel % out_w * 2).to(tl.int64) * C + channel


@triton.jit
def _load_pooled(
    x, row, channel, exists, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr
):
    """The tile's pooled values."""
    if POOL == 1:
        value = tl.load(x + row.to(tl.int64) * C + channel, mask=exists, other=0.0).to(ACC)
    else:
        corner = _corner(x, row, channel, H, W, C)
        value = tl.load(corner, mask=exists, other=0.0).to(ACC)
        for k in tl.static_range(1, 4):
            other = tl.load(corner + ((k // 2) * W + k % 2) * C, mask=exists, other=0.0).to(ACC)
            value = tl.maximum(value, other, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def _load_window(x, row, channel, exists, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """The tile's pooled values, and which of each window's pixels, in rows, is the maximum."""
    corner = _corner(x, row, channel, H, W, C)
    value = tl.load(corner, mask=exists, other=0.0).to(ACC)
    which = tl.zeros_like(value).to(tl.int32)
    for k in tl.static_range(1, 4):
        other = tl.load(corner + ((k // 2) * W + k % 2) * C, mask=exists, other=0.0).to(ACC)
        better = (other > value) | (other != other)  # as torch: the first maximum, but the last NaN
        value = tl.where(better, other, value)
        which = tl.where(better, k, which)
    return value, which


@triton.jit
def _channel_values(pointer, channel, C: tl.constexpr, ACC: tl.constexpr):
    """Values per channel, [1, C], as ``channel`` has them; 0 past the last."""
    return tl.load(pointer + channel, mask=channel < C, other=0.0).to(ACC)


@triton.jit
def _affine(value, mean, scale, bias):
    """z and p - mean; forward and backward take z's sign from the same operations, whatever the compiler contracts."""
    centered = value - mean
    return tl.fma(centered, scale, bias), centered


@triton.jit
def _celu(z, ALPHA: tl.constexpr, TERMS: tl.constexpr):
    """alpha (exp(z / alpha) - 1), or z where that is positive; z where it is NaN.

    Near 0 the difference would lose the digits, and a series of ``TERMS`` terms is taken. Two, below a hundredth of
    alpha, are enough for a type of 11 bits: on both sides of it the relative error is 2e-5 at most.
    """
    negative = tl.minimum(z, 0.0)
    if TERMS == 2:
        near = tl.fma(negative * negative, 0.5 / ALPHA, z)
        far = tl.fma(tl.exp2(negative * (LOG2_E / ALPHA)), ALPHA, -ALPHA)
        return tl.where(z <= -NEAR * ALPHA, far, near)
    else:
        t = negative / ALPHA
        near = tl.maximum(t, -0.3)
        series = tl.full(t.shape, 1.0, t.dtype)
        for i in tl.static_range(TERMS):
            series = 1.0 + series * near * (1.0 / (TERMS + 1 - i))
        return tl.where(z <= 0, ALPHA * tl.where(t > -0.3, series * near, tl.exp(t) - 1.0), z)


@triton.jit
def statistics_kernel(
    x,  # [N, H, W, C]
    pooled,  # [rows, C], written where POOL is 2
    argmax,  # uint8 [rows, C], written where POOL is 2
    means,  # [num_splits, C], of each split, less the channel's first value
    squares,  # [num_splits, C], the sum of squared deviations from it
    firsts,  # [C], the channels' first values
    rows,  # N * (H // POOL) * (W // POOL)
    num_splits,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,  # blocks of rows that one program reduces: each num_splits-th
    WHOLE: tl.constexpr,  # whether all splits have as many rows, and channels fill their blocks
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    split = tl.program_id(0)
    first_row, first_channel, first_exists = _tile(0, tl.program_id(1), 1, C, 1, BLOCK_C)
    first = _load_pooled(x, first_row, first_channel, first_exists, H, W, C, POOL, ACC)
    HALF: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    # Less the first value where that costs accuracy; of the few bits of half precision none is lost without.
    origin = tl.zeros_like(first) if HALF else first
    mean = tl.zeros([BLOCK_R, BLOCK_C], ACC) + (first - origin)
    square = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    counts = tl.zeros([BLOCK_R, 1], ACC)
    count = tl.zeros([1, 1], ACC)
    # Each element of the tile keeps statistics of its own (Welford, 1962), so that nothing crosses threads in the loop.
    for k in tl.range(BLOCKS_PER_SPLIT, loop_unroll_factor=3 - POOL):
        row, channel, exists = _tile(k * num_splits + split, tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
        if WHOLE:
            exists = tl.full([BLOCK_R, 1], True, tl.int1)
        if POOL == 2:
            value, which = _load_window(x, row, channel, exists, H, W, C, ACC)
            offset = row.to(tl.int64) * C + channel
            tl.store(pooled + offset, value.to(pooled.dtype.element_ty), mask=exists)
            tl.store(argmax + offset, which.to(tl.uint8), mask=exists)
        else:
            value = _load_pooled(x, row, channel, exists, H, W, C, POOL, ACC)
        difference = value - origin - mean
        count += 1.0
        if HALF:  # a third of a division's instructions, and exact to a few last bits
            share = tl.rsqrt(count)
            share = share * share
        else:
            share = 1.0 / count
        new_mean = tl.fma(difference, share, mean)
        new_square = tl.fma(difference * (1.0 - share), difference, square)
        mean = new_mean if WHOLE else tl.where(exists, new_mean, mean)
        square = new_square if WHOLE else tl.where(exists, new_square, square)
        if not WHOLE:
            counts += (row < rows).to(ACC)

    # In units of ``unit`` rows counts are 1 where all are alike, and cost nothing.
    unit: tl.constexpr = BLOCKS_PER_SPLIT if WHOLE else 1
    if WHOLE:
        counts, here = tl.full([BLOCK_R, 1], 1.0, ACC), tl.full([1], BLOCK_R, ACC)
    else:
        here = tl.sum(counts, axis=0)
    total = tl.sum(counts * mean, axis=0) / here
    if not HALF:  # what rounding left, of which narrower types show nothing
        total += tl.sum(counts * (mean - total[None, :]), axis=0) / here
    deviation = mean - total[None, :]
    square = tl.sum(tl.fma(counts * deviation * unit, deviation, square), axis=0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(means + split * C + channel, total, mask=channel < C)
    tl.store(squares + split * C + channel, square, mask=channel < C)
    if split == 0:
        tl.store(firsts + channel, tl.sum(origin, axis=0), mask=channel < C)


@triton.jit
def merge_statistics_kernel(
    means,  # [num_splits, C]
    squares,  # [num_splits, C]
    firsts,  # [C]
    statistics,  # [3, C], written: mean, var (biased), 1 / sqrt(var + eps)
    running_mean,  # [C], updated where there is one
    running_var,  # [C], likewise, by the unbiased variance
    num_batches_tracked,  # one more, where it is there
    rows,
    num_splits,
    BLOCK_R: tl.constexpr,  # rows of a block; split s has the blocks s, s + num_splits, ...
    C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,  # power of two >= num_splits
    BLOCK_C: tl.constexpr,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    TRACKED: tl.constexpr,  # whether there are running statistics
    COUNTED: tl.constexpr,  # whether num_batches_tracked is there
):
    split, channel, exists = _tile(0, tl.program_id(0), num_splits, C, BLOCK_SPLITS, BLOCK_C)
    offset = split * C + channel
    period = num_splits * BLOCK_R
    last = tl.minimum(tl.maximum(rows % period - split * BLOCK_R, 0), BLOCK_R)  # of the rows that fill no period
    count = tl.where(split < num_splits, rows // period * BLOCK_R + last, 0)
    part = tl.load(means + offset, mask=exists, other=0.0).to(tl.float64)
    square = tl.load(squares + offset, mask=exists, other=0.0).to(tl.float64)
    total = tl.sum(count * part, axis=0) / rows
    deviation = part - total[None, :]
    square = tl.sum(square + count * deviation * deviation, axis=0)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    var = square / rows
    first = tl.load(firsts + column, mask=column < C, other=0.0)
    tl.store(statistics + column, total + first, mask=column < C)
    tl.store(statistics + C + column, var, mask=column < C)
    tl.store(statistics + 2 * C + column, 1.0 / tl.sqrt(var + EPS), mask=column < C)
    if TRACKED:
        unbiased = square / tl.maximum(rows - 1, 1)
        acc = statistics.dtype.element_ty
        old_mean = tl.load(running_mean + column, mask=column < C, other=0.0).to(tl.float64)
        old_var = tl.load(running_var + column, mask=column < C, other=0.0).to(tl.float64)
        new_mean = (MOMENTUM * (total + first) + (1 - MOMENTUM) * old_mean).to(acc)
        new_var = (MOMENTUM * unbiased + (1 - MOMENTUM) * old_var).to(acc)
        tl.store(running_mean + column, new_mean.to(running_mean.dtype.element_ty), mask=column < C)
        tl.store(running_var + column, new_var.to(running_var.dtype.element_ty), mask=column < C)
    if COUNTED:
        if tl.program_id(0) == 0:
            tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1)


@triton.jit
def _inverse_deviation(var, EPS: tl.constexpr, TERMS: tl.constexpr):
    """1 / sqrt(var + eps), within two last bits of float32 where half precision is stored, else to the last."""
    if TERMS == 2:
        return tl.rsqrt(var + EPS)
    elif var.dtype == tl.float64:
        return 1.0 / tl.sqrt(var + EPS)
    else:
        return 1.0 / tl.sqrt_rn(var + EPS)


@triton.jit
def apply_kernel(
    x,  # [N, H, W, C]
    y,  # [rows, C]
    mean,  # [C]
    spread,  # [C]: 1 / sqrt(var + eps), or var where EPS is above 0
    weight,  # [C]
    bias,  # [C]
    rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of rows a program
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    # From the end, which the pass before read last, so that a cache still has it.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    invstd = _channel_values(spread, channels, C, ACC)
    if EPS > 0:
        invstd = _inverse_deviation(invstd, EPS, TERMS)
    center = _channel_values(mean, channels, C, ACC)
    scale, shift = _channel_values(weight, channels, C, ACC) * invstd, _channel_values(bias, channels, C, ACC)
    for k in range(BLOCKS):
        row, channel, exists = _tile(program * BLOCKS + k, tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
        z, _centered = _affine(_load_pooled(x, row, channel, exists, H, W, C, POOL, ACC), center, scale, shift)
        offset = row.to(tl.int64) * C + channel
        tl.store(y + offset, _celu(z, ALPHA, TERMS).to(y.dtype.element_ty), mask=exists)


@triton.jit
def _gradient_of_norm(
    dy,
    x,
    row,
    channel,
    exists,
    mean,
    scale,
    shift,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    FACTOR: tl.constexpr,  # scale and shift times it give the exponent of 2, where TERMS is 2
    C: tl.constexpr,
    ACC: tl.constexpr,
):
    """q = dy * y'(z), and p - mean, for a tile."""
    offset = row.to(tl.int64) * C + channel
    gradient = tl.load(dy + offset, mask=exists, other=0.0).to(ACC)
    value = tl.load(x + offset, mask=exists, other=0.0).to(ACC)
    z, centered = _affine(value, mean, scale, shift)
    if TERMS == 2:
        slope = tl.exp2(tl.minimum(z, 0.0) * FACTOR)
    else:
        slope = tl.exp(tl.minimum(z, 0.0) / ALPHA)
    return gradient * slope, centered


@triton.jit
def backward_sums_kernel(
    dy,  # [rows, C]
    x,  # [rows, C], pooled
    statistics,  # [3, C]: mean, var, 1 / sqrt(var + eps)
    weight,  # [C]
    bias,  # [C]
    sums,  # [2, num_splits, C]: of q and of q (p - mean) over each split
    rows,
    num_splits,
    C: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,  # blocks of rows that one program reduces: each num_splits-th
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
):
    split = tl.program_id(0)
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mean, invstd = _channel_values(statistics, channels, C, ACC), _channel_values(statistics + 2 * C, channels, C, ACC)
    scale, shift = _channel_values(weight, channels, C, ACC) * invstd, _channel_values(bias, channels, C, ACC)
    if TERMS == 2:
        scale, shift = scale * (LOG2_E / ALPHA), shift * (LOG2_E / ALPHA)
    of_q = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    of_qd = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for k in tl.range(BLOCKS_PER_SPLIT, loop_unroll_factor=2):
        row, channel, exists = _tile(k * num_splits + split, tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
        q, centered = _gradient_of_norm(dy, x, row, channel, exists, mean, scale, shift, ALPHA, TERMS, 1.0, C, ACC)
        of_q += q  # 0 where no element exists, as dy is loaded
        of_qd = tl.fma(q, centered, of_qd)
    if TERMS != 2:
        of_q, of_qd = of_q.to(tl.float64), of_qd.to(tl.float64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(sums + split * C + channel, tl.sum(of_q, axis=0), mask=channel < C)
    tl.store(sums + (num_splits + split) * C + channel, tl.sum(of_qd, axis=0), mask=channel < C)


@triton.jit
def merge_sums_kernel(
    sums,  # [2, num_splits, C]
    statistics,  # [3, C]: mean, var, 1 / sqrt(var + eps)
    totals,  # [2, C]: sum q / m, sum q x^ / m / sqrt(var + eps)
    dweight,  # [C]
    dbias,  # [C]
    rows,  # m
    num_splits,
    C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,  # power of two >= num_splits
    BLOCK_C: tl.constexpr,
):
    split, channel, exists = _tile(0, tl.program_id(0), num_splits, C, BLOCK_SPLITS, BLOCK_C)
    of_q = tl.sum(tl.load(sums + split * C + channel, mask=exists, other=0.0).to(tl.float64), axis=0)
    of_qd = tl.sum(tl.load(sums + (num_splits + split) * C + channel, mask=exists, other=0.0).to(tl.float64), axis=0)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    invstd = tl.load(statistics + 2 * C + column, mask=column < C, other=0.0).to(tl.float64)
    of_qx = of_qd * invstd
    tl.store(totals + column, of_q / rows, mask=column < C)
    tl.store(totals + C + column, of_qx * invstd / rows, mask=column < C)
    acc = totals.dtype.element_ty  # on the way to a narrow type, as float64 to bfloat16 is not to be relied on
    tl.store(dbias + column, of_q.to(acc).to(dbias.dtype.element_ty), mask=column < C)
    tl.store(dweight + column, of_qx.to(acc).to(dweight.dtype.element_ty), mask=column < C)


@triton.jit
def backward_apply_kernel(
    dy,  # [rows, C]
    x,  # [rows, C], pooled
    argmax,  # uint8 [rows, C], where POOL is 2
    statistics,  # [3, C]: mean, var, 1 / sqrt(var + eps)
    weight,  # [C]
    bias,  # [C]
    totals,  # [2, C]
    dx,  # [N, H, W, C]
    windows,  # N times those of an image, with those that an odd height or width cuts short
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of windows a program
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end, as apply_kernel
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mean, invstd = _channel_values(statistics, channels, C, ACC), _channel_values(statistics + 2 * C, channels, C, ACC)
    scale, shift = _channel_values(weight, channels, C, ACC) * invstd, _channel_values(bias, channels, C, ACC)
    if TRAINING and POOL == 1:
        level, slope = _channel_values(totals, channels, C, ACC), _channel_values(totals + C, channels, C, ACC)
    for k in range(BLOCKS):
        window, channel, exists = _tile(program * BLOCKS + k, tl.program_id(1), windows, C, BLOCK_R, BLOCK_C)
        row = window
        whole = exists
        if POOL == 2:
            all_w: tl.constexpr = (W + 1) // 2
            all_hw: tl.constexpr = (H + 1) // 2 * all_w
            n, top, left = window // all_hw, window % all_hw // all_w, window % all_w
            if H % 2 + W % 2 > 0:
                whole = exists & (top < H // 2) & (left < W // 2)
                row = (n * (H // 2) + top) * (W // 2) + left
        q, centered = _gradient_of_norm(
            dy, x, row, channel, whole, mean, scale, shift, ALPHA, TERMS, LOG2_E / ALPHA, C, ACC
        )
        if TRAINING:
            if POOL == 2:  # held through the loop they would take registers, and leave fewer warps on a multiprocessor
                level, slope = _channel_values(totals, channels, C, ACC), _channel_values(totals + C, channels, C, ACC)
            q = tl.fma(centered, -slope, q - level)
        gradient = q * scale
        if POOL == 1:
            tl.store(dx + row.to(tl.int64) * C + channel, gradient.to(dx.dtype.element_ty), mask=exists)
        else:
            which = tl.load(argmax + row.to(tl.int64) * C + channel, mask=whole, other=4).to(tl.int32)
            corner = dx + ((n * H + top * 2) * W + left * 2).to(tl.int64) * C + channel
            for pixel in tl.static_range(4):
                inside = exists
                if H % 2 + W % 2 > 0:
                    inside = exists & (top * 2 + pixel // 2 < H) & (left * 2 + pixel % 2 < W)
                value = tl.where(which == pixel, gradient, 0.0).to(dx.dtype.element_ty)
                tl.store(corner + ((pixel // 2) * W + pixel % 2) * C, value, mask=inside)


class _Shape:
    """What a planner needs to know of ``x`` before its pool: sizes, and block sizes from the table."""

    def __init__(self, x: Tensor, pool: int) -> None:
        n, self.channels, height, width = x.shape
        self.rows = n * (height // pool) * (width // pool)
        self.windows = n * -(-height // pool) * -(-width // pool)
        self.acc = tl.float64 if x.dtype == torch.float64 else tl.float32
        self.terms = {8: 13, 4: 7, 2: 2}[x.element_size()]
        self.power = triton.next_power_of_2(self.channels)
        self.size = {"H": height, "W": width, "C": self.channels, "POOL": pool}

    def table(self, kernel: str) -> dict[str, int]:
        return parameters(f"batch_norm_celu.{kernel}", self.power)

    def pooling(self, kernel: str) -> str:
        """The entry's name, which is another where the kernel goes over windows."""
        return kernel if self.size["POOL"] == 1 else f"pool_{kernel}"

    def tile(self, kernel: str) -> dict[str, int]:
        entry = self.table(kernel)
        return {"BLOCK_R": entry["rows"], "BLOCK_C": min(entry["channels"], self.power)}

    def cut(self, kernel: str) -> tuple[int, int]:
        """How many splits a reduction cuts the rows into, and how many blocks of rows each of them has."""
        entry = self.table(kernel)
        blocks = triton.cdiv(triton.cdiv(self.rows, entry["rows"]), entry["splits"])
        return triton.cdiv(self.rows, blocks * entry["rows"]), blocks

    def merging(self, num_splits: int) -> dict[str, int]:
        block = self.table("merge")["channels"]
        return {"C": self.channels, "BLOCK_SPLITS": triton.next_power_of_2(num_splits), "BLOCK_C": block}

    def whole(self, splits: int, blocks: int, tile: dict[str, int]) -> bool:
        """Whether the tiles of a reduction cover rows and channels without a rest."""
        return self.rows == splits * blocks * tile["BLOCK_R"] and self.channels % tile["BLOCK_C"] == 0

    def grid(self, first: int, tile: dict[str, int]) -> tuple[int, int]:
        return first, triton.cdiv(self.channels, tile["BLOCK_C"])

    def passes(self, kernel: str, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid and constants of a pass over ``rows`` rows."""
        tile, blocks = self.tile(kernel), self.table(kernel)["blocks"]
        blocks = min(blocks, triton.cdiv(rows, tile["BLOCK_R"]))
        return self.grid(triton.cdiv(rows, tile["BLOCK_R"] * blocks), tile), tile | {"BLOCKS": blocks}


def _accumulator(x: Tensor) -> torch.dtype:
    """The type to compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _plan_apply(x, y, mean, spread, weight, bias, alpha: float, pool: int, eps: float = 0.0) -> list[Launch]:
    """Normalize and activate ``x``, pooled on the way where ``pool`` is 2, into ``y``.

    ``spread`` is 1 / sqrt(var + eps), or var where ``eps`` is given.
    """
    shape = _Shape(x, pool)
    kernel = shape.pooling("apply")
    grid, tile = shape.passes(kernel, shape.rows)
    return [
        Launch(
            apply_kernel,
            grid=grid,
            reads=dict(x=x, mean=mean, spread=spread, weight=weight, bias=bias),
            writes=dict(y=y),
            scalars=dict(rows=shape.rows),
            constants=shape.size | tile | {"ALPHA": alpha, "TERMS": shape.terms, "EPS": eps, "ACC": shape.acc},
            num_warps=shape.table(kernel)["num_warps"],
        )
    ]


def statistics_outputs(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's statistics ``[3, C]``, empty in evaluation; the pooled tensor, its argmax, empty where pool is 1."""
    n, channels, height, width = x.shape
    kept = (n, channels, height // pool, width // pool) if pool == 2 else (0, 0, 0, 0)
    pooled, argmax = (empty_channels_last(*kept, dtype, x.device) for dtype in (x.dtype, torch.uint8))
    return torch.empty(3 if training else 0, channels, dtype=_accumulator(x), device=x.device), pooled, argmax


def plan_statistics(
    x, running_mean, running_var, num_batches_tracked, training, momentum, eps, pool, statistics, pooled, argmax
) -> list[Launch]:
    """Fill ``statistics`` with mean, biased var and 1 / sqrt(var + eps) of the pooled x, and update the running ones
    that are there; in evaluation only pool.
    """
    if not training and pool == 1:
        return []
    shape = _Shape(x, pool)
    kernel = shape.pooling("statistics")
    num_splits, blocks = shape.cut(kernel)
    tile, merge = shape.tile(kernel), shape.table("merge")
    partial = torch.empty(2 * num_splits + 1, shape.channels, dtype=statistics.dtype, device=x.device)
    means, squares, firsts = partial[:num_splits], partial[num_splits:-1], partial[-1]
    partials = dict(means=means, squares=squares, firsts=firsts)
    running = dict(running_mean=running_mean, running_var=running_var, num_batches_tracked=num_batches_tracked)
    kept = dict(pooled=pooled, argmax=argmax) if pool == 2 else dict(pooled=None, argmax=None)
    launches = [
        Launch(
            statistics_kernel,
            grid=shape.grid(num_splits, tile),
            reads=dict(x=x),
            writes=kept | partials,
            scalars=dict(rows=shape.rows, num_splits=num_splits),
            constants=shape.size
            | tile
            | {"BLOCKS_PER_SPLIT": blocks, "WHOLE": shape.whole(num_splits, blocks, tile), "ACC": shape.acc},
            num_warps=shape.table(kernel)["num_warps"],
        ),
        Launch(
            merge_statistics_kernel,
            grid=(triton.cdiv(shape.channels, merge["channels"]),),
            reads=partials | running,
            writes=dict(statistics=statistics) | running,
            scalars=dict(rows=shape.rows, num_splits=num_splits),
            constants=shape.merging(num_splits)
            | {"BLOCK_R": tile["BLOCK_R"], "EPS": eps, "MOMENTUM": momentum}
            | {"TRACKED": running_mean is not None, "COUNTED": num_batches_tracked is not None},
            num_warps=merge["num_warps"],
        ),
    ]
    return launches if training else launches[:1]  # the first also writes pooled and argmax


statistics_op = operator(
    "batch_norm_celu_statistics",
    statistics_outputs,
    plan_statistics,
    mutates=("running_mean", "running_var", "num_batches_tracked"),
)


def forward_outputs(
    x: Tensor,
    pooled: Tensor,
    argmax: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    alpha: float,
    pool: int,
) -> Tensor:
    """y."""
    n, channels, height, width = x.shape
    return empty_channels_last(n, channels, height // pool, width // pool, x.dtype, x.device)


def plan_forward(x, pooled, argmax, statistics, weight, bias, training, alpha, pool, y) -> list[Launch]:
    """y by the ``statistics`` ``[3, C]``. Its gradient in training is that of x through them too."""
    mean, _, invstd = statistics
    return _plan_apply(x if pool == 1 else pooled, y, mean, invstd, weight, bias, alpha, 1)


forward_op = operator("batch_norm_celu", forward_outputs, plan_forward)


def inference_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, alpha: float, pool: int
) -> Tensor:
    """y."""
    n, channels, height, width = x.shape
    return empty_channels_last(n, channels, height // pool, width // pool, x.dtype, x.device)


def plan_inference(x, weight, bias, mean, var, eps, alpha, pool, y) -> list[Launch]:
    """y by the running statistics ``mean`` and ``var``, in one pass."""
    return _plan_apply(x, y, mean, var, weight, bias, alpha, pool, eps)


inference_op = operator("batch_norm_celu_inference", inference_outputs, plan_inference)


def backward_outputs(
    dy: Tensor,
    pooled: Tensor,
    argmax: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    training: bool,
    alpha: float,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x ``[N, C, height, width]``, weight and bias."""
    n, channels = pooled.shape[:2]
    dx = empty_channels_last(n, channels, height, width, pooled.dtype, pooled.device)
    return dx, torch.empty_like(weight), torch.empty_like(bias)


def plan_backward(
    dy, pooled, argmax, statistics, weight, bias, height, width, training, alpha, pool, dx, dweight, dbias
) -> list[Launch]:
    """Gradients of x, weight and bias. ``pooled`` is x where pool is 1; ``statistics`` are those that forward used."""
    dy = dy.contiguous(memory_format=torch.channels_last)  # it may arrive as NCHW, or expanded
    shape = _Shape(dx, pool)
    num_splits, blocks = shape.cut("backward_sums")
    tile, merge = shape.tile("backward_sums"), shape.table("merge")
    last = shape.pooling("backward_apply")
    grid, last_tile = shape.passes(last, shape.windows)
    sums = statistics.new_empty(2, num_splits, shape.channels)
    totals = statistics.new_empty(2, shape.channels)
    reads = dict(dy=dy, x=pooled, statistics=statistics, weight=weight, bias=bias)
    touched = dict(statistics=2 * shape.channels)
    return [
        Launch(
            backward_sums_kernel,
            grid=shape.grid(num_splits, tile),
            reads=reads,
            writes=dict(sums=sums),
            scalars=dict(rows=shape.rows, num_splits=num_splits),
            constants={"C": shape.channels, "BLOCKS_PER_SPLIT": blocks, "ALPHA": alpha}
            | {"TERMS": shape.terms, "ACC": shape.acc}
            | tile,
            num_warps=shape.table("backward_sums")["num_warps"],
            touched=touched,
        ),
        Launch(
            merge_sums_kernel,
            grid=(triton.cdiv(shape.channels, merge["channels"]),),
            reads=dict(sums=sums, statistics=statistics),
            writes=dict(totals=totals, dweight=dweight, dbias=dbias),
            scalars=dict(rows=shape.rows, num_splits=num_splits),
            constants=shape.merging(num_splits),
            num_warps=merge["num_warps"],
            touched=dict(statistics=shape.channels),
        ),
        Launch(
            backward_apply_kernel,
            grid=grid,
            reads=reads | dict(argmax=argmax if pool == 2 else None, totals=totals if training else None),
            writes=dict(dx=dx),
            scalars=dict(windows=shape.windows),
            constants=shape.size
            | last_tile
            | {"TRAINING": training, "ALPHA": alpha, "TERMS": shape.terms, "ACC": shape.acc},
            num_warps=shape.table(last)["num_warps"],
            touched=touched,
        ),
    ]


backward_op = operator("batch_norm_celu_backward", backward_outputs, plan_backward)


def _keep(ctx, inputs, output) -> None:
    x, pooled, argmax, statistics, weight, bias, training, alpha, pool = inputs
    ctx.settings = (*x.shape[2:], training, alpha, pool)
    ctx.save_for_backward(x if pool == 1 else pooled, argmax, statistics, weight, bias)


def _differentiate(ctx, dy):
    dx, dweight, dbias = backward_op(dy, *ctx.saved_tensors, *ctx.settings)
    return dx, None, None, None, dweight, dbias, None, None, None


def _refuse(ctx, *gradients):
    raise RuntimeError("batch_norm_celu can be differentiated once only: its backward has no derivative of its own")


forward_op.register_autograd(_differentiate, setup_context=_keep)
backward_op.register_autograd(_refuse)


def batch_norm_celu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    alpha: float,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    pool: int = 1,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``CELU(BatchNorm(MaxPool(x)))``, and in training the running statistics updated as torch does.

    What is kept for backward, with m = N * (H // pool) * (W // pool): x itself where ``pool`` is 1, else the pooled
    tensor (m C values of x's type) and the argmax (m C bytes); the statistics (12 C bytes), weight, bias.

    Args:
        x: ``[N, C, H, W]`` in channels_last; float16, bfloat16, float32 or float64. In evaluation N may be 0.
        weight, bias: ``[C]``, of any of these types, as torch's batch norm; None: ones, zeros.
        running_mean, running_var: ``[C]``, likewise; None in training keeps none.
        alpha: CELU's, above 0.
        momentum: the share of this batch in the new running statistics (the variance unbiased); as a tensor of one
            value it stays on the device, and the update takes launches of its own.
        pool: 1, or 2 for a 2 x 2 max-pool first; an odd last row or column is left out, as by torch.
        num_batches_tracked: an int64 tensor of one value, which is one more after training with ``momentum`` a number.

    Returns:
        ``[N, C, H // pool, W // pool]`` in channels_last, of x's type.

    Raises:
        ValueError, TypeError: a shape, layout or type that is not one of these.
        RuntimeError: tensors on several devices, or on one where Triton cannot run; a second derivative, or one in
            forward mode.
    """
    if not torch.compiler.is_compiling():
        inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
        tangents = [forward_ad.unpack_dual(tensor).tangent for tensor in inputs]
        forward_mode = "batch_norm_celu has no derivative in forward mode (jvp, jacfwd); use backward or autograd.grad"
        require(all(tangent is None for tangent in tangents), RuntimeError, forward_mode)
    if x.dim() == 4:
        weight = x.new_ones(x.shape[1]) if weight is None else weight
        bias = x.new_zeros(x.shape[1]) if bias is None else bias
    _check(x, weight, bias, running_mean, running_var, training, eps, alpha, pool)
    if x.shape[0] == 0:  # nothing to launch, but shapes and gradients to give
        how = dict(training=False, alpha=alpha, eps=eps, pool=pool)
        return batch_norm_celu_reference(x, weight, bias, running_mean, running_var, **how)
    if not training:
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))):
            return inference_op(x, weight, bias, running_mean, running_var, eps, alpha, pool)
        _, pooled, argmax = statistics_op(x.detach(), None, None, None, False, 0.0, eps, pool)
        mean, var = running_mean.double(), running_var.double()
        given = torch.stack((mean, var, (var + eps).rsqrt())).to(_accumulator(x)).detach()
        return forward_op(x, pooled, argmax, given, weight, bias, False, alpha, pool)
    later = isinstance(momentum, Tensor)
    running = (None, None, None) if later else (running_mean, running_var, num_batches_tracked)
    statistics, pooled, argmax = statistics_op(x.detach(), *running, True, 0.0 if later else momentum, eps, pool)
    if later and running_mean is not None:
        m = x.shape[0] * (x.shape[2] // pool) * (x.shape[3] // pool)
        with torch.no_grad():
            for old, new in ((running_mean, statistics[0]), (running_var, statistics[1] * (m / (m - 1)))):
                old.copy_(new * momentum + old.to(new.dtype) * (1 - momentum))
    return forward_op(x, pooled, argmax, statistics, weight, bias, True, alpha, pool)


def _check(x, weight, bias, running_mean, running_var, training: bool, eps: float, alpha: float, pool: int) -> None:
    require(x.dim() == 4, ValueError, f"x must have the shape [N, C, H, W], not {list(x.shape)}")
    floating = "float16, bfloat16, float32 or float64"
    require(x.dtype in DTYPES, TypeError, f"x must be {floating}, not {x.dtype}")
    require(pool in (1, 2), ValueError, f"pool must be 1 or 2, not {pool}")
    require(alpha > 0 and eps > 0, ValueError, f"alpha and eps must be above 0, not {alpha} and {eps}")
    n, channels, height, width = x.shape
    pixels = (height // pool) * (width // pool)
    values = n * pixels
    empty = f"x must have at least one value per channel after the pool, which {list(x.shape)} has not"
    require(pixels > 0 and channels > 0 and (n > 0 or not training), ValueError, empty)
    single = f"Expected more than 1 value per channel when training, got input size {list(x.shape)}"  # torch's words
    require(not training or values > 1, ValueError, single)
    in_layout = x.is_contiguous(memory_format=torch.channels_last)
    require(in_layout, ValueError, f"x must be in channels_last, not of strides {x.stride()}; see torch.channels_last")
    both = (running_mean is None) == (running_var is None)
    require(both, ValueError, "running_mean and running_var must both be given, or neither")
    named = dict(weight=weight, bias=bias)
    if not training or running_mean is not None:
        named |= dict(running_mean=running_mean, running_var=running_var)
    for name, tensor in named.items():
        require_tensor(name, tensor, DTYPES, (channels,), ("x", x))


class BatchNormCELU2d(nn.BatchNorm2d):
    """:func:`batch_norm_celu` as a module, in the place of ``MaxPool2d(pool)``, ``BatchNorm2d``, ``CELU(alpha)``.

    Its options and its state dict are those of ``torch.nn.BatchNorm2d``; an input in another layout is brought into
    channels_last first. Tools that treat it as a batch norm work where they keep it in its place
    (``torch.optim.swa_utils.update_bn``, ``torch.func.replace_all_batch_norm_modules_``). Those that would put a plain
    norm or a folded convolution there, and so lose pool and CELU, read its ``eps``, and get a TypeError
    (``SyncBatchNorm.convert_sync_batchnorm``, ``fuse_conv_bn_eval``); the value itself is ``epsilon``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        alpha: float,
        pool: int = 1,
        **factory,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        self.alpha, self.pool = alpha, pool

    @property
    def eps(self) -> float:
        raise TypeError(
            "BatchNormCELU2d is a max-pool, a batch norm and a CELU in one: what replaces or folds a batch norm would "
            "lose the others; use MaxPool2d, BatchNorm2d and CELU for that, whose state dict is the same"
        )

    @eps.setter
    def eps(self, value: float) -> None:
        self.epsilon = value

    def forward(self, x: Tensor) -> Tensor:
        # Which statistics, and how they are updated, as torch's own forward.
        momentum, count = self.momentum, None
        tracking = self.training and self.track_running_stats
        if tracking and self.num_batches_tracked is not None:
            count = self.num_batches_tracked
            if momentum is None:  # the plain average over all batches so far
                momentum = count.add_(1).double().reciprocal()
        momentum = 0.0 if momentum is None else momentum
        running = (self.running_mean, self.running_var) if tracking or not self.training else (None, None)
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        how = dict(training=training, alpha=self.alpha, momentum=momentum, eps=self.epsilon, pool=self.pool)
        return batch_norm_celu(x, self.weight, self.bias, *running, num_batches_tracked=count, **how)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.epsilon}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, alpha={self.alpha}, pool={self.pool}"
        )


def example_launches(
    shape: tuple[int, int, int, int],
    *,
    pool: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    alpha: float,
    direction: str,
    eps: float = 1e-5,
) -> list[Launch]:
    """The launches of one call at x ``shape`` ``[N, C, H, W]``, on tensors without memory.

    ``direction``: forward, backward (both in training) or inference. Weight and bias are of ``parameter_dtype``.
    """
    x = empty_channels_last(*shape, dtype, "meta")
    weight, bias, *running = (torch.empty(shape[1], dtype=parameter_dtype, device="meta") for _ in range(4))
    if direction == "inference":
        inputs = x, weight, bias, *running, eps, alpha, pool
        return plan_inference(*inputs, inference_outputs(*inputs))
    count = torch.empty((), dtype=torch.int64, device="meta")
    inputs = x, *running, count, True, 0.1, eps, pool
    statistics, pooled, argmax = outputs = statistics_outputs(*inputs)
    launches = plan_statistics(*inputs, *outputs)
    inputs = x, pooled, argmax, statistics, weight, bias, True, alpha, pool
    y = forward_outputs(*inputs)
    if direction == "forward":
        return launches + plan_forward(*inputs, y)
    kept = x if pool == 1 else pooled
    inputs = torch.empty_like(y), kept, argmax, statistics, weight, bias, *shape[2:], True, alpha, pool
    return plan_backward(*inputs, *backward_outputs(*inputs))

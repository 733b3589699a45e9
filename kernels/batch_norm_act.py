"""Max-pool, batch norm and an activation as one operator, forward and backward, for channels_last tensors.

    p = maxpool(x)                       pool x pool windows; p = x if pool is 1
    z = (p - mean) / sqrt(var + eps) * weight + bias
    y = activation(z)

    activation      y(z)                                              y'(z)
    none            z                                                 1
    celu            z if z > 0, else alpha (exp(z / alpha) - 1)       1 if z > 0, else exp(z / alpha)
    relu            z if z > 0, else 0                                1 if z > 0, else 0
    silu            z s(z)                                            s(z) (1 + z (1 - s(z)))
    gelu            z F(z)                                            F(z) + z exp(-z^2 / 2) / sqrt(2 pi)
    gelu_tanh       z s(2 u)                                          s(2 u) (1 + 2 z u' (1 - s(2 u)))

Here s(z) = 1 / (1 + exp(-z)), F is the distribution function of the normal distribution, and u is the cubic polynomial
sqrt(2 / pi) (z + 0.044715 z^3) of ``torch.nn.GELU(approximate="tanh")``.

In training, mean and var are the statistics of each channel of p (var biased). In evaluation they are the running
statistics. Let q = dy * y'(z), x^ the normalized p, and m the number of values per channel. The gradients are

    dbias = sum q      dweight = sum q x^      dp = (q - dbias / m - x^ dweight / m) * weight / sqrt(var + eps)

In evaluation dp = q * weight / sqrt(var + eps). dx is dp at the maximum of each window (at the first, if there are
several) and 0 elsewhere.

Reductions take two kernels. The first splits the rows and reduces each split to a partial result. The second merges the
few partial results in float64, in an order that depends on the shapes alone. There are no atomics, so the same input
gives the same bits. Statistics are merged as (count, mean, sum of squared deviations) by the formula of Chan, Golub and
LeVeque (1979). In float32 and float64 the first value of the channel is subtracted before, so a mean far above the
standard deviation costs no accuracy.

Split s of n reduces the blocks of rows s, s + n, s + 2 n, ..., so the first pass reads the tensor from its first row to
its last. The next pass goes from the last row to the first, and finds in the cache what was read last.

Passes over memory: forward in training reads x and, with pool 2, writes p and its argmax. Then it reads p and writes y.
Backward reads dy and p, then reads both again and writes dx. Evaluation without gradients reads x and writes y.
Everything is computed in float32 (float64 for float64) and stored in the dtypes of the tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import cpu
from .launch import (
    Launch,
    convert,
    empty_channels_last,
    native,
    operator,
    parameters,
    require,
    require_is_tensor,
    require_separate,
    require_tensor,
    shown,
)
from .optional_triton import tl, triton

ACTIVATIONS = ("none", "celu", "relu", "gelu", "gelu_tanh", "silu")  # in the order of cpu.cpp
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    activation: str = "celu",
    alpha: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: int = 1,
) -> Tensor:
    """Return the same as :func:`batch_norm_act`, computed in plain torch, and update the running statistics."""
    pooled = F.max_pool2d(x, pool) if pool > 1 else x
    normalized = F.batch_norm(pooled, running_mean, running_var, weight, bias, training, momentum, eps)
    return activate_reference(normalized, activation, alpha)


def activate_reference(z: Tensor, activation: str, alpha: float = 1.0) -> Tensor:
    """Return ``activation`` of ``z``, computed in plain torch."""
    if activation == "celu":
        return F.celu(z, alpha)
    plain = {"none": lambda z: z, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
    return F.gelu(z, approximate="tanh") if activation == "gelu_tanh" else plain[activation](z)


LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
NORMAL_LOG2: tl.constexpr = tl.constexpr(-0.5 * math.log2(2 * math.pi))  # of the largest density
TANH_FIRST: tl.constexpr = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_THIRD: tl.constexpr = tl.constexpr(0.044715 * 2 * math.sqrt(2 / math.pi))
NEAR: tl.constexpr = tl.constexpr(0.01)  # _celu uses its series of two terms for z above -NEAR * alpha


@triton.jit
def _tile(row_block, channel_block, rows, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the row numbers [R, 1] and channels [1, C] of a tile, and the mask of the elements that exist.

    If the channels fill their blocks, the mask has one value per row, so accesses along a row stay wide.
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
    """Return pointers to the first pixel of the windows of pooled rows."""
    out_w: tl.constexpr = W // 2
    out_hw: tl.constexpr = (H // 2) * out_w
    n, pixel = row // out_hw, row % out_hw
    return x + ((n * H + pixel // out_w * 2) * W + pixel % out_w * 2).to(tl.int64) * C + channel


@triton.jit
def _load_pooled(
    x, row, channel, exists, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr
):
    """Return the pooled values of a tile."""
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
    """Return the pooled values of a tile, and the row-major index of each maximum in its window."""
    corner = _corner(x, row, channel, H, W, C)
    value = tl.load(corner, mask=exists, other=0.0).to(ACC)
    index = tl.zeros_like(value).to(tl.int32)
    for k in tl.static_range(1, 4):
        other = tl.load(corner + ((k // 2) * W + k % 2) * C, mask=exists, other=0.0).to(ACC)
        better = (other > value) | (other != other)  # like torch: the first maximum, but the last NaN
        value = tl.where(better, other, value)
        index = tl.where(better, k, index)
    return value, index


@triton.jit
def _channel_values(pointer, channel, C: tl.constexpr, ACC: tl.constexpr):
    """Return the values of ``channel``, [1, C], and 0 past the last channel."""
    return tl.load(pointer + channel, mask=channel < C, other=0.0).to(ACC)


@triton.jit
def _affine(value, mean, scale, bias):
    """Return z and p - mean. Forward and backward share this code, so the sign of z is the same in both."""
    centered = value - mean
    return tl.fma(centered, scale, bias), centered


@triton.jit
def _celu(z, ALPHA: tl.constexpr, TERMS: tl.constexpr):
    """Return alpha (exp(z / alpha) - 1) if z <= 0, else z. NaN stays NaN.

    The difference loses digits near 0, so a series of ``TERMS`` terms replaces it there. Two terms suffice in half
    precision: the relative error is at most 2e-5 on both sides of z = -alpha / 100.
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
def _sigmoid(z, TERMS: tl.constexpr):
    """Return 1 / (1 + exp(-z)). In half precision the square of a reciprocal square root replaces the division."""
    if TERMS == 2:
        root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2_E))
        return root * root
    else:
        return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh_gate(z, TERMS: tl.constexpr):
    """Return s(2 u) and the factor (1 - s(2 u)) 2 z u'(z) for the tanh approximation of GELU."""
    square = z * z
    if TERMS == 2:  # exp2(power) is exp(-2 u), and 2 z u' is 6 u less a multiple of z
        power = z * tl.fma(square, -LOG2_E * TANH_THIRD, -LOG2_E * TANH_FIRST)
        root = tl.rsqrt(1.0 + tl.exp2(power))
        gate = root * root
        complement = tl.fma(gate, 3.0 / LOG2_E, -3.0 / LOG2_E)  # the unit of power, too
        return gate, tl.fma(z, LOG2_E / 1.5 * TANH_FIRST, power) * complement
    else:
        # Triton would make float32 constants of Python's numbers as arguments of fma.
        first, third = tl.full(z.shape, TANH_FIRST, z.dtype), tl.full(z.shape, TANH_THIRD, z.dtype)
        gate = _sigmoid(z * tl.fma(square, third, first), TERMS)
        return gate, (1.0 - gate) * (z * tl.fma(square, 3.0 * third, first))


@triton.jit
def _normal(z, TERMS: tl.constexpr):
    """Return the distribution function and the density of the normal distribution.

    In half precision the function is, for z <= 0, the density times a polynomial in 1 / sqrt(|z| + 3), which has a
    relative error of at most 2e-5, or an absolute error of 3e-8 if that is more.
    """
    if TERMS == 2:
        density = tl.exp2(tl.fma(z * z, -0.5 * LOG2_E, NORMAL_LOG2))
        root = tl.rsqrt(tl.abs(z) + 3.0)
        ratio = tl.fma(root, 86.062825, -109.86008)
        ratio = tl.fma(root, ratio, 59.026455)
        ratio = tl.fma(root, ratio, -14.153319)
        tail = density * tl.fma(root, ratio, 1.3293084)
        return tl.where(z <= 0, tail, 1.0 - tail), density
    else:
        return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476), 0.3989422804014327 * tl.exp(z * z * -0.5)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, TERMS: tl.constexpr):
    """Return the activation of z."""
    if ACTIVATION == "celu":
        return _celu(z, ALPHA, TERMS)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)  # NaN stays NaN
    elif ACTIVATION == "silu":
        return z * _sigmoid(z, TERMS)
    elif ACTIVATION == "gelu":
        below, _density = _normal(z, TERMS)
        return z * below
    elif ACTIVATION == "gelu_tanh":
        gate, _factor = _tanh_gate(z, TERMS)
        return z * gate
    else:
        return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, TERMS: tl.constexpr, FACTOR: tl.constexpr):
    """Return the derivative of the activation at z. In half precision CELU's is 2 ** (z * FACTOR) for z < 0."""
    if ACTIVATION == "celu":
        if TERMS == 2:
            return tl.exp2(tl.minimum(z, 0.0) * FACTOR)
        else:
            return tl.exp(tl.minimum(z, 0.0) / ALPHA)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        gate = _sigmoid(z, TERMS)
        return gate * tl.fma(z, 1.0 - gate, 1.0)
    elif ACTIVATION == "gelu":
        below, density = _normal(z, TERMS)
        return tl.fma(z, density, below)
    elif ACTIVATION == "gelu_tanh":
        gate, factor = _tanh_gate(z, TERMS)
        return tl.fma(gate, factor, gate)
    else:
        return tl.full(z.shape, 1.0, z.dtype)


@triton.jit
def statistics_kernel(
    x,  # [N, H, W, C]
    pooled,  # [rows, C], written if POOL is 2
    argmax,  # uint8 [rows, C], written if POOL is 2
    means,  # [num_splits, C], the mean of each split minus the origin
    squares,  # [num_splits, C], the sum of squared deviations of each split from its mean
    origins,  # [C], the first value of each channel, or 0 in half precision
    rows,  # N * (H // POOL) * (W // POOL)
    num_splits,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,  # blocks of rows per program: split s has the blocks s, s + num_splits, ...
    EVEN: tl.constexpr,  # whether the tiles cover rows and channels exactly
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    split = tl.program_id(0)
    first_row, first_channel, first_exists = _tile(0, tl.program_id(1), 1, C, 1, BLOCK_C)
    first = _load_pooled(x, first_row, first_channel, first_exists, H, W, C, POOL, ACC)
    HALF: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    # Subtracting the first value keeps accuracy. Half precision has too few bits to need it.
    origin = tl.zeros_like(first) if HALF else first
    mean = tl.zeros([BLOCK_R, BLOCK_C], ACC) + (first - origin)
    square = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    counts = tl.zeros([BLOCK_R, 1], ACC)
    count = tl.zeros([1, 1], ACC)
    # Each element of the tile keeps its own statistics (Welford, 1962), so the loop needs no exchange between threads.
    for k in tl.range(BLOCKS_PER_SPLIT, loop_unroll_factor=3 - POOL):
        row, channel, exists = _tile(k * num_splits + split, tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
        if EVEN:
            exists = tl.full([BLOCK_R, 1], True, tl.int1)
        if POOL == 2:
            value, index = _load_window(x, row, channel, exists, H, W, C, ACC)
            offset = row.to(tl.int64) * C + channel
            tl.store(pooled + offset, convert(value, pooled.dtype.element_ty), mask=exists)
            tl.store(argmax + offset, index.to(tl.uint8), mask=exists)
        else:
            value = _load_pooled(x, row, channel, exists, H, W, C, POOL, ACC)
        difference = value - origin - mean
        count += 1.0
        if HALF:  # a third of the instructions of a division, and accurate to a few units in the last place
            share = tl.rsqrt(count)
            share = share * share
        else:
            share = 1.0 / count
        new_mean = tl.fma(difference, share, mean)
        new_square = tl.fma(difference * (1.0 - share), difference, square)
        mean = new_mean if EVEN else tl.where(exists, new_mean, mean)
        square = new_square if EVEN else tl.where(exists, new_square, square)
        if not EVEN:
            counts += (row < rows).to(ACC)

    # If all counts are equal, count in units of ``unit`` rows. All counts are then 1, and multiplying by them is free.
    unit: tl.constexpr = BLOCKS_PER_SPLIT if EVEN else 1
    if EVEN:
        counts, num_values = tl.full([BLOCK_R, 1], 1.0, ACC), tl.full([1], BLOCK_R, ACC)
    else:
        num_values = tl.sum(counts, axis=0)
    split_mean = tl.sum(counts * mean, axis=0) / num_values
    if not HALF:  # correct the rounding error of the mean, which half precision would not show
        split_mean += tl.sum(counts * (mean - split_mean[None, :]), axis=0) / num_values
    deviation = mean - split_mean[None, :]
    square = tl.sum(tl.fma(counts * deviation * unit, deviation, square), axis=0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(means + split * C + channel, split_mean, mask=channel < C)
    tl.store(squares + split * C + channel, square, mask=channel < C)
    if split == 0:
        tl.store(origins + channel, tl.sum(origin, axis=0), mask=channel < C)


@triton.jit
def merge_statistics_kernel(
    means,  # [num_splits, C]
    squares,  # [num_splits, C]
    origins,  # [C]
    statistics,  # [3, C], written: mean, var (biased), 1 / sqrt(var + eps)
    running_mean,  # [C], updated if TRACKED
    running_var,  # [C], updated with the unbiased variance if TRACKED
    num_batches_tracked,  # int64, incremented if COUNTED
    rows,
    num_splits,
    BLOCK_R: tl.constexpr,  # rows of a block; split s has the blocks s, s + num_splits, ...
    C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,  # power of two >= num_splits
    BLOCK_C: tl.constexpr,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    TRACKED: tl.constexpr,
    COUNTED: tl.constexpr,
):
    split, channel, exists = _tile(0, tl.program_id(0), num_splits, C, BLOCK_SPLITS, BLOCK_C)
    offset = split * C + channel
    period = num_splits * BLOCK_R
    # The rows after the last complete period fill the first splits.
    last = tl.minimum(tl.maximum(rows % period - split * BLOCK_R, 0), BLOCK_R)
    count = tl.where(split < num_splits, rows // period * BLOCK_R + last, 0)
    part = tl.load(means + offset, mask=exists, other=0.0).to(tl.float64)
    square = tl.load(squares + offset, mask=exists, other=0.0).to(tl.float64)
    mean = tl.sum(count * part, axis=0) / rows
    deviation = part - mean[None, :]
    square = tl.sum(square + count * deviation * deviation, axis=0)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    var = square / rows
    first = tl.load(origins + column, mask=column < C, other=0.0)
    tl.store(statistics + column, mean + first, mask=column < C)
    tl.store(statistics + C + column, var, mask=column < C)
    tl.store(statistics + 2 * C + column, 1.0 / tl.sqrt(var + EPS), mask=column < C)
    if TRACKED:
        unbiased = square / tl.maximum(rows - 1, 1)
        acc = statistics.dtype.element_ty
        old_mean = tl.load(running_mean + column, mask=column < C, other=0.0).to(tl.float64)
        old_var = tl.load(running_var + column, mask=column < C, other=0.0).to(tl.float64)
        new_mean = (MOMENTUM * (mean + first) + (1 - MOMENTUM) * old_mean).to(acc)
        new_var = (MOMENTUM * unbiased + (1 - MOMENTUM) * old_var).to(acc)
        tl.store(running_mean + column, convert(new_mean, running_mean.dtype.element_ty), mask=column < C)
        tl.store(running_var + column, convert(new_var, running_var.dtype.element_ty), mask=column < C)
    if COUNTED:
        if tl.program_id(0) == 0:
            tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1)


@triton.jit
def _inverse_deviation(var, EPS: tl.constexpr, TERMS: tl.constexpr):
    """Return 1 / sqrt(var + eps). An error of two units in the last place of float32 is fine for half precision."""
    if TERMS == 2:
        return tl.rsqrt(var + EPS)
    elif var.dtype == tl.float64:
        return 1.0 / tl.sqrt(var + EPS)
    else:
        return 1.0 / tl.sqrt_rn(var + EPS)


@triton.jit
def apply_kernel(
    x,  # [N, H, W, C]
    y,  # [rows, C], written
    mean,  # [C]
    var_or_invstd,  # [C]: var if EPS > 0, else 1 / sqrt(var + eps)
    weight,  # [C]
    bias,  # [C]
    rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of rows per program
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    # Start at the end, which the previous pass read last and the cache may still hold.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    invstd = _channel_values(var_or_invstd, channels, C, ACC)
    if EPS > 0:
        invstd = _inverse_deviation(invstd, EPS, TERMS)
    center = _channel_values(mean, channels, C, ACC)
    scale, shift = _channel_values(weight, channels, C, ACC) * invstd, _channel_values(bias, channels, C, ACC)
    for k in range(BLOCKS):
        row, channel, exists = _tile(program * BLOCKS + k, tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
        z, _centered = _affine(_load_pooled(x, row, channel, exists, H, W, C, POOL, ACC), center, scale, shift)
        offset = row.to(tl.int64) * C + channel
        tl.store(y + offset, convert(_activate(z, ACTIVATION, ALPHA, TERMS), y.dtype.element_ty), mask=exists)


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
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    FACTOR: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return q = dy * y'(z) and p - mean for a tile."""
    offset = row.to(tl.int64) * C + channel
    gradient = tl.load(dy + offset, mask=exists, other=0.0).to(ACC)
    value = tl.load(x + offset, mask=exists, other=0.0).to(ACC)
    z, centered = _affine(value, mean, scale, shift)
    return gradient * _slope(z, ACTIVATION, ALPHA, TERMS, FACTOR), centered


@triton.jit
def backward_sums_kernel(
    dy,  # [rows, C]
    x,  # [rows, C], pooled
    statistics,  # [3, C]: mean, var, 1 / sqrt(var + eps)
    weight,  # [C]
    bias,  # [C]
    sums,  # [2, num_splits, C], written: sum q and sum q (p - mean) of each split
    rows,
    num_splits,
    C: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,  # blocks of rows per program: split s has the blocks s, s + num_splits, ...
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
):
    split = tl.program_id(0)
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mean, invstd = _channel_values(statistics, channels, C, ACC), _channel_values(statistics + 2 * C, channels, C, ACC)
    scale, shift = _channel_values(weight, channels, C, ACC) * invstd, _channel_values(bias, channels, C, ACC)
    if ACTIVATION == "celu" and TERMS == 2:
        scale, shift = scale * (LOG2_E / ALPHA), shift * (LOG2_E / ALPHA)
    of_q = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    of_qd = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for k in tl.range(BLOCKS_PER_SPLIT, loop_unroll_factor=2):
        row, channel, exists = _tile(k * num_splits + split, tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
        q, centered = _gradient_of_norm(
            dy, x, row, channel, exists, mean, scale, shift, ACTIVATION, ALPHA, TERMS, 1.0, C, ACC
        )
        of_q += q  # 0 outside the mask, because dy is loaded as 0 there
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
    totals,  # [2, C], written: sum q / m and sum q x^ / m / sqrt(var + eps)
    dweight,  # [C], written
    dbias,  # [C], written
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
    acc = totals.dtype.element_ty  # a detour, because Triton does not convert float64 to bfloat16 reliably
    tl.store(dbias + column, convert(of_q.to(acc), dbias.dtype.element_ty), mask=column < C)
    tl.store(dweight + column, convert(of_qx.to(acc), dweight.dtype.element_ty), mask=column < C)


@triton.jit
def backward_apply_kernel(
    dy,  # [rows, C]
    x,  # [rows, C], pooled
    argmax,  # uint8 [rows, C], read if POOL is 2
    statistics,  # [3, C]: mean, var, 1 / sqrt(var + eps)
    weight,  # [C]
    bias,  # [C]
    totals,  # [2, C], read if TRAINING
    dx,  # [N, H, W, C], written
    num_windows,  # N * ceil(H / POOL) * ceil(W / POOL), including windows that an odd height or width cuts off
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of windows per program
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end, like apply_kernel
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mean, invstd = _channel_values(statistics, channels, C, ACC), _channel_values(statistics + 2 * C, channels, C, ACC)
    scale, shift = _channel_values(weight, channels, C, ACC) * invstd, _channel_values(bias, channels, C, ACC)
    if TRAINING and POOL == 1:
        level, slope = _channel_values(totals, channels, C, ACC), _channel_values(totals + C, channels, C, ACC)
    for k in range(BLOCKS):
        window, channel, exists = _tile(program * BLOCKS + k, tl.program_id(1), num_windows, C, BLOCK_R, BLOCK_C)
        row = window
        complete = exists
        if POOL == 2:
            all_w: tl.constexpr = (W + 1) // 2
            all_hw: tl.constexpr = (H + 1) // 2 * all_w
            n, top, left = window // all_hw, window % all_hw // all_w, window % all_w
            if H % 2 + W % 2 > 0:
                complete = exists & (top < H // 2) & (left < W // 2)
                row = (n * (H // 2) + top) * (W // 2) + left
        q, centered = _gradient_of_norm(
            dy, x, row, channel, complete, mean, scale, shift, ACTIVATION, ALPHA, TERMS, LOG2_E / ALPHA, C, ACC
        )
        if TRAINING:
            if POOL == 2:  # loaded in the loop, because holding them in registers would reduce occupancy
                level, slope = _channel_values(totals, channels, C, ACC), _channel_values(totals + C, channels, C, ACC)
            q = tl.fma(centered, -slope, q - level)
        gradient = q * scale
        if POOL == 1:
            tl.store(dx + row.to(tl.int64) * C + channel, convert(gradient, dx.dtype.element_ty), mask=exists)
        else:
            index = tl.load(argmax + row.to(tl.int64) * C + channel, mask=complete, other=4).to(tl.int32)
            corner = dx + ((n * H + top * 2) * W + left * 2).to(tl.int64) * C + channel
            for pixel in tl.static_range(4):
                inside = exists
                if H % 2 + W % 2 > 0:
                    inside = exists & (top * 2 + pixel // 2 < H) & (left * 2 + pixel % 2 < W)
                value = convert(tl.where(index == pixel, gradient, 0.0), dx.dtype.element_ty)
                tl.store(corner + ((pixel // 2) * W + pixel % 2) * C, value, mask=inside)


class _Shape:
    """Sizes and launch parameters of a call with ``x``, the tensor before the pool."""

    def __init__(self, x: Tensor, pool: int) -> None:
        n, self.channels, height, width = x.shape
        self.rows = n * (height // pool) * (width // pool)
        self.num_windows = n * -(-height // pool) * -(-width // pool)
        self.acc = tl.float64 if x.dtype == torch.float64 else tl.float32
        self.terms = {8: 13, 4: 7, 2: 2}[x.element_size()]  # of the series near 0, see _celu
        self.shape_class = triton.next_power_of_2(self.channels)
        self.constants = {"H": height, "W": width, "C": self.channels, "POOL": pool}
        self.prefix = "pool_" if pool == 2 else ""  # prefix of the names of the table entries that depend on the pool

    def entry(self, kernel: str) -> dict[str, int]:
        return parameters(f"batch_norm_act.{kernel}", self.shape_class)

    def tile(self, kernel: str) -> dict[str, int]:
        entry = self.entry(kernel)
        return {"BLOCK_R": entry["rows"], "BLOCK_C": min(entry["channels"], self.shape_class)}

    def grid(self, programs: int, constants: dict[str, int]) -> tuple[int, int]:
        return programs, triton.cdiv(self.channels, constants["BLOCK_C"])

    def split_rows(self, kernel: str) -> tuple[int, dict[str, int]]:
        """Return the number of splits of a reduction, and the constants that describe a split."""
        tile, max_splits = self.tile(kernel), self.entry(kernel)["splits"]
        blocks = triton.cdiv(triton.cdiv(self.rows, tile["BLOCK_R"]), max_splits)
        return triton.cdiv(self.rows, blocks * tile["BLOCK_R"]), tile | {"BLOCKS_PER_SPLIT": blocks}

    def merge_constants(self, num_splits: int) -> dict[str, int]:
        block = self.entry("merge")["channels"]
        return {"C": self.channels, "BLOCK_SPLITS": triton.next_power_of_2(num_splits), "BLOCK_C": block}

    def elementwise_launch(self, kernel: str, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
        """Return the grid of a pass over ``rows`` rows, and the constants that describe its blocks."""
        tile = self.tile(kernel)
        blocks = min(self.entry(kernel)["blocks"], triton.cdiv(rows, tile["BLOCK_R"]))
        return self.grid(triton.cdiv(rows, tile["BLOCK_R"] * blocks), tile), tile | {"BLOCKS": blocks}


def _accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic, which is also the dtype of the statistics."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_output(x: Tensor, pool: int) -> Tensor:
    n, channels, height, width = x.shape
    return empty_channels_last(n, channels, height // pool, width // pool, x.dtype, x.device)


def _plan_apply(
    x, y, mean, var_or_invstd, weight, bias, activation: str, alpha: float, pool: int, eps: float = 0.0
) -> list[Launch]:
    """Return the launch that pools, normalizes and activates ``x`` into ``y``.

    ``var_or_invstd`` is var if ``eps`` is given, else 1 / sqrt(var + eps).
    """
    shape = _Shape(x, pool)
    kernel = f"{shape.prefix}apply"
    grid, blocks = shape.elementwise_launch(kernel, shape.rows)
    return [
        Launch(
            apply_kernel,
            grid=grid,
            reads=dict(x=x, mean=mean, var_or_invstd=var_or_invstd, weight=weight, bias=bias),
            writes=dict(y=y),
            scalars=dict(rows=shape.rows),
            constants=shape.constants
            | blocks
            | {"ACTIVATION": activation, "ALPHA": alpha, "TERMS": shape.terms, "EPS": eps, "ACC": shape.acc},
            num_warps=shape.entry(kernel)["num_warps"],
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
    """Allocate the statistics ``[3, C]``, empty in evaluation, and the pooled tensor and argmax, empty if pool is 1."""
    n, channels, height, width = x.shape
    size = (n, channels, height // pool, width // pool) if pool == 2 else (0, 0, 0, 0)
    pooled, argmax = (empty_channels_last(*size, dtype, x.device) for dtype in (x.dtype, torch.uint8))
    return torch.empty(3 if training else 0, channels, dtype=_accumulator(x), device=x.device), pooled, argmax


def plan_statistics(
    x, running_mean, running_var, num_batches_tracked, training, momentum, eps, pool, statistics, pooled, argmax
) -> list[Launch]:
    """Return the launches that pool x, fill ``statistics`` and update the running statistics.

    ``statistics`` are mean, biased var and 1 / sqrt(var + eps) of the pooled x. In evaluation the launches only pool.
    """
    if not training and pool == 1:
        return []
    shape = _Shape(x, pool)
    kernel = f"{shape.prefix}statistics"
    num_splits, split = shape.split_rows(kernel)
    tiled_rows = num_splits * split["BLOCKS_PER_SPLIT"] * split["BLOCK_R"]
    even = tiled_rows == shape.rows and shape.channels % split["BLOCK_C"] == 0
    merge = shape.entry("merge")
    partial = torch.empty(2 * num_splits + 1, shape.channels, dtype=statistics.dtype, device=x.device)
    partials = dict(means=partial[:num_splits], squares=partial[num_splits:-1], origins=partial[-1])
    running = dict(running_mean=running_mean, running_var=running_var, num_batches_tracked=num_batches_tracked)
    pooling = dict(pooled=pooled, argmax=argmax) if pool == 2 else dict(pooled=None, argmax=None)
    launches = [
        Launch(
            statistics_kernel,
            grid=shape.grid(num_splits, split),
            reads=dict(x=x),
            writes=pooling | partials,
            scalars=dict(rows=shape.rows, num_splits=num_splits),
            constants=shape.constants | split | {"EVEN": even, "ACC": shape.acc},
            num_warps=shape.entry(kernel)["num_warps"],
        ),
        Launch(
            merge_statistics_kernel,
            grid=(triton.cdiv(shape.channels, merge["channels"]),),
            reads=partials | running,
            writes=dict(statistics=statistics) | running,
            scalars=dict(rows=shape.rows, num_splits=num_splits),
            constants=shape.merge_constants(num_splits)
            | {"BLOCK_R": split["BLOCK_R"], "EPS": eps, "MOMENTUM": momentum}
            | {"TRACKED": running_mean is not None, "COUNTED": num_batches_tracked is not None},
            num_warps=merge["num_warps"],
        ),
    ]
    return launches if training else launches[:1]  # the first launch also pools


def statistics_on_cpu(
    x, running_mean, running_var, num_batches_tracked, training, momentum, eps, pool, statistics, pooled, argmax
) -> None:
    """Do the work of :func:`plan_statistics` in compiled C++."""
    if not training and pool == 1:
        return
    shape = cpu.Shape.of(x, pool)
    moments = torch.empty(2, x.shape[1], dtype=torch.float64)
    cpu.call("statistics", x.dtype, x, pooled, argmax, moments, shape)
    if not training:
        return
    mean, square = moments
    var = square / shape.rows
    statistics.copy_(torch.stack((mean, var, (var + eps).rsqrt())))
    if running_mean is not None:
        unbiased = square / max(shape.rows - 1, 1)
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean.double())
        running_var.copy_(momentum * unbiased + (1 - momentum) * running_var.double())
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)


statistics_op = operator(
    "batch_norm_act_statistics",
    statistics_outputs,
    plan_statistics,
    statistics_on_cpu,
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
    activation: str,
    alpha: float,
    pool: int,
) -> Tensor:
    """Allocate y."""
    return _empty_output(x, pool)


def plan_forward(x, pooled, argmax, statistics, weight, bias, training, activation, alpha, pool, y) -> list[Launch]:
    """Return the launch that computes y from the results of the statistics operator."""
    mean, _, invstd = statistics
    return _plan_apply(x if pool == 1 else pooled, y, mean, invstd, weight, bias, activation, alpha, pool=1)


def _apply_on_cpu(x, y, mean, invstd, weight, bias, activation: str, alpha: float, pool: int) -> None:
    parameters = torch.stack((mean, weight.to(mean.dtype) * invstd, bias.to(mean.dtype)))
    cpu.call("apply", x.dtype, x, y, parameters, ACTIVATIONS.index(activation), alpha, cpu.Shape.of(x, pool))


def forward_on_cpu(x, pooled, argmax, statistics, weight, bias, training, activation, alpha, pool, y) -> None:
    """Do the work of :func:`plan_forward` in compiled C++."""
    mean, _, invstd = statistics
    _apply_on_cpu(x if pool == 1 else pooled, y, mean, invstd, weight, bias, activation, alpha, pool=1)


forward_op = operator("batch_norm_act", forward_outputs, plan_forward, forward_on_cpu)


def inference_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    alpha: float,
    pool: int,
) -> Tensor:
    """Allocate y."""
    return _empty_output(x, pool)


def plan_inference(x, weight, bias, mean, var, eps, activation, alpha, pool, y) -> list[Launch]:
    """Return the launch that computes y from the running statistics ``mean`` and ``var``, in one pass."""
    return _plan_apply(x, y, mean, var, weight, bias, activation, alpha, pool, eps)


def inference_on_cpu(x, weight, bias, mean, var, eps, activation, alpha, pool, y) -> None:
    """Do the work of :func:`plan_inference` in compiled C++."""
    accumulator = _accumulator(x)
    invstd = (var.double() + eps).rsqrt().to(accumulator)
    _apply_on_cpu(x, y, mean.to(accumulator), invstd, weight, bias, activation, alpha, pool)


inference_op = operator("batch_norm_act_inference", inference_outputs, plan_inference, inference_on_cpu)


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
    activation: str,
    alpha: float,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients of x ``[N, C, height, width]``, weight and bias."""
    n, channels = pooled.shape[:2]
    dx = empty_channels_last(n, channels, height, width, pooled.dtype, pooled.device)
    return dx, torch.empty_like(weight), torch.empty_like(bias)


def plan_backward(
    dy, pooled, argmax, statistics, weight, bias, height, width, training, activation, alpha, pool, dx, dweight, dbias
) -> list[Launch]:
    """Return the launches that compute the gradients of x, weight and bias.

    ``pooled`` is x if ``pool`` is 1. ``statistics`` are those that forward used.
    """
    dy = dy.contiguous(memory_format=torch.channels_last)  # autograd may pass NCHW or expanded gradients
    shape = _Shape(dx, pool)
    num_splits, split = shape.split_rows("backward_sums")
    merge = shape.entry("merge")
    apply = f"{shape.prefix}backward_apply"
    apply_grid, apply_blocks = shape.elementwise_launch(apply, shape.num_windows)
    sums = statistics.new_empty(2, num_splits, shape.channels)
    totals = statistics.new_empty(2, shape.channels)
    reads = dict(dy=dy, x=pooled, statistics=statistics, weight=weight, bias=bias)
    numerics = {"ACTIVATION": activation, "ALPHA": alpha, "TERMS": shape.terms, "ACC": shape.acc}
    return [
        Launch(
            backward_sums_kernel,
            grid=shape.grid(num_splits, split),
            reads=reads,
            writes=dict(sums=sums),
            scalars=dict(rows=shape.rows, num_splits=num_splits),
            constants={"C": shape.channels} | split | numerics,
            num_warps=shape.entry("backward_sums")["num_warps"],
            accessed=dict(statistics=2 * shape.channels),
        ),
        Launch(
            merge_sums_kernel,
            grid=(triton.cdiv(shape.channels, merge["channels"]),),
            reads=dict(sums=sums, statistics=statistics),
            writes=dict(totals=totals, dweight=dweight, dbias=dbias),
            scalars=dict(rows=shape.rows, num_splits=num_splits),
            constants=shape.merge_constants(num_splits),
            num_warps=merge["num_warps"],
            accessed=dict(statistics=shape.channels),
        ),
        Launch(
            backward_apply_kernel,
            grid=apply_grid,
            reads=reads | dict(argmax=argmax if pool == 2 else None, totals=totals if training else None),
            writes=dict(dx=dx),
            scalars=dict(num_windows=shape.num_windows),
            constants=shape.constants | apply_blocks | {"TRAINING": training} | numerics,
            num_warps=shape.entry(apply)["num_warps"],
            accessed=dict(statistics=2 * shape.channels),
        ),
    ]


def backward_on_cpu(
    dy, pooled, argmax, statistics, weight, bias, height, width, training, activation, alpha, pool, dx, dweight, dbias
) -> None:
    """Do the work of :func:`plan_backward` in compiled C++."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    mean, _, invstd = statistics
    parameters = torch.stack((mean, weight.to(mean.dtype) * invstd, bias.to(mean.dtype)))
    sums = torch.empty(2, len(weight), dtype=torch.float64)
    tensors = dy, pooled, argmax, dx, parameters, invstd.contiguous(), sums
    cpu.call(
        "backward", dx.dtype, *tensors, ACTIVATIONS.index(activation), alpha, int(training), cpu.Shape.of(dx, pool)
    )
    dweight.copy_(sums[1] * invstd)
    dbias.copy_(sums[0])


backward_op = operator("batch_norm_act_backward", backward_outputs, plan_backward, backward_on_cpu)


def _setup_context(ctx, inputs, output) -> None:
    x, pooled, argmax, statistics, weight, bias, training, activation, alpha, pool = inputs
    ctx.settings = (*x.shape[2:], training, activation, alpha, pool)
    ctx.save_for_backward(x if pool == 1 else pooled, argmax, statistics, weight, bias)


def _backward(ctx, dy):
    # In training, dx includes the path through the statistics, which statistics_op itself does not differentiate.
    dx, dweight, dbias = backward_op(dy, *ctx.saved_tensors, *ctx.settings)
    return dx, None, None, None, dweight, dbias, None, None, None, None


def _double_backward(ctx, *gradients):
    raise RuntimeError(
        "batch_norm_act supports first derivatives only; its backward is not differentiable. "
        "Use torch.func, or unfuse_norms of cifar_fast.kernels for torch's own modules"
    )


forward_op.register_autograd(_backward, setup_context=_setup_context)
backward_op.register_autograd(_double_backward)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    activation: str = "celu",
    alpha: float = 1.0,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    pool: int = 1,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Return ``activation(BatchNorm(MaxPool(x)))``. In training, update the running statistics as torch does.

    Tensors saved for backward, with m = N * (H // pool) * (W // pool): x if ``pool`` is 1, else the pooled tensor (m C
    elements in the dtype of x) and its argmax (m C bytes); the statistics (12 C bytes), weight and bias.

    Args:
        x: ``[N, C, H, W]`` in channels_last, in float16, bfloat16, float32 or float64. N may be 0.
        weight, bias: ``[C]``, each in any of these dtypes. None means ones and zeros. Either may need no gradient.
        running_mean, running_var: ``[C]``, each in any of these dtypes. None in training: they are not tracked.
        training: whether to normalize by the statistics of the batch; otherwise by the running statistics.
        activation: none, celu, relu, gelu, gelu_tanh (GELU by the approximation with tanh) or silu.
        alpha: the parameter of CELU, above 0 and finite. The other activations ignore it.
        momentum: the weight of this batch in the running statistics. A tensor of one value is not read on the host, but
            takes additional launches.
        eps: added to the variance, above 0 and finite.
        pool: 1, or 2 for a 2 x 2 max-pool. The pool ignores an odd last row or column, as torch's does.
        num_batches_tracked: int64, one value. It is incremented in training if ``momentum`` is a number. In training it
            and the running statistics must not share memory with another argument.

    Returns:
        ``[N, C, H // pool, W // pool]`` in channels_last and in the dtype of ``x``.

    Raises:
        TypeError, ValueError: a dtype, shape or layout is not as above.
        RuntimeError: the tensors are on different devices, or on a device other than a GPU or the CPU; a second
            derivative was requested.

    Plain torch computes the result if N is 0, under the transforms of ``torch.func`` (grad, vmap, jvp and others), in
    forward-mode differentiation, in ``torch.jit.trace``, and on a CPU without a C++ compiler.
    """
    require_is_tensor("x", x, "; call unfuse_norms(model) of cifar_fast.kernels for torch.fx")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_is_tensor(name, tensor)
    plain = _needs_plain_torch(x, weight, bias)
    if not torch.jit.is_tracing():  # which warns of every look at a size
        _check(x, weight, bias, running_mean, running_var, training, eps, activation, alpha, pool, plain)
        _check_updates(x, momentum, num_batches_tracked)
    if training and not plain and not torch.compiler.is_compiling() and type(x) is Tensor:
        changed = dict(running_mean=running_mean, running_var=running_var, num_batches_tracked=num_batches_tracked)
        require_separate(dict(x=x, weight=weight, bias=bias, momentum=momentum) | changed, tuple(changed))
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    plain = plain or (native(x.device) and cpu.unavailable_reason(x.dtype) is not None)
    if plain or x.shape[0] == 0:  # Triton cannot launch an empty grid
        if training and num_batches_tracked is not None and not isinstance(momentum, Tensor):
            num_batches_tracked.add_(1)
        is_empty = not torch.jit.is_tracing() and x.shape[0] == 0
        momentum = 0.0 if is_empty else float(momentum)  # an empty batch changes no statistics
        settings = dict(training=training, alpha=alpha, momentum=momentum, eps=eps, pool=pool)
        return _plain(x, weight, bias, running_mean, running_var, activation=activation, **settings)
    if not training:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias)):
            return _evaluate_with_autograd(x, weight, bias, running_mean, running_var, eps, activation, alpha, pool)
        return inference_op(x, weight, bias, running_mean, running_var, eps, activation, alpha, pool)
    if isinstance(momentum, Tensor):
        statistics, pooled, argmax = statistics_op(x.detach(), None, None, None, True, 0.0, eps, pool)
        if running_mean is not None:
            values = x.shape[0] * (x.shape[2] // pool) * (x.shape[3] // pool)
            _update_running_statistics(running_mean, running_var, statistics, momentum, values)
    else:
        tracked = running_mean, running_var, num_batches_tracked
        statistics, pooled, argmax = statistics_op(x.detach(), *tracked, True, momentum, eps, pool)
    return forward_op(x, pooled, argmax, statistics, weight, bias, True, activation, alpha, pool)


def _needs_plain_torch(*tensors: Tensor | None) -> bool:
    """Return whether something is at work that follows torch's own operators only."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None)


def _check(
    x, weight, bias, running_mean, running_var, training, eps, activation, alpha, pool, any_layout: bool
) -> None:
    require(x.dim() == 4, ValueError, f"x must have the shape [N, C, H, W], not {list(x.shape)}")
    require(x.dtype in DTYPES, TypeError, f"x must be float16, bfloat16, float32 or float64, not {x.dtype}")
    require(isinstance(training, bool), TypeError, f"training must be a bool, not {shown(training)}")
    require(type(pool) is int and pool in (1, 2), ValueError, f"pool must be 1 or 2, not {shown(pool)}")
    message = f"activation must be one of {', '.join(ACTIVATIONS)}, not {shown(activation)}"
    require(activation in ACTIVATIONS, ValueError, message)
    for name, value in (("alpha", alpha), ("eps", eps)):
        require(isinstance(value, (int, float)), TypeError, f"{name} must be a number, not {shown(value)}")
        require(0 < value < math.inf, ValueError, f"{name} must be above 0 and finite, not {value}")
    n, channels, height, width = x.shape
    pixels = (height // pool) * (width // pool)
    message = f"x must have at least one value per channel after the pool, not the shape {list(x.shape)}"
    require(pixels > 0 and channels > 0, ValueError, message)
    message = f"Expected more than 1 value per channel when training, got input size {list(x.shape)}"  # as torch says
    require(not training or n * pixels != 1, ValueError, message)
    message = f"x must be in channels_last (torch.channels_last), but has the strides {x.stride()}"
    require(any_layout or x.is_contiguous(memory_format=torch.channels_last), ValueError, message)
    both = (running_mean is None) == (running_var is None)
    require(both, ValueError, "running_mean and running_var must both be given, or neither")
    named = {name: tensor for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
    if not training or running_mean is not None:
        named |= dict(running_mean=running_mean, running_var=running_var)
    for name, tensor in named.items():
        require_tensor(name, tensor, DTYPES, (channels,), ("x", x))
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        differentiable = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        require(not differentiable, ValueError, f"{name} must not require a gradient, which batch norm does not have")


def _check_updates(x: Tensor, momentum, num_batches_tracked) -> None:
    """Check what the update of the running statistics uses."""
    if isinstance(momentum, Tensor):
        shape = tuple(momentum.shape) if momentum.numel() == 1 else (1,)
        require_tensor("momentum", momentum, DTYPES, shape, ("x", x))
    else:
        message = f"momentum must be a number or a tensor of one value, not {shown(momentum)}"
        require(isinstance(momentum, (int, float)), TypeError, message)
    if num_batches_tracked is not None:
        require_is_tensor("num_batches_tracked", num_batches_tracked)
        shape = tuple(num_batches_tracked.shape) if num_batches_tracked.numel() == 1 else ()
        require_tensor("num_batches_tracked", num_batches_tracked, (torch.int64,), shape, ("x", x))


def _evaluate_with_autograd(
    x, weight, bias, running_mean, running_var, eps: float, activation: str, alpha: float, pool: int
) -> Tensor:
    """Compute y from the running statistics, in two passes, so that the argmax of the pool is saved for backward."""
    _, pooled, argmax = statistics_op(x.detach(), None, None, None, False, 0.0, eps, pool)
    mean, var = running_mean.double(), running_var.double()
    statistics = torch.stack((mean, var, (var + eps).rsqrt())).to(_accumulator(x)).detach()
    return forward_op(x, pooled, argmax, statistics, weight, bias, False, activation, alpha, pool)


def _plain(x, weight, bias, running_mean, running_var, **settings) -> Tensor:
    """Compute y in plain torch, with all other tensors in the dtype of the arithmetic."""
    running = running_mean, running_var
    tensors = [None if t is None else t.to(_accumulator(x)) for t in (weight, bias, *running)]
    y = batch_norm_act_reference(x, *tensors, **settings)
    for old, new in zip(running, tensors[2:]):
        if settings["training"] and old is not None and new is not None and old.dtype != new.dtype:
            old.copy_(new)
    return y


@torch.no_grad()
def _update_running_statistics(running_mean, running_var, statistics: Tensor, momentum: Tensor, values: int) -> None:
    """Update the running statistics with a momentum on the device; ``values`` is the number of values per channel."""
    mean, var = statistics[0], statistics[1] * (values / (values - 1))
    running_mean.copy_(mean * momentum + running_mean.to(mean.dtype) * (1 - momentum))
    running_var.copy_(var * momentum + running_var.to(var.dtype) * (1 - momentum))


class BatchNormAct2d(nn.BatchNorm2d):
    """Replacement of ``MaxPool2d(pool)``, ``BatchNorm2d`` and an activation by :func:`batch_norm_act`.

    It has the options and the state dict of ``torch.nn.BatchNorm2d``, and converts x to channels_last if necessary.
    Tools work if they do not replace the module, such as ``torch.optim.swa_utils.update_bn`` and
    ``torch.func.replace_all_batch_norm_modules_``. ``SyncBatchNorm.convert_sync_batchnorm`` and ``fuse_conv_bn_eval``
    would drop the pool and the activation. Such tools read ``eps``, which the module therefore does not have; the value
    is in ``epsilon``. ``unfuse_norms`` replaces the module by torch's own for them.
    """

    # torch.jit warns of a constant that does not exist.
    __constants__ = sorted({*nn.BatchNorm2d.__constants__, "epsilon"} - {"eps"})

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str = "celu",
        alpha: float = 1.0,
        pool: int = 1,
        **factory,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        self.activation, self.alpha, self.pool = activation, alpha, pool

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("epsilon" if name == "eps" else name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "eps":
            raise AttributeError(
                "BatchNormAct2d includes a max-pool and an activation. Tools that replace or fold norms drop them. "
                "Call unfuse_norms(model) of cifar_fast.kernels before such tools; the value of eps is in epsilon"
            )
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        # The choice of statistics and their update follow torch.nn.BatchNorm2d.forward.
        momentum: float | Tensor | None = self.momentum
        count = None
        tracking = self.training and self.track_running_stats
        if tracking and self.num_batches_tracked is not None:
            count = self.num_batches_tracked
            if momentum is None:  # cumulative average over all batches
                momentum = count.add_(1).double().reciprocal()
        momentum = 0.0 if momentum is None else momentum
        running = (self.running_mean, self.running_var) if tracking or not self.training else (None, None)
        training = self.training or (self.running_mean is None and self.running_var is None)
        if isinstance(x, Tensor) and x.dim() == 4 and not _needs_plain_torch(x):  # vmap knows no channels_last
            x = x.contiguous(memory_format=torch.channels_last)
        options: dict[str, Any] = dict(activation=self.activation, alpha=self.alpha, eps=self.epsilon, pool=self.pool)
        options |= dict(training=training, momentum=momentum, num_batches_tracked=count)
        return batch_norm_act(x, self.weight, self.bias, *running, **options)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.epsilon}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, activation={self.activation}, "
            f"alpha={self.alpha}, pool={self.pool}"
        )


def example_launches(
    shape: tuple[int, int, int, int],
    *,
    pool: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    activation: str = "celu",
    alpha: float = 1.0,
    direction: str,
) -> list[Launch]:
    """Return the launches of one call with x of ``shape`` ``[N, C, H, W]``, on meta tensors.

    ``direction`` is "forward" or "backward", both in training, or "inference".
    """
    x = empty_channels_last(*shape, dtype, "meta")
    weight, bias, mean, var = (torch.empty(shape[1], dtype=parameter_dtype, device="meta") for _ in range(4))
    if direction == "inference":
        inference_inputs = x, weight, bias, mean, var, 1e-5, activation, alpha, pool
        return plan_inference(*inference_inputs, inference_outputs(*inference_inputs))
    count = torch.empty((), dtype=torch.int64, device="meta")
    statistics_inputs = x, mean, var, count, True, 0.1, 1e-5, pool
    statistics, pooled, argmax = statistics_outputs(*statistics_inputs)
    launches = plan_statistics(*statistics_inputs, statistics, pooled, argmax)
    forward_inputs = x, pooled, argmax, statistics, weight, bias, True, activation, alpha, pool
    y = forward_outputs(*forward_inputs)
    if direction == "forward":
        return launches + plan_forward(*forward_inputs, y)
    saved = x if pool == 1 else pooled
    backward_inputs = (
        torch.empty_like(y),
        saved,
        argmax,
        statistics,
        weight,
        bias,
        *shape[2:],
        True,
        activation,
        alpha,
        pool,
    )
    return plan_backward(*backward_inputs, *backward_outputs(*backward_inputs))

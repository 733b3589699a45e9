"""Max-pool, batch norm and CELU as one operator, forward and backward, for channels_last tensors.

    p = maxpool(x)                       pool x pool windows, or p = x where pool is 1
    z = (p - mean) / sqrt(var + eps) * weight + bias
    y = z                                where z > 0
        alpha * (exp(z / alpha) - 1)     elsewhere

In training, mean and var are those of p over all but the channels (var biased); else the running
ones. With q = dy * y'(z), x^ the normalised p and m the number of values a channel, the gradients are

    dbias = sum q      dweight = sum q x^      dp = (q - dbias / m - x^ dweight / m) * weight / sqrt(var + eps)

and dx is dp where a window has its maximum (the first, should it have several), 0 elsewhere.

Reductions are two steps: programs reduce a stretch of rows each, and one more kernel merges their
partial results, in an order that depends on the shapes alone. Statistics are merged as (count, mean,
sum of squared deviations) by Chan, Golub and LeVeque's formula (1979), and taken of p less its first
value in the channel, so that a mean far above the deviation costs no accuracy. There are no atomics:
the same input gives the same bits. Partial results are merged in float64, which costs nothing: they are few.

Passes over memory for a tensor of S bytes after the pool: training forward reads x, and with pool 2
writes p and its argmax; then reads p and writes y. Backward reads dy and p; then reads both again and
writes dx. Everything is computed in float32 (float64 for float64) and stored in the tensors' own types.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

from kernels.launch import Launch, check_device, parameters, run

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch_norm_celu_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    alpha: float = 0.075,
    pool: int = 1,
) -> torch.Tensor:
    """The operator in plain torch; also updates the running statistics in training."""
    pooled = F.max_pool2d(x, pool) if pool > 1 else x
    normalized = F.batch_norm(pooled, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.celu(normalized, alpha)


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
def _load_pooled(x, row, channel, exists, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr):
    """The tile's pooled values, and which of each window's pixels, in rows, is the maximum."""
    if POOL == 1:
        value = tl.load(x + row.to(tl.int64) * C + channel, mask=exists, other=0.0).to(ACC)
        return value, tl.zeros_like(value).to(tl.uint8)
    else:
        out_w: tl.constexpr = W // 2
        out_hw: tl.constexpr = (H // 2) * out_w
        n, pixel = row // out_hw, row % out_hw
        corner = x + ((n * H + pixel // out_w * 2) * W + pixel % out_w * 2).to(tl.int64) * C + channel
        value = tl.load(corner, mask=exists, other=0.0).to(ACC)
        which = tl.zeros_like(value).to(tl.uint8)
        for k in tl.static_range(1, 4):
            other = tl.load(corner + ((k // 2) * W + k % 2) * C, mask=exists, other=0.0).to(ACC)
            better = (other > value) | (other != other)  # as torch: the first maximum, but the last NaN
            value = tl.where(better, other, value)
            which = tl.where(better, k, which).to(tl.uint8)
        return value, which


@triton.jit
def _expm1(t, TERMS: tl.constexpr):
    """exp(t) - 1 for t <= 0: by its series near 0, where the difference would lose the digits."""
    near = tl.maximum(t, -0.3)
    series = tl.full(t.shape, 1.0, t.dtype)
    for i in tl.static_range(TERMS):
        series = 1.0 + series * near * (1.0 / (TERMS + 1 - i))
    return tl.where(t > -0.3, series * near, tl.exp(t) - 1.0)


@triton.jit
def statistics_kernel(
    x,  # [N, H, W, C]
    pooled,  # [rows, C], written where POOL is 2
    argmax,  # uint8 [rows, C], written where POOL is 2
    means,  # [stretches, C], of each stretch, less the channel's first value
    squares,  # [stretches, C], the sum of squared deviations from it
    firsts,  # [C], the channels' first values
    rows,  # N * (H // POOL) * (W // POOL)
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    BLOCKS: tl.constexpr,  # of rows a stretch
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    stretch = tl.program_id(0)
    first_row, first_channel, first_exists = _tile(0, tl.program_id(1), 1, C, 1, BLOCK_C)
    first, _ = _load_pooled(x, first_row, first_channel, first_exists, H, W, C, POOL, ACC)
    mean = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    square = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    met = tl.zeros([1, 1], ACC)
    # Each element of the tile keeps statistics of its own (Welford, 1962), so that nothing crosses threads in the loop.
    for k in range(BLOCKS):
        row, channel, exists = _tile(stretch * BLOCKS + k, tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
        value, which = _load_pooled(x, row, channel, exists, H, W, C, POOL, ACC)
        if POOL == 2:
            offset = row.to(tl.int64) * C + channel
            tl.store(pooled + offset, value.to(pooled.dtype.element_ty), mask=exists)
            tl.store(argmax + offset, which, mask=exists)
        difference = value - first - mean
        met += 1.0
        step = difference / met
        mean = tl.where(exists, mean + step, mean)
        square = tl.where(exists, square + difference * (difference - step), square)

    start = stretch * BLOCKS * BLOCK_R
    lane = tl.arange(0, BLOCK_R)[:, None]
    here = tl.minimum(rows - start, BLOCKS * BLOCK_R)
    count = (here - lane + BLOCK_R - 1) // BLOCK_R  # rows that each lane has met
    total = tl.sum(count * mean, axis=0) / here
    total += tl.sum(count * (mean - total[None, :]), axis=0) / here  # what rounding left
    square = tl.sum(square + count * (mean - total[None, :]) * (mean - total[None, :]), axis=0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(means + stretch * C + channel, total, mask=channel < C)
    tl.store(squares + stretch * C + channel, square, mask=channel < C)
    if stretch == 0:
        tl.store(firsts + channel, tl.sum(first, axis=0), mask=channel < C)


@triton.jit
def merge_statistics_kernel(
    means,  # [stretches, C]
    squares,  # [stretches, C]
    firsts,  # [C]
    statistics,  # [3, C], written: mean, var (biased), 1 / sqrt(var + eps)
    rows,
    stretches,
    rows_per_stretch,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least the stretches
    BLOCK_C: tl.constexpr,
    EPS: tl.constexpr,
):
    stretch, channel, exists = _tile(0, tl.program_id(0), stretches, C, BLOCK_P, BLOCK_C)
    offset = stretch * C + channel
    count = tl.where(stretch < stretches, tl.minimum(rows - stretch * rows_per_stretch, rows_per_stretch), 0)
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


@triton.jit
def _channel_values(pointer, channel, C: tl.constexpr, ACC: tl.constexpr):
    return tl.load(pointer + channel, mask=channel < C, other=0.0).to(ACC)


@triton.jit
def apply_kernel(
    x,  # [N, H, W, C]
    y,  # [rows, C]
    statistics,  # [3, C]: mean, var, 1 / sqrt(var + eps)
    weight,  # [C]
    bias,  # [C]
    rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, channel, exists = _tile(tl.program_id(0), tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
    value, _ = _load_pooled(x, row, channel, exists, H, W, C, POOL, ACC)
    normalized = (value - _channel_values(statistics, channel, C, ACC)) * _channel_values(statistics + 2 * C, channel, C, ACC)
    z = normalized * _channel_values(weight, channel, C, ACC) + _channel_values(bias, channel, C, ACC)
    # Not z > 0, so that NaN takes the branch that keeps it.
    celu = tl.where(z <= 0, ALPHA * _expm1(tl.minimum(z, 0.0) / ALPHA, TERMS), z)
    tl.store(y + row.to(tl.int64) * C + channel, celu.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _gradient_of_norm(dy, x, statistics, weight, bias, row, channel, exists, ALPHA: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """q = dy * y'(z), the normalised values, and 1 / sqrt(var + eps), for a tile."""
    offset = row.to(tl.int64) * C + channel
    gradient = tl.load(dy + offset, mask=exists, other=0.0).to(ACC)
    value = tl.load(x + offset, mask=exists, other=0.0).to(ACC)
    invstd = _channel_values(statistics + 2 * C, channel, C, ACC)
    normalized = (value - _channel_values(statistics, channel, C, ACC)) * invstd
    z = normalized * _channel_values(weight, channel, C, ACC) + _channel_values(bias, channel, C, ACC)
    gradient = tl.where(z <= 0, gradient * tl.exp(tl.minimum(z, 0.0) / ALPHA), gradient)
    return gradient, normalized, invstd


@triton.jit
def backward_sums_kernel(
    dy,  # [rows, C]
    x,  # [rows, C], pooled
    statistics,  # [3, C]: mean, var, 1 / sqrt(var + eps)
    weight,  # [C]
    bias,  # [C]
    sums,  # [2, stretches, C]: of q and of q x^ over each stretch
    rows,
    stretches,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,  # of rows a stretch
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALPHA: tl.constexpr,
    ACC: tl.constexpr,
):
    stretch = tl.program_id(0)
    of_q = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    of_qx = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for k in range(BLOCKS):
        row, channel, exists = _tile(stretch * BLOCKS + k, tl.program_id(1), rows, C, BLOCK_R, BLOCK_C)
        q, normalized, _ = _gradient_of_norm(dy, x, statistics, weight, bias, row, channel, exists, ALPHA, C, ACC)
        of_q += q  # 0 where no element exists, as dy is loaded
        of_qx += q * normalized
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(sums + stretch * C + channel, tl.sum(of_q.to(tl.float64), axis=0), mask=channel < C)
    tl.store(sums + (stretches + stretch) * C + channel, tl.sum(of_qx.to(tl.float64), axis=0), mask=channel < C)


@triton.jit
def merge_sums_kernel(
    sums,  # [2, stretches, C]
    totals,  # [2, C]: the sums of q and of q x^
    dweight,  # [C]
    dbias,  # [C]
    stretches,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least the stretches
    BLOCK_C: tl.constexpr,
):
    stretch, channel, exists = _tile(0, tl.program_id(0), stretches, C, BLOCK_P, BLOCK_C)
    of_q = tl.sum(tl.load(sums + stretch * C + channel, mask=exists, other=0.0).to(tl.float64), axis=0)
    of_qx = tl.sum(tl.load(sums + (stretches + stretch) * C + channel, mask=exists, other=0.0).to(tl.float64), axis=0)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(totals + column, of_q, mask=column < C)
    tl.store(totals + C + column, of_qx, mask=column < C)
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
    rows,
    windows,  # as rows, but counting those that an odd height or width cuts short
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    POOL: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALPHA: tl.constexpr,
    ACC: tl.constexpr,
):
    window, channel, exists = _tile(tl.program_id(0), tl.program_id(1), windows, C, BLOCK_R, BLOCK_C)
    row = window
    whole = exists
    if POOL == 2:
        all_w: tl.constexpr = (W + 1) // 2
        all_hw: tl.constexpr = (H + 1) // 2 * all_w
        n, top, left = window // all_hw, window % all_hw // all_w, window % all_w
        if H % 2 + W % 2 > 0:
            whole = exists & (top < H // 2) & (left < W // 2)
            row = (n * (H // 2) + top) * (W // 2) + left
    q, normalized, invstd = _gradient_of_norm(dy, x, statistics, weight, bias, row, channel, whole, ALPHA, C, ACC)
    if TRAINING:
        q -= (_channel_values(totals, channel, C, ACC) + normalized * _channel_values(totals + C, channel, C, ACC)) / rows
    gradient = (q * (_channel_values(weight, channel, C, ACC) * invstd)).to(dx.dtype.element_ty)
    if POOL == 1:
        tl.store(dx + row.to(tl.int64) * C + channel, gradient, mask=exists)
    else:
        which = tl.load(argmax + row.to(tl.int64) * C + channel, mask=whole, other=4)
        corner = dx + ((n * H + top * 2) * W + left * 2).to(tl.int64) * C + channel
        for k in tl.static_range(4):
            inside = exists
            if H % 2 + W % 2 > 0:
                inside = exists & (top * 2 + k // 2 < H) & (left * 2 + k % 2 < W)
            tl.store(corner + ((k // 2) * W + k % 2) * C, tl.where(which == k, gradient, 0.0).to(dx.dtype.element_ty), mask=inside)


class _Shape:
    """What a planner needs to know of ``x`` before its pool: sizes, and block sizes from the checked-in table."""

    def __init__(self, x: torch.Tensor, pool: int) -> None:
        n, self.channels, height, width = x.shape
        self.rows = n * (height // pool) * (width // pool)
        self.windows = n * -(-height // pool) * -(-width // pool)
        self.double = x.dtype == torch.float64
        self.acc = tl.float64 if self.double else tl.float32
        self.power = triton.next_power_of_2(self.channels)
        self.size = {"H": height, "W": width, "C": self.channels, "POOL": pool}

    def table(self, kernel: str) -> dict[str, int]:
        return parameters(f"batch_norm_celu.{kernel}", self.power)

    def tile(self, kernel: str) -> dict[str, int]:
        entry = self.table(kernel)
        return {"BLOCK_R": entry["rows"], "BLOCK_C": min(entry["channels"], self.power)}

    def cut(self, kernel: str) -> tuple[int, int]:
        """How many stretches a reduction cuts the rows into, and how many blocks of rows each of them has."""
        entry = self.table(kernel)
        blocks = triton.cdiv(triton.cdiv(self.rows, entry["rows"]), entry["stretches"])
        return triton.cdiv(self.rows, blocks * entry["rows"]), blocks

    def grid(self, first: int, tile: dict[str, int]) -> tuple[int, int]:
        return first, triton.cdiv(self.channels, tile["BLOCK_C"])


def stretches(x: torch.Tensor, pool: int, kernel: str) -> int:
    """How many partial results a channel the reduction ``kernel`` writes: "statistics" or "backward_sums"."""
    return _Shape(x, pool).cut(kernel)[0]


def plan_statistics(
    x: torch.Tensor, pooled: torch.Tensor, argmax: torch.Tensor, partial: torch.Tensor, statistics: torch.Tensor, eps: float, pool: int
) -> list[Launch]:
    """Pool, and the ``statistics`` ``[3, C]``: mean, biased var, 1 / sqrt(var + eps). ``partial``: scratch ``[2 stretches + 1, C]``."""
    shape = _Shape(x, pool)
    count, blocks = shape.cut("statistics")
    tile = shape.tile("statistics")
    merge = shape.table("merge")
    partials = dict(means=partial[:count], squares=partial[count : 2 * count], firsts=partial[2 * count])
    return [
        Launch(
            statistics_kernel,
            shape.grid(count, tile),
            dict(x=x, pooled=pooled, argmax=argmax, **partials, rows=shape.rows),
            shape.size | tile | {"BLOCKS": blocks, "ACC": shape.acc},
            shape.table("statistics")["num_warps"],
        ),
        Launch(
            merge_statistics_kernel,
            (triton.cdiv(shape.channels, merge["channels"]),),
            dict(
                **partials,
                statistics=statistics,
                rows=shape.rows,
                stretches=count,
                rows_per_stretch=blocks * tile["BLOCK_R"],
            ),
            {"C": shape.channels, "BLOCK_P": triton.next_power_of_2(count), "BLOCK_C": merge["channels"], "EPS": eps},
            merge["num_warps"],
        ),
    ]


def plan_apply(x: torch.Tensor, y: torch.Tensor, channel_values: dict[str, torch.Tensor], alpha: float, pool: int) -> list[Launch]:
    """Normalise and activate; with ``pool`` 2, pool on the way. ``channel_values``: statistics ``[3, C]``, weight and bias ``[C]``."""
    shape = _Shape(x, pool)
    kernel = "apply" if pool == 1 else "pool_apply"
    tile = shape.tile(kernel)
    constants = shape.size | tile | {"ALPHA": alpha, "TERMS": 13 if shape.double else 7, "ACC": shape.acc}
    grid = shape.grid(triton.cdiv(shape.rows, tile["BLOCK_R"]), tile)
    return [Launch(apply_kernel, grid, dict(x=x, y=y, **channel_values, rows=shape.rows), constants, shape.table(kernel)["num_warps"])]


def plan_backward(
    dy: torch.Tensor,
    pooled: torch.Tensor,
    argmax: torch.Tensor,
    channel_values: dict[str, torch.Tensor],
    partial: torch.Tensor,
    totals: torch.Tensor,
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    training: bool,
    alpha: float,
    pool: int,
) -> list[Launch]:
    """Gradients of x, weight and bias. ``partial``: scratch ``[2, stretches, C]``; ``totals``: ``[2, C]``."""
    shape = _Shape(dx, pool)
    count, blocks = shape.cut("backward_sums")
    tile, merge, last = shape.tile("backward_sums"), shape.table("merge"), shape.tile("backward_apply")
    settings = {"ALPHA": alpha, "ACC": shape.acc}
    return [
        Launch(
            backward_sums_kernel,
            shape.grid(count, tile),
            dict(dy=dy, x=pooled, **channel_values, sums=partial, rows=shape.rows, stretches=count),
            {"C": shape.channels, "BLOCKS": blocks} | tile | settings,
            shape.table("backward_sums")["num_warps"],
        ),
        Launch(
            merge_sums_kernel,
            (triton.cdiv(shape.channels, merge["channels"]),),
            dict(sums=partial, totals=totals, dweight=dweight, dbias=dbias, stretches=count),
            {"C": shape.channels, "BLOCK_P": triton.next_power_of_2(count), "BLOCK_C": merge["channels"]},
            merge["num_warps"],
        ),
        Launch(
            backward_apply_kernel,
            shape.grid(triton.cdiv(shape.windows, last["BLOCK_R"]), last),
            dict(dy=dy, x=pooled, argmax=argmax, **channel_values, totals=totals, dx=dx, rows=shape.rows, windows=shape.windows),
            shape.size | {"TRAINING": training} | last | settings,
            shape.table("backward_apply")["num_warps"],
        ),
    ]


def _outputs(x: torch.Tensor, pool: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, pooled, argmax, statistics, uninitialised. NHWC strides, even where a size of 1 leaves them open."""
    n, channels, height, width = x.shape
    nhwc = (n, height // pool, width // pool, channels)
    kept = nhwc if pool == 2 else (0, 0, 0, 0)
    y, pooled, argmax = (
        torch.empty(size, dtype=dtype, device=x.device).permute(0, 3, 1, 2)
        for size, dtype in ((nhwc, x.dtype), (kept, x.dtype), (kept, torch.uint8))
    )
    return y, pooled, argmax, torch.empty(3, channels, dtype=_acc(x), device=x.device)


def _acc(x: torch.Tensor) -> torch.dtype:
    """The type to compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _running_statistics(x: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, eps: float) -> torch.Tensor:
    """The statistics ``[3, C]`` of evaluation."""
    mean, var = running_mean.double(), running_var.double()
    return torch.stack((mean, var, (var + eps).rsqrt())).to(_acc(x))


STRIDES = (torch.Tag.needs_exact_strides,)


@torch.library.custom_op("cifar_fast::batch_norm_celu", mutates_args=(), tags=STRIDES)
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    alpha: float,
    pool: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the pooled tensor and its argmax (empty where pool is 1), and the statistics ``[3, C]`` that were used."""
    y, pooled, argmax, statistics = _outputs(x, pool)
    partial = statistics.new_empty(2 * stretches(x, pool, "statistics") + 1, x.shape[1])
    launches = plan_statistics(x, pooled, argmax, partial, statistics, eps, pool)
    if not training:
        statistics = _running_statistics(x, running_mean, running_var, eps)
        launches = launches[: pool - 1]  # the first one pools
    launches += plan_apply(x if pool == 1 else pooled, y, dict(statistics=statistics, weight=weight, bias=bias), alpha, 1)
    run(launches, x.device)
    return y, pooled, argmax, statistics


@_forward.register_fake
def _(x, weight, bias, running_mean, running_var, training, eps, alpha, pool):
    return _outputs(x, pool)


@torch.library.custom_op("cifar_fast::batch_norm_celu_inference", mutates_args=(), tags=STRIDES)
def _inference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    alpha: float,
    pool: int,
) -> torch.Tensor:
    """y by the running statistics, in one pass."""
    y = _outputs(x, pool)[0]
    statistics = _running_statistics(x, running_mean, running_var, eps)
    run(plan_apply(x, y, dict(statistics=statistics, weight=weight, bias=bias), alpha, pool), x.device)
    return y


@_inference.register_fake
def _(x, weight, bias, running_mean, running_var, eps, alpha, pool):
    return _outputs(x, pool)[0]


@torch.library.custom_op("cifar_fast::batch_norm_celu_backward", mutates_args=(), tags=STRIDES)
def _backward(
    dy: torch.Tensor,
    pooled: torch.Tensor,
    argmax: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    height: int,
    width: int,
    training: bool,
    alpha: float,
    pool: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias."""
    dy = dy.contiguous(memory_format=torch.channels_last)  # it may arrive as NCHW, or expanded
    n, channels = pooled.shape[:2]
    dx = pooled.new_empty(n, height, width, channels).permute(0, 3, 1, 2)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    totals = statistics.new_empty(2, channels)
    partial = statistics.new_empty(2, stretches(dx, pool, "backward_sums"), channels)
    values = dict(statistics=statistics, weight=weight, bias=bias)
    run(plan_backward(dy, pooled, argmax, values, partial, totals, dx, dweight, dbias, training, alpha, pool), dy.device)
    return dx, dweight, dbias


@_backward.register_fake
def _(dy, pooled, argmax, statistics, weight, bias, height, width, training, alpha, pool):
    n, channels = pooled.shape[:2]
    return pooled.new_empty(n, height, width, channels).permute(0, 3, 1, 2), torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, _, _, training, _, alpha, pool = inputs
    _, pooled, argmax, statistics = output
    ctx.settings = (*x.shape[2:], training, alpha, pool)
    ctx.mark_non_differentiable(pooled, argmax, statistics)
    ctx.set_materialize_grads(False)  # the outputs that none uses would else get gradients of zeros
    ctx.save_for_backward(x if pool == 1 else pooled, argmax, statistics, weight, bias)


def _differentiate(ctx, dy, *unused):
    if dy is None:
        return (None,) * 9
    return *_backward(dy, *ctx.saved_tensors, *ctx.settings), *(None,) * 6


def _refuse(ctx, *gradients):
    raise RuntimeError("batch_norm_celu can be differentiated once only: its backward has no derivative of its own")


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse)


def batch_norm_celu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    alpha: float = 0.075,
    pool: int = 1,
) -> torch.Tensor:
    """``CELU(BatchNorm(MaxPool(x)))``, and in training the running statistics updated as torch does.

    What is kept for backward, with m = N * (H // pool) * (W // pool): x itself where ``pool`` is 1, else the
    pooled tensor (m C values of x's type) and the argmax (m C bytes); the statistics (12 C bytes), weight, bias.

    Args:
        x: ``[N, C, H, W]`` in channels_last; float16, bfloat16, float32 or float64.
        weight, bias: ``[C]``, of any of these types, as torch's batch norm.
        running_mean, running_var: ``[C]``, likewise; None in training keeps none.
        momentum: the share of this batch in the new running statistics (the variance unbiased).
        alpha: CELU's, above 0.
        pool: 1, or 2 for a 2 x 2 max-pool first; an odd last row or column is left out, as by torch.

    Returns:
        ``[N, C, H // pool, W // pool]`` in channels_last, of x's type.

    Raises:
        ValueError, TypeError: a shape, layout or type that is not one of these.
        RuntimeError: tensors on several devices, or on one where Triton cannot run; a second derivative.
    """
    _check(x, {"weight": weight, "bias": bias}, {"running_mean": running_mean, "running_var": running_var}, training, eps, alpha, pool)
    tensors = (x, weight, bias)
    if not training and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return _inference(x, weight, bias, running_mean, running_var, eps, alpha, pool)
    y, _, _, (mean, var, _) = _forward(x, weight, bias, running_mean, running_var, training, eps, alpha, pool)
    if training and running_mean is not None:
        m = y.numel() // y.shape[1]
        with torch.no_grad():
            running_mean.copy_(mean * momentum + running_mean.to(mean.dtype) * (1 - momentum))
            running_var.copy_(var * (m / (m - 1)) * momentum + running_var.to(var.dtype) * (1 - momentum))
    return y


def _check(
    x: torch.Tensor,
    parameters: dict[str, torch.Tensor],
    statistics: dict[str, torch.Tensor | None],
    training: bool,
    eps: float,
    alpha: float,
    pool: int,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if x.dtype not in DTYPES:
        raise TypeError(f"expected x of a floating-point type, float16 to float64, but got {x.dtype}")
    if pool not in (1, 2):
        raise ValueError(f"pool must be 1 or 2, but got {pool}")
    if not alpha > 0 or not eps > 0:
        raise ValueError(f"alpha and eps must be above 0, but got {alpha} and {eps}")
    n, channels, height, width = x.shape
    if x.numel() == 0 or height < pool or width < pool:
        raise ValueError(f"expected at least one value per channel after the pool, but got input size {list(x.shape)}")
    if training and n * (height // pool) * (width // pool) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"expected x in channels_last, but got strides {x.stride()}; see torch.channels_last")
    if (statistics["running_mean"] is None) != (statistics["running_var"] is None):
        raise ValueError("expected running_mean and running_var both, or neither")
    for name, tensor in (parameters | statistics).items():
        if tensor is None and name in statistics and training:
            continue
        if tensor is None:
            raise ValueError(f"expected {name} to be a tensor, but got None")
        if tensor.shape != (channels,) or not tensor.is_contiguous():
            raise ValueError(f"expected {name} contiguous, of size [{channels}] as x has channels, but got {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"expected {name} of a floating-point type, but got {tensor.dtype}")
        if tensor.device != x.device:
            raise RuntimeError(f"expected all tensors on one device, but x is on {x.device} and {name} on {tensor.device}")
    check_device(x.device)


class BatchNormCELU2d(nn.BatchNorm2d):
    """:func:`batch_norm_celu` as a module, in the place of ``MaxPool2d(pool)``, ``BatchNorm2d``, ``CELU(alpha)``.

    Its state dict is that of ``torch.nn.BatchNorm2d``.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, *, alpha: float = 0.075, pool: int = 1, **factory
    ) -> None:
        super().__init__(num_features, eps, momentum, **factory)
        self.alpha, self.pool = alpha, pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the plain average over all batches so far
                momentum = 1.0 / self.num_batches_tracked
        return batch_norm_celu(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            alpha=self.alpha,
            pool=self.pool,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, pool={self.pool}"

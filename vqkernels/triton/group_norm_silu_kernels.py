"""The kernels of group_norm_silu.py.

Programs work on tiles of some channels and positions of a sample. The positions of a channel are shared out in parts;
what is summed over a part is written down, and added up in a fixed order by kernels of their own.
"""

import triton
import triton.language as tl

from vqkernels.triton.arithmetic import divide, load_as, narrow


@triton.jit
def _block(
    blocks: tl.int64, sample_blocks: tl.int64, BLOCK_CHANNELS: tl.constexpr
) -> tuple[tl.int64, tl.int64, tl.int64]:
    """The sample of this program, its first channel, and its number among the `blocks` along the positions."""
    program = tl.program_id(0).to(tl.int64)
    return program // sample_blocks, program % sample_blocks // blocks * BLOCK_CHANNELS, program % blocks


@triton.jit
def _tile(
    first_channel: tl.int64,
    first_position: tl.int64,
    channels: tl.int64,
    positions: tl.int64,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The channels of a tile, along its axis of channels; which elements are inside; their places in the sample."""
    if CHANNELS_LAST:
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)[None, :]
        position = first_position + tl.arange(0, BLOCK_POSITIONS)[:, None]
        place = position * channels + channel
    else:
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)[:, None]
        position = first_position + tl.arange(0, BLOCK_POSITIONS)[None, :]
        place = channel * positions + position
    return channel, (channel < channels) & (position < positions), place


@triton.jit
def _of_channels(values: tl.tensor, channel: tl.tensor, channels: tl.int64, default: tl.constexpr) -> tl.tensor:
    """Values of channels in the type of the arithmetic, the default where there are none."""
    if values is None:
        return default
    else:
        return tl.load(values + channel, mask=channel < channels, other=0.0)


@triton.jit
def _sigmoid(h: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """sigmoid(h) and sigmoid(-h)."""
    e = tl.exp(-tl.abs(h))
    large = divide(tl.full(h.shape, 1.0, h.dtype), 1.0 + e)
    return tl.where(h < 0, e * large, large), tl.where(h < 0, large, e * large)


@triton.jit(do_not_specialize=["positions", "part_size", "parts"])
def moments_kernel(
    x: tl.tensor,  # [B, channels, positions] or [B, positions, channels]
    means: tl.tensor,  # float64 [B, parts, channels]
    squares: tl.tensor,  # float64 [B, parts, channels], sums of (x - mean)^2
    channels: tl.int64,
    positions: tl.int64,
    part_size: tl.int64,
    parts: tl.int64,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
) -> None:
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    sample, first_channel, part = _block(parts, parts * tl.cdiv(channels, BLOCK_CHANNELS), BLOCK_CHANNELS)
    x += sample * channels * positions
    last = tl.minimum((part + 1) * part_size, positions)
    mean = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    square = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    before = tl.zeros((BLOCK_CHANNELS,), tl.float64)  # positions in these
    for first in range(part * part_size, last, BLOCK_POSITIONS):
        _, inside, place = _tile(
            first_channel, first, channels, positions, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_POSITIONS
        )
        value = load_as(x + place, inside, WIDE)
        n = tl.zeros_like(before) + tl.minimum(last - first, BLOCK_POSITIONS).to(tl.float64)
        # Shares of a mean do not overflow. What the rounding of the mean leaves over is put right.
        center = tl.sum(value * tl.expand_dims((1.0 / n).to(WIDE), AXIS), axis=AXIS)
        rest = tl.where(inside, value - tl.expand_dims(center, AXIS), 0.0)
        tile_square = tl.sum(rest * rest, axis=AXIS).to(tl.float64)
        shift = tl.where(tile_square < float("inf"), tl.sum(rest, axis=AXIS).to(tl.float64) / n, 0.0)
        tile_square = tl.maximum(tile_square - shift * shift * n, 0.0, propagate_nan=tl.PropagateNan.ALL)
        d = center.to(tl.float64) + shift - mean
        mean += d * (n / (before + n))
        square += tile_square + d * d * (before * (n / (before + n)))
        before += n
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    place = (sample * parts + part) * channels + channel
    tl.store(means + place, mean, mask=channel < channels)
    tl.store(squares + place, square, mask=channel < channels)


@triton.jit
def _entries(
    group: tl.int64,
    first: tl.int64,
    groups: tl.int64,
    channels: tl.int64,
    parts: tl.int64,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Which entries [B, parts, channels] a group has: its part, channel, whether it is there, and its place."""
    group_channels = channels // groups
    i = first + tl.arange(0, BLOCK)
    part, channel = i // group_channels, group % groups * group_channels + i % group_channels
    return part, channel, part < parts, (group // groups * parts + part) * channels + channel


@triton.jit(do_not_specialize=["groups", "channels", "positions", "part_size", "parts"])
def statistics_kernel(
    means: tl.tensor,  # of moments_kernel
    squares: tl.tensor,
    mean: tl.tensor,  # [B, groups]
    rstd: tl.tensor,  # [B, groups]
    shift: tl.tensor,  # [B, groups], (mean as rounded - mean) rstd, negative: what to add to (x - mean) rstd
    groups: tl.int64,
    channels: tl.int64,
    positions: tl.int64,
    part_size: tl.int64,
    parts: tl.int64,
    eps: tl.float64,
    BLOCK: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64)
    entries = parts * (channels // groups)
    size = (channels // groups * positions).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, entries, BLOCK):
        part, _, inside, place = _entries(group, first, groups, channels, parts, BLOCK)
        n = tl.minimum(positions - part * part_size, part_size).to(tl.float64)
        total += tl.load(means + place, mask=inside, other=0.0) * (n / size)
    center = tl.sum(total, axis=0)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, entries, BLOCK):
        part, _, inside, place = _entries(group, first, groups, channels, parts, BLOCK)
        n = tl.minimum(positions - part * part_size, part_size).to(tl.float64)
        d = tl.load(means + place, mask=inside, other=0.0) - center
        total += tl.where(inside, tl.load(squares + place, mask=inside, other=0.0) + d * d * n, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(total, axis=0) / size + eps)
    rounded = center.to(mean.dtype.element_ty)
    tl.store(mean + group, rounded)
    tl.store(rstd + group, scale.to(rstd.dtype.element_ty))
    tl.store(shift + group, ((rounded.to(tl.float64) - center) * scale).to(shift.dtype.element_ty))


@triton.jit(do_not_specialize=["positions", "groups"])
def normalize_kernel(
    x: tl.tensor,  # [B, channels, positions] or [B, positions, channels]
    weight: tl.tensor,  # [channels] or None
    bias: tl.tensor,  # [channels] or None
    mean: tl.tensor,  # of statistics_kernel
    rstd: tl.tensor,
    shift: tl.tensor,
    y: tl.tensor,  # like x
    channels: tl.int64,
    positions: tl.int64,
    groups: tl.int64,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
) -> None:
    WIDE: tl.constexpr = mean.dtype.element_ty
    blocks = tl.cdiv(positions, BLOCK_POSITIONS)
    sample, first_channel, block = _block(blocks, blocks * tl.cdiv(channels, BLOCK_CHANNELS), BLOCK_CHANNELS)
    channel, inside, place = _tile(
        first_channel, block * BLOCK_POSITIONS, channels, positions, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_POSITIONS
    )
    place += sample * channels * positions
    group = tl.minimum(sample * groups + channel // (channels // groups), sample * groups + groups - 1)
    factor = _of_channels(weight, channel, channels, 1.0)
    slope = tl.load(rstd + group) * factor
    offset = tl.load(shift + group) * factor + _of_channels(bias, channel, channels, 0.0)
    h = (load_as(x + place, inside, WIDE) - tl.load(mean + group)) * slope + offset
    if SILU:
        h *= _sigmoid(h)[0]
    tl.store(y + place, narrow(h, y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of_map(
    grad: tl.tensor, d: tl.tensor, slope: tl.tensor, offset: tl.tensor, SILU: tl.constexpr
) -> tl.tensor:
    """The gradient of h = d slope + offset."""
    if SILU:
        h = d * slope + offset
        s, complement = _sigmoid(h)
        grad *= s + h * s * complement
    return grad


@triton.jit(do_not_specialize=["positions", "groups", "part_size", "parts"])
def sums_kernel(
    x: tl.tensor,  # [B, channels, positions] or [B, positions, channels]
    grad: tl.tensor,  # like x
    weight: tl.tensor,  # [channels] or None
    bias: tl.tensor,  # [channels] or None
    mean: tl.tensor,  # [B, groups]
    rstd: tl.tensor,  # [B, groups]
    gradients: tl.tensor,  # [B, parts, channels], sums of g
    products: tl.tensor,  # [B, parts, channels], sums of g (x - mean)
    channels: tl.int64,
    positions: tl.int64,
    groups: tl.int64,
    part_size: tl.int64,
    parts: tl.int64,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
) -> None:
    WIDE: tl.constexpr = mean.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    sample, first_channel, part = _block(parts, parts * tl.cdiv(channels, BLOCK_CHANNELS), BLOCK_CHANNELS)
    x += sample * channels * positions
    grad += sample * channels * positions
    last = tl.minimum((part + 1) * part_size, positions)
    total = tl.zeros((BLOCK_CHANNELS,), WIDE)
    total_product = tl.zeros((BLOCK_CHANNELS,), WIDE)
    for first in range(part * part_size, last, BLOCK_POSITIONS):
        channel, inside, place = _tile(
            first_channel, first, channels, positions, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_POSITIONS
        )
        group = tl.minimum(sample * groups + channel // (channels // groups), sample * groups + groups - 1)
        slope = tl.load(rstd + group) * _of_channels(weight, channel, channels, 1.0)
        offset = _of_channels(bias, channel, channels, 0.0)
        d = load_as(x + place, inside, WIDE) - tl.load(mean + group)
        g = _gradient_of_map(load_as(grad + place, inside, WIDE), d, slope, offset, SILU)
        total += tl.sum(g, axis=AXIS)
        total_product += tl.sum(g * d, axis=AXIS)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    place = (sample * parts + part) * channels + channel
    tl.store(gradients + place, total, mask=channel < channels)
    tl.store(products + place, total_product, mask=channel < channels)


@triton.jit(do_not_specialize=["groups", "channels", "positions", "parts"])
def group_gradients_kernel(
    gradients: tl.tensor,  # of sums_kernel
    products: tl.tensor,
    weight: tl.tensor,  # [channels] or None
    rstd: tl.tensor,  # [B, groups]
    group_shift: tl.tensor,  # [B, groups], A / n
    group_slope: tl.tensor,  # [B, groups], rstd^2 B / n
    groups: tl.int64,
    channels: tl.int64,
    positions: tl.int64,
    parts: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64)
    entries = parts * (channels // groups)
    size = (channels // groups * positions).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    total_product = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, entries, BLOCK):
        _, channel, inside, place = _entries(group, first, groups, channels, parts, BLOCK)
        slope = tl.load(rstd + group) * _of_channels(weight, channel, channels, 1.0)
        total += slope * tl.load(gradients + place, mask=inside, other=0.0).to(tl.float64)
        total_product += slope * tl.load(products + place, mask=inside, other=0.0).to(tl.float64)
    r = tl.load(rstd + group).to(tl.float64)
    tl.store(group_shift + group, (tl.sum(total, axis=0) / size).to(rstd.dtype.element_ty))
    tl.store(group_slope + group, (r * r * tl.sum(total_product, axis=0) / size).to(rstd.dtype.element_ty))


@triton.jit(do_not_specialize=["batch", "groups", "channels", "parts"])
def parameter_gradients_kernel(
    gradients: tl.tensor,  # of sums_kernel
    products: tl.tensor,
    rstd: tl.tensor,  # [B, groups]
    grad_weight: tl.tensor,  # [channels]
    grad_bias: tl.tensor,  # [channels]
    batch: tl.int64,
    groups: tl.int64,
    channels: tl.int64,
    parts: tl.int64,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    channel = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    of_weight = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float64)
    of_bias = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float64)
    for first in range(0, batch * parts, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < batch * parts)[:, None] & (channel < channels)[None, :]
        place = (row * channels)[:, None] + channel[None, :]
        group = (row // parts * groups)[:, None] + (channel // (channels // groups))[None, :]
        r = tl.load(rstd + group, mask=inside, other=0.0).to(tl.float64)
        of_weight += r * tl.load(products + place, mask=inside, other=0.0).to(tl.float64)
        of_bias += tl.load(gradients + place, mask=inside, other=0.0).to(tl.float64)
    dtype: tl.constexpr = grad_weight.dtype.element_ty
    tl.store(grad_weight + channel, tl.sum(of_weight, axis=0).to(dtype), mask=channel < channels)
    tl.store(grad_bias + channel, tl.sum(of_bias, axis=0).to(dtype), mask=channel < channels)


@triton.jit(do_not_specialize=["positions", "groups"])
def input_gradient_kernel(
    x: tl.tensor,  # [B, channels, positions] or [B, positions, channels]
    grad: tl.tensor,  # like x
    weight: tl.tensor,  # [channels] or None
    bias: tl.tensor,  # [channels] or None
    mean: tl.tensor,  # [B, groups]
    rstd: tl.tensor,  # [B, groups]
    group_shift: tl.tensor,  # of group_gradients_kernel
    group_slope: tl.tensor,
    grad_x: tl.tensor,  # like x
    channels: tl.int64,
    positions: tl.int64,
    groups: tl.int64,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
) -> None:
    WIDE: tl.constexpr = mean.dtype.element_ty
    blocks = tl.cdiv(positions, BLOCK_POSITIONS)
    sample, first_channel, block = _block(blocks, blocks * tl.cdiv(channels, BLOCK_CHANNELS), BLOCK_CHANNELS)
    channel, inside, place = _tile(
        first_channel, block * BLOCK_POSITIONS, channels, positions, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_POSITIONS
    )
    place += sample * channels * positions
    group = tl.minimum(sample * groups + channel // (channels // groups), sample * groups + groups - 1)
    slope = tl.load(rstd + group) * _of_channels(weight, channel, channels, 1.0)
    d = load_as(x + place, inside, WIDE) - tl.load(mean + group)
    g = load_as(grad + place, inside, WIDE)
    g = _gradient_of_map(g, d, slope, _of_channels(bias, channel, channels, 0.0), SILU)
    # The product is rounded as it is where the shift is summed up: a group of one element has no gradient.
    value = (g * slope - tl.load(group_shift + group)) - d * tl.load(group_slope + group)
    tl.store(grad_x + place, narrow(value, grad_x.dtype.element_ty), mask=inside)

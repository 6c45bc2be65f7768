"""The statistics of channels in jnp, and what becomes of them: a slope and a shift.

Arrays and `block` are as in channels.py.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..._numerics import accumulation_dtype, settled, widen

Block = tuple[int, int]

# -------------------------------------------------------------------------------- channels


def reduced(x: Any, groups: int, block: Block) -> tuple[int, ...]:
    """The axes of x along a channel."""
    features, trailing = block
    return (
        *range(groups, x.ndim - features - trailing),
        *range(x.ndim - trailing, x.ndim),
    )


def count_of(x: Any, groups: int, block: Block) -> Any:
    """How many elements a channel has."""
    return math.prod(x.shape[axis] for axis in reduced(x, groups, block))


def spread(channel: Any, x: Any, groups: int, block: Block) -> Any:
    """Numbers of channels in a shape that broadcasts against x."""
    features, trailing = block
    outer = x.ndim - groups - features - trailing
    lead, rest = channel.shape[:groups], channel.shape[groups:]
    return channel.reshape(lead + (1,) * outer + rest + (1,) * trailing)


def wide_count(count: Any) -> Any:
    """A number of elements as a float if it is a Python int, which may be beyond int32."""
    return float(count) if isinstance(count, int) else count


# ------------------------------------------------------------------------------ statistics


def line(low, var, scale, bias, epsilon: float, scale_factor: float) -> tuple[Any, Any]:
    """slope and shift of y = slope · (x − mean) + shift; scale and bias may be None.

    The shift takes in what rounding took from the mean, unless the slope is infinite: y is then.
    """
    # Of an infinite variance, that of channels without elements, no derivative is NaN, in jet too.
    infinite = var == jnp.inf
    slope = scale_factor * lax.rsqrt(jnp.where(infinite, 1, var) + epsilon)
    slope = jnp.where(infinite, 0, slope)
    if scale is not None:
        slope = slope * scale
    shift = -_finite(slope) * low
    return slope, shift if bias is None else bias + shift


def _finite(x) -> Any:
    """x, and 0 where it is infinite or no number."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _in_two_of_any_size(mean, offset) -> tuple[Any, Any]:
    """`in_two` of a mean that may be infinite: nothing is left then."""
    offset = settled(offset)
    total = mean + offset
    return total, jnp.where(jnp.isfinite(total), (mean - total) + offset, 0)


def merged(mean, low, var, count, average) -> tuple[Any, Any, Any]:
    """mean, low and var of all, from those of parts of which `average` makes a weighted mean.

    Chan's rule, for any number of parts at once. `count` is the number of all their elements: the
    mean is infinite where their sum is, as in jnp.
    """
    common = settled(average(mean))
    common = jnp.where(jnp.isfinite(common * count), common, common * count)
    here = jnp.isfinite(common)
    # From here on numbers are small beside the mean. The offset is what rounding left, and its
    # square is taken off at the end: devices meet for the mean and for the variance, no third time.
    apart = jnp.where(here, (mean - common) + low, 0)
    offset = _finite(average(apart))
    var = average(var + jnp.square(apart)) - _finite(jnp.square(offset))
    var = jnp.where(var < 0, 0, var)
    return *_in_two_of_any_size(common, offset), jnp.where(here, var, var + jnp.abs(common))


def statistics(x, where, block, groups, alone) -> tuple[Any, ...]:
    """mean, low and var, and under a mask the number of elements; `alone`: on a single device."""
    axes = reduced(x, groups, block)
    wide = widen(x)
    near = None
    if where:
        (mask,) = where
        count = _unmasked_count(mask, x, axes)
        some = jnp.maximum(count, 1)
    else:
        near = _near_mean(wide, axes) if alone else None

    def average(values):
        return jnp.where(mask, values, 0).sum(axes) / some if where else values.mean(axes)

    first = settled(average(wide)) if near is None else near
    # The mean of the deviations takes out what rounding left in the first mean.
    offset = average(wide - spread(first, x, groups, block))
    if near is None:
        offset = _finite(offset)  # it is not where the first mean is infinite, which then holds
    mean, low = _in_two_of_any_size(first, offset)
    if where:
        count = count + jnp.zeros_like(mean)  # sharded as x is on a mesh with explicit axes
    squares = average(jnp.square(wide - spread(mean, x, groups, block)))
    var = squares - _finite(jnp.square(low))
    var = jnp.where(var < 0, 0, var)  # a maximum has half the derivative at 0, in jet
    return (mean, low, spread_out(var, count), count) if where else (mean, low, var)


_NEAR = 64  # elements of which a number near the mean is made


def _near_mean(wide, axes) -> Any:
    """A number near the mean of every channel, that of some elements: a pass over x is spared.

    They lie apart, and the largest and the least of them are left out: neither a few numbers that
    are far from all others, nor a part of the batch that is, moves it far. It is so small beside
    the largest number that nothing overflows by it. None where the number of elements is not known.
    Over several devices those elements would have to be sent.
    """
    if not all(isinstance(wide.shape[axis], int) for axis in axes):
        return None
    taken, left = dict.fromkeys(axes, 1), _NEAR
    for axis in reversed(axes):
        taken[axis] = min(wide.shape[axis], max(left, 1))
        left //= max(taken[axis], 1)
    strides = [wide.shape[a] // taken[a] if a in taken else 1 for a in range(wide.ndim)]
    some = lax.slice(wide, [0] * wide.ndim, wide.shape, strides)
    count = math.prod(some.shape[axis] for axis in axes)
    near = some.mean(axes)
    if count > 2:
        near = (some.sum(axes) - some.max(axes) - some.min(axes)) / (count - 2)
    info = jnp.finfo(wide.dtype)
    near = settled(near)
    return jnp.where(jnp.abs(near) < info.max * info.eps / 8, near, 0)


def spread_out(var, count) -> Any:
    """The variance that makes nothing of channels without elements: an infinite one.

    Their slope is then 0, as are all derivatives of it, of any order.
    """
    return jnp.where(count > 0, var, jnp.inf)


def _unmasked_count(mask, x, axes) -> Any:
    """How many elements of every channel are unmasked; the mask has ones where it is broadcast."""
    times = math.prod(n for i, n in enumerate(x.shape) if i in axes and mask.shape[i] == 1)
    count = mask.sum(axes, dtype=accumulation_dtype(x.dtype)) * wide_count(times)
    return jnp.broadcast_to(count, [n for i, n in enumerate(x.shape) if i not in axes])

"""The layer norm of rows in jnp, and its derivatives: what the layer norm operations share.

Rows are [*G, *R, width], means [*G, *R] and parameters [*G, width], G being the group dimensions
(_rows.py). Parameters and statistics are in the accumulation type, and so are all results.
`scale` and `bias` are sequences of one parameter, or of none.

Of a row is kept its mean in two numbers, mean + low, because the rounding of a large mean would show
beside a small deviation, and inverse = 4 / √(var + ε): without the 4 it would be subnormal where the
deviation is near the largest number. The derivative of the mean is that of the first number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from ._numerics import settled, widen

INVERSE = 4.0


def layernorm(
    z: Any,
    scale: Sequence[Any],
    bias: Sequence[Any],
    epsilon: float,
    scale_factor: float,
    groups: int,
    *,
    dtype: Any,
    ordinary: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """y, mean, low and inverse of rows z, numbers of type `dtype`.

    `ordinary` promises that no square of z leaves the range of its type (`is_ordinary`), and that
    this is a computation of its own.
    """
    z = widen(z)
    # Rows are first divided by about their largest number, so that no square leaves the range. A
    # power of two does so without rounding.
    unit = None if ordinary or dtype == jnp.float16 else _unit(z, epsilon)
    if unit is not None:
        z = z * unit
        epsilon = epsilon * unit * unit
    mean = z.mean(-1, keepdims=True)
    mean = mean if ordinary else settled(mean)
    deviations = z - mean
    # What rounding left in the mean shows where it is far above the deviation.
    low = deviations.mean(-1, keepdims=True)
    var = jnp.maximum(jnp.square(deviations).mean(-1, keepdims=True) - jnp.square(low), 0)
    rstd = lax.rsqrt(var + epsilon)
    y = _affine((deviations - low) * rstd, scale, bias, scale_factor, groups)
    inverse = INVERSE * rstd
    if unit is not None:
        mean, low, inverse = mean / unit, low / unit, inverse * unit
    return y, mean[..., 0], low[..., 0], inverse[..., 0]


def is_ordinary(z: Any, epsilon: float, dtype: Any) -> Any:
    """Whether no row is large enough, or small enough, for its squares to leave the range."""
    if dtype == jnp.float16:
        return jnp.bool_(True)
    z = widen(z)
    squares = jnp.square(z).sum(-1)
    exponent = jnp.finfo(z.dtype).maxexp * 3 // 4
    ordinary = squares.sum() < 2.0**exponent
    if epsilon < 2.0**-exponent:  # what underflows beside a larger ε is nothing
        ordinary &= (squares > 2.0 ** -(exponent // 3)).all()
    return ordinary


def layernorm_jvp(
    z, mean, low, inverse, scale, dz, d_scale, d_bias, scale_factor, groups
) -> tuple[Any, Any, Any]:
    """The tangents of y, mean and inverse; those of the parameters may be None."""
    unit, *line = _normaliser(mean, low, inverse)
    x_hat = _normalised(z, unit, *line)
    d_mean, d_deviation = dz.mean(-1), (x_hat * dz).mean(-1)
    dx_hat = (dz - d_mean[..., None]) - x_hat * d_deviation[..., None]
    dy = _affine(dx_hat * unit * line[-1], scale, (), scale_factor, groups)
    if d_scale is not None:
        dy = dy + x_hat * (_to_rows(d_scale, z, groups) * scale_factor)
    if d_bias is not None:
        dy = dy + _to_rows(d_bias, z, groups)
    return dy, d_mean, -jnp.square(inverse) / INVERSE * d_deviation


def layernorm_vjp(
    z, mean, low, inverse, scale, ct_y, ct_mean, ct_inverse, scale_factor, groups
) -> tuple[Any, Any, Any]:
    """The cotangents of z, scale and bias; those of the results may be None."""
    unit, *line = _normaliser(mean, low, inverse)
    x_hat = _normalised(z, unit, *line)
    width = z.shape[-1]
    over_rows = tuple(range(groups, z.ndim - 1))
    dz = jnp.zeros_like(x_hat)
    d_scale = d_bias = None
    if ct_y is not None:
        ct_y = ct_y.astype(x_hat.dtype)
        w = _affine(ct_y, scale, (), scale_factor, groups)
        across = w.mean(-1, keepdims=True) + x_hat * (w * x_hat).mean(-1, keepdims=True)
        dz = (w - across) * unit * line[-1]
        d_scale = (ct_y * x_hat).sum(over_rows) * scale_factor
        d_bias = ct_y.sum(over_rows)
    if ct_mean is not None:
        dz = dz + (ct_mean / width)[..., None]
    if ct_inverse is not None:
        ct_deviation = -jnp.square(inverse) / INVERSE * ct_inverse
        dz = dz + x_hat * (ct_deviation / width)[..., None]
    return dz, d_scale, d_bias


# Sums over rows are left in a scratch result by at most this many elements' worth of workers for
# each parameter: enough to fill the device, and little beside the data.
_SCRATCH_ELEMENTS = 1 << 21
_MAX_WORKERS = 2048


def scratch_size(z: Any) -> int:
    """Elements of scratch for the sums over the rows of z that one parameter gradient takes."""
    width = z.shape[-1]
    rows = z.size // width
    workers = min(_MAX_WORKERS, max(1, _SCRATCH_ELEMENTS // width))
    return width * (min(workers, rows) if isinstance(rows, int) else workers)


def _to_rows(parameter: Any, like: Any, groups: int) -> Any:
    """A parameter [*G, width] in a shape that broadcasts against rows `like`."""
    lead, width = parameter.shape[:groups], parameter.shape[groups:]
    return parameter.reshape(lead + (1,) * (like.ndim - groups - 1) + width)


def _affine(x_hat: Any, scale: Sequence[Any], bias: Sequence[Any], scale_factor, groups) -> Any:
    """scale · √t · x̂ + bias. √t comes first: scale · √t may be beyond the range."""
    y = x_hat if scale_factor == 1 else x_hat * scale_factor
    for parameter in scale:
        y = y * _to_rows(parameter, x_hat, groups)
    for parameter in bias:
        y = y + _to_rows(parameter, x_hat, groups)
    return y


def _unit(z: Any, epsilon: float) -> Any:
    """A power of two for each row, near the inverse of its largest number or of √ε."""
    info = jnp.finfo(z.dtype)
    largest = jnp.max(jnp.abs(z), -1, keepdims=True, initial=math.sqrt(epsilon))
    largest = jnp.clip(largest, 4 * float(info.tiny), float(info.max) / 4)
    return 1 / lax.reduce_precision(largest, info.nexp, 0)


def _normaliser(mean: Any, low: Any, inverse: Any) -> tuple[Any, ...]:
    """unit, mean, low and 1 / deviation for rows that are multiplied by `unit` first.

    It is a power of two: 1, but where 1 / deviation comes near the ends of the range.
    """
    exponent = jnp.finfo(inverse.dtype).maxexp
    far, step = 2.0 ** (exponent * 3 // 4), 2.0 ** (exponent // 2)
    unit = jnp.where(inverse < 1 / far, 1 / step, jnp.where(inverse > far, step, 1.0))
    unit = unit.astype(inverse.dtype)
    found = unit, mean * unit, low * unit, inverse * (1 / INVERSE / unit)
    return tuple(v[..., None] for v in found)


def _normalised(z: Any, unit: Any, mean: Any, low: Any, rstd: Any) -> Any:
    """x̂ of rows, by what `_normaliser` returned."""
    return ((widen(z) * unit - mean) - low) * rstd

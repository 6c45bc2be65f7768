"""The layer norm of rows in jnp, and its derivatives.

What is kept of a row are its statistics [*G, *R, 3], the numbers shift, slope and rest by which

    x̂ = (x − mean) / √(var + ε) = (x / 4 + shift) · slope + rest.

shift = −mean / 4 for a mean that is rounded, slope = 4 / √(var + ε), and rest is what the rounding
took: beside a small deviation that of a large mean would show. By the quarters no difference from
the mean overflows, and no slope is subnormal. The derivative of rest is not counted.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from .._numerics import in_two, settled, widen
from ._norm_arithmetic import affine, by_deviation, to_rows, unit_of
from ._norm_rows import Norm


def _layernorm(
    z, scale, bias, epsilon, scale_factor, groups, divided: bool, ordinary: bool
) -> tuple[Any, Any]:
    z = widen(z)
    unit = unit_of(z, epsilon) if divided else None
    if unit is not None:
        z = z * unit
    # A maximum is no part of a multiply-add, either, and leaves XLA's fusion of a norm whole.
    rounded = _above_nothing if ordinary else settled
    mean = rounded(z.mean(-1, keepdims=True))
    deviations = z - mean
    low = deviations.mean(-1, keepdims=True)
    if not ordinary:
        mean, low = in_two(mean, low)
        deviations = z - mean
    var = jnp.square(deviations).mean(-1, keepdims=True) - jnp.square(low)
    # XLA's fusion of a norm on a CPU has no place for a select. (jet has half the derivative of a
    # maximum of equal numbers.)
    var = jnp.maximum(var, 0) if ordinary else jnp.where(var < 0, 0, var)
    shift = mean * -0.25
    if unit is not None:
        shift = shift / unit
    slope, divide = by_deviation(var, unit, epsilon)
    y = affine(divide(deviations - low), scale, bias, scale_factor, groups)
    return y, jnp.concatenate([shift, slope, divide(-low)], -1)


def _above_nothing(x: Any) -> Any:
    return jnp.maximum(x, -float(jnp.finfo(x.dtype).max))


def _jvp(z, statistics, scale, dz, d_scale, d_bias, scale_factor, groups) -> tuple[Any, Any]:
    x_hat, slope = _normalised(z, statistics), _slope(statistics)
    dz = dz * 0.25  # here: XLA would rather make the slope smaller, and then subnormal
    d_mean, d_deviation = (t.mean(-1, keepdims=True) for t in (dz, x_hat * dz))
    dx_hat = ((dz - d_mean) - x_hat * d_deviation) * slope
    dy = affine(dx_hat, scale, None, scale_factor, groups)
    if d_scale is not None:
        dy = dy + x_hat * (to_rows(d_scale, z, groups) * scale_factor)
    if d_bias is not None:
        dy = dy + to_rows(d_bias, z, groups)
    d_slope = -jnp.square(slope) * d_deviation
    return dy, jnp.concatenate([-d_mean, d_slope, jnp.zeros_like(d_slope)], -1)


def _vjp(
    z, statistics, scale, ct_y, ct_statistics, scale_factor, groups, ordinary
) -> tuple[Any, Any, Any]:
    slope = _slope(statistics)
    if ordinary:
        rstd = slope * 0.25
        x_hat = (widen(z) + statistics[..., :1] * 4) * rstd + statistics[..., 2:]
    else:
        x_hat = _normalised(z, statistics)
    width = z.shape[-1]
    over_rows = tuple(range(groups, z.ndim - 1))
    dz = jnp.zeros_like(x_hat)
    d_scale = d_bias = None
    if ct_y is not None:
        ct_y = ct_y.astype(x_hat.dtype)
        w = affine(ct_y, scale, None, scale_factor, groups)
        across = w.mean(-1, keepdims=True) + x_hat * (w * x_hat).mean(-1, keepdims=True)
        # The slope of large rows has no quarter.
        dz = (w - across) * rstd if ordinary else (w - across) * 0.25 * slope
        d_scale = (ct_y * x_hat).sum(over_rows) * scale_factor
        d_bias = ct_y.sum(over_rows)
    if ct_statistics is not None:
        ct_deviation = jnp.square(slope) * -0.25 * _slope(ct_statistics)
        dz = dz + (ct_statistics[..., :1] * -0.25 + x_hat * ct_deviation) / width
    return dz, d_scale, d_bias


def _normalised(z: Any, statistics: Any) -> Any:
    """x̂."""
    return (widen(z) * 0.25 + statistics[..., :1]) * _slope(statistics) + statistics[..., 2:]


def _slope(statistics: Any) -> Any:
    return statistics[..., 1:2]


def _is_ordinary(statistics: Any) -> Any:
    shift, slope = statistics[..., 0], statistics[..., 1]
    bound = 2.0 ** (jnp.finfo(slope.dtype).maxexp * 3 // 4)
    return (jnp.abs(shift) < bound).all() & (slope > 1 / bound).all()


CENTRED = Norm(
    statistics=3,
    slope=1,
    bias=True,
    apply=_layernorm,
    jvp=_jvp,
    vjp=_vjp,
    is_ordinary=_is_ordinary,
)

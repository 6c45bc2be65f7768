"""The RMS norm of rows in jnp, and its derivatives: a layer norm that does not centre.

What is kept of a row is its slope [*G, *R, 1], by which

    x̂ = x / √(mean(x²) + ε) = x / 4 · slope.

By the quarter no slope is subnormal.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._numerics import widen
from ._norm_arithmetic import affine, by_deviation, to_rows, unit_of, units
from ._norm_rows import Norm


def _rms_norm(
    z, scale, bias, epsilon, scale_factor, groups, divided: bool, ordinary: bool
) -> tuple[Any, Any]:
    del bias, ordinary
    z = widen(z)
    unit = unit_of(z, epsilon) if divided else None
    if unit is not None:
        z = z * unit
    slope, divide = by_deviation(jnp.square(z).mean(-1, keepdims=True), unit, epsilon)
    return affine(divide(z), scale, None, scale_factor, groups), slope


def _jvp(z, slope, scale, dz, d_scale, d_bias, scale_factor, groups) -> tuple[Any, Any]:
    del d_bias
    x_hat = _normalised(z, slope)
    dz = dz * 0.25  # here: XLA would rather make the slope smaller, and then subnormal
    d_deviation = (x_hat * dz).mean(-1, keepdims=True)
    dy = affine((dz - x_hat * d_deviation) * slope, scale, None, scale_factor, groups)
    if d_scale is not None:
        dy = dy + x_hat * (to_rows(d_scale, z, groups) * scale_factor)
    return dy, -jnp.square(slope) * d_deviation


def _vjp(
    z, slope, scale, ct_y, ct_slope, scale_factor, groups, ordinary=False
) -> tuple[Any, Any, Any]:
    x_hat = widen(z) * (slope * 0.25) if ordinary else _normalised(z, slope)
    dz = jnp.zeros_like(x_hat)
    d_scale = None
    if ct_y is not None:
        ct_y = ct_y.astype(x_hat.dtype)
        w = affine(ct_y, scale, None, scale_factor, groups)
        across = x_hat * (w * x_hat).mean(-1, keepdims=True)
        # The slope of large rows has no quarter.
        dz = (w - across) * (slope * 0.25) if ordinary else (w - across) * 0.25 * slope
        d_scale = (ct_y * x_hat).sum(tuple(range(groups, z.ndim - 1))) * scale_factor
    if ct_slope is not None:
        dz = dz + x_hat * (jnp.square(slope) * -0.25 * ct_slope) / z.shape[-1]
    return dz, d_scale, None


def _normalised(z: Any, slope: Any) -> Any:
    """x̂."""
    return widen(z) * 0.25 * slope


def over_mapped_axes(
    x: Any, axes: tuple[int, ...], where: Any, mapping: Any, *, epsilon: float, scale_factor: float
) -> Any:
    """√t · x̂ in the accumulation type, with a mask, and of rows that go on along a mapped axis.

    Mean squares are those of what `where` leaves, weighted by counts. Where it leaves nothing of a
    row the result is 0, without a derivative; nor has what is not finite under the mask. `mapping`
    is as in `golden_batch_norm`.
    """
    z = widen(x) * widen(units(x, axes, where, epsilon, mapping))
    kept, count = z, jnp.asarray(float(math.prod(x.shape[a] for a in axes)), z.dtype)
    hidden = jnp.zeros((), bool)
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
        hidden = ~(where | jnp.isfinite(z))
        kept, count = jnp.where(where, z, 0), where.sum(axes, keepdims=True).astype(z.dtype)
    total = jnp.square(kept).sum(axes, keepdims=True)
    if mapping.get("axis_name") is not None:
        name = mapping["axis_name"]
        total, count = lax.psum(
            (total, count),
            tuple(name) if isinstance(name, list) else name,
            axis_index_groups=mapping.get("axis_index_groups"),
        )
    some = count > 0
    mean_square = jnp.where(some, total / jnp.maximum(count, 1), 1)
    factor = scale_factor * lax.rsqrt(mean_square + epsilon)
    y = jnp.where(hidden, lax.stop_gradient(z * factor), jnp.where(hidden, 0, z) * factor)
    return jnp.where(some, y, 0)


def _is_ordinary(slope: Any) -> Any:
    return (slope > 2.0 ** (jnp.finfo(slope.dtype).maxexp * -3 // 4)).all()


UNCENTRED = Norm(
    statistics=1,
    slope=0,
    bias=False,
    apply=_rms_norm,
    jvp=_jvp,
    vjp=_vjp,
    is_ordinary=_is_ordinary,
)

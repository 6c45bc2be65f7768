"""The layer norm of rows in jnp, and its derivatives: what the layer norm operations share.

Rows are [*G, *R, width], means [*G, *R] and parameters [*G, width], G being the group dimensions
(_rows.py). Parameters and statistics are in the accumulation type, and so are all results.
`scale` and `bias` are sequences of one parameter, or of none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from ._numerics import widen


def layernorm(
    z: Any, scale: Sequence[Any], bias: Sequence[Any], epsilon, scale_factor, groups: int
) -> tuple[Any, Any, Any]:
    """y, the mean and 1 / √(var + ε)."""
    z = widen(z)
    mean, var = _statistics(z)
    rstd = lax.rsqrt(var + epsilon)
    y = (z - mean[..., None]) * rstd[..., None]
    if scale or scale_factor != 1:
        y = y * _slope(scale, z, groups, scale_factor)
    for b in bias:
        y = y + _to_rows(b, z, groups)
    return y, mean, rstd


def layernorm_jvp(
    z, mean, rstd, scale, dz, d_scale, d_bias, scale_factor, groups
) -> tuple[Any, Any, Any]:
    """The tangents of y, mean and rstd; those of the parameters may be None."""
    x_hat = _normalised(z, mean, rstd)
    d_mean = dz.mean(-1)
    along = rstd * (x_hat * dz).mean(-1)  # -d_rstd / rstd
    dy = (dz - d_mean[..., None]) * rstd[..., None] - x_hat * along[..., None]
    dy = dy * _slope(scale, z, groups, scale_factor)
    if d_scale is not None:
        dy = dy + x_hat * (_to_rows(d_scale, z, groups) * scale_factor)
    if d_bias is not None:
        dy = dy + _to_rows(d_bias, z, groups)
    return dy, d_mean, -rstd * along


def layernorm_vjp(
    z, mean, rstd, scale, ct_y, ct_mean, ct_rstd, scale_factor, groups
) -> tuple[Any, Any, Any]:
    """The cotangents of z, scale and bias; those of the results may be None."""
    x_hat = _normalised(z, mean, rstd)
    width = z.shape[-1]
    over_rows = tuple(range(groups, z.ndim - 1))
    dz = jnp.zeros_like(x_hat)
    d_scale = d_bias = None
    if ct_y is not None:
        ct_y = ct_y.astype(x_hat.dtype)
        w = ct_y * _slope(scale, z, groups, scale_factor)
        across = w.mean(-1, keepdims=True) + x_hat * (w * x_hat).mean(-1, keepdims=True)
        dz = rstd[..., None] * (w - across)
        d_scale = (ct_y * x_hat).sum(over_rows) * scale_factor
        d_bias = ct_y.sum(over_rows)
    if ct_mean is not None:
        dz = dz + (ct_mean / width)[..., None]
    if ct_rstd is not None:
        dz = dz - x_hat * (ct_rstd * jnp.square(rstd) / width)[..., None]
    return dz, d_scale, d_bias


def without_spread(reference: Callable[..., Sequence[Any]]) -> Callable[..., Any]:
    """Where a row has neither variance nor ε, and is divided by zero, for `checkify`.

    Of a reference whose last residual is 1 / √(var + ε).
    """

    def divides_by_zero(*operands, **params):
        *_, rstd = reference(*operands, **params | {"residuals": True})
        return jnp.isinf(rstd)

    return divides_by_zero


# Sums over rows are left in a scratch result by at most this many elements' worth of workers for
# each parameter: enough to fill the device, and little beside the data.
_SCRATCH_ELEMENTS = 1 << 21
_MAX_WORKERS = 2048


def scratch_size(z: Any) -> int:
    """Elements of scratch for the sums over the rows of z that one parameter gradient takes."""
    width = z.shape[-1]
    if not isinstance(width, int):  # a symbol of an export, which compares with no number
        return _SCRATCH_ELEMENTS + width
    rows = z.size // width
    workers = min(_MAX_WORKERS, max(1, _SCRATCH_ELEMENTS // width))
    return width * (min(workers, rows) if isinstance(rows, int) else workers)


def _to_rows(parameter: Any, like: Any, groups: int) -> Any:
    """A parameter [*G, width] in a shape that broadcasts against rows `like`."""
    lead, width = parameter.shape[:groups], parameter.shape[groups:]
    return parameter.reshape(lead + (1,) * (like.ndim - groups - 1) + width)


def _statistics(z: Any) -> tuple[Any, Any]:
    """Mean and centred second moment over the last axis, by the corrected two-pass algorithm.

    The mean of the differences takes out what rounding left in the first mean, so that rows with
    a mean far above their deviation come out right.
    """
    mean = z.mean(-1, keepdims=True)
    shift = (z - mean).mean(-1, keepdims=True)
    mean = mean + shift
    return mean[..., 0], jnp.square(z - mean).mean(-1)


def _normalised(z: Any, mean: Any, rstd: Any) -> Any:
    return (widen(z) - mean[..., None]) * rstd[..., None]


def _slope(scale: Sequence[Any], like: Any, groups: int, scale_factor: float) -> Any:
    """∂y/∂x̂: scale · √t, or √t where there is no scale."""
    return _to_rows(scale[0], like, groups) * scale_factor if scale else scale_factor

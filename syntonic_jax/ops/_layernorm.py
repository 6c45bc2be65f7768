"""The layer norm of rows in jnp, and its derivatives: what the layer norm operations share.

Rows are [*G, *R, width] and parameters [*G, width], G being the group dimensions
(_batching.py). Parameters and statistics are in the accumulation type, and so are all results.
`scale` and `bias` are parameters, or None.

What is kept of a row are its statistics [*G, *R, 3], the numbers shift, slope and rest by which

    x̂ = (x − mean) / √(var + ε) = (x / 4 + shift) · slope + rest.

shift = −mean / 4 for a mean that is rounded, slope = 4 / √(var + ε), and rest is what the rounding
took: beside a small deviation that of a large mean would show. By the quarters no difference from
the mean overflows, and no slope is subnormal. The derivative of rest is not counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._numerics import in_two, settled, widen


def layernorm(
    z: Any,
    scale: Any,
    bias: Any,
    epsilon: float,
    scale_factor: float,
    groups: int,
    dtype: Any,
    *,
    of: Any,
    one_cpu: bool = False,
) -> tuple[Any, Any]:
    """y, of type `dtype`, and the statistics of rows z, numbers of the type `of`.

    On one CPU device rows are searched for their largest numbers only if they must be. What it
    costs to look is a pass over the rows; a second form of the norm is compiled for it. Over
    several devices all would have to ask each other.
    """

    def rows(z, scale, bias, ordinary):
        divided = not ordinary and of != jnp.float16  # no number of which is too large
        y, statistics = _layernorm(z, scale, bias, epsilon, scale_factor, groups, divided, ordinary)
        return y.astype(dtype), statistics

    if not one_cpu:
        return rows(z, scale, bias, False)
    return lax.cond(
        _is_ordinary(z, epsilon),
        functools.partial(rows, ordinary=True),
        functools.partial(rows, ordinary=False),
        *(z, scale, bias),
    )


def on_cpu(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The form for a CPU of a reference that hands `one_cpu` on to `layernorm`."""

    def form(*operands, devices, **params):
        return reference(*operands, one_cpu=devices == 1, **params)

    return form


def cotangent_on_cpu(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The form for a CPU of a reference that hands `ordinary` on to `layernorm_vjp`.

    The second of what is saved are the statistics. A sum over rows takes as long there as its
    arithmetic, of which ordinary rows need less.
    """

    def form(saved, cotangents, devices, **params):
        if devices > 1:
            return reference(saved, cotangents, **params)
        shift, slope = saved[1][..., 0], saved[1][..., 1]
        bound = 2.0 ** (jnp.finfo(slope.dtype).maxexp * 3 // 4)
        return lax.cond(
            (jnp.abs(shift) < bound).all() & (slope > 1 / bound).all(),
            functools.partial(reference, ordinary=True, **params),
            functools.partial(reference, **params),
            *(saved, cotangents),
        )

    return form


def _layernorm(
    z, scale, bias, epsilon, scale_factor, groups, divided: bool, ordinary: bool
) -> tuple[Any, Any]:
    """Rows are first `divided` by about their largest number, so that no square leaves the range.

    A power of two does so without rounding. `ordinary` promises that none leaves it; for a CPU.
    """
    z = widen(z)
    unit = _unit(z, epsilon) if divided else None
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
    if unit is None:
        rstd = lax.rsqrt(var + epsilon)
        slope, rest, x_hat = 4 * rstd, -low * rstd, (deviations - low) * rstd
    elif epsilon == 0:
        shift, rstd = shift / unit, lax.rsqrt(var)
        slope, rest, x_hat = 4 * rstd * unit, -low * rstd, (deviations - low) * rstd
    else:
        # Of equal numbers ε alone is left, and beside large ones its square is not. Then it goes by
        # 1 / unit and 1 / √ε, of which the product may be out of range.
        shift = shift / unit
        # Settled, or XLA squares the constant alone: ε may be below the normal numbers.
        spread = var + jnp.square(settled(math.sqrt(epsilon) * unit))
        lost, root = spread == 0, 1 / math.sqrt(epsilon)
        rstd = jnp.where(lost, 1 / unit, lax.rsqrt(jnp.where(lost, 1, spread)))
        more = jnp.where(lost, root, 1)
        slope = jnp.where(lost, 4 * root, 4 * rstd * unit)
        rest = -low * rstd * more
        x_hat = (deviations - low) * rstd * more
    y = _affine(x_hat, scale, bias, scale_factor, groups)
    return y, jnp.concatenate([shift, slope, rest], -1)


def _above_nothing(x: Any) -> Any:
    return jnp.maximum(x, -float(jnp.finfo(x.dtype).max))


def _is_ordinary(z: Any, epsilon: float) -> Any:
    """Whether no row is large enough, or small enough, for its squares to leave the range."""
    if z.dtype == jnp.float16:
        return jnp.bool_(True)
    if 0 < epsilon < jnp.finfo(z.dtype).tiny:  # which a CPU takes for 0
        return jnp.bool_(False)
    z = widen(z)
    squares = jnp.square(z).sum(-1)
    exponent = jnp.finfo(z.dtype).maxexp * 3 // 4
    ordinary = squares.sum() < 2.0**exponent
    if epsilon < 2.0**-exponent:  # what underflows beside a larger ε is nothing
        ordinary &= (squares > 2.0 ** -(exponent // 3)).all()
    return ordinary


def layernorm_jvp(
    z, statistics, scale, dz, d_scale, d_bias, scale_factor, groups
) -> tuple[Any, Any]:
    """The tangents of y and the statistics; those of the parameters may be None."""
    x_hat, slope = _normalised(z, statistics), _slope(statistics)
    dz = dz * 0.25  # here: XLA would rather make the slope smaller, and then subnormal
    d_mean, d_deviation = (t.mean(-1, keepdims=True) for t in (dz, x_hat * dz))
    dx_hat = ((dz - d_mean) - x_hat * d_deviation) * slope
    dy = _affine(dx_hat, scale, None, scale_factor, groups)
    if d_scale is not None:
        dy = dy + x_hat * (_to_rows(d_scale, z, groups) * scale_factor)
    if d_bias is not None:
        dy = dy + _to_rows(d_bias, z, groups)
    d_slope = -jnp.square(slope) * d_deviation
    return dy, jnp.concatenate([-d_mean, d_slope, jnp.zeros_like(d_slope)], -1)


def layernorm_vjp(
    z, statistics, scale, ct_y, ct_statistics, scale_factor, groups, ordinary=False
) -> tuple[Any, Any, Any]:
    """The cotangents of z, scale and bias; those of the results may be None.

    `ordinary` promises that no mean, and no difference from it, overflows.
    """
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
        w = _affine(ct_y, scale, None, scale_factor, groups)
        across = w.mean(-1, keepdims=True) + x_hat * (w * x_hat).mean(-1, keepdims=True)
        # The slope of large rows has no quarter.
        dz = (w - across) * rstd if ordinary else (w - across) * 0.25 * slope
        d_scale = (ct_y * x_hat).sum(over_rows) * scale_factor
        d_bias = ct_y.sum(over_rows)
    if ct_statistics is not None:
        ct_deviation = jnp.square(slope) * -0.25 * _slope(ct_statistics)
        dz = dz + (ct_statistics[..., :1] * -0.25 + x_hat * ct_deviation) / width
    return dz, d_scale, d_bias


def without_spread(results: Sequence[Any]) -> Any:
    """Where a row has neither variance nor ε, and is divided by zero, for `checkify`.

    Of results the last of which are the statistics.
    """
    return jnp.isinf(_slope(results[-1]))


# Sums over rows are left in a scratch result by at most this many elements' worth of workers for
# each parameter: enough to fill the device, and little beside the data.
_SCRATCH_ELEMENTS = 1 << 21
_MAX_WORKERS = 2048
# Where rows are no whole packs of 16 bytes, workers leave sums of a few stretches more in all.
_MORE_PARTS = 7


def scratch_size(z: Any) -> int:
    """Elements of scratch for the sums over the rows of z that one parameter gradient takes."""
    width = z.shape[-1]
    if not isinstance(width, int):  # a symbol of an export, which compares with no number
        return _SCRATCH_ELEMENTS + (1 + _MORE_PARTS) * width
    rows = z.size // width
    workers = min(_MAX_WORKERS, max(1, _SCRATCH_ELEMENTS // width))
    return width * ((min(workers, rows) if isinstance(rows, int) else workers) + _MORE_PARTS)


def _to_rows(parameter: Any, like: Any, groups: int) -> Any:
    """A parameter [*G, width] in a shape that broadcasts against rows `like`."""
    lead, width = parameter.shape[:groups], parameter.shape[groups:]
    return parameter.reshape(lead + (1,) * (like.ndim - groups - 1) + width)


def _affine(x_hat: Any, scale: Any, bias: Any, scale_factor, groups) -> Any:
    """scale · √t · x̂ + bias. √t comes first: scale · √t may be beyond the range."""
    y = x_hat if scale_factor == 1 else x_hat * scale_factor
    if scale is not None:
        y = y * _to_rows(scale, x_hat, groups)
    return y if bias is None else y + _to_rows(bias, x_hat, groups)


def _unit(z: Any, epsilon: float) -> Any:
    """A power of two for each row, near the inverse of its largest number or of √ε."""
    largest = jnp.max(jnp.abs(z), -1, keepdims=True, initial=math.sqrt(epsilon))
    return 1 / lax.reduce_precision(_bounded(largest), jnp.finfo(z.dtype).nexp, 0)


def _bounded(size: Any) -> Any:
    """A size of which both it and its inverse are normal numbers."""
    info = jnp.finfo(size.dtype)
    least, most = 4 * float(info.tiny), float(info.max) / 4
    return jnp.where(size < least, least, jnp.where(size > most, most, size))


def units(x: Any, axes: tuple[int, ...], where: Any, epsilon: float, mapping: Any) -> Any:
    """Powers of two by which x leaves the range of its squares for one in which they have room.

    1 for all rows but those so large that ε is nothing beside them and, where ε is 0, those so
    small. `mapping` has the mapped axis along which rows go on, as in `golden_batch_norm`.
    """
    x = lax.stop_gradient(x)
    if x.dtype == jnp.float16:
        return jnp.ones((), x.dtype)
    size = jnp.abs(widen(x))
    largest = jnp.max(size, axes, keepdims=True, initial=0, where=True if where is None else where)
    if mapping.get("axis_name") is not None:
        groups = mapping.get("axis_index_groups")
        largest = lax.pmax(largest, mapping["axis_name"], axis_index_groups=groups)
    info = jnp.finfo(size.dtype)
    far = info.maxexp * 3 // 8
    extraordinary = largest > 2.0**far
    if epsilon == 0:
        extraordinary |= (largest < 2.0**-far) & (largest > 0)
    unit = 1 / lax.reduce_precision(jnp.where(extraordinary, _bounded(largest), 1), info.nexp, 0)
    if epsilon > 0:
        unit = jnp.where(extraordinary, unit * 2.0 ** (far // 2), unit)
    return unit.astype(x.dtype)


def _normalised(z: Any, statistics: Any) -> Any:
    """x̂."""
    return (widen(z) * 0.25 + statistics[..., :1]) * _slope(statistics) + statistics[..., 2:]


def _slope(statistics: Any) -> Any:
    return statistics[..., 1:2]

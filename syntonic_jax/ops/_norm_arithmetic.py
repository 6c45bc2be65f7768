"""What the norms of rows compute alike, in jnp, and the memory that their kernels need.

Rows are [*G, *R, width] and parameters [*G, width], as in _norm_rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._numerics import settled, widen


def affine(x_hat: Any, scale: Any, bias: Any, scale_factor, groups) -> Any:
    """scale · √t · x̂ + bias. √t comes first: scale · √t may be beyond the range."""
    y = x_hat if scale_factor == 1 else x_hat * scale_factor
    if scale is not None:
        y = y * to_rows(scale, x_hat, groups)
    return y if bias is None else y + to_rows(bias, x_hat, groups)


def to_rows(parameter: Any, like: Any, groups: int) -> Any:
    """A parameter [*G, width] in a shape that broadcasts against rows `like`."""
    lead, width = parameter.shape[:groups], parameter.shape[groups:]
    return parameter.reshape(lead + (1,) * (like.ndim - groups - 1) + width)


def by_deviation(var: Any, unit: Any, epsilon: float) -> tuple[Any, Callable[[Any], Any]]:
    """The slope of rows, and what divides their numbers by √(var + ε).

    `var` and those numbers are of rows that were multiplied by `unit` (None: by nothing), and by
    the square of it.
    """
    if unit is None:
        rstd = lax.rsqrt(var + epsilon)
        return 4 * rstd, lambda x: x * rstd
    if epsilon == 0:
        rstd = lax.rsqrt(var)
        return 4 * rstd * unit, lambda x: x * rstd
    # Of equal numbers ε alone is left, and beside large ones its square is not. Then it goes by
    # 1 / unit and 1 / √ε, of which the product may be out of range.
    # Settled, or XLA squares the constant alone: ε may be below the normal numbers.
    spread = var + jnp.square(settled(math.sqrt(epsilon) * unit))
    lost, root = spread == 0, 1 / math.sqrt(epsilon)
    rstd = jnp.where(lost, 1 / unit, lax.rsqrt(jnp.where(lost, 1, spread)))
    more = jnp.where(lost, root, 1)
    return jnp.where(lost, 4 * root, 4 * rstd * unit), lambda x: x * rstd * more


def unit_of(z: Any, epsilon: float) -> Any:
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


def is_ordinary(z: Any, epsilon: float) -> Any:
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

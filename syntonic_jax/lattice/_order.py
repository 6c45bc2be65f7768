"""Values and order of numbers a + bφ, exactly, for all coefficients that their types hold."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _fixed_point

# Of |a + bφ|, which is at least 1 / (√5 |b|) where it is not 0, these leave 66 bits exact.
_FRACTION = {4: 4, 8: 6}


def wider(x: np.dtype, y: np.dtype) -> np.dtype:
    """The one of two types that holds both."""
    return max(x, y, key=lambda dtype: dtype.itemsize)


def _whole(a: Any) -> int:
    """Limbs before the point: they hold differences of two numbers, below 5.3 · 2^(bits of a)."""
    return a.dtype.itemsize // 4 + 1


def _value(a: Any, b: Any) -> _fixed_point.Limbs:
    return _fixed_point.value(a, b, _whole(a), _FRACTION[a.dtype.itemsize])


@functools.partial(jax.jit, static_argnums=2, inline=True)
def to_float(a: Any, b: Any, dtype: np.dtype) -> jax.Array:
    """a + bφ, rounded once."""
    return _fixed_point.to_float(_value(a, b), _FRACTION[a.dtype.itemsize], dtype)


@functools.partial(jax.jit, inline=True)
def sign(a: Any, b: Any) -> jax.Array:
    """-1, 0 or 1 as int32."""
    return _fixed_point.sign(_value(a, b))


@functools.partial(jax.jit, inline=True)
def compare(a: Any, b: Any, c: Any, d: Any) -> jax.Array:
    """The sign of (a + bφ) − (c + dφ), whose coefficients may be out of range."""
    dtype = wider(a.dtype, c.dtype)
    shape = jnp.broadcast_shapes(a.shape, c.shape)
    a, b, c, d = (jnp.broadcast_to(x.astype(dtype), shape) for x in (a, b, c, d))
    return _fixed_point.sign(_fixed_point.subtract(_value(a, b), _value(c, d)))


def compare_with(a: Any, b: Any, integer: int) -> jax.Array:
    """The sign of a + bφ − `integer`, which may be any of Python's."""
    # |a + bφ| is below 2.62 · 2^(bits - 1): what is further out compares alike.
    limit = 4 << 8 * a.dtype.itemsize - 1
    limbs = _fixed_point.constant(max(-limit, min(integer, limit)), _whole(a))
    return _compare_with(a, b, limbs)


@functools.partial(jax.jit, inline=True)
def _compare_with(a: Any, b: Any, whole: _fixed_point.Limbs) -> jax.Array:
    fraction = (np.uint32(0),) * _FRACTION[a.dtype.itemsize]
    limbs = tuple(jnp.broadcast_to(limb, a.shape) for limb in (*whole, *fraction))
    return _fixed_point.sign(_fixed_point.subtract(_value(a, b), limbs))

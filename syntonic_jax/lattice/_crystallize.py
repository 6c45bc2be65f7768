"""The nearest point of the lattice a + bφ with bounded coefficients, exactly.

How it is found, and why it is the nearest, is in docs/exact-arithmetic.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _public
from .._batching import batch_elementwise
from .._compat import no_series
from .._custom_call import elementwise_call
from .._numerics import widen
from .._primitive import bind, define, forward_mode, is_zero, taylor_mode, zero_like
from ..constants import PHI
from . import _fixed_point

# ---------------------------------------------------------------------------------- public


def crystallize(
    x: ArrayLike,
    precision: int = 100,
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Every element moved to the nearest a + bφ with integers |a|, |b| ≤ precision.

    The point is exactly the nearest, in every type and also where two are almost equally near. Of
    two that are equally near the one with the smaller |b| is taken, then that with the smaller |a|.
    Non-finite elements become 0. Derivatives are straight-through: those of the identity,
    everywhere.

    Args:
      x: array of any shape; float16, bfloat16, float32 or float64.
      precision: bound of the coefficients, a Python integer from 1 to 2²⁰.
      dtype: type of the result; None: that of `x`.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      An array of the shape of `x`: a + bφ, found in integers and rounded (on a GPU with one unit
      in the last place of float32 to spare, or of float64 where `x` or the result has that type).
      `GoldenArray.from_float` returns the integers.

    Raises:
      TypeError: `x` or `dtype` is not real floating point, or `precision` not an integer.
      ValueError: `precision` is out of range, or `implementation` unknown.

    The lattice and the default precision are the original's (`find_nearest`, `snap_vector`).

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> np.asarray(crystallize(jnp.array([0.3, -1.6, 7.0, jnp.nan]), precision=2)).round(4)
    array([ 0.382 , -1.618 ,  5.2361,  0.    ], dtype=float32)
    """
    name = "crystallize"
    # jit hashes what is static and takes 1 for True: what is unusual is checked before it.
    if type(precision) is not int:
        precision = _check.precision(name, precision)
    return _crystallize(x, precision, dtype, implementation)


def snap_distance(
    x: ArrayLike, precision: int = 100, *, implementation: str | None = None
) -> jax.Array:
    """How far `crystallize` moves each element: |x − (a + bφ)|.

    Args:
      x: array of any shape; float16, bfloat16, float32 or float64.
      precision: bound of the coefficients, a Python integer from 1 to 2²⁰.
      implementation: of the search: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      An array of the shape of `x` in the accumulation type, float32 (float64 for float64). The
      difference is taken in integers and rounded once, whatever the size of `x`. Infinite where
      `x` is not finite. The derivative is that of |x − c| for the point c, which is held.

    Raises:
      TypeError: `x` is not real floating point, or `precision` not an integer.
      ValueError: `precision` is out of range, or `implementation` unknown.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> np.asarray(snap_distance(jnp.array([0.3, 1.0, 7.0, jnp.inf]), 2)).round(4)
    array([0.082 , 0.    , 1.7639,    inf], dtype=float32)
    """
    name = "snap_distance"
    if type(precision) is not int:
        precision = _check.precision(name, precision)
    return _snap_distance(x, precision, implementation)


def coefficients(
    function: str, x: Any, precision: int, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """a and b of `crystallize` as int32, for `function`, which has checked the precision."""
    _check.floating(function, x=x)
    a, b = bind(
        crystallize_p,
        jnp.asarray(x),
        precision=precision,
        dtype=None,
        implementation=implementation,
    )
    return a, b


@_public.jit("precision", "dtype", "implementation", function="crystallize")
def _crystallize(x, precision, dtype, implementation):
    precision = _check.precision("crystallize", precision)
    _dispatch.check_implementation("crystallize", implementation)
    _check.floating("crystallize", x=x)
    x = jnp.asarray(x)
    dtype = _check.result_dtype("crystallize", dtype, x.dtype)
    (y,) = bind(crystallize_p, x, precision=precision, dtype=dtype, implementation=implementation)
    return y


@_public.jit("precision", "implementation", function="snap_distance")
def _snap_distance(x, precision, implementation):
    precision = _check.precision("snap_distance", precision)
    _dispatch.check_implementation("snap_distance", implementation)
    a, b = coefficients("snap_distance", x, precision, implementation)
    x = widen(jnp.asarray(x))
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, 0)
    distance, sign = _distance(jax.lax.stop_gradient(x), a, b)
    return straight_through(jnp.where(finite, distance, jnp.inf), sign.astype(x.dtype) * x)


def straight_through(value: jax.Array, source: jax.Array) -> jax.Array:
    """`value` with the derivatives of `source`, an array of its shape and of any floating type."""
    return bind(straight_through_p, value, source, implementation=None)[0]


# ------------------------------------------------------------------------------- reference


def _reference(x, *, precision, dtype):
    a, b = _nearest(widen(x), precision, precision)
    return (a, b) if dtype is None else (_value(a, b, dtype),)


def _value(a: Any, b: Any, dtype: Any) -> Any:
    """a + bφ, rounded once. It is above 2^-22, so that of 128 bits 100 are significant."""
    return _fixed_point.to_float(_fixed_point.value(a, b, 1, 4), 4, dtype)


def _reach(precision: int) -> float:
    """Where nothing but (precision, precision) is nearest, with a little room for rounding."""
    return precision * (1 + PHI) + 2


def _distance(x: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """|x − (a + bφ)| for the nearest point, rounded once, and the sign of x − (a + bφ).

    x itself is the answer next to 0, where the point is 0, and far out, where a point below 2^22 is
    less than a quarter of its last place. Between the two x is above 2^-24, half of the smallest
    positive point of any lattice, so that 96 bits behind the point hold all of its own.
    """
    bits = 8 * x.dtype.itemsize
    word = jax.lax.bitcast_convert_type(x, f"uint{bits}")  # compilers flush subnormal floats
    magnitude = word << 1 >> 1
    size = jax.lax.bitcast_convert_type(magnitude, x.dtype)
    negative = (word != magnitude) & (magnitude != 0)  # -0 is 0
    sign = jnp.where(negative, np.int32(-1), (magnitude != 0).astype(jnp.int32))

    far = jnp.finfo(x.dtype).nmant + 24
    itself = ((a | b) == 0) | (size >= 2.0**far)
    # φ to so many bits that the error, |b| 2^(-32 fraction - 1), is far below the last place of a
    # difference of numbers that agree in all bits of x.
    whole, fraction = far // 32 + 1, x.dtype.itemsize // 2 + 2
    limbs = _fixed_point.from_float(jnp.where(itself, 0, size), whole, fraction)
    limbs = _fixed_point.select(negative, _fixed_point.negate(limbs), limbs)
    moved = _fixed_point.subtract(limbs, _fixed_point.value(a, b, whole, fraction))
    distance = _fixed_point.to_float(_fixed_point.magnitude(moved), fraction, x.dtype)
    return jnp.where(itself, size, distance), jnp.where(itself, sign, _fixed_point.sign(moved))


def _nearest(x: Any, precision: Any, bound: int) -> tuple[Any, Any]:
    """The coefficients, by refining a gap between fractional parts of multiples of φ.

    `bound` is the precision; a test gives an upper bound instead, and traces the precision.

    With B the largest b for which a may still be in range, b = B − k for 0 ≤ k < n, and
    a + bφ − x is {kφ} − w plus an integer, w being the fractional part of Bφ − x. The neighbours
    of w among the n numbers {kφ} give the lattice points on either side of x.
    """
    finite = jnp.isfinite(x)
    size = jnp.minimum(jnp.where(finite, jnp.abs(x), 0), _reach(bound))
    whole = jnp.floor(size)
    part = size - whole
    whole = whole.astype(jnp.int32)
    bits = _fixed_point.fraction_of(part, 3)

    largest, count = _range_of_b(whole, part, precision)
    golden, golden_low = _fixed_point.constant(_fixed_point.phi_inv_power(1, 64), 2)
    target = largest.astype(jnp.uint32)
    target = target * golden + _fixed_point.multiply_high(target, golden_low) - bits[0]
    below, above = _neighbours(target, count, bound)

    # {kφ} below w: the lattice point is above x.
    upper = _point(whole, part, largest - below[0], below[1], 1)
    lower = _point(whole, part, largest - above[0], above[1], -1)
    upper, lower = ((jnp.clip(a, -precision, precision), b) for a, b in (upper, lower))
    take = _upper_is_nearer(whole, bits, upper, lower, _limbs_to_compare(x.dtype, bound))
    a, b = (jnp.where(take, u, v) for u, v in zip(upper, lower))
    # No b at all: x lies beyond the lattice.
    a, b = (jnp.where(count > 0, c, precision) for c in (a, b))
    flip = jnp.where(x < 0, np.int32(-1), np.int32(1)) * finite.astype(jnp.int32)
    return flip * a, flip * b


def _range_of_b(whole: Any, part: Any, precision: int) -> tuple[Any, Any]:
    """The largest b, and how many there are, with x − bφ within ±(precision + 1/2).

    In units of 2^-9: a point that is half a unit away is never the nearest where there is another,
    so that ends may be off by a little.
    """
    golden = np.uint32(_fixed_point.phi_inv_power(1, 32))

    def over_phi(x):
        return (_fixed_point.multiply_high(x.astype(jnp.uint32), golden) >> 9).astype(jnp.int32)

    half = (part * 512).astype(jnp.int32)
    largest = jnp.minimum(over_phi((whole + precision) * 512 + half + 256), precision)
    least = (whole - precision) * 512 + half - 256
    least = jnp.where(least >= 0, over_phi(least) + 1, -over_phi(-least))
    return largest, largest - least + 1


@functools.cache
def _levels(precision: int) -> list[tuple[int, int, int]]:
    """(m, F(m), φ^-m in units of 2^-32) for as many m as refine the gaps of this precision."""
    most = math.floor((2 * precision + 1) / PHI) + 2  # values of b
    levels, (f, g) = [], (1, 2)
    while f < most:
        m = len(levels) + 2
        levels.append((m, f, _fixed_point.phi_inv_power(m, 32)))
        f, g = g, f + g
    return levels


def _neighbours(target: Any, count: Any, precision: int) -> tuple[Any, Any]:
    """((k, w − {kφ}), (k, {kφ} − w)) of the numbers next to w among the first `count`.

    Level m refines a gap of F(m) numbers by the one with an index from F(m) to F(m+1): it lies
    φ^-m above the lower end for odd m, below the upper end for even m.
    """
    zero = jnp.zeros_like(target, jnp.int32)
    below, above = (zero, target), (zero, ~target)  # {0} = 0, which is also 1
    for m, step, length in _levels(precision):
        near, far = (below, above) if m % 2 else (above, below)
        index, distance = near
        length = np.uint32(length)
        beyond = distance >= length
        inside = index + step < count
        new = index + step, jnp.where(beyond, distance - length, length - distance)
        near = tuple(jnp.where(inside & beyond, n, o) for n, o in zip(new, near))
        far = tuple(jnp.where(inside & ~beyond, n, o) for n, o in zip(new, far))
        below, above = (near, far) if m % 2 else (far, near)
    return below, above


def _point(whole: Any, part: Any, b: Any, distance: Any, side: int) -> tuple[Any, Any]:
    """(a, b) of the point that lies `distance` from x: a is x − bφ ± distance, an integer."""
    size = jnp.abs(b).astype(jnp.uint32)
    golden = np.uint32(_fixed_point.phi_inv_power(1, 32))
    integer = _fixed_point.multiply_high(size, golden).astype(jnp.int32)
    fraction = _as_float(size * golden)
    negative = b < 0
    a = whole - b - jnp.where(negative, -integer, integer)
    rest = part.astype(jnp.float32) + side * _as_float(distance)
    rest = rest - jnp.where(negative, -fraction, fraction)
    return a + jnp.round(rest).astype(jnp.int32), b


def _as_float(fraction: Any) -> Any:
    """A limb behind the point, to 16 bits, which is far more than an integer needs."""
    return (fraction >> 16).astype(jnp.float32) * np.float32(2.0**-16)


def _limbs_to_compare(dtype: Any, precision: int) -> int:
    """How many limbs decide which of two points is nearer.

    x is a multiple of 1/T. 2x and the sum A + Bφ of the points differ by at least 0.38 / (T² |B|)
    if they differ at all, and in L limbs by no more than |B| 2^-(32 L + 1) less than that.
    """
    least = 0.19 / precision  # half of the smallest positive point
    scale = jnp.finfo(dtype).nmant - math.floor(math.log2(least)) - 1  # log2(T) of 2x
    bits = 2 * math.log2(2 * precision) + 2 * scale - math.log2(0.38) - 1
    return max(3, math.ceil(bits / 32))


def _upper_is_nearer(whole: Any, bits: Any, upper: Any, lower: Any, fraction: int) -> Any:
    zero = jnp.zeros_like(bits[0])
    x = (whole.astype(jnp.uint32), *bits, *(zero,) * (fraction - len(bits)))
    total = _fixed_point.value(upper[0] + lower[0], upper[1] + lower[1], 1, fraction)
    difference = _fixed_point.subtract(_fixed_point.add(x, x), total)
    # Equally near: b and -b, so that |a| decides, and x is not negative.
    tie = _fixed_point.is_zero(difference) & (upper[0] < lower[0])
    return (_fixed_point.sign(difference) > 0) | tie


# ------------------------------------------------------------------------------ primitives


def _kernel(x, *, precision, dtype, devices):
    if x.size == 0:
        return _reference(x, precision=precision, dtype=dtype)
    results = {"a": jnp.int32, "b": jnp.int32} if dtype is None else {"y": dtype}
    return elementwise_call("syntonic_crystallize", {"x": x}, results, precision=precision)


# `dtype` is that of the value; None asks for the coefficients instead.
crystallize_p = define("crystallize", _reference, operation="crystallize", kernel=_kernel)

straight_through_p = define(
    "straight_through", lambda value, source: (value,), operation="crystallize"
)

# ----------------------------------------------------------------------------------- rules


def _jvp(primals, tangents, *, dtype, **params):
    results = bind(crystallize_p, *primals, dtype=dtype, **params)
    if dtype is None:
        return results, [zero_like(r) for r in results]
    return results, [tangents[0].astype(dtype)]


def _taylor(primals, series, *, dtype, **params):
    results = bind(crystallize_p, *primals, dtype=dtype, **params)
    if dtype is None:
        return results, [no_series] * 2
    return results, [[term.astype(dtype) for term in series[0]]]


forward_mode(crystallize_p, _jvp)
taylor_mode(crystallize_p, _taylor)
batch_elementwise(crystallize_p)


def _straight_through_jvp(primals, tangents, **params):
    (value,), tangent = bind(straight_through_p, *primals, **params), tangents[1]
    return [value], [zero_like(value) if is_zero(tangent) else tangent.astype(value.dtype)]


def _straight_through_taylor(primals, series, **params):
    (value,) = bind(straight_through_p, *primals, **params)
    return [value], [[term.astype(value.dtype) for term in series[1]]]


forward_mode(straight_through_p, _straight_through_jvp)
taylor_mode(straight_through_p, _straight_through_taylor)
batch_elementwise(straight_through_p)

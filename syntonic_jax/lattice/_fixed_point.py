"""Fixed-point numbers of as many 32-bit limbs as it takes, for what must be exact.

Without x64 jax has no integer above 32 bits, and XLA may contract a product and a sum, which no
pair of floats survives. Wrapping uint32 arithmetic means the same everywhere. A number is a tuple
of uint32 arrays, the most significant first, in two's complement; how many of its limbs are behind
the binary point is for the caller to know.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

Limbs = tuple[Any, ...]


@functools.cache
def phi_inv_power(exponent: int, bits: int) -> int:
    """φ^-exponent · 2^bits, rounded to nearest: φ^-m = (-1)^m (F(m+1) - F(m) φ)."""
    # φ^-m is a difference of numbers of the size of φ^m: so many more bits, and some.
    guard = 2 * exponent + 16
    phi = (1 << bits + guard) + math.isqrt(5 << 2 * (bits + guard)) >> 1
    f, g = 0, 1
    for _ in range(exponent):
        f, g = g, f + g
    power = (g << bits + guard) - f * phi
    return (abs(power) + (1 << guard - 1)) >> guard


def constant(value: int, limbs: int) -> Limbs:
    """A Python integer as limbs; NumPy scalars, which weigh nothing until they are used."""
    return tuple(np.uint32(value >> 32 * i & 0xFFFFFFFF) for i in reversed(range(limbs)))


def from_int(x: Any, limbs: int) -> Limbs:
    """A signed integer array."""
    own = (x.astype(jnp.uint32),)
    if x.dtype.itemsize == 8:
        own = ((x >> 32).astype(jnp.uint32), *own)
    fill = jnp.where(x < 0, np.uint32(0xFFFFFFFF), np.uint32(0))
    return (fill,) * (limbs - len(own)) + own


def multiply_high(x: Any, y: Any) -> Any:
    """The upper half of a product of two uint32."""
    x_low, x_high, y_low, y_high = x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16
    cross, other = x_low * y_high, x_high * y_low
    middle = (x_low * y_low >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    return x_high * y_high + (cross >> 16) + (other >> 16) + (middle >> 16)


def add(x: Limbs, y: Limbs) -> Limbs:
    """The sum, modulo its leading limb."""
    return _add_with_carry(x, y, np.uint32(0))


def negate(x: Limbs) -> Limbs:
    """The difference of 0 and x."""
    zero = jnp.zeros_like(x[-1])
    return _add_with_carry(tuple(~limb for limb in x), (zero,) * len(x), np.uint32(1))


def subtract(x: Limbs, y: Limbs) -> Limbs:
    """The difference, modulo its leading limb."""
    return _add_with_carry(x, tuple(~limb for limb in y), np.uint32(1))


def _add_with_carry(x: Limbs, y: Limbs, carry: Any) -> Limbs:
    result = []
    for a, b in zip(reversed(x), reversed(y), strict=True):
        partial = a + b
        total = partial + carry
        carry = ((partial < a) | (total < partial)).astype(jnp.uint32)
        result.append(total)
    return tuple(reversed(result))


def multiply(x: Limbs, y: Limbs) -> Limbs:
    """The whole product of two numbers without sign."""
    size = len(x) + len(y)
    zero = jnp.zeros_like(x[0] * y[0])
    result = (zero,) * size
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            term = [zero] * size
            term[i + j], term[i + j + 1] = multiply_high(a, b), a * b
            result = add(result, tuple(term))
    return result


def select(condition: Any, x: Limbs, y: Limbs) -> Limbs:
    """x where the condition holds, else y."""
    return tuple(jnp.where(condition, a, b) for a, b in zip(x, y, strict=True))


def is_negative(x: Limbs) -> Any:
    """Whether the sign bit is set."""
    return x[0] >> 31 != 0


def is_zero(x: Limbs) -> Any:
    """Whether no bit is set."""
    return functools.reduce(lambda a, b: a | b, x) == 0


def magnitude(x: Limbs) -> Limbs:
    """|x|, without sign."""
    return select(is_negative(x), negate(x), x)


def value(a: Any, b: Any, whole: int, fraction: int) -> Limbs:
    """a + bφ for integer arrays, in `whole` limbs before the point and `fraction` behind it.

    It errs by at most |b| / 2 units of the last limb, the rounding of φ.
    """
    # a + b + b/φ, which keeps the constant below 1.
    words = b.dtype.itemsize // 4
    product = multiply(
        magnitude(from_int(b, words)), constant(phi_inv_power(1, 32 * fraction), fraction)
    )
    product = (jnp.zeros_like(product[0]),) * (whole - words) + product
    product = select(b < 0, negate(product), product)
    integer = add(from_int(a, whole), from_int(b, whole))
    return add((*integer, *(jnp.zeros_like(integer[0]),) * fraction), product)


def sign(x: Limbs) -> Any:
    """-1, 0 or 1 as int32."""
    positive = jnp.where(is_zero(x), np.int32(0), np.int32(1))
    return jnp.where(is_negative(x), np.int32(-1), positive)


def fraction_of(x: Any, limbs: int) -> Limbs:
    """The bits behind the point of floats in [0, 1). Every step is exact."""
    result = []
    for _ in range(limbs):
        # Halves: not every backend converts floats above the range of int32 to uint32.
        word = np.uint32(0)
        for _ in range(2):
            x = x * 65536
            whole = jnp.floor(x)
            x = x - whole
            word = (word << 16) + whole.astype(jnp.uint32)
        result.append(word)
    return tuple(result)


def from_float(x: Any, whole: int, fraction: int) -> Limbs:
    """Floats from 0 to below 2^(32 whole), of which no more than 96 bits behind the point count."""
    integer = jnp.floor(x)
    limbs = fraction_of(integer * 2.0 ** (-32 * whole), whole) + fraction_of(x - integer, 3)
    return limbs + (jnp.zeros_like(limbs[0]),) * (fraction - 3)


def to_float(x: Limbs, fraction: int, dtype: Any) -> Any:
    """x rounded once, to nearest even, to a floating type."""
    negative, limbs = is_negative(x), magnitude(x)
    exponent = jnp.full(limbs[0].shape, 32 * (len(limbs) - fraction), jnp.int32)
    for _ in range(len(limbs) - 1):  # a leading limb that is not zero
        empty = limbs[0] == 0
        limbs = select(empty, (*limbs[1:], jnp.zeros_like(limbs[0])), limbs)
        exponent = exponent - jnp.where(empty, np.int32(32), np.int32(0))
    # A leading bit that is not zero: x = 0.1… · 2^exponent.
    shift = lax.clz(limbs[0])
    limbs = tuple(
        (high << shift) | (low >> 1 >> (31 - shift))
        for high, low in zip(limbs, (*limbs[1:], jnp.zeros_like(limbs[0])))
    )
    exponent = exponent - shift.astype(jnp.int32)
    if dtype == jnp.float64:
        mantissa = (limbs[0].astype(jnp.uint64) << 21) | (limbs[1] >> 11).astype(jnp.uint64)
        mantissa = _rounded(mantissa, limbs[1] & 0x7FF, 1 << 10, limbs[2:]).astype(jnp.float64)
        result = mantissa * power_of_two(exponent - 53, jnp.float64)
    else:
        mantissa, rest = limbs[0] >> 8, limbs[0] & 0xFF
        if dtype == jnp.float32:
            mantissa = _rounded(mantissa, rest, 1 << 7, limbs[1:])
        else:
            # To odd: a second rounding, to 16 bits, then comes out like a single one.
            inexact = (rest != 0) | ~is_zero((*limbs[1:], jnp.zeros_like(rest)))
            mantissa = mantissa | inexact.astype(jnp.uint32)
        result = mantissa.astype(jnp.float32) * power_of_two(exponent - 24, jnp.float32)
    return jnp.where(negative, -result, result).astype(dtype)


def _rounded(mantissa: Any, rest: Any, half: int, below: Sequence[Any]) -> Any:
    """`mantissa`, one more where what is cut off is above half, or is half and it is odd."""
    more = ~is_zero(tuple(below)) if below else False
    odd = (mantissa & 1) != 0
    up = (rest > half) | ((rest == half) & (more | odd))
    return mantissa + up.astype(mantissa.dtype)


def power_of_two(exponent: Any, dtype: Any) -> Any:
    """2^exponent within the normal range, by its bits."""
    if dtype == jnp.float64:
        return lax.bitcast_convert_type((exponent.astype(jnp.int64) + 1023) << 52, jnp.float64)
    return lax.bitcast_convert_type((jnp.clip(exponent, -126, 127) + 127) << 23, jnp.float32)

"""Precision shared by the jnp references."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def accumulation_dtype(dtype: Any) -> np.dtype:
    """The type of statistics, sums and transcendentals: float64 for float64, float32 for others."""
    return np.dtype(np.float64 if dtype == jnp.float64 else np.float32)


def widen(x: Any) -> Any:
    """`x` in its accumulation type."""
    return x.astype(accumulation_dtype(x.dtype))


def settled(x: Any) -> Any:
    """`x` to one bit less than its type has: a number that is the same wherever it is used.

    XLA computes a sum / n anew in every fusion that uses it, in some of them without rounding the
    quotient (as part of a fused multiply-add). Nothing is fused across this, nor is it dropped.
    """
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant - 1)


def in_two(mean: Any, offset: Any) -> tuple[Any, Any]:
    """mean + offset, of which the first is a settled number, as a rounded sum and what it left."""
    offset = settled(offset)
    total = mean + offset
    return total, (mean - total) + offset


def round_to(x: Any, dtype: Any) -> Any:
    """`x` rounded to the values of `dtype`, kept in its own type.

    A round trip through a 16-bit type would say the same, but XLA may drop it.
    """
    if dtype not in (jnp.float16, jnp.bfloat16):
        return x
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if dtype == jnp.float16:
        # XLA's reduce_precision flushes float16's subnormals: multiples of 2**-24.
        spacing = 2.0**-24
        subnormal = lax.round(x / spacing, lax.RoundingMethod.TO_NEAREST_EVEN) * spacing
        subnormal = x + lax.stop_gradient(subnormal - x)  # exact; the derivative is that of x
        rounded = jnp.where(jnp.abs(x) < float(info.tiny), subnormal, rounded)
    return rounded

"""What counts as an integer or a real number where it is static: all that jax takes for one."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def integer(value: Any) -> int | None:
    """An integer of Python, of NumPy or in an array without axes; None for anything else.

    Booleans are none, and what is traced has no value yet.
    """
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real(value: Any) -> float | None:
    """A real number of Python, of NumPy or in an array without axes; None for anything else.

    What is beyond every float is infinite.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        if isinstance(value, jax.core.Tracer) or not isinstance(
            value, np.generic | np.ndarray | jax.Array
        ):
            return None
        numeric = jnp.issubdtype(value.dtype, np.floating) or jnp.issubdtype(
            value.dtype, np.integer
        )
        if value.ndim or not numeric:
            return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def positive(value: Any) -> float | None:
    """A real number that is positive and finite; None for anything else."""
    number = real(value)
    return number if number is not None and 0 < number < math.inf else None

"""Argument checks. A message names the function, the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .constants import PHI_INV

_TARGET_VARIANCES = {"golden": PHI_INV, "standard": 1.0}
_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def floating(function: str, **arrays: Any) -> None:
    """Raises TypeError unless every argument is an array (or scalar) of real floating point."""
    for name, x in arrays.items():
        if not isinstance(x, _ARRAY_LIKE) and not hasattr(x, "__jax_array__"):
            raise TypeError(f"{function}: {name} must be an array, got {type(x).__name__}")
        dtype = jnp.result_type(x)
        if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
            raise TypeError(
                f"{function}: {name} must be float16, bfloat16, float32 or float64, got {dtype}"
            )


def same_shape(function: str, **arrays: Any) -> None:
    """Raises ValueError unless the two arrays have one shape: operations do not broadcast."""
    (first, x), (second, y) = arrays.items()
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(
            f"{function}: {first} and {second} must have the same shape, "
            f"got {jnp.shape(x)} and {jnp.shape(y)}"
        )


def parameter(function: str, shape: Sequence[int], **arrays: Any) -> None:
    """Raises ValueError unless every argument that is not None has the parameter shape `shape`."""
    for name, x in arrays.items():
        if x is not None and jnp.shape(x) != tuple(shape):
            raise ValueError(
                f"{function}: {name} must have shape {tuple(shape)}, got {jnp.shape(x)}"
            )


def result_dtype(function: str, dtype: Any, default: Any) -> np.dtype:
    """The dtype of y: `default`, or the floating type asked for, as jax would take it."""
    if dtype is None:
        return np.dtype(default)
    asked = jnp.dtype(dtype)
    if asked not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(
            f"{function}: dtype must be float16, bfloat16, float32 or float64, got {asked}"
        )
    # float64 without x64 becomes float32 with jax's own warning.
    return np.dtype(jax.eval_shape(lambda: jnp.zeros((), asked)).dtype)


def epsilon(function: str, value: Any) -> float:
    """The float `value`; raises TypeError or ValueError unless it is a finite number >= 0."""
    number = _python_number(function, "epsilon", value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{function}: epsilon must be finite and not negative, got {value!r}")
    return number


def _python_number(function: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(
            f"{function}: {name} must be a Python number, which is static under jit, "
            f"got {type(value).__name__}"
        )
    return float(value)


def scale_factor(function: str, target_variance: Any) -> float:
    """The square root of a target variance: 'golden', 'standard' or a positive number.

    Raises TypeError for what is none of these (an array, say), ValueError for another string or
    a number that is not positive and finite.
    """
    if isinstance(target_variance, str):
        if target_variance not in _TARGET_VARIANCES:
            raise ValueError(
                f"{function}: target_variance must be 'golden', 'standard' or a positive float, "
                f"got {target_variance!r}"
            )
        return math.sqrt(_TARGET_VARIANCES[target_variance])
    number = _python_number(function, "target_variance", target_variance)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(
            f"{function}: target_variance must be 'golden', 'standard' or a positive float, "
            f"got {target_variance!r}"
        )
    return math.sqrt(number)

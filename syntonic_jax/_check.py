"""Argument checks. A message names the function, the argument, what was expected and what came.

Public functions check arguments where they are traced, so that an eager call costs one frame of
Python beside jit's own dispatch. Before it they check only modes, numbers and axes of another than
the usual type: jit could not hash them, or would take 1.0 for 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .modes import GoldenNormMode

_SCALE_FACTORS = {name: GoldenNormMode(name).scale_factor for name in GoldenNormMode.VARIANCES}
_FLOATING = tuple(map(jnp.dtype, ("float16", "bfloat16", "float32", "float64")))
MAX_PRECISION = 2**20  # beyond it the search of a lattice point would need wider integers
_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def floating(function: str, **arrays: Any) -> None:
    """Raises TypeError unless every argument is an array (or scalar) of real floating point."""
    for name, x in arrays.items():
        if not isinstance(x, _ARRAY_LIKE) and not hasattr(x, "__jax_array__"):
            raise TypeError(f"{function}: {name} must be an array, got {type(x).__name__}")
        dtype = jnp.result_type(x)
        if dtype not in _FLOATING:
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


def static_axes(function: str, value: Any) -> int | tuple[int, ...]:
    """One axis or several, for jit's cache, to which 1, 1.0 and True would be the same."""
    entries = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(map(_is_integer, entries)):
        raise TypeError(f"{function}: axis must be an integer or a sequence of them, got {value!r}")
    return tuple(map(int, entries)) if isinstance(value, Sequence) else int(value)


def axes(function: str, value: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Axis numbers of an array of `ndim` axes, from one or several, in increasing order."""
    entries = value if isinstance(value, tuple) else (value,)
    found = [axis(function, entry, ndim, value) for entry in entries]
    if len(set(found)) != len(found):
        raise ValueError(f"{function}: axis must not name an axis twice, got {value!r}")
    return tuple(sorted(found))


def integer_axis(function: str, value: Any) -> int:
    """One axis, which is to be static; TypeError unless it is an integer."""
    if type(value) is int:  # at once: an eager call waits for this
        return value
    if not _is_integer(value):
        raise TypeError(f"{function}: axis must be an integer, got {value!r}")
    return int(value)


def axis(function: str, entry: int, ndim: int, value: Any = None) -> int:
    """The number of one axis of an array of `ndim` axes; `value` is what a message cites."""
    if not -ndim <= entry < ndim:
        raise ValueError(
            f"{function}: axis must lie between {-ndim} and {ndim - 1} for an array of "
            f"{ndim} axes, got {entry if value is None else value!r}"
        )
    return int(entry) % ndim


def broadcasts(function: str, shape: Sequence[Any], of: str, **arrays: Any) -> None:
    """Raises ValueError unless every argument broadcasts to `shape`, that of the argument `of`."""
    for name, x in arrays.items():
        try:
            fits = jnp.broadcast_shapes(jnp.shape(x), shape) == tuple(shape)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{function}: {name} must broadcast to the shape {tuple(shape)} of {of}, "
                f"got {jnp.shape(x)}"
            )


def mask(
    function: str, where: Any, shape: Sequence[Any], of: str = "x", broadcast: bool = True
) -> jax.Array:
    """`where` as a boolean array of `shape`; TypeError or ValueError if it does not fit.

    Without `broadcast` it keeps the shape that it has.
    """
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"{function}: where must be boolean, got {where.dtype}")
    broadcasts(function, shape, of, where=where)
    return jnp.broadcast_to(where, shape) if broadcast else where


def labels(function: str, value: Any, shape: Sequence[Any], classes: Any) -> jax.Array:
    """Integer labels of `shape` as int32, with −1 for what is none of the classes."""
    if not isinstance(value, _ARRAY_LIKE) and not hasattr(value, "__jax_array__"):
        raise TypeError(f"{function}: labels must be an array, got {type(value).__name__}")
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{function}: labels must be integers, got {value.dtype}")
    if value.shape != tuple(shape):
        raise ValueError(
            f"{function}: labels must have the shape {tuple(shape)} of the logits without the axis "
            f"of the classes, got {value.shape}"
        )
    if value.dtype.itemsize > 4:  # what int32 cannot hold must not become a class
        value = jnp.where((value >= 0) & (value < classes), value, -1)
    return value.astype(jnp.int32)


def index_groups(function: str, groups: Any) -> tuple[tuple[int, ...], ...]:
    """axis_index_groups as jit can hash it; TypeError for what is no sequence of sequences."""
    try:
        return tuple(map(tuple, groups))
    except TypeError as error:
        raise TypeError(
            f"{function}: axis_index_groups must be a sequence of sequences of indices, "
            f"got {groups!r}"
        ) from error


def scalar(function: str, name: str, value: Any) -> Any:
    """A number as a float, or an array without axes; TypeError or ValueError for anything else."""
    if _is_number(value):
        return float(value)
    floating(function, **{name: value})
    if jnp.shape(value) != ():
        raise ValueError(f"{function}: {name} must be a scalar, got shape {jnp.shape(value)}")
    return value


def result_dtype(function: str, dtype: Any, default: Any) -> np.dtype:
    """The dtype of y: `default`, or the floating type asked for, as jax would take it."""
    if dtype is None:
        return np.dtype(default)
    try:
        asked = jnp.dtype(dtype)
    except TypeError:
        asked = dtype
    if asked not in _FLOATING:
        raise TypeError(
            f"{function}: dtype must be float16, bfloat16, float32 or float64, got {asked}"
        )
    # float64 without x64 becomes float32 with jax's own warning.
    return np.dtype(jax.eval_shape(lambda: jnp.zeros((), asked)).dtype)


def epsilon(function: str, value: Any, name: str = "epsilon") -> float:
    """The float `value`; raises TypeError or ValueError unless it is a finite number >= 0."""
    if type(value) is float and 0 <= value < math.inf:  # eager calls pass here every time
        return value
    if not _is_number(value):
        raise TypeError(
            f"{function}: {name} must be a Python number, which is static under jit, "
            f"got {type(value).__name__}"
        )
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{function}: {name} must be finite and not negative, got {value!r}")
    return float(value)


def precision(function: str, value: Any) -> int:
    """The int `value`; raises TypeError or ValueError unless it bounds a lattice's coefficients."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(
            f"{function}: precision must be a Python integer, which is static under jit, "
            f"got {value if isinstance(value, int | float) else type(value).__name__}"
        )
    if not 1 <= value <= MAX_PRECISION:
        raise ValueError(
            f"{function}: precision must lie between 1 and {MAX_PRECISION}, got {value}"
        )
    return int(value)


def scale_factor(function: str, target_variance: Any) -> float:
    """The square root of a target variance; ValueError for anything but those of the message."""
    if isinstance(target_variance, str) and target_variance in _SCALE_FACTORS:
        return _SCALE_FACTORS[target_variance]
    if isinstance(target_variance, GoldenNormMode):
        return target_variance.scale_factor
    number: Any = target_variance
    if not (_is_number(number) and math.isfinite(number) and number > 0):
        raise ValueError(
            f"{function}: target_variance must be 'golden', 'standard' or a positive Python "
            f"number, got {target_variance!r}"
        )
    return math.sqrt(number)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)

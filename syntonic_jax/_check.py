"""Argument checks. A message names the function, the argument, what was expected and what came.

Public functions check arguments where they are traced, so that an eager call costs two frames of
Python beside jit's own dispatch. Before it they check only modes, numbers, axes and flags of
another than the usual type: jit could not hash them, or would take 1.0 for 1. What jit refuses,
_public.py brings here afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _number
from .modes import GoldenNormMode

_SCALE_FACTORS = {name: GoldenNormMode(name).scale_factor for name in GoldenNormMode.VARIANCES}
_FLOATING = tuple(map(jnp.dtype, ("float16", "bfloat16", "float32", "float64")))
MAX_PRECISION = 2**20  # beyond it the search of a lattice point would need wider integers
_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def floating(function: str, **arrays: Any) -> None:
    """Raises TypeError unless every argument is an array (or scalar) of real floating point."""
    for name, x in arrays.items():
        dtype = _dtype(function, name, x)
        if dtype not in _FLOATING:
            raise TypeError(
                f"{function}: {name} must be float16, bfloat16, float32 or float64, got {dtype}"
            )


def _dtype(function: str, name: str, x: Any) -> Any:
    """The dtype of x for jax, or that which jax does not know; TypeError unless x is an array."""
    masked = isinstance(x, np.ma.MaskedArray)  # jax refuses it
    if not masked and (isinstance(x, _ARRAY_LIKE) or hasattr(x, "__jax_array__")):
        try:
            return jnp.result_type(x)
        except TypeError:
            if (dtype := getattr(x, "dtype", None)) is not None:
                return dtype
    raise TypeError(f"{function}: {name} must be an array, got {type(x).__name__}")


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
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if several or (isinstance(value, np.ndarray) and value.ndim == 1):
        found = tuple(map(_number.integer, value))
        if None not in found:
            return found  # type: ignore[return-value]
    elif (one := _number.integer(value)) is not None:
        return one
    raise TypeError(f"{function}: axis must be an integer or a sequence of them, got {value!r}")


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
    if (found := _number.integer(value)) is None:
        raise TypeError(f"{function}: axis must be an integer, got {value!r}")
    return found


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
    booleans(function, where)
    broadcasts(function, shape, of, where=where)
    where = jnp.asarray(where)
    return jnp.broadcast_to(where, shape) if broadcast else where


def booleans(function: str, where: Any) -> None:
    """Raises TypeError unless `where` is an array of booleans."""
    if (dtype := _dtype(function, "where", where)) != jnp.bool_:
        raise TypeError(f"{function}: where must be boolean, got {dtype}")


def integers(function: str, labels: Any) -> None:
    """Raises TypeError unless `labels` is an array of integers."""
    dtype = _dtype(function, "labels", labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{function}: labels must be integers, got {dtype}")


IGNORED = -2  # what a label out of use is, where labels are mapped at all


def ignore_index(function: str, value: Any) -> int | None:
    """The label out of use, or None; TypeError unless it is an integer."""
    if value is None or type(value) is int:  # at once: an eager call waits for this
        return value
    number = _number.integer(value)
    if number is None:
        raise TypeError(f"{function}: ignore_index must be an integer or None, got {value!r}")
    return number


def labels(
    function: str, value: Any, shape: Sequence[Any], classes: Any, ignored: int | None = None
) -> tuple[jax.Array, int | None]:
    """Integer labels of `shape` as int32, negative for what is none of the classes.

    And which negative number is the label out of use, `ignored`; None where none of them can be.
    No array is made of 32 bits or less, unless a class is out of use.
    """
    integers(function, value)
    value = jnp.asarray(value)
    if value.shape != tuple(shape):
        raise ValueError(
            f"{function}: labels must have the shape {tuple(shape)} of the logits without the axis "
            f"of the classes, got {value.shape}"
        )
    held = jnp.iinfo(value.dtype)
    if ignored is not None and not held.min <= ignored <= held.max:
        ignored = None
    if held.bits < 32 or value.dtype == jnp.int32:
        value = value.astype(jnp.int32)
        if ignored is None or ignored < 0:
            return value, ignored
    # What int32 cannot hold must not become a class, nor the label out of use.
    is_class = (value >= 0) & (value < classes)
    mapped = jnp.where(is_class, value.astype(jnp.int32), -1)
    if ignored is None:
        return mapped, None
    unused = value == np.asarray(ignored, value.dtype)
    return jnp.where(unused, IGNORED, mapped), IGNORED


def axis_name(function: str, value: Any) -> None:
    """Raises TypeError unless `value` may name mapped axes: integers count the axes of an array."""
    names = value if isinstance(value, tuple) else (value,)
    if any(
        _number.integer(name) is not None or isinstance(name, bool | list | dict | set)
        for name in names
    ):
        raise TypeError(
            f"{function}: axis_name must be the name of a mapped axis, or several, got {value!r}"
        )


def index_groups(function: str, groups: Any) -> tuple[tuple[int, ...], ...]:
    """axis_index_groups as jit can hash it; TypeError for what is no sequence of sequences."""
    try:
        found = tuple(tuple(map(_number.integer, group)) for group in groups)
        if not any(None in group for group in found):
            return found  # type: ignore[return-value]
    except Exception:  # of whatever kind it is that cannot be walked through
        pass
    raise TypeError(
        f"{function}: axis_index_groups must be a sequence of sequences of indices, got {groups!r}"
    )


def covers(function: str, groups: tuple[tuple[int, ...], ...], size: int) -> None:
    """Raises ValueError unless each index of a mapped axis of this size is in one of the groups."""
    if sorted(index for group in groups for index in group) != list(range(size)):
        raise ValueError(
            f"{function}: axis_index_groups must hold each index of the mapped axis once, "
            f"0 to {size - 1}, got {groups}"
        )


def flag(function: str, name: str, value: Any) -> bool:
    """The bool `value`, of Python or NumPy; TypeError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{function}: {name} must be True or False, got {value!r}")
    return bool(value)


def scalar(function: str, name: str, value: Any) -> Any:
    """A number as a float, or an array without axes; TypeError or ValueError for anything else."""
    if isinstance(value, int | float | np.generic) and (number := _number.real(value)) is not None:
        if math.isinf(number) and isinstance(value, int):
            raise ValueError(f"{function}: {name} must fit a float, got {value}")
        return number
    floating(function, **{name: value})
    if jnp.shape(value) != ():
        raise ValueError(f"{function}: {name} must be a scalar, got shape {jnp.shape(value)}")
    return value


def result_dtype(function: str, dtype: Any, default: Any) -> np.dtype:
    """The dtype of y: `default`, or the floating type asked for, as jax would take it."""
    if dtype is None:
        return np.dtype(default)
    try:
        asked = None if _holds_number(dtype) else jnp.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        asked = None
    if asked is None or asked not in _FLOATING:  # None equals NumPy's float64
        raise TypeError(
            f"{function}: dtype must be float16, bfloat16, float32 or float64, "
            f"got {dtype if asked is None else asked}"
        )
    # float64 without x64 becomes float32, with jax's own warning unless it is Python's float.
    return np.dtype(jax.eval_shape(lambda: jnp.zeros((), dtype)).dtype)


def _holds_number(value: Any) -> bool:
    """Whether `value` is an array or a number, which NumPy would take for its own dtype."""
    return isinstance(value, _ARRAY_LIKE) and not isinstance(value, str)


def epsilon(function: str, value: Any, name: str = "epsilon") -> float:
    """The float `value`; raises TypeError or ValueError unless it is a finite number >= 0."""
    if type(value) is float and 0 <= value < math.inf:  # eager calls pass here every time
        return value
    number = _number.real(value)
    if number is None:
        raise TypeError(
            f"{function}: {name} must be a Python number, which is static under jit, "
            f"got {type(value).__name__}"
        )
    if not 0 <= number < math.inf:
        raise ValueError(f"{function}: {name} must be finite and not negative, got {value!r}")
    return number


def finite(function: str, name: str, value: Any) -> float:
    """The float `value`; raises TypeError or ValueError unless it is a finite number."""
    number = _number.real(value)
    if number is None:
        raise TypeError(
            f"{function}: {name} must be a Python number, which is static under jit, "
            f"got {type(value).__name__}"
        )
    if not math.isfinite(number):
        raise ValueError(f"{function}: {name} must be finite, got {value!r}")
    return number


def precision(function: str, value: Any) -> int:
    """The int `value`; raises TypeError or ValueError unless it bounds a lattice's coefficients."""
    number = _number.integer(value)
    if number is None:
        raise TypeError(
            f"{function}: precision must be a Python integer, which is static under jit, "
            f"got {value if isinstance(value, int | float) else type(value).__name__}"
        )
    if not 1 <= number <= MAX_PRECISION:
        raise ValueError(
            f"{function}: precision must lie between 1 and {MAX_PRECISION}, got {value}"
        )
    return number


def target_variance(function: str, value: Any) -> str | float | GoldenNormMode:
    """A target variance as jit can hash it; ValueError for anything but those of the message."""
    if (isinstance(value, str) and value in _SCALE_FACTORS) or isinstance(value, GoldenNormMode):
        return value
    if (number := _number.positive(value)) is None:
        raise ValueError(
            f"{function}: target_variance must be 'golden', 'standard' or a positive Python "
            f"number, got {value!r}"
        )
    return number


def static_norm(function: str, axes: Any, variance: Any, added: Any) -> tuple[Any, Any, float]:
    """What is static of a norm, axes, target variance and epsilon, as jit can hash it.

    jit takes 1 for True: what is unusual is checked before it.
    """
    if type(added) is not float:
        added = epsilon(function, added)
    if type(variance) is not str:
        variance = target_variance(function, variance)
    if type(axes) is not int:
        axes = static_axes(function, axes)
    return axes, variance, added


def scale_factor(function: str, value: Any) -> float:
    """The square root of a target variance; ValueError as `target_variance`."""
    variance = target_variance(function, value)
    if isinstance(variance, str):
        return _SCALE_FACTORS[variance]
    return variance.scale_factor if isinstance(variance, GoldenNormMode) else math.sqrt(variance)

"""What the arguments of a GoldenArray's operations may be; messages name function and argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .. import _check, _number
from ._overflow import narrowed

_INTEGERS = (np.dtype("int32"), np.dtype("int64"))
_NUMBERS = (int, np.integer, np.ndarray, jax.Array)


def integers(function: str, name: str, x: Any) -> Any:
    """`x` as an array of int32 or int64, or a Python integer that the wider of the two holds."""
    if not isinstance(x, _NUMBERS) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    if not isinstance(x, _NUMBERS) or isinstance(x, bool | np.ma.MaskedArray):
        raise TypeError(f"{function}: {name} must be an array of integers, got {type(x).__name__}")
    if isinstance(x, np.integer) and x.dtype not in _INTEGERS:
        x = int(x)  # a scalar of another type is one of Python's
    if isinstance(x, int):
        return in_range(function, name, x, jnp.asarray(0).dtype)
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{function}: {name} must be int32 or int64, got {x.dtype}")
    if isinstance(x, jax.Array):
        return x
    return jnp.asarray(in_range(function, name, x, jnp.asarray(0).dtype))


def in_range(function: str, name: str, x: Any, dtype: Any) -> Any:
    """`x`, a Python integer or an array with values, if jax would not wrap it around in `dtype`."""
    limits = jnp.iinfo(dtype)
    values = np.asarray(x)  # a matrix has ways of its own
    least, most = (x, x) if isinstance(x, int) else (values.min(initial=0), values.max(initial=0))
    if least < limits.min or most > limits.max:
        raise ValueError(f"{function}: {name} must fit {dtype}, got {x}")
    return x


def as_dtype(function: str, name: str, x: Any, dtype: Any) -> jax.Array:
    """What `integers` returned in a type that may be narrower, as a weak type gives way to others.

    ValueError where a number does not fit; a traced one that does not is an error of the checked
    mode.
    """
    if isinstance(x, int):
        return jnp.asarray(in_range(function, name, x, dtype), dtype)
    if x.dtype.itemsize <= dtype.itemsize:
        return x.astype(dtype)
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return narrowed(f"{function}: {name}", x, dtype)
    return in_range(function, name, x, dtype).astype(dtype)


def axes(function: str, value: Any, ndim: int) -> tuple[int, ...] | None:
    """Axes of an array of `ndim` axes, each once and in the order given; None means all."""
    if value is None:
        return None
    static = _check.static_axes(function, value)
    entries = static if isinstance(static, tuple) else (static,)
    found = tuple(_check.axis(function, entry, ndim, value) for entry in entries)
    if len(set(found)) != len(found):
        raise ValueError(f"{function}: axis must not name an axis twice, got {value!r}")
    return found


def condition(function: str, value: Any) -> Any:
    """An array of booleans, or one."""
    array = not isinstance(value, np.ma.MaskedArray) and hasattr(value, "dtype")
    if not isinstance(value, bool) and not (array and value.dtype == np.dtype(bool)):
        found = value.dtype if array else type(value).__name__
        raise TypeError(f"{function}: condition must be an array of booleans, got {found}")
    return value


def broadcast(function: str, names: str, *arrays: Any) -> None:
    """Raises ValueError unless the shapes of all broadcast together."""
    shapes = [getattr(x, "shape", ()) for x in arrays]
    try:
        jnp.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            f"{function}: {names} must have shapes that broadcast, got "
            + " and ".join(map(str, shapes))
        ) from None


def shaped(function: str, name: str, change: Callable[..., Any], *given: Any) -> Any:
    """`change(*given)`, a change of a shape, whose errors name the function and the argument.

    They are of one type where the shape is of integers, whatever that of jax is.
    """
    entries = [n for part in given for n in (part if isinstance(part, tuple | list) else [part])]
    if any(isinstance(n, bool | np.bool_) for n in entries):  # jax takes them for 1 and 0
        raise TypeError(f"{function}: {name} must be of integers, got {given}")
    try:
        return change(*given)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        kind = TypeError if any(_number.integer(n) is None for n in entries) else ValueError
        raise kind(f"{function}: {name} does not fit: {error}") from error

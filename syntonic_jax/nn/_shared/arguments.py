"""What the layers of all frameworks check of arguments. A message names layer and argument."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from syntonic_jax import _check

_ARRAYS = (jax.Array, np.ndarray, np.generic)
_MASKS = (np.bool_, np.integer, np.floating)


def flags(layer: str, **values: Any) -> None:
    """Raises TypeError unless every argument is a truth value: any string would count as true.

    0 and 1 are truth values, and so is an array of one boolean.
    """
    for name, value in values.items():
        if type(value) is bool or (type(value) is int and value in (0, 1)):
            continue
        if not (isinstance(value, _ARRAYS) and value.dtype == bool and np.shape(value) == ()):
            raise TypeError(f"{layer}: {name} must be True or False, got {value!r}")


def truth(layer: str, mask: Any, shape: tuple[Any, ...], of: str) -> Any:
    """`mask` as truth values, or None.

    Numbers other than 0 count as true, as they do in the frameworks, whose masks may be of floats.

    Raises:
      TypeError: the mask is neither an array of booleans or real numbers nor one boolean.
      ValueError: it does not broadcast to `shape`, that of `of`.
    """
    if mask is None:
        return None
    if hasattr(mask, "__jax_array__"):
        mask = jnp.asarray(mask)
    array = isinstance(mask, jax.Array | np.ndarray)
    if array and not any(jnp.issubdtype(mask.dtype, kind) for kind in _MASKS):
        raise TypeError(f"{layer}: mask must be an array of booleans or numbers, got {mask.dtype}")
    if not array and not isinstance(mask, bool | np.bool_):
        raise TypeError(f"{layer}: mask must be an array, got {mask!r}")
    _check.broadcasts(layer, shape, of, mask=mask)
    return jnp.asarray(mask, bool)


def types(layer: str, **values: Any) -> None:
    """Raises TypeError for what is neither None nor a dtype of numbers."""
    for name, value in values.items():
        try:
            numbers = value is None or jnp.issubdtype(jnp.dtype(value), np.number)
        except (TypeError, ValueError, SyntaxError):
            numbers = False
        if not numbers:
            raise TypeError(f"{layer}: {name} must be a dtype of numbers, got {value!r}")


def optional_size(layer: str, **values: Any) -> None:
    """As `size`, where None stands for a default."""
    size(layer, **{name: value for name, value in values.items() if value is not None})


def size(layer: str, least: int = 1, **values: Any) -> None:
    """Raises TypeError or ValueError for what is no integer from `least` on that jax can take."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{layer}: {name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{layer}: {name} must be at least {least}, got {value}")
        if value >= 2**63:
            raise ValueError(
                f"{layer}: {name} must be below 2**63, got one of {int(value).bit_length()} bits"
            )


def momentum(layer: str, value: Any, name: str = "momentum") -> Any:
    """A number as a float, whatever type it has; an array without axes as it is."""
    return _check.scalar(layer, name, value)


def is_one_of(value: Any, *names: str) -> bool:
    """Whether it is None or one of these names; comparing an array with them is an array."""
    return value is None or (isinstance(value, str) and value in names)

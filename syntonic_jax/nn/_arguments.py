"""What the layers of all frameworks check of arguments. A message names layer and argument."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from syntonic_jax import _check
from syntonic_jax.ops import _activation

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


def activation(layer: str, name: Any) -> str | None:
    """`name`, or a ValueError that names the activations there are."""
    if name is not None and not (isinstance(name, str) and name in _activation.NAMES):
        names = ", ".join(map(repr, _activation.NAMES))
        raise ValueError(f"{layer}: activation must be None or one of {names}, got {name!r}")
    return name


def momentum(layer: str, value: Any, name: str = "momentum") -> Any:
    """A number as a float, whatever type it has; an array without axes as it is."""
    return _check.scalar(layer, name, value)

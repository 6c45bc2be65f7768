"""What the normalisation layers of all frameworks share: axes, and parameters of any shape."""

import math
import operator
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp


def sorted_axes(layer: str, argument: str, axes: Any, ndim: int) -> tuple[int, ...]:
    """`axes`, one or many, as increasing numbers from 0; ValueError unless x has each, once."""
    several = isinstance(axes, Iterable) and getattr(axes, "ndim", 1) > 0
    given: tuple[Any, ...] = tuple(axes) if several else (axes,)
    try:
        numbers = [operator.index(a) for a in given if not isinstance(a, bool)]
    except TypeError:
        numbers = []
    if len(numbers) < len(given):
        raise TypeError(
            f"{layer}: {argument} must be an integer or a sequence of them, got {axes!r}"
        )
    found = tuple(sorted(a % ndim for a in numbers if -ndim <= a < ndim))
    if len(found) < len(given) or len(set(found)) < len(found):
        raise ValueError(
            f"{layer}: {argument} must be distinct axes of x, which has {ndim}, got {axes!r}"
        )
    return found


def require_features(layer: str, x: Any, axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """ValueError unless the running statistics are of the shape of the features of x."""
    found = tuple(jnp.shape(x)[a] for a in axes)
    if found != shape:
        raise ValueError(
            f"{layer}: x must have features of shape {shape}, those of the running statistics, "
            f"on axes {axes}, got {found}"
        )


def widened(x: Any, dtype: Any) -> Any:
    """x in float64 where y is to be: the operations compute in float32 for all narrower data."""
    return jnp.asarray(x, dtype) if jnp.dtype(dtype) == jnp.float64 else x


def along(layer: str, x: Any, axes: tuple[int, ...], **parameters: Any) -> list[Any]:
    """Parameters that hold one number for each place on `axes`, in shapes that broadcast to x."""
    shape = [n if a in axes else 1 for a, n in enumerate(jnp.shape(x))]
    for name, p in parameters.items():
        if p is not None and p.size != math.prod(shape):
            places = tuple(shape[a] for a in axes)
            raise ValueError(f"{layer}: {name} must have shape {places}, got {p.shape}")
    return [None if p is None else p.reshape(shape) for p in parameters.values()]


def broadcast_to_rank(layer: str, x: Any, **parameters: Any) -> list[Any]:
    """Parameters with as many axes as x; ValueError unless they broadcast to its shape."""
    shape, found = jnp.shape(x), []
    for name, p in parameters.items():
        if p is not None:
            p = jnp.asarray(p)
            p = p.reshape((1,) * (len(shape) - p.ndim) + p.shape)
            if p.ndim > len(shape) or any(m not in (1, n) for m, n in zip(p.shape, shape)):
                raise ValueError(f"{layer}: {name} must broadcast to {shape}, got {p.shape}")
        found.append(p)
    return found

"""The operators of a GoldenArray beside another one, an integer or an array of integers.

An integer never wraps around: it fits the coefficients beside it, is refused, or is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _arguments as arguments
from . import _order
from ._overflow import Formula, checked

if TYPE_CHECKING:
    from .golden_array import GoldenArray

_OTHER = "the other operand"
Coefficients = tuple[Any, Any]


def ring(operator: str, formula: Formula, x: GoldenArray, other: Any) -> Coefficients:
    """The coefficients of `x` and `other` by the formula of an operator."""
    c, d = operand(operator, other, x)
    try:
        return checked(operator, formula, x.a, x.b, c, d)  # type: ignore[return-value]
    except (TypeError, ValueError):
        _require_shapes(operator, x.a, c)
        raise


def equal(operator: str, x: GoldenArray, other: Any) -> jax.Array:
    """Where x == other."""
    y = _comparand(operator, other, x)
    if isinstance(y, int):
        return x.a != x.a
    try:
        if x.dtype != y[0].dtype:
            return _order.compare(x.a, x.b, *y) == 0
        return (x.a == y[0]) & (x.b == y[1])
    except (TypeError, ValueError):
        _require_shapes(operator, x.a, y[0])
        raise


def order(operator: str, x: GoldenArray, other: Any) -> jax.Array:
    """The sign of x − other."""
    y = _comparand(operator, other, x)
    if isinstance(y, int):
        return _order.compare_with(x.a, x.b, y)
    try:
        return _order.compare(x.a, x.b, *y)
    except (TypeError, ValueError):
        _require_shapes(operator, x.a, y[0])
        raise


def operand(operator: str, x: Any, beside: GoldenArray) -> Coefficients:
    """The coefficients of the other operand; integers in the type of the two together."""
    if isinstance(x, type(beside)):
        return x.a, x.b
    name = f"GoldenArray {operator}"
    x = _integers(name, x)
    x = arguments.as_dtype(name, _OTHER, x, jnp.result_type(x, beside.a))
    return x, jnp.zeros_like(x)


def _comparand(operator: str, x: Any, beside: GoldenArray) -> Coefficients | int:
    """The coefficients of what is compared; an integer as it is that none beside it could be."""
    if isinstance(x, type(beside)):
        if x.dtype != beside.dtype:
            jnp.result_type(x.a, beside.a)  # raises under strict promotion
        return x.a, x.b
    if isinstance(x, int | np.integer) and not isinstance(x, bool):
        x = int(x)
        limits = jnp.iinfo(beside.dtype)
        if not limits.min <= x <= limits.max:
            return x
        x = jnp.asarray(x, beside.dtype)
    else:
        x = _integers(f"GoldenArray {operator}", x)
        # A weak type would give way to a narrower one, and wrap.
        x = x.astype(_order.wider(x.dtype, jnp.result_type(x, beside.a)))
    return x, jnp.zeros_like(x)


def _integers(function: str, x: Any) -> Any:
    try:
        return arguments.integers(function, _OTHER, x)
    except TypeError as error:
        raise TypeError(f"{error}; GoldenArray.from_float converts floats") from None


def _require_shapes(operator: str, x: Any, y: Any) -> None:
    """Raises ValueError if the shapes do not fit; whatever else is wrong, jax has said."""
    if operator != "@":
        return arguments.broadcast(f"GoldenArray {operator}", "the operands", x, y)
    try:
        jax.eval_shape(jnp.matmul, x, y)
    except (TypeError, ValueError):
        raise ValueError(
            f"GoldenArray @: the operands must have shapes of matrices that fit, "
            f"got {x.shape} and {y.shape}"
        ) from None

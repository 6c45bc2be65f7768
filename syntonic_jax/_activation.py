"""The activations of a phi residual and their derivatives, in jnp.

One entry of `ACTIVATIONS` is all that this package has to know of an activation. Its kernel is the
member of `Activation` in cuda/core/types.h that has the same number; others are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .constants import PHI

# gelu(z) = z · (1 + tanh v) / 2 = z · σ(2v), v = √(2/π) (z + 0.044715 z³). The second form loses
# nothing to cancellation where the gate closes.
_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715
# Beyond this every derivative here has reached its limit, in float64 too.
_SATURATED = 1e3


class Activation(NamedTuple):
    """A function of z, and its derivative as a function of z."""

    code: int  # the `activation` attribute of the custom calls
    value: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    of_y: bool = False  # whether y does as well as z for the derivative


def check(function: str, activation: Any) -> None:
    """Raises ValueError unless `activation` is None or the name of one."""
    named = isinstance(activation, str) and activation in ACTIVATIONS
    if activation is not None and not named:
        *names, last = map(repr, ACTIVATIONS)
        raise ValueError(
            f"{function}: activation must be None, {', '.join(names)} or {last}, got {activation!r}"
        )


def apply(name: str | None, z: Any) -> Any:
    """activation(z), in the type of z."""
    return z if name is None else ACTIVATIONS[name].value(z)


def derivative(name: str | None, saved: Any = None) -> Any:
    """activation'(z), in the type of `saved`: z, or y where that does; nothing for none."""
    return 1 if name is None else ACTIVATIONS[name].slope(saved)


def code(name: str | None) -> int:
    """The `activation` attribute of a custom call."""
    return 0 if name is None else ACTIVATIONS[name].code


def _relu(z: Any) -> Any:
    return jnp.where(z <= 0, 0, z)  # NaN stays; maximum's own derivative at 0 would be 1/2


def _relu_slope(y: Any) -> Any:
    return jnp.where(y > 0, 1.0, 0.0).astype(y.dtype)


def _gelu_gate(z: Any) -> tuple[Any, Any]:
    square = z * z
    return (
        _GELU_SLOPE * (z + _GELU_CUBIC * square * z),
        _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * square),
    )


def _golden_gate(z: Any) -> tuple[Any, Any]:
    return PHI * z, PHI


def _gated(code: int, gate_of: Callable[[Any], tuple[Any, Any]]) -> Activation:
    """z · σ(u(z)), of a function that returns u and its derivative."""

    def value(z):
        return z * jax.nn.sigmoid(gate_of(_clipped(z))[0])

    def slope(z):
        z = _bounded(z)
        u, du = gate_of(z)
        gate = jax.nn.sigmoid(u)
        return gate + z * du * gate * (1 - gate)

    return Activation(code, value, slope)


def _bounded(z: Any) -> Any:
    """z where derivatives have not reached their limits; large finite z would meet inf · 0.

    Infinite z gives NaN as the plain formula does, in every derivative, by 0 · z.
    """
    return _clipped(z) + 0 * z


def _clipped(z: Any) -> Any:
    # Of one shape: jet of older versions of jax takes no other minimum, and no clip.
    most = jnp.full_like(z, _SATURATED)
    return jnp.minimum(jnp.maximum(z, -most), most)


ACTIVATIONS = {
    "relu": Activation(1, _relu, _relu_slope, of_y=True),
    "gelu": _gated(2, _gelu_gate),
    "golden_gelu": _gated(3, _golden_gate),
}

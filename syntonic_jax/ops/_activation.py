"""The activations of a phi residual and their derivatives, in jnp."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..constants import PHI

NAMES = ("relu", "gelu", "golden_gelu")
# The `activation` attribute of the custom calls: Activation in cuda/types.h.
CODES = {None: 0, "relu": 1, "gelu": 2, "golden_gelu": 3}

# gelu(z) = z · (1 + tanh v) / 2 = z · σ(2v), v = √(2/π) (z + 0.044715 z³). The second form loses
# nothing to cancellation where the gate closes.
_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715
# Beyond this every derivative here has reached its limit, in float64 too.
_SATURATED = 1e3


def check(function: str, activation: Any) -> None:
    """Raises ValueError unless `activation` is None or the name of one."""
    named = isinstance(activation, str) and activation in NAMES
    if activation is not None and not named:
        raise ValueError(
            f"{function}: activation must be None, 'relu', 'gelu' or 'golden_gelu', "
            f"got {activation!r}"
        )


def apply(name: str | None, z: Any) -> Any:
    """activation(z), in the type of z."""
    if name is None:
        return z
    if name == "relu":
        return jnp.where(z <= 0, 0, z)  # NaN stays; maximum's own derivative at 0 would be 1/2
    return z * jax.nn.sigmoid(_gate(name, z)[0])


def derivative(name: str | None, saved: Any = None) -> Any:
    """activation'(z), in the type of `saved`: y for relu, z for the others, nothing for none."""
    if name is None:
        return 1
    if name == "relu":
        return jnp.where(saved > 0, 1.0, 0.0).astype(saved.dtype)
    z = _bounded(saved)
    u, du = _gate(name, z)
    gate = jax.nn.sigmoid(u)
    return gate + z * du * gate * (1 - gate)


def _bounded(z: Any) -> Any:
    """z where derivatives have not reached their limits; large finite z would meet inf · 0.

    Infinite z gives NaN as the plain formula does, in every derivative, by 0 · z.
    """
    # Of one shape: jet of older versions of jax takes no other minimum, and no clip.
    most = jnp.full_like(z, _SATURATED)
    return jnp.minimum(jnp.maximum(z, -most), most) + 0 * z


def _gate(name: str, z: Any) -> tuple[Any, Any]:
    """u(z) and u'(z), the activation being z · σ(u(z))."""
    if name == "golden_gelu":
        return PHI * z, PHI
    square = z * z
    return (
        _GELU_SLOPE * (z + _GELU_CUBIC * square * z),
        _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * square),
    )

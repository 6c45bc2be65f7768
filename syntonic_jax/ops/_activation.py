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

_GELU_SLOPE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715
# Beyond this every derivative here has reached its limit, in float64 too.
_SATURATED = 1e3


def apply(name: str | None, z: Any) -> Any:
    """activation(z), in the type of z."""
    if name is None:
        return z
    if name == "relu":
        return jnp.maximum(z, 0)
    if name == "gelu":
        return 0.5 * z * (1 + jnp.tanh(_GELU_SLOPE * (z + _GELU_CUBIC * z * z * z)))
    return z * jax.nn.sigmoid(PHI * z)


def derivative(name: str, saved: Any) -> Any:
    """activation'(z), in the type of `saved`: y for relu, z for the others."""
    if name == "relu":
        return jnp.where(saved > 0, 1.0, 0.0).astype(saved.dtype)
    # Large finite z would meet inf · 0; infinite z gives NaN as the plain formula does.
    z = jnp.clip(saved, -_SATURATED, _SATURATED)
    if name == "gelu":
        t = jnp.tanh(_GELU_SLOPE * (z + _GELU_CUBIC * z * z * z))
        inner = _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * z * z)
        slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * inner
    else:
        s = jax.nn.sigmoid(PHI * z)
        slope = s + PHI * z * s * (1 - s)
    return jnp.where(jnp.isfinite(saved), slope, jnp.nan)

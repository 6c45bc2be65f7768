"""Layer normalisation to a target variance t.

y = scale · √t · (x − mean(x)) / √(var(x) + ε) + bias over the reduced axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _public
from ..modes import GoldenNormMode
from ._layernorm import CENTRED
from ._norm_rows import norm_of_rows, over_axes

# ---------------------------------------------------------------------------------- public


def golden_layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    target_variance: str | float | GoldenNormMode = "golden",
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Normalises over one or several axes, to the variance φ⁻¹ by default.

    y = scale · √t · (x − mean) / √(var + ε) + bias; the variance is the biased one.

    Args:
      x: array of float16, bfloat16, float32 or float64.
      scale: array of the shape of the reduced axes, in their order, or None (1); any floating
        type, it does not promote the result.
      bias: likewise, or None (0).
      axis: the axes to reduce. The last ones are normalised where they lie; others are moved
        there and back.
      target_variance: t: 'golden' (φ⁻¹), 'standard' (1), a positive Python number or a
        `GoldenNormMode`.
      epsilon: added to the variance; a Python number, not negative.
      dtype: type of y; None: that of x.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      y of the shape of x. Sums and statistics are in float32 (float64 for float64 data); y is
      rounded once. Rows of any finite numbers have the y that exponents without bounds would give.
      A CPU, where XLA takes subnormal numbers for 0, loses digits of rows, and gradients, within 32
      times the smallest normal number.

    Raises:
      TypeError: an array or `dtype` is not real floating point, or `epsilon` no Python number.
      ValueError: an axis is out of range, named twice or empty, none is named, a parameter does
        not have their shape, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> y = golden_layer_norm(jnp.array([1.0, 2.0, 3.0, 4.0]))
    >>> np.asarray(y).round(4), round(float(y.var()), 3)
    (array([-1.0547, -0.3516,  0.3516,  1.0547], dtype=float32), 0.618)
    """
    name = "golden_layer_norm"
    axis, target_variance, epsilon = _check.static_norm(name, axis, target_variance, epsilon)
    return _golden_layer_norm(x, scale, bias, axis, epsilon, target_variance, dtype, implementation)


@_public.jit(
    "axis", "epsilon", "target_variance", "dtype", "implementation", function="golden_layer_norm"
)
def _golden_layer_norm(x, scale, bias, axis, epsilon, target_variance, dtype, implementation):
    return over_axes(
        LAYER_NORM,
        x,
        {"scale": scale, "bias": bias},
        axis,
        target_variance=target_variance,
        epsilon=epsilon,
        dtype=dtype,
        implementation=implementation,
    )


# ----------------------------------------------------------------------------- declaration

LAYER_NORM = norm_of_rows("golden_layer_norm", CENTRED)

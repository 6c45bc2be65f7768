"""RMS normalisation to a target mean square t.

y = (offset + scale) · √t · x / √(mean(x²) + ε) over the reduced axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _public
from ..modes import GoldenNormMode
from ._norm_rows import norm_of_rows, over_axes
from ._rms_norm import UNCENTRED

# ---------------------------------------------------------------------------------- public


def golden_rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    target_variance: str | float | GoldenNormMode = "golden",
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Divides by the root of the mean square over one or several axes, to φ⁻¹ by default.

    y = (scale_offset + scale) · √t · x / √(mean(x²) + ε): `golden_layer_norm` without centring and
    without bias (Zhang and Sennrich, 2019).

    Args:
      x: array of float16, bfloat16, float32 or float64.
      scale: array of the shape of the reduced axes, in their order, or None: nothing is multiplied,
        whatever the offset; any floating type, it does not promote the result.
      axis: the axes to reduce. The last ones are normalised where they lie; others are moved
        there and back.
      target_variance: t, the mean square of y: 'golden' (φ⁻¹), 'standard' (1), a positive Python
        number or a `GoldenNormMode`.
      epsilon: added to the mean square; a Python number, not negative.
      scale_offset: added to scale, for models that store scale − 1; a finite Python number.
      dtype: type of y; None: that of x.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      y of the shape of x. Sums and statistics are in float32 (float64 for float64 data); y is
      rounded once. Its range is that of `golden_layer_norm`.

    Raises:
      TypeError: an array or `dtype` is not real floating point, or `epsilon` or `scale_offset` no
        Python number.
      ValueError: an axis is out of range, named twice or empty, none is named, scale does not have
        their shape, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> y = golden_rms_norm(jnp.array([1.0, 2.0, 3.0, 4.0]))
    >>> np.asarray(y).round(4), round(float((y**2).mean()), 3)
    (array([0.2871, 0.5741, 0.8612, 1.1482], dtype=float32), 0.618)
    """
    name = "golden_rms_norm"
    axis, target_variance, epsilon = _check.static_norm(name, axis, target_variance, epsilon)
    return _golden_rms_norm(
        x, scale, axis, epsilon, target_variance, _check.finite(name, "scale_offset", scale_offset),
        dtype, implementation,
    )  # fmt: skip


@_public.jit(
    "axis", "epsilon", "target_variance", "scale_offset", "dtype", "implementation",
    function="golden_rms_norm",
)  # fmt: skip
def _golden_rms_norm(x, scale, axis, epsilon, target_variance, scale_offset, dtype, implementation):
    return over_axes(
        RMS_NORM,
        x,
        {"scale": scale},
        axis,
        target_variance=target_variance,
        epsilon=epsilon,
        scale_offset=scale_offset,
        dtype=dtype,
        implementation=implementation,
    )


# ----------------------------------------------------------------------------- declaration

RMS_NORM = norm_of_rows("golden_rms_norm", UNCENTRED, default="xla")

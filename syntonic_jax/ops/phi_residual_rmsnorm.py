"""RMS normalisation of a phi residual, z = s · (identity + c · residual) rounded to its type.

y = (offset + scale) · √t · z / √(mean(z²) + ε) over the last axis.
"""

from __future__ import annotations

import jax
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _public
from ..modes import GoldenNormMode, PhiResidualMode, check_mode
from ._norm_rows import norm_of_sum, over_sum
from ._rms_norm import UNCENTRED

# ---------------------------------------------------------------------------------- public


def phi_residual_rmsnorm(
    identity: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    mode: str | PhiResidualMode = "phi",
    epsilon: float = 1e-6,
    target_variance: str | float | GoldenNormMode = "standard",
    scale_offset: float = 0.0,
    return_sum: bool = False,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Adds a residual by the golden ratio and divides the sum by the root of its mean square.

    With z the golden sum of the branches (`phi_residual`) rounded to their type,
    y = (scale_offset + scale) · √t · z / √(mean(z²) + ε) over the last axis:
    `phi_residual_layernorm` without centring and without bias. y is the RMS norm of exactly the z
    that ``return_sum=True`` returns beside it: the residual stream that the next block adds to.

    Args:
      identity: array [..., width]; float16, bfloat16, float32 or float64.
      residual: array of the same shape (nothing is broadcast); the two types promote as in jax.
      scale: array [width] or None: nothing is multiplied, whatever the offset; any floating type,
        it does not promote the result.
      mode: 'phi', 'phi_symmetric' or 'standard'.
      epsilon: added to the mean square; a Python number, not negative.
      target_variance: t, the mean square of y: 'standard' (1), 'golden' (φ⁻¹), a positive Python
        number or a `GoldenNormMode`.
      scale_offset: added to scale, for models that store scale − 1; a finite Python number.
      return_sum: whether to return z too; a bool.
      dtype: type of y; None: the promoted type of the two branches, which is always that of z.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      y [..., width], or (y, z). Sums and statistics are in float32 (float64 for float64 data);
      y is rounded once. Its range is that of `golden_layer_norm`.

    Raises:
      TypeError: an array or `dtype` is not real floating point, `epsilon` or `scale_offset` no
        Python number, or `return_sum` no bool.
      ValueError: the shapes do not fit, the width is zero, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> np.asarray(phi_residual_rmsnorm(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, 4.0]))).round(4)
    array([0.6135, 0.8479, 1.0822, 1.3166], dtype=float32)
    """
    name = "phi_residual_rmsnorm"
    # jit hashes what is static and takes 1 for True: what is unusual is checked before it.
    if type(mode) is not str:
        mode = check_mode(name, mode)
    if type(epsilon) is not float:
        epsilon = _check.epsilon(name, epsilon)
    if type(target_variance) is not str:
        target_variance = _check.target_variance(name, target_variance)
    if type(return_sum) is not bool:
        return_sum = _check.flag(name, "return_sum", return_sum)
    return _phi_residual_rmsnorm(
        identity, residual, scale, mode, epsilon, target_variance,
        _check.finite(name, "scale_offset", scale_offset), return_sum, dtype, implementation,
    )  # fmt: skip


@_public.jit(
    "mode", "epsilon", "target_variance", "scale_offset", "return_sum", "dtype", "implementation",
    function="phi_residual_rmsnorm",
)  # fmt: skip
def _phi_residual_rmsnorm(
    identity, residual, scale, mode, epsilon, target_variance, scale_offset, return_sum, dtype,
    implementation,
):  # fmt: skip
    return over_sum(
        RESIDUAL_RMS_NORM,
        *(identity, residual, {"scale": scale}),
        mode=mode,
        epsilon=epsilon,
        target_variance=target_variance,
        scale_offset=scale_offset,
        return_sum=return_sum,
        dtype=dtype,
        implementation=implementation,
    )


# ----------------------------------------------------------------------------- declaration

RESIDUAL_RMS_NORM = norm_of_sum("phi_residual_rmsnorm", UNCENTRED, default="xla")

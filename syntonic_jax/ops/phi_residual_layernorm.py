"""Layer normalisation of a phi residual, z = s · (identity + c · residual) rounded to its type.

y = scale · √t · (z − mean(z)) / √(var(z) + ε) + bias over the last axis.
"""

from __future__ import annotations

import jax
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _public
from ..modes import GoldenNormMode, PhiResidualMode, check_mode
from ._layernorm import CENTRED
from ._norm_rows import norm_of_sum, over_sum

# ---------------------------------------------------------------------------------- public


def phi_residual_layernorm(
    identity: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    mode: str | PhiResidualMode = "phi",
    epsilon: float = 1e-5,
    target_variance: str | float | GoldenNormMode = "standard",
    return_sum: bool = False,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Adds a residual by the golden ratio and normalises the sum over its last axis.

    With z the golden sum of the branches (`phi_residual`) rounded to their type,
    y = scale · √t · (z − mean) / √(var + ε) + bias; the variance is the biased one. y is the
    layer norm of exactly the z that ``return_sum=True`` returns beside it: the residual stream
    that the next block adds to.

    Args:
      identity: array [..., width]; float16, bfloat16, float32 or float64.
      residual: array of the same shape (nothing is broadcast); the two types promote as in jax.
      scale: array [width] or None (1); any floating type, it does not promote the result.
      bias: array [width] or None (0); likewise.
      mode: 'phi', 'phi_symmetric' or 'standard'.
      epsilon: added to the variance; a Python number, not negative.
      target_variance: t: 'standard' (1), 'golden' (φ⁻¹), a positive Python number or a
        `GoldenNormMode`.
      return_sum: whether to return z too; a bool.
      dtype: type of y; None: the promoted type of the two branches, which is always that of z.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      y [..., width], or (y, z). Sums and statistics are in float32 (float64 for float64 data);
      y is rounded once. Its range is that of `golden_layer_norm`.

    Raises:
      TypeError: an array or `dtype` is not real floating point, `epsilon` no Python number, or
        `return_sum` no bool.
      ValueError: the shapes do not fit, the width is zero, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> np.asarray(phi_residual_layernorm(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, 4.0]))).round(4)
    array([-1.3416, -0.4472,  0.4472,  1.3416], dtype=float32)
    """
    name = "phi_residual_layernorm"
    # jit hashes what is static and takes 1 for True: what is unusual is checked before it.
    if type(mode) is not str:
        mode = check_mode(name, mode)
    if type(epsilon) is not float:
        epsilon = _check.epsilon(name, epsilon)
    if type(target_variance) is not str:
        target_variance = _check.target_variance(name, target_variance)
    if type(return_sum) is not bool:
        return_sum = _check.flag(name, "return_sum", return_sum)
    return _phi_residual_layernorm(
        identity, residual, scale, bias, mode, epsilon, target_variance, return_sum, dtype,
        implementation,
    )  # fmt: skip


@_public.jit(
    "mode", "epsilon", "target_variance", "return_sum", "dtype", "implementation",
    function="phi_residual_layernorm",
)  # fmt: skip
def _phi_residual_layernorm(
    identity, residual, scale, bias, mode, epsilon, target_variance, return_sum, dtype,
    implementation,
):  # fmt: skip
    return over_sum(
        RESIDUAL_LAYER_NORM,
        *(identity, residual, {"scale": scale, "bias": bias}),
        mode=mode,
        epsilon=epsilon,
        target_variance=target_variance,
        return_sum=return_sum,
        dtype=dtype,
        implementation=implementation,
    )


# ----------------------------------------------------------------------------- declaration

RESIDUAL_LAYER_NORM = norm_of_sum("phi_residual_layernorm", CENTRED)

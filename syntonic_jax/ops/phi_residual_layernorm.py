"""Layer normalisation of a phi residual, z = s · (identity + c · residual) rounded to its type.

y = scale · √t · (z − mean(z)) / √(var(z) + ε) + bias over the last axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _public
from .._numerics import accumulation_dtype, round_to, widen
from .._operation import Input, Operation, Output
from ..modes import GoldenNormMode, PhiResidualMode, check_mode
from ._layernorm import (
    cotangent_on_cpu,
    layernorm,
    layernorm_jvp,
    layernorm_vjp,
    on_cpu,
    scratch_size,
    without_spread,
)
from .phi_residual import branch_scales, golden_sum

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
    name = "phi_residual_layernorm"
    mode = check_mode(name, mode)
    epsilon = _check.epsilon(name, epsilon)
    scale_factor = _check.scale_factor(name, target_variance)
    _dispatch.check_implementation(name, implementation)
    _check.floating(name, identity=identity, residual=residual)
    _check.same_shape(name, identity=identity, residual=residual)
    given = {k: v for k, v in (("scale", scale), ("bias", bias)) if v is not None}
    _check.floating(name, **given)
    data_dtype = jnp.result_type(identity, residual)
    identity = jnp.asarray(identity, data_dtype)
    if identity.ndim == 0 or identity.shape[-1] == 0:
        raise ValueError(
            f"{name}: identity must have a last axis of at least one element to normalise over, "
            f"got shape {identity.shape}"
        )
    _check.parameter(name, identity.shape[-1:], **given)
    accumulation = accumulation_dtype(data_dtype)
    prepared = {k: jnp.asarray(p).astype(accumulation) for k, p in given.items()}
    y, *z = RESIDUAL_LAYER_NORM(
        identity,
        jnp.asarray(residual, data_dtype),
        prepared.get("scale"),
        prepared.get("bias"),
        outputs=("z",) if return_sum else (),
        mode=mode,
        epsilon=epsilon,
        scale_factor=scale_factor,
        dtype=_check.result_dtype(name, dtype, data_dtype),
        implementation=implementation,
    )
    return (y, *z) if return_sum else y


# ------------------------------------------------------------------------------- reference
#
# The layer norm of z itself, shared with golden_layer_norm, is in _layernorm.py.


def _reference(
    identity, residual, scale, bias, *, mode, epsilon, scale_factor, dtype, groups, one_cpu=False
):
    z = round_to(golden_sum(identity, residual, mode), identity.dtype)
    if one_cpu:  # once for all that reads it; elsewhere jet would round its series with it
        z = z.astype(identity.dtype)
    y, statistics = layernorm(
        z, scale, bias, epsilon, scale_factor, groups, dtype, of=identity.dtype, one_cpu=one_cpu
    )
    return y, z.astype(identity.dtype), statistics


def _tangent(saved, tangents, *, mode, scale_factor, dtype, groups):
    z, statistics, scale = saved
    *branches, d_scale, d_bias = tangents
    dz = jnp.zeros_like(widen(z))
    for d, coefficient in zip(branches, branch_scales(mode)):
        if d is not None:
            dz = dz + coefficient * widen(d)
    dy, d_statistics = layernorm_jvp(
        z, statistics, scale, dz, d_scale, d_bias, scale_factor, groups
    )
    return dy.astype(dtype), dz.astype(z.dtype), d_statistics


def _cotangent(saved, cotangents, *, mode, scale_factor, dtype, groups, ordinary=False):
    del dtype
    z, statistics, scale = saved
    ct_y, ct_z, ct_statistics = cotangents
    dz, d_scale, d_bias = layernorm_vjp(
        z, statistics, scale, ct_y, ct_statistics, scale_factor, groups, ordinary
    )
    if ct_z is not None:
        dz = dz + widen(ct_z)
    branches = [(coefficient * dz).astype(z.dtype) for coefficient in branch_scales(mode)]
    return *branches, d_scale, d_bias


# ----------------------------------------------------------------------------- declaration


def _attributes(*, mode, epsilon, scale_factor, **_):
    return {
        "sum_scale": mode.sum_scale,
        "residual_scale": mode.residual_scale,
        "epsilon": epsilon,
        "scale_factor": scale_factor,
    }


def _cotangent_attributes(*, mode, scale_factor, **_):
    identity_scale, residual_scale = branch_scales(mode)
    return {
        "identity_scale": identity_scale,
        "residual_scale": residual_scale,
        "scale_factor": scale_factor,
    }


def _one_gradient(*, mode, **_) -> bool:
    identity_scale, residual_scale = branch_scales(mode)
    return identity_scale == residual_scale


RESIDUAL_LAYER_NORM = Operation(
    name="phi_residual_layernorm",
    inputs=(
        Input("identity"),
        Input("residual"),
        Input("scale", "parameter", reaches=("y",)),
        Input("bias", "parameter", reaches=("y",)),
    ),
    outputs=(
        Output("y", dtype="dtype"),
        Output("z"),
        Output("statistics", "statistics", dtype="accumulation", size=3, inner=True),
    ),
    saved=("z", "statistics", "scale"),
    reference=_reference,
    tangent=_tangent,
    cotangent=_cotangent,
    attributes=_attributes,
    cotangent_attributes=_cotangent_attributes,
    forward_only=("epsilon",),
    twins=_one_gradient,
    scratch=scratch_size,
    on_cpu=on_cpu,
    cotangent_on_cpu=cotangent_on_cpu,
    divides_by_zero=without_spread,
)

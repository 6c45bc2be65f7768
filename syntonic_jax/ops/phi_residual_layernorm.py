"""Layer normalisation of a phi residual, z = s · (identity + c · residual) rounded to its type.

y = scale · √t · (z − mean(z)) / √(var(z) + ε) + bias over the last axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _public
from .._batching import batch_rows, masked
from .._custom_call import Value, row_call
from .._numerics import accumulation_dtype, round_to, widen
from .._primitive import bind, define, forward_mode, is_zero, transposes
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
    y, *z = bind(
        phi_residual_layernorm_p,
        identity,
        jnp.asarray(residual, data_dtype),
        *(jnp.asarray(p).astype(accumulation) for p in given.values()),
        has_scale=scale is not None,
        has_bias=bias is not None,
        mode=mode,
        epsilon=epsilon,
        scale_factor=scale_factor,
        dtype=_check.result_dtype(name, dtype, data_dtype),
        return_sum=return_sum,
        residuals=False,
        groups=0,
        implementation=implementation,
    )
    return (y, *z) if return_sum else y


# ------------------------------------------------------------------------------- reference
#
# The layer norm of z itself, shared with golden_layer_norm, is in _layernorm.py.


def _reference(
    identity, residual, *parameters, has_scale, has_bias, mode, epsilon, scale_factor, dtype,
    return_sum, residuals, groups, one_cpu=False,
):  # fmt: skip
    z = round_to(golden_sum(identity, residual, mode), identity.dtype)
    if one_cpu:  # once for all that reads it; elsewhere jet would round its series with it
        z = z.astype(identity.dtype)
    scale, bias = parameters[:has_scale], parameters[has_scale : has_scale + has_bias]
    y, statistics = layernorm(
        z, scale, bias, epsilon, scale_factor, groups, dtype, of=identity.dtype, one_cpu=one_cpu
    )
    results = (y, z.astype(identity.dtype), statistics)
    return results if residuals else results[: 1 + return_sum]


def _tangent_reference(
    z, statistics, *operands, has_scale, mode, scale_factor, dtype, groups, inputs, outputs
):
    scale, tangents = operands[:has_scale], iter(operands[has_scale:])
    d_identity, d_residual, d_scale, d_bias = [next(tangents) if i else None for i in inputs]
    dz = jnp.zeros_like(widen(z))
    for d, coefficient in zip((d_identity, d_residual), branch_scales(mode)):
        if d is not None:
            dz = dz + coefficient * widen(d)
    dy, d_statistics = layernorm_jvp(
        z, statistics, scale, dz, d_scale, d_bias, scale_factor, groups
    )
    results = (dy.astype(dtype), dz.astype(z.dtype), d_statistics)
    return tuple(r for r, wanted in zip(results, outputs) if wanted)


def _cotangent_reference(
    z, statistics, *operands, has_scale, mode, scale_factor, dtype, groups, inputs, outputs,
    ordinary=False,
):  # fmt: skip
    scale, cotangents = operands[:has_scale], iter(operands[has_scale:])
    ct_y, ct_z, ct_statistics = [next(cotangents) if o else None for o in outputs]
    dz, d_scale, d_bias = layernorm_vjp(
        z, statistics, scale, ct_y, ct_statistics, scale_factor, groups, ordinary
    )
    if ct_z is not None:
        dz = dz + widen(ct_z)
    branches = [(coefficient * dz).astype(z.dtype) for coefficient in branch_scales(mode)]
    return tuple(r for r, i in zip((*branches, d_scale, d_bias), inputs) if i)


# ------------------------------------------------------------------------------ primitives


def _kernel(identity, residual, *parameters, devices, **params):
    if identity.size == 0:
        return _reference(identity, residual, *parameters, **params)
    has_scale, has_bias, mode = params["has_scale"], params["has_bias"], params["mode"]
    accumulation = accumulation_dtype(identity.dtype)
    keep_sum = params["return_sum"] or params["residuals"]
    results = [Value("row", dtype=params["dtype"])]
    results += [Value("row", dtype=identity.dtype)] * keep_sum
    results += [Value("statistics", dtype=accumulation, size=3)] * params["residuals"]
    return row_call(
        "syntonic_phi_residual_layernorm",
        [Value("row", identity), Value("row", residual)]
        + [Value("parameter", p) for p in parameters],
        results,
        groups=params["groups"],
        devices=devices,
        sum_scale=mode.sum_scale,
        residual_scale=mode.residual_scale,
        epsilon=params["epsilon"],
        scale_factor=params["scale_factor"],
        operands=has_scale + 2 * has_bias,
        results=keep_sum + 2 * params["residuals"],
    )


def _cotangent_kernel(z, statistics, *operands, devices, **params):
    inputs, outputs, has_scale = params["inputs"], params["outputs"], params["has_scale"]
    # The kernel is for what a training step asks. Without a cotangent of y nothing is reduced;
    # cotangents of the statistics come only with second derivatives.
    if z.size == 0 or not outputs[0] or any(outputs[2:]):
        return _cotangent_reference(z, statistics, *operands, **params)
    identity_scale, residual_scale = branch_scales(params["mode"])
    shared = identity_scale == residual_scale and inputs[0] and inputs[1]
    wanted = (inputs[0], inputs[1] and not shared, *inputs[2:])  # one buffer serves both
    accumulation = accumulation_dtype(z.dtype)
    results = [Value("row", dtype=z.dtype)] * sum(wanted[:2])
    results += [Value("partial", dtype=accumulation)] * sum(wanted[2:])
    if any(wanted[2:]):
        results.append(Value("scratch", dtype=accumulation, size=scratch_size(z) * sum(wanted[2:])))
    scale, cotangents = operands[:has_scale], operands[has_scale:]
    out = row_call(
        "syntonic_phi_residual_layernorm_cotangent",
        [Value("row", z), Value("statistics", statistics, size=3)]
        + [Value("parameter", p) for p in scale]
        + [Value("row", ct) for ct in cotangents],
        results,
        groups=params["groups"],
        devices=devices,
        identity_scale=identity_scale,
        residual_scale=residual_scale,
        scale_factor=params["scale_factor"],
        operands=has_scale + 2 * outputs[1],
        results=sum(bit << i for i, bit in enumerate(wanted)),
    )
    return [out[0], *out] if shared else out


phi_residual_layernorm_p = define(
    "phi_residual_layernorm",
    _reference,
    operation="phi_residual_layernorm",
    kernel=_kernel,
    on_cpu=on_cpu(_reference),
    divides_by_zero=without_spread(_reference),
)
phi_residual_layernorm_tangent_p = define(
    "phi_residual_layernorm_tangent", _tangent_reference, operation="phi_residual_layernorm"
)
phi_residual_layernorm_cotangent_p = define(
    "phi_residual_layernorm_cotangent",
    _cotangent_reference,
    operation="phi_residual_layernorm",
    kernel=_cotangent_kernel,
    on_cpu=cotangent_on_cpu(_cotangent_reference),
)

# ----------------------------------------------------------------------------------- rules


def _jvp(primals, tangents, *, has_bias, epsilon, return_sum, residuals, **params):
    y, z, statistics = bind(
        phi_residual_layernorm_p,
        *primals,
        has_bias=has_bias,
        epsilon=epsilon,
        return_sum=return_sum,
        residuals=True,
        **params,
    )
    count = 3 if residuals else 1 + return_sum
    has_scale = params["has_scale"]
    present = iter([not is_zero(t) for t in tangents])
    exists = (True, True, has_scale, has_bias)
    tangents = bind(
        phi_residual_layernorm_tangent_p,
        *(z, statistics),
        *primals[2 : 2 + has_scale],
        *(t for t in tangents if not is_zero(t)),
        inputs=tuple(e and next(present) for e in exists),
        outputs=tuple(i < count for i in range(3)),
        **params,
    )
    return [y, z, statistics][:count], tangents


_INPUT_KINDS = ("row", "row", "parameter", "parameter")
_OUTPUT_KINDS = ("row", "row", "row")


def _kinds(*, has_scale, has_bias, **_):
    return ["row", "row"] + ["parameter"] * (has_scale + has_bias), _OUTPUT_KINDS


def _tangent_kinds(*, has_scale, inputs, outputs, **_):
    residuals = ["row", "row"] + ["parameter"] * has_scale
    return residuals + masked(_INPUT_KINDS, inputs), masked(_OUTPUT_KINDS, outputs)


def _cotangent_kinds(*, has_scale, inputs, outputs, **_):
    residuals = ["row", "row"] + ["parameter"] * has_scale
    return residuals + masked(_OUTPUT_KINDS, outputs), masked(_INPUT_KINDS, inputs)


forward_mode(phi_residual_layernorm_p, _jvp)
transposes(
    phi_residual_layernorm_tangent_p,
    phi_residual_layernorm_cotangent_p,
    _tangent_reference,
    _cotangent_reference,
    # Scale and bias reach y only.
    reach=((True,) * 3, (True,) * 3, (True, False, False), (True, False, False)),
)
batch_rows(phi_residual_layernorm_p, _kinds)
batch_rows(phi_residual_layernorm_tangent_p, _tangent_kinds)
batch_rows(phi_residual_layernorm_cotangent_p, _cotangent_kinds)

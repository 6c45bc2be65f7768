"""Layer normalisation to a target variance t.

y = scale · √t · (x − mean(x)) / √(var(x) + ε) + bias over the reduced axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _public
from .._numerics import accumulation_dtype, widen
from .._operation import Input, Operation, Output
from ..modes import GoldenNormMode
from ._layernorm import (
    cotangent_on_cpu,
    layernorm,
    layernorm_jvp,
    layernorm_vjp,
    on_cpu,
    scratch_size,
    without_spread,
)
from ._merged_axes import merge_of, spec_of_formula

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
    # jit hashes what is static and takes 1 for True: what is unusual is checked before it.
    if type(epsilon) is not float:
        epsilon = _check.epsilon(name, epsilon)
    if type(target_variance) is not str:
        target_variance = _check.target_variance(name, target_variance)
    if type(axis) is not int:
        axis = _check.static_axes(name, axis)
    return _golden_layer_norm(x, scale, bias, axis, epsilon, target_variance, dtype, implementation)


@_public.jit(
    "axis", "epsilon", "target_variance", "dtype", "implementation", function="golden_layer_norm"
)
def _golden_layer_norm(x, scale, bias, axis, epsilon, target_variance, dtype, implementation):
    name = "golden_layer_norm"
    epsilon = _check.epsilon(name, epsilon)
    scale_factor = _check.scale_factor(name, target_variance)
    _dispatch.check_implementation(name, implementation)
    _check.floating(name, x=x)
    given = {k: v for k, v in (("scale", scale), ("bias", bias)) if v is not None}
    _check.floating(name, **given)
    x = jnp.asarray(x)
    axes = _check.axes(name, axis, x.ndim)
    shape = tuple(x.shape[a] for a in axes)
    if not axes or 0 in shape:
        raise ValueError(
            f"{name}: axis must name at least one axis, of at least one element, to normalise "
            f"over, got axes {axes} of shape {x.shape}"
        )
    _check.parameter(name, shape, **given)
    accumulation = accumulation_dtype(x.dtype)
    parameters = [jnp.asarray(p) for p in given.values()]
    merge = merge_of(x, axes)
    prepared = {k: merge.parameter(jnp.asarray(p)).astype(accumulation) for k, p in given.items()}
    (y,) = LAYER_NORM(
        merge.array(x),
        prepared.get("scale"),
        prepared.get("bias"),
        epsilon=epsilon,
        scale_factor=scale_factor,
        dtype=_check.result_dtype(name, dtype, x.dtype),
        implementation=implementation,
    )
    return merge.restore(y, spec_of_formula(merge, x, parameters) if len(axes) > 1 else None)


# ------------------------------------------------------------------------------- reference
#
# The layer norm of rows itself, shared with phi_residual_layernorm, is in _layernorm.py.


def _reference(x, scale, bias, *, epsilon, scale_factor, dtype, groups, one_cpu=False):
    return layernorm(
        x, scale, bias, epsilon, scale_factor, groups, dtype, of=x.dtype, one_cpu=one_cpu
    )


def _tangent(saved, tangents, *, scale_factor, dtype, groups):
    x, statistics, scale = saved
    dx, d_scale, d_bias = tangents
    dx = jnp.zeros_like(widen(x)) if dx is None else widen(dx)
    dy, d_statistics = layernorm_jvp(
        x, statistics, scale, dx, d_scale, d_bias, scale_factor, groups
    )
    return dy.astype(dtype), d_statistics


def _cotangent(saved, cotangents, *, scale_factor, dtype, groups, ordinary=False):
    del dtype
    x, statistics, scale = saved
    ct_y, ct_statistics = cotangents
    dx, d_scale, d_bias = layernorm_vjp(
        x, statistics, scale, ct_y, ct_statistics, scale_factor, groups, ordinary
    )
    return dx.astype(x.dtype), d_scale, d_bias


# ----------------------------------------------------------------------------- declaration


def _attributes(*, epsilon, scale_factor, **_):
    return {"epsilon": epsilon, "scale_factor": scale_factor}


def _cotangent_attributes(*, scale_factor, **_):
    return {"scale_factor": scale_factor}


LAYER_NORM = Operation(
    name="golden_layer_norm",
    inputs=(
        Input("x"),
        Input("scale", "parameter", reaches=("y",)),
        Input("bias", "parameter", reaches=("y",)),
    ),
    outputs=(
        Output("y", dtype="dtype"),
        Output("statistics", "statistics", dtype="accumulation", size=3, inner=True),
    ),
    saved=("x", "statistics", "scale"),
    reference=_reference,
    tangent=_tangent,
    cotangent=_cotangent,
    attributes=_attributes,
    cotangent_attributes=_cotangent_attributes,
    forward_only=("epsilon",),
    scratch=scratch_size,
    on_cpu=on_cpu,
    cotangent_on_cpu=cotangent_on_cpu,
    divides_by_zero=without_spread,
)

"""Layer normalisation to a target variance t.

y = scale · √t · (x − mean(x)) / √(var(x) + ε) + bias over the reduced axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _public
from .._batching import batch_rows, masked
from .._custom_call import Value, row_call
from .._numerics import accumulation_dtype, widen
from .._primitive import bind, define, forward_mode, is_zero, transposes
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
    (y,) = bind(
        golden_layer_norm_p,
        merge.array(x),
        *(merge.parameter(p).astype(accumulation) for p in parameters),
        has_scale=scale is not None,
        has_bias=bias is not None,
        epsilon=epsilon,
        scale_factor=scale_factor,
        dtype=_check.result_dtype(name, dtype, x.dtype),
        residuals=False,
        groups=0,
        implementation=implementation,
    )
    return merge.restore(y, spec_of_formula(merge, x, parameters) if len(axes) > 1 else None)


# ------------------------------------------------------------------------------- reference
#
# The layer norm of rows itself, shared with phi_residual_layernorm, is in _layernorm.py.


def _reference(
    x, *parameters, has_scale, has_bias, epsilon, scale_factor, dtype, residuals, groups,
    one_cpu=False,
):  # fmt: skip
    scale, bias = parameters[:has_scale], parameters[has_scale : has_scale + has_bias]
    results = layernorm(
        x, scale, bias, epsilon, scale_factor, groups, dtype, of=x.dtype, one_cpu=one_cpu
    )
    return results[: 1 + residuals]


def _tangent_reference(
    x, statistics, *operands, has_scale, scale_factor, dtype, groups, inputs, outputs
):
    scale, tangents = operands[:has_scale], iter(operands[has_scale:])
    dx, d_scale, d_bias = [next(tangents) if i else None for i in inputs]
    dx = jnp.zeros_like(widen(x)) if dx is None else widen(dx)
    dy, d_statistics = layernorm_jvp(
        x, statistics, scale, dx, d_scale, d_bias, scale_factor, groups
    )
    return tuple(r for r, wanted in zip((dy.astype(dtype), d_statistics), outputs) if wanted)


def _cotangent_reference(
    x, statistics, *operands, has_scale, scale_factor, dtype, groups, inputs, outputs,
    ordinary=False,
):  # fmt: skip
    del dtype
    scale, cotangents = operands[:has_scale], iter(operands[has_scale:])
    ct_y, ct_statistics = [next(cotangents) if o else None for o in outputs]
    dx, d_scale, d_bias = layernorm_vjp(
        x, statistics, scale, ct_y, ct_statistics, scale_factor, groups, ordinary
    )
    return tuple(r for r, i in zip((dx.astype(x.dtype), d_scale, d_bias), inputs) if i)


# ------------------------------------------------------------------------------ primitives


def _kernel(x, *parameters, devices, **params):
    if x.size == 0:
        return _reference(x, *parameters, **params)
    accumulation = accumulation_dtype(x.dtype)
    return row_call(
        "syntonic_golden_layer_norm",
        [Value("row", x)] + [Value("parameter", p) for p in parameters],
        [Value("row", dtype=params["dtype"])]
        + [Value("statistics", dtype=accumulation, size=3)] * params["residuals"],
        groups=params["groups"],
        devices=devices,
        epsilon=params["epsilon"],
        scale_factor=params["scale_factor"],
        operands=params["has_scale"] + 2 * params["has_bias"],
        residuals=int(params["residuals"]),
    )


def _cotangent_kernel(x, statistics, *operands, devices, **params):
    inputs, outputs, has_scale = params["inputs"], params["outputs"], params["has_scale"]
    # Cotangents of the statistics come only with second derivatives.
    if x.size == 0 or outputs != (True, False):
        return _cotangent_reference(x, statistics, *operands, **params)
    accumulation = accumulation_dtype(x.dtype)
    sums = sum(inputs[1:])
    results = [Value("row", dtype=x.dtype)] * inputs[0]
    results += [Value("partial", dtype=accumulation)] * sums
    if sums:
        results.append(Value("scratch", dtype=accumulation, size=scratch_size(x) * sums))
    return row_call(
        "syntonic_golden_layer_norm_cotangent",
        [Value("row", x), Value("statistics", statistics, size=3)]
        + [Value("parameter", p) for p in operands[:has_scale]]
        + [Value("row", operands[has_scale])],
        results,
        groups=params["groups"],
        devices=devices,
        scale_factor=params["scale_factor"],
        operands=int(has_scale),
        results=sum(bit << i for i, bit in enumerate(inputs)),
    )


golden_layer_norm_p = define(
    "golden_layer_norm",
    _reference,
    operation="golden_layer_norm",
    kernel=_kernel,
    on_cpu=on_cpu(_reference),
    divides_by_zero=without_spread(_reference),
)
golden_layer_norm_tangent_p = define(
    "golden_layer_norm_tangent", _tangent_reference, operation="golden_layer_norm"
)
golden_layer_norm_cotangent_p = define(
    "golden_layer_norm_cotangent",
    _cotangent_reference,
    operation="golden_layer_norm",
    kernel=_cotangent_kernel,
    on_cpu=cotangent_on_cpu(_cotangent_reference),
)

# ----------------------------------------------------------------------------------- rules


def _jvp(primals, tangents, *, has_bias, epsilon, residuals, **params):
    y, statistics = bind(
        golden_layer_norm_p,
        *primals,
        has_bias=has_bias,
        epsilon=epsilon,
        residuals=True,
        **params,
    )
    has_scale = params["has_scale"]
    present = iter([not is_zero(t) for t in tangents])
    tangents = bind(
        golden_layer_norm_tangent_p,
        *(primals[0], statistics),
        *primals[1 : 1 + has_scale],
        *(t for t in tangents if not is_zero(t)),
        inputs=tuple(exists and next(present) for exists in (True, has_scale, has_bias)),
        outputs=(True, residuals),
        **params,
    )
    return [y, statistics][: 1 + residuals], tangents


_INPUT_KINDS = ("row", "parameter", "parameter")
_OUTPUT_KINDS = ("row", "row")


def _kinds(*, has_scale, has_bias, **_):
    return ["row"] + ["parameter"] * (has_scale + has_bias), _OUTPUT_KINDS


def _tangent_kinds(*, has_scale, inputs, outputs, **_):
    residuals = ["row", "row"] + ["parameter"] * has_scale
    return residuals + masked(_INPUT_KINDS, inputs), masked(_OUTPUT_KINDS, outputs)


def _cotangent_kinds(*, has_scale, inputs, outputs, **_):
    residuals = ["row", "row"] + ["parameter"] * has_scale
    return residuals + masked(_OUTPUT_KINDS, outputs), masked(_INPUT_KINDS, inputs)


forward_mode(golden_layer_norm_p, _jvp)
transposes(
    golden_layer_norm_tangent_p,
    golden_layer_norm_cotangent_p,
    _tangent_reference,
    _cotangent_reference,
    # Scale and bias reach y only.
    reach=((True, True), (True, False), (True, False)),
)
batch_rows(golden_layer_norm_p, _kinds)
batch_rows(golden_layer_norm_tangent_p, _tangent_kinds)
batch_rows(golden_layer_norm_cotangent_p, _cotangent_kinds)

"""Softmax with weights, and its logarithm: softmax(x + scale · log w).

w is 1, exp(−|n|²/φ) for the mode norms |n|² of the classes, or given as a syntony.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _public
from .._batching import batch_rows, masked
from .._custom_call import Value
from .._numerics import accumulation_dtype
from .._primitive import bind, define, forward_mode, transposes
from ._softmax import (
    INPUT_KINDS,
    Form,
    checked_scale,
    input_tangents,
    log_softmax,
    logit_cotangent,
    logit_tangent,
    logits_of,
    normalised_jvp,
    normalised_kinds,
    normaliser,
    prepare,
    probabilities,
    select,
    softmax,
)
from ._softmax_kernels import call, cotangents, logit_values, normalised_cotangent, of_one_type

# ---------------------------------------------------------------------------------- public


def syntonic_softmax(
    x: ArrayLike,
    *,
    mode_norms: ArrayLike | None = None,
    syntony: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax along an axis, every class with a weight: w^scale · exp(x), normalised.

    That is the softmax of x + scale · log w: of x − scale · φ⁻¹ · mode_norms (w = exp(−|n|²/φ)),
    of x + scale · log(max(syntony, 1e-10)), or, with neither, of x itself, as `jax.nn.softmax`.
    Differentiable in x, mode_norms, syntony and scale; the derivative by a syntony up to 1e-10 is
    0. Derivatives are computed from y as it is returned, in its type.

    Args:
      x: array of float16, bfloat16, float32 or float64.
      mode_norms: |n|² of every class, of shape (size of the axis,), or None; any floating type, it
        does not promote the result.
      syntony: the weights themselves, in a shape that broadcasts to that of x, or None; likewise.
      scale: a number or an array without axes, which may be traced.
      axis: the axis along which y sums to 1. No axis is transposed for it.
      where: boolean array, broadcastable to x: which elements take part. The others have y = 0 and
        no gradient, whatever they are, and a row without any is 0.
      dtype: type of y; None: that of x.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      y of the shape of x, computed in float32 (float64 for float64 data) and rounded once. A row
      with a +inf, with a NaN, or of −inf alone is NaN. So is one whose largest x + scale · log w is
      beyond the type of the computation. A scale · log w beyond it is ±inf, also where x would
      bring the sum back.

    Raises:
      TypeError: an array or `dtype` is not real floating point, `where` not boolean, or `axis` no
        integer.
      ValueError: mode_norms and syntony are both given, one of them or `where` does not fit x, x or
        `scale` has no axes or too many, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> x = jnp.zeros(3)
    >>> np.asarray(syntonic_softmax(x, mode_norms=jnp.array([0.0, 1.0, 4.0]))).round(3)
    array([0.616, 0.332, 0.052], dtype=float32)
    >>> np.asarray(syntonic_softmax(x, syntony=jnp.array([1.0, 3.0, 4.0]))).round(3)
    array([0.125, 0.375, 0.5  ], dtype=float32)
    """
    name = "syntonic_softmax"
    axis, scale = _check.integer_axis(name, axis), checked_scale(name, scale)
    return _softmax(name, x, mode_norms, syntony, scale, where, axis, dtype, implementation)


def syntonic_log_softmax(
    x: ArrayLike,
    *,
    mode_norms: ArrayLike | None = None,
    syntony: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The logarithm of `syntonic_softmax`, without its underflow.

    With z = x + scale · log w it is z − log Σ exp(z). Derivatives are computed from x.

    Args:
      x: array of float16, bfloat16, float32 or float64.
      mode_norms: |n|² of every class, of shape (size of the axis,), or None; any floating type, it
        does not promote the result.
      syntony: the weights themselves, in a shape that broadcasts to that of x, or None; likewise.
      scale: a number or an array without axes, which may be traced.
      axis: the axis along which exp(y) sums to 1. No axis is transposed for it.
      where: boolean array, broadcastable to x: which elements take part. The others have y = −inf
        and no gradient, whatever they are.
      dtype: type of y; None: that of x.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      y of the shape of x, computed in float32 (float64 for float64 data) and rounded once. A row
      with a +inf, with a NaN, or of −inf alone is NaN. So is one whose largest x + scale · log w is
      beyond the type of the computation. A scale · log w beyond it is ±inf, also where x would
      bring the sum back.

    Raises:
      TypeError: an array or `dtype` is not real floating point, `where` not boolean, or `axis` no
        integer.
      ValueError: mode_norms and syntony are both given, one of them or `where` does not fit x, x or
        `scale` has no axes or too many, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> y = syntonic_log_softmax(jnp.zeros(3), syntony=jnp.array([1.0, 3.0, 4.0]))
    >>> np.asarray(y).round(3), np.log([0.125, 0.375, 0.5]).round(3)
    (array([-2.079, -0.981, -0.693], dtype=float32), array([-2.079, -0.981, -0.693]))
    """
    name = "syntonic_log_softmax"
    axis, scale = _check.integer_axis(name, axis), checked_scale(name, scale)
    return _softmax(name, x, mode_norms, syntony, scale, where, axis, dtype, implementation)


@_public.jit("function", "axis", "dtype", "implementation")
def _softmax(function, x, mode_norms, syntony, scale, where, axis, dtype, implementation):
    _dispatch.check_implementation(function, implementation)
    logits, form = prepare(function, x, mode_norms, syntony, scale, axis, where)
    params: dict[str, Any] = {
        "form": form,
        "dtype": _check.result_dtype(function, dtype, logits.x.dtype),
        "groups": 0,
        "implementation": implementation,
    }
    if function == "syntonic_softmax":
        (y,) = bind(syntonic_softmax_p, *logits.present(), **params)
    else:
        (y,) = bind(syntonic_log_softmax_p, *logits.present(), residuals=False, **params)
    return y


# ------------------------------------------------------------------------------- reference
#
# Logits and probabilities, shared with syntonic_cross_entropy, are in _softmax.py.


def _reference(*operands, form: Form, dtype, groups):
    parts, _ = form.split(operands)
    z = logits_of(parts, form, groups, hide=False)
    return (softmax(z, parts, form).astype(dtype),)


def _log_reference(*operands, form: Form, dtype, residuals, groups):
    parts, _ = form.split(operands)
    z = logits_of(parts, form, groups, hide=False)
    largest, total = normaliser(z, parts, form)
    log_total = jnp.log(total)
    y = log_softmax(z, parts.mask, largest, log_total, form, -jnp.inf).astype(dtype)
    return (y, largest, log_total) if residuals else (y,)


def _tangent_reference(y, *operands, form: Form, dtype, row_dtype, groups, inputs, outputs):
    del outputs
    y, mask, tangents = _residuals(y, operands, form, row_dtype)
    dz = logit_tangent(tangents, inputs, y, mask, y.dtype, form, groups)
    return (_product(y, dz, mask, form).astype(dtype),)


def _cotangent_reference(y, *operands, form: Form, dtype, row_dtype, groups, inputs, outputs):
    del dtype, outputs
    y, mask, (ct,) = _residuals(y, operands, form, row_dtype)
    ct = select(mask, ct.astype(y.dtype), 0)
    return logit_cotangent(_product(y, ct, mask, form), inputs, row_dtype, form, groups)


def _residuals(y, operands, form: Form, row_dtype):
    """y in the accumulation type, the mask or None, and the linear operands."""
    mask = operands[0] if form.mask else None
    return y.astype(accumulation_dtype(row_dtype)), mask, operands[form.mask :]


def _product(y, v, mask, form: Form):
    """The derivative of a softmax, which is its own transpose, times v; nothing under the mask.

    There y is 0, but what a row that is NaN takes off is NaN.
    """
    return select(mask, y * (v - (y * v).sum(form.axis(y), keepdims=True)), 0)


def _log_tangent_reference(*operands, form: Form, dtype, row_dtype, groups, inputs, outputs):
    del row_dtype
    parts, (largest, log_total, *tangents) = form.split(operands)
    p = probabilities(parts, largest, log_total, form, groups)
    dz = logit_tangent(tangents, inputs, p, parts.mask, p.dtype, form, groups)
    along = (p * dz).sum(form.axis(p), keepdims=True)
    dy = select(parts.mask, dz - along, 0).astype(dtype)
    results = (dy, along.squeeze(form.axis(p)))
    return tuple(r for r, wanted in zip(results, outputs) if wanted)


def _log_cotangent_reference(*operands, form: Form, dtype, row_dtype, groups, inputs, outputs):
    del dtype
    parts, (largest, log_total, *cotangents) = form.split(operands)
    p, axis, values = (
        probabilities(parts, largest, log_total, form, groups),
        form.axis(parts.x),
        iter(cotangents),
    )
    ct = jnp.zeros_like(p)
    if outputs[0]:
        ct_y = select(parts.mask, next(values).astype(p.dtype), 0)
        ct = ct_y - p * ct_y.sum(axis, keepdims=True)
    if outputs[1]:
        ct = ct + p * jnp.expand_dims(next(values), axis)
    return logit_cotangent(ct, inputs, row_dtype, form, groups)


# ------------------------------------------------------------------------------ primitives


def _call(parts, form: Form, dtype, *, log, residuals=False, **where):
    number = accumulation_dtype(dtype)
    kept = [Value(name, "vector", dtype=number) for name in ("max", "log_sum")]
    return call(
        "syntonic_softmax",
        logit_values(parts),
        [Value("y", "row", dtype=dtype), *(kept if residuals else [])],
        form,
        inner=int(form.trailing > 0),
        log=log,
        **where,
    )


def _kernel(*operands, devices, form: Form, dtype, groups):
    parts, _ = form.split(operands)
    if parts.x.size == 0 or not of_one_type(parts, dtype):
        return _reference(*operands, form=form, dtype=dtype, groups=groups)
    return _call(parts, form, dtype, log=0, groups=groups, devices=devices)


def _log_kernel(*operands, devices, form: Form, dtype, residuals, groups):
    parts, _ = form.split(operands)
    if parts.x.size == 0 or not of_one_type(parts, dtype):
        return _log_reference(*operands, form=form, dtype=dtype, residuals=residuals, groups=groups)
    return _call(parts, form, dtype, log=1, residuals=residuals, groups=groups, devices=devices)


def _cotangent_kernel(y, *operands, devices, **params):
    form, inputs = params["form"], params["inputs"]
    results = cotangents(y, inputs, form)
    *mask, ct = operands
    if results is None or {y.dtype, ct.dtype} != {params["row_dtype"]}:
        return _cotangent_reference(y, *operands, **params)
    return call(
        "syntonic_softmax_cotangent",
        [Value("y", "row", y)] + [Value("mask", "row", m) for m in mask] + [Value("ct", "row", ct)],
        results,
        form._replace(bias=False, weights=False),
        groups=params["groups"],
        devices=devices,
        inner=int(form.trailing > 0),
    )


def _log_cotangent_kernel(*operands, devices, **params):
    return normalised_cotangent(
        "syntonic_softmax_cotangent",
        _log_cotangent_reference,
        ("max", "log_sum", "ct"),
        operands,
        devices,
        params,
        inner=int(params["form"].trailing > 0),
    )


syntonic_softmax_p = define(
    "syntonic_softmax", _reference, operation="syntonic_softmax", kernel=_kernel
)
syntonic_softmax_tangent_p = define(
    "syntonic_softmax_tangent", _tangent_reference, operation="syntonic_softmax"
)
syntonic_softmax_cotangent_p = define(
    "syntonic_softmax_cotangent",
    _cotangent_reference,
    operation="syntonic_softmax",
    kernel=_cotangent_kernel,
)
syntonic_log_softmax_p = define(
    "syntonic_log_softmax",
    _log_reference,
    operation="syntonic_log_softmax",
    kernel=_log_kernel,
)
syntonic_log_softmax_tangent_p = define(
    "syntonic_log_softmax_tangent", _log_tangent_reference, operation="syntonic_log_softmax"
)
syntonic_log_softmax_cotangent_p = define(
    "syntonic_log_softmax_cotangent",
    _log_cotangent_reference,
    operation="syntonic_log_softmax",
    kernel=_log_cotangent_kernel,
)

# ----------------------------------------------------------------------------------- rules


def _jvp(primals, tangents, *, form: Form, dtype, groups, implementation):
    shared = {"form": form, "dtype": dtype, "groups": groups, "implementation": implementation}
    (y,) = bind(syntonic_softmax_p, *primals, **shared)
    given, inputs, row_dtype = input_tangents(primals, tangents, form, groups)
    dy = bind(
        syntonic_softmax_tangent_p,
        y,
        *primals[len(primals) - form.mask :],
        *given,
        row_dtype=row_dtype,
        inputs=inputs,
        outputs=(True,),
        **shared,
    )
    return [y], dy


def _kinds(*, form: Form, **_):
    return form.kinds(), ["row"]


def _tangent_kinds(*, form: Form, inputs, **_):
    return ["row"] * (1 + form.mask) + masked(INPUT_KINDS, inputs), ["row"]


def _cotangent_kinds(*, form: Form, inputs, **_):
    return ["row"] * (2 + form.mask), masked(INPUT_KINDS, inputs)


_log_kinds, _log_tangent_kinds, _log_cotangent_kinds = normalised_kinds("row")

forward_mode(syntonic_softmax_p, _jvp)
transposes(
    syntonic_softmax_tangent_p,
    syntonic_softmax_cotangent_p,
    _tangent_reference,
    _cotangent_reference,
    reach=((True,), (True,)),
)
batch_rows(syntonic_softmax_p, _kinds)
batch_rows(syntonic_softmax_tangent_p, _tangent_kinds)
batch_rows(syntonic_softmax_cotangent_p, _cotangent_kinds)

forward_mode(
    syntonic_log_softmax_p, normalised_jvp(syntonic_log_softmax_p, syntonic_log_softmax_tangent_p)
)
transposes(
    syntonic_log_softmax_tangent_p,
    syntonic_log_softmax_cotangent_p,
    _log_tangent_reference,
    _log_cotangent_reference,
    reach=((True, True), (True, True)),
)
batch_rows(syntonic_log_softmax_p, _log_kinds)
batch_rows(syntonic_log_softmax_tangent_p, _log_tangent_kinds)
batch_rows(syntonic_log_softmax_cotangent_p, _log_cotangent_kinds)

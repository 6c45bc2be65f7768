"""Softmax with weights, and its logarithm: softmax(x + scale · log w).

w is 1, exp(−|n|²/φ) for the mode norms |n|² of the classes, or given as a syntony.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _public
from .._numerics import accumulation_dtype
from .._operation import Operation, Output
from ._softmax import (
    LOGIT_INPUTS,
    MOVED,
    NORMALISER,
    Logits,
    axis_of,
    checked_scale,
    log_softmax,
    logit_cotangent,
    logit_tangent,
    logits_of,
    move,
    normaliser,
    prepare,
    probabilities,
    select,
    softmax,
)
from ._softmax_kernels import ALONG_AXIS, kernels

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
    logits, trailing = prepare(function, x, mode_norms, syntony, scale, axis, where)
    operation = SOFTMAX if function == SOFTMAX.name else LOG_SOFTMAX
    (y,) = operation(
        *logits,
        trailing=trailing,
        dtype=_check.result_dtype(function, dtype, logits.x.dtype),
        implementation=implementation,
    )
    return y


# ------------------------------------------------------------------------------- reference
#
# Logits and probabilities, shared with syntonic_cross_entropy, are in _softmax.py.


def _reference(*inputs, trailing, dtype, groups):
    parts = Logits(*inputs)
    z = logits_of(parts, trailing, groups, hide=False)
    return (softmax(z, parts, trailing).astype(dtype),)


def _tangent(saved, tangents, *, trailing, dtype, data_dtype, groups):
    y, mask = saved
    y = y.astype(accumulation_dtype(data_dtype))
    dz = logit_tangent(tangents, y, mask, y.dtype, trailing, groups)
    return (_product(y, dz, mask, trailing).astype(dtype),)


def _cotangent(saved, cotangents, *, trailing, dtype, data_dtype, groups):
    del dtype
    (y, mask), (ct,) = saved, cotangents
    y = y.astype(accumulation_dtype(data_dtype))
    ct = select(mask, ct.astype(y.dtype), 0)
    return logit_cotangent(_product(y, ct, mask, trailing), data_dtype, trailing, groups)


def _product(y, v, mask, trailing):
    """The derivative of a softmax, which is its own transpose, times v; nothing under the mask.

    There y is 0, but what a row that is NaN takes off is NaN.
    """
    return select(mask, y * (v - (y * v).sum(axis_of(y, trailing), keepdims=True)), 0)


def _log_reference(*inputs, trailing, dtype, groups):
    parts = Logits(*inputs)
    z = logits_of(parts, trailing, groups, hide=False)
    largest, total = normaliser(z, parts, trailing)
    log_total = jnp.log(total)
    y = log_softmax(z, parts.mask, largest, log_total, trailing, -jnp.inf)
    return y.astype(dtype), largest, log_total


def _log_tangent(saved, tangents, *, trailing, dtype, data_dtype, groups):
    del data_dtype
    *parts, largest, log_total = saved
    parts = Logits(*parts)
    p, axis = probabilities(parts, largest, log_total, trailing, groups), axis_of(parts.x, trailing)
    dz = logit_tangent(tangents, p, parts.mask, p.dtype, trailing, groups)
    along = (p * dz).sum(axis, keepdims=True)
    dy = select(parts.mask, dz - along, 0).astype(dtype)
    return dy, along.squeeze(axis)


def _log_cotangent(saved, cotangents, *, trailing, dtype, data_dtype, groups):
    del dtype
    *parts, largest, log_total = saved
    parts, (ct_y, ct_log_sum) = Logits(*parts), cotangents
    p, axis = probabilities(parts, largest, log_total, trailing, groups), axis_of(parts.x, trailing)
    ct = jnp.zeros_like(p)
    if ct_y is not None:
        ct_y = select(parts.mask, ct_y.astype(p.dtype), 0)
        ct = ct_y - p * ct_y.sum(axis, keepdims=True)
    if ct_log_sum is not None:
        ct = ct + p * jnp.expand_dims(ct_log_sum, axis)
    return logit_cotangent(ct, data_dtype, trailing, groups)


# ----------------------------------------------------------------------------- declaration


def _covers(results, *, trailing, **_):
    """Sums of classes are those of rows that are contiguous."""
    return not (trailing and "d_bias" in results)


def _inner(*, trailing, **_):
    return {"inner": int(trailing > 0)}


SOFTMAX = Operation(
    name="syntonic_softmax",
    inputs=LOGIT_INPUTS,
    outputs=(Output("y", dtype="dtype"),),
    saved=("y", "mask"),
    moved=MOVED,
    move=move,
    reference=_reference,
    tangent=_tangent,
    cotangent=_cotangent,
    kernels=kernels(
        _covers,
        target="softmax",
        attributes=lambda **params: {**_inner(**params), "log": 0},
        cotangent_attributes=_inner,
    ),
    default="cuda",
    geometry=ALONG_AXIS,
)
LOG_SOFTMAX = Operation(
    name="syntonic_log_softmax",
    inputs=LOGIT_INPUTS,
    outputs=(Output("y", dtype="dtype"), *NORMALISER),
    saved=("x", "bias", "weights", "scale", "mask", "max", "log_sum"),
    moved=MOVED,
    move=move,
    reference=_log_reference,
    tangent=_log_tangent,
    cotangent=_log_cotangent,
    kernels=kernels(
        _covers,
        target="softmax",
        attributes=lambda **params: {**_inner(**params), "log": 1},
        cotangent_attributes=_inner,
    ),
    default="cuda",
    geometry=ALONG_AXIS,
)

"""Cross entropy of a weighted softmax with integer labels: −log softmax(x + scale · log w)[label].

The probabilities are never stored: the derivative computes them again from the logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .. import _check, _dispatch, _public
from .._compat import Indices
from .._partition import Value
from .._primitive import bind, define, forward_mode, transposes
from .._rows import batch_rows
from ._numerics import accumulation_dtype
from ._softmax import (
    Form,
    Logits,
    checked_scale,
    logit_cotangent,
    logit_tangent,
    logits_of,
    normalised_jvp,
    normalised_kinds,
    normaliser,
    prepare,
    probabilities,
    select,
)
from ._softmax_kernels import call, logit_values, normalised_cotangent, of_one_type

# ---------------------------------------------------------------------------------- public


def syntonic_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mode_norms: ArrayLike | None = None,
    syntony: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The cross entropy of `syntonic_softmax` with integer labels, one number a row.

    With z = logits + scale · log w it is log Σ exp(z) − z[label], where w is exp(−|n|²/φ) for mode
    norms |n|², max(syntony, 1e-10), or 1. The backward pass reads the logits again, so nothing of
    their size is stored for it. Differentiable in logits, mode_norms, syntony and scale.

    Args:
      logits: array of float16, bfloat16, float32 or float64.
      labels: array of integers, of the shape of the logits without `axis`. A label that is no class
        gives NaN, and no gradient; multiply such rows away with `jnp.where`.
      mode_norms: |n|² of every class, of shape (size of the axis,), or None; any floating type.
      syntony: the weights themselves, in a shape that broadcasts to that of the logits, or None;
        likewise.
      scale: a number or an array without axes, which may be traced.
      axis: the axis of the classes. No axis is transposed for it.
      where: boolean array, broadcastable to the logits: which classes take part. A label that does
        not has the loss +inf, a row without any class 0; neither has a gradient.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      The loss, of the shape of the labels, in float32 (float64 for float64 logits): the type in
      which it is computed, whatever that of the logits.

    Raises:
      TypeError: an array is not real floating point, `labels` not integer, `where` not boolean, or
        `axis` no integer.
      ValueError: mode_norms and syntony are both given, an array does not fit the logits, these or
        `scale` have no axes or too many, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
    >>> loss = syntonic_cross_entropy(logits, labels, syntony=jnp.array([1.0, 3.0, 3.0, 1.0]))
    >>> np.asarray(loss).round(3), np.log(8.0).round(3)
    (array([2.079, 2.079], dtype=float32), np.float64(2.079))
    """
    name = "syntonic_cross_entropy"
    axis, scale = _check.integer_axis(name, axis), checked_scale(name, scale)
    return _cross_entropy(logits, labels, mode_norms, syntony, scale, where, axis, implementation)


@_public.jit("axis", "implementation", function="syntonic_cross_entropy")
def _cross_entropy(logits, labels, mode_norms, syntony, scale, where, axis, implementation):
    name = "syntonic_cross_entropy"
    _dispatch.check_implementation(name, implementation)
    parts, form = prepare(name, logits, mode_norms, syntony, scale, axis, where, of="logits")
    axis, shape = form.axis(parts.x), parts.x.shape
    labels = _check.labels(name, labels, shape[:axis] + shape[axis + 1 :], shape[axis])
    (loss,) = bind(
        syntonic_cross_entropy_p,
        *parts.present(),
        labels,
        form=form,
        residuals=False,
        groups=0,
        implementation=implementation,
    )
    return loss


# ------------------------------------------------------------------------------- reference
#
# Logits and probabilities, shared with the softmax operations, are in _softmax.py.


def _is_label(labels, row, form: Form):
    """Where along a row the label is; nowhere if it is no class."""
    axis = form.axis(row)
    shape = [n if i == axis else 1 for i, n in enumerate(row.shape)]
    return lax.broadcasted_iota(jnp.int32, shape, axis) == jnp.expand_dims(labels, axis)


def _reference(*operands, form: Form, residuals, groups):
    parts, (labels,) = form.split(operands)
    mask, axis = parts.mask, form.axis(parts.x)
    z, chosen = logits_of(parts, form, groups), _is_label(labels, parts.x, form)
    largest, total = normaliser(z, mask, form)
    log_total = jnp.log(total)
    loss = log_total - jnp.where(chosen, z - jnp.expand_dims(largest, axis), 0).sum(axis)
    if mask is not None:
        loss = jnp.where((chosen & ~mask).any(axis), jnp.inf, loss)
    loss = jnp.where(chosen.any(axis), loss, jnp.nan)
    if mask is not None:
        loss = jnp.where(mask.any(axis), loss, 0)
    return (loss, largest, log_total) if residuals else (loss,)


def _counted(parts: Logits, labels, form: Form):
    """The logits with every row masked whose loss is no function of them, and where the label is.

    These are the rows whose label is no class, or a masked one.
    """
    chosen = _is_label(labels, parts.x, form)
    unmasked = select(parts.mask, chosen, False).any(form.axis(parts.x), keepdims=True)
    mask = unmasked if parts.mask is None else parts.mask & unmasked
    return parts._replace(mask=mask), chosen


def _tangent_reference(*operands, form: Form, row_dtype, groups, inputs, outputs):
    del row_dtype
    parts, (labels, largest, log_total, *tangents) = form.split(operands)
    parts, chosen = _counted(parts, labels, form)
    p, axis = probabilities(parts, largest, log_total, form, groups), form.axis(parts.x)
    dz = logit_tangent(tangents, inputs, p, parts.mask, p.dtype, form, groups)
    along = (p * dz).sum(axis)
    results = (along - jnp.where(chosen, dz, 0).sum(axis), along)
    return tuple(r for r, wanted in zip(results, outputs) if wanted)


def _cotangent_reference(*operands, form: Form, row_dtype, groups, inputs, outputs):
    parts, (labels, largest, log_total, *cotangents) = form.split(operands)
    parts, chosen = _counted(parts, labels, form)
    p = probabilities(parts, largest, log_total, form, groups)
    values = (jnp.expand_dims(ct, form.axis(p)) for ct in cotangents)
    ct = jnp.zeros_like(p)
    if outputs[0]:
        ct_loss = next(values)
        ct = p * ct_loss - jnp.where(chosen, ct_loss, 0)
    if outputs[1]:
        ct = ct + p * next(values)
    return logit_cotangent(select(parts.mask, ct, 0), inputs, row_dtype, form, groups)


def _indices(*operands, form: Form, ignored=None, **_):
    """The labels, for `checkify`; what reads none has a valid one here.

    That is a row without any class, and one whose label is the number `ignored`.
    """
    parts, (labels,) = form.split(operands)
    axis = form.axis(parts.x)
    if ignored is not None:
        labels = jnp.where(labels == ignored, 0, labels)
    if parts.mask is not None:
        labels = jnp.where(parts.mask.any(axis), labels, 0)
    return Indices(labels, parts.x.shape, axis)


# ------------------------------------------------------------------------------ primitives


def _kernel(*operands, devices, form: Form, residuals, groups):
    parts, (labels,) = form.split(operands)
    if parts.x.size == 0 or form.trailing or not of_one_type(parts):
        return _reference(*operands, form=form, residuals=residuals, groups=groups)
    number = Value("vector", dtype=accumulation_dtype(parts.x.dtype))
    return call(
        "syntonic_cross_entropy",
        [*logit_values(parts), Value("vector", labels)],
        [number] * (1 + 2 * residuals),
        form,
        groups=groups,
        devices=devices,
        statistics=int(residuals),
    )


def _cotangent_kernel(*operands, devices, **params):
    if params["form"].trailing:
        return _cotangent_reference(*operands, **params)
    return normalised_cotangent(
        "syntonic_cross_entropy_cotangent", _cotangent_reference, operands, devices, params
    )


syntonic_cross_entropy_p = define(
    "syntonic_cross_entropy",
    _reference,
    operation="syntonic_cross_entropy",
    kernel=_kernel,
    indices=_indices,
)
syntonic_cross_entropy_tangent_p = define(
    "syntonic_cross_entropy_tangent", _tangent_reference, operation="syntonic_cross_entropy"
)
syntonic_cross_entropy_cotangent_p = define(
    "syntonic_cross_entropy_cotangent",
    _cotangent_reference,
    operation="syntonic_cross_entropy",
    kernel=_cotangent_kernel,
)

# ----------------------------------------------------------------------------------- rules

_kinds, _tangent_kinds, _cotangent_kinds = normalised_kinds("vector", labels=True)

forward_mode(
    syntonic_cross_entropy_p,
    normalised_jvp(syntonic_cross_entropy_p, syntonic_cross_entropy_tangent_p),
)
transposes(
    syntonic_cross_entropy_tangent_p,
    syntonic_cross_entropy_cotangent_p,
    _tangent_reference,
    _cotangent_reference,
    reach=((True, True), (True, True)),
)
batch_rows(syntonic_cross_entropy_p, _kinds)
batch_rows(syntonic_cross_entropy_tangent_p, _tangent_kinds)
batch_rows(syntonic_cross_entropy_cotangent_p, _cotangent_kinds)

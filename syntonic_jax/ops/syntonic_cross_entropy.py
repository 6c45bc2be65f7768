"""Cross entropy of a weighted softmax with integer labels: −log softmax(x + scale · log w)[label].

The probabilities are never stored: the derivative computes them again from the logits.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .. import _check, _dispatch, _explicit, _public
from .._compat import Indices
from .._numerics import widen
from .._operation import Input, Operation, Output
from ._softmax import (
    LOGIT_INPUTS,
    MOVED,
    NORMALISER,
    Logits,
    axis_of,
    checked_scale,
    logit_cotangent,
    logit_tangent,
    logits_of,
    move,
    normaliser,
    prepare,
    probabilities,
    select,
    share,
    spread,
)
from ._softmax_kernels import ALONG_AXIS, kernels

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
    ignore_index: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The cross entropy of `syntonic_softmax` with integer labels, one number a row.

    With z = logits + scale · log w it is log Σ exp(z) − z[label], where w is exp(−|n|²/φ) for mode
    norms |n|², max(syntony, 1e-10), or 1. The backward pass reads the logits again, so nothing of
    their size is stored for it. Differentiable in logits, mode_norms, syntony and scale.

    Args:
      logits: array of float16, bfloat16, float32 or float64.
      labels: array of integers, of the shape of the logits without `axis`. A label that is no class
        gives NaN, and no gradient.
      mode_norms: |n|² of every class, of shape (size of the axis,), or None; any floating type.
      syntony: the weights themselves, in a shape that broadcasts to that of the logits, or None;
        likewise.
      scale: a number or an array without axes, which may be traced.
      axis: the axis of the classes. No axis is transposed for it.
      where: boolean array, broadcastable to the logits: which classes take part. A label that does
        not has the loss +inf, a row without any class 0; neither has a gradient.
      ignore_index: a label out of use, −100 by habit, or None. Such a row has the loss 0 and no
        gradient, whatever its logits are. The mean of the others is
        ``loss.sum() / jnp.maximum((labels != ignore_index).sum(), 1)``.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      The loss, of the shape of the labels, in float32 (float64 for float64 logits): the type in
      which it is computed, whatever that of the logits. A row whose largest z is +inf, −inf or NaN,
      or beyond that type, is NaN.

    Raises:
      TypeError: an array is not real floating point, `labels` not integer, `where` not boolean, or
        `axis` or `ignore_index` no integer.
      ValueError: mode_norms and syntony are both given, an array does not fit the logits, these or
        `scale` have no axes or too many, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
    >>> loss = syntonic_cross_entropy(logits, labels, syntony=jnp.array([1.0, 3.0, 3.0, 1.0]))
    >>> np.asarray(loss).round(3), np.log(8.0).round(3)
    (array([2.079, 2.079], dtype=float32), np.float64(2.079))
    >>> loss = syntonic_cross_entropy(logits, jnp.array([0, -100]), ignore_index=-100)
    >>> np.asarray(loss).round(3)
    array([1.386, 0.   ], dtype=float32)
    """
    name = "syntonic_cross_entropy"
    axis, scale = _check.integer_axis(name, axis), checked_scale(name, scale)
    ignored = _check.ignore_index(name, ignore_index)
    return _cross_entropy(
        logits, labels, mode_norms, syntony, scale, where, axis, ignored, implementation
    )


@_public.jit("axis", "ignored", "implementation", function="syntonic_cross_entropy")
def _cross_entropy(
    logits, labels, mode_norms, syntony, scale, where, axis, ignored, implementation
):
    name = "syntonic_cross_entropy"
    _dispatch.check_implementation(name, implementation)
    parts, trailing = prepare(name, logits, mode_norms, syntony, scale, axis, where, of="logits")
    axis, shape = axis_of(parts.x, trailing), parts.x.shape
    rest = shape[:axis] + shape[axis + 1 :]
    labels, ignored = _check.labels(name, labels, rest, shape[axis], ignored)
    labels = _explicit.along(labels, parts.x, axis)
    (loss,) = CROSS_ENTROPY(
        *parts, labels, trailing=trailing, ignored=ignored, implementation=implementation
    )
    return loss


# ------------------------------------------------------------------------------- reference
#
# Logits and probabilities, shared with the softmax operations, are in _softmax.py. Every function
# here is there twice, with either way to find a label in its row.


class _ByComparison:
    """Every class is compared with the label: any sharding of the classes lets that be.

    `parts` are the logits with every row masked whose loss is no function of them: those whose
    label is no class, or a masked one, do not count.
    """

    def __init__(self, parts: Logits, labels: Any, trailing: int, groups: int):
        del groups
        self.axis = axis_of(parts.x, trailing)
        shape = [n if i == self.axis else 1 for i, n in enumerate(parts.x.shape)]
        classes = lax.broadcasted_iota(jnp.int32, shape, self.axis)
        self.chosen = classes == jnp.expand_dims(labels, self.axis)
        self.counts = select(parts.mask, self.chosen, False).any(self.axis)
        self.parts = parts._replace(mask=_counted(parts, self.counts, self.axis))

    def of(self, row: Any) -> Any:
        """The number of `row` at the label."""
        return jnp.where(self.chosen, row, 0).sum(self.axis)

    logit = of

    @staticmethod
    def logits(parts: Logits, trailing: int, groups: int) -> tuple[Logits, Any]:
        """The parts, and what they make."""
        return parts, logits_of(parts, trailing, groups)

    def less(self, row: Any, amount: Any, rest: Callable[[], Any], dtype: Any) -> Any:
        """`row` less `amount` at the label, where `rest` then remains, in the type `dtype`."""
        del rest
        amount = jnp.where(self.chosen, jnp.expand_dims(amount, self.axis), 0)
        return (row - amount).astype(dtype)


class _ByPlace:
    """A gather, and a scatter: on a CPU comparisons take longer than all the rest."""

    def __init__(self, parts: Logits, labels: Any, trailing: int, groups: int):
        self.parts, self.trailing, self.groups = parts, trailing, groups
        self.axis = axis_of(parts.x, trailing)
        width = parts.x.shape[self.axis]
        is_class = (labels >= 0) & (labels < width)
        self.places = jnp.where(is_class, labels, 0)
        self.target = jnp.where(is_class, labels, width)  # beside the row: dropped
        self.counts = is_class if parts.mask is None else is_class & self.of(parts.mask)

    def of(self, row: Any) -> Any:
        if row.shape[self.axis] == 0:
            return jnp.zeros(self.places.shape, row.dtype)
        place = jnp.expand_dims(self.places, self.axis)
        found = jnp.take_along_axis(row, place, self.axis, mode="promise_in_bounds")
        return found.squeeze(self.axis)

    def logit(self, z: Any) -> Any:
        parts = self.parts
        if parts.weights is not None:
            return self.of(z)
        # From its parts: then z need not be in memory.
        x = widen(self.of(parts.x))
        if parts.bias is None:
            return x
        return x + self.of(spread(parts.bias, parts.x, self.trailing, self.groups))

    @staticmethod
    def logits(parts: Logits, trailing: int, groups: int) -> tuple[Logits, Any]:
        """The same, with the same rounding wherever they are used.

        XLA computes a product anew in every fusion, and rounds it in some of them only: the logit
        of the label must not differ by that from the one in the sum.
        """
        if parts.bias is not None:
            parts = parts._replace(bias=lax.optimization_barrier(parts.bias))
        z = logits_of(parts, trailing, groups, hide=False)
        return parts, z if parts.weights is None else lax.optimization_barrier(z)

    def less(self, row: Any, amount: Any, rest: Callable[[], Any], dtype: Any) -> Any:
        del amount
        if row.shape[self.axis] == 0:
            return row.astype(dtype)

        def put(row, target, value):
            return row.at[target].set(value, mode="drop", unique_indices=True)

        for _ in range(self.trailing):
            put = jax.vmap(put, (1, 0, 0), 1)
        for _ in range(self.axis):
            put = jax.vmap(put)
        return put(row.astype(dtype), self.target, rest().astype(dtype))


def _counted(parts: Logits, counts: Any, axis: int) -> Any:
    """The mask without the rows that do not count."""
    counts = jnp.expand_dims(counts, axis)
    return counts if parts.mask is None else parts.mask & counts


def _reference(*inputs, trailing, ignored, groups, find=_ByComparison):
    *parts, labels = inputs
    parts, z = find.logits(Logits(*parts), trailing, groups)
    label = find(parts, labels, trailing, groups)
    largest, total = normaliser(z, parts, trailing)
    log_total = jnp.log(total)
    is_class = (labels >= 0) & (labels < parts.x.shape[label.axis])
    loss = log_total - (label.logit(z) - largest)
    loss = jnp.where(label.counts, loss, jnp.where(is_class, jnp.inf, jnp.nan))
    if parts.mask is not None:
        loss = jnp.where(total == 0, 0, loss)  # nothing counts
    if ignored is not None:
        loss = jnp.where(labels == ignored, 0, loss)
        # A row of −inf or NaN has no such numbers; one that does not count needs none.
        log_total = jnp.where(label.counts, log_total, 0)
        largest = jnp.where(labels == ignored, 0, largest)
    return loss, largest, log_total


def _tangent(saved, tangents, *, trailing, ignored, data_dtype, groups, find=_ByComparison):
    del ignored, data_dtype
    *parts, labels, largest, log_total = saved
    label = find(Logits(*parts), labels, trailing, groups)
    p = probabilities(label.parts, largest, log_total, trailing, groups)
    dz = logit_tangent(tangents, p, label.parts.mask, p.dtype, trailing, groups)
    along = (p * dz).sum(label.axis)
    return tuple(jnp.where(label.counts, d, 0) for d in (along - label.of(dz), along))


def _cotangent(saved, cotangents, *, trailing, ignored, data_dtype, groups, find=_ByComparison):
    del ignored
    *parts, labels, largest, log_total = saved
    parts, z = find.logits(Logits(*parts), trailing, groups)
    label = find(parts, labels, trailing, groups)
    p, axis = probabilities(label.parts, largest, log_total, trailing, groups), label.axis
    total = functools.reduce(operator.add, [ct for ct in cotangents if ct is not None])
    ct = select(_counted(parts, label.counts, axis), p * jnp.expand_dims(total, axis), 0)
    if cotangents[0] is None:
        return logit_cotangent(ct, data_dtype, trailing, groups)
    ct_loss = jnp.where(label.counts, cotangents[0], 0)

    def at_label():
        there = jnp.exp(label.logit(z) - largest) * share(log_total, parts.mask)
        return jnp.where(label.counts, there * total - ct_loss, 0)

    # What is to be summed over rows is not rounded before.
    of_z, of_bias = (label.less(ct, ct_loss, at_label, t) for t in (data_dtype, ct.dtype))
    _, d_bias = logit_cotangent(of_bias, data_dtype, trailing, groups)
    return of_z, d_bias


def _on_cpu(form: Callable[..., Any]) -> Callable[..., Any]:
    """The form for a CPU, over however many devices."""

    def by_place(*operands, devices, **params):
        del devices
        return form(*operands, find=_ByPlace, **params)

    return by_place


def _indices(*inputs, trailing, ignored, **_):
    """The labels, for `checkify`; what reads none has a valid one here.

    That is a row without any class, and one whose label is the number `ignored`.
    """
    *parts, labels = inputs
    parts = Logits(*parts)
    axis = axis_of(parts.x, trailing)
    if ignored is not None:
        labels = jnp.where(labels == ignored, 0, labels)
    if parts.mask is not None:
        labels = jnp.where(parts.mask.any(axis), labels, 0)
    return Indices(labels, parts.x.shape, axis)


# ----------------------------------------------------------------------------- declaration

CROSS_ENTROPY = Operation(
    name="syntonic_cross_entropy",
    inputs=(*LOGIT_INPUTS, Input("labels", "vector")),
    outputs=(Output("loss", "vector", dtype="accumulation"), *NORMALISER),
    saved=("x", "bias", "weights", "scale", "mask", "labels", "max", "log_sum"),
    moved=MOVED,
    move=move,
    reference=_reference,
    tangent=_tangent,
    cotangent=_cotangent,
    kernels=kernels(
        lambda results, *, trailing, **_: trailing == 0,
        target="cross_entropy",
        attributes=lambda *, ignored, **_: {"ignored": ignored or 0},  # 0 is no class to ignore
    ),
    default="cuda",
    on_cpu=_on_cpu,
    tangent_on_cpu=_on_cpu,
    cotangent_on_cpu=_on_cpu,
    indices=_indices,
    geometry=ALONG_AXIS,
)

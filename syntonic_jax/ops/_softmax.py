"""What the softmax operations share: their arguments, logits, and probabilities, in jnp.

Rows are [*G, *R, width, *T], G being the group dimensions (_batching.py) and T the axes behind the
one that the softmax runs along, as many as `trailing` says: nothing is transposed. Numbers of a row
are [*G, *R, *T] and parameters [*G, width], both in the accumulation type.

A row's normaliser is kept in two numbers: its largest logit, and the logarithm of the total of
exp(z − largest). Their sum would lose the digits of the second where logits are large. Only the sum
means anything, so the largest logit counts as a constant in every derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _check
from .._numerics import accumulation_dtype, widen
from .._operation import Input, Output
from ..constants import PHI_INV
from ._batch_norm import channels

FLOOR = 1e-10  # of weights, before their logarithm


class Logits(NamedTuple):
    """What logits are made of: z = x + bias + scale · log(max(weights, 1e-10)) where mask is true.

    All but x may be None; scale, [*G, 1], is there exactly if weights are.
    """

    x: Any  # row
    bias: Any = None  # parameter
    weights: Any = None  # row
    scale: Any = None
    mask: Any = None  # row of booleans


# The inputs of an operation that begins with these, and by what their derivatives are taken: z, and
# the bias where it is there. Weights and their scale enter z by elementwise arithmetic.
LOGIT_INPUTS = (
    Input("x"),
    Input("bias", "parameter", optional=True),
    Input("weights", optional=True),
    Input("scale", "scalar", optional=True),
    Input("mask", optional=True),
)
MOVED = (Input("z"), Input("bias", "parameter"))


def axis_of(row: Any, trailing: int) -> int:
    """The axis along which the softmax runs."""
    return row.ndim - 1 - trailing


def spread(parameter: Any, row: Any, trailing: int, groups: int) -> Any:
    """A parameter in a shape that broadcasts against `row`."""
    return channels.spread(parameter, row, groups, (1, trailing))


# -------------------------------------------------------------------------------- arguments


def checked_scale(function: str, scale: Any) -> Any:
    """A number, or an array without axes; None for 1, which need not go to the device."""
    if type(scale) is not float:  # what it mostly is: an eager call waits for this
        scale = _check.scalar(function, "scale", scale)
    return None if isinstance(scale, float) and scale == 1 else scale


def prepare(
    function: str, x: Any, mode_norms, syntony, scale, axis, where, *, of: str = "x"
) -> tuple[Logits, int]:
    """The logits of arguments, and the axes behind the one that the softmax runs along.

    The arguments are checked here, but for scale; `of` is the name of x.
    """
    _check.floating(function, **{of: x})
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError(f"{function}: {of} must have at least one axis, got a scalar")
    axis = _check.axis(function, axis, x.ndim)
    if mode_norms is not None and syntony is not None:
        raise ValueError(
            f"{function}: mode_norms and syntony must not both be given: each fixes the weights"
        )
    width, accumulation = x.shape[axis], accumulation_dtype(x.dtype)
    scale = jnp.asarray(1.0 if scale is None else scale).astype(accumulation)
    bias = weights = mask = None
    if mode_norms is not None:
        _check.floating(function, mode_norms=mode_norms)
        _check.parameter(function, (width,), mode_norms=mode_norms)
        bias = log_weights(mode_norms, None, scale, accumulation)
    if syntony is not None:
        _check.floating(function, syntony=syntony)
        syntony = jnp.asarray(syntony)
        _check.broadcasts(function, x.shape, of, syntony=syntony)
        along = axis - x.ndim + syntony.ndim
        if all(n == 1 for i, n in enumerate(syntony.shape) if i != along):
            shared = jnp.broadcast_to(syntony.reshape(-1), (width,))
            bias = log_weights(None, shared, scale, accumulation)
        else:
            weights = syntony if syntony.dtype == x.dtype else syntony.astype(accumulation)
            weights = jnp.broadcast_to(weights, x.shape)
    if where is not None:
        mask = _check.mask(function, where, x.shape, of)
    logits = Logits(x, bias, weights, None if weights is None else scale.reshape(1), mask)
    return logits, x.ndim - 1 - axis


def log_weights(mode_norms: Any, syntony: Any, scale: Any, dtype: Any) -> Any:
    """scale · log w in the type `dtype`, of whichever of the two is given."""
    scale = jnp.asarray(scale, dtype)
    if mode_norms is None:
        return _product(scale, _log(jnp.asarray(syntony).astype(dtype)))
    # φ⁻¹ goes to the larger one: the other, times it, might be no normal number any more.
    small = jnp.abs(scale) < 1
    norms = jnp.where(small, PHI_INV, 1) * jnp.asarray(mode_norms).astype(dtype)
    return _product(jnp.where(small, -1, -PHI_INV) * scale, norms)


def _log(weights: Any) -> Any:
    """log(max(weights, 1e-10)) in the accumulation type, with the derivative 0 up to the floor.

    NaN stays NaN, but its slope is not one: where a mask hides it, its cotangent of 0 stays 0.
    """
    weights = widen(weights)
    proper = weights < jnp.inf  # not so for NaN
    clean = jnp.where(proper, weights, 1)
    return jnp.where(proper, jnp.log(jnp.where(clean <= FLOOR, FLOOR, clean)), weights)


def _product(factor: Any, values: Any) -> Any:
    """factor · values; what is not finite in `values` has no part in the derivative by `factor`.

    A class that no row uses would make it NaN. Where one counts, its cotangent is NaN already.
    """
    finite = jnp.isfinite(values)
    constant = lax.stop_gradient(factor)
    return jnp.where(finite, factor * jnp.where(finite, values, 0), constant * values)


# -------------------------------------------------------------------------------- reference


def logits_of(parts: Logits, trailing: int, groups: int, hide: bool = True) -> Any:
    """z in the accumulation type; whatever it is under the mask, no derivative is NaN for it.

    What is never differentiated itself, as a forward pass, need not `hide` what lies there.
    """
    x, bias, *_ = parts
    z = select(parts.mask, widen(x), 0) if hide else widen(x)
    if bias is not None:
        z = z + spread(bias, x, trailing, groups)
    if parts.weights is not None:
        z = z + _weighting(parts.weights, parts.scale, trailing, groups)
    return z


def normaliser(z: Any, parts: Logits, trailing: int) -> tuple[Any, Any]:
    """The largest unmasked logit of every row, and Σ exp(z − largest); −inf and 0 without any.

    Where z is x, the largest is sought in the type of x, which has half the bytes.
    """
    axis = axis_of(z, trailing)
    sought = parts.x if parts.bias is None and parts.weights is None else z
    largest = widen(jnp.max(select(parts.mask, sought, -jnp.inf), axis, initial=-jnp.inf))
    terms = select(parts.mask, jnp.exp(z - jnp.expand_dims(largest, axis)), 0)
    return largest, terms.sum(axis)


def softmax(z: Any, parts: Logits, trailing: int) -> Any:
    """The probabilities, in the forward pass."""
    axis = axis_of(z, trailing)
    largest, total = normaliser(z, parts, trailing)
    terms = jnp.exp(z - jnp.expand_dims(largest, axis))
    return select(parts.mask, terms / jnp.expand_dims(total, axis), 0)


def log_softmax(z: Any, mask: Any, largest: Any, log_total: Any, trailing: int, masked: Any) -> Any:
    """z less the normaliser, and `masked` under the mask."""
    axis = axis_of(z, trailing)
    shifted = z - jnp.expand_dims(largest, axis)
    return select(mask, shifted - jnp.expand_dims(log_total, axis), masked)


def probabilities(parts: Logits, largest, log_total, trailing: int, groups: int) -> Any:
    """The softmax again, from what the forward pass left. For derivatives, which may be nested.

    XLA finds the exponentials of the forward pass in these, where it has both to compile.
    """
    axis = axis_of(parts.x, trailing)
    shifted = logits_of(parts, trailing, groups) - jnp.expand_dims(largest, axis)
    terms = jnp.exp(select(parts.mask, shifted, 0))
    p = terms * jnp.expand_dims(share(log_total, parts.mask), axis)
    return select(parts.mask, p, 0)


def share(log_total: Any, mask: Any) -> Any:
    """What exp(z − largest) is multiplied by, 1 / total; 0 of a row in which nothing counts.

    There exp(−log_total) is inf, and so is its slope. Without a mask there is no such row, and no
    select, which XLA has no place for in the fusion of a softmax on a CPU.
    """
    if mask is None:
        return jnp.exp(-log_total)
    some = log_total != -jnp.inf  # so too for NaN
    return jnp.where(some, jnp.exp(-jnp.where(some, log_total, 0)), 0)


def logit_tangent(tangents, row, mask, dtype, trailing: int, groups: int) -> Any:
    """The tangent of logits, of those of z and the bias, either of which may be None."""
    dz, d_bias = tangents
    dz = jnp.zeros(row.shape, dtype) if dz is None else dz.astype(dtype)
    if d_bias is not None:
        dz = dz + spread(d_bias, row, trailing, groups)
    return select(mask, dz, 0)


def logit_cotangent(ct: Any, dtype, trailing: int, groups: int) -> tuple[Any, ...]:
    """The cotangents of z and the bias, from that of the logits."""
    axis = axis_of(ct, trailing)
    return ct.astype(dtype), ct.sum(tuple(i for i in range(groups, ct.ndim) if i != axis))


def select(mask: Any, values: Any, masked: Any) -> Any:
    """`values`, and `masked` where there is a mask and it is false."""
    return values if mask is None else jnp.where(mask, values, masked)


def _weighting(weights: Any, scale: Any, trailing: int, groups: int) -> Any:
    """scale · log(max(weights, 1e-10)), whose derivatives are finite whatever the weights are."""
    return _product(spread(scale, weights, trailing, groups), _log(weights))


# ----------------------------------------------------------------------------- derivatives


def move(
    inputs: Sequence[Any], tangents: Sequence[Any], *, trailing: int, groups: int, **_: Any
) -> tuple[Any, Any]:
    """The tangents of z and the bias, from those of `LOGIT_INPUTS`."""
    parts, moved = (Logits(*values[: len(LOGIT_INPUTS)]) for values in (inputs, tangents))
    dz = moved.x
    names = [name for name in ("weights", "scale") if getattr(moved, name) is not None]
    if names:

        def weighting(*values):
            given = {"weights": parts.weights, "scale": parts.scale} | dict(zip(names, values))
            return _weighting(given["weights"], given["scale"], trailing, groups)

        _, through = jax.jvp(
            weighting,
            tuple(getattr(parts, name) for name in names),
            tuple(getattr(moved, name) for name in names),
        )
        dz = through if dz is None else widen(dz) + through
    return dz, moved.bias


# What is kept of a row: its normaliser.
NORMALISER = (
    Output("max", "vector", dtype="accumulation", constant=True),
    Output("log_sum", "vector", dtype="accumulation", inner=True),
)

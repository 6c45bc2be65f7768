"""Batch norm as a differentiable function of the data: what is static of a call, and the rules.

What runs along a channel are two primitives that are each other's transpose, and the moments
(channels.py); y is made element by element (normalise.py). Everything between them is arithmetic on
one number a channel, left to jnp, with sums over the mapped axis wherever numbers of all shards
meet.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ... import _check, _compat, _dispatch
from ..._numerics import widen
from .channels import apply_tangent, moments, sums
from .layout import Layout
from .normalise import normalise
from .statistics import line, merged, spread, spread_out, wide_count


class Options(NamedTuple):
    """What is static of a call, checked."""

    function: str
    axis: Any
    scale_factor: float
    epsilon: float
    dtype: Any
    implementation: str | None
    axis_name: Any = None
    axis_index_groups: Any = None
    axis_sizes: tuple[tuple[Any, int], ...] = ()  # of each mapped axis that is named


def checked_options(
    function, axis, target_variance, epsilon, dtype, implementation,
    axis_name=None, axis_index_groups=None,
) -> Options:  # fmt: skip
    _dispatch.check_implementation(function, implementation)
    return Options(
        function,
        axis,
        _check.scale_factor(function, target_variance),
        _check.epsilon(function, epsilon),
        dtype,
        implementation,
        axis_name,
        axis_index_groups,
    )


def _psum(x, options: Options):
    if options.axis_name is None:
        return x
    return lax.psum(x, options.axis_name, axis_index_groups=options.axis_index_groups)


def _moments(x, scale, bias, where, layout: Layout, options: Options):
    """Number, mean, what rounding took from it, var, slope and shift of channels, of all shards."""
    count, mean, low, var, slope, shift = moments(
        *(x, scale, bias, where),
        *(options.epsilon, options.scale_factor),
        *(layout.block, options.implementation),
    )
    if options.axis_name is None:
        return count, mean, low, var, slope, shift
    # Empty shards have no share.
    here, total = count > 0, _psum(count, options)
    share = count / jnp.maximum(total, 1)
    mean, low, var = merged(
        mean, low, var, total, lambda v: _psum(jnp.where(here, v * share, 0), options)
    )
    if where is not None:
        var = spread_out(var, total)
    slope, shift = line(low, var, scale, bias, options.epsilon, options.scale_factor)
    return total, mean, low, var, slope, shift


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def batch_norm(x, scale, bias, where, layout: Layout, options: Options):
    """y, mean, what rounding took from the mean, var, and the unmasked number if there is a mask.

    A channel without elements has the mean 0 and an infinite variance here, of which all
    derivatives are 0.
    """
    count, mean, low, var, slope, shift = _moments(x, scale, bias, where, layout, options)
    y = normalise(x, mean, (slope,), shift, 1.0, layout.dtype, layout.block, options.implementation)
    if where is None:
        return y, mean, low, var, None
    # The slope 0 is not enough: what is under the mask may be infinite.
    some, rest = (spread(v, x, 0, layout.block) for v in (count > 0, shift))
    return jnp.where(some, y, rest.astype(y.dtype)), mean, low, var, count


@functools.partial(batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(layout: Layout, options: Options, primals, tangents):
    with _compat.mapped_axes(options.axis_sizes):
        return _batch_norm_tangents(layout, options, primals, tangents)


def _batch_norm_tangents(layout: Layout, options: Options, primals, tangents):
    x, scale, bias, where = primals
    dx, d_scale, d_bias, _ = map(_present, tangents)
    y, mean, low, var, count = results = batch_norm(x, scale, bias, where, layout, options)
    d_mean = d_var = None
    if dx is not None:
        dx = widen(dx)
        everything = wide_count(math.prod(layout.reduced))
        some = _psum(everything, options) if count is None else jnp.maximum(count, 1)
        some = jnp.asarray(some, var.dtype)
        first, second = sums(x, mean, low, dx, where, layout.block, options.implementation)
        d_mean = _psum(first, options) / some
        d_var = 2 * _psum(second, options) / some
    if count is not None and d_bias is not None:
        d_bias = jnp.where(count > 0, d_bias, 0)
    dy = _tangent(
        x, mean, low, var, scale, dx, d_mean, d_var, d_scale, d_bias, where,
        y.dtype, layout, options,
    )  # fmt: skip
    zeros = jnp.zeros_like(mean)
    return results, (
        dy,
        zeros if d_mean is None else d_mean,
        zeros,
        zeros if d_var is None else d_var,
        None if count is None else jnp.zeros_like(count),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def normalise_by(x, mean, var, scale, bias, layout: Layout, options: Options):
    rstd = lax.rsqrt(var + options.epsilon)
    return normalise(
        *(x, mean, (rstd,) if scale is None else (rstd, scale), bias, options.scale_factor),
        *(layout.dtype, layout.block, options.implementation),
    )


@functools.partial(normalise_by.defjvp, symbolic_zeros=True)
def _normalise_by_jvp(layout: Layout, options: Options, primals, tangents):
    x, mean, var, scale, bias = primals
    dx, d_mean, d_var, d_scale, d_bias = map(_present, tangents)
    y = normalise_by(x, mean, var, scale, bias, layout, options)
    dx = None if dx is None else widen(dx)
    low = jnp.zeros_like(mean)
    return y, _tangent(
        x, mean, low, var, scale, dx, d_mean, d_var, d_scale, d_bias, None,
        y.dtype, layout, options,
    )  # fmt: skip


def _tangent(
    x, mean, low, var, scale, dx, d_mean, d_var, d_scale, d_bias, where, dtype, layout, options
):
    """dy = slope · dx + shift + tilt · (x − mean), where any of the tangents may be None."""
    rstd = lax.rsqrt(var + options.epsilon)
    slope = _slope(rstd, scale, options)
    shift = tilt = None
    if d_mean is not None:
        shift = -slope * d_mean
    if d_bias is not None:
        shift = d_bias if shift is None else shift + d_bias
    if d_var is not None:
        tilt = (-0.5 * slope * jnp.square(rstd)) * d_var
    if d_scale is not None:
        steeper = (options.scale_factor * rstd) * d_scale
        tilt = steeper if tilt is None else tilt + steeper
    if dx is None and shift is None and tilt is None:
        return jnp.zeros(x.shape, dtype)
    return apply_tangent(
        x, mean, low, slope, dx, shift, tilt, where, dtype, layout.block, options.implementation
    )


def _present(tangent):
    """The tangent, or None where it is symbolically zero or there is no operand."""
    return None if isinstance(tangent, jax.custom_derivatives.SymbolicZero) else tangent


def _slope(rstd, scale, options: Options):
    """∂y/∂x for given statistics."""
    slope = options.scale_factor * rstd
    return slope if scale is None else slope * scale

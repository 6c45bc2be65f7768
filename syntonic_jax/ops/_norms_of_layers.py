"""Norms as layers have them: masks, mapped axes, running statistics, parameters of any shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from .. import _check
from ._norm_arithmetic import units
from ._rms_norm import over_mapped_axes
from .golden_batch_norm import finite_batch_norm
from .golden_layer_norm import golden_layer_norm
from .golden_rms_norm import golden_rms_norm


def others(x: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of x that are not among `axes`."""
    return tuple(a for a in range(jnp.ndim(x)) if a not in axes)


def remains(where: Any, shape: Any, features: tuple[int, ...], mapping: Mapping[str, Any]) -> Any:
    """For every place on the axes `features`, whether `where` leaves anything to reduce there.

    In a shape that broadcasts to `shape`, that of x. `mapping` has the mapped axis over which the
    statistics are merged, and its groups, or nothing.
    """
    where = where.reshape((1,) * (len(shape) - where.ndim) + where.shape)
    anything = where.any([a for a in range(len(shape)) if a not in features], keepdims=True)
    axis = mapping.get("axis_name")
    if axis is not None:
        count = jax.lax.psum(
            anything.astype(jnp.int32),
            tuple(axis) if isinstance(axis, list) else axis,
            axis_index_groups=mapping.get("axis_index_groups"),
        )
        anything = count > 0
    return jnp.broadcast_to(anything, [n if a in features else 1 for a, n in enumerate(shape)])


def moved(old: Any, new: Any, momentum: Any, dtype: Any, anything: Any = None) -> Any:
    """A running statistic after an update, in `dtype`: as it was where there is not `anything`.

    `old` may come from a checkpoint in 16 bits, in which the momentum would round to 1.
    """
    old = old.astype(dtype)
    value = (momentum * old + (1 - momentum) * new.astype(dtype)).astype(dtype)
    if anything is None:
        return value
    # On a mesh with explicit axes all of them are sharded in ways of their own.
    nothing = ~anything | jnp.zeros_like(value, bool)
    return jnp.where(nothing, old + jnp.zeros_like(value), value)


def affine(
    norm: Callable[..., tuple[jax.Array, ...]],
    x: Any,
    scale: Any,
    bias: Any,
    axes: tuple[int, ...],
    dtype: Any,
    where: Any = None,
    mapping: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[jax.Array, ...]:
    """`norm(scale, bias, dtype)`, for parameters of any shape that broadcasts to that of x.

    They have as many axes as x. `norm` takes parameters of the shape of `axes`; where one of them
    varies along another axis, both are applied to its result, which is rounded only after them.
    As in `golden_batch_norm`, what `where` leaves nothing of is the bias, without a derivative, and
    what is not finite under the mask has no derivative either.
    """
    rest = others(x, axes)
    if all(p is None or all(p.shape[a] == 1 for a in rest) for p in (scale, bias)):
        places = [jnp.shape(x)[a] for a in axes]
        fitting = (
            None if p is None else jnp.broadcast_to(p.squeeze(rest), places) for p in (scale, bias)
        )
        return norm(*fitting, dtype)

    accumulation = jnp.promote_types(jnp.result_type(x, jnp.dtype(dtype)), jnp.float32)
    y, *statistics = norm(None, None, accumulation)

    def line(y):
        y = y if scale is None else y * scale.astype(accumulation)
        return y if bias is None else y + bias.astype(accumulation)

    if where is None:
        return (line(y).astype(dtype), *statistics)
    anything = remains(where, jnp.shape(x), axes, mapping)
    constant = ~(anything & (where | jnp.isfinite(y)))
    moving = line(jnp.where(constant, 0, y))
    y = jnp.where(constant, jax.lax.stop_gradient(line(y)), moving)
    return (y.astype(dtype), *statistics)


def layer_norm(
    x: Any,
    scale: Any,
    bias: Any,
    axes: tuple[int, ...],
    dtype: Any,
    *,
    where: Any = None,
    mapping: Mapping[str, Any],
    **settings: Any,
) -> jax.Array:
    """`golden_layer_norm` over `axes`, with masks, mapped axes and the parameters of `affine`."""
    if where is None and mapping.get("axis_name") is None:

        def norm(scale, bias, dtype):
            return (golden_layer_norm(x, scale, bias, axis=axes, dtype=dtype, **settings),)

        return affine(norm, x, scale, bias, axes, dtype)[0]

    # The statistics of a batch norm whose features are all that a layer norm does not reduce. Its
    # range is not that of rows, which are taken in units of their own.
    features = others(x, axes)
    x = x * units(x, axes, where, settings["epsilon"], mapping)

    def batch_norm(scale, bias, dtype):
        return finite_batch_norm(
            x, scale, bias, axis=features, where=where, dtype=dtype, **mapping, **settings
        )

    return affine(batch_norm, x, scale, bias, features, dtype, where, mapping)[0]


def rms_norm(
    layer: str,
    x: Any,
    scale: Any,
    axes: tuple[int, ...],
    dtype: Any,
    *,
    where: Any = None,
    mapping: Mapping[str, Any],
    scale_offset: Any,
    epsilon: Any,
    target_variance: Any,
    implementation: Any,
) -> jax.Array:
    """`golden_rms_norm` over `axes`, with masks, mapped axes and a scale as in `affine`."""
    offset = _check.finite(layer, "scale_offset", scale_offset)
    if scale is not None and offset:
        scale = scale.astype(jnp.promote_types(scale.dtype, jnp.float32)) + offset
    if where is None and mapping.get("axis_name") is None:

        def norm(scale, bias, dtype):
            del bias
            y = golden_rms_norm(
                *(x, scale),
                axis=axes,
                target_variance=target_variance,
                epsilon=epsilon,
                dtype=dtype,
                implementation=implementation,
            )
            return (y,)

        return affine(norm, x, scale, None, axes, dtype)[0]

    y = over_mapped_axes(
        *(x, axes, where, mapping),
        epsilon=_check.epsilon(layer, epsilon),
        scale_factor=_check.scale_factor(layer, target_variance),
    )
    y = y if scale is None else y * scale.astype(jnp.promote_types(y.dtype, scale.dtype))
    return y.astype(dtype)

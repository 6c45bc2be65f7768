"""Batch normalisation to a target variance t.

y = scale · √t · (x − mean) / √(var + ε) + bias, with the statistics of every feature over all
other axes, those of a mapped axis included where one is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _public
from .._propagation import contained
from ..modes import GoldenNormMode
from ._batch_norm.layout import layout_of, mask_of
from ._batch_norm.rules import Options, batch_norm, checked_options, normalise_by

# ---------------------------------------------------------------------------------- public


def golden_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    target_variance: str | float | GoldenNormMode = "golden",
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises every feature by its statistics over the batch, to the variance φ⁻¹ by default.

    y = scale · √t · (x − mean) / √(var + ε) + bias; mean and the biased variance are those of x,
    before √t: what running statistics are made of. Under jit with sharded arrays they are those
    of the whole batch.

    Infinities are those of the formula, one operation after the other, with the slope √t / √(var +
    ε) · scale made first: a feature whose squares overflow the accumulation type (from deviations
    of 1e19 on in float32) has an infinite variance and y = bias, one whose sum overflows has an
    infinite mean and no y, as in jnp; y is infinite where the slope is.

    Args:
      x: array of float16, bfloat16, float32 or float64, features at `axis`: channels last
        (N, …, C) with -1, channels first (N, C, …) with 1. Neither is transposed.
      scale: array of the shape of the feature axes, or None (1); any floating type, it does not
        promote the result.
      bias: likewise, or None (0).
      axis: the feature axis, or several; the statistics run over all the others.
      target_variance: t: 'golden' (φ⁻¹), 'standard' (1), a positive Python number or a
        `GoldenNormMode`.
      epsilon: added to the variance; a Python number, not negative.
      where: boolean array, broadcastable to x: which elements count in the statistics. The others
        are normalised like them. A feature without any has y = bias and NaN statistics, all
        without derivatives.
      axis_name: a mapped axis (of vmap, pmap or shard_map), or several, over which the statistics
        are merged. Every shard weighs by the number of its elements, an empty one not at all.
      axis_index_groups: groups of indices of that axis to merge within, as in `jax.lax.psum`:
        jax has them for pmap, and for shard_map without its check (check_vma=False). Without
        axis_name they mean nothing.
      dtype: type of y; None: that of x.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md). None takes kernels for what
        is summed and leaves y to XLA, which fuses it with the activation that follows; with
        'cuda' y is a kernel's too, which is faster where nothing follows.

    Returns:
      (y, mean, var): y of the shape of x, rounded once; mean and var of the shape of the feature
      axes in float32 (float64 for float64 data), the type in which they are computed. All three
      are differentiable.

    Raises:
      TypeError: an array or `dtype` is not real floating point, `where` not a boolean array,
        `epsilon` no number, `axis_name` an integer, or `axis_index_groups` no sequence of
        sequences of indices.
      ValueError: an axis is out of range or named twice, there is nothing to reduce, a parameter
        does not have the shape of the features, `where` does not broadcast, `axis_index_groups`
        does not hold each index once, or another argument is out of range.
      NameError: `axis_name` names no mapped axis.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> y, mean, var = golden_batch_norm(jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 60.0]]))
    >>> np.asarray(mean), np.asarray(var).round(3)
    (array([ 2., 30.], dtype=float32), array([  0.667, 466.667], dtype=float32))
    >>> np.asarray(y.var(0)).round(3)
    array([0.618, 0.618], dtype=float32)
    """
    return _called(
        x, scale, bias, axis, target_variance, epsilon, where, axis_name, axis_index_groups, dtype,
        implementation, False,
    )  # fmt: skip


def finite_batch_norm(
    x, scale, bias, *, axis, target_variance="golden", epsilon=1e-5, where=None, axis_name=None,
    axis_index_groups=None, dtype=None, implementation=None,
):  # fmt: skip
    """`golden_batch_norm` for layers: features without any element have statistics of 0.

    A layer does not use them, and a NaN that nobody uses is found by `debug_nans` all the same.
    """
    return _called(
        x, scale, bias, axis, target_variance, epsilon, where, axis_name, axis_index_groups, dtype,
        implementation, True,
    )  # fmt: skip


def golden_batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    target_variance: str | float | GoldenNormMode = "golden",
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Normalises every feature by given statistics, as running ones are.

    y = scale · √t · (x − mean) / √(var + ε) + bias, of which the slope is made first.

    Args:
      x: array of float16, bfloat16, float32 or float64, features at `axis`.
      mean: array of the shape of the feature axes; any floating type, it does not promote the
        result.
      var: likewise.
      scale: likewise, or None (1).
      bias: likewise, or None (0).
      axis: the feature axis, or several.
      target_variance: t: 'golden' (φ⁻¹), 'standard' (1), a positive Python number or a
        `GoldenNormMode`.
      epsilon: added to the variance; a Python number, not negative.
      dtype: type of y; None: that of x.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md). None leaves y, which is
        elementwise, to XLA's fusions, and takes kernels for the sums that its derivative needs.

    Returns:
      y of the shape of x, computed in float32 (float64 for float64 data) and rounded once.

    Raises:
      TypeError: an array or `dtype` is not real floating point, or `epsilon` no Python number.
      ValueError: an axis is out of range or named twice, a parameter does not have the shape of
        the features, or another argument is out of range.

    >>> import jax.numpy as jnp
    >>> golden_batch_norm_inference(
    ...     jnp.ones((2, 1)), jnp.zeros(1), jnp.ones(1), target_variance=4.0, epsilon=0.0
    ... ).tolist()
    [[2.0], [2.0]]
    """
    name = "golden_batch_norm_inference"
    axis, target_variance, epsilon = _check.static_norm(name, axis, target_variance, epsilon)
    return _golden_batch_norm_inference(
        x, mean, var, scale, bias, axis, target_variance, epsilon, dtype, implementation
    )


def output_statistics(x: ArrayLike, axis: int | Sequence[int] = -1) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of every feature: whether a tensor reaches its target variance.

    Args:
      x: array of float16, bfloat16, float32 or float64.
      axis: the feature axis, or several; the statistics run over all the others.

    Returns:
      (mean, var), both of the shape of the feature axes, in float32 (float64 for float64 data).

    Raises:
      TypeError: x is not real floating point.
      ValueError: an axis is out of range or named twice, or there is nothing to reduce.

    >>> import jax, jax.numpy as jnp
    >>> y, _, _ = golden_batch_norm(jax.random.normal(jax.random.key(0), (64, 3)))
    >>> [round(float(variance), 3) for variance in output_statistics(y)[1]]
    [0.618, 0.618, 0.618]
    """
    if type(axis) is not int:
        axis = _check.static_axes("output_statistics", axis)
    return _output_statistics(x, axis)


def _called(
    x, scale, bias, axis, target_variance, epsilon, where, axis_name, axis_index_groups, dtype,
    implementation, finite,
):  # fmt: skip
    """The call with what is static as jit can hash it."""
    name = "golden_batch_norm"
    axis, target_variance, epsilon = _check.static_norm(name, axis, target_variance, epsilon)
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    if axis_index_groups is not None:
        axis_index_groups = _check.index_groups(name, axis_index_groups)
    return _golden_batch_norm(
        x, scale, bias, where, axis, target_variance, epsilon, dtype, implementation, axis_name,
        axis_index_groups, finite,
    )  # fmt: skip


@_public.jit(
    "axis", "target_variance", "epsilon", "dtype", "implementation", "axis_name",
    "axis_index_groups", "finite", function="golden_batch_norm",
)  # fmt: skip
def _golden_batch_norm(
    x, scale, bias, where, axis, target_variance, epsilon, dtype, implementation, axis_name,
    axis_index_groups, finite,
):  # fmt: skip
    options = checked_options(
        "golden_batch_norm", axis, target_variance, epsilon, dtype, implementation, axis_name,
        axis_index_groups,
    )  # fmt: skip
    return _checked_batch_norm(x, scale, bias, where, options, finite)


@_public.jit("axis", function="output_statistics")
def _output_statistics(x, axis):
    options = checked_options("output_statistics", axis, "standard", 0.0, None, None)
    return _checked_batch_norm(x, None, None, None, options)[1:]


def _checked_batch_norm(x, scale, bias, where, options: Options, finite: bool = True):
    name = options.function
    layout, x, (scale, bias) = layout_of(
        name, options.axis, options.dtype, x, scale=scale, bias=bias
    )
    if where is not None:
        where = mask_of(name, where, layout, x)
    if 0 in layout.reduced or not layout.reduced:
        raise ValueError(
            f"{name}: axis must leave something to reduce over, at least one element on other "
            f"axes, got feature axes {layout.axes} of shape {layout.shape}"
        )
    if options.axis_name is not None:
        options = options._replace(axis_sizes=_mapped_sizes(name, options))
    scale, bias = contained(scale), contained(bias)
    y, mean, _, var, count = batch_norm(x, scale, bias, where, layout, options)
    if count is not None:
        # √−1 where there is none: a NaN by name would be found also where there is no such channel.
        none = 0 if finite else jnp.sqrt(lax.stop_gradient(count) - 1)
        mean, var = (jnp.where(count > 0, s, none) for s in (mean, var))
    return layout.restore(y), mean, var


@_public.jit(
    "axis", "target_variance", "epsilon", "dtype", "implementation",
    function="golden_batch_norm_inference",
)  # fmt: skip
def _golden_batch_norm_inference(
    x, mean, var, scale, bias, axis, target_variance, epsilon, dtype, implementation
):
    name = "golden_batch_norm_inference"
    options = checked_options(name, axis, target_variance, epsilon, dtype, implementation)
    _check.floating(name, mean=mean, var=var)  # they are not optional, as scale and bias are
    layout, x, (mean, var, scale, bias) = layout_of(
        options.function, options.axis, options.dtype, x, mean=mean, var=var, scale=scale, bias=bias
    )
    mean, var, scale, bias = map(contained, (mean, var, scale, bias))
    return layout.restore(normalise_by(x, mean, var, scale, bias, layout, options))


def _mapped_sizes(name: str, options: Options) -> tuple[tuple[Any, int], ...]:
    # Asked here because a sum over groups does not ask.
    _check.axis_name(name, options.axis_name)
    names = options.axis_name
    try:
        sizes = tuple(
            (n, lax.axis_size(n)) for n in (names if isinstance(names, tuple) else (names,))
        )
    except NameError as error:
        raise NameError(
            f"{name}: axis_name must be a mapped axis (of jax.vmap, jax.pmap or jax.shard_map), "
            f"got {options.axis_name!r}, which is none here"
        ) from error
    if options.axis_index_groups is not None:
        _check.covers(name, options.axis_index_groups, math.prod(size for _, size in sizes))
    return sizes

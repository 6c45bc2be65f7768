"""Normalisation layers for Flax Linen: what `syntonic_jax.nn.linen` has of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import _check, golden_batch_norm_inference
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.norm import along, require_features, sorted_axes, widened
from syntonic_jax.ops._norms_of_layers import layer_norm, moved, remains
from syntonic_jax.ops.golden_batch_norm import finite_batch_norm

with required("flax", "flax"):
    from flax import linen as nn
    from flax.linen.dtypes import canonicalize_dtype
    from flax.typing import Dtype, Initializer


def _parameters(module: Any, shape: tuple[int, ...]) -> list[Any]:
    """scale, and bias if it may have one, or None; made in the order in which Flax draws keys."""
    names = [name for name in ("scale", "bias") if hasattr(module, f"use_{name}")]
    layer = type(module).__name__
    arguments.flags(layer, **{f"use_{name}": getattr(module, f"use_{name}") for name in names})
    arguments.types(layer, dtype=module.dtype, param_dtype=module.param_dtype)
    made = []
    for name in names:
        use, init = getattr(module, f"use_{name}"), getattr(module, f"{name}_init")
        made.append(module.param(name, init, shape, module.param_dtype) if use else None)
    return made


def _mapping(module: Any) -> dict[str, Any]:
    """The mapped axis; none in initialisation, which then needs no such axis."""
    if module.is_initializing():
        return {}
    return {"axis_name": module.axis_name, "axis_index_groups": module.axis_index_groups}


class GoldenBatchNorm(nn.Module):
    """``linen.BatchNorm`` with a target variance.

    Attributes up to ``force_float32_reductions``, variables (``scale`` and ``bias`` in
    ``params``, ``mean`` and ``var`` in ``batch_stats``), initialisers and result dtype are those
    of ``linen.BatchNorm``, so variables of one load into the other. Automatic names are made of
    the class: for variables of a network with a ``BatchNorm_0``, say ``name='BatchNorm_0'``.
    What differs:

    - y has the variance ``target_variance`` before ``scale`` and ``bias``. The running
      statistics are those of x.
    - The variance is always computed in two passes and in float32 or float64:
      ``use_fast_variance`` has no effect.
    - The running statistics are float32 or float64 in storage too, where ``linen.BatchNorm``
      without ``force_float32_reductions`` keeps them in ``param_dtype``: in 16 bits a momentum of
      0.999 rounds to 1 and a variance above 65504 to infinity. Variables of 16 bits load, and
      their statistics are float32 from the first update on.
    - A channel of which the mask leaves nothing has y = bias without a derivative and leaves its
      running statistics as they were; ``linen.BatchNorm`` makes them NaN.
    - With ``dtype``, y alone is rounded to it; x is not.
    - Over ``axis_name`` the statistics are weighted by the number of entries, which
      ``linen.BatchNorm`` does not do: it differs where masks leave unequal numbers.

    Initialisation neither updates the running statistics nor needs the mapped axis.

    Attributes:
      use_running_average: whether y is that of the running statistics, which then stay as they
        are; to be given here or in the call.
      axis: the feature axis, or axes; the statistics run over all the others.
      momentum: weight of the old value in the running statistics.
      epsilon: added to the variance.
      dtype: the dtype of y (default: the promoted dtype of x and the parameters, so that
        bfloat16 data with float32 parameters give float32).
      param_dtype: the dtype of the parameters.
      use_bias: whether there is a ``bias``.
      use_scale: whether there is a ``scale``.
      bias_init: initialiser of ``bias``.
      scale_init: initialiser of ``scale``.
      axis_name: the mapped axis (of ``vmap``, ``pmap`` or ``shard_map``), or axes, over which the
        statistics are merged. Under ``jit`` with sharded arrays they always are.
      axis_index_groups: groups of indices of that axis, each with statistics of its own.
      use_fast_variance: accepted, without effect.
      force_float32_reductions: whether the running statistics begin in float32 where
        ``param_dtype`` is float64; without effect otherwise.
      target_variance: see :func:`syntonic_jax.golden_batch_norm`.
      implementation: see :func:`syntonic_jax.golden_batch_norm`.

    Raises (when called):
      ValueError: an axis that x does not have, nothing to reduce, a negative epsilon, a bad
        target variance; ``flax.errors.ScopeParamShapeError`` for parameters of another size.
      TypeError: data that are not real floating point, a mask that is no array of booleans or
        numbers, a flag that is neither true nor false.

    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.linen import GoldenBatchNorm
    >>> norm, x = GoldenBatchNorm(use_running_average=False), jnp.array([[1.0], [3.0]])
    >>> variables = norm.init(jax.random.key(0), x)
    >>> y, new = norm.apply(variables, x, mutable=["batch_stats"])
    >>> print(np.asarray(y).round(3).ravel(), new["batch_stats"]["mean"])
    [-0.786  0.786] [0.02]
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
    scale_init: Initializer = jax.nn.initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    target_variance: Any = "golden"
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """y, of the shape of x.

        The statistics leave out the entries where ``mask``, an array of booleans or numbers of a
        shape that broadcasts to that of x, is false or 0.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        name = "GoldenBatchNorm"
        _check.floating(name, x=x)
        arguments.flags(name, use_running_average=use_running_average)
        where = arguments.truth(name, mask, jnp.shape(x), "x")
        axes = sorted_axes(name, "axis", self.axis, jnp.ndim(x))
        shape = tuple(jnp.shape(x)[a] for a in axes)
        stored = jnp.float32
        if not self.force_float32_reductions:
            stored = jnp.promote_types(stored, self.param_dtype)
        running = [
            self.variable("batch_stats", "mean", jnp.zeros, shape, stored),
            self.variable("batch_stats", "var", jnp.ones, shape, stored),
        ]
        scale, bias = _parameters(self, shape)
        require_features(name, x, axes, running[0].value.shape)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        settings: Any = {
            "axis": axes,
            "target_variance": self.target_variance,
            "epsilon": self.epsilon,
            "dtype": dtype,
            "implementation": self.implementation,
        }
        data = widened(x, dtype)
        if use_running_average:
            mean, var = (variable.value for variable in running)
            return golden_batch_norm_inference(data, mean, var, scale, bias, **settings)
        mapping = _mapping(self)
        y, *new = finite_batch_norm(data, scale, bias, where=where, **mapping, **settings)
        if self.is_initializing():
            return y
        anything = None
        if where is not None:
            anything = remains(where, jnp.shape(x), axes, mapping).reshape(shape)
        # As in linen.BatchNorm the statistics become as wide as what they are computed in.
        wide = jnp.promote_types(jnp.result_type(x) if self.dtype is None else self.dtype, stored)
        momentum = arguments.momentum(name, self.momentum)
        for variable, value in zip(running, new):
            wide = jnp.promote_types(wide, variable.value.dtype)
            variable.value = moved(variable.value, value, momentum, wide, anything)
        return y


class GoldenLayerNorm(nn.Module):
    """``linen.LayerNorm`` with a target variance.

    Attributes up to ``force_float32_reductions``, parameters (``scale`` and ``bias``),
    initialisers and result dtype are those of ``linen.LayerNorm``, so variables of one load into
    the other. Automatic names are made of the class: for variables of a network with a
    ``LayerNorm_0``, say ``name='LayerNorm_0'``. What differs:

    - y has the variance ``target_variance`` before ``scale`` and ``bias``.
    - The variance is always computed in two passes and in float32 or float64:
      ``use_fast_variance`` and ``force_float32_reductions`` have no effect.
    - With ``dtype``, y alone is rounded to it; x is not.
    - Over ``axis_name`` the statistics are weighted by the number of entries.

    A mask, an ``axis_name``, or ``feature_axes`` that are not among the ``reduction_axes``, are
    supported, but not in one pass.

    Attributes:
      epsilon: added to the variance.
      dtype: the dtype of y (default: the promoted dtype of x and the parameters, so that
        bfloat16 data with float32 parameters give float32).
      param_dtype: the dtype of the parameters.
      use_bias: whether there is a ``bias``.
      use_scale: whether there is a ``scale``.
      bias_init: initialiser of ``bias``.
      scale_init: initialiser of ``scale``.
      reduction_axes: the axes over which the statistics run.
      feature_axes: the axes along which ``scale`` and ``bias`` vary.
      axis_name: the mapped axis, or axes, over which x is cut along its reduced axes.
      axis_index_groups: groups of indices of that axis, each with statistics of its own.
      use_fast_variance: accepted, without effect.
      force_float32_reductions: accepted, without effect.
      target_variance: see :func:`syntonic_jax.golden_layer_norm`.
      implementation: see :func:`syntonic_jax.golden_layer_norm`.

    Raises (when called):
      ValueError: axes that x does not have, nothing to reduce, a negative epsilon, a bad target
        variance; ``flax.errors.ScopeParamShapeError`` for parameters of another size.
      TypeError: data that are not real floating point, a mask that is no array of booleans or
        numbers, a flag that is neither true nor false.

    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.linen import GoldenLayerNorm
    >>> y, variables = GoldenLayerNorm().init_with_output(jax.random.key(0), jnp.arange(4.0))
    >>> print(np.asarray(y).round(3))
    [-1.055 -0.352  0.352  1.055]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
    scale_init: Initializer = jax.nn.initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    target_variance: Any = "golden"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """y, of the shape of x.

        The statistics leave out the entries where ``mask``, an array of booleans or numbers of a
        shape that broadcasts to that of x, is false or 0. A row of which it leaves nothing is the
        bias, without a derivative.
        """
        name = "GoldenLayerNorm"
        _check.floating(name, x=x)
        ndim = jnp.ndim(x)
        reduced = sorted_axes(name, "reduction_axes", self.reduction_axes, ndim)
        features = sorted_axes(name, "feature_axes", self.feature_axes, ndim)
        scale, bias = _parameters(self, tuple(jnp.shape(x)[a] for a in features))
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        scale, bias = along(name, x, features, scale=scale, bias=bias)
        return layer_norm(
            widened(x, dtype),
            scale,
            bias,
            reduced,
            dtype,
            where=arguments.truth(name, mask, jnp.shape(x), "x"),
            mapping=_mapping(self),
            epsilon=self.epsilon,
            target_variance=self.target_variance,
            implementation=self.implementation,
        )

"""Normalisation layers for Flax NNX: what `syntonic_jax.nn.nnx` has of them."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
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
    from flax import nnx
    from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
    from flax.typing import Dtype, Initializer


class _Norm(nnx.Module):
    """The parameters of a normalisation and their dtype."""

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    dtype: Dtype | None
    axis_name: Any
    axis_index_groups: Any
    promote_dtype: Callable[..., Any]

    def _create(self, shape, dtype, rngs, **parameters: tuple[bool, Initializer, Any]):
        for name, (use, init, metadata) in parameters.items():
            value = nnx.Param(init(rngs.params(), shape, dtype), **metadata) if use else None
            setattr(self, name, nnx.data(None) if value is None else value)

    def _mapping(self) -> dict[str, Any]:
        return {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}

    def _values(self) -> tuple[Any, Any]:
        return (
            None if self.scale is None else self.scale[...],
            None if self.bias is None else self.bias[...],
        )

    def _promote(self, *arrays: Any) -> tuple[tuple[Any, ...], Any]:
        """The arrays, and the dtype of y.

        What Flax promotes to decides the dtype, but no array is rounded to it: only y is. Any
        other function is the user's, and what it returns is what is used.
        """
        if self.promote_dtype is not promote_dtype:
            arrays = tuple(self.promote_dtype(arrays, dtype=self.dtype))
        dtype = canonicalize_dtype(*arrays, dtype=self.dtype)
        return (widened(arrays[0], dtype), *arrays[1:]), dtype


def _unrounded(statistic: Any, given: Any) -> Any:
    """What promote_dtype gives for a statistic, but for the rounding to 16 bits, if that is all."""
    if jnp.finfo(given.dtype).bits >= 32:
        return given
    same = given == statistic.astype(given.dtype)
    return jnp.where(same, statistic, given.astype(statistic.dtype))


class GoldenBatchNorm(_Norm):
    """``nnx.BatchNorm`` with a target variance.

    Arguments up to ``scale_metadata``, state (``scale`` and ``bias``; ``mean`` and ``var``, in
    float32), initialisers and result dtype are those of ``nnx.BatchNorm``, so a state of one
    loads into the other. What differs:

    - The running statistics are float32 or float64 in computation and storage. A state of 16 bits
      loads, and its statistics are float32 from the first update on, where ``nnx.BatchNorm`` rounds
      every update to 16 bits. A ``promote_dtype`` that rounds them has no effect on them.
    - A channel of which the mask leaves nothing has y = bias without a derivative and leaves its
      running statistics as they were; ``nnx.BatchNorm`` makes them NaN.

    - y has the variance ``target_variance`` before ``scale`` and ``bias``. The running
      statistics are those of x.
    - The variance is always computed in two passes: ``use_fast_variance`` has no effect.
    - With ``dtype``, y alone is rounded to it; x, the parameters and the statistics are not.
    - Over ``axis_name`` the statistics are weighted by the number of entries, which
      ``nnx.BatchNorm`` does not do: it differs where masks leave unequal numbers.

    Args:
      num_features: the size of the feature axis.
      use_running_average: whether y is that of the running statistics, which then stay as they
        are; ``train()`` and ``eval()`` set it.
      axis: the feature axis; the statistics run over all the others.
      momentum: weight of the old value in the running statistics.
      epsilon: added to the variance.
      dtype: the dtype of y (default: the promoted dtype of x, parameters and statistics, so that
        bfloat16 data give float32).
      param_dtype: the dtype of the parameters.
      use_bias: whether there is a ``bias``.
      use_scale: whether there is a ``scale``.
      bias_init: initialiser of ``bias``.
      scale_init: initialiser of ``scale``.
      axis_name: the mapped axis (of ``vmap``, ``pmap`` or ``shard_map``), or axes, over which the
        statistics are merged. Under ``jit`` with sharded arrays they always are.
      axis_index_groups: groups of indices of that axis, each with statistics of its own.
      use_fast_variance: accepted, without effect.
      promote_dtype: a function to be called with ``(x, mean, var, scale, bias)`` and ``dtype``,
        whose results are used in their place.
      rngs: where the initialisers' keys come from.
      bias_metadata: metadata of the ``bias`` variable, such as its sharding.
      scale_metadata: metadata of the ``scale`` variable.
      target_variance: see :func:`syntonic_jax.golden_batch_norm`.
      implementation: see :func:`syntonic_jax.golden_batch_norm`.

    Raises:
      ValueError: a feature axis of another size, an axis that x does not have, nothing to
        reduce, a negative epsilon, a bad target variance (when called).
      TypeError: data that are not real floating point, a mask that is no array of booleans or
        numbers, a flag that is neither true nor false.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import GoldenBatchNorm
    >>> norm = GoldenBatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    >>> print(np.asarray(norm(jnp.array([[1.0], [3.0]]))).round(3).ravel())
    [-0.786  0.786]
    >>> print(norm.mean[...].round(3), norm.var[...].round(3))
    [0.2] [1.]
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        target_variance: Any = "golden",
        implementation: str | None = None,
    ):
        arguments.flags("GoldenBatchNorm", use_bias=use_bias, use_scale=use_scale)
        arguments.types("GoldenBatchNorm", dtype=dtype, param_dtype=param_dtype)
        arguments.size("GoldenBatchNorm", num_features=num_features)
        shape = (num_features,)
        self.mean = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))
        # The order in which nnx.BatchNorm draws its keys.
        self._create(
            shape,
            param_dtype,
            rngs,
            scale=(use_scale, scale_init, scale_metadata),
            bias=(use_bias, bias_init, bias_metadata),
        )
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.target_variance = target_variance
        self.implementation = implementation

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """y, of the shape of x.

        ``use_running_average`` stands before that of the constructor. The statistics leave out
        the entries where ``mask``, an array of booleans or numbers of a shape that broadcasts to
        that of x, is false or 0.
        """
        name = "GoldenBatchNorm"
        _check.floating(name, x=x)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                f"{name}: use_running_average must be set in the constructor, in the call, "
                "or by train() or eval()"
            )
        arguments.flags(name, use_running_average=use_running_average)
        where = arguments.truth(name, mask, jnp.shape(x), "x")
        axes = sorted_axes(name, "axis", self.axis, jnp.ndim(x))
        running = self.mean[...], self.var[...]
        require_features(name, x, axes, running[0].shape)
        (x, *statistics, scale, bias), dtype = self._promote(x, *running, *self._values())
        settings: Any = {
            "axis": axes,
            "target_variance": self.target_variance,
            "epsilon": self.epsilon,
            "dtype": dtype,
            "implementation": self.implementation,
        }
        if use_running_average:
            mean, var = map(_unrounded, running, statistics)
            return golden_batch_norm_inference(x, mean, var, scale, bias, **settings)
        mapping = self._mapping()
        y, *new = finite_batch_norm(x, scale, bias, where=where, **mapping, **settings)
        anything = None
        if where is not None:
            anything = remains(where, x.shape, axes, mapping).reshape(running[0].shape)
        momentum = arguments.momentum(name, self.momentum)
        for variable, old, value in zip((self.mean, self.var), running, new):
            dtype = jnp.promote_types(old.dtype, jnp.float32)
            # A variable that outlives the transformation must not hold its tracers.
            value = jax.lax.stop_gradient(moved(old, value, momentum, dtype, anything))
            if dtype == old.dtype:
                variable[...] = value
            else:  # a checkpoint in 16 bits; an array that is assigned to would keep its dtype
                variable.set_value(value)
        return y

    def set_view(self, use_running_average: bool | None = None):
        """What ``nnx.view`` calls on the copy that it makes."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


class GoldenLayerNorm(_Norm):
    """``nnx.LayerNorm`` with a target variance.

    Arguments up to ``scale_metadata``, state (``scale`` and ``bias``), initialisers and result
    dtype are those of ``nnx.LayerNorm``, so a state of one loads into the other. What differs:

    - y has the variance ``target_variance`` before ``scale`` and ``bias``.
    - The variance is always computed in two passes: ``use_fast_variance`` has no effect.
    - With ``dtype``, y alone is rounded to it; x and the parameters are not.
    - Over ``axis_name`` the statistics are weighted by the number of entries.

    A mask, an ``axis_name``, or ``feature_axes`` that are not among the ``reduction_axes``, are
    supported, but not in one pass.

    Args:
      num_features: the number of features.
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
      promote_dtype: a function to be called with ``(x, scale, bias)`` and ``dtype``, whose
        results are used in their place.
      rngs: where the initialisers' keys come from.
      bias_metadata: metadata of the ``bias`` variable, such as its sharding.
      scale_metadata: metadata of the ``scale`` variable.
      target_variance: see :func:`syntonic_jax.golden_layer_norm`.
      implementation: see :func:`syntonic_jax.golden_layer_norm`.

    Raises:
      ValueError: feature axes of another size, axes that x does not have, nothing to reduce, a
        negative epsilon, a bad target variance (when called).
      TypeError: data that are not real floating point, a mask that is no array of booleans or
        numbers, a flag that is neither true nor false.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import GoldenLayerNorm
    >>> norm = GoldenLayerNorm(4, rngs=nnx.Rngs(0))
    >>> print(np.asarray(norm(jnp.arange(4.0))).round(3))
    [-1.055 -0.352  0.352  1.055]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        target_variance: Any = "golden",
        implementation: str | None = None,
    ):
        arguments.flags("GoldenLayerNorm", use_bias=use_bias, use_scale=use_scale)
        arguments.types("GoldenLayerNorm", dtype=dtype, param_dtype=param_dtype)
        arguments.size("GoldenLayerNorm", num_features=num_features)
        # The order in which nnx.LayerNorm draws its keys.
        self._create(
            (num_features,),
            param_dtype,
            rngs,
            scale=(use_scale, scale_init, scale_metadata),
            bias=(use_bias, bias_init, bias_metadata),
        )
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.target_variance = target_variance
        self.implementation = implementation

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
        where = arguments.truth(name, mask, jnp.shape(x), "x")
        (x, scale, bias), dtype = self._promote(x, *self._values())
        scale, bias = along(name, x, features, scale=scale, bias=bias)
        return layer_norm(
            x,
            scale,
            bias,
            reduced,
            dtype,
            where=where,
            mapping=self._mapping(),
            epsilon=self.epsilon,
            target_variance=self.target_variance,
            implementation=self.implementation,
        )

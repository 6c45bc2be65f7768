"""RMS norms for Flax NNX: what `syntonic_jax.nn.nnx` has of them."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import PhiResidualMode, _check, phi_residual_rmsnorm
from syntonic_jax.modes import check_mode
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.norm import along, sorted_axes
from syntonic_jax.ops._norms_of_layers import rms_norm

from .norm import _Norm

with required("flax", "flax"):
    from flax import nnx
    from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
    from flax.typing import Dtype, Initializer


class GoldenRMSNorm(_Norm):
    """``nnx.RMSNorm`` with a target mean square.

    Arguments up to ``scale_metadata``, state (``scale``), initialiser and result dtype are those of
    ``nnx.RMSNorm``, so a state of one loads into the other. What differs:

    - y has the mean square ``target_variance`` before ``scale``.
    - ``use_fast_variance`` has no effect: there is no mean to lose.
    - With ``dtype``, y alone is rounded to it; x and the scale are not.
    - Over ``axis_name`` the mean squares are weighted by the number of entries.

    A mask, an ``axis_name``, or ``feature_axes`` that are not among the ``reduction_axes``, are
    supported, but not in one pass.

    Args:
      num_features: the number of features.
      epsilon: added to the mean square.
      dtype: the dtype of y (default: the promoted dtype of x and the scale, so that bfloat16 data
        with a float32 scale give float32).
      param_dtype: the dtype of the scale.
      use_scale: whether there is a ``scale``.
      scale_init: initialiser of ``scale``.
      reduction_axes: the axes over which the mean squares run.
      feature_axes: the axes along which ``scale`` varies.
      axis_name: the mapped axis, or axes, over which x is cut along its reduced axes.
      axis_index_groups: groups of indices of that axis, each with mean squares of its own.
      use_fast_variance: accepted, without effect.
      promote_dtype: a function to be called with ``(x, scale)`` and ``dtype``, whose results are
        used in their place.
      rngs: where the initialiser's key comes from.
      scale_metadata: metadata of the ``scale`` variable.
      target_variance: see :func:`syntonic_jax.golden_rms_norm`.
      scale_offset: see :func:`syntonic_jax.golden_rms_norm`; with 1, say
        ``scale_init=nnx.initializers.zeros``.
      implementation: see :func:`syntonic_jax.golden_rms_norm`.

    Raises:
      ValueError: feature axes of another size, axes that x does not have, nothing to reduce, a
        negative epsilon, a bad target (when called).
      TypeError: data that are not real floating point, a mask that is no array of booleans or
        numbers, a flag that is neither true nor false, an offset that is no number.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import GoldenRMSNorm
    >>> norm = GoldenRMSNorm(4, rngs=nnx.Rngs(0))
    >>> print(np.asarray(norm(jnp.arange(4.0))).round(3))
    [0.    0.42  0.84  1.261]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = jax.nn.initializers.ones,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        target_variance: Any = "golden",
        scale_offset: float = 0.0,
        implementation: str | None = None,
    ):
        arguments.flags("GoldenRMSNorm", use_scale=use_scale)
        arguments.types("GoldenRMSNorm", dtype=dtype, param_dtype=param_dtype)
        arguments.size("GoldenRMSNorm", num_features=num_features)
        scale = (use_scale, scale_init, scale_metadata)
        self._create((num_features,), param_dtype, rngs, scale=scale)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.target_variance = target_variance
        self.scale_offset = scale_offset
        self.implementation = implementation

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """y, of the shape of x.

        The mean squares leave out the entries where ``mask``, an array of booleans or numbers of a
        shape that broadcasts to that of x, is false or 0. A row of which it leaves nothing is 0,
        without a derivative.
        """
        name = "GoldenRMSNorm"
        _check.floating(name, x=x)
        ndim = jnp.ndim(x)
        reduced = sorted_axes(name, "reduction_axes", self.reduction_axes, ndim)
        features = sorted_axes(name, "feature_axes", self.feature_axes, ndim)
        where = arguments.truth(name, mask, jnp.shape(x), "x")
        (x, scale), dtype = self._promote(x, None if self.scale is None else self.scale[...])
        (scale,) = along(name, x, features, scale=scale)
        return rms_norm(
            *(name, x, scale, reduced, dtype),
            where=where,
            mapping=self._mapping(),
            scale_offset=self.scale_offset,
            epsilon=self.epsilon,
            target_variance=self.target_variance,
            implementation=self.implementation,
        )


class PhiResidualRMSNorm(nnx.Module):
    """``nnx.RMSNorm`` of a residual sum, over the last axis, in one pass.

    Arguments, parameter (``scale`` of shape ``(num_features,)``), initialiser and result dtype are
    those of ``nnx.RMSNorm``, so a state of one loads into the other. Its ``reduction_axes``,
    ``feature_axes``, ``axis_name``, ``axis_index_groups``, ``use_fast_variance``, ``promote_dtype``
    and ``mask`` do not exist here: the mean squares are always those of the last axis, of every
    entry, in the accumulation type.

    Args:
      num_features: the size of the last axis.
      epsilon: added to the mean square.
      dtype: the dtype of y (default: the promoted dtype of the two arrays and the scale, so that
        bfloat16 arrays with a float32 scale give float32).
      param_dtype: the dtype of the scale.
      use_scale: whether there is a ``scale``.
      scale_init: initialiser of ``scale``.
      rngs: where the initialiser's key comes from.
      scale_metadata: metadata of the ``scale`` variable, such as its sharding.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      target_variance: see :func:`syntonic_jax.phi_residual_rmsnorm`.
      scale_offset: see :func:`syntonic_jax.phi_residual_rmsnorm`; with 1, say
        ``scale_init=nnx.initializers.zeros``.
      return_sum: whether the call returns ``(y, z)``, z being the residual sum that the next
        block adds to, in the promoted dtype of the two arrays.
      implementation: see :func:`syntonic_jax.phi_residual_rmsnorm`.

    Raises:
      ValueError: unknown mode (when built); unequal shapes, a last axis other than
        ``num_features``, a negative epsilon, a bad target (when called).
      TypeError: a flag that is neither true nor false (when built); data that are not real
        floating point, an offset that is no number (when called).

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import PhiResidualRMSNorm
    >>> norm = PhiResidualRMSNorm(4, return_sum=True, rngs=nnx.Rngs(0))
    >>> y, z = norm(jnp.zeros((1, 4)), jnp.arange(4.0).reshape(1, 4))
    >>> print(np.asarray(z).round(3), np.asarray(y).round(3))
    [[0.    0.618 1.236 1.854]] [[0.    0.535 1.069 1.604]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = jax.nn.initializers.ones,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        mode: PhiResidualMode | str = "phi",
        target_variance: Any = "standard",
        scale_offset: float = 0.0,
        return_sum: bool = False,
        implementation: str | None = None,
    ):
        name = "PhiResidualRMSNorm"
        arguments.flags(name, use_scale=use_scale, return_sum=return_sum)
        arguments.size(name, num_features=num_features)
        self.scale: Any = nnx.data(None)
        if use_scale:
            value = scale_init(rngs.params(), (num_features,), param_dtype)
            self.scale = nnx.Param(value, **scale_metadata)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_scale = use_scale
        self.mode = check_mode(name, mode)
        self.target_variance = target_variance
        self.scale_offset = scale_offset
        self.return_sum = bool(return_sum)
        self.implementation = implementation

    def __call__(self, identity: jax.Array, residual: jax.Array) -> Any:
        """y, or ``(y, z)`` with ``return_sum``; all of the shape ``[..., num_features]``."""
        _check.floating("PhiResidualRMSNorm", identity=identity, residual=residual)
        scale = None if self.scale is None else self.scale[...]
        return phi_residual_rmsnorm(
            *(identity, residual, scale),
            mode=self.mode,
            epsilon=self.epsilon,
            target_variance=self.target_variance,
            scale_offset=self.scale_offset,
            return_sum=self.return_sum,
            dtype=canonicalize_dtype(identity, residual, scale, dtype=self.dtype),
            implementation=self.implementation,
        )

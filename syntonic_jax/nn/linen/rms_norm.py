"""RMS norms for Flax Linen: what `syntonic_jax.nn.linen` has of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import PhiResidualMode, _check, phi_residual_rmsnorm
from syntonic_jax.modes import check_mode
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.norm import along, sorted_axes, widened
from syntonic_jax.ops._norms_of_layers import rms_norm

from .norm import _mapping, _parameters

with required("flax", "flax"):
    from flax import linen as nn
    from flax.linen.dtypes import canonicalize_dtype
    from flax.typing import Dtype, Initializer


class GoldenRMSNorm(nn.Module):
    """``linen.RMSNorm`` with a target mean square.

    Attributes up to ``force_float32_reductions``, parameter (``scale``), initialiser and result
    dtype are those of ``linen.RMSNorm``, so variables of one load into the other. Automatic names
    are made of the class: for variables of a network with an ``RMSNorm_0``, say
    ``name='RMSNorm_0'``. What differs:

    - y has the mean square ``target_variance`` before ``scale``.
    - It is always computed in float32 or float64: ``use_fast_variance`` and
      ``force_float32_reductions`` have no effect.
    - With ``dtype``, y alone is rounded to it; x is not.
    - Over ``axis_name`` the mean squares are weighted by the number of entries.

    A mask, an ``axis_name``, or ``feature_axes`` that are not among the ``reduction_axes``, are
    supported, but not in one pass.

    Attributes:
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
      force_float32_reductions: accepted, without effect.
      target_variance: see :func:`syntonic_jax.golden_rms_norm`.
      scale_offset: see :func:`syntonic_jax.golden_rms_norm`; with 1, say
        ``scale_init=nn.initializers.zeros``.
      implementation: see :func:`syntonic_jax.golden_rms_norm`.

    Raises (when called):
      ValueError: axes that x does not have, nothing to reduce, a negative epsilon, a bad target;
        ``flax.errors.ScopeParamShapeError`` for a scale of another size.
      TypeError: data that are not real floating point, a mask that is no array of booleans or
        numbers, a flag that is neither true nor false, an offset that is no number.

    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.linen import GoldenRMSNorm
    >>> y, variables = GoldenRMSNorm().init_with_output(jax.random.key(0), jnp.arange(4.0))
    >>> print(np.asarray(y).round(3))
    [0.    0.42  0.84  1.261]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = jax.nn.initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    target_variance: Any = "golden"
    scale_offset: float = 0.0
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
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
        (scale,) = _parameters(self, tuple(jnp.shape(x)[a] for a in features))
        dtype = canonicalize_dtype(x, scale, dtype=self.dtype)
        (scale,) = along(name, x, features, scale=scale)
        return rms_norm(
            *(name, widened(x, dtype), scale, reduced, dtype),
            where=arguments.truth(name, mask, jnp.shape(x), "x"),
            mapping=_mapping(self),
            scale_offset=self.scale_offset,
            epsilon=self.epsilon,
            target_variance=self.target_variance,
            implementation=self.implementation,
        )


class PhiResidualRMSNorm(nn.Module):
    """``linen.RMSNorm`` of a residual sum, over the last axis, in one pass.

    Attributes up to ``scale_init``, parameter (``scale`` of shape ``(features,)``) and result dtype
    are those of ``linen.RMSNorm``, so variables of one load into the other. Its
    ``reduction_axes``, ``feature_axes``, ``axis_name``, ``axis_index_groups``,
    ``use_fast_variance``, ``force_float32_reductions`` and ``mask`` do not exist here: the mean
    squares are always those of the last axis, of every entry, in the accumulation type.

    Attributes:
      epsilon: added to the mean square.
      dtype: the dtype of y (default: the promoted dtype of the two arrays and the scale, so that
        bfloat16 arrays with a float32 scale give float32).
      param_dtype: the dtype of the scale.
      use_scale: whether there is a ``scale``.
      scale_init: initialiser of ``scale``.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      target_variance: see :func:`syntonic_jax.phi_residual_rmsnorm`.
      scale_offset: see :func:`syntonic_jax.phi_residual_rmsnorm`; with 1, say
        ``scale_init=nn.initializers.zeros``.
      return_sum: whether the call returns ``(y, z)``, z being the residual sum that the next
        block adds to, in the promoted dtype of the two arrays.
      implementation: see :func:`syntonic_jax.phi_residual_rmsnorm`.

    Raises:
      ValueError: unknown mode (when built); unequal shapes, no last axis, a negative epsilon, a bad
        target, ``flax.errors.ScopeParamShapeError`` for a scale of another width (when called).
      TypeError: a flag that is neither true nor false (when built); data that are not real
        floating point, an offset that is no number (when called).

    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.linen import PhiResidualRMSNorm
    >>> norm = PhiResidualRMSNorm(return_sum=True)
    >>> x = jnp.arange(4.0).reshape(1, 4)
    >>> (y, z), variables = norm.init_with_output(jax.random.key(0), jnp.zeros((1, 4)), x)
    >>> print(np.asarray(z).round(3), np.asarray(y).round(3))
    [[0.    0.618 1.236 1.854]] [[0.    0.535 1.069 1.604]]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = jax.nn.initializers.ones
    mode: PhiResidualMode | str = "phi"
    target_variance: Any = "standard"
    scale_offset: float = 0.0
    return_sum: bool = False
    implementation: str | None = None

    def __post_init__(self):
        """Checks what is given by name, and the flags."""
        name = "PhiResidualRMSNorm"
        check_mode(name, self.mode)
        arguments.flags(name, use_scale=self.use_scale, return_sum=self.return_sum)
        super().__post_init__()

    @nn.compact
    def __call__(self, identity: jax.Array, residual: jax.Array) -> Any:
        """y, or ``(y, z)`` with ``return_sum``; all of the shape ``[..., features]``."""
        _check.floating("PhiResidualRMSNorm", identity=identity, residual=residual)
        (scale,) = _parameters(self, jnp.shape(identity)[-1:])
        return phi_residual_rmsnorm(
            *(identity, residual, scale),
            mode=self.mode,
            epsilon=self.epsilon,
            target_variance=self.target_variance,
            scale_offset=self.scale_offset,
            return_sum=bool(self.return_sum),
            dtype=canonicalize_dtype(identity, residual, scale, dtype=self.dtype),
            implementation=self.implementation,
        )

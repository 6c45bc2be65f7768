"""Residual layers for Flax Linen: what `syntonic_jax.nn.linen` has of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import PhiResidualMode, _activation, _check, phi_residual, phi_residual_layernorm
from syntonic_jax.modes import check_mode
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required

with required("flax", "flax"):
    from flax import linen as nn
    from flax.linen.dtypes import canonicalize_dtype
    from flax.typing import Dtype, Initializer


class PhiResidual(nn.Module):
    """Adds a block to its own input: ``phi_residual(x, module(x), mode)``.

    A Linen module belongs to the module in whose method it is made. So the variables of the block
    stand under ``module`` of this layer where both are made in a ``setup``, or outside of any
    module. In a ``@nn.compact`` method, ``PhiResidual(nn.Dense(4))`` makes a ``Dense_0`` beside
    this layer, as ``nn.Sequential`` does. There ``PhiResidual(nn.Dense(4, parent=None))`` makes
    ``PhiResidual_0`` with the variables under ``module``.

    Attributes:
      module: any callable that takes ``x`` first and returns an array of its shape: a Linen
        module or a function.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      activation: ``None``, ``'relu'``, ``'gelu'`` or ``'golden_gelu'``, applied to the sum.
      dtype: the dtype of the result (default: the promoted dtype of ``x`` and ``module(x)``).
      implementation: see :func:`syntonic_jax.phi_residual`.

    Raises:
      ValueError: unknown mode or activation (when built); unknown implementation, or a block that
        changes the shape (when called).
      TypeError: data that are not real floating point.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from syntonic_jax.nn.linen import PhiResidual
    >>> block = PhiResidual(nn.Dense(4), "phi_symmetric")
    >>> y, variables = block.init_with_output(jax.random.key(0), jnp.ones((2, 4)))
    >>> y.shape, sorted(variables["params"]["module"])
    ((2, 4), ['bias', 'kernel'])
    """

    module: Callable[..., jax.Array]
    mode: PhiResidualMode | str = "phi"
    activation: str | None = None
    dtype: Dtype | None = None
    implementation: str | None = None

    def __post_init__(self):
        """Checks what is given by name."""
        check_mode("PhiResidual", self.mode)
        _activation.check("PhiResidual", self.activation)
        super().__post_init__()

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The residual sum of ``x`` and ``module(x, *args, **kwargs)``; shape of ``x``."""
        return phi_residual(
            x,
            self.module(x, *args, **kwargs),
            self.mode,
            activation=self.activation,
            dtype=self.dtype,
            implementation=self.implementation,
        )


class PhiResidualLayerNorm(nn.Module):
    """``linen.LayerNorm`` of a residual sum, over the last axis, in one pass.

    Attributes up to ``scale_init``, parameters (``scale`` and ``bias`` of shape ``(features,)``)
    and result dtype are those of ``linen.LayerNorm``, so variables of one load into the other. Its
    ``reduction_axes``, ``feature_axes``, ``axis_name``, ``axis_index_groups``,
    ``use_fast_variance``, ``force_float32_reductions`` and ``mask`` do not exist here: the
    statistics are always those of the last axis, of every entry, in two passes and in the
    accumulation type.

    Attributes:
      epsilon: added to the variance.
      dtype: the dtype of y (default: the promoted dtype of the two arrays and the parameters,
        so that bfloat16 arrays with float32 parameters give float32).
      param_dtype: the dtype of the parameters.
      use_bias: whether there is a ``bias``.
      use_scale: whether there is a ``scale``.
      bias_init: initialiser of ``bias``.
      scale_init: initialiser of ``scale``.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      target_variance: see :func:`syntonic_jax.phi_residual_layernorm`.
      return_sum: whether the call returns ``(y, z)``, z being the residual sum that the next
        block adds to, in the promoted dtype of the two arrays.
      implementation: see :func:`syntonic_jax.phi_residual_layernorm`.

    Raises:
      ValueError: unknown mode (when built); unequal shapes, no last axis, a negative epsilon, a bad
        target variance, ``flax.errors.ScopeParamShapeError`` for parameters of another width
        (when called).
      TypeError: a flag that is neither true nor false (when built); data that are not real
        floating point (when called).

    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.linen import PhiResidualLayerNorm
    >>> norm = PhiResidualLayerNorm(return_sum=True)
    >>> x = jnp.arange(4.0).reshape(1, 4)
    >>> (y, z), variables = norm.init_with_output(jax.random.key(0), jnp.zeros((1, 4)), x)
    >>> print(np.asarray(z).round(3), np.asarray(y).round(3))
    [[0.    0.618 1.236 1.854]] [[-1.342 -0.447  0.447  1.342]]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = jax.nn.initializers.zeros
    scale_init: Initializer = jax.nn.initializers.ones
    mode: PhiResidualMode | str = "phi"
    target_variance: Any = "standard"
    return_sum: bool = False
    implementation: str | None = None

    def __post_init__(self):
        """Checks what is given by name, and the flags."""
        name = "PhiResidualLayerNorm"
        check_mode(name, self.mode)
        flags = {"use_bias": self.use_bias, "use_scale": self.use_scale}
        arguments.flags(name, **flags, return_sum=self.return_sum)
        super().__post_init__()

    @nn.compact
    def __call__(self, identity: jax.Array, residual: jax.Array) -> Any:
        """y, or ``(y, z)`` with ``return_sum``; all of the shape ``[..., features]``."""
        _check.floating("PhiResidualLayerNorm", identity=identity, residual=residual)
        features = jnp.shape(identity)[-1:]
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, features, self.param_dtype)
        return phi_residual_layernorm(
            identity,
            residual,
            scale,
            bias,
            mode=self.mode,
            epsilon=self.epsilon,
            target_variance=self.target_variance,
            return_sum=bool(self.return_sum),
            dtype=canonicalize_dtype(identity, residual, scale, bias, dtype=self.dtype),
            implementation=self.implementation,
        )

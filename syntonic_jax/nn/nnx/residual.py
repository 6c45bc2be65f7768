"""Residual layers for Flax NNX: what `syntonic_jax.nn.nnx` has of them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import PhiResidualMode, _activation, _check, phi_residual, phi_residual_layernorm
from syntonic_jax.modes import check_mode
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required

with required("flax", "flax"):
    from flax import nnx
    from flax.nnx.nn.dtypes import canonicalize_dtype
    from flax.typing import Dtype, Initializer


class PhiResidual(nnx.Module):
    """Adds a block to its own input: ``phi_residual(x, module(x), mode)``.

    Args:
      module: any callable that takes ``x`` first and returns an array of its shape: an
        ``nnx.Module``, whose state then is this layer's state under ``module``, or a function.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      activation: ``None``, ``'relu'``, ``'gelu'`` or ``'golden_gelu'``, applied to the sum.
      dtype: the dtype of the result (default: the promoted dtype of ``x`` and ``module(x)``).
      implementation: see :func:`syntonic_jax.phi_residual`.

    Raises:
      ValueError: unknown mode or activation (when built); unknown implementation, or a block
        that changes the shape (when called).
      TypeError: data that are not real floating point.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import PhiResidual
    >>> block = PhiResidual(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "phi_symmetric")
    >>> block(jnp.ones((2, 4))).shape
    (2, 4)
    """

    def __init__(
        self,
        module: Callable[..., jax.Array],
        mode: PhiResidualMode | str = "phi",
        *,
        activation: str | None = None,
        dtype: Dtype | None = None,
        implementation: str | None = None,
    ):
        self.module = module
        self.mode = check_mode("PhiResidual", mode)
        _activation.check("PhiResidual", activation)
        self.activation = activation
        self.dtype = dtype
        self.implementation = implementation

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


class PhiResidualLayerNorm(nnx.Module):
    """``nnx.LayerNorm`` of a residual sum, over the last axis, in one pass.

    Arguments, parameters (``scale`` and ``bias`` of shape ``(num_features,)``), initialisers and
    result dtype are those of ``nnx.LayerNorm``, so a state of one loads into the other. Its
    ``reduction_axes``, ``feature_axes``, ``axis_name``, ``axis_index_groups``,
    ``use_fast_variance``, ``promote_dtype`` and ``mask`` do not exist here: the statistics are
    always those of the last axis, of every entry, in two passes and in the accumulation type.

    Args:
      num_features: the size of the last axis.
      epsilon: added to the variance.
      dtype: the dtype of y (default: the promoted dtype of the two arrays and the parameters,
        so that bfloat16 arrays with float32 parameters give float32).
      param_dtype: the dtype of the parameters.
      use_bias: whether there is a ``bias``.
      use_scale: whether there is a ``scale``.
      bias_init: initialiser of ``bias``.
      scale_init: initialiser of ``scale``.
      rngs: where the initialisers' keys come from.
      bias_metadata: metadata of the ``bias`` variable, such as its sharding.
      scale_metadata: metadata of the ``scale`` variable.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      target_variance: see :func:`syntonic_jax.phi_residual_layernorm`.
      return_sum: whether the call returns ``(y, z)``, z being the residual sum that the next
        block adds to, in the promoted dtype of the two arrays.
      implementation: see :func:`syntonic_jax.phi_residual_layernorm`.

    Raises:
      ValueError: unknown mode (when built); unequal shapes, a last axis other than
        ``num_features``, a negative epsilon, a bad target variance (when called).
      TypeError: a flag that is neither true nor false (when built); data that are not real
        floating point (when called).

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import PhiResidualLayerNorm
    >>> norm = PhiResidualLayerNorm(4, return_sum=True, rngs=nnx.Rngs(0))
    >>> y, z = norm(jnp.zeros((1, 4)), jnp.arange(4.0).reshape(1, 4))
    >>> print(np.asarray(z).round(3), np.asarray(y).round(3))
    [[0.    0.618 1.236 1.854]] [[-1.342 -0.447  0.447  1.342]]
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
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        mode: PhiResidualMode | str = "phi",
        target_variance: Any = "standard",
        return_sum: bool = False,
        implementation: str | None = None,
    ):
        flags = {"use_bias": use_bias, "use_scale": use_scale, "return_sum": return_sum}
        arguments.flags("PhiResidualLayerNorm", **flags)
        arguments.size("PhiResidualLayerNorm", num_features=num_features)

        def parameter(use: bool, init: Initializer, metadata: Mapping[str, Any]):
            if not use:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), (num_features,), param_dtype), **metadata)

        # The order in which nnx.LayerNorm draws its keys.
        self.scale = parameter(use_scale, scale_init, scale_metadata)
        self.bias = parameter(use_bias, bias_init, bias_metadata)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.mode = check_mode("PhiResidualLayerNorm", mode)
        self.target_variance = target_variance
        self.return_sum = bool(return_sum)
        self.implementation = implementation

    def __call__(self, identity: jax.Array, residual: jax.Array) -> Any:
        """y, or ``(y, z)`` with ``return_sum``; all of the shape ``[..., num_features]``."""
        _check.floating("PhiResidualLayerNorm", identity=identity, residual=residual)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return phi_residual_layernorm(
            identity,
            residual,
            scale,
            bias,
            mode=self.mode,
            epsilon=self.epsilon,
            target_variance=self.target_variance,
            return_sum=self.return_sum,
            dtype=canonicalize_dtype(identity, residual, scale, bias, dtype=self.dtype),
            implementation=self.implementation,
        )

"""Residual layers for Haiku: what `syntonic_jax.nn.haiku` has of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import PhiResidualMode, _activation, _check, phi_residual, phi_residual_layernorm
from syntonic_jax.modes import check_mode
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required

with required("haiku", "haiku"):
    import haiku as hk


class PhiResidual(hk.Module):
    """Adds a block to its own input: ``phi_residual(x, module(x), mode)``.

    Args:
      module: any callable that takes ``x`` first and returns an array of its shape: a Haiku
        module or a function.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      activation: ``None``, ``'relu'``, ``'gelu'`` or ``'golden_gelu'``, applied to the sum.
      name: the module's name.
      dtype: the dtype of the result (default: the promoted dtype of ``x`` and ``module(x)``).
      implementation: see :func:`syntonic_jax.phi_residual`.

    Raises:
      ValueError: unknown mode or activation (when built); unknown implementation, or a block
        that changes the shape (when called).
      TypeError: data that are not real floating point.

    >>> import haiku as hk
    >>> import jax, jax.numpy as jnp
    >>> from syntonic_jax.nn.haiku import PhiResidual
    >>> block = hk.transform(lambda x: PhiResidual(hk.Linear(4), "phi_symmetric")(x))
    >>> parameters = block.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> block.apply(parameters, None, jnp.ones((2, 4))).shape
    (2, 4)
    """

    def __init__(
        self,
        module: Callable[..., jax.Array],
        mode: PhiResidualMode | str = "phi",
        activation: str | None = None,
        name: str | None = None,
        *,
        dtype: Any = None,
        implementation: str | None = None,
    ):
        super().__init__(name=name)
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


class PhiResidualLayerNorm(hk.Module):
    """``hk.LayerNorm`` of a residual sum, over the last axis, in one pass.

    Arguments up to ``param_axis``, parameters (``scale`` and ``offset`` of shape ``(features,)``
    in the promoted dtype of the two arrays), initialisers and result dtype are those of
    ``hk.LayerNorm``, so parameters of one load into the other. Unlike there, the statistics are
    computed in the accumulation type (float32 for bfloat16 arrays) and y is rounded once.

    Args:
      axis: -1, as the statistics run over the last axis; anything else is refused.
      create_scale: whether there is a ``scale``.
      create_offset: whether there is an ``offset``.
      eps: added to the variance.
      scale_init: initialiser of ``scale`` (default: ones).
      offset_init: initialiser of ``offset`` (default: zeros).
      use_fast_variance: must be false: the variance is never E[x²] - E[x]².
      name: the module's name.
      param_axis: -1 or None.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      target_variance: see :func:`syntonic_jax.phi_residual_layernorm`.
      return_sum: whether the call returns ``(y, z)``, z being the residual sum that the next
        block adds to, in the promoted dtype of the two arrays.
      implementation: see :func:`syntonic_jax.phi_residual_layernorm`.

    Raises:
      ValueError: unknown mode, another axis, ``use_fast_variance``, a negative eps, an
        initialiser for a parameter that is not created (when built); unequal shapes, a wrong
        parameter shape, a bad target variance, a parameter both created and passed (when called).
      TypeError: a flag that is neither true nor false (when built); data that are not real
        floating point (when called).

    >>> import haiku as hk
    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.haiku import PhiResidualLayerNorm
    >>> norm = hk.transform(lambda *xs: PhiResidualLayerNorm(-1, True, True)(*xs))
    >>> arrays = jnp.zeros((1, 4)), jnp.arange(4.0).reshape(1, 4)
    >>> parameters = norm.init(jax.random.key(0), *arrays)
    >>> print(np.asarray(norm.apply(parameters, None, *arrays)).round(3))
    [[-1.342 -0.447  0.447  1.342]]
    """

    def __init__(
        self,
        axis: int,
        create_scale: bool,
        create_offset: bool,
        eps: float = 1e-5,
        scale_init: hk.initializers.Initializer | None = None,
        offset_init: hk.initializers.Initializer | None = None,
        use_fast_variance: bool = False,
        name: str | None = None,
        *,
        param_axis: int | None = None,
        mode: PhiResidualMode | str = "phi",
        target_variance: Any = "standard",
        return_sum: bool = False,
        implementation: str | None = None,
    ):
        super().__init__(name=name)
        flags = {"create_scale": create_scale, "create_offset": create_offset}
        arguments.flags("PhiResidualLayerNorm", **flags, return_sum=return_sum)
        if axis not in (-1, (-1,), [-1]):
            raise ValueError(f"PhiResidualLayerNorm: axis must be -1, got {axis!r}")
        if param_axis not in (None, -1, (-1,), [-1]):
            raise ValueError(f"PhiResidualLayerNorm: param_axis must be -1, got {param_axis!r}")
        if use_fast_variance:
            raise ValueError(
                "PhiResidualLayerNorm: use_fast_variance must be False: "
                "the variance is always computed in two passes"
            )
        if not create_scale and scale_init is not None:
            raise ValueError("PhiResidualLayerNorm: scale_init given with create_scale=False")
        if not create_offset and offset_init is not None:
            raise ValueError("PhiResidualLayerNorm: offset_init given with create_offset=False")
        self.eps = _check.epsilon("PhiResidualLayerNorm", eps, "eps")
        self.create_scale = create_scale
        self.create_offset = create_offset
        self.scale_init = scale_init or jnp.ones
        self.offset_init = offset_init or jnp.zeros
        self.mode = check_mode("PhiResidualLayerNorm", mode)
        self.target_variance = target_variance
        self.return_sum = bool(return_sum)
        self.implementation = implementation

    def __call__(
        self,
        identity: jax.Array,
        residual: jax.Array,
        scale: jax.Array | None = None,
        offset: jax.Array | None = None,
    ) -> Any:
        """y, or ``(y, z)`` with ``return_sum``; all of the shape ``[..., features]``.

        ``scale`` and ``offset``, of shape ``(features,)``, may be passed where they are not
        created.
        """
        _check.floating("PhiResidualLayerNorm", identity=identity, residual=residual)
        if self.create_scale and scale is not None:
            raise ValueError("PhiResidualLayerNorm: scale passed with create_scale=True")
        if self.create_offset and offset is not None:
            raise ValueError("PhiResidualLayerNorm: offset passed with create_offset=True")
        features = jnp.shape(identity)[-1:]
        dtype = jnp.result_type(identity, residual)
        if self.create_scale:
            scale = hk.get_parameter("scale", features, dtype, init=self.scale_init)
        if self.create_offset:
            offset = hk.get_parameter("offset", features, dtype, init=self.offset_init)
        parameters = [p for p in (scale, offset) if p is not None]
        return phi_residual_layernorm(
            identity,
            residual,
            scale,
            offset,
            mode=self.mode,
            epsilon=self.eps,
            target_variance=self.target_variance,
            return_sum=self.return_sum,
            # As in hk.LayerNorm, parameters kept wider than the arrays widen the result.
            dtype=jnp.result_type(dtype, *parameters),
            implementation=self.implementation,
        )

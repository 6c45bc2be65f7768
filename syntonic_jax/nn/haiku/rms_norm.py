"""RMS norms for Haiku: what `syntonic_jax.nn.haiku` has of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import PhiResidualMode, _check, phi_residual_rmsnorm
from syntonic_jax.modes import check_mode
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.norm import broadcast_to_rank
from syntonic_jax.ops._norms_of_layers import rms_norm

from .norm import reduced_and_held

with required("haiku", "haiku"):
    import haiku as hk


class _RMSNorm(hk.Module):
    """What the two layers keep alike."""

    def __init__(self, eps, scale_init, name, create_scale, target_variance, scale_offset):
        super().__init__(name=name)
        layer = type(self).__name__
        arguments.flags(layer, create_scale=create_scale)
        if not create_scale and scale_init is not None:
            raise ValueError(f"{layer}: scale_init given with create_scale=False")
        self.create_scale = create_scale
        self.eps = _check.epsilon(layer, eps, "eps")
        self.scale_init = scale_init or jnp.ones
        self.target_variance = target_variance
        self.scale_offset = scale_offset

    def _scale(self, shape: Sequence[int], dtype: Any) -> tuple[Any, Any]:
        """The scale, or None, and the dtype of y, which a wide scale widens."""
        if not self.create_scale:
            return None, dtype
        scale = hk.get_parameter("scale", shape, dtype, init=self.scale_init)
        return scale, jnp.result_type(dtype, scale)


class GoldenRMSNorm(_RMSNorm):
    """``hk.RMSNorm`` with a target mean square.

    Arguments up to ``param_axis``, parameter (``scale``, in the dtype of the inputs), initialiser
    and result dtype are those of ``hk.RMSNorm``, so parameters of one load into the other.
    Automatic names are made of the class: for those of a network with an ``rms_norm``, say
    ``name='rms_norm'``. What differs:

    - The result has the mean square ``target_variance`` before ``scale``.
    - It is computed in float32 for 16-bit inputs, and rounded once.

    A scale that varies along an axis that is not reduced is supported, but not in one pass.

    Args:
      axis: the axis over which the mean squares run, or axes, or a slice of them.
      eps: added to the mean square.
      scale_init: initialiser of ``scale`` (default: ones).
      name: the module's name.
      create_scale: whether there is a ``scale``.
      param_axis: the axes along which ``scale`` varies (default: the last).
      target_variance: see :func:`syntonic_jax.golden_rms_norm`.
      scale_offset: see :func:`syntonic_jax.golden_rms_norm`; with 1, say ``scale_init=jnp.zeros``.
      implementation: see :func:`syntonic_jax.golden_rms_norm`.

    Raises:
      ValueError: an initialiser for a scale that is not created, a negative eps (when built); an
        axis that the inputs do not have, nothing to reduce, a bad target (when called).
      TypeError: inputs that are not real floating point, an offset that is no number.

    >>> import haiku as hk
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.haiku import GoldenRMSNorm
    >>> norm = hk.transform(lambda x: GoldenRMSNorm(-1)(x))
    >>> x = jnp.arange(4.0)
    >>> print(np.asarray(norm.apply(norm.init(None, x), None, x)).round(3))
    [0.    0.42  0.84  1.261]
    """

    def __init__(
        self,
        axis: int | Sequence[int] | slice,
        eps: float = 1e-5,
        scale_init: hk.initializers.Initializer | None = None,
        name: str | None = None,
        create_scale: bool = True,
        *,
        param_axis: int | Sequence[int] | slice | None = None,
        target_variance: Any = "golden",
        scale_offset: float = 0.0,
        implementation: str | None = None,
    ):
        super().__init__(eps, scale_init, name, create_scale, target_variance, scale_offset)
        self.axis = axis
        self.param_axis = -1 if param_axis is None else param_axis
        self.implementation = implementation

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The normalised inputs, of their shape."""
        name = "GoldenRMSNorm"
        _check.floating(name, inputs=inputs)
        reduced, held = reduced_and_held(name, jnp.shape(inputs), self.axis, self.param_axis)
        scale, dtype = self._scale(held, jnp.result_type(inputs))
        (scale,) = broadcast_to_rank(name, inputs, scale=scale)
        return rms_norm(
            *(name, inputs, scale, reduced, dtype),
            mapping={},
            scale_offset=self.scale_offset,
            epsilon=self.eps,
            target_variance=self.target_variance,
            implementation=self.implementation,
        )


class PhiResidualRMSNorm(_RMSNorm):
    """``hk.RMSNorm`` of a residual sum, over the last axis, in one pass.

    Arguments up to ``param_axis``, parameter (``scale`` of shape ``(features,)`` in the promoted
    dtype of the two arrays), initialiser and result dtype are those of ``hk.RMSNorm``, so
    parameters of one load into the other. Unlike there, the mean squares are computed in the
    accumulation type (float32 for bfloat16 arrays) and y is rounded once.

    Args:
      axis: -1, as the mean squares run over the last axis; anything else is refused.
      eps: added to the mean square.
      scale_init: initialiser of ``scale`` (default: ones).
      name: the module's name.
      create_scale: whether there is a ``scale``.
      param_axis: -1 or None.
      mode: a :class:`syntonic_jax.PhiResidualMode` or its name.
      target_variance: see :func:`syntonic_jax.phi_residual_rmsnorm`.
      scale_offset: see :func:`syntonic_jax.phi_residual_rmsnorm`; with 1, say
        ``scale_init=jnp.zeros``.
      return_sum: whether the call returns ``(y, z)``, z being the residual sum that the next
        block adds to, in the promoted dtype of the two arrays.
      implementation: see :func:`syntonic_jax.phi_residual_rmsnorm`.

    Raises:
      ValueError: unknown mode, another axis, a negative eps, an initialiser for a scale that is
        not created (when built); unequal shapes, a bad target (when called).
      TypeError: a flag that is neither true nor false (when built); data that are not real
        floating point, an offset that is no number (when called).

    >>> import haiku as hk
    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.haiku import PhiResidualRMSNorm
    >>> norm = hk.transform(lambda *xs: PhiResidualRMSNorm(-1)(*xs))
    >>> arrays = jnp.zeros((1, 4)), jnp.arange(4.0).reshape(1, 4)
    >>> parameters = norm.init(jax.random.key(0), *arrays)
    >>> print(np.asarray(norm.apply(parameters, None, *arrays)).round(3))
    [[0.    0.535 1.069 1.604]]
    """

    def __init__(
        self,
        axis: int,
        eps: float = 1e-5,
        scale_init: hk.initializers.Initializer | None = None,
        name: str | None = None,
        create_scale: bool = True,
        *,
        param_axis: int | None = None,
        mode: PhiResidualMode | str = "phi",
        target_variance: Any = "standard",
        scale_offset: float = 0.0,
        return_sum: bool = False,
        implementation: str | None = None,
    ):
        super().__init__(eps, scale_init, name, create_scale, target_variance, scale_offset)
        arguments.flags("PhiResidualRMSNorm", return_sum=return_sum)
        if axis not in (-1, (-1,), [-1]):
            raise ValueError(f"PhiResidualRMSNorm: axis must be -1, got {axis!r}")
        if param_axis not in (None, -1, (-1,), [-1]):
            raise ValueError(f"PhiResidualRMSNorm: param_axis must be -1, got {param_axis!r}")
        self.mode = check_mode("PhiResidualRMSNorm", mode)
        self.return_sum = bool(return_sum)
        self.implementation = implementation

    def __call__(self, identity: jax.Array, residual: jax.Array) -> Any:
        """y, or ``(y, z)`` with ``return_sum``; all of the shape ``[..., features]``."""
        _check.floating("PhiResidualRMSNorm", identity=identity, residual=residual)
        features, dtype = jnp.shape(identity)[-1:], jnp.result_type(identity, residual)
        scale, dtype = self._scale(features, dtype)
        return phi_residual_rmsnorm(
            *(identity, residual, scale),
            mode=self.mode,
            epsilon=self.eps,
            target_variance=self.target_variance,
            scale_offset=self.scale_offset,
            return_sum=self.return_sum,
            dtype=dtype,
            implementation=self.implementation,
        )

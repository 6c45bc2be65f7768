"""Softmax layers for Flax Linen: what `syntonic_jax.nn.linen` has of them."""

from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import _check
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.softmax import (
    check_softmax_mode,
    keyed_initialiser,
    required_size,
    softmax_or_loss,
    weights_of,
)

with required("flax", "flax"):
    from flax import linen as nn
    from flax.linen.dtypes import canonicalize_dtype
    from flax.typing import Dtype, Initializer

_KERNEL_INIT = jax.nn.initializers.lecun_normal()  # Flax's own for dense layers


def _mode_norms(module: Any, argument: str, size: int | None) -> Any:
    """The parameter of learned mode; None in the others."""
    name = type(module).__name__
    if check_softmax_mode(name, module.mode) != "learned":
        return None
    shape = required_size(name, argument, module.mode, size)
    init = keyed_initialiser(name, module.mode_norms_init)
    return module.param("mode_norms", init, shape, module.param_dtype)


class SyntonicSoftmax(nn.Module):
    """Softmax whose classes have weights: learned, provided in the call, or none.

    The result has the dtype that Flax's layers give: with float32 mode norms, bfloat16 data give
    float32. Without a parameter it has that of x.

    Attributes:
      mode: ``'learned'`` (weights exp(−mode_norms/φ), with a parameter ``mode_norms`` of the size
        of the axis), ``'provided'`` (a ``syntony`` in the call) or ``'identity'`` (the usual
        softmax).
      num_features: the size of the axis (default: whatever it is in the first call).
      axis: the axis along which the result sums to 1.
      scale: factor of the logarithms of the weights; a number.
      dtype: the dtype of the result (default: the promoted dtype of x and ``mode_norms``).
      param_dtype: the dtype of ``mode_norms``.
      mode_norms_init: initialiser of ``mode_norms``: ``'ones'``, which weighs all alike,
        ``'index_squared'`` (0, 1, 4, 9, …) or a function of key, shape and dtype.
      implementation: see :func:`syntonic_jax.syntonic_softmax`.

    Raises (when called):
      ValueError: unknown mode or initialiser, a syntony in another mode or none in its own, an axis
        of another size; ``flax.errors.ScopeParamShapeError`` for parameters of another size.
      TypeError: data that are not real floating point.

    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.linen import SyntonicSoftmax
    >>> softmax = SyntonicSoftmax(mode_norms_init="index_squared")
    >>> y, variables = softmax.init_with_output(jax.random.key(0), jnp.zeros(3))
    >>> print(np.asarray(y).round(3))
    [0.616 0.332 0.052]
    """

    mode: str = "learned"
    num_features: int | None = None
    axis: int = -1
    scale: float = 1.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    mode_norms_init: str | Initializer = "ones"
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        syntony: jax.Array | None = None,
        *,
        where: jax.Array | None = None,
        labels: jax.Array | None = None,
        ignore_index: int | None = None,
    ) -> jax.Array:
        """The probabilities, of the shape of x; 0 where ``where`` is false.

        With integer ``labels``, of the shape of x without the axis, the cross entropy in their
        place, in float32 or float64 (:func:`syntonic_jax.syntonic_cross_entropy`); it is 0 where
        the label is ``ignore_index``.
        """
        name, size = type(self).__name__, self.num_features
        _check.floating(name, x=x)
        arguments.types(name, dtype=self.dtype, param_dtype=self.param_dtype)
        axis = _check.integer_axis(name, self.axis)
        if size is None and -jnp.ndim(x) <= axis < jnp.ndim(x):
            size = jnp.shape(x)[axis]
        norms = _mode_norms(self, "num_features", size)
        return softmax_or_loss(
            name,
            x,
            labels,
            ignore_index,
            canonicalize_dtype(x, norms, dtype=self.dtype),
            **weights_of(name, self.mode, norms, syntony),
            scale=self.scale,
            axis=axis,
            where=where,
            implementation=self.implementation,
        )


class SyntonicClassifier(nn.Module):
    """A dense layer and a `SyntonicSoftmax` of its features: ``dense`` and ``softmax``.

    Attributes:
      num_classes: the number of classes.
      mode: see :class:`SyntonicSoftmax`.
      scale: see :class:`SyntonicSoftmax`.
      dtype: the dtype of logits and probabilities (default: Flax's for a dense layer).
      param_dtype: the dtype of all parameters.
      use_bias: whether the dense layer has a ``bias``.
      kernel_init: initialiser of its ``kernel``.
      bias_init: initialiser of its ``bias``.
      mode_norms_init: see :class:`SyntonicSoftmax`.
      implementation: see :func:`syntonic_jax.syntonic_softmax`.

    Raises (when called):
      ValueError: unknown mode or initialiser, a syntony in another mode or none in its own, labels
        of another shape.
      TypeError: labels that are not integers.

    >>> import jax, jax.numpy as jnp
    >>> from syntonic_jax.nn.linen import SyntonicClassifier
    >>> classifier, x = SyntonicClassifier(4), jnp.ones((2, 8))
    >>> y, variables = classifier.init_with_output(jax.random.key(0), x)
    >>> y.shape, classifier.apply(variables, x, jnp.array([1, 3]), method="loss").shape
    ((2, 4), (2,))
    """

    num_classes: int
    mode: str = "learned"
    scale: float = 1.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    kernel_init: Initializer = _KERNEL_INIT
    bias_init: Initializer = jax.nn.initializers.zeros
    mode_norms_init: str | Initializer = "ones"
    implementation: str | None = None

    def setup(self):
        """Makes the two layers, which both methods use."""
        name = type(self).__name__
        arguments.flags(name, use_bias=self.use_bias)
        arguments.types(name, dtype=self.dtype, param_dtype=self.param_dtype)
        arguments.size(name, num_classes=self.num_classes)
        self.dense = nn.Dense(
            self.num_classes,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        self.softmax = SyntonicSoftmax(
            self.mode,
            self.num_classes,
            scale=self.scale,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            mode_norms_init=self.mode_norms_init,
            implementation=self.implementation,
        )

    def __call__(
        self,
        inputs: jax.Array,
        syntony: jax.Array | None = None,
        *,
        where: jax.Array | None = None,
    ) -> jax.Array:
        """The probabilities ``[..., num_classes]`` of inputs ``[..., features]``."""
        return self.softmax(self.dense(inputs), syntony, where=where)

    def loss(
        self,
        inputs: jax.Array,
        labels: jax.Array,
        syntony: jax.Array | None = None,
        *,
        where: jax.Array | None = None,
        ignore_index: int | None = None,
    ) -> jax.Array:
        """The cross entropy ``[...]`` with integer labels ``[...]``, without the probabilities.

        In float32 or float64, and 0 where the label is ``ignore_index``
        (:func:`syntonic_jax.syntonic_cross_entropy`).
        """
        options = {"where": where, "labels": labels, "ignore_index": ignore_index}
        return self.softmax(self.dense(inputs), syntony, **options)

"""Softmax layers for Flax NNX: what `syntonic_jax.nn.nnx` has of them."""

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
    from flax import nnx
    from flax.nnx.nn.dtypes import canonicalize_dtype
    from flax.typing import Dtype, Initializer

_KERNEL_INIT = jax.nn.initializers.lecun_normal()  # Flax's own for dense layers


def _mode_norms(layer, argument, mode, size, init, dtype, rngs) -> Any:
    """The parameter of learned mode; None in the others, which draw no key."""
    if mode != "learned":
        return nnx.data(None)
    shape, init = required_size(layer, argument, mode, size), keyed_initialiser(layer, init)
    if rngs is None:
        raise ValueError(f"{layer}: rngs must be given in mode 'learned', got None")
    return nnx.Param(init(rngs.params(), shape, dtype))


class SyntonicSoftmax(nnx.Module):
    """Softmax whose classes have weights: learned, provided in the call, or none.

    The result has the dtype that Flax's layers give: with float32 mode norms, bfloat16 data give
    float32. Without a parameter it has that of x.

    Args:
      mode: ``'learned'`` (weights exp(−mode_norms/φ), with a parameter ``mode_norms`` of shape
        ``(num_features,)``), ``'provided'`` (a ``syntony`` in the call) or ``'identity'`` (the
        usual softmax).
      num_features: the size of the axis; needed in learned mode.
      axis: the axis along which the result sums to 1.
      scale: factor of the logarithms of the weights; a number.
      dtype: the dtype of the result (default: the promoted dtype of x and ``mode_norms``).
      param_dtype: the dtype of ``mode_norms``.
      mode_norms_init: initialiser of ``mode_norms``: ``'ones'``, which weighs all alike,
        ``'index_squared'`` (0, 1, 4, 9, …) or a function of key, shape and dtype.
      rngs: where the initialiser's key comes from; needed in learned mode.
      implementation: see :func:`syntonic_jax.syntonic_softmax`.

    Raises:
      ValueError: unknown mode or initialiser, something needed is missing (when built); a syntony
        in another mode or none in its own, an axis of another size (when called).
      TypeError: data that are not real floating point.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import SyntonicSoftmax
    >>> softmax = SyntonicSoftmax("learned", 3, mode_norms_init="index_squared", rngs=nnx.Rngs(0))
    >>> print(np.asarray(softmax(jnp.zeros(3))).round(3))
    [0.616 0.332 0.052]
    """

    def __init__(
        self,
        mode: str = "learned",
        num_features: int | None = None,
        axis: int = -1,
        scale: float = 1.0,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        mode_norms_init: str | Initializer = "ones",
        rngs: nnx.Rngs | None = None,
        implementation: str | None = None,
    ):
        name = type(self).__name__
        self.mode = check_softmax_mode(name, mode)
        _check.integer_axis(name, axis)
        arguments.types(name, dtype=dtype, param_dtype=param_dtype)
        self.mode_norms = _mode_norms(
            name, "num_features", mode, num_features, mode_norms_init, param_dtype, rngs
        )
        self.num_features = num_features
        self.axis = axis
        self.scale = scale
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation

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
        _check.floating(type(self).__name__, x=x)
        norms = None if self.mode_norms is None else self.mode_norms[...]
        return softmax_or_loss(
            type(self).__name__,
            x,
            labels,
            ignore_index,
            canonicalize_dtype(x, norms, dtype=self.dtype),
            **weights_of(type(self).__name__, self.mode, norms, syntony),
            scale=self.scale,
            axis=self.axis,
            where=where,
            implementation=self.implementation,
        )


class SyntonicClassifier(nnx.Module):
    """A dense layer and a `SyntonicSoftmax` of its features: ``dense`` and ``softmax``.

    Args:
      in_features: the size of the last axis of the inputs.
      num_classes: the number of classes.
      mode: see :class:`SyntonicSoftmax`.
      scale: see :class:`SyntonicSoftmax`.
      dtype: the dtype of logits and probabilities (default: Flax's for a dense layer).
      param_dtype: the dtype of all parameters.
      use_bias: whether the dense layer has a ``bias``.
      kernel_init: initialiser of its ``kernel``.
      bias_init: initialiser of its ``bias``.
      mode_norms_init: see :class:`SyntonicSoftmax`.
      rngs: where the initialisers' keys come from.
      implementation: see :func:`syntonic_jax.syntonic_softmax`.

    Raises:
      ValueError: unknown mode or initialiser (when built); a syntony in another mode or none in its
        own, labels of another shape (when called).
      TypeError: labels that are not integers.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import SyntonicClassifier
    >>> classifier = SyntonicClassifier(8, 4, rngs=nnx.Rngs(0))
    >>> x, labels = jnp.ones((2, 8)), jnp.array([1, 3])
    >>> classifier(x).shape, classifier.loss(x, labels).shape
    ((2, 4), (2,))
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        mode: str = "learned",
        scale: float = 1.0,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = jax.nn.initializers.zeros,
        mode_norms_init: str | Initializer = "ones",
        rngs: nnx.Rngs,
        implementation: str | None = None,
    ):
        name = type(self).__name__
        check_softmax_mode(name, mode)
        arguments.flags(name, use_bias=use_bias)
        arguments.types(name, dtype=dtype, param_dtype=param_dtype)
        arguments.size(name, in_features=in_features, num_classes=num_classes)
        self.dense = nnx.Linear(
            in_features,
            num_classes,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.softmax = SyntonicSoftmax(
            mode,
            num_classes,
            scale=scale,
            dtype=dtype,
            param_dtype=param_dtype,
            mode_norms_init=mode_norms_init,
            rngs=rngs,
            implementation=implementation,
        )

    def __call__(
        self,
        inputs: jax.Array,
        syntony: jax.Array | None = None,
        *,
        where: jax.Array | None = None,
    ) -> jax.Array:
        """The probabilities ``[..., num_classes]`` of inputs ``[..., in_features]``."""
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

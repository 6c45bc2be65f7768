"""Softmax layers for Haiku: what `syntonic_jax.nn.haiku` has of them."""

from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import _check
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.softmax import (
    check_softmax_mode,
    named_initialiser,
    required_size,
    softmax_or_loss,
    weights_of,
)

with required("haiku", "haiku"):
    import haiku as hk


def _mode_norms(layer: str, argument: str, mode: str, size: Any, dtype: Any, init: Any) -> Any:
    """The parameter of learned mode; None in the others."""
    if mode != "learned":
        return None
    shape = required_size(layer, argument, mode, size)
    return hk.get_parameter("mode_norms", shape, dtype, init=named_initialiser(layer, init) or init)


class SyntonicSoftmax(hk.Module):
    """Softmax whose classes have weights: learned, provided in the call, or none.

    The mode norms, and so the result, have the dtype of x. i² has too many digits for bfloat16 from
    the 17th class on, and is beyond float16 from the 257th: keep such parameters in float32.

    Args:
      mode: ``'learned'`` (weights exp(−mode_norms/φ), with a parameter ``mode_norms`` of the size
        of the axis), ``'provided'`` (a ``syntony`` in the call) or ``'identity'`` (the usual
        softmax).
      num_features: the size of the axis (default: whatever it is in the first call).
      axis: the axis along which the result sums to 1.
      scale: factor of the logarithms of the weights; a number.
      name: the module's name.
      mode_norms_init: initialiser of ``mode_norms``: ``'ones'``, which weighs all alike,
        ``'index_squared'`` (0, 1, 4, 9, …) or a function of shape and dtype, as Haiku's are.
      implementation: see :func:`syntonic_jax.syntonic_softmax`.

    Raises:
      ValueError: unknown mode (when built); unknown initialiser, a syntony in another mode or none
        in its own, an axis of another size (when called).
      TypeError: data that are not real floating point.

    >>> import haiku as hk
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.haiku import SyntonicSoftmax
    >>> f = hk.transform(lambda x: SyntonicSoftmax(mode_norms_init="index_squared")(x))
    >>> print(np.asarray(f.apply(f.init(None, jnp.zeros(3)), None, jnp.zeros(3))).round(3))
    [0.616 0.332 0.052]
    """

    def __init__(
        self,
        mode: str = "learned",
        num_features: int | None = None,
        axis: int = -1,
        scale: float = 1.0,
        name: str | None = None,
        *,
        mode_norms_init: str | hk.initializers.Initializer = "ones",
        implementation: str | None = None,
    ):
        super().__init__(name=name)
        self.mode = check_softmax_mode(type(self).__name__, mode)
        self.num_features = num_features
        self.axis = axis
        self.scale = scale
        self.mode_norms_init = mode_norms_init
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
        layer, size = type(self).__name__, self.num_features
        _check.floating(layer, x=x)
        axis, dtype = _check.integer_axis(layer, self.axis), jnp.result_type(x)
        if size is None and -jnp.ndim(x) <= axis < jnp.ndim(x):
            size = jnp.shape(x)[axis]
        norms = _mode_norms(layer, "num_features", self.mode, size, dtype, self.mode_norms_init)
        return softmax_or_loss(
            layer,
            x,
            labels,
            ignore_index,
            # As in Haiku's norms, parameters kept wider than x widen the result.
            dtype if norms is None else jnp.result_type(x, norms),
            **weights_of(layer, self.mode, norms, syntony),
            scale=self.scale,
            axis=axis,
            where=where,
            implementation=self.implementation,
        )


class SyntonicClassifier(hk.Module):
    """A dense layer and a `SyntonicSoftmax` of its features: ``dense`` and ``softmax``.

    Args:
      num_classes: the number of classes.
      mode: see :class:`SyntonicSoftmax`.
      scale: see :class:`SyntonicSoftmax`.
      name: the module's name.
      with_bias: whether the dense layer has a bias, ``b``.
      w_init: initialiser of its weights, ``w`` (default: that of ``hk.Linear``).
      b_init: initialiser of its bias (default: zeros).
      mode_norms_init: see :class:`SyntonicSoftmax`.
      implementation: see :func:`syntonic_jax.syntonic_softmax`.

    Raises:
      ValueError: unknown mode (when built); unknown initialiser, a syntony in another mode or none
        in its own, labels of another shape (when called).
      TypeError: labels that are not integers.

    >>> import haiku as hk
    >>> import jax, jax.numpy as jnp
    >>> from syntonic_jax.nn.haiku import SyntonicClassifier
    >>> f = hk.transform(lambda x, labels: SyntonicClassifier(4).loss(x, labels))
    >>> x, labels = jnp.ones((2, 8)), jnp.array([1, 3])
    >>> f.apply(f.init(jax.random.key(0), x, labels), None, x, labels).shape
    (2,)
    """

    def __init__(
        self,
        num_classes: int,
        mode: str = "learned",
        scale: float = 1.0,
        name: str | None = None,
        *,
        with_bias: bool = True,
        w_init: hk.initializers.Initializer | None = None,
        b_init: hk.initializers.Initializer | None = None,
        mode_norms_init: str | hk.initializers.Initializer = "ones",
        implementation: str | None = None,
    ):
        super().__init__(name=name)
        layer = type(self).__name__
        check_softmax_mode(layer, mode)
        arguments.flags(layer, with_bias=with_bias)
        arguments.size(layer, num_classes=num_classes)
        self.dense = hk.Linear(num_classes, with_bias, w_init, b_init, name="dense")
        self.softmax = SyntonicSoftmax(
            mode,
            num_classes,
            scale=scale,
            name="softmax",
            mode_norms_init=mode_norms_init,
            implementation=implementation,
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

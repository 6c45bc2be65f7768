"""Softmax layers for Haiku: what `syntonic_jax.nn.haiku` has of them."""

from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import _check
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.softmax import (
    attention,
    attention_path,
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


class SyntonicAttention(hk.Module):
    """Multi-head attention whose key positions have weights.

    The parameters ``query``, ``key``, ``value`` and ``linear`` are those of
    ``hk.MultiHeadAttention``: with ``name='multi_head_attention'`` its parameters load here. In
    learned mode there is ``mode_norms`` beside them, one number a key position. Attention is
    `jax.nn.dot_product_attention` of logits to which scale · log w of their key is added. How it is
    added is what ``path`` says:

    - ``'none'``: in identity mode it is not.
    - ``'bias'``: as a bias of one number a key, which XLA broadcasts inside its fusion.
    - ``'folded'``: as three to ten more features of queries, keys and values, up to a multiple of
      eight. cuDNN would want a bias for every query. In float16 logarithms of weights that differ
      by more than 2³¹/√features are taken for that.

    With cuDNN keys are folded where its largest head, of 256 features (128 before Hopper), leaves
    room. Where it does not, the path is ``'bias'``: a number for every query and key, in the type
    of the queries, so that in float16 weights below e^(−16384) of the largest are taken for that.

    A row of the mask without any key attends to all of them alike, as in jax.

    Args:
      num_heads: the number of heads.
      key_size: the features of queries, keys and values in each head.
      num_positions: the number of mode norms, at least that of key positions (default: that of the
        first call).
      mode: see :class:`SyntonicSoftmax`.
      scale: see :class:`SyntonicSoftmax`.
      name: the module's name.
      w_init: initialiser of the weights of the four dense layers (default: that of ``hk.Linear``).
      with_bias: whether these have a bias.
      b_init: initialiser of their bias (default: zeros).
      model_size: the size of the last axis of the result (default: that of all heads together).
      mode_norms_init: see :class:`SyntonicSoftmax`.
      implementation: that of `jax.nn.dot_product_attention`: ``None``, ``'xla'`` or ``'cudnn'``.
      weighting: ``'bias'`` or ``'folded'``; ``None`` folds for cuDNN alone, where there is room.

    Raises:
      ValueError: unknown mode or weighting (when built); unknown initialiser, more keys than mode
        norms, a syntony of another shape, in another mode or none in its own (when called).

    >>> import haiku as hk
    >>> import jax, jax.numpy as jnp
    >>> from syntonic_jax.nn.haiku import SyntonicAttention
    >>> f = hk.transform(lambda x: SyntonicAttention(2, 4, num_positions=16)(x, is_causal=True))
    >>> x = jnp.ones((3, 5, 8))
    >>> f.apply(f.init(jax.random.key(0), x), None, x).shape
    (3, 5, 8)
    """

    def __init__(
        self,
        num_heads: int,
        key_size: int,
        num_positions: int | None = None,
        mode: str = "learned",
        scale: float = 1.0,
        name: str | None = None,
        *,
        w_init: hk.initializers.Initializer | None = None,
        with_bias: bool = True,
        b_init: hk.initializers.Initializer | None = None,
        model_size: int | None = None,
        mode_norms_init: str | hk.initializers.Initializer = "ones",
        implementation: Any = None,
        weighting: str | None = None,
    ):
        super().__init__(name=name)
        layer = type(self).__name__
        self.mode = check_softmax_mode(layer, mode)
        arguments.flags(layer, with_bias=with_bias)
        arguments.size(layer, num_heads=num_heads, key_size=key_size)
        arguments.optional_size(layer, model_size=model_size, num_positions=num_positions)
        self.path = attention_path(layer, mode, weighting, implementation, key_size)
        self.num_heads = num_heads
        self.key_size = key_size
        self.num_positions = num_positions
        self.scale = scale
        self.w_init = w_init
        self.with_bias = with_bias
        self.b_init = b_init
        self.model_size = num_heads * key_size if model_size is None else model_size
        self.mode_norms_init = mode_norms_init
        self.implementation = implementation

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array | None = None,
        value: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        is_causal: bool = False,
        syntony: jax.Array | None = None,
    ) -> jax.Array:
        """Attention of queries ``[batch, queries, features]``.

        There may be any number of leading axes in place of the batch.

        Keys are by default the queries, values by default the keys. ``mask`` broadcasts to
        ``[batch, heads, queries, keys]``; its entries are booleans or numbers, of which 0 masks, as
        the masks of the frameworks are. ``syntony``, in provided mode, has the shape ``[keys]`` or
        ``[batch, keys]``.
        """
        layer = type(self).__name__
        key = query if key is None else key
        value = key if value is None else value

        def dense(size: int, name: str, x: jax.Array) -> jax.Array:
            return hk.Linear(size, self.with_bias, self.w_init, self.b_init, name=name)(x)

        def heads(name: str, x: jax.Array) -> jax.Array:
            y = dense(self.num_heads * self.key_size, name, x)
            return y.reshape(*y.shape[:-1], self.num_heads, self.key_size)

        projected = heads("query", query), heads("key", key), heads("value", value)
        positions = self.num_positions or jnp.shape(key)[-2]
        dtype = jnp.result_type(key)
        norms = _mode_norms(
            layer, "num_positions", self.mode, positions, dtype, self.mode_norms_init
        )
        y = attention(
            layer,
            self.path,
            *projected,
            **weights_of(layer, self.mode, norms, syntony),
            scale=self.scale,
            mask=mask,
            is_causal=is_causal,
            implementation=self.implementation,
        )
        return dense(self.model_size, "linear", y.reshape(*y.shape[:-2], -1))

"""Attention for Haiku: what `syntonic_jax.nn.haiku` has of it."""

from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.attention import attention, attention_path
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.softmax import (
    check_softmax_mode,
    weights_of,
)

from .softmax import _mode_norms

with required("haiku", "haiku"):
    import haiku as hk


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

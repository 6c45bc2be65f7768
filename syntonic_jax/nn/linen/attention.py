"""Attention for Flax Linen: what `syntonic_jax.nn.linen` has of it."""

from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.attention import attention, attention_path
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.softmax import (
    weights_of,
)

from .softmax import _KERNEL_INIT, _mode_norms

with required("flax", "flax"):
    from flax import linen as nn
    from flax.typing import Dtype, Initializer


class SyntonicAttention(nn.Module):
    """Multi-head attention whose key positions have weights.

    The parameters ``query``, ``key``, ``value`` and ``out`` are those of
    ``linen.MultiHeadAttention``, so its variables load here; in learned mode there is
    ``mode_norms`` beside them, one number a key position. Attention is
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

    Attributes:
      num_heads: the number of heads.
      num_positions: the number of mode norms, at least that of key positions (default: that of the
        first call).
      mode: see :class:`SyntonicSoftmax`.
      scale: see :class:`SyntonicSoftmax`.
      qkv_features: the features of all heads together (default: those of the queries).
      out_features: the size of the last axis of the result (default: that of the queries).
      dtype: the dtype of the computation (default: Flax's for a dense layer).
      param_dtype: the dtype of all parameters.
      use_bias: whether the four dense layers have a ``bias``.
      kernel_init: initialiser of their ``kernel``.
      bias_init: initialiser of their ``bias``.
      mode_norms_init: see :class:`SyntonicSoftmax`.
      implementation: that of `jax.nn.dot_product_attention`: ``None``, ``'xla'`` or ``'cudnn'``.
      weighting: ``'bias'`` or ``'folded'``; ``None`` folds for cuDNN alone, where there is room.

    Raises (when called):
      ValueError: unknown mode, initialiser or weighting, features that the heads do not divide,
        more keys than mode norms, a syntony of another shape, in another mode or none in its own.

    >>> import jax, jax.numpy as jnp
    >>> from syntonic_jax.nn.linen import SyntonicAttention
    >>> attention, x = SyntonicAttention(2, num_positions=16), jnp.ones((3, 5, 8))
    >>> variables = attention.init(jax.random.key(0), x)
    >>> attention.apply(variables, x, is_causal=True).shape, attention.path
    ((3, 5, 8), 'bias')
    """

    num_heads: int
    num_positions: int | None = None
    mode: str = "learned"
    scale: float = 1.0
    qkv_features: int | None = None
    out_features: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    kernel_init: Initializer = _KERNEL_INIT
    bias_init: Initializer = jax.nn.initializers.zeros
    mode_norms_init: str | Initializer = "ones"
    implementation: Any = None
    weighting: str | None = None

    @property
    def path(self) -> str:
        """How the weights reach attention: ``'none'``, ``'bias'`` or ``'folded'``.

        Without ``qkv_features``, whose number the inputs decide, of heads that leave cuDNN room.
        """
        features = self.qkv_features
        return self._path(None if features is None else features // self.num_heads)

    def _path(self, features: int | None) -> str:
        name = type(self).__name__
        return attention_path(name, self.mode, self.weighting, self.implementation, features)

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
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
        name, width = type(self).__name__, jnp.shape(inputs_q)[-1]
        arguments.flags(name, use_bias=self.use_bias)
        arguments.types(name, dtype=self.dtype, param_dtype=self.param_dtype)
        arguments.size(name, num_heads=self.num_heads)
        arguments.optional_size(
            name,
            num_positions=self.num_positions,
            qkv_features=self.qkv_features,
            out_features=self.out_features,
        )
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        features = self.qkv_features or width
        if features % self.num_heads:
            raise ValueError(
                f"{name}: qkv_features must be a multiple of the {self.num_heads} heads, "
                f"got {features}"
            )

        def dense(name: str, features: Any, axis: Any = -1):
            return nn.DenseGeneral(
                features,
                axis=axis,
                name=name,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
            )

        heads = (self.num_heads, features // self.num_heads)
        query, key, value = (
            dense(part, heads)(x)
            for part, x in (("query", inputs_q), ("key", inputs_k), ("value", inputs_v))
        )
        positions = self.num_positions or jnp.shape(inputs_k)[-2]
        norms = _mode_norms(self, "num_positions", positions)
        y = attention(
            name,
            self._path(heads[1]),
            query,
            key,
            value,
            **weights_of(name, self.mode, norms, syntony),
            scale=self.scale,
            mask=mask,
            is_causal=is_causal,
            implementation=self.implementation,
        )
        return dense("out", self.out_features or width, (-2, -1))(y)

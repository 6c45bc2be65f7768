"""Attention for Flax NNX: what `syntonic_jax.nn.nnx` has of it."""

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

from .softmax import _KERNEL_INIT, _mode_norms

with required("flax", "flax"):
    from flax import nnx
    from flax.typing import Dtype, Initializer


class SyntonicAttention(nnx.Module):
    """Multi-head attention whose key positions have weights.

    The parameters ``query``, ``key``, ``value`` and ``out`` are those of
    ``nnx.MultiHeadAttention``, so its state loads here; in learned mode there is ``mode_norms``
    beside them, one number a key position. Attention is `jax.nn.dot_product_attention` of logits to
    which scale · log w of their key is added. How it is added is what ``path`` says:

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
      in_features: the size of the last axis of all inputs.
      num_positions: the number of mode norms, at least that of key positions; needed in learned
        mode.
      mode: see :class:`SyntonicSoftmax`.
      scale: see :class:`SyntonicSoftmax`.
      qkv_features: the features of all heads together (default: ``in_features``).
      out_features: the size of the last axis of the result (default: ``in_features``).
      dtype: the dtype of the computation (default: Flax's for a dense layer).
      param_dtype: the dtype of all parameters.
      use_bias: whether the four dense layers have a ``bias``.
      kernel_init: initialiser of their ``kernel``.
      bias_init: initialiser of their ``bias``.
      mode_norms_init: see :class:`SyntonicSoftmax`.
      rngs: where the initialisers' keys come from.
      implementation: that of `jax.nn.dot_product_attention`: ``None``, ``'xla'`` or ``'cudnn'``.
      weighting: ``'bias'`` or ``'folded'``; ``None`` folds for cuDNN alone, where there is room.

    Raises:
      ValueError: unknown mode, initialiser or weighting, features that the heads do not divide,
        something needed is missing (when built); more keys than mode norms, a syntony of another
        shape, in another mode or none in its own (when called).

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from syntonic_jax.nn.nnx import SyntonicAttention
    >>> attention = SyntonicAttention(2, 8, num_positions=16, rngs=nnx.Rngs(0))
    >>> attention(jnp.ones((3, 5, 8)), is_causal=True).shape, attention.path
    ((3, 5, 8), 'bias')
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        num_positions: int | None = None,
        mode: str = "learned",
        scale: float = 1.0,
        *,
        qkv_features: int | None = None,
        out_features: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = jax.nn.initializers.zeros,
        mode_norms_init: str | Initializer = "ones",
        rngs: nnx.Rngs,
        implementation: Any = None,
        weighting: str | None = None,
    ):
        name = type(self).__name__
        self.mode = check_softmax_mode(name, mode)
        arguments.flags(name, use_bias=use_bias)
        arguments.types(name, dtype=dtype, param_dtype=param_dtype)
        arguments.size(name, num_heads=num_heads, in_features=in_features)
        arguments.optional_size(
            name,
            num_positions=num_positions,
            qkv_features=qkv_features,
            out_features=out_features,
        )
        features = in_features if qkv_features is None else qkv_features
        if features % num_heads:
            raise ValueError(
                f"{name}: qkv_features must be a multiple of the {num_heads} heads, got {features}"
            )
        heads = (num_heads, features // num_heads)
        self.path = attention_path(name, mode, weighting, implementation, heads[1])
        options: Any = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "rngs": rngs,
        }
        # The order in which nnx.MultiHeadAttention draws its keys.
        self.query = nnx.LinearGeneral(in_features, heads, **options)
        self.key = nnx.LinearGeneral(in_features, heads, **options)
        self.value = nnx.LinearGeneral(in_features, heads, **options)
        out = in_features if out_features is None else out_features
        self.out = nnx.LinearGeneral(heads, out, axis=(-2, -1), **options)
        self.mode_norms = _mode_norms(
            name, "num_positions", mode, num_positions, mode_norms_init, param_dtype, rngs
        )
        self.num_heads = num_heads
        self.num_positions = num_positions
        self.scale = scale
        self.implementation = implementation

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
        """Attention of queries ``[batch, queries, in_features]``.

        There may be any number of leading axes in place of the batch.

        Keys are by default the queries, values by default the keys. ``mask`` broadcasts to
        ``[batch, heads, queries, keys]``; its entries are booleans or numbers, of which 0 masks, as
        the masks of the frameworks are. ``syntony``, in provided mode, has the shape ``[keys]`` or
        ``[batch, keys]``.
        """
        name = type(self).__name__
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        norms = None if self.mode_norms is None else self.mode_norms[...]
        y = attention(
            name,
            self.path,
            self.query(inputs_q),
            self.key(inputs_k),
            self.value(inputs_v),
            **weights_of(name, self.mode, norms, syntony),
            scale=self.scale,
            mask=mask,
            is_causal=is_causal,
            implementation=self.implementation,
        )
        return self.out(y)

"""What the softmax layers of all frameworks share: modes, initialisers, weighted attention."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import syntonic_cross_entropy, syntonic_softmax
from syntonic_jax.nn._norm import widened
from syntonic_jax.ops._softmax import log_weights

MODES = ("identity", "learned", "provided")
_INITIALISERS: dict[str, Callable[..., Any]] = {
    "ones": jnp.ones,
    # The mode norms that the original gives to a flat index.
    "index_squared": lambda shape, dtype: jnp.square(jnp.arange(*shape, dtype=float)).astype(dtype),
}


def check_softmax_mode(layer: str, mode: Any) -> str:
    """`mode`, or a ValueError that names the modes there are."""
    if mode not in MODES:
        raise ValueError(
            f"{layer}: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}"
        )
    return mode


def named_initialiser(layer: str, init: Any) -> Callable[..., Any] | None:
    """`(shape, dtype) -> array` for an initialiser given by name; None for a callable."""
    if callable(init):
        return None
    if init not in _INITIALISERS:
        raise ValueError(
            f"{layer}: mode_norms_init must be 'ones', 'index_squared' or an initialiser, "
            f"got {init!r}"
        )
    return _INITIALISERS[init]


def keyed_initialiser(layer: str, init: Any) -> Callable[..., Any]:
    """An initialiser `(key, shape, dtype) -> array`, as jax and Flax have them."""
    named = named_initialiser(layer, init)
    return init if named is None else lambda key, shape, dtype: named(shape, dtype)


def weights_of(layer: str, mode: str, mode_norms: Any, syntony: Any) -> dict[str, Any]:
    """The weights as arguments of the operations; `syntony` goes with its own mode only."""
    if mode == "provided" and syntony is None:
        raise ValueError(f"{layer}: syntony must be given in mode 'provided', got None")
    if mode != "provided" and syntony is not None:
        raise ValueError(f"{layer}: syntony must not be given in mode {mode!r}")
    return {"mode_norms": mode_norms, "syntony": syntony}


def required_size(layer: str, argument: str, mode: str, size: Any) -> tuple[int, ...]:
    """The shape of mode_norms, for which the layer must have been told their number."""
    if size is None:
        raise ValueError(f"{layer}: {argument} must be given in mode {mode!r}, got None")
    return (size,)


def softmax_or_loss(
    layer: str, x: Any, labels: Any, ignore_index: Any, dtype: Any, **options: Any
) -> jax.Array:
    """The probabilities in `dtype`, or the cross entropy with labels where there are any."""
    if labels is not None:
        return syntonic_cross_entropy(x, labels, ignore_index=ignore_index, **options)
    if ignore_index is not None:
        raise ValueError(f"{layer}: ignore_index is for labels only, got {ignore_index!r} and none")
    return syntonic_softmax(widened(x, dtype), dtype=dtype, **options)


# -------------------------------------------------------------------------------- attention

# A feature dimension that cuDNN takes is a multiple of this.
_FEATURES = 8
# So many numbers of the type of the keys hold one of float32: 3 · 8 bits of bfloat16.
_PARTS = 3


def attention_path(layer: str, mode: str, weighting: Any, implementation: Any) -> str:
    """How the weights of keys reach `jax.nn.dot_product_attention`.

    'none' in identity mode; 'bias', one number a key, which XLA broadcasts inside its fusion; or
    'folded' into features of query and key, for cuDNN, which wants a bias for every query.
    """
    if weighting not in (None, "bias", "folded"):
        raise ValueError(f"{layer}: weighting must be None, 'bias' or 'folded', got {weighting!r}")
    if mode == "identity":
        return "none"
    return weighting or ("folded" if implementation == "cudnn" else "bias")


def attention(
    layer: str,
    path: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    mode_norms: Any,
    syntony: Any,
    scale: float,
    mask: Any,
    is_causal: bool,
    implementation: Any,
) -> jax.Array:
    """Dot-product attention of [batch, positions, heads, features], or without a batch.

    Keys are weighted by mode norms, of shape [positions] or more of them, or by a syntony of shape
    [positions] or [batch, positions].
    """
    positions = key.shape[-3]
    if mode_norms is not None:
        if mode_norms.shape[0] < positions:
            raise ValueError(
                f"{layer}: there must be a mode norm for each key position, got "
                f"{mode_norms.shape[0]} for {positions}"
            )
        mode_norms = mode_norms[:positions]
    if syntony is not None:
        allowed = [(positions,)] + [(key.shape[0], positions)] * (key.ndim == 4)
        if jnp.shape(syntony) not in allowed:
            raise ValueError(
                f"{layer}: syntony must have one of the shapes {allowed}, got {jnp.shape(syntony)}"
            )
    settings: Any = {"mask": mask, "is_causal": is_causal, "implementation": implementation}
    if path == "none":
        return jax.nn.dot_product_attention(query, key, value, **settings)
    added = log_weights(mode_norms, syntony, scale, jnp.promote_types(key.dtype, jnp.float32))
    if path == "bias":
        bias = jnp.reshape(added, (-1, 1, 1, positions))
        return jax.nn.dot_product_attention(query, key, value, bias, **settings)
    features = key.shape[-1]
    query, key, value = _folded(query, key, value, added)
    y = jax.nn.dot_product_attention(query, key, value, scale=1 / math.sqrt(features), **settings)
    return y[..., :features]


def _folded(query: Any, key: Any, value: Any, added: Any) -> tuple[Any, Any, Any]:
    """query · key with the logits' `added` in it: keys hold its parts, queries hold ones there.

    The parts add up to √features times it, which the scale of the attention takes away again.
    """
    features = key.shape[-1]
    size = -(features + _PARTS) % _FEATURES + _PARTS
    limit = float(jnp.finfo(key.dtype).max)
    rest = jnp.clip(added * math.sqrt(features), -limit, limit)
    parts = []
    for _ in range(_PARTS):
        parts.append(rest.astype(key.dtype))
        rest = rest - parts[-1].astype(rest.dtype)
    extra = jnp.stack(parts + [jnp.zeros_like(parts[0])] * (size - _PARTS), -1)
    ones = jnp.asarray([1] * _PARTS + [0] * (size - _PARTS), query.dtype)

    def widened(x: Any, more: Any) -> Any:
        return jnp.concatenate([x, jnp.broadcast_to(more, (*x.shape[:-1], size))], -1)

    return (
        widened(query, ones),
        widened(key, extra[..., None, :]),
        widened(value, jnp.zeros((), value.dtype)),
    )

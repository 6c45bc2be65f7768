"""What the attention layers of all frameworks share: how the weights of keys reach the logits."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import _check
from syntonic_jax._compat import cuda_compute_capabilities
from syntonic_jax.nn._shared import arguments
from syntonic_jax.ops._attention import (
    added_to_logits,
    bias_of_every_query,
    extra_features,
    folded,
    merged,
)


def attention_path(
    layer: str, mode: str, weighting: Any, implementation: Any, features: int | None
) -> str:
    """How the weights of keys reach `jax.nn.dot_product_attention` in heads of `features`.

    'none' in identity mode; 'bias', one number a key, which XLA broadcasts inside its fusion; or
    'folded' into features of query and key, for cuDNN, which wants a bias for every query. What is
    folded needs room: cuDNN's heads have a largest size. None stands for a head that leaves it.
    """
    if not arguments.is_one_of(weighting, "bias", "folded"):
        raise ValueError(f"{layer}: weighting must be None, 'bias' or 'folded', got {weighting!r}")
    if not arguments.is_one_of(implementation, "xla", "cudnn"):
        raise ValueError(
            f"{layer}: implementation must be None, 'xla' or 'cudnn', got {implementation!r}"
        )
    if mode == "identity":
        return "none"
    if implementation != "cudnn":
        return weighting or "bias"
    fits = features is None or features + extra_features(features) <= _largest_head()
    if weighting == "folded" and not fits:
        raise ValueError(
            f"{layer}: weighting must be 'bias' for heads of {features} features: cuDNN has no "
            f"room for more beside them"
        )
    return weighting or ("folded" if fits else "bias")


def _largest_head() -> int:
    """The features of a head that cuDNN takes: 256 from Hopper on, which is what is assumed."""
    return 128 if any(float(c) < 9 for c in cuda_compute_capabilities()) else 256


def attention(
    layer: str,
    path: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    mode_norms: Any,
    syntony: Any,
    scale: Any,
    mask: Any,
    is_causal: bool,
    implementation: Any,
) -> jax.Array:
    """Dot-product attention of [*batch, positions, heads, features].

    Keys are weighted by mode norms, of shape [positions] or more of them, or by a syntony of shape
    [positions] or [*batch, positions]. The mask is one of `arguments.truth`.
    """
    *batch, queries, heads, features = query.shape
    positions = key.shape[-3]
    arguments.flags(layer, is_causal=is_causal)
    for name, x in (("keys", key), ("values", value)):
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{layer}: {name} must have the leading axes {tuple(batch)} of the queries, "
                f"got {x.shape[:-3]}"
            )
    mask = arguments.truth(layer, mask, (*batch, heads, queries, positions), "the logits")
    added: Any = None
    if path != "none":
        accumulation = jnp.promote_types(key.dtype, jnp.float32)
        added = _added(layer, mode_norms, syntony, scale, batch, positions, accumulation)
    if len(batch) != 1:
        all_of_them = math.prod(batch)
        query, key, value = (x.reshape(all_of_them, *x.shape[-3:]) for x in (query, key, value))
        mask, added = merged(mask, batch, 3), merged(added, batch, 1)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if implementation == "cudnn" and mask is not None:  # which takes no other shape
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], queries, positions))
    scaling = 1 / math.sqrt(features)
    bias = None
    if path == "bias":
        bias = added.reshape(-1, 1, 1, positions)
        if implementation == "cudnn":
            bias, mask = bias_of_every_query(bias, mask, queries, query.dtype), None
    elif path == "folded":
        query, key, value = folded(query, key, value, added)
    y = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scaling,
        is_causal=bool(is_causal),
        implementation=implementation,
    )
    y = y[..., :features] if path == "folded" else y
    return y.reshape(*batch, queries, heads, features)


def _added(
    layer: str, mode_norms: Any, syntony: Any, scale: Any, batch: Any, positions: int, dtype: Any
) -> Any:
    """What the logits of every key are to have added, [positions] or [*batch, positions]."""
    if mode_norms is not None:
        if mode_norms.shape[0] < positions:
            raise ValueError(
                f"{layer}: there must be a mode norm for each key position, got "
                f"{mode_norms.shape[0]} for {positions}"
            )
        mode_norms = mode_norms[:positions]
    if syntony is not None:
        _check.floating(layer, syntony=syntony)
        allowed = [(positions,)] + [(*batch, positions)] * bool(batch)
        if jnp.shape(syntony) not in allowed:
            raise ValueError(
                f"{layer}: syntony must have one of the shapes {allowed}, got {jnp.shape(syntony)}"
            )
    return added_to_logits(mode_norms, syntony, _check.scalar(layer, "scale", scale), dtype)

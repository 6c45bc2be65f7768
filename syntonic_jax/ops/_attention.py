"""Weights of keys in the logits of dot-product attention: as a bias, or folded into features."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ._softmax import log_weights

# A feature dimension that cuDNN takes is a multiple of this.
_FEATURES = 8
# So many numbers of the type of the keys hold one of float32: 3 · 8 bits of bfloat16.
_PARTS = 3
# What queries hold against the parts. Those of float16 would end at 65504: with factors they reach
# ±65504 · 2**15. What lies below 2**-6 has the 11 bits of one part.
_FACTORS = {"float16": (2.0**15, 2.0**8, 1.0)}


def extra_features(features: int) -> int:
    """The features that the weights take beside so many, in all a number that cuDNN takes."""
    return -(features + _PARTS) % _FEATURES + _PARTS


def added_to_logits(mode_norms: Any, syntony: Any, scale: Any, dtype: Any) -> Any:
    """What the logits of every key have added, of the shape of its mode norms or syntony.

    A softmax does not see what all its logits share. Without it the weightiest key has 0, and the
    digits of the others are those of their difference from it: it goes before it costs any.
    """
    if mode_norms is not None:
        mode_norms = mode_norms.astype(dtype)
        mode_norms = mode_norms + _largest(-mode_norms)
    added = log_weights(mode_norms, syntony, scale, dtype)
    return added - _largest(added)


def _largest(x: Any) -> Any:
    """The largest finite number along the last axis, or 0, as a constant.

    What is not finite may be hidden by a mask.
    """
    x = jax.lax.stop_gradient(x)
    largest = jnp.where(jnp.isfinite(x), x, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf)
    return jnp.where(jnp.isfinite(largest), largest, 0)


def merged(x: Any, batch: Any, trailing: int) -> Any:
    """x, which may broadcast along the axes of the batch, with one axis in their place."""
    if x is None or x.ndim <= trailing:
        return x
    x = x.reshape((1,) * (len(batch) + trailing - x.ndim) + x.shape)
    leading, rest = x.shape[: len(batch)], x.shape[len(batch) :]
    if math.prod(leading) == 1:
        return x.reshape(1, *rest)
    return jnp.broadcast_to(x, (*batch, *rest)).reshape(math.prod(batch), *rest)


def bias_of_every_query(bias: Any, mask: Any, queries: int, dtype: Any) -> Any:
    """A bias as cuDNN wants it, one number a query and key, with the mask in it.

    It is of the type of the queries, and what is masked must lie below it.
    """
    lowest = -(2.0**14) if dtype == jnp.float16 else -(2.0**40)
    bias = jnp.maximum(bias, lowest).astype(dtype)
    bias = jnp.broadcast_to(bias, (*bias.shape[:2], queries, bias.shape[3]))
    return bias if mask is None else jnp.where(mask, bias, jnp.asarray(2 * lowest, dtype))


def folded(query: Any, key: Any, value: Any, added: Any) -> tuple[Any, Any, Any]:
    """query · key with the logits' `added` in it: keys hold its parts, queries their factors.

    They add up to √features times it, which the scale of the attention takes away again.
    """
    features, dtype = key.shape[-1], key.dtype
    size = extra_features(features)
    factors = _FACTORS.get(dtype.name, (1.0,) * _PARTS)
    # Products of matrices may read float32 as something narrower.
    digits = jnp.finfo(jnp.float16 if dtype == jnp.float16 else jnp.bfloat16).nmant
    limit = float(jnp.finfo(jnp.bfloat16 if dtype == jnp.float32 else dtype).max)
    limit *= factors[0] if factors[0] > 1 else 0.5
    rest = jnp.clip(added * math.sqrt(features), -limit, limit)
    parts = []
    for factor in factors[:-1]:
        # Not a conversion and back, which XLA may leave out. Only the last part has a derivative:
        # those with factors could be beyond float16.
        part = jax.lax.stop_gradient(rest) / factor
        part = jax.lax.reduce_precision(part, jnp.finfo(dtype).nexp, digits)
        parts.append(part.astype(dtype))
        rest = rest - part * factor
    parts.append(rest.astype(dtype))
    extra = jnp.stack(parts + [jnp.zeros_like(parts[0])] * (size - _PARTS), -1)
    held = jnp.asarray([*factors, *[0] * (size - _PARTS)], query.dtype)

    def widened(x: Any, more: Any) -> Any:
        return jnp.concatenate([x, jnp.broadcast_to(more, (*x.shape[:-1], size))], -1)

    return (
        widened(query, held),
        widened(key, extra[..., None, :]),
        widened(value, jnp.zeros((), value.dtype)),
    )

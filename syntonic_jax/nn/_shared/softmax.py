"""What the softmax layers of all frameworks share: modes, initialisers, weighted attention."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import _check, syntonic_cross_entropy, syntonic_softmax
from syntonic_jax._compat import cuda_compute_capabilities
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.norm import widened
from syntonic_jax.ops._softmax import log_weights

MODES = ("identity", "learned", "provided")
_INITIALISERS: dict[str, Callable[..., Any]] = {
    "ones": jnp.ones,
    # The mode norms that the original gives to a flat index.
    "index_squared": lambda shape, dtype: jnp.square(jnp.arange(*shape, dtype=float)).astype(dtype),
}


def _is_one_of(value: Any, *names: str) -> bool:
    """Whether it is None or one of these names; comparing an array with them is an array."""
    return value is None or (isinstance(value, str) and value in names)


def check_softmax_mode(layer: str, mode: Any) -> str:
    """`mode`, or a ValueError that names the modes there are."""
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(
            f"{layer}: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}"
        )
    return mode


def named_initialiser(layer: str, init: Any) -> Callable[..., Any] | None:
    """`(shape, dtype) -> array` for an initialiser given by name; None for a callable."""
    if callable(init):
        return None
    if not isinstance(init, str) or init not in _INITIALISERS:
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
    arguments.size(layer, 0, **{argument: size})
    return (int(size),)


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
# What queries hold against the parts. Those of float16 would end at 65504: with factors they reach
# ±65504 · 2**15. What lies below 2**-6 has the 11 bits of one part.
_FACTORS = {"float16": (2.0**15, 2.0**8, 1.0)}


def attention_path(
    layer: str, mode: str, weighting: Any, implementation: Any, features: int | None
) -> str:
    """How the weights of keys reach `jax.nn.dot_product_attention` in heads of `features`.

    'none' in identity mode; 'bias', one number a key, which XLA broadcasts inside its fusion; or
    'folded' into features of query and key, for cuDNN, which wants a bias for every query. What is
    folded needs room: cuDNN's heads have a largest size. None stands for a head that leaves it.
    """
    if not _is_one_of(weighting, "bias", "folded"):
        raise ValueError(f"{layer}: weighting must be None, 'bias' or 'folded', got {weighting!r}")
    if not _is_one_of(implementation, "xla", "cudnn"):
        raise ValueError(
            f"{layer}: implementation must be None, 'xla' or 'cudnn', got {implementation!r}"
        )
    if mode == "identity":
        return "none"
    if implementation != "cudnn":
        return weighting or "bias"
    fits = features is None or features + _extra_features(features) <= _largest_head()
    if weighting == "folded" and not fits:
        raise ValueError(
            f"{layer}: weighting must be 'bias' for heads of {features} features: cuDNN has no "
            f"room for more beside them"
        )
    return weighting or ("folded" if fits else "bias")


def _extra_features(features: int) -> int:
    return -(features + _PARTS) % _FEATURES + _PARTS


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
        merged = math.prod(batch)
        query, key, value = (x.reshape(merged, *x.shape[-3:]) for x in (query, key, value))
        mask, added = _merged(mask, batch, 3), _merged(added, batch, 1)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if implementation == "cudnn" and mask is not None:  # which takes no other shape
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], queries, positions))
    scaling = 1 / math.sqrt(features)
    bias = None
    if path == "bias":
        bias = added.reshape(-1, 1, 1, positions)
        if implementation == "cudnn":
            bias, mask = _of_every_query(bias, mask, queries, query.dtype), None
    elif path == "folded":
        query, key, value = _folded(query, key, value, added)
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
    """What the logits of every key are to have added, [positions] or [*batch, positions].

    A softmax does not see what all its logits share. Without it the weightiest key has 0, and the
    digits of the others are those of their difference from it: it goes before it costs any.
    """
    if mode_norms is not None:
        if mode_norms.shape[0] < positions:
            raise ValueError(
                f"{layer}: there must be a mode norm for each key position, got "
                f"{mode_norms.shape[0]} for {positions}"
            )
        mode_norms = mode_norms[:positions].astype(dtype)
        mode_norms = mode_norms + _largest(-mode_norms)
    if syntony is not None:
        _check.floating(layer, syntony=syntony)
        allowed = [(positions,)] + [(*batch, positions)] * bool(batch)
        if jnp.shape(syntony) not in allowed:
            raise ValueError(
                f"{layer}: syntony must have one of the shapes {allowed}, got {jnp.shape(syntony)}"
            )
    added = log_weights(mode_norms, syntony, _check.scalar(layer, "scale", scale), dtype)
    return added - _largest(added)


def _largest(x: Any) -> Any:
    """The largest finite number along the last axis, or 0, as a constant.

    What is not finite may be hidden by a mask.
    """
    x = jax.lax.stop_gradient(x)
    largest = jnp.where(jnp.isfinite(x), x, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf)
    return jnp.where(jnp.isfinite(largest), largest, 0)


def _merged(x: Any, batch: Any, trailing: int) -> Any:
    """x, which may broadcast along the axes of the batch, with one axis in their place."""
    if x is None or x.ndim <= trailing:
        return x
    x = x.reshape((1,) * (len(batch) + trailing - x.ndim) + x.shape)
    leading, rest = x.shape[: len(batch)], x.shape[len(batch) :]
    if math.prod(leading) == 1:
        return x.reshape(1, *rest)
    return jnp.broadcast_to(x, (*batch, *rest)).reshape(math.prod(batch), *rest)


def _of_every_query(bias: Any, mask: Any, queries: int, dtype: Any) -> Any:
    """A bias as cuDNN wants it, one number a query and key, with the mask in it.

    It is of the type of the queries, and what is masked must lie below it.
    """
    lowest = -(2.0**14) if dtype == jnp.float16 else -(2.0**40)
    bias = jnp.maximum(bias, lowest).astype(dtype)
    bias = jnp.broadcast_to(bias, (*bias.shape[:2], queries, bias.shape[3]))
    return bias if mask is None else jnp.where(mask, bias, jnp.asarray(2 * lowest, dtype))


def _folded(query: Any, key: Any, value: Any, added: Any) -> tuple[Any, Any, Any]:
    """query · key with the logits' `added` in it: keys hold its parts, queries their factors.

    They add up to √features times it, which the scale of the attention takes away again.
    """
    features, dtype = key.shape[-1], key.dtype
    size = _extra_features(features)
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

"""What the softmax layers of all frameworks share: modes and initialisers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import syntonic_cross_entropy, syntonic_softmax
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.norm import widened

MODES = ("identity", "learned", "provided")
_INITIALISERS: dict[str, Callable[..., Any]] = {
    "ones": jnp.ones,
    # The mode norms that the original gives to a flat index.
    "index_squared": lambda shape, dtype: jnp.square(jnp.arange(*shape, dtype=float)).astype(dtype),
}


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

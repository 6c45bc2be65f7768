"""The residual layers of every framework, as functions of (parameters, inputs)."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from softmax_layers import haiku_layer, linen_layer, nnx_layer

import syntonic_jax.nn

WIDTH = 6
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, WIDTH)), "float32")


def residual_norm(framework, **options):
    """PhiResidualLayerNorm, applied to (parameters, identity, residual)."""
    layer = getattr(syntonic_jax.nn, framework).PhiResidualLayerNorm
    if framework == "nnx":
        return nnx_layer(layer(WIDTH, rngs=nnx.Rngs(0), **options))
    if framework == "linen":
        return linen_layer(layer(**options), X, {"residual": X})
    words = {"create_scale": True, "create_offset": True, **options}
    return haiku_layer(lambda: layer(-1, **words), X, {"residual": X})


def residual(framework, function, **options):
    """PhiResidual around a function."""
    layer = getattr(syntonic_jax.nn, framework).PhiResidual
    if framework == "nnx":
        return nnx_layer(layer(function, **options))
    if framework == "linen":
        return linen_layer(layer(function, **options), X)
    return haiku_layer(lambda: layer(function, **options), X)

"""The short run under compute-sanitizer: every kernel and tier, one program for each type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from syntonic_jax import (
    golden_gelu,
    phi_residual_gelu,
    phi_residual_layernorm,
    residual_component_norm,
)

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

# Parts of a warp, a warp, a block, clusters, rows read twice; with odd widths between them.
WIDTHS = (7, 33, 200, 256, 1000, 4096, 8193, 16384, 98304, 140001, 600000)


@functools.partial(jax.jit, static_argnums=0)
def everything(implementation, rows, scale):
    """A scalar that depends on the results of all kernels, and its gradients."""

    def loss(rows, scale):
        total = 0.0
        for x, s in zip(rows, scale):
            y, z = phi_residual_layernorm(
                x, x[::-1], s, s, return_sum=True, implementation=implementation
            )
            w = phi_residual_gelu(y, z, implementation=implementation)
            w = golden_gelu(w, implementation=implementation)
            total += jnp.sum(jnp.sin(w.astype(s.dtype))) / w.size**0.5
            total += residual_component_norm(w, implementation=implementation) / w.size**0.5
        return total

    return jax.value_and_grad(loss, (0, 1))(rows, scale)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_every_kernel(dtype, rng, x64):
    acc = oracles.accumulation(dtype)
    rows = [jnp.asarray(rng.normal(size=(5, width)), dtype) for width in WIDTHS]
    scale = [jnp.asarray(rng.normal(size=width), acc) for width in WIDTHS]
    ours, theirs = (everything(i, rows, scale) for i in ("cuda", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        a, b = oracles.real(a), oracles.real(b)
        # Four operations, each rounding its result to the type of the data.
        tolerance = 16 * oracles.unit(dtype) + 256 * oracles.unit(acc)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)

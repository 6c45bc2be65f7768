"""The short run under compute-sanitizer: every kernel and tier, one program for each type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from syntonic_jax import (
    crystallize,
    golden_batch_norm,
    golden_gelu,
    golden_layer_norm,
    golden_rms_norm,
    phi_residual,
    phi_residual_gelu,
    phi_residual_layernorm,
    phi_residual_relu,
    phi_residual_rmsnorm,
    residual_component_norm,
    syntonic_cross_entropy,
    syntonic_log_softmax,
    syntonic_softmax,
)
from syntonic_jax.ops import _norm_arithmetic

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

# Parts of a warp, a warp, a block, clusters, rows read twice; with odd widths between them.
WIDTHS = (7, 33, 200, 256, 1000, 4096, 8193, 16384, 98304, 140001, 600000)


# Channels before other axes: packs of whole, half and single elements, in tiles of channels and in
# planes beyond a block.
PLANES = ((3, 5, 64), (3, 4, 196), (4, 6, 49), (3, 2, 2304), (3, 2, 1156), (4, 4, 1050))


@functools.partial(jax.jit, static_argnums=0)
def everything(implementation, rows, scale, planes):
    """A scalar that depends on the results of all kernels, and its gradients."""

    def loss(rows, scale, planes):
        total = 0.0
        for x in planes:
            y, mean, var = golden_batch_norm(x, axis=1, implementation=implementation)
            total += jnp.sum(jnp.sin(y.astype(mean.dtype))) / y.size**0.5 + mean.sum() * var.sum()
        for x, s in zip(rows, scale):
            y, z = phi_residual_layernorm(
                x, x[::-1], s, s, return_sum=True, implementation=implementation
            )
            w = phi_residual_gelu(y, z, implementation=implementation)
            w = golden_gelu(w, implementation=implementation)
            # Of the data themselves: which side of its kink they lie on is no matter of rounding.
            r = phi_residual_relu(x, x[::-1], implementation=implementation)
            w = phi_residual(w, r, implementation=implementation)
            # Near the middle of the lattice, and beyond it: both of its ways.
            w = w + crystallize(100 * x, implementation=implementation) / 100
            w = golden_layer_norm(w, s, implementation=implementation)
            w = golden_rms_norm(w, s, implementation=implementation)
            w, _ = phi_residual_rmsnorm(w, x, s, return_sum=True, implementation=implementation)
            w = golden_batch_norm(w, s, epsilon=1.0, implementation=implementation)[0]
            total += jnp.sum(jnp.sin(w.astype(s.dtype))) / w.size**0.5
            total += residual_component_norm(w, implementation=implementation) / w.size**0.5
        return total

    return jax.value_and_grad(loss, (0, 1, 2))(rows, scale, planes)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_every_kernel(dtype, rng, x64):
    acc = oracles.accumulation(dtype)
    rows = [jnp.asarray(rng.normal(size=(5, width)), dtype) for width in WIDTHS]
    scale = [jnp.asarray(rng.normal(size=width), acc) for width in WIDTHS]
    planes = [jnp.asarray(rng.normal(size=shape), dtype) for shape in PLANES]
    ours, theirs = (everything(i, rows, scale, planes) for i in ("cuda", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        a, b = oracles.real(a), oracles.real(b)
        # Ten operations, each rounding its result to the type of the data. Five rows
        # may deviate by next to nothing: the epsilon of the batch norm stands against that.
        tolerance = 64 * oracles.unit(dtype) + 1024 * oracles.unit(acc)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@functools.partial(jax.jit, static_argnums=0)
def softmaxes(implementation, rows, norms, planes):
    """The same of the softmax kernels: with a mask and without, along the last axis and others."""

    def loss(rows, norms, planes):
        total = 0.0
        options = {"implementation": implementation}
        for x, n in zip(rows, norms):
            y = syntonic_softmax(x, mode_norms=n, where=x > -1, **options)
            total += jnp.sum(jnp.sin(y.astype(n.dtype) * x))
            y = syntonic_log_softmax(x, mode_norms=n, **options).astype(n.dtype)
            total += jnp.sum(jnp.sin(y)) / y.size**0.5
            labels = jnp.arange(x.shape[0], dtype="int32") % x.shape[1]
            total += syntonic_cross_entropy(x, labels, mode_norms=n, **options).sum()
        for x in planes:
            for f in (syntonic_softmax, syntonic_log_softmax):
                y = f(x, axis=1, **options).astype(norms[0].dtype)
                total += jnp.sum(jnp.sin(y * x)) / y.size**0.5
        return total

    return jax.value_and_grad(loss, (0, 1, 2))(rows, norms, planes)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_softmax_kernels(dtype, rng, x64):
    acc = oracles.accumulation(dtype)
    rows = [jnp.asarray(rng.normal(size=(5, width)), dtype) for width in WIDTHS]
    norms = [jnp.asarray(rng.random(width), acc) for width in WIDTHS]
    planes = [jnp.asarray(rng.normal(size=shape), dtype) for shape in PLANES]
    ours, theirs = (softmaxes(i, rows, norms, planes) for i in ("cuda", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        a, b = oracles.real(a), oracles.real(b)
        # A result and a gradient, each rounded once to the type of the data, and a sum of both.
        tolerance = 16 * oracles.unit(dtype) + 1024 * oracles.unit(acc)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_many_turns(dtype, rng, x64, monkeypatch):
    """What takes turns: the rows of a worker, and the sums over rows that a block makes."""
    # Few workers: an H100 would have one for every row of arrays this small.
    monkeypatch.setattr(_norm_arithmetic, "_MAX_WORKERS", 2)
    acc = oracles.accumulation(dtype)

    # Rows that begin alike and unlike in lines of memory, in packs and not; in blocks and clusters.
    widths = (1000, 1001, 4100, 24000)
    rows = [jnp.asarray(rng.normal(size=(9, w)), dtype) for w in widths]
    # More sums, one for each example, than there are blocks on the device at once.
    examples = [jnp.asarray(rng.normal(size=(1500, 2, w)), dtype) for w in widths[:2]]
    scale = [jnp.asarray(rng.random(x.shape[-1]), acc) for x in rows]

    @functools.partial(jax.jit, static_argnums=0)
    def in_turns(implementation, rows, scale, examples):
        def layernorm(x, s):
            y = phi_residual_layernorm(x, x[::-1], s, s, implementation=implementation)
            return jnp.sum(jnp.sin(y.astype(acc)))

        def softmax(x, s):
            y = syntonic_softmax(x, mode_norms=s, implementation=implementation)
            return jnp.sum(jnp.sin(y.astype(acc) * x))

        gradients = [jax.grad(f, (0, 1)) for f in (layernorm, softmax)]
        return [
            [g(x, s) for x, s in zip(rows, scale)]
            + [jax.vmap(g, (0, None))(x, s) for x, s in zip(examples, scale)]
            for g in gradients
        ]

    ours, theirs = (in_turns(i, rows, scale, examples) for i in ("cuda", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = oracles.real(a), oracles.real(b)
        # As above; and the sums over rows are of at most nine.
        tolerance = 16 * oracles.unit(dtype) + 1024 * oracles.unit(acc)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)

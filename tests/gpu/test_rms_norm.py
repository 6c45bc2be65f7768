"""The RMS norm kernels against the float64 oracle and against XLA's result in the same type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import rms_check

from syntonic_jax import golden_rms_norm, phi_residual_rmsnorm

pytestmark = pytest.mark.gpu

WIDTHS = (1, 7, 31, 32, 33, 200, 255, 768, 1000, 1024, 4096, 5000, 8192, 12288, 16384, 50257, 65536)
WIDEST = (131072, 262144, 600001)  # clusters at their limit, and rows read twice


def relative_error(actual, expected) -> float:
    expected = oracles.real(expected)
    return float(np.linalg.norm(oracles.real(actual) - expected) / np.linalg.norm(expected))


@functools.partial(jax.jit, static_argnums=0)
def both(implementation, x, r, scale, ct):
    """Values and gradients of both norms."""

    def call(x, r, scale):
        y, z = phi_residual_rmsnorm(x, r, scale, return_sum=True, implementation=implementation)
        return y, z, golden_rms_norm(x, scale, implementation=implementation)

    results, pull = jax.vjp(call, x, r, scale)
    return results, pull((ct,) * 3)


def check(shape, dtype, rng, mode="phi"):
    x, ct, scale = rms_check.draw(rng, shape, dtype)
    rms_check.check("cuda", x, ct, scale)
    rms_check.check("cuda", x, ct)
    rms_check.check_residual("cuda", shape, dtype, mode, rng)
    r = jnp.asarray(rng.normal(size=shape), dtype)
    ours, theirs = (both(i, x, r, scale, ct) for i in ("cuda", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # A result and a gradient, each rounded once to the type of the data, and sums of either
        # order, whose errors add up at random.
        acc = oracles.unit(oracles.accumulation(dtype))
        terms = max(shape[-1], shape[0])
        assert relative_error(a, b) <= 4 * oracles.unit(a.dtype) + 8 * acc * terms**0.5


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, dtype, rng, x64):
    rows = max(3, min(1000, 2**17 // width)) | 1  # odd: the last block is not full
    check((rows, width), dtype, rng)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", WIDEST)
def test_widest(width, dtype, rng, x64):
    check((3, width), dtype, rng, "phi_symmetric")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("width", [4, 33, 1000, 1033, 4096, 20001, 140000, 600000])
def test_rows_of_any_range(width, dtype, rng, x64):
    rms_check.check_any_range("cuda", width, dtype, rng)


@pytest.mark.parametrize("width", [33, 768, 16384, 50257])
def test_same_bits_every_time(width, rng):
    x, ct, scale = rms_check.draw(rng, (999, width), "bfloat16")
    first = both("cuda", x, x[::-1], scale, ct)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, both("cuda", x, x[::-1], scale, ct), first)


@pytest.mark.parametrize("width", [33, 768, 16384])
def test_batched_scales(width, rng):
    """Groups: one scale an example, and a gradient of each."""
    x, _, _ = rms_check.draw(rng, (4, 6, width), "float32")
    scale = jnp.asarray(rng.normal(size=(4, width)), "float32")

    def per_example(implementation):
        def loss(x, scale):
            y = phi_residual_rmsnorm(x, x[::-1], scale, implementation=implementation)
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, scale)

    for ours, theirs in zip(per_example("cuda"), per_example("xla"), strict=True):
        assert relative_error(ours, theirs) < 64 * oracles.unit("float32")

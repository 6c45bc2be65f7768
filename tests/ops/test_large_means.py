"""A mean far above the deviation, in float32: the rounding of the mean must not show in y.

Every norm carries it in two numbers. Here y is right to 1e-6, where half a unit of a mean of 1e4 is
5e-4, and of 1e6 is 3e-2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from syntonic_jax import golden_batch_norm, golden_layer_norm, phi_residual_layernorm

NORMS = {
    "golden_layer_norm": lambda x, **options: golden_layer_norm(
        x, target_variance="standard", epsilon=0.0, **options
    ),
    "phi_residual_layernorm": lambda x, **options: phi_residual_layernorm(
        x, jnp.zeros_like(x), epsilon=0.0, **options
    ),
    "golden_batch_norm": lambda x, **options: (
        golden_batch_norm(x.T, target_variance="standard", epsilon=0.0, **options)[0].T
    ),
}


def rows(rng, mean, width, dtype="float32"):
    deviations = rng.normal(size=(6, width))
    return jnp.asarray(np.sign(rng.normal(size=(6, 1))) * mean + deviations, dtype)


def exact(x):
    x = oracles.real(x)
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("width", [33, 256, 1000])
@pytest.mark.parametrize("name", NORMS)
def test_values(name, width, mean, implementation, rng):
    x = rows(rng, mean, width)
    y = jax.jit(lambda x: NORMS[name](x, implementation=implementation))(x)
    expected = exact(x)
    error = np.abs(oracles.real(y) - expected) / np.maximum(1, np.abs(expected))
    assert error.max() <= 1e-6


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("name", NORMS)
def test_gradients(name, mean, implementation, rng):
    """Which are made of x̂ too."""
    x, ct = rows(rng, mean, 256), jnp.asarray(rng.normal(size=(6, 256)), "float32")

    def loss(x):
        return (ct * NORMS[name](x, implementation=implementation)).sum()

    found = jax.jit(jax.grad(loss))(x)
    x_hat, w = exact(x), oracles.real(ct)
    inner = (w * x_hat).mean(-1, keepdims=True)
    expected = (w - w.mean(-1, keepdims=True) - x_hat * inner) / oracles.real(x).std(
        -1, keepdims=True
    )
    # A few roundings of each of three terms, of which none is above 5.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("part", [slice(1), slice(64), slice(-200, None)])
def test_a_part_of_the_batch_far_from_the_rest(part, rng):
    """On a CPU the mean is that of some numbers, and of the deviations from it."""
    x = rng.normal(400, 1, (20000, 2)).astype("float32")
    x[part] = 1e8
    _, mean, _ = golden_batch_norm(jnp.asarray(x))
    np.testing.assert_allclose(mean, x.astype("float64").mean(0), rtol=1e-5)

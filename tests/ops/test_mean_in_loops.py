"""Means in loops: XLA fuses a norm otherwise there, and may compute a mean anew, unrounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from syntonic_jax import golden_layer_norm, phi_residual_layernorm


@pytest.mark.parametrize("width", [17, 33, 100, 768])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_of_equal_numbers(width, dtype, implementation):
    """What rounding leaves in the mean is taken out of the same mean."""
    x = jnp.full((8, width), 999424.0, dtype)

    def residual_norm(x):
        return phi_residual_layernorm(x, x, mode="phi_symmetric", implementation=implementation)

    def norm(x):
        return golden_layer_norm(x, implementation=implementation)

    for f in (norm, residual_norm):
        np.testing.assert_array_equal(jax.lax.map(f, x).astype("float32"), 0)
        _, y = jax.lax.scan(lambda carry, x, f=f: (carry, f(x)), 0.0, x[:, None])
        np.testing.assert_array_equal(y.astype("float32"), 0)


@pytest.mark.parametrize("width", [33, 257])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mean_far_above_deviation(width, dtype, implementation, rng):
    x = jnp.asarray(rng.normal(1e6, 1, (4, 8, width)), "float32")
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(-1, keepdims=True)
    exact /= np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-5)
    y = jax.lax.map(
        lambda x: golden_layer_norm(
            x, target_variance="standard", dtype=dtype, implementation=implementation
        ),
        x,
    )
    unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=unit, atol=1e-6)

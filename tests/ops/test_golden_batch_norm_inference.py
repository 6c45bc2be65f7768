"""golden_batch_norm_inference against the oracle; its transformations are tested with the other."""

import jax.numpy as jnp
import numpy as np
import oracles
import oracles_norm
import pytest
from batch_norm_check import channels_of, draw, draw_parameters, features_of, layouts

from syntonic_jax import golden_batch_norm, golden_batch_norm_inference

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("names", [(), ("scale", "bias")], ids=["bare", "scale-bias"])
@layouts
def test_inference(shape, axis, names, dtype, implementation, rng):
    """Also where mean and deviation are far apart."""
    acc, channels = oracles.accumulation(dtype), channels_of(shape, axis)
    parameters = draw_parameters(rng, shape, axis, acc, names)
    mean, var = (jnp.asarray(s, acc) for s in rng.uniform(0.5, 2, size=(2, *channels)))
    far = 1e4 if acc == dtype else 1.0
    for offset in (0.0, far):
        x = jnp.asarray(rng.normal(offset, size=shape), dtype)
        y = golden_batch_norm_inference(
            x, mean + offset, var, **parameters, axis=axis, implementation=implementation
        )
        assert y.dtype == dtype
        options = {"features": features_of(axis), "variance": oracles.PHI_INV, "acc": acc}
        expected = oracles_norm.inference(x, mean + offset, var, **parameters, **options)
        oracles.assert_close(y, expected)


def test_inference_with_the_statistics_of_the_batch(implementation, rng):
    x, _ = draw(rng, (16, 5), -1, "float32")
    y, mean, var = golden_batch_norm(x, implementation=implementation)
    again = golden_batch_norm_inference(x, mean, var, implementation=implementation)
    # mean and var are rounded between the two.
    scale = np.max(np.abs(x)) / np.sqrt(np.min(var))
    np.testing.assert_allclose(again, y, rtol=0, atol=oracles.STEPS * 2.0**-24 * scale)


@pytest.mark.parametrize("out", oracles.DTYPES)
def test_inference_in_another_output_type(out, implementation, rng):
    x, _ = draw(rng, (6, 4), -1, "bfloat16")
    mean, var = jnp.zeros(4, "bfloat16"), jnp.ones(4, "float32")
    y = golden_batch_norm_inference(x, mean, var, dtype=out, implementation=implementation)
    assert y.dtype == out
    oracles.assert_close(
        y, oracles_norm.inference(x, mean, var, variance=oracles.PHI_INV, acc="float32")
    )


def test_nothing_overflows_on_the_way(implementation):
    """Numbers near the largest, of a deviation as large: divided by it before they are enlarged."""
    x, mean, var = (
        jnp.full(shape, v, "float32") for shape, v in (((2, 3), 2e38), (3, 0), (3, 1e30))
    )
    y = golden_batch_norm_inference(
        x, mean, var, target_variance=4.0, epsilon=0.0, implementation=implementation
    )
    np.testing.assert_allclose(y, np.full((2, 3), 4e23), rtol=8 * oracles.unit("float32"))

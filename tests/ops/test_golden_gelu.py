"""golden_gelu: x * sigmoid(phi * x)."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from battery import Operation

from syntonic_jax import golden_gelu

pytestmark = pytest.mark.usefixtures("x64")


def formula(x):
    return x * jax.nn.sigmoid(oracles.PHI * x)


OPERATIONS = [
    Operation("golden_gelu", "golden_gelu", golden_gelu, formula, ("rows",), "golden_gelu")
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS


class TestTypes(battery.Types):
    operations = OPERATIONS


class TestBadInput(battery.BadInput):
    operations = OPERATIONS


def value_and_cotangent(f, x, ct):
    y, pull = jax.vjp(f, x)
    return y, pull(ct)[0]


@pytest.mark.parametrize("out", oracles.DTYPES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_accuracy(dtype, out, implementation, rng):
    x = jnp.asarray(rng.normal(size=300) * 2.0 ** rng.integers(-6, 6, size=300), dtype)
    ct = jnp.asarray(rng.normal(size=300), out)
    acc = oracles.accumulation(dtype)
    y, dx = value_and_cotangent(
        lambda x: golden_gelu(x, dtype=out, implementation=implementation), x, ct
    )
    assert (y.dtype, dx.dtype) == (out, dtype)
    oracles.assert_close(y, oracles.golden_gelu(x, acc=acc), "y")
    oracles.assert_close(dx, oracles.golden_gelu_vjp(x, ct, acc=acc), "dx", flush=True)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_special_values(dtype, implementation):
    largest = float(oracles.info(dtype).max)
    x = jnp.array([np.nan, np.inf, -np.inf, largest, -largest, 0.0, -0.0, 1e4], dtype)
    y, dx = value_and_cotangent(
        lambda x: golden_gelu(x, implementation=implementation), x, jnp.ones_like(x)
    )
    expected = formula(x.astype(oracles.accumulation(dtype))).astype(dtype)
    np.testing.assert_array_equal(oracles.real(y), oracles.real(expected))
    assert np.isnan(dx[0])
    # Limits of the slope, finite as long as x is.
    np.testing.assert_array_equal(dx[3:].astype("float64"), [1, 0, 0.5, 0.5, 1])


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_subnormal(dtype, implementation):
    acc = oracles.accumulation(dtype)
    tiny = float(max(oracles.info(t).smallest_normal for t in (dtype, acc)))
    x = jnp.array([tiny / 4, -tiny / 2, tiny, 3 * tiny, -5 * tiny], dtype)
    y = golden_gelu(x, implementation=implementation)
    oracles.assert_kept_or_flushed(y, [oracles.golden_gelu(x, acc=acc)])


def test_known_values():
    # 1 / (1 + exp(-phi)) to ten digits.
    np.testing.assert_allclose(
        golden_gelu(jnp.array([1.0, -1.0])), [0.8345238143, -0.1654761857], rtol=1e-9
    )

"""The component norm is right wherever it is a number of its type, whatever its square is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from norm_range_check import CASES, check_norm, exact, relative
from sharded import collectives

from syntonic_jax import PHI_INV, residual_component_norm

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("mode", ["phi", "standard"])
@pytest.mark.parametrize(("dtype", "values", "count"), CASES)
def test_value_and_derivatives(dtype, values, count, mode, implementation):
    check_norm(dtype, values, count, mode, implementation)


SECOND = [("float32", 1e30), ("float32", 1e-25), ("float32", 1e18), ("float64", 1e-200)]


@pytest.mark.parametrize(("dtype", "size"), SECOND)
def test_second_derivative(dtype, size, implementation):
    """c (I − x̂x̂ᵀ) / ‖x‖."""
    x = jnp.asarray([size, -2 * size, 3 * size], dtype)
    f = functools.partial(residual_component_norm, implementation=implementation)
    norm, slope = exact(x)
    expected = PHI_INV * (np.eye(3) - np.outer(slope, slope)) / np.float64(norm)
    slack = 2 * oracles.STEPS * oracles.unit(dtype) * PHI_INV / np.float64(norm)
    np.testing.assert_allclose(oracles.real(jax.hessian(f)(x)), expected, rtol=0, atol=slack)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_of_several_in_its_own_range(dtype, implementation):
    """Under vmap, where one is small, one is large and one is zero."""
    large = 1e30 if dtype == "float32" else 1e200
    sizes = np.array([1, large, 1 / large, 0, 3])
    x = jnp.asarray(sizes[:, None] * [3.0, 4.0], dtype)
    f = functools.partial(residual_component_norm, mode="standard", implementation=implementation)
    norms, slopes = jax.vmap(jax.value_and_grad(f))(x)
    expected = np.where(sizes[:, None] > 0, [0.6, 0.8], 0)
    tolerance = oracles.STEPS * oracles.unit(dtype)
    np.testing.assert_allclose(oracles.real(norms), 5 * sizes, rtol=tolerance)
    np.testing.assert_allclose(oracles.real(slopes), expected, rtol=tolerance)


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_sharded(size, implementation):
    """Devices add their sums: one all-reduce, wherever the numbers lie."""
    x = np.full((16, 6), 1e-3 * size, "float32")
    x[5] = size
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, NamedSharding(mesh, P("d")))
    f = functools.partial(residual_component_norm, implementation=implementation)
    compiled = jax.jit(f).lower(x).compile()
    entry = compiled.as_text().rpartition("ENTRY")[2]
    assert set(collectives(compiled)) == {"all-reduce"}
    assert entry.count("all-reduce(") == 1
    norm, _ = exact(x)
    np.testing.assert_allclose(
        float(compiled(x)), float(PHI_INV * norm), rtol=relative(x, "float32")
    )


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_infinite_and_nan(dtype, implementation):
    f = functools.partial(residual_component_norm, mode="standard", implementation=implementation)
    for fill in (0, 1, 1e-30, 1e4):
        x = jnp.full(700, fill, dtype)
        assert f(x.at[300].set(-np.inf)) == np.inf
        assert np.isnan(f(x.at[300].set(np.nan)))
        assert np.isnan(f(x.at[300].set(np.nan).at[100].set(np.inf)))
        slope = jax.grad(f)(x.at[300].set(np.inf))
        assert np.array_equal(np.isnan(oracles.real(slope)), np.arange(700) == 300)

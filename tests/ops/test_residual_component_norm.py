"""residual_component_norm: the norm of what a residual contributes."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from battery import Operation

from syntonic_jax import PHI_INV, PhiResidualMode, residual_component_norm

pytestmark = pytest.mark.usefixtures("x64")


def formula(residual, mode):
    s, c = oracles.MODES[mode]
    return s * c * jnp.sqrt(jnp.sum(residual**2))


OPERATIONS = [
    Operation(
        mode,
        "residual_component_norm",
        functools.partial(residual_component_norm, mode=mode),
        functools.partial(formula, mode=mode),
        ("rows",),
        "",
        takes_dtype=False,
    )
    for mode in ("phi", "standard")
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS[:1]

    def test_debug_nans(self, operation, implementation, rng):
        # No finite or infinite data has NaN for a norm, but the slope at infinity is inf / inf.
        slope = jax.grad(operation.using(implementation))
        with jax.debug_nans(True):
            slope(jnp.ones(3))
            with pytest.raises(FloatingPointError, match="residual_component_norm_cotangent"):
                slope(jnp.array([1, jnp.inf]))


class TestTypes(battery.Types):
    operations = OPERATIONS[1:]


class TestBadInput(battery.BadInput):
    operations = OPERATIONS[:1]
    test_unknown_output_type = None  # the norm has the accumulation type


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("mode", oracles.MODES)
def test_accuracy(mode, dtype, implementation, rng):
    acc = oracles.accumulation(dtype)
    for shape in ((1,), (7,), (3, 5, 11), (1000,)):
        residual = jnp.asarray(rng.normal(size=shape), dtype)
        norm, pull = jax.vjp(
            lambda r: residual_component_norm(r, mode, implementation=implementation), residual
        )
        assert (norm.dtype, norm.shape) == (acc, ())
        estimate = oracles.residual_component_norm(residual, mode, acc=acc)
        oracles.assert_close(norm, estimate, f"norm of {shape}")
        ct = jnp.asarray(rng.normal(), acc)
        exact = oracles.residual_component_norm_vjp(residual, ct, mode, acc=acc)
        oracles.assert_close(pull(ct)[0], exact, f"slope at {shape}", flush=True)


def test_known_values(implementation):
    f = functools.partial(residual_component_norm, implementation=implementation)
    residual = jnp.array([3.0, -4.0])
    assert f(residual, "standard") == 5
    assert f(residual) == pytest.approx(5 * PHI_INV, rel=1e-15)
    assert f(residual, PhiResidualMode.PHI_SYMMETRIC) == pytest.approx(5 * PHI_INV, rel=1e-15)
    assert f(jnp.zeros(0)) == 0
    assert f(jnp.float32(-2), "standard") == 2


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_special_values(dtype, implementation):
    f = functools.partial(residual_component_norm, mode="standard", implementation=implementation)
    assert np.isnan(f(jnp.array([1, np.nan], dtype)))
    assert f(jnp.array([1, -np.inf], dtype)) == np.inf
    largest = jnp.array([oracles.info(dtype).max] * 2, dtype)
    acc = oracles.accumulation(dtype)
    # The square of float16's largest number is a float32; those of the others overflow.
    np.testing.assert_allclose(f(largest), formula(largest.astype(acc), "standard"), rtol=1e-6)


def test_sums_many_small_terms(implementation):
    # In bfloat16 or float16 the sum would stick at 256 or 2048.
    for dtype in ("float16", "bfloat16"):
        ones = jnp.ones((64, 1024), dtype)
        norm = residual_component_norm(ones, "standard", implementation=implementation)
        assert norm == 256


def test_unknown_mode():
    pattern = r"residual_component_norm: mode .*'phi', 'phi_symmetric', 'standard', got 'x'"
    with pytest.raises(ValueError, match=pattern):
        residual_component_norm(jnp.ones(3), "x")

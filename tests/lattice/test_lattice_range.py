"""On the lattice nothing finite is wrong where a step passes the range of a type."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_lattice
import pytest
from lattice_check import assert_nearest, coefficients
from oracles_lattice import Golden

from syntonic_jax import GoldenArray, crystallize
from syntonic_jax.lattice import syntony

pytestmark = pytest.mark.usefixtures("x64")


def all_sizes(rng, dtype, count) -> np.ndarray:
    limits = oracles.info(dtype)
    exponents = rng.integers(limits.minexp - limits.nmant, limits.maxexp, count)
    sizes = np.ldexp(rng.uniform(1, 2, count), exponents) * rng.choice([-1, 1], count)
    ends = [limits.max, -limits.max, limits.tiny, limits.smallest_subnormal]
    return np.concatenate([sizes, np.array(ends, "float64")]).astype(dtype)


@pytest.mark.parametrize("precision", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_points_of_numbers_of_all_sizes(dtype, precision, implementation, rng):
    x = all_sizes(rng, dtype, 100)
    assert_nearest(x, precision, *coefficients(x, precision, implementation))
    assert np.isfinite(oracles.real(crystallize(x, implementation=implementation))).all()


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_floats_of_all_coefficients(dtype, rng):
    """Also of those at the ends of int64, whose sums are not in it."""
    wide = rng.integers(-(2**63), 2**63, (2, 100)) >> rng.integers(0, 63, (2, 100))
    most, least = 2**63 - 1, -(2**63)
    a, b = np.concatenate([wide, [[most, least, most, least, 0], [most, least, least, most, 0]]], 1)
    got = oracles.real(GoldenArray(a, b).to_float(dtype))
    exact = [oracles_lattice.rounded(Golden(int(p), int(q)).value, dtype) for p, q in zip(a, b)]
    largest = float(oracles.info(dtype).max)
    exact = [v if abs(v) <= largest else np.copysign(np.inf, v) for v in exact]
    np.testing.assert_array_equal(got, exact)


# --- syntony --------------------------------------------------------------------------------------


def expected_syntony(x, norms) -> float:
    """In float80, whose range holds the squares of all float64."""
    x, norms = (np.asarray(oracles.real(n), np.longdouble) for n in (x, norms))
    weights = np.exp(-norms / np.longdouble(oracles.PHI))
    return float((weights * x**2).sum() / (x**2).sum())


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_syntony_does_not_hang_on_the_size_of_the_numbers(dtype, rng):
    """A power of two changes no bit, as long as no number becomes subnormal or infinite."""
    x = jnp.asarray(rng.uniform(1, 1.9, 60) * rng.choice([-1, 1], 60), dtype)
    norms = jnp.asarray(rng.uniform(0, 5, 60), "float32")
    f = jax.jit(syntony)
    value = f(x, norms)
    limits = oracles.info(dtype)
    for exponent in (limits.minexp, limits.maxexp - 1):
        factor = np.ldexp(1.0, exponent)
        assert f((x.astype("float64") * factor).astype(dtype), norms) == value
    # The derivative by small numbers overflows, as 1/x does.
    slope = jax.grad(syntony)((x.astype("float64") * factor).astype(dtype), norms)
    assert np.isfinite(oracles.real(slope)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_syntony_of_many_small_modes_beside_one_of_no_weight(dtype):
    """Their squares are below the range of the type, their sum is not."""
    small = 1e-20 if dtype != "float64" else 1.2e-154
    x = np.full(100_000, small).astype(dtype)
    norms = np.zeros(100_000, "float32")
    x[0], norms[0] = 1, 3e3
    got = syntony(jnp.asarray(x), jnp.asarray(norms))
    expected = expected_syntony(x, norms)
    assert expected > float(oracles.info(got.dtype).tiny)
    # Of 1e5 equal terms, summed in any order.
    np.testing.assert_allclose(float(got), expected, rtol=1e5 * oracles.unit(got.dtype))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_syntony_of_large_norms(dtype, rng):
    """Weights below the range are 0, those next to its end are right."""
    x = jnp.asarray(rng.uniform(1, 2, 6), dtype)
    acc = oracles.accumulation(dtype)
    for norm in (100.0, 138.0, 1e4, 3e38, np.inf):
        norms = jnp.full(6, norm, "float32")
        value, slopes = jax.value_and_grad(syntony, (0, 1))(x, norms)
        expected = np.exp(-norm / oracles.PHI)
        if expected < oracles.info(acc).tiny:
            expected = 0 if acc == "float32" else expected
        # The argument of exp errs by 2u of itself.
        np.testing.assert_allclose(
            value, expected, rtol=(4 * norm if norm < 200 else 1) * oracles.unit(acc)
        )
        for slope in slopes:
            assert np.isfinite(oracles.real(slope)).all()

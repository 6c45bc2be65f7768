"""A snap distance is the exact one, rounded once, whatever the size of the number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_lattice
import pytest
from oracles_lattice import Fraction

from syntonic_jax.lattice import snap_distance

pytestmark = pytest.mark.usefixtures("x64")

PRECISIONS = [1, 12, 100, 2**20]


def exact(x, precision) -> Fraction:
    a, b = oracles_lattice.nearest(float(x), precision)
    return abs(Fraction(float(x)) - a - b * oracles_lattice.PHI)


def assert_exact(x, precision, implementation):
    acc = oracles.accumulation(x.dtype.name)
    distance = snap_distance(jnp.asarray(x), precision, implementation=implementation)
    assert distance.dtype == acc
    for number, far in zip(oracles.real(x), oracles.real(distance), strict=True):
        assert far == oracles_lattice.rounded(exact(number, precision), acc), (number, precision)


def all_sizes(rng, dtype, count) -> np.ndarray:
    """Of either sign, with exponents over the whole range, subnormal numbers among them."""
    limits = oracles.info(dtype)
    exponents = rng.integers(limits.minexp - limits.nmant, limits.maxexp, count)
    sizes = np.ldexp(rng.uniform(1, 2, count), exponents)
    ends = [limits.max, limits.tiny, limits.smallest_subnormal, 0.0]
    powers = 2.0 ** np.arange(20, min(limits.maxexp, 90))  # their lower neighbour is twice as near
    numbers = np.concatenate([sizes, np.array(ends, "float64"), powers]).astype(dtype)
    return np.concatenate([numbers, -numbers])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_numbers_of_all_sizes(dtype, precision, implementation, rng):
    assert_exact(all_sizes(rng, dtype, 25), precision, implementation)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_next_to_points_and_beyond_the_end(dtype, precision, implementation, rng):
    """Of a difference that is far smaller than the number every bit counts."""
    a, b = rng.integers(-precision, precision + 1, (2, 100))
    end = precision * (1 + oracles.PHI) * np.array([1 - 1e-7, 1, 1 + 1e-15, 1 + 1e-7, 1.1, 2, 1e3])
    x = np.concatenate([a + b * oracles.PHI, end, -end]).astype(dtype)
    assert_exact(x, precision, implementation)


def test_what_users_met(implementation):
    f = functools.partial(snap_distance, implementation=implementation)
    assert f(np.float32(1.1e-29)) == np.float32(1.1e-29)
    assert f(np.float64(1.1e-20)) == 1.1e-20
    assert f(np.float32(34.044506), 12) == np.float32(2.6280982)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_the_derivative_is_a_sign(dtype, implementation):
    """Also of the second order, where it is 0, and where the number is its own distance."""
    x = jnp.asarray([1e-4, -1e-4, 0.0, 1.0, 6e4, -6e4, jnp.inf], dtype)

    def f(x):
        return snap_distance(x, implementation=implementation)

    signs = [1, -1, 0, 0, 1, -1, 0]
    y, pull = jax.vjp(f, x)
    assert oracles.real(pull(jnp.ones_like(y))[0]).tolist() == signs
    assert oracles.real(jax.jvp(f, (x,), (jnp.ones_like(x),))[1]).tolist() == signs
    second = jax.jvp(jax.grad(lambda x: f(x).sum()), (x,), (jnp.ones_like(x),))[1]
    assert not oracles.real(second).any()


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_the_derivative_of_either_zero(dtype, implementation):
    f = functools.partial(snap_distance, implementation=implementation)
    for zero in (0.0, -0.0):
        assert jax.grad(f)(jnp.asarray(zero, dtype)) == 0

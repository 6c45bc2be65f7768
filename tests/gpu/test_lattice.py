"""The kernel of crystallize, and float kernels on the lattice, against exact arithmetic."""

import jax.numpy as jnp
import lattice_check
import numpy as np
import oracles
import oracles_lattice
import pytest

from syntonic_jax import crystallize
from syntonic_jax.lattice import snap_distance

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("x64")]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_precision_up_to_300(dtype, rng):
    lattice_check.check_every_precision(dtype, rng, 300)


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 10**3), ("float64", 10**6)])
def test_random_precisions(dtype, largest, rng):
    for power in rng.uniform(0.5, 1, 3):
        precision = int(largest**power)
        x = oracles_lattice.difficult(rng, precision, dtype, 8)
        point = lattice_check.coefficients(x, precision, "cuda")
        lattice_check.assert_nearest(x, precision, *point)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("precision", [1, 5, 100, 1024, 1025])
def test_coefficients_are_those_of_jnp(dtype, precision, rng):
    """All of them, for a large array of odd size; the values to a unit in the last place."""
    x = np.concatenate([rng.normal(size=2**20), rng.uniform(-300, 300, 1003)]).astype(dtype)
    kernel, jnp_form = (lattice_check.coefficients(x, precision, i) for i in ("cuda", "xla"))
    for ours, theirs in zip(kernel, jnp_form, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    y, exact = (crystallize(x, precision, implementation=i) for i in ("cuda", "xla"))
    spacing = oracles.ulp(exact, dtype)
    assert (np.abs(oracles.real(y) - oracles.real(exact)) <= spacing).all()
    y, exact = (
        crystallize(x, precision, dtype="float64", implementation=i) for i in ("cuda", "xla")
    )
    assert (np.abs(y - exact) <= oracles.ulp(exact, "float64")).all()  # whatever the data are
    distance = snap_distance(x, precision, implementation="cuda")
    np.testing.assert_array_equal(distance, snap_distance(x, precision, implementation="xla"))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_not_finite(dtype):
    x = jnp.array([np.nan, np.inf, -np.inf, 1.0], dtype)
    y = crystallize(x, implementation="cuda")
    np.testing.assert_array_equal(oracles.real(y), [0, 0, 0, 1])


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("mode", oracles.MODES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_floats_agree_with_exact_arithmetic(dtype, mode, activation, rng):
    """As tests/lattice/test_exact_oracle.py does; integers are exact in every type."""
    for limits in ((200, 200, 200, 200), (200, 0, 200, 0)):
        values = [rng.integers(-n, n + 1, 1000) for n in limits]
        lattice_check.check_phi_residual(values, dtype, mode, activation, "cuda")

"""crystallize: against every candidate tried, and exact fractions where two are close."""

import functools
import math

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_lattice
import pytest
from battery import Operation
from lattice_check import assert_nearest, check_every_precision, coefficients

from syntonic_jax import crystallize
from syntonic_jax.lattice import GoldenArray, snap_distance
from syntonic_jax.lattice import _crystallize as module

pytestmark = pytest.mark.usefixtures("x64")

PRECISION = 5


def formula(x):
    """Straight-through, of the nearest of all candidates."""
    b = jnp.arange(-PRECISION, PRECISION + 1)
    rest = jax.lax.stop_gradient(x)[..., None] - b * oracles.PHI
    a = jnp.clip(jnp.round(rest), -PRECISION, PRECISION)
    best = jnp.argmin(jnp.abs(rest - a), -1, keepdims=True)
    y = jnp.take_along_axis(a + b * oracles.PHI, best, -1)[..., 0]
    return x + jax.lax.stop_gradient(y - x)


OPERATIONS = [
    Operation(
        *("crystallize", "crystallize", functools.partial(crystallize, precision=PRECISION)),
        *(formula, ("rows",), ""),
    )
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS
    test_check_grads = None  # the derivative is not that of the steps
    test_debug_nans = None  # there is no NaN


class TestTypes(battery.Types):
    operations = OPERATIONS


class TestBadInput(battery.BadInput):
    operations = OPERATIONS


# --- the nearest, always --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_precision_up_to_300(dtype, rng):
    """One program, the precision being traced: what depends on it statically is a bound."""
    search = jax.jit(lambda x, p: module._nearest(x, p, 300))
    sizes = set()
    for precision in range(1, 301):
        x = oracles_lattice.difficult(rng, precision, dtype, 12)
        assert_nearest(x, precision, *search(x, jnp.int32(precision)))
        sizes.add(len(x))
    assert len(sizes) == 1  # compiled once


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_precision_by_the_kernels_function(dtype, rng, installed_double):
    check_every_precision(dtype, rng, 300)


@pytest.mark.parametrize(
    ("dtype", "largest", "count"), [("float32", 10**3, 100), ("float64", 10**6, 8)]
)
def test_random_precisions(dtype, largest, count, implementation, rng):
    for power in rng.uniform(0.5, 1, 2):
        precision = int(largest**power)
        x = oracles_lattice.difficult(rng, precision, dtype, count)
        assert_nearest(x, precision, *coefficients(x, precision, implementation))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_largest_precision(dtype, implementation, rng):
    x = oracles_lattice.difficult(rng, 2**20, dtype, 2)
    assert_nearest(x, 2**20, *coefficients(x, 2**20, implementation))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype, implementation, rng):
    x = oracles_lattice.difficult(rng, 100, "float32", 50)
    x = np.clip(x, -6e4, 6e4).astype(dtype)
    assert_nearest(x, 100, *coefficients(x, 100, implementation))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_ties(dtype, implementation):
    """A half-integer is as far from a + bφ as from its mirror image: the smaller |a| wins."""
    x = np.array([0.5, -0.5, 1.5, -2.5, 40.5], dtype)
    a, b = map(np.asarray, coefficients(x, 100, implementation))
    assert_nearest(x, 100, a, b)
    mirrored = np.rint(2 * oracles.real(x)).astype(int) - a
    assert (np.abs(a) < np.abs(mirrored)).all()
    assert (b != 0).all()


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_not_finite(dtype, implementation):
    x = jnp.array([np.nan, np.inf, -np.inf, 1.0], dtype)
    y, pull = jax.vjp(lambda x: crystallize(x, implementation=implementation), x)
    np.testing.assert_array_equal(oracles.real(y), [0, 0, 0, 1])
    np.testing.assert_array_equal(oracles.real(pull(jnp.ones_like(x))[0]), np.ones(4))
    distance = snap_distance(x, implementation=implementation)
    assert distance.dtype == oracles.accumulation(dtype)
    np.testing.assert_array_equal(oracles.real(distance), [np.inf, np.inf, np.inf, 0])
    with jax.debug_nans(True):
        crystallize(x, implementation=implementation)
        snap_distance(x, implementation=implementation)


def test_beyond_the_lattice(implementation):
    x = jnp.array([300.0, -1e30, 262.0])
    y = crystallize(x, 100, implementation=implementation)
    end = 100 * (1 + oracles.PHI)
    np.testing.assert_allclose(y[:2], [end, -end], rtol=1e-15)
    distance = snap_distance(x, 100, implementation=implementation)
    np.testing.assert_allclose(distance[:2], [300 - end, 1e30 - end], rtol=1e-14)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", oracles.DTYPES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("precision", [100, pytest.param(1024, marks=pytest.mark.slow)])
def test_values(dtype, out, precision, implementation, rng):
    """One rule: jnp rounds the exact value once. The kernel adds in float32 (float64 where the data
    or the result are), with an error of one more unit in the last place of that.
    """
    x = np.concatenate(
        [rng.uniform(-0.01, 0.01, 50), rng.uniform(-2, 2, 50), rng.uniform(-260, 260, 50)]
    ).astype(dtype)
    y = crystallize(x, precision, dtype=out, implementation=implementation)
    assert y.dtype == out
    a, b = coefficients(x, precision, implementation)
    for number, *point in zip(oracles.real(y), np.asarray(a), np.asarray(b), strict=True):
        exact = oracles_lattice.Golden(*map(int, point)).value
        if implementation == "xla":
            assert number == oracles_lattice.rounded(exact, out)
        else:
            sums = oracles.accumulation("float64" if "float64" in (dtype, out) else dtype)
            spare = oracles.unit(sums) / oracles.unit(out)
            assert oracles_lattice.ulps(number, exact, out) <= 0.5 + 2 * spare


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_snap_distance(dtype, implementation, rng):
    x = rng.normal(size=100).astype(dtype)
    acc = oracles.accumulation(dtype)
    distance = snap_distance(x, 100, implementation=implementation)
    assert distance.dtype == acc
    for number, far in zip(oracles.real(x), oracles.real(distance), strict=True):
        a, b = oracles_lattice.nearest(float(number), 100)
        exact = abs(oracles_lattice.Fraction(float(number)) - a - b * oracles_lattice.PHI)
        # 128 bits behind the point hold 2^-120 of b φ; the distance of a float64 is above 2^-60.
        assert far == oracles_lattice.rounded(exact, acc)


def test_derivative_of_snap_distance(implementation):
    x = jnp.array([0.3, 0.41, 1.0])
    f = functools.partial(snap_distance, precision=2, implementation=implementation)
    slope = jax.grad(lambda x: f(x).sum())(x)
    np.testing.assert_array_equal(slope, [-1, 1, 0])  # around 2 - φ = 0.382, and at 1
    assert jax.jvp(f, (x,), (jnp.ones(3),))[1].tolist() == slope.tolist()


def test_coefficients_have_no_derivative():
    def through(x):
        lattice = GoldenArray.from_float(x, 10)
        return jnp.sum(lattice.to_float("float64") * x)

    # Integers have none: what is left is that of the factor.
    x = jnp.array([0.3, 2.0])
    np.testing.assert_array_equal(
        jax.grad(through)(x), GoldenArray.from_float(x, 10).to_float("float64")
    )


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [crystallize, snap_distance, GoldenArray.from_float])
def test_precision_is_checked(f):
    name = f.__qualname__
    f(jnp.ones(2), 1)  # to jit's cache, 1 equals the first two
    for wrong in (1.0, True, "100", None, jnp.float32(3)):
        with pytest.raises(TypeError, match=rf"{name}: precision must be .*integer.*, got "):
            f(jnp.ones(2), wrong)
    for wrong in (0, -1, 2**20 + 1):
        with pytest.raises(ValueError, match=rf"{name}: precision must lie .*1048576, got {wrong}"):
            f(jnp.ones(2), wrong)
    for right in (np.int64(1), np.array(1), jnp.int32(1)):
        assert f(jnp.ones(2), right) is not None


@pytest.mark.parametrize("f", [snap_distance, GoldenArray.from_float])
def test_data_is_checked(f):
    for wrong in (jnp.ones(2, "int32"), 1j):
        with pytest.raises(TypeError, match=rf"{f.__qualname__}: x must be float16.*got "):
            f(wrong)
    with pytest.raises(ValueError, match=rf"{f.__qualname__}: implementation .*'triton'"):
        f(jnp.ones(2), implementation="triton")


# --- the search -----------------------------------------------------------------------------------


def test_search_takes_logarithmically_many_levels():
    for precision in (1, 10, 100, 1000, 10**6):
        levels = len(module._levels(precision))
        assert levels <= 2 + math.log(2 * precision + 1) / math.log(oracles.PHI)


def test_near_the_middle_and_beyond(implementation, rng):
    """The two ways of the kernel."""
    x = np.concatenate([rng.normal(size=500), rng.uniform(62, 262, 500)]).astype("float32")
    assert_nearest(x, 100, *coefficients(x, 100, implementation))

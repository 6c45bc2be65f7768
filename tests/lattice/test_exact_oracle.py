"""Floating point against exact arithmetic on the lattice; and a ResonantTensor's two states."""

import battery
import jax
import jax.numpy as jnp
import lattice_check
import numpy as np
import oracles
import oracles_lattice
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles_lattice import Fraction, Golden

import syntonic_jax
from syntonic_jax import PhiResidualMode, phi_residual, phi_residual_gelu, phi_residual_relu
from syntonic_jax.lattice import GoldenArray, ResonantPhase, ResonantTensor, syntony

MODES = list(oracles.MODES)
PROPERTY = settings(
    deadline=None,
    max_examples=6,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def coefficients(limit):
    """Four arrays: identity a + bφ and residual c + dφ."""
    n = 4 * lattice_check.SIZE
    small = st.lists(st.integers(-limit, limit), min_size=n, max_size=n)
    # Integers are exact in every type here: no error of the operands hides one of the operation.
    return st.one_of(
        small,
        small.map(
            lambda x: [v if i // lattice_check.SIZE % 2 == 0 else 0 for i, v in enumerate(x)]
        ),
    )


@pytest.mark.parametrize("activation", battery.thinned([None, "relu"]))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@PROPERTY
@given(values=coefficients(200))
def test_floats_agree_with_exact_arithmetic(dtype, mode, activation, implementation, x64, values):
    lattice_check.check_phi_residual(values, dtype, mode, activation, implementation)


def chain(dtype, mode, start, residuals):
    """Sums after every step, in floats."""

    def step(z, r):
        z = phi_residual(z, r, mode)
        return z, z

    return jax.jit(lambda z, r: jax.lax.scan(step, z, r)[1])(
        start.astype(dtype), residuals.astype(dtype)
    )


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_a_thousand_steps(dtype, rng, x64):
    """Every step adds half a unit in the last place of its sum at most, and what its terms err by:
    the operand itself, and the constant and the product, 2u of residual/φ.
    """
    steps, size = 1000, 8
    a, b = rng.integers(-100, 101, (2, steps, size)).astype("int32")
    start = ResonantTensor.ones(size)
    residuals = ResonantTensor(GoldenArray(a, b))

    exact, _ = jax.lax.scan(
        lambda z, r: (phi_residual(z, ResonantTensor(r)), None), start, residuals.lattice
    )
    # φ⁻¹ (a + bφ) = (b - a) + aφ, so that the sum of all is known in Python's integers.
    b_minus_a = (b.astype(int) - a).sum(0)
    np.testing.assert_array_equal(exact.lattice.a, 1 + b_minus_a)
    np.testing.assert_array_equal(exact.lattice.b, a.astype(int).sum(0))

    given_residuals = residuals.to_floats("float64").astype(dtype)
    sums = oracles.real(chain(dtype, "phi", start.to_floats("float64"), given_residuals))
    u = oracles.unit(oracles.accumulation(dtype))
    r = oracles.real(given_residuals)
    terms = np.abs(r - oracles.real(residuals.to_floats("float64"))) + 2 * u * np.abs(r)
    allowed = (oracles.ulp(sums, dtype) / 2 + u * np.abs(sums) + oracles.PHI_INV * terms).sum(0)
    allowed += steps * 2.0**-52 * np.abs(r).max()  # of float64, in which all this is measured
    values = [Golden(int(p), int(q)).value for p, q in zip(exact.lattice.a, exact.lattice.b)]
    drift = np.array([float(abs(Fraction(float(z)) - v)) for z, v in zip(sums[-1], values)])
    assert (drift <= allowed).all()
    assert drift.max() > 0 or dtype == "float64"


# --- ResonantTensor -------------------------------------------------------------------------------


def test_the_preview_of_the_original():
    identity = ResonantTensor.ones([64, 128], precision=100)
    residual = ResonantTensor.ones([64, 128], precision=100)
    output = phi_residual(identity, residual, PhiResidualMode("phi"))
    assert output.shape == (64, 128)
    assert (output.lattice == GoldenArray(0, 1)).all()  # 1 + 1/φ = φ
    relu = phi_residual_relu(identity, residual)
    assert (relu.lattice == GoldenArray(0, 1)).all()
    assert (phi_residual(identity, identity, "phi_symmetric").lattice == GoldenArray(-2, 2)).all()
    assert (phi_residual(identity, identity, "standard").lattice == 2).all()


@pytest.mark.parametrize("mode", MODES)
def test_relu_is_exact(mode, rng):
    values = rng.integers(-20, 20, (4, 50)).astype("int32")
    x, r = (ResonantTensor(GoldenArray(*ab)) for ab in (values[:2], values[2:]))
    z, y = phi_residual(x, r, mode).lattice, phi_residual_relu(x, r, mode).lattice
    positive = np.asarray(z.sign()) > 0
    np.testing.assert_array_equal(y.a, np.where(positive, z.a, 0))
    np.testing.assert_array_equal(y.b, np.where(positive, z.b, 0))
    assert 0 < positive.sum() < 50


def test_phases(rng):
    x = rng.normal(size=(3, 4)).astype("float32")
    tensor = ResonantTensor.from_floats(x, precision=30)
    expected = GoldenArray.from_float(x, 30)
    assert tensor.phase is ResonantPhase.CRYSTALLIZED
    assert tensor.values is None
    assert (tensor.lattice == expected).all()
    loose = tensor.flux("bfloat16")
    assert (loose.phase, loose.values.dtype, loose.precision) == ("flux", jnp.bfloat16, 30)
    np.testing.assert_array_equal(loose.values, expected.to_float("bfloat16"))
    np.testing.assert_array_equal(tensor.to_floats(), expected.to_float())
    moved = loose.with_values(x + 1)
    np.testing.assert_array_equal(moved.to_floats(), x + 1)
    assert moved.lattice is None
    again = moved.crystallize()
    assert again.phase == "crystallized"
    assert (again.lattice == GoldenArray.from_float(x + 1, 30)).all()
    assert "flux" in repr(loose)
    assert "crystallized" in repr(again)
    assert (ResonantTensor.zeros(3).lattice == 0).all()
    np.testing.assert_array_equal(ResonantTensor.from_floats(np.nan).to_floats(), 0)


def test_transformations_of_tensors(rng):
    x = ResonantTensor.from_floats(rng.normal(size=(4, 3)), 50)
    y = jax.jit(phi_residual)(x, x)
    assert (y.lattice == x.lattice * GoldenArray(0, 1)).all()
    assert (jax.vmap(phi_residual)(x, x).lattice == y.lattice).all()
    loose = jax.jit(lambda x: x.flux())(x)
    assert loose.phase == "flux"
    assert jax.jit(lambda x: x.crystallize())(loose).precision == 50
    # Through flux and crystallize nothing moves: the floats are nearest to where they came from.
    assert (loose.crystallize().lattice == x.lattice).all()
    leaves = jax.tree_util.tree_flatten_with_path(loose)[0]
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".values"]
    leaves = jax.tree_util.tree_flatten_with_path(x)[0]
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".lattice.a", ".lattice.b"]


def test_wrong_phases():
    x = ResonantTensor.ones(3)
    loose = x.flux()
    for action in (loose.flux, x.crystallize, lambda: x.with_values(jnp.ones(3))):
        with pytest.raises(ValueError, match=r"ResonantTensor\.\w+: .* must be in the phase .*got"):
            action()
    with pytest.raises(
        ValueError, match="phi_residual: residual must be in the phase crystallized"
    ):
        phi_residual(x, loose)
    with pytest.raises(ValueError, match="phi_residual_relu: identity must be in the phase"):
        phi_residual_relu(loose, x)


def test_bad_input():
    x = ResonantTensor.ones(3)
    with pytest.raises(TypeError, match=r"lattice must be a GoldenArray, got .*from_floats"):
        ResonantTensor(jnp.ones(3))
    with pytest.raises(ValueError, match=r"ResonantTensor: precision must lie .*got 0"):
        ResonantTensor(x.lattice, 0)
    for make in (ResonantTensor.ones, ResonantTensor.zeros):
        with pytest.raises(TypeError, match=rf"ResonantTensor.{make.__name__}: precision must be"):
            make(3, 1.5)
    with pytest.raises(
        TypeError, match=r"ResonantTensor.from_floats: x must be float16.*got int32"
    ):
        ResonantTensor.from_floats(jnp.ones(3, int))
    with pytest.raises(TypeError, match=r"ResonantTensor.flux: dtype must be float16.*got int32"):
        x.flux("int32")
    with pytest.raises(TypeError, match=r"ResonantTensor.to_floats: dtype must be"):
        x.to_floats("complex64")
    with pytest.raises(TypeError, match="with_values: values must be float16"):
        x.flux().with_values(jnp.ones(3, int))
    with pytest.raises(
        ValueError, match=r"with_values: values must have the shape \(3,\), got \(4,"
    ):
        x.flux().with_values(jnp.ones(4))


def test_operands_do_not_mix():
    x = ResonantTensor.ones(3)
    for other in (jnp.ones(3), x.lattice, 1.0):
        with pytest.raises(
            TypeError, match=r"phi_residual: residual must be a ResonantTensor.*got"
        ):
            phi_residual(x, other)
        with pytest.raises(
            TypeError, match=r"phi_residual: identity must be a ResonantTensor.*got"
        ):
            phi_residual(other, x)
    with pytest.raises(TypeError, match="identity must be an array, got GoldenArray"):
        phi_residual(x.lattice, x.lattice)
    with pytest.raises(ValueError, match=r"same shape, got \(3,\) and \(4,\)"):
        phi_residual(x, ResonantTensor.ones(4))
    with pytest.raises(
        ValueError, match=r"phi_residual_gelu: activation of a ResonantTensor .*'gelu'"
    ):
        phi_residual_gelu(x, x)
    with pytest.raises(ValueError, match="dtype must be None for a ResonantTensor, got float32"):
        phi_residual(x, x, dtype="float32")
    with pytest.raises(ValueError, match=r"implementation must be None or 'xla' .*got 'cuda'"):
        phi_residual(x, x, implementation="cuda")
    assert phi_residual(x, ResonantTensor.ones(3, 200)).precision == 200


# --- syntony --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_syntony(dtype, rng, x64):
    """A quotient of two sums of 60 positive terms, each of a few roundings."""
    x = jnp.asarray(rng.normal(size=(5, 12)), dtype)
    norms = rng.integers(0, 10, 12).astype("float64")
    got = syntony(x, jnp.asarray(norms, "float32"))
    acc = oracles.accumulation(dtype)
    assert (got.dtype, got.shape) == (acc, ())
    squares = oracles.real(x) ** 2
    expected = (np.exp(-norms / oracles.PHI) * squares).sum() / squares.sum()
    # exp of -n/φ down to -6: its argument errs by 2u of itself.
    assert abs(float(got) - expected) <= (2 * 60 + 2 * oracles.STEPS) * oracles.unit(acc) * expected


def test_syntony_at_the_ends(x64):
    x = jnp.asarray([3.0, 4.0])
    assert syntony(x, jnp.zeros(2)) == 1
    assert syntony(x, jnp.full(2, 1e4)) == 0
    assert syntony(jnp.zeros(2), jnp.zeros(2)) == 0
    assert syntony(x.astype("float32") * 1e37, jnp.zeros(2)) == 1
    np.testing.assert_array_equal(jax.grad(syntony)(jnp.zeros(2), jnp.zeros(2)), 0)
    norms = jnp.asarray([0.0, 1.0])
    slope = jax.grad(syntony)(x, norms)
    weight = np.exp(-1 / oracles.PHI)
    # S = (9 + 16w) / 25: dS/dx_i = 2 x_i (w_i - S) / 25
    value = (9 + 16 * weight) / 25
    np.testing.assert_allclose(slope, [6 * (1 - value) / 25, 8 * (weight - value) / 25], rtol=1e-14)


def test_syntony_of_bad_input():
    with pytest.raises(TypeError, match="syntony: x must be float16"):
        syntony(jnp.ones(3, int), jnp.ones(3))
    with pytest.raises(TypeError, match="syntony: mode_norms must be float16"):
        syntony(jnp.ones(3), jnp.ones(3, int))
    for norms in (jnp.ones(4), jnp.ones((1, 3))):
        with pytest.raises(ValueError, match=r"mode_norms must broadcast to the shape \(3,\) of x"):
            syntony(jnp.ones(3), norms)


def test_names():
    assert {"GoldenArray", "ResonantTensor", "crystallize"} <= set(syntonic_jax.__all__)
    assert oracles_lattice.rounded(Fraction(1, 3), "float32") == np.float32(1) / np.float32(3)

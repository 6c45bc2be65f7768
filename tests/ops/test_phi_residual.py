"""phi_residual, its modes and activations, phi_residual_relu and phi_residual_gelu."""

import functools
import itertools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from battery import Operation

import syntonic_jax
from syntonic_jax import (
    PHI,
    PHI_INV,
    PhiResidualMode,
    phi_residual,
    phi_residual_gelu,
    phi_residual_relu,
)

pytestmark = pytest.mark.usefixtures("x64")

ACTIVATIONS = (None, "relu", "gelu", "golden_gelu")
JNP_ACTIVATIONS = {
    None: lambda z: z,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "golden_gelu": lambda z: z * jax.nn.sigmoid(oracles.PHI * z),
}


def formula(identity, residual, mode, activation):
    s, c = oracles.MODES[mode]
    return JNP_ACTIVATIONS[activation](s * (identity + c * residual))


def off_the_kink(identity, residual):
    """Branches whose symmetric sum is no nearer to 0 than 0.1."""
    return identity + 0.2 * jnp.sign(identity + residual).astype(identity.dtype), residual


def operation(mode, activation):
    return Operation(
        f"{mode}-{activation}",
        "phi_residual",
        functools.partial(phi_residual, mode=mode, activation=activation),
        functools.partial(formula, mode=mode, activation=activation),
        ("rows", "rows"),
        "phi_residual",
        linear=activation is None,
        **({"adjust": off_the_kink} if activation == "relu" else {}),
    )


# Every activation and every mode in the battery; every pair of them below, against the oracle.
OPERATIONS = [
    operation("phi", None),
    operation("phi_symmetric", "relu"),
    operation("standard", "gelu"),
    operation("phi", "golden_gelu"),
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS[:2]
    variants = OPERATIONS[2:]


class TestTypes(battery.Types):
    operations = OPERATIONS[2:]
    variants = OPERATIONS[:2]


class TestBadInput(battery.BadInput):
    operations = (
        OPERATIONS[0],
        Operation("relu", "phi_residual_relu", phi_residual_relu, formula, ("rows", "rows"), ""),
        Operation("gelu", "phi_residual_gelu", phi_residual_gelu, formula, ("rows", "rows"), ""),
    )


# --- the original's checks, by name ---------------------------------------------------------------

IDENTITY, RESIDUAL = np.ones(4), np.array([1.0, 2.0, 3.0, 4.0])


def test_phi(implementation):
    z = phi_residual(IDENTITY, RESIDUAL, implementation=implementation)
    np.testing.assert_allclose(z, [1.618, 2.236, 2.854, 3.472], atol=5e-4)
    np.testing.assert_allclose(z, 1 + RESIDUAL / PHI, rtol=1e-15)


def test_symmetric(implementation):
    z = phi_residual(IDENTITY, RESIDUAL, "phi_symmetric", implementation=implementation)
    np.testing.assert_allclose(z, (1 + RESIDUAL) / PHI, rtol=1e-15)


def test_standard(implementation):
    z = phi_residual(IDENTITY, RESIDUAL, "standard", implementation=implementation)
    np.testing.assert_array_equal(z, 1 + RESIDUAL)


@pytest.mark.parametrize("function", [phi_residual, phi_residual_relu, phi_residual_gelu])
@pytest.mark.parametrize("shapes", [((4,), (5,)), ((2, 3), (3,)), ((2, 3), (1, 3)), ((4,), ())])
def test_shape_mismatch(function, shapes):
    pattern = rf"{function.__name__}: identity and residual .*\({shapes[0][0]},.*\("
    with pytest.raises(ValueError, match=pattern) as error:
        function(jnp.ones(shapes[0]), jnp.ones(shapes[1]))
    assert all(str(shape) in str(error.value) for shape in shapes)


def test_magnitude(implementation):
    # Orthogonal branches of norm 10 each.
    identity, residual = np.array([10.0, 0.0]), np.array([0.0, 10.0])

    def norm(mode):
        z = phi_residual(identity, residual, mode, implementation=implementation)
        return float(jnp.linalg.norm(z))

    assert norm("standard") == pytest.approx(14.142, abs=5e-4)
    assert norm("phi") == pytest.approx(11.756, abs=5e-4)
    assert norm("phi") / norm("standard") == pytest.approx(0.8313, abs=5e-5)


def test_relu_clamps_negatives(implementation):
    identity, residual = np.array([-3.0, 1.0, -1.0, 0.5]), np.array([1.0, -1.0, 1.0, -2.0])
    for mode, (s, c) in oracles.MODES.items():
        y = phi_residual_relu(identity, residual, mode, implementation=implementation)
        np.testing.assert_allclose(y, np.maximum(s * (identity + c * residual), 0), rtol=1e-15)
        assert np.min(y) == 0


# --- accuracy -------------------------------------------------------------------------------------


def operands(rng, dtype, out):
    def draw(dtype):
        return jnp.asarray(rng.normal(size=300) * 2.0 ** rng.integers(-4, 4, size=300), dtype)

    return draw(dtype), draw(dtype), draw(out)


def check_accuracy(identity, residual, ct, mode, activation, implementation):
    dtype, out = identity.dtype, ct.dtype
    acc = oracles.accumulation(dtype)
    y, pull = jax.vjp(
        lambda *x: phi_residual(
            *x, mode, activation=activation, dtype=out, implementation=implementation
        ),
        identity,
        residual,
    )
    d_identity, d_residual = pull(ct)
    assert (y.dtype, d_identity.dtype, d_residual.dtype) == (out, dtype, dtype)
    label = f"{mode}, {activation}: "
    expected = oracles.phi_residual(identity, residual, mode, activation, acc=acc)
    oracles.assert_close(y, expected, label + "y", flush=True)
    expected = oracles.phi_residual_vjp(
        identity, residual, ct, mode, activation, acc=acc, stored=dtype
    )
    oracles.assert_close(d_identity, expected[0], label + "d_identity", flush=True)
    oracles.assert_close(d_residual, expected[1], label + "d_residual", flush=True)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", oracles.MODES)
def test_accuracy(mode, activation, dtype, implementation, rng):
    check_accuracy(*operands(rng, dtype, dtype), mode, activation, implementation)


@pytest.mark.parametrize(("dtype", "out"), [*itertools.permutations(oracles.DTYPES, 2)])
def test_accuracy_with_another_output_type(dtype, out, implementation, rng):
    for activation in ACTIVATIONS:
        check_accuracy(*operands(rng, dtype, out), "phi", activation, implementation)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation, dtype, implementation):
    """NaN, infinity and overflow as in the jnp composition in the accumulation type."""
    largest = float(oracles.info(dtype).max)
    special = [np.nan, np.inf, -np.inf, largest, -largest, 0.0, 1.0]
    pairs = np.array(list(itertools.product(special, special))).T
    identity, residual = (jnp.asarray(x, dtype) for x in pairs)
    acc = oracles.accumulation(dtype)
    for mode in oracles.MODES:
        y = phi_residual(
            identity, residual, mode, activation=activation, implementation=implementation
        )
        expected = formula(identity.astype(acc), residual.astype(acc), mode, activation)
        expected = np.asarray(expected.astype(dtype), "float64")
        # Two last places: the finite ones of these were checked for accuracy elsewhere.
        np.testing.assert_allclose(
            np.asarray(y, "float64"), expected, rtol=2 * float(oracles.info(dtype).eps)
        )


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_subnormal(dtype, implementation):
    acc = oracles.accumulation(dtype)
    tiny = float(max(oracles.info(t).smallest_normal for t in (dtype, acc)))
    identity = jnp.array([tiny / 4, tiny / 2, tiny, -tiny, 5 * tiny, 9 * tiny], dtype)
    residual = jnp.array([tiny / 4, -tiny, tiny, tiny / 2, 7 * tiny, tiny], dtype)
    for mode, activation in itertools.product(oracles.MODES, ACTIVATIONS):
        y = phi_residual(
            identity, residual, mode, activation=activation, implementation=implementation
        )
        # The residual may be flushed before it is scaled and after that.
        scale = PHI_INV if mode == "phi" else 1
        branches = [
            (identity, residual),
            (oracles.flushed(identity, acc), residual),
            (identity, oracles.flushed(scale * oracles.real(residual), acc) / scale),
            (oracles.flushed(identity, acc), oracles.flushed(residual, acc)),
            (
                oracles.flushed(identity, acc),
                oracles.flushed(scale * oracles.real(residual), acc) / scale,
            ),
        ]
        oracles.assert_kept_or_flushed(
            y, [oracles.phi_residual(i, r, mode, activation, acc=acc) for i, r in branches]
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_slope_of_relu_where_its_result_is_too_small_for_its_type(dtype, implementation):
    """The backward pass of a relu reads y, but not where that has lost the sign of z."""
    x = jnp.array([1e-8, -1e-8, 1.0, 0.0], dtype)

    def f(identity, residual):
        return phi_residual_relu(identity, residual, dtype="float16", implementation=implementation)

    y, pull = jax.vjp(f, x, 0 * x)
    assert y[0] == 0
    d_identity, d_residual = pull(jnp.ones_like(y))
    np.testing.assert_array_equal(oracles.real(d_identity), [1, 0, 1, 0])
    np.testing.assert_array_equal(oracles.real(d_residual) != 0, [True, False, True, False])


# --- definitions ----------------------------------------------------------------------------------


def test_constants():
    assert PHI == 1.6180339887498948482 == syntonic_jax.PHI
    assert PHI_INV == 0.6180339887498948482


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_relu_has_slope_zero_at_zero(dtype, implementation):
    identity = jnp.array([1.0, -2.0, 0.0, -0.0], dtype)
    for order in (1, 2):
        f = functools.partial(phi_residual_relu, mode="standard", implementation=implementation)
        for _ in range(order):
            f = functools.partial(lambda f, x, r: jax.grad(lambda x: f(x, r).sum())(x), f)
        np.testing.assert_array_equal(f(identity, -identity), np.zeros(4))


def test_named_activations(implementation, rng):
    identity, residual = jnp.asarray(rng.normal(size=(2, 5, 7)), "float32")
    for mode in oracles.MODES:
        for function, activation in ((phi_residual_relu, "relu"), (phi_residual_gelu, "gelu")):
            np.testing.assert_array_equal(
                function(identity, residual, mode, implementation=implementation),
                phi_residual(
                    identity, residual, mode, activation=activation, implementation=implementation
                ),
            )


def test_modes_are_members_of_an_enum():
    assert PhiResidualMode("phi") is PhiResidualMode.PHI == "phi"
    assert str(PhiResidualMode("phi_symmetric")) == "phi_symmetric"
    assert repr(PhiResidualMode("phi")) == "PhiResidualMode('phi')"
    assert [mode.value for mode in PhiResidualMode] == ["phi", "phi_symmetric", "standard"]
    for mode in PhiResidualMode:
        np.testing.assert_array_equal(
            phi_residual(IDENTITY, RESIDUAL, mode), phi_residual(IDENTITY, RESIDUAL, mode.value)
        )


def test_scalars_and_weak_types(implementation):
    f = functools.partial(phi_residual, implementation=implementation)
    assert f(1.0, 2.0) == pytest.approx(1 + 2 * PHI_INV, rel=1e-15)
    assert f(jnp.bfloat16(1), 2.0).dtype == jnp.bfloat16  # a Python number takes the other's type
    assert f(1.0, jnp.float16(2)).dtype == jnp.float16
    assert f(jnp.float32(1), np.float32(2)).shape == ()


def test_numpy_operands(implementation, rng):
    identity, residual = rng.normal(size=(2, 3, 4)).astype("float32")
    z = phi_residual(identity, residual, implementation=implementation)
    assert isinstance(z, jax.Array)
    assert z.dtype == "float32"


@pytest.mark.parametrize("mode", oracles.MODES)
def test_plain_sum_is_linear(mode, implementation, rng):
    """Its tangent is the sum of the tangents, its transpose that of the formula."""
    x, r = (jnp.asarray(rng.normal(size=(3, 5))) for _ in range(2))
    f = functools.partial(phi_residual, mode=mode, implementation=implementation)
    out, pushed = jax.jvp(f, (x, r), (r, -r))
    battery.assert_same(pushed, f(r, -r))
    if mode != "phi":
        assert np.all(pushed == 0)  # rounding has nothing to add
    g = functools.partial(formula, mode=mode, activation=None)
    battery.assert_same(jax.linear_transpose(f, x, r)(out), jax.linear_transpose(g, x, r)(out))


def test_what_is_not_linear_has_no_transpose(implementation):
    f = functools.partial(phi_residual, activation="relu", implementation=implementation)
    with pytest.raises(NotImplementedError, match=r"phi_residual: .*got activation='relu'"):
        jax.linear_transpose(f, IDENTITY, RESIDUAL)(IDENTITY)


@pytest.mark.parametrize("mode", ["golden", "PHI", None, 1])
def test_unknown_mode(mode):
    pattern = rf"phi_residual: mode .*'phi', 'phi_symmetric', 'standard', got {mode!r}"
    with pytest.raises(ValueError, match=pattern):
        phi_residual(IDENTITY, RESIDUAL, mode)


@pytest.mark.parametrize("activation", ["swish", "none", jax.nn.relu])
def test_unknown_activation(activation):
    pattern = r"phi_residual: activation .*None, 'relu', 'gelu'.*'golden_gelu', got .*"
    with pytest.raises(ValueError, match=pattern):
        phi_residual(IDENTITY, RESIDUAL, activation=activation)

"""phi_residual_layernorm: a golden sum and the layer norm of it."""

import functools
import itertools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from battery import Operation
from jax.test_util import check_grads

from syntonic_jax import PHI_INV, phi_residual, phi_residual_layernorm

pytestmark = pytest.mark.usefixtures("x64")

VARIANCES = {"golden": oracles.PHI_INV, "standard": 1.0}


def formula(identity, residual, scale=None, bias=None, *, mode, epsilon, variance, return_sum):
    s, c = oracles.MODES[mode]
    z = s * (identity + c * residual)
    centred = z - jnp.mean(z, -1, keepdims=True)
    y = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + epsilon)
    y = y * np.sqrt(variance).item()
    # Written out, so that it may be compared where implicit rank promotion is an error.
    y = y if scale is None else y * jnp.broadcast_to(scale, y.shape)
    y = y if bias is None else y + jnp.broadcast_to(bias, y.shape)
    return (y, z) if return_sum else y


def operation(label, parameters, mode, target_variance, return_sum):
    """`parameters` names the operands that follow identity and residual."""

    def named(f, **options):
        def call(identity, residual, *values, **more):
            return f(
                identity,
                residual,
                **dict(zip(parameters, values, strict=True)),
                **options,
                **more,
                mode=mode,
                return_sum=return_sum,
                epsilon=0.1,  # large beside the variance, and not a float32
            )

        return call

    return Operation(
        label,
        "phi_residual_layernorm",
        named(phi_residual_layernorm, target_variance=target_variance),
        named(formula, variance=VARIANCES[target_variance]),
        ("rows", "rows") + ("par",) * len(parameters),
        "phi_residual_layernorm",
    )


OPERATIONS = [
    operation("scale-bias-sum", ("scale", "bias"), "phi", "standard", True),
    operation("bare", (), "standard", "golden", False),
    operation("scale", ("scale",), "phi_symmetric", "golden", True),
    operation("bias", ("bias",), "phi", "standard", False),
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS[:1]
    variants = OPERATIONS[1:3]


class TestTypes(battery.Types):
    operations = OPERATIONS[3:]
    variants = OPERATIONS[:1]


class TestBadInput(battery.BadInput):
    operations = OPERATIONS[:1]


@pytest.mark.slow
def test_third_derivative(installed_double, rng):
    identity, residual = OPERATIONS[1].operands(rng, lead=(), width=3)

    @jax.jit
    def f(identity):
        return phi_residual_layernorm(identity, residual, epsilon=0.1, implementation="cuda")

    check_grads(f, (identity,), order=3, modes=("fwd", "rev"), eps=1e-4, atol=1e-4, rtol=1e-4)


# --- accuracy -------------------------------------------------------------------------------------


def check_accuracy(
    implementation,
    identity,
    residual,
    ct_y,
    ct_z=None,
    scale=None,
    bias=None,
    *,
    mode="phi",
    epsilon=1e-5,
    target_variance="standard",
):
    """Values and all cotangents against the oracle; with ct_z also the returned sum."""
    given = {"identity": identity, "residual": residual, "scale": scale, "bias": bias}
    given = {name: x for name, x in given.items() if x is not None}
    dtype, out = identity.dtype, ct_y.dtype
    acc = oracles.accumulation(dtype)

    @jax.jit
    def both(given, cotangents):
        def call(given):
            return phi_residual_layernorm(
                **given,
                mode=mode,
                epsilon=epsilon,
                target_variance=target_variance,
                return_sum=ct_z is not None,
                dtype=out,
                implementation=implementation,
            )

        results, pull = jax.vjp(call, given)
        return results, pull(cotangents)[0]

    results, gradients = both(given, ct_y if ct_z is None else (ct_y, ct_z))
    for name, x in given.items():
        assert gradients[name].dtype == x.dtype

    z = oracles.stored_sum(identity, residual, mode, dtype)
    y = results
    if ct_z is not None:
        y, returned = results
        assert returned.dtype == dtype
        oracles.assert_close(returned, oracles.residual_sum(identity, residual, mode, acc), "z")
        z = oracles.exactly(returned)  # y is the layer norm of the z that came back
    assert y.dtype == out
    options = {
        "epsilon": epsilon,
        "variance": VARIANCES.get(target_variance, target_variance),
        "acc": acc,
    }
    oracles.assert_close(y, oracles.layernorm(z, scale, bias, **options), "y", flush=True)
    expected = oracles.layernorm_vjp(z, ct_y, ct_z, scale, mode=mode, **options)
    for name in given:
        oracles.assert_close(
            gradients[name], getattr(expected, name), f"cotangent of {name}", flush=True
        )


def draw(rng, shape, dtype, out=None, mean=0.0, deviation=1.0):
    """identity, residual, ct_y, ct_z."""
    branches = [jnp.asarray(x, dtype) for x in rng.normal(mean, deviation, size=(2, *shape))]
    ct_y, ct_z = rng.normal(size=(2, *shape))
    return *branches, jnp.asarray(ct_y, out or dtype), jnp.asarray(ct_z, dtype)


@pytest.mark.parametrize("return_sum", [False, True], ids=["y", "y and z"])
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("mode", oracles.MODES)
def test_accuracy(mode, dtype, return_sum, implementation, rng):
    parameter = "float64" if dtype == "float64" else "float32"
    scale, bias = (jnp.asarray(x, parameter) for x in rng.normal(size=(2, 33)))
    identity, residual, ct_y, ct_z = draw(rng, (5, 33), dtype)
    check_accuracy(
        implementation,
        identity,
        residual,
        ct_y,
        ct_z if return_sum else None,
        scale,
        bias,
        mode=mode,
        target_variance="golden",
    )


@pytest.mark.parametrize(("dtype", "out"), [*itertools.permutations(oracles.DTYPES, 2)])
def test_accuracy_with_another_output_type(dtype, out, implementation, rng):
    scale, bias = (jnp.asarray(x, dtype) for x in rng.normal(size=(2, 16)))
    check_accuracy(implementation, *draw(rng, (3, 16), dtype, out), scale, bias)


@pytest.mark.parametrize("given", [(), ("scale",), ("bias",)], ids=lambda g: "-".join(g) or "none")
@pytest.mark.parametrize("dtype", battery.thinned(["bfloat16", "float32"]))
def test_accuracy_without_some_parameters(given, dtype, implementation, rng):
    parameters = {name: jnp.asarray(rng.normal(size=7), dtype) for name in given}
    identity, residual, ct_y, _ = draw(rng, (2, 3, 7), dtype)
    check_accuracy(implementation, identity, residual, ct_y, **parameters)


@pytest.mark.parametrize("width", [1, 2, 31, 1000, 5000])
def test_accuracy_at_width(width, implementation, rng):
    scale, bias = (jnp.asarray(x, "float32") for x in rng.normal(size=(2, width)))
    check_accuracy(implementation, *draw(rng, (3, width), "float32"), scale, bias)


@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_accuracy_of_parameter_gradients_over_rows(rows, implementation, rng):
    scale, bias = (jnp.asarray(x, "float32") for x in rng.normal(size=(2, 5)))
    check_accuracy(implementation, *draw(rng, (rows, 5), "bfloat16"), scale, bias)


def test_accuracy_far_from_zero(implementation, rng):
    """Mean 1e4, deviation 1: E[x**2] - E[x]**2 would have no correct digit in float32."""
    identity, residual, ct_y, ct_z = draw(rng, (4, 64), "float32", mean=1e4)
    check_accuracy(implementation, identity, residual, ct_y, ct_z, mode="standard")
    y = phi_residual_layernorm(identity, residual, mode="standard", implementation=implementation)
    np.testing.assert_allclose(np.var(y, axis=-1), 1, atol=0.01)


def test_epsilon_is_a_float64(implementation, rng):
    # 0.1 as a float32 is off by 1.5e-8 relatively, which would show.
    identity, residual, ct_y, ct_z = draw(rng, (2, 9), "float64", deviation=0.1)
    for epsilon in (0.1, 1e-3, 0.0):
        check_accuracy(implementation, identity, residual, ct_y, ct_z, epsilon=epsilon)


@pytest.mark.parametrize(
    ("target", "variance"), [("golden", PHI_INV), ("standard", 1.0), (2.5, 2.5)]
)
def test_target_variance(target, variance, implementation, rng):
    identity, residual, ct_y, _ = draw(rng, (3, 50), "float64")
    check_accuracy(implementation, identity, residual, ct_y, target_variance=target)
    y = phi_residual_layernorm(
        identity, residual, target_variance=target, epsilon=0.0, implementation=implementation
    )
    np.testing.assert_allclose(np.var(y, axis=-1), variance, rtol=1e-13)
    np.testing.assert_allclose(np.mean(y, axis=-1), 0, atol=1e-14)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_rows_that_are_not_finite_stay_alone(dtype, implementation, rng):
    identity, residual, _, _ = draw(rng, (5, 8), dtype)
    identity = identity.at[1, 3].set(np.nan).at[2, 0].set(np.inf).at[3, 7].set(-np.inf)
    y, z = phi_residual_layernorm(
        identity, residual, return_sum=True, implementation=implementation
    )
    assert np.all(np.isnan(y[1:4]))
    assert np.all(np.isfinite(y[::4]))
    expected = phi_residual(identity, residual, implementation=implementation)
    np.testing.assert_array_equal(oracles.real(z), oracles.real(expected))


@pytest.mark.parametrize("value", [1e4, 0.1, -3e-5])
def test_constant_rows(value, implementation, rng):
    """y is the bias: 1 / √ε makes nothing large of what rounding left in the mean."""
    identity = jnp.full((2, 6), value, "float32")
    operands = identity, jnp.zeros_like(identity)
    check_accuracy(implementation, *operands, jnp.ones_like(identity), mode="standard")
    scale, bias = (jnp.asarray(rng.uniform(1, 2, size=6), "float32") for _ in range(2))
    y = phi_residual_layernorm(*operands, scale, bias, implementation=implementation)
    np.testing.assert_array_equal(y, jnp.broadcast_to(bias, identity.shape))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_parameter_types(dtype, implementation, rng):
    """Parameters of any floating type, beside data of any: the data decides the type of y."""
    identity, residual, _, _ = draw(rng, (2, 8), "bfloat16")
    parameters = jnp.asarray(rng.normal(size=8), dtype), jnp.asarray(rng.normal(size=8), "float32")
    f = functools.partial(phi_residual_layernorm, implementation=implementation)
    gradients = jax.grad(lambda *p: f(identity, residual, *p).sum(), (0, 1))(*parameters)
    assert f(identity, residual, *parameters).dtype == jnp.bfloat16
    assert [g.dtype for g in gradients] == [dtype, "float32"]


def test_same_y_whether_or_not_the_sum_is_returned(rng, installed_double):
    # By kernel: XLA is free to fuse the two differently.
    identity, residual, _, _ = draw(rng, (4, 12), "float16")
    f = functools.partial(phi_residual_layernorm, implementation="cuda")
    y, z = f(identity, residual, return_sum=True)
    np.testing.assert_array_equal(y, f(identity, residual))
    np.testing.assert_array_equal(y, f(z, jnp.zeros_like(z), mode="standard"))


# --- bad input ------------------------------------------------------------------------------------

ROWS = jnp.ones((2, 4))


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("shape", [(5,), (1,), (), (2, 4)])
def test_parameter_shape(name, shape):
    pattern = rf"phi_residual_layernorm: {name} .*\(4,\), got \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=pattern):
        phi_residual_layernorm(ROWS, ROWS, **{name: jnp.ones(shape)})


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_parameter_that_is_not_floating(name):
    with pytest.raises(TypeError, match=rf"phi_residual_layernorm: {name} .*got int32"):
        phi_residual_layernorm(ROWS, ROWS, **{name: jnp.ones(4, "int32")})


def test_shape_mismatch():
    pattern = r"phi_residual_layernorm: identity and residual .*\(2, 4\) and \(4,\)"
    with pytest.raises(ValueError, match=pattern):
        phi_residual_layernorm(ROWS, jnp.ones(4))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_nothing_to_normalise(shape):
    with pytest.raises(ValueError, match=r"phi_residual_layernorm: .*axis.*got"):
        phi_residual_layernorm(jnp.ones(shape), jnp.ones(shape))


@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), float("inf")])
def test_epsilon(epsilon):
    with pytest.raises(ValueError, match=rf"phi_residual_layernorm: epsilon .*got {epsilon}"):
        phi_residual_layernorm(ROWS, ROWS, epsilon=epsilon)


@pytest.mark.parametrize(
    "target", [0, -1.0, float("nan"), float("inf"), "silver", None, True, jnp.ones(2)], ids=str
)
def test_unknown_target_variance(target):
    pattern = r"phi_residual_layernorm: target_variance .*'golden', 'standard' or a positive"
    with pytest.raises(ValueError, match=pattern):
        phi_residual_layernorm(ROWS, ROWS, target_variance=target)


def test_unknown_mode():
    pattern = r"phi_residual_layernorm: mode .*'phi', 'phi_symmetric', 'standard', got 'x'"
    with pytest.raises(ValueError, match=pattern):
        phi_residual_layernorm(ROWS, ROWS, mode="x")

"""golden_layer_norm, over any axes."""

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

from syntonic_jax import (
    PHI_INV,
    GoldenNormMode,
    golden_layer_norm,
    output_statistics,
    phi_residual_layernorm,
)

pytestmark = pytest.mark.usefixtures("x64")

VARIANCES = {"golden": oracles.PHI_INV, "standard": 1.0, 2.5: 2.5}


def formula(x, scale=None, bias=None, *, variance):
    centred = x - jnp.mean(x, -1, keepdims=True)
    y = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 0.1)
    y = y * np.sqrt(variance).item()
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


# Layouts: rows [*lead, width] to an array of another layout, its reduced axes, and y back.


def first_and_last(x):
    """Rows along two axes that are not neighbours: [a, *lead, b], a * b = width."""
    width = x.shape[-1]
    a = 2 if width % 2 == 0 else 1
    return jnp.moveaxis(x.reshape(*x.shape[:-1], a, width // a), -2, 0)


def from_first_and_last(y):
    y = jnp.moveaxis(y, 0, -2)
    return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])


LAYOUTS = {
    "last": (lambda x: x, -1, lambda y: y),
    "first": (lambda x: jnp.moveaxis(x, -1, 0), 0, lambda y: jnp.moveaxis(y, 0, -1)),
    "both": (first_and_last, (-1, 0), from_first_and_last),
}


def operation(label, parameters, layout, target_variance, lead=(3,)):
    """`parameters` names the operands that follow x."""
    there, axis, back = LAYOUTS[layout]

    def call(x, *values, **options):
        x = there(x)
        shape = (x.shape[0], x.shape[-1]) if layout == "both" else (-1,)
        values = (value.reshape(shape) for value in values)
        y = golden_layer_norm(
            x,
            **dict(zip(parameters, values, strict=True)),
            axis=axis,
            epsilon=0.1,  # large beside the variance, and not a float32
            target_variance=target_variance,
            **options,
        )
        return back(y)

    def reference(x, *values):
        values = dict(zip(parameters, values, strict=True))
        return formula(x, **values, variance=VARIANCES[target_variance])

    return Operation(
        label,
        "golden_layer_norm",
        call,
        reference,
        ("rows",) + ("par",) * len(parameters),
        "golden_layer_norm",
        lead=lead,
        bad=(-jnp.inf,),
    )


OPERATIONS = [
    operation("scale-bias", ("scale", "bias"), "last", "golden"),
    operation("bare", (), "last", 2.5, lead=(2, 2)),
    operation("other-axis", ("scale",), "first", "standard", lead=(2, 2)),
    operation("two-axes", ("scale", "bias"), "both", "golden"),
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS[:1]
    variants = OPERATIONS[2:3]


class TestTypes(battery.Types):
    operations = OPERATIONS[3:]


class TestBadInput(battery.BadInput):
    operations = OPERATIONS[:1]


@pytest.mark.slow
def test_third_derivative(installed_double, rng):
    (x,) = OPERATIONS[1].operands(rng, lead=(), width=3)

    @jax.jit
    def f(x):
        return golden_layer_norm(x, epsilon=0.1, implementation="cuda")

    check_grads(f, (x,), order=3, modes=("fwd", "rev"), eps=1e-4, atol=1e-4, rtol=1e-4)


# --- accuracy -------------------------------------------------------------------------------------


def as_rows(x, axes):
    """The axes last and flattened, in increasing order: rows [*others, width], in float64."""
    x, axes = oracles.real(x), sorted(a % np.ndim(x) for a in axes)
    x = np.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


def check(
    implementation, x, ct, scale=None, bias=None, *, axis=-1, epsilon=1e-5, target_variance="golden"
):
    """y and all cotangents against the oracle, whose rows are the reduced axes flattened."""
    given = {"x": x, "scale": scale, "bias": bias}
    given = {name: value for name, value in given.items() if value is not None}
    dtype, out, axes = x.dtype, ct.dtype, tuple(np.atleast_1d(axis))

    @jax.jit
    def both(given, ct):
        def call(given):
            return golden_layer_norm(
                **given,
                axis=axis,
                epsilon=epsilon,
                target_variance=target_variance,
                dtype=out,
                implementation=implementation,
            )

        y, pull = jax.vjp(call, given)
        return y, pull(ct)[0]

    y, gradients = both(given, ct)
    assert (y.dtype, y.shape) == (out, x.shape)
    for name, value in given.items():
        assert (gradients[name].dtype, gradients[name].shape) == (value.dtype, value.shape)

    options = {
        "epsilon": epsilon,
        "variance": VARIANCES.get(target_variance, target_variance),
        "acc": oracles.accumulation(dtype),
    }
    z = oracles.exactly(as_rows(x, axes))
    scale, bias = (None if p is None else np.ravel(p) for p in (scale, bias))
    expected = oracles.layernorm(z, scale, bias, **options)
    assert_rows(y, expected, axes, "y")
    # A standard residual: the cotangent of the identity is that of the sum.
    pulled = oracles.layernorm_vjp(z, as_rows(ct, axes), None, scale, mode="standard", **options)
    assert_rows(gradients["x"], pulled.identity, axes, "cotangent of x")
    for name in list(given)[1:]:
        oracles.assert_close(
            gradients[name].ravel(), getattr(pulled, name), f"cotangent of {name}", flush=True
        )


def assert_rows(actual, estimate, axes, what):
    rows = np.asarray(actual)
    axes = sorted(a % rows.ndim for a in axes)
    rows = np.moveaxis(rows, axes, range(-len(axes), 0)).reshape(estimate.value.shape)
    oracles.assert_close(rows, estimate, what, flush=True)


def draw(rng, shape, axis, dtype, out=None, mean=0.0, deviation=1.0, names=("scale", "bias")):
    """x, the cotangent of y, and parameters."""
    x = jnp.asarray(rng.normal(mean, deviation, size=shape), dtype)
    ct = jnp.asarray(rng.normal(size=shape), out or dtype)
    axes = sorted(a % len(shape) for a in np.atleast_1d(axis))
    acc = oracles.accumulation(dtype)
    parameters = {
        name: jnp.asarray(rng.normal(size=[shape[a] for a in axes]), acc)
        for name in ("scale", "bias")
        if name in names
    }
    return (x, ct), parameters


LAYOUTS_OF_ARRAYS = [  # shape, reduced axes
    ((5, 33), -1),
    ((4, 6, 5), 1),
    ((7, 3, 2), 0),
    ((3, 4, 2, 5), (1, 2, 3)),
    ((3, 4, 2, 5), (-1, 1)),
    ((6, 5), (1, 0)),
]
layouts = pytest.mark.parametrize(("shape", "axis"), LAYOUTS_OF_ARRAYS, ids=str)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@layouts
def test_accuracy(shape, axis, dtype, implementation, rng):
    operands, parameters = draw(rng, shape, axis, dtype)
    check(implementation, *operands, **parameters, axis=axis)


@pytest.mark.parametrize(("dtype", "out"), [*itertools.permutations(oracles.DTYPES, 2)])
def test_accuracy_with_another_output_type(dtype, out, implementation, rng):
    operands, parameters = draw(rng, (3, 16), -1, dtype, out)
    check(implementation, *operands, **parameters)


@pytest.mark.parametrize("names", [(), ("scale",), ("bias",)], ids=lambda n: "-".join(n) or "none")
@pytest.mark.parametrize("dtype", battery.thinned(["bfloat16", "float32"]))
@layouts
def test_accuracy_without_some_parameters(shape, axis, names, dtype, implementation, rng):
    operands, parameters = draw(rng, shape, axis, dtype, names=names)
    check(implementation, *operands, **parameters, axis=axis)


@pytest.mark.parametrize("width", [1, 2, 31, 1000, 5000])
def test_accuracy_at_width(width, implementation, rng):
    operands, parameters = draw(rng, (3, width), -1, "float32")
    check(implementation, *operands, **parameters)


@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_accuracy_of_parameter_gradients_over_rows(rows, implementation, rng):
    operands, parameters = draw(rng, (rows, 5), -1, "bfloat16")
    check(implementation, *operands, **parameters)


@layouts
def test_accuracy_far_from_zero(shape, axis, implementation, rng):
    """Mean 1e4, deviation 1: E[x**2] - E[x]**2 would have no correct digit in float32."""
    operands, parameters = draw(rng, shape, axis, "float32", mean=1e4)
    check(implementation, *operands, **parameters, axis=axis)


def test_epsilon_is_a_float64(implementation, rng):
    # 0.1 as a float32 is off by 1.5e-8 relatively, which would show.
    operands, _ = draw(rng, (2, 9), -1, "float64", deviation=0.1)
    for epsilon in (0.1, 1e-3, 0.0):
        check(implementation, *operands, epsilon=epsilon)


@pytest.mark.parametrize(
    ("target", "variance"),
    [
        ("golden", PHI_INV),
        ("standard", 1.0),
        (GoldenNormMode("golden"), PHI_INV),
        (GoldenNormMode.custom(2.5), 2.5),
        (2.5, 2.5),
    ],
    ids=["golden", "standard", "mode", "custom", "number"],
)
def test_output_has_the_target_variance(target, variance, implementation, rng):
    x = jnp.asarray(rng.normal(3, 2, size=(3, 50)))
    y = golden_layer_norm(x, target_variance=target, epsilon=0.0, implementation=implementation)
    mean, var = output_statistics(y, axis=0)  # rows are the features of a transposed batch
    np.testing.assert_allclose(var, variance, rtol=1e-13)
    np.testing.assert_allclose(mean, 0, atol=1e-14)


def test_is_that_of_a_sum_without_a_residual(implementation, rng):
    """The layer norm of the other family, of z = identity + 0, in another program."""
    (x, _), parameters = draw(rng, (4, 12), -1, "float64")
    y = golden_layer_norm(x, **parameters, implementation=implementation)
    same = phi_residual_layernorm(
        x, jnp.zeros_like(x), **parameters, target_variance="golden", implementation=implementation
    )
    battery.assert_same(y, same)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_rows_that_are_not_finite_stay_alone(dtype, implementation, rng):
    (x, ct), _ = draw(rng, (5, 8), -1, dtype)
    x = x.at[1, 3].set(np.nan).at[2, 0].set(np.inf).at[3, 7].set(-np.inf)
    y, pull = jax.vjp(functools.partial(golden_layer_norm, implementation=implementation), x)
    for rows in (y, *pull(ct)):
        assert np.all(np.isnan(rows[1:4]))
        assert np.all(np.isfinite(rows[::4]))


@pytest.mark.parametrize("value", [1e4, 0.1, -3e-5])
def test_constant_rows(value, implementation, rng):
    """y is the bias: 1 / √ε makes nothing large of what rounding left in the mean."""
    x = jnp.full((2, 6), value, "float32")
    check(implementation, x, jnp.ones_like(x))
    scale, bias = (jnp.asarray(rng.uniform(1, 2, size=6), "float32") for _ in range(2))
    y = golden_layer_norm(x, scale, bias, implementation=implementation)
    np.testing.assert_array_equal(y, jnp.broadcast_to(bias, x.shape))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_parameter_types(dtype, implementation, rng):
    """Parameters of any floating type, beside data of any: the data decides the type of y."""
    x = jnp.asarray(rng.normal(size=(2, 8)), "bfloat16")
    parameters = jnp.asarray(rng.normal(size=8), dtype), jnp.asarray(rng.normal(size=8), "float32")
    f = functools.partial(golden_layer_norm, implementation=implementation)
    gradients = jax.grad(lambda *p: f(x, *p).sum(), (0, 1))(*parameters)
    assert f(x, *parameters).dtype == jnp.bfloat16
    assert [g.dtype for g in gradients] == [dtype, "float32"]


# --- bad input ------------------------------------------------------------------------------------

X = jnp.ones((5, 3, 4))


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("shape", [(5,), (1,), (), (3, 4), (1, 1, 4)])
def test_parameter_shape(name, shape):
    pattern = rf"golden_layer_norm: {name} .*\(4,\), got \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=pattern):
        golden_layer_norm(X, **{name: jnp.ones(shape)})


def test_shape_of_parameters_of_two_axes():
    golden_layer_norm(X, jnp.ones((5, 4)), axis=(2, 0))  # in increasing order
    with pytest.raises(ValueError, match=r"golden_layer_norm: scale .*\(5, 4\), got \(4, 5\)"):
        golden_layer_norm(X, jnp.ones((4, 5)), axis=(2, 0))


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_parameter_that_is_not_floating(name):
    with pytest.raises(TypeError, match=rf"golden_layer_norm: {name} .*got int32"):
        golden_layer_norm(X, **{name: jnp.ones(4, "int32")})


@pytest.mark.parametrize("axis", [3, -4, (0, 3), (1, 1), (-1, 2)], ids=str)
def test_axes_that_are_not_distinct_axes_of_x(axis):
    got = str(axis).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"golden_layer_norm: axis .*got {got}"):
        golden_layer_norm(X, axis=axis)


@pytest.mark.parametrize("axis", [1.0, True, "last", None, (0, 1.5)], ids=str)
def test_axes_that_are_no_integers(axis):
    golden_layer_norm(X, axis=1)  # to jit's cache, 1 equals the first two
    with pytest.raises(TypeError, match=r"golden_layer_norm: axis .*got"):
        golden_layer_norm(X, axis=axis)


@pytest.mark.parametrize(
    ("shape", "axis"), [((0,), -1), ((3, 0), -1), ((3, 0, 2), (1, 2)), ((3, 4), ())]
)
def test_nothing_to_reduce(shape, axis):
    with pytest.raises(ValueError, match=r"golden_layer_norm: .*axis.*got"):
        golden_layer_norm(jnp.ones(shape), axis=axis)


@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), float("inf")])
def test_epsilon(epsilon):
    with pytest.raises(ValueError, match=rf"golden_layer_norm: epsilon .*got {epsilon}"):
        golden_layer_norm(X, epsilon=epsilon)


@pytest.mark.parametrize(
    "target", [0, -1.0, float("nan"), float("inf"), "silver", None, True, jnp.ones(2)], ids=str
)
def test_unknown_target_variance(target):
    pattern = r"(?s)golden_layer_norm: target_variance .*'golden'.*'standard'.*positive.*got"
    with pytest.raises(ValueError, match=pattern):
        golden_layer_norm(X, target_variance=target)

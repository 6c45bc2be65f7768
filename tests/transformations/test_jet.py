"""jet: Taylor series of every operation, to any order."""

import functools
import math

import battery
import jax
import jax.numpy as jnp
import numpy as np
import operations
import oracles
import pytest
import transformations
from jax.experimental.jet import jet

from syntonic_jax import (
    crystallize,
    golden_batch_norm,
    golden_gelu,
    golden_layer_norm,
    phi_residual,
    phi_residual_layernorm,
    residual_component_norm,
    syntonic_softmax,
)
from syntonic_jax.lattice import snap_distance, syntony

pytestmark = pytest.mark.usefixtures("x64")

OPERATIONS = operations.OPERATIONS
ORDER = 3
# Unoptimised, jax 0.10 computes the logits of a softmax anew where they are compared with their
# largest. Rounded in another way none equals it, and jet's rule for a maximum divides 0 by 0.
optimised = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "2"})
# A derivative of order k has some k! terms, each a product of as many factors as a first one has
# roundings; they may cancel.
RTOL = math.factorial(ORDER) ** 2 * battery.RTOL


def coefficients(operands, order):
    """Derivatives by t of a curve through the operands."""
    return [[jnp.cos((k + 3) * x) for k in range(order)] for x in operands]


def along(f, operands, series):
    """f on the curve, as a function of t."""

    def of_t(t):
        point = [
            x + sum(term * t ** (k + 1) / math.factorial(k + 1) for k, term in enumerate(terms))
            for x, terms in zip(operands, series, strict=True)
        ]
        return f(*point)

    return of_t


def derivatives(f, operands, order):
    """The first `order` derivatives along the curve, by as many nested forward modes."""

    def derivative(g):
        return lambda t: jax.jvp(g, (t,), (1.0,))[1]

    g = along(f, operands, coefficients(operands, order))
    found = [g]
    for _ in range(order):
        found.append(derivative(found[-1]))
    value, *rest = [g(0.0) for g in found]
    return value, list(map(list, zip(*map(jax.tree.leaves, rest), strict=True)))


def taylor(f, operands, order):
    value, series = jet(f, tuple(operands), coefficients(operands, order))
    if not isinstance(value, tuple | list):
        series = [series]
    return value, list(map(list, series))


@functools.cache
def expected_of(operation, order):
    return jax.jit(lambda *operands: derivatives(operation.reference, operands, order))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.label)
def test_equals_nested_derivatives_of_the_formula(operation, implementation, rng):
    operands = operation.operands(rng)
    f = operation.using(implementation)
    got = optimised(lambda *operands: taylor(f, operands, ORDER))(*operands)
    battery.assert_same(got, expected_of(operation, ORDER)(*operands), RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.label)
def test_of_gradients(operation, implementation, rng):
    """The series of the tangent and cotangent primitives."""

    def gradients(f):
        return jax.grad(transformations.loss(f), transformations.positions(operation))

    operands = operation.operands(rng)
    f = gradients(operation.using(implementation))
    got = optimised(lambda *operands: taylor(f, operands, 2))(*operands)
    reference = gradients(operation.reference)
    expected = jax.jit(lambda *operands: derivatives(reference, operands, 2))(*operands)
    battery.assert_same(got, expected, RTOL)


@pytest.mark.parametrize("f", [golden_gelu, syntonic_softmax, golden_layer_norm])
def test_any_order(f, implementation, rng):
    """Beside jet of the formula, which costs no more for one order more."""
    operation = next(o for o in OPERATIONS if o.name == f.__name__)
    operands, order = operation.operands(rng), 8

    def scaled(f):  # by factorials: what grows with the order
        value, series = taylor(f, operands, order)
        return value, [[term / math.factorial(k) for k, term in enumerate(s, 1)] for s in series]

    got = jax.jit(lambda: scaled(operation.using(implementation)))()
    battery.assert_same(got, jax.jit(lambda: scaled(operation.reference))(), order**2 * RTOL)


@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES, 4))
@pytest.mark.parametrize("operation", battery.thinned(OPERATIONS, 3), ids=lambda o: o.label)
def test_types_and_first_terms_are_those_of_jvp(operation, dtype, implementation, rng):
    """Jnp against jnp, which differ by roundings of the accumulation type and one of the result."""
    operands = operation.operands(rng, dtype)
    f = operation.using(implementation)
    tangents = [terms[0] for terms in coefficients(operands, 1)]
    value, series = optimised(lambda *x: taylor(f, x, 1))(*operands)
    expected, slopes = jax.jit(lambda *x: jax.jvp(f, x, tuple(tangents)))(*operands)
    assert jax.tree.map(jnp.result_type, series) == [[s.dtype] for s in jax.tree.leaves(slopes)]
    got = [*jax.tree.leaves(value), *(terms[0] for terms in series)]
    for a, e in zip(got, jax.tree.leaves((expected, slopes)), strict=True):
        rounding = 64 * oracles.unit(oracles.accumulation(dtype)) + 2 * oracles.unit(e.dtype)
        battery.assert_same(a, e, rounding)


def test_sums_below_the_normal_numbers_of_float16_have_a_derivative(implementation):
    """Rounded there by other means than above, to multiples of 2**-24."""
    x = jnp.asarray(np.arange(-8, 8) * 2.0**-24, "float16")
    f = functools.partial(phi_residual_layernorm, epsilon=2.0**-40, implementation=implementation)
    one, other = x[::-1], jnp.roll(x, 5)
    _, (slope,) = jet(f, (x, x), [[one], [other]])
    expected = jax.jvp(f, (x, x), (one, other))[1]
    battery.assert_same(slope, expected, 4 * oracles.unit("float16"))
    assert jnp.abs(expected).max() > 0.1


def test_relu_has_the_derivative_0_at_0(implementation):
    f = functools.partial(phi_residual, activation="relu", implementation=implementation)
    x = jnp.array([0.0, -0.0, 1.0, -1.0, jnp.nan])
    value, (first, second) = jet(f, (x, jnp.zeros(5)), [[jnp.ones(5), 3 * jnp.ones(5)]] * 2)
    np.testing.assert_array_equal(value, [0, 0, 1, 0, np.nan])
    grown = 1 + oracles.PHI_INV
    np.testing.assert_allclose(first[:4], [0, 0, grown, 0], rtol=RTOL)
    np.testing.assert_allclose(second[:4], [0, 0, 3 * grown, 0], rtol=RTOL)


def test_crystallize_passes_the_series(implementation):
    x, series = jnp.array([0.3, -1.6, jnp.nan]), [jnp.arange(3.0), jnp.array([5.0, jnp.inf, 7.0])]
    f = functools.partial(crystallize, precision=2, implementation=implementation)
    for call in (f, jax.jit(f)):
        value, got = jet(call, (x,), [series], factorial_scaled=False)
        np.testing.assert_array_equal(value, f(x))
        np.testing.assert_array_equal(got, series)
    value, got = jet(functools.partial(f, dtype="float32"), (x,), [series])
    assert [term.dtype for term in got] == ["float32"] * 2


def test_what_is_made_of_the_operations(implementation, rng):
    """The distance to the lattice, whose integers have no series, and a syntony."""
    x = jnp.asarray(rng.normal(size=7))
    distance = functools.partial(snap_distance, implementation=implementation)
    sign = jnp.sign(x - crystallize(x))
    _, got = jet(distance, (x,), [[x, jnp.ones(7)]])
    np.testing.assert_allclose(got, [sign * x, sign], rtol=RTOL)
    norms = jnp.arange(7.0)
    of_norms = functools.partial(syntony, mode_norms=norms)
    _, got = jet(of_norms, (x,), [[jnp.cos(x), jnp.sin(x)]])
    along = jax.jvp(of_norms, (x,), (jnp.cos(x),))[1]
    np.testing.assert_allclose(got[0], along, rtol=RTOL)


def test_under_other_transformations(implementation):
    x = jnp.arange(12.0).reshape(3, 4) / 4
    a, b = jnp.cos(x), jnp.sin(x)

    def run(f, x, a, b):
        value, (first, second) = jet(f, (x,), [[a, b]])
        return value, first, second

    options = {"epsilon": operations.EPSILON, "implementation": implementation}
    f = functools.partial(golden_layer_norm, **options)
    expected = jax.jit(functools.partial(run, f))(x, a, b)
    each = jax.jit(jax.vmap(functools.partial(run, f)))(x, a, b)
    battery.assert_same(each, expected, RTOL)

    def slope(f):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(f, x, a, b)[2]))))(x)

    battery.assert_same(slope(f), slope(lambda x: operations.normalised(x)[0]), RTOL)

    f = functools.partial(golden_gelu, implementation=implementation)
    expected = jax.jit(functools.partial(run, f))(x, a, b)
    with jax.disable_jit():
        battery.assert_same(run(f, x, a, b), expected, RTOL)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e37])
def test_rows_of_equal_numbers(value, implementation):
    """ε alone is left of their spread."""
    x, v = jnp.full((1, 4), value, "float32"), jnp.asarray([[1.0, 2, 3, 5]], "float32")
    f = functools.partial(golden_layer_norm, implementation=implementation)
    _, ((slope, *_),) = jet(lambda x: (f(x),), (x,), ([v, 0 * v],))
    np.testing.assert_allclose(slope, jax.jvp(f, (x,), (v,))[1], rtol=1e-5)


def test_channels_of_equal_numbers(implementation):
    """The variance has its second derivative where it is 0."""
    x, v = jnp.full((4, 1), 3.0), jnp.asarray([[1.0], [2], [3], [5]])
    f = functools.partial(golden_batch_norm, implementation=implementation)
    _, (_, _, var) = jet(lambda x: f(x), (x,), ([v, 0 * v],))
    np.testing.assert_allclose([float(t[0]) for t in var], [0, 2 * np.var(v)], atol=1e-12)


def test_channels_without_elements(implementation):
    x = jnp.asarray([[1.0], [2], [3], [5]])
    where = jnp.zeros((4, 1), bool)

    def f(x):
        return (golden_batch_norm(x, where=where, implementation=implementation)[0],)

    _, (series,) = jet(f, (x,), ([x, 0 * x],))
    np.testing.assert_array_equal(series, np.zeros((2, 4, 1)))


def test_at_the_limits_of_gelu_and_at_a_norm_of_zero(implementation):
    x = jnp.asarray([1e20, -1e20, 1e30], "float32")

    def gelu(x):
        options = {"activation": "gelu", "implementation": implementation}
        return (phi_residual(x, jnp.zeros_like(x), "standard", **options),)

    _, ((slope,),) = jet(gelu, (x,), ([jnp.ones_like(x)],))
    np.testing.assert_array_equal(slope, [1, 0, 1])

    def norm(x):
        return (residual_component_norm(x, implementation=implementation),)

    _, ((slope,),) = jet(norm, (jnp.zeros(4),), ([jnp.ones(4)],))
    assert slope == 0

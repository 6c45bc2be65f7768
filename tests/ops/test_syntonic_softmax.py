"""syntonic_softmax and syntonic_log_softmax."""

import functools
import itertools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_softmax
import pytest
import softmax_cases
from jax.test_util import check_grads
from softmax_cases import MODES, check, draw, operation

from syntonic_jax import PHI, syntonic_log_softmax, syntonic_softmax

pytestmark = pytest.mark.usefixtures("x64")

SOFTMAX, LOG = "syntonic_softmax", "syntonic_log_softmax"
BOTH = {SOFTMAX: syntonic_softmax, LOG: syntonic_log_softmax}
JAX = {SOFTMAX: jax.nn.softmax, LOG: jax.nn.log_softmax}
names = pytest.mark.parametrize("name", BOTH)


class TestTransformations(battery.Transformations):
    operations = (operation(SOFTMAX, "provided", masked=True, axis=0, lead=(2, 2)),)
    variants = (
        operation(SOFTMAX, "learned"),
        operation(SOFTMAX, "shared", axis=1),
        operation(LOG, "provided", masked=True, axis=1, lead=(2, 2)),
        operation(LOG, "learned", lead=(2, 2)),
        operation(LOG, "identity", masked=True),
    )


class TestTypes(battery.Types):
    operations = (operation(SOFTMAX, "provided"), operation(LOG, "learned", masked=True))


class TestBadInput(battery.BadInput):
    operations = (operation(SOFTMAX), operation(LOG))


@pytest.mark.slow
@names
def test_third_derivative(name, rng):
    x, w, scale = operation(name, "provided").operands(rng, lead=(), width=3)
    f = jax.jit(lambda x, w, s: BOTH[name](x, syntony=w, scale=s))
    check_grads(f, (x, w, scale), order=3, modes=("fwd", "rev"), eps=1e-4, atol=1e-4, rtol=1e-4)


# --- accuracy -------------------------------------------------------------------------------------

SHAPES = [((5, 33), -1), ((7, 3, 2), 0), ((4, 6, 5), 1), ((9,), 0), ((3, 4, 2, 5), -2)]


@names
@pytest.mark.parametrize(("shape", "axis"), battery.thinned(SHAPES), ids=str)
@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES[1:], 2))
@pytest.mark.parametrize("mode", battery.thinned(list(MODES)[::-1]))
def test_accuracy(name, mode, shape, axis, dtype, implementation, rng):
    given = draw(rng, shape, axis, dtype, mode)
    ct = jnp.asarray(rng.normal(size=shape), dtype)
    check(implementation, name, given, ct, axis=axis)


@names
@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES, 3))
@pytest.mark.parametrize("mode", battery.thinned(list(MODES), 2))
def test_accuracy_with_a_mask(name, mode, dtype, implementation, rng):
    """Of any shape that broadcasts, with rows that are masked wholly."""
    shape, axis = (4, 5, 6), 1
    for mask_shape in ((4, 5, 6), (5, 1), (4, 1, 6)):
        where = rng.random(mask_shape) < 0.6
        where[..., 0] = len(mask_shape) == 2  # one row of all, or a whole mask
        given = draw(rng, shape, axis, dtype, mode)
        ct = jnp.asarray(rng.normal(size=shape), dtype)
        check(implementation, name, given, ct, axis=axis, where=where)


@names
@pytest.mark.parametrize(
    ("dtype", "out"), battery.thinned(itertools.permutations(oracles.DTYPES, 2), 4)
)
def test_accuracy_with_another_output_type(name, dtype, out, implementation, rng):
    given = draw(rng, (3, 16), -1, dtype, "learned")
    check(implementation, name, given, jnp.asarray(rng.normal(size=(3, 16)), out), dtype=out)


@names
@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (2, 1000), (2, 50257), (1000, 5)], ids=str)
def test_accuracy_at_size(name, shape, implementation, rng):
    given = draw(rng, shape, -1, "bfloat16", "learned")
    check(implementation, name, given, jnp.asarray(rng.normal(size=shape), "bfloat16"))


@names
@pytest.mark.parametrize("mode", battery.thinned(list(MODES)))
def test_large_logits(name, mode, implementation, rng):
    """±1e4, and an offset of 1e6 in common, which takes no digits from what is left of x."""
    for offset, spread in ((0.0, 1e4), (1e6, 1.0)):
        given = draw(rng, (4, 7), -1, "float32", mode, offset, spread)
        check(implementation, name, given, jnp.asarray(rng.normal(size=(4, 7)), "float32"))


def test_an_offset_costs_nothing(implementation, rng):
    """The normaliser of numbers near 1e6, in one float32, would be off by up to 1/32."""
    x = jnp.asarray(rng.integers(-8, 8, size=(3, 9)), "float32")
    for name, f in BOTH.items():
        value_and_slope = jax.value_and_grad(
            lambda x, f=f: jnp.sum(jnp.sin(3 * f(x, implementation=implementation)))
        )
        for near, far in zip(value_and_slope(x), value_and_slope(x + 1e6), strict=True):
            np.testing.assert_allclose(far, near, rtol=0, atol=64 * 2.0**-23, err_msg=name)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_rows_sum_to_one(dtype, implementation, rng):
    given = draw(rng, (20, 50), 0, dtype, "learned", spread=3.0)
    y = syntonic_softmax(**given, axis=0, implementation=implementation)
    z = oracles_softmax.logits(**given, axis=0, acc=oracles.accumulation(dtype))
    p = oracles_softmax.normalised(z).softmax
    allowed = p.slack + oracles.ulp(p.value, dtype) / 2 + 2.0**-24 * p.value
    error = np.abs(oracles.real(y).sum(0) - 1)
    assert np.all(error <= allowed.sum(-1))
    assert np.all(error <= 25 * oracles.unit(dtype))  # half a unit of 50 numbers whose sum is 1


# --- what it is -----------------------------------------------------------------------------------


def both_and_derivatives(f):
    """Value, gradient and the Hessian along a direction."""

    def run(x):
        def loss(x):
            y = f(x)
            return jnp.sum(jnp.sin(y * jnp.linspace(0.5, 1.5, y.size).reshape(y.shape)))

        gradient = jax.grad(loss)
        return f(x), gradient(x), jax.jvp(gradient, (x,), (jnp.cos(x),))[1]

    return jax.jit(run)


@names
def test_identity_mode_is_that_of_jax(name, implementation, rng):
    x = jnp.asarray(rng.normal(size=(3, 4, 5)))
    for axis in (0, 1, 2, -1):
        scale = 0.5 * axis  # of log 1
        ours = functools.partial(BOTH[name], axis=axis, scale=scale, implementation=implementation)
        theirs = functools.partial(JAX[name], axis=axis)
        battery.assert_same(both_and_derivatives(ours)(x), both_and_derivatives(theirs)(x))


@names
def test_masked_identity_mode_is_that_of_jax(name, implementation, rng):
    x = jnp.asarray(rng.normal(size=(6, 8)))
    where = jnp.asarray(rng.random((6, 8)) < 0.5).at[:, 0].set(True)

    def drop(f):
        return lambda x: jnp.where(where, f(x, where=where), 0)

    ours = drop(functools.partial(BOTH[name], implementation=implementation))
    battery.assert_same(both_and_derivatives(ours)(x), both_and_derivatives(drop(JAX[name]))(x))


@names
def test_weights_are_shifts_of_the_logits(name, implementation, rng):
    x = jnp.asarray(rng.normal(size=(3, 4, 5)))
    norms, weights = jnp.arange(4.0) ** 2, jnp.asarray(np.exp(rng.normal(size=(3, 1, 5))))
    f = functools.partial(BOTH[name], axis=1, scale=0.7, implementation=implementation)
    jax_f = functools.partial(JAX[name], axis=1)
    learned = both_and_derivatives(functools.partial(f, mode_norms=norms))
    shifted = both_and_derivatives(lambda x: jax_f(x - 0.7 / PHI * norms[:, None]))
    battery.assert_same(learned(x), shifted(x))
    for syntony in (weights, weights[0, 0, 0]):
        provided = both_and_derivatives(functools.partial(f, syntony=syntony))
        shifted = both_and_derivatives(lambda x, w=syntony: jax_f(x + 0.7 * jnp.log(w)))
        battery.assert_same(provided(x), shifted(x))
    # A syntony of exp(-|n|²/φ) is what mode norms are.
    battery.assert_same(f(x, syntony=jnp.exp(-norms / PHI)[:, None]), f(x, mode_norms=norms))


def test_the_originals_example(implementation):
    """Equal logits: the first class has exp(10/φ) times the weight of any other."""
    norms = jnp.array([0.0, 10, 10, 10, 10])
    y = syntonic_softmax(jnp.ones(5), mode_norms=norms, implementation=implementation)
    assert y[0] > 2 * y[1]
    np.testing.assert_allclose(y[0] / y[1:], np.exp(10 / PHI), rtol=1e-13)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-11, 1e-10, -np.inf])
@names
def test_the_floor_of_weights(name, value, implementation, rng):
    """Up to 1e-10 a weight counts as that, and the derivative by it is 0, also at the tie."""
    x, w = jnp.asarray(rng.normal(size=(2, 2, 4)))
    for weights in (jnp.exp(w).at[0, 1].set(value), jnp.exp(w[0]).at[1].set(value)):
        f = functools.partial(BOTH[name], implementation=implementation)
        floored = jnp.where(weights <= 1e-10, 1e-10, weights)
        battery.assert_same(f(x, syntony=weights), f(x, syntony=floored))
        slope = jax.grad(lambda v, f=f: jnp.sum(jnp.sin(f(x, syntony=v))))(weights)
        assert np.array_equal(slope == 0, weights == value)


@names
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_is_two_primitives(name, mode, implementation, rng):
    """The forward pass and the cotangents, of which one buffer is as large as x."""
    given = draw(rng, (6, 50), -1, "bfloat16", mode)
    where = jnp.ones((6, 50), bool)

    def loss(given):
        return jnp.sum(BOTH[name](**given, where=where, implementation=implementation) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(given).jaxpr
    ours = [e for e in softmax_cases.equations(jaxpr) if e.primitive.name.startswith("syntonic_")]
    assert [e.primitive.name for e in ours] == [name, f"{name}_cotangent"]
    forward, backward = ours
    assert forward.outvars[0].aval.dtype == jnp.bfloat16
    assert sum(v.aval.size >= 300 for v in forward.outvars) == 1
    large = [v.aval.dtype for v in backward.outvars if v.aval.size >= 300]
    # Through weights of its own a row has a cotangent that is not rounded yet.
    assert large == ["float32" if mode == "provided" else "bfloat16"]
    residuals = [v.aval for v in backward.invars if v.aval.size >= 300]
    kept = [a.dtype for a in residuals[:-1]]  # the last is the cotangent
    own = ["float32"] if mode == "provided" else []
    assert kept == (["bfloat16"] + (own if name == LOG else []) + ["bool"])


@names
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_parameter_types(name, dtype, implementation, rng):
    """Parameters of any floating type, beside data of any: the data decides the type of y."""
    x = jnp.asarray(rng.normal(size=(2, 8)), "bfloat16")
    w = jnp.asarray(np.exp(rng.normal(size=(2, 8))), dtype)
    scale = jnp.asarray(1.5, dtype)
    f = functools.partial(BOTH[name], implementation=implementation)
    for key, value in (("mode_norms", w[0]), ("syntony", w), ("syntony", w[0])):

        def call(value, scale, key=key):
            return f(x, **{key: value}, scale=scale)

        assert jax.eval_shape(call, value, scale).dtype == jnp.bfloat16
        slopes = jax.eval_shape(
            jax.grad(lambda *v, c=call: jnp.sum(jnp.sin(c(*v))), (0, 1)), value, scale
        )
        assert [s.dtype for s in slopes] == [dtype, dtype]


@names
def test_scale_is_a_number_or_traced(name, implementation, rng):
    x, norms = jnp.asarray(rng.normal(size=(2, 4))), jnp.arange(4.0)
    f = functools.partial(BOTH[name], x, mode_norms=norms, implementation=implementation)
    expected = f(scale=2.0)
    for scale in (2, np.float32(2), jnp.asarray(2.0)):
        battery.assert_same(f(scale=scale), expected)
    battery.assert_same(jax.jit(lambda s: f(scale=s))(2.0), expected)
    several = jax.vmap(lambda s: f(scale=s))(jnp.array([1.0, 2.0]))
    battery.assert_same(several[1], expected)


# --- bad input ------------------------------------------------------------------------------------

X = jnp.ones((5, 3, 4), "float32")


@names
def test_both_kinds_of_weights(name):
    with pytest.raises(ValueError, match=rf"{name}: mode_norms and syntony must not both"):
        BOTH[name](X, mode_norms=jnp.ones(4), syntony=jnp.ones(4))


@names
@pytest.mark.parametrize("shape", [(3,), (1,), (), (3, 4)], ids=str)
def test_mode_norms_of_another_shape(name, shape):
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"{name}: mode_norms .*\(4,\), got {got}"):
        BOTH[name](X, mode_norms=jnp.ones(shape))


@names
@pytest.mark.parametrize("argument", ["syntony", "where"])
@pytest.mark.parametrize("shape", [(3,), (5, 1), (2, 5, 3, 4), (1, 5, 3, 4)], ids=str)
def test_arrays_that_do_not_broadcast(name, argument, shape):
    value = jnp.ones(shape, bool if argument == "where" else "float32")
    pattern = rf"{name}: {argument} must broadcast to the shape \(5, 3, 4\) of x, got \({shape[0]}"
    with pytest.raises(ValueError, match=pattern):
        BOTH[name](X, **{argument: value})


@names
@pytest.mark.parametrize("argument", ["mode_norms", "syntony", "scale"])
def test_parameters_that_are_not_floating(name, argument):
    value = jnp.ones(() if argument == "scale" else 4, "int32")
    with pytest.raises(TypeError, match=rf"{name}: {argument} .*float16.*got int32"):
        BOTH[name](X, **{argument: value})


@names
def test_a_mask_that_is_not_boolean(name):
    with pytest.raises(TypeError, match=rf"{name}: where must be boolean, got float32"):
        BOTH[name](X, where=jnp.ones(4, "float32"))


@names
@pytest.mark.parametrize("axis", [3, -4])
def test_axes_out_of_range(name, axis):
    with pytest.raises(ValueError, match=rf"{name}: axis .*-3 and 2 .*got {axis}"):
        BOTH[name](X, axis=axis)


@names
@pytest.mark.parametrize("axis", [1.0, "last", None, (1,), [1], True], ids=str)
def test_axes_that_are_no_integers(name, axis):
    with pytest.raises(TypeError, match=rf"{name}: axis must be an integer, got"):
        BOTH[name](X, axis=axis)


@names
def test_scalars(name):
    with pytest.raises(ValueError, match=rf"{name}: x must have at least one axis, got a scalar"):
        BOTH[name](1.0)
    with pytest.raises(ValueError, match=rf"{name}: scale must be a scalar, got shape \(4,\)"):
        BOTH[name](X, scale=jnp.ones(4))
    with pytest.raises(TypeError, match=rf"{name}: scale must be an array, got str"):
        BOTH[name](X, scale="1")

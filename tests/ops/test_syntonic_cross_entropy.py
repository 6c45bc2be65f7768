"""syntonic_cross_entropy, the softmax of integer labels that is never stored."""

import functools
import re

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import softmax_cases
from jax.test_util import check_grads
from softmax_cases import MODES, check, draw, operation

from syntonic_jax import PHI, syntonic_cross_entropy, syntonic_log_softmax

pytestmark = pytest.mark.usefixtures("x64")

NAME = "syntonic_cross_entropy"


class TestTransformations(battery.Transformations):
    operations = (operation(NAME, "learned", masked=True),)
    variants = (
        operation(NAME, "provided", axis=0, lead=(2, 2)),
        operation(NAME, "shared", masked=True, axis=1, lead=(2, 2)),
    )


class TestTypes(battery.Types):
    operations = (operation(NAME, "learned"),)


class TestBadInput(battery.BadInput):
    operations = (operation(NAME),)

    test_unknown_output_type = None  # there is no such argument: the loss is not rounded


@pytest.mark.slow
def test_third_derivative(rng):
    x, w, scale = operation(NAME, "provided").operands(rng, lead=(2,), width=3)
    f = jax.jit(lambda x, w, s: syntonic_cross_entropy(x, jnp.array([2, 0]), syntony=w, scale=s))
    check_grads(f, (x, w, scale), order=3, modes=("fwd", "rev"), eps=1e-4, atol=1e-4, rtol=1e-4)


# --- accuracy -------------------------------------------------------------------------------------


def drawn_labels(rng, shape, axis, dtype="int32"):
    """Of the shape without the axis."""
    axis %= len(shape)
    return rng.integers(0, shape[axis], size=shape[:axis] + shape[axis + 1 :]).astype(dtype)


def drawn(rng, shape, axis, dtype, mode="identity", **options):
    """Operands, labels and the cotangent of the loss."""
    labels = drawn_labels(rng, shape, axis)
    ct = jnp.asarray(rng.normal(size=labels.shape), oracles.accumulation(dtype))
    return draw(rng, shape, axis, dtype, mode, **options), labels, ct


@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES))
@pytest.mark.parametrize(
    ("shape", "axis"), battery.thinned([((5, 33), -1), ((9,), 0), ((4, 6, 5), 1)]), ids=str
)
@pytest.mark.parametrize("mode", battery.thinned(list(MODES)[::-1]))
def test_accuracy(mode, shape, axis, dtype, implementation, rng):
    given, labels, ct = drawn(rng, shape, axis, dtype, mode)
    check(implementation, NAME, given, ct, axis=axis, labels=labels)


@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES, 3))
@pytest.mark.parametrize("mode", battery.thinned(list(MODES)))
def test_accuracy_with_a_mask(mode, dtype, implementation, rng):
    """And with masked labels, labels that are no class, and rows without any."""
    shape, axis = (6, 5, 4), 1
    where = rng.random(shape) < 0.6
    where[0, :, 0] = False
    given, labels, ct = drawn(rng, shape, axis, dtype, mode)
    labels[:2, 1:3] = [[-1, 5], [1000, -7]]
    labels[0, 0] = -1  # fully masked: 0 all the same
    check(implementation, NAME, given, ct, axis=axis, where=where, labels=labels)


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (2, 1000), (2, 50257), (1000, 5)], ids=str)
def test_accuracy_at_size(shape, implementation, rng):
    given, labels, ct = drawn(rng, shape, -1, "bfloat16", "learned")
    check(implementation, NAME, given, ct, labels=labels)


@pytest.mark.parametrize("mode", battery.thinned(list(MODES)))
def test_large_logits(mode, implementation, rng):
    for offset, spread in ((0.0, 1e4), (1e6, 1.0)):
        given, labels, ct = drawn(rng, (4, 7), -1, "float32", mode, offset=offset, spread=spread)
        check(implementation, NAME, given, ct, labels=labels)


def test_an_offset_costs_nothing(implementation, rng):
    x, labels = jnp.asarray(rng.integers(-8, 8, size=(3, 9)), "float32"), jnp.arange(3)
    f = functools.partial(syntonic_cross_entropy, implementation=implementation)
    value_and_slope = jax.value_and_grad(lambda x: jnp.sum(f(x, labels)))
    for near, far in zip(value_and_slope(x), value_and_slope(x + 1e6), strict=True):
        np.testing.assert_allclose(far, near, rtol=0, atol=64 * 2.0**-23)


# --- what it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [32, 1000, 50257, 151936])
def test_identity_mode_is_that_of_optax(classes, implementation, rng):
    """Each may be off by as much as the oracle allows an implementation; for ours see `check`."""
    x = jnp.asarray(3 * rng.normal(size=(3, classes)), "float32")
    labels = rng.integers(0, classes, size=3)
    ours = functools.partial(syntonic_cross_entropy, implementation=implementation)
    results = [
        jax.jit(jax.value_and_grad(lambda x, f=f: jnp.sum(f(x, labels))))(x)
        for f in (ours, optax.softmax_cross_entropy_with_integer_labels)
    ]
    # (n + STEPS) u of the total moves the loss, and each probability relatively; twice.
    error = 2 * (classes + 2 * oracles.STEPS) * oracles.unit("float32")
    (loss, slope), (expected, expected_slope) = results
    np.testing.assert_allclose(loss, expected, rtol=0, atol=3 * error)
    np.testing.assert_allclose(slope, expected_slope, rtol=error, atol=4 * oracles.unit("float32"))


@pytest.mark.parametrize("axis", battery.thinned([-1, 0]))
def test_derivatives_are_those_of_optax(axis, implementation, rng):
    """To second order, in float64."""
    x = jnp.asarray(rng.normal(size=(4, 4)))
    labels = jnp.asarray(rng.integers(0, 4, size=4))
    ours = functools.partial(syntonic_cross_entropy, implementation=implementation)

    def derivatives(f):
        def loss(x):
            return jnp.sum(jnp.sin(f(x, labels, axis=axis)))

        return jax.jit(lambda x: (jax.value_and_grad(loss)(x), jax.hessian(loss)(x)))(x)

    battery.assert_same(
        derivatives(ours), derivatives(optax.softmax_cross_entropy_with_integer_labels)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_is_the_negative_logarithm_at_the_label(masked, implementation, rng):
    x, norms = jnp.asarray(rng.normal(size=(3, 5))), jnp.arange(5.0)
    labels = jnp.array([0, 2, 4])
    where = jnp.asarray(rng.random((3, 5)) < 0.5).at[jnp.arange(3), labels].set(True)
    options = {"mode_norms": norms, "scale": 0.3, "where": where if masked else None}

    def ours(x):
        return syntonic_cross_entropy(x, labels, implementation=implementation, **options)

    def gathered(x):
        log = syntonic_log_softmax(x, implementation=implementation, **options)
        return -jnp.take_along_axis(log, labels[:, None], -1)[:, 0]

    for f, g in ((ours, gathered), (jax.jacrev(ours), jax.jacrev(gathered))):
        battery.assert_same(f(x), g(x))


def test_equal_logits_with_mode_norms(implementation):
    norms = jnp.array([0.0, 10, 10, 10, 10])
    loss = syntonic_cross_entropy(
        jnp.ones((2, 5)), jnp.array([0, 3]), mode_norms=norms, implementation=implementation
    )
    first = np.log1p(4 * np.exp(-10 / PHI))
    np.testing.assert_allclose(loss, [first, first + 10 / PHI], rtol=1e-12)


def test_keeps_nothing_of_the_size_of_the_logits(implementation, rng):
    """Beside the logits themselves: what the pullback holds, and what the gradient is made of."""
    x, labels = jnp.asarray(rng.normal(size=(6, 50)), "bfloat16"), jnp.zeros(6, int)
    norms = jnp.ones(50, "float32")

    def f(x, norms):
        return syntonic_cross_entropy(x, labels, mode_norms=norms, implementation=implementation)

    _, pull = jax.vjp(f, x, norms)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= x.size]
    assert all(leaf is x or np.array_equal(leaf, x) for leaf in kept)
    assert len(kept) <= 1

    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: f(*a).sum(), (0, 1)))(x, norms).jaxpr
    ours = [e for e in softmax_cases.equations(jaxpr) if e.primitive.name.startswith("syntonic_")]
    assert [e.primitive.name for e in ours] == [NAME, f"{NAME}_cotangent"]
    large = [v.aval for e in ours for v in e.outvars if v.aval.size >= x.size]
    assert [aval.dtype for aval in large] == [x.dtype]  # the gradient


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32", "int64", "uint64"])
def test_label_types(dtype, implementation, rng):
    x = jnp.asarray(rng.normal(size=(3, 300)))
    labels = np.array([0, 7, 100])
    f = functools.partial(syntonic_cross_entropy, x, implementation=implementation)
    battery.assert_same(f(labels.astype(dtype)), f(labels))


@pytest.mark.parametrize(
    "label", [np.int8(-1), np.uint8(200), np.uint32(2**32 - 1), np.int64(2**32), np.uint64(2**63)]
)
def test_labels_that_are_no_class(label, implementation, rng):
    """NaN and no gradient, and no other row takes notice: none reads beside its own."""
    x = jnp.asarray(rng.normal(size=(3, 4)))
    labels = np.zeros(3, label.dtype)
    labels[1] = label

    def f(x):
        return syntonic_cross_entropy(x, labels, implementation=implementation)

    loss, pull = jax.vjp(f, x)
    (dx,) = pull(jnp.ones(3))
    assert np.array_equal(np.isnan(loss), [False, True, False])
    np.testing.assert_array_equal(dx[1], 0)
    good = functools.partial(
        syntonic_cross_entropy, labels=jnp.zeros(2, int), implementation=implementation
    )
    expected, pull = jax.vjp(good, x[::2])
    battery.assert_same((loss[::2], dx[::2]), (expected, pull(jnp.ones(2))[0]))
    hessian = jax.hessian(lambda x: f(x)[1])(x)
    np.testing.assert_array_equal(hessian, 0)


def test_labels_have_float0_tangents(implementation, rng):
    x, labels = jnp.asarray(rng.normal(size=(3, 4))), jnp.array([1, 2, 3])

    def f(x, labels):
        return syntonic_cross_entropy(x, labels, implementation=implementation)

    nothing = np.zeros(3, jax.dtypes.float0)
    tangent = jax.jvp(f, (x, labels), (jnp.ones_like(x), nothing))[1]
    np.testing.assert_allclose(tangent, 0, atol=8 * 2.0**-52)  # a shift of a row
    dx, d_labels = jax.vjp(f, x, labels)[1](jnp.ones(3))
    assert (d_labels.dtype, d_labels.shape) == (jax.dtypes.float0, (3,))
    assert dx.shape == x.shape
    slopes = jax.grad(lambda *a: f(*a).sum(), (0, 1), allow_int=True)(x, labels)
    assert slopes[1].dtype == jax.dtypes.float0
    # Labels alone mapped, and both: no loop, and the same numbers.
    each = jax.vmap(f, (None, 0))(x, jnp.stack([labels, labels - 1]))
    battery.assert_same(each[0], f(x, labels))


# --- special values -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES, 3))
def test_rows_that_are_not_finite_stay_alone(dtype, implementation, rng):
    x = jnp.asarray(rng.normal(size=(5, 4)), dtype)
    x = x.at[1, 2].set(jnp.nan).at[2, 0].set(jnp.inf).at[3].set(-jnp.inf)
    f = functools.partial(
        syntonic_cross_entropy, labels=jnp.zeros(5, int), implementation=implementation
    )
    for rows in (f(x), jax.grad(lambda x: f(x).sum())(x)):
        assert np.all(np.isnan(rows[1:4]))
        assert np.all(np.isfinite(rows[::4]))


def test_a_logit_of_minus_infinity_is_as_in_optax(implementation, rng):
    """At the label the loss is +inf, and the gradient is what it always is."""
    x = jnp.asarray(rng.normal(size=(2, 4))).at[0, 1].set(-jnp.inf).at[1, 2].set(-jnp.inf)
    labels = jnp.array([1, 0])
    ours = functools.partial(syntonic_cross_entropy, implementation=implementation)
    theirs = optax.softmax_cross_entropy_with_integer_labels
    got, expected = (jax.vjp(lambda x, f=f: f(x, labels), x) for f in (ours, theirs))
    np.testing.assert_array_equal(np.isinf(got[0]), np.isinf(expected[0]))
    battery.assert_same(got[0][1], expected[0][1])
    battery.assert_same(got[1](jnp.ones(2)), expected[1](jnp.ones(2)))


@pytest.mark.parametrize("mode", battery.thinned(["provided", "learned", "shared"], 3))
def test_nan_under_the_mask_does_not_leak(mode, implementation, rng):
    where = jnp.asarray(rng.random((4, 5)) < 0.6).at[1].set(False).at[:, 2].set(False)
    where = where.at[0, 1].set(True)
    labels = jnp.argmax(where, -1)
    good = draw(rng, (4, 5), -1, "float64", mode)
    f = functools.partial(
        syntonic_cross_entropy, labels=labels, where=where, implementation=implementation
    )

    def loss(given):
        given = dict(given)
        return jnp.sum(jnp.sin(3 * f(given.pop("x"), **given)))

    slopes = jax.grad(loss)

    def second(given):
        return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(slopes(given)))

    results = []
    for value in (jnp.nan, jnp.inf, 0.25):
        given = dict(good, x=jnp.where(where, good["x"], value))
        if mode == "learned":
            given["mode_norms"] = given["mode_norms"].at[2].set(value)
        elif mode == "provided":
            given["syntony"] = jnp.where(where, given["syntony"], value)
        else:
            given["syntony"] = given["syntony"].at[:, 2].set(value)
        results.append(jax.jit(lambda g: (loss(g), slopes(g), jax.grad(second)(g)))(given))
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(results[-1]))
    for other in results[:2]:
        battery.assert_same(other, results[2])


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0,), (2, 0, 3)], ids=str)
def test_empty(shape, implementation):
    """Without a class there is no label either; without rows there are no losses."""
    x, norms = jnp.ones(shape, "bfloat16"), jnp.ones(shape[-1], "float32")
    labels = jnp.zeros(shape[:-1], int)

    def f(x, norms):
        return syntonic_cross_entropy(x, labels, mode_norms=norms, implementation=implementation)

    loss, pull = jax.vjp(f, x, norms)
    assert (loss.shape, loss.dtype) == (shape[:-1], "float32")
    assert np.all(np.isnan(loss))
    np.testing.assert_array_equal(pull(loss)[1], 0)
    masked = syntonic_cross_entropy(x, labels, where=jnp.ones(shape, bool))
    np.testing.assert_array_equal(masked, 0)


# --- bad input ------------------------------------------------------------------------------------

X, LABELS = jnp.ones((5, 3, 4), "float32"), jnp.zeros((5, 3), "int32")


def test_a_loss_needs_its_logits_and_their_gradient(installed_double):
    """And nothing else of their size: no probabilities, no copy in float32.

    What a GPU then allocates is in the benchmarks: `peak_bytes`.
    """
    logits = jax.ShapeDtypeStruct((64, 50257), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    loss = functools.partial(syntonic_cross_entropy, implementation="cuda")
    gradient = jax.jit(jax.value_and_grad(lambda z, labels: loss(z, labels).mean()))
    program = gradient.lower(logits, labels).as_text()
    assert "50257xf32" not in program
    of_this_size = re.findall(r"%\S+ = stablehlo\.(\S+) .*-> .*50257xbf16>", program)
    assert [name for name in of_this_size if name != "reshape"] == ["custom_call"]


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_labels_that_are_no_integers(dtype):
    with pytest.raises(TypeError, match=rf"{NAME}: labels must be integers, got {dtype}"):
        syntonic_cross_entropy(X, jnp.ones((5, 3), dtype))


@pytest.mark.parametrize("shape", [(5,), (5, 3, 1), (3, 5), (5, 3, 4), ()], ids=str)
def test_labels_of_another_shape(shape):
    pattern = rf"{NAME}: labels must have the shape \(5, 3\) .*got \({', '.join(map(str, shape))}"
    with pytest.raises(ValueError, match=pattern):
        syntonic_cross_entropy(X, jnp.zeros(shape, "int32"))
    with pytest.raises(ValueError, match=rf"{NAME}: labels must have the shape \(5, 4\) "):
        syntonic_cross_entropy(X, LABELS, axis=1)


def test_arguments_of_the_softmax_are_checked_as_there():
    for error, pattern, options in (
        (ValueError, "mode_norms and syntony", {"mode_norms": X[0, 0], "syntony": X}),
        (ValueError, r"mode_norms .*\(4,\), got \(3,\)", {"mode_norms": jnp.ones(3)}),
        (ValueError, r"syntony .*\(5, 3, 4\) of logits, got \(3,\)", {"syntony": jnp.ones(3)}),
        (ValueError, r"where .*\(5, 3, 4\) of logits, got \(3,\)", {"where": jnp.ones(3, bool)}),
        (TypeError, "where must be boolean", {"where": X}),
        (ValueError, "axis .*got 3", {"axis": 3}),
        (TypeError, "axis must be an integer", {"axis": 1.0}),
        (ValueError, "scale must be a scalar", {"scale": jnp.ones(1)}),
    ):
        with pytest.raises(error, match=rf"{NAME}: {pattern}"):
            syntonic_cross_entropy(X, LABELS, **options)
    with pytest.raises(ValueError, match=rf"{NAME}: logits must have at least one axis"):
        syntonic_cross_entropy(1.0, 0)

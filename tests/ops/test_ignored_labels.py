"""Labels out of use, `ignore_index`: loss 0 and gradient 0, and no NaN on the way there.

The kind: a label that is no class made the loss NaN, which no mask behind it takes away: 0 · NaN is
NaN, and `debug_nans` finds it before any `jnp.where` does.
"""

import functools
from typing import Any

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import transformations
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from softmax_cases import MODES, draw

from syntonic_jax import syntonic_cross_entropy

pytestmark = pytest.mark.usefixtures("x64")

LABELS = np.array([2, -100, 0, -100, 4])
KEPT = LABELS != -100


def loss_of(implementation, labels: Any = LABELS, ignore_index: Any = -100, **options):
    """A function of the other operands by name."""

    def loss(given):
        rest = {k: v for k, v in given.items() if k != "x"} | options
        return syntonic_cross_entropy(
            given["x"], labels, ignore_index=ignore_index, implementation=implementation, **rest
        )

    return loss


def composed(implementation, labels: Any = LABELS, **options):
    """The same by selection of rows from a call whose labels are all classes."""
    whole = loss_of(implementation, np.where(KEPT, labels, 0), None, **options)
    return lambda given: jnp.where(KEPT, whole(given), 0)


def spoiled(given, rows=~KEPT):
    """With anything at all in the logits of rows that do not count."""
    bad = jnp.resize(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf], given["x"].dtype), given["x"].shape)
    bad = bad.at[-1].set(-jnp.inf).at[1].set(-jnp.inf)  # a row of −inf alone, too
    return given | {"x": jnp.where(rows[:, None], bad, given["x"])}


@pytest.mark.parametrize("mode", battery.thinned(list(MODES)))
@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES))
def test_loss_and_gradients_are_those_of_the_other_rows(dtype, mode, implementation, rng):
    """To the bit, whatever lies in the rows out of use: of the logits, and all parameters.

    Of the composed form, another program, products may be rounded and sums ordered in other ways.
    """
    good = draw(rng, (5, 7), -1, dtype, mode)
    ct = jnp.asarray(rng.normal(size=5), oracles.accumulation(dtype))

    def both(f, given):
        loss, pull = jax.vjp(f, given)
        return loss, pull(ct)[0]

    ours = jax.jit(functools.partial(both, loss_of(implementation)))
    loss, slopes = ours(good)
    jax.tree.map(np.testing.assert_array_equal, ours(spoiled(good)), (loss, slopes))
    assert loss.dtype == oracles.accumulation(dtype)
    np.testing.assert_array_equal(loss[~KEPT], 0)
    np.testing.assert_array_equal(oracles.real(slopes["x"])[~KEPT], 0)

    expected, of_composed = jax.jit(functools.partial(both, composed(implementation)))(good)
    np.testing.assert_array_equal(loss, expected)
    along, unit = oracles.real(slopes["x"]), oracles.unit(oracles.accumulation(dtype))
    for name in slopes:
        a, e = oracles.real(slopes[name]), oracles.real(of_composed[name])
        if name == "x":  # some roundings of p · ct and its difference from ct
            rounding = 8 * unit * np.abs(ct).max()
        else:  # sums of as many products of these and of numbers below 8
            rounding = along.size * unit * 8 * np.abs(along).sum()
        atol = rounding + 2 * oracles.unit(slopes[name].dtype) * np.abs(e).max()
        np.testing.assert_allclose(a, e, rtol=0, atol=atol)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", battery.thinned(["learned", "provided"], 2))
def test_to_second_order(mode, masked, implementation, rng):
    """Forward over reverse and reverse over reverse, with rows that are not numbers."""
    good = draw(rng, (5, 4), -1, "float64", mode)
    labels = np.where(KEPT, np.minimum(LABELS, 3), -100)
    where = jnp.asarray(rng.random((5, 4)) < 0.6).at[np.arange(5), labels * KEPT].set(True)
    options = {"where": where.at[3].set(False)} if masked else {}
    along = jax.tree.map(jnp.cos, good)

    ours, expected = (
        jax.jit(lambda given, f=f: transformations.to_second_order(f, given, along))
        for f in (
            loss_of(implementation, labels, **options),
            composed(implementation, labels, **options),
        )
    )
    for given in (good, spoiled(good)):
        found = ours(given)
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(found))
        battery.assert_same(found, expected(good))


@pytest.mark.parametrize("jit", [False, True])
def test_under_debug_nans_and_checkify(jit, implementation, rng):
    """Where the recipe of old raised; in a where that hides the row it did so all the same."""
    x = jnp.asarray(rng.normal(size=(5, 7)), "float32").at[1].set(-jnp.inf)
    f = loss_of(implementation)

    def mean(x):
        return f({"x": x}).sum() / KEPT.sum()

    def hidden(x):
        return jnp.where(KEPT, f({"x": x}), 0).sum()

    wrap = jax.jit if jit else lambda f: f
    with jax.debug_nans(True):
        for g in (mean, hidden, jax.grad(mean), jax.grad(hidden)):
            assert np.all(np.isfinite(wrap(g)(x)))
    errors = checkify.float_checks | checkify.index_checks | checkify.user_checks
    for g in (mean, jax.grad(mean)):
        error, result = wrap(checkify.checkify(g, errors=errors))(x)
        assert error.get() is None
        assert np.all(np.isfinite(result))


TYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
# Far from zero, the numbers that stand for others inside, a class, and beyond several types.
VALUES = [-100, -1, -2, 0, 3, 255, 2**31 - 1, -(2**31), 2**32 - 100, -(2**40), 2**63]


@pytest.mark.parametrize("dtype", battery.thinned(TYPES, 3))
def test_only_the_label_itself_is_out_of_use(dtype, implementation):
    """In every type of labels and for every integer: no other number becomes it on the way."""
    held = np.iinfo(dtype)
    numbers = [*VALUES, 156, 2**32 - 2, 2**64 - 100, 2**32, 2, 4, -3]
    labels = np.array([n for n in numbers if held.min <= n <= held.max], dtype)
    x = jnp.zeros((len(labels), 4), "float32")

    @functools.partial(jax.jit, static_argnums=1)
    def losses(x, ignored):
        loss, pull = jax.vjp(lambda x: loss_of(implementation, labels, ignored)({"x": x}), x)
        return loss, pull(jnp.ones_like(loss))[0]

    for ignored in (None, *VALUES):
        loss, slope = losses(x, ignored)
        out_of_use = np.array([int(n) == ignored for n in labels])
        is_class = np.array([0 <= int(n) < 4 for n in labels])
        expected = np.where(is_class, np.float32(np.log(4)), np.nan)
        np.testing.assert_allclose(loss, np.where(out_of_use, 0, expected), rtol=2.0**-22)
        np.testing.assert_array_equal(np.any(slope != 0, -1), is_class & ~out_of_use)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_and_other_axes(axis, implementation, rng):
    """Labels mapped alone, both mapped, and the classes along an inner axis."""
    x = jnp.asarray(rng.normal(size=(3, 5, 7)))
    labels = jnp.asarray(rng.integers(0, x.shape[axis], (3, 7) if axis else (5, 7)))
    labels = labels.at[:, 2].set(-100).at[0].set(-100)
    f = functools.partial(
        syntonic_cross_entropy, ignore_index=-100, implementation=implementation, axis=axis
    )

    def expected(x, labels):
        kept = labels != -100
        log = jax.nn.log_softmax(x, axis)
        chosen = jnp.take_along_axis(log, jnp.expand_dims(labels * kept, axis), axis)
        return jnp.where(kept, -chosen.squeeze(axis), 0)

    battery.assert_same(f(x, labels), expected(x, labels))
    shifted = jnp.stack([labels, jnp.where(labels > 0, labels - 1, labels)])
    for axes, operands in ((0, (jnp.stack([x, 2 * x]), shifted)), ((None, 0), (x, shifted))):
        for g in (lambda f: f, lambda f: jax.grad(lambda *a: f(*a).sum())):
            found, want = (jax.vmap(g(h), axes)(*operands) for h in (f, expected))
            battery.assert_same(found, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_rows_stay_where_they_are(kind, implementation, rng):
    """Gradients too, by the classes' parameter with the one all-reduce that its sum takes."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    x, norms = jnp.asarray(rng.normal(size=(16, 6))), jnp.arange(6.0)
    labels = jnp.asarray(rng.integers(0, 6, 16)).at[::3].set(-100).astype("int32")

    def f(x, norms, labels):
        return loss_of(implementation, labels)({"x": x, "mode_norms": norms})

    def slopes(x, norms, labels, ct):
        return jax.vjp(lambda x, n: f(x, n, labels), x, norms)[1](ct)

    operands = x, norms, labels, jnp.ones(16)
    expected = f(*operands[:3]), slopes(*operands)
    with jax.set_mesh(mesh):
        specs = (P("d", None), P(), P("d"), P("d"))
        operands = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip(operands, specs)]
        programs = [jax.jit(f).lower(*operands[:3]), jax.jit(slopes).lower(*operands)]
        programs = [program.compile() for program in programs]
        found = programs[0](*operands[:3]), programs[1](*operands)
        texts = [str(program.as_text()) for program in programs]
    moves = ("all-gather", "all-to-all", "collective-permute")
    assert not any(move in text for move in moves for text in texts)
    assert "all-reduce" not in texts[0]
    battery.assert_same(found, expected)


def test_it_is_an_attribute_of_the_call_and_no_pass(installed_double):
    """32-bit labels go to the kernel as they are: the program has no other operation for it."""
    x, labels = jax.ShapeDtypeStruct((6, 50), "bfloat16"), jax.ShapeDtypeStruct((6,), "int32")

    def program(ignored):
        def f(x, labels):
            return loss_of("cuda", labels, ignored)({"x": x}).sum()

        return jax.jit(jax.value_and_grad(f)).lower(x, labels).as_text()

    without, with_it = program(None), program(-100)
    assert "ignored = 0 : i32" in without
    assert with_it == without.replace("ignored = 0 : i32", "ignored = -100 : i32")


@pytest.mark.parametrize("value", [1.0, "-100", True, [-100], np.float32(-100)], ids=repr)
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match="syntonic_cross_entropy: ignore_index must be an integer"):
        syntonic_cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), ignore_index=value)


def test_numbers_of_numpy_are_integers(implementation):
    x, labels = jnp.zeros((2, 4)), np.array([1, -7])
    for value in (np.int8(-7), np.int64(-7)):
        loss = loss_of(implementation, labels, value)({"x": x})
        np.testing.assert_allclose(loss, [np.log(4), 0])


def test_a_row_that_is_no_number_has_no_part_in_derivatives(implementation):
    """Nothing that is kept for them is NaN, either."""
    x = jnp.asarray([[np.nan] * 3, [1.0, 2.0, 3.0]])
    f = loss_of(implementation, jnp.array([-100, 1]))
    with jax.debug_nans(True):
        slopes = jax.grad(lambda x: jnp.sum(jnp.sin(f({"x": x}))))(x)
    np.testing.assert_array_equal(slopes[0], 0)
    error, _ = checkify.checkify(jax.grad(lambda x: f({"x": x}).sum()), checkify.float_checks)(x)
    assert error.get() is None

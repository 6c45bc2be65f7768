"""What a mask leaves empty, or hides, poisons nothing that is shared: no value and no derivative.

The kind: a row without any class, or one that is NaN where it counts, made NaN of what is masked,
or of gradients of parameters that other rows share.
"""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import transformations
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from softmax_cases import FUNCTIONS, MODES, draw

pytestmark = pytest.mark.usefixtures("x64")

LOSS = "syntonic_cross_entropy"
names = pytest.mark.parametrize("name", FUNCTIONS)
# Nothing is left of rows 1 and 4, and of class 3 nothing in any row.
WHERE = np.array(
    [
        [True, True, False, False, True],
        [False] * 5,
        [False, True, True, False, False],
        [True, False, True, False, True],
        [False] * 5,
        [False, False, True, False, True],
    ]
)
LABELS = WHERE.argmax(-1)
EMPTY = ~WHERE.any(-1)
TYPES = ("bfloat16", "float16", "float64", "float32")  # each with one of MODES


def call(name, given, where, implementation):
    """A function of the operands by name, 0 where there is −inf by definition."""
    f = functools.partial(FUNCTIONS[name], implementation=implementation, where=where)
    rest = {k: v for k, v in given.items() if k != "x"}
    if name == LOSS:
        return f(given["x"], LABELS[: len(given["x"])], **rest)
    y = f(given["x"], **rest)
    return y if name == "syntonic_softmax" else jnp.where(where, y, 0)


def hiding(good, value):
    """The operands with `value` in whatever the mask hides: of class 3 in all that is shared."""
    given = dict(good, x=jnp.where(WHERE, good["x"], value))
    if "mode_norms" in given:
        given["mode_norms"] = given["mode_norms"].at[3].set(value)
    if "syntony" in given and given["syntony"].shape[0] == 1:
        given["syntony"] = given["syntony"].at[:, 3].set(value)
    elif "syntony" in given:
        given["syntony"] = jnp.where(WHERE, given["syntony"], value)
    return given


@names
@pytest.mark.parametrize(("dtype", "mode"), battery.thinned(list(zip(TYPES, MODES, strict=True))))
def test_rows_without_any_class(name, dtype, mode, implementation, rng):
    """They are 0, and so is all that they give; the other rows are as without them."""
    good = draw(rng, WHERE.shape, -1, dtype, mode)
    along = jax.tree.map(jnp.cos, good)
    run = jax.jit(
        lambda given: transformations.to_second_order(
            lambda g: call(name, g, WHERE, implementation), given, along
        )
    )
    expected = run(good)
    for value in (np.nan, np.inf, -np.inf):
        found = run(hiding(good, value))
        assert all(np.all(np.isfinite(oracles.real(v))) for v in jax.tree.leaves(found))
        (y, dy), *slopes = found
        for rows in (y, dy):
            np.testing.assert_array_equal(oracles.real(rows)[EMPTY], 0)
        for slope in slopes:
            np.testing.assert_array_equal(oracles.real(slope["x"])[~WHERE], 0)
            if "mode_norms" in slope:
                assert slope["mode_norms"][3] == 0
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@names
@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES, 3))
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_row_that_is_no_number_has_none_under_the_mask(name, dtype, bad, implementation, rng):
    """It is NaN where it counts, in value and gradient; what is masked of it stays 0."""
    good = draw(rng, WHERE.shape, -1, dtype, "learned")
    given = good | {"x": good["x"].at[3, 2].set(bad)}
    ct_shape = WHERE.shape[:1] if name == LOSS else WHERE.shape
    ct = rng.normal(size=ct_shape)

    def f(given):
        return call(name, given, WHERE, implementation)

    y, pull = jax.vjp(f, given)
    slopes = pull(jnp.asarray(ct, y.dtype))[0]
    tangent = jax.jvp(f, (given,), (jax.tree.map(jnp.cos, good),))[1]
    shown = WHERE if name != LOSS else WHERE[:, :1] | True
    for rows in (y, tangent):
        rows = oracles.real(rows).reshape(len(WHERE), -1)
        assert np.all(np.isnan(rows[3][shown[3][: rows.shape[1]]]))
        assert np.all(np.isfinite(rows[~np.isnan(rows).any(-1)]))
        if name != LOSS:
            np.testing.assert_array_equal(rows[~WHERE], 0)
    dx = oracles.real(slopes["x"])
    np.testing.assert_array_equal(dx[~WHERE], 0)
    assert np.all(np.isfinite(np.delete(dx, 3, 0)))
    assert np.isnan(dx[3]).any()
    # A class that this row masks keeps its gradient: it is the sum over rows in which it counts.
    norms = np.asarray(slopes["mode_norms"])
    np.testing.assert_array_equal(np.isnan(norms[~WHERE[3]]), False)
    assert norms[3] == 0


@names
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded(name, kind, implementation, rng):
    """A device whose rows are all empty gives nothing to the sums over all of them."""
    good = draw(rng, (6, 5), -1, "float64", "learned")
    given = hiding(good, np.nan)
    given["x"] = jnp.concatenate([given["x"], jnp.full((2, 5), np.nan)])
    where = jnp.concatenate([jnp.asarray(WHERE), jnp.zeros((2, 5), bool)])

    def slopes(given, where, labels):
        def scalar(given):
            f = functools.partial(FUNCTIONS[name], implementation=implementation, where=where)
            rest = {k: v for k, v in given.items() if k != "x"}
            if name == LOSS:
                return jnp.sum(jnp.sin(3 * f(given["x"], labels, **rest)))
            return jnp.sum(jnp.sin(3 * jnp.where(where, f(given["x"], **rest), 0)))

        return jax.grad(scalar)(given), jax.jvp(jax.grad(scalar), (given,), (given_along,))[1]

    given_along = jax.tree.map(lambda v: jnp.where(jnp.isfinite(v), jnp.cos(v), 1), given)
    labels = jnp.asarray([*LABELS, 0, 0])
    expected = jax.jit(slopes)(given, where, labels)
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(expected))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("d", None))
        put = {k: jax.device_put(v, NamedSharding(mesh, P())) for k, v in given.items()}
        put["x"] = jax.device_put(given["x"], rows)
        whole = NamedSharding(mesh, P())
        given_along = {k: jax.device_put(v, whole) for k, v in given_along.items()}
        given_along["x"] = jax.device_put(given_along["x"], rows)
        operands = (
            put,
            jax.device_put(where, rows),
            jax.device_put(labels, NamedSharding(mesh, P("d"))),
        )
        found = jax.jit(slopes)(*operands)
    battery.assert_same(found, expected)

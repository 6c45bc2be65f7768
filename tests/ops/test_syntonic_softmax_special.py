"""syntonic_softmax and syntonic_log_softmax of NaN, infinities, masks and nothing."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from softmax_cases import draw

from syntonic_jax import syntonic_log_softmax, syntonic_softmax

pytestmark = pytest.mark.usefixtures("x64")

SOFTMAX, LOG = "syntonic_softmax", "syntonic_log_softmax"
BOTH = {SOFTMAX: syntonic_softmax, LOG: syntonic_log_softmax}
JAX = {SOFTMAX: jax.nn.softmax, LOG: jax.nn.log_softmax}
names = pytest.mark.parametrize("name", BOTH)


def loss_of(f, where=None):
    def loss(x, *rest):
        y = f(x, *rest)
        y = y if where is None else jnp.where(where, y, 0)
        return jnp.sum(jnp.sin(3 * y))

    return loss


@names
@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES, 3))
def test_rows_that_are_not_finite_stay_alone(name, dtype, implementation, rng):
    x = jnp.asarray(rng.normal(size=(5, 4)), dtype)
    x = x.at[1, 2].set(jnp.nan).at[2, 0].set(jnp.inf).at[3].set(-jnp.inf)
    f = functools.partial(BOTH[name], implementation=implementation)
    for rows in (f(x), jax.grad(loss_of(f))(x)):
        assert np.all(np.isnan(rows[1:4]))
        assert np.all(np.isfinite(rows[::4]))


@names
def test_one_infinite_logit(name, implementation, rng):
    """−inf has probability 0, as in jax."""
    x = jnp.asarray(rng.normal(size=(2, 4))).at[0, 1].set(-jnp.inf)
    ours = functools.partial(BOTH[name], implementation=implementation)
    battery.assert_same(jnp.exp(ours(x)), jnp.exp(JAX[name](x)))
    ct = jnp.cos(jnp.arange(8.0).reshape(2, 4))
    battery.assert_same(jax.vjp(ours, x)[1](ct), jax.vjp(JAX[name], x)[1](ct))


@names
@pytest.mark.parametrize("mode", battery.thinned(["provided", "learned", "shared"], 3))
def test_nan_under_the_mask_does_not_leak(name, mode, implementation, rng):
    """In no value and no derivative up to the second, in either mode of both, fully masked or not.

    What lies under the mask may as well be anything else.
    """
    where = jnp.asarray(rng.random((4, 5)) < 0.6).at[1].set(False).at[:, 2].set(False)
    where = where.at[0, 1].set(True)
    good = draw(rng, (4, 5), -1, "float64", mode)
    results, along = [], jax.tree.map(jnp.cos, good)
    for value in (jnp.nan, jnp.inf, 0.25):
        given = dict(good, x=jnp.where(where, good["x"], value))
        if mode == "learned":
            given["mode_norms"] = given["mode_norms"].at[2].set(value)
        elif mode == "provided":
            given["syntony"] = jnp.where(where, given["syntony"], value)
        else:
            given["syntony"] = given["syntony"].at[:, 2].set(value)

        def loss(given):
            f = functools.partial(BOTH[name], where=where, implementation=implementation)
            return loss_of(lambda g: f(**g), where)(given)

        slopes = jax.grad(loss)

        def second(given, slopes=slopes):
            return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(slopes(given)))

        y = BOTH[name](**given, where=where, implementation=implementation)
        assert np.all(np.asarray(y)[~where] == (0.0 if name == SOFTMAX else -np.inf))
        results.append(
            (
                jnp.where(where, y, 0),
                *jax.jit(
                    lambda given, s=slopes, second=second: (
                        s(given),
                        jax.grad(second)(given),
                        jax.jvp(s, (given,), (along,))[1],
                    )
                )(given),
            )
        )
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(results[-1]))
        assert np.all(np.asarray(results[-1][1]["x"])[~where] == 0)
    for other in results[:2]:
        battery.assert_same(other, results[2])


@names
def test_nan_tangents_under_the_mask_do_not_leak(name, implementation, rng):
    """What is masked is no operand and no result: neither tangents nor cotangents of it matter."""
    x, dx = jnp.asarray(rng.normal(size=(2, 3, 5)))
    where = jnp.asarray(rng.random((3, 5)) < 0.6).at[0].set(False).at[1, 0].set(True)
    f = functools.partial(BOTH[name], where=where, implementation=implementation)
    _, pull = jax.vjp(f, x)
    results = []
    for value in (jnp.nan, 0.0):
        given = jnp.where(where, dx, value)
        results.append((jax.jvp(f, (x,), (given,))[1], pull(given)[0]))
    for nothing in results[0]:
        assert np.all(np.asarray(nothing)[~where] == 0)
    battery.assert_same(*results)


@names
def test_nan_where_it_counts_propagates(name, implementation, rng):
    """max(NaN, c) is NaN: in x, in a weight, in a norm and in the scale."""
    x = jnp.asarray(rng.normal(size=(2, 4)))
    f = functools.partial(BOTH[name], x, implementation=implementation)
    bad = jnp.ones(4).at[1].set(jnp.nan)
    for y in (
        f(syntony=bad),
        f(mode_norms=bad),
        f(mode_norms=jnp.ones(4), scale=jnp.nan),
        f(syntony=jnp.ones((2, 4)), scale=jnp.nan),
    ):
        assert np.all(np.isnan(y))
    one_row = f(syntony=jnp.ones((2, 4)).at[0, 1].set(jnp.nan))
    assert np.all(np.isnan(one_row) == [[True] * 4, [False] * 4])


@names
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0,), (2, 0, 3)], ids=str)
def test_empty(name, shape, implementation):
    x = jnp.ones(shape, "bfloat16")
    f = functools.partial(BOTH[name], axis=1 if len(shape) == 3 else -1)
    width = shape[1] if len(shape) == 3 else shape[-1]
    norms = jnp.ones(width, "float32")
    y, pull = jax.vjp(lambda x, n: f(x, mode_norms=n, implementation=implementation), x, norms)
    dx, d_norms = pull(y)
    assert (y.shape, y.dtype, dx.shape) == (shape, x.dtype, shape)
    np.testing.assert_array_equal(d_norms, 0)
    assert f(x, where=jnp.ones(shape, bool), syntony=jnp.ones(shape)).shape == shape

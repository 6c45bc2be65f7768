"""Nothing under the mask: a channel without elements has y = bias and no derivatives.

Its statistics stay NaN, and none of it reaches another channel, by any derivative.
"""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from syntonic_jax import golden_batch_norm

pytestmark = pytest.mark.usefixtures("x64")

SHAPE, EMPTY = (8, 2, 4), 2  # rows, and the channel without elements
# Layouts: the feature axes, and the way there and back.
LAYOUTS = {
    "last": (-1, lambda a: a, lambda a: a),
    "first": (1, lambda a: jnp.moveaxis(a, -1, 1), lambda a: jnp.moveaxis(a, 1, -1)),
    "apart": (
        (0, 3),
        lambda a: jnp.moveaxis(a.reshape(*a.shape[:-1], 2, 2), -2, 0),
        lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], 4),
    ),
}
# Masks that leave that channel nothing; of size 1 along axes, of a lower rank.
MASKS = {
    "full": lambda rng: (rng.random(SHAPE) < 0.7) & (np.arange(4) != EMPTY) | _firsts(),
    "examples": lambda rng: _firsts()[:, :1],
    "features": lambda rng: np.arange(4) != EMPTY,
}
POISONS = {"finite": 1.0, "nan": np.nan, "inf": np.inf}


def _firsts():
    """Two rows of every channel but the empty one."""
    return (np.arange(8)[:, None, None] < 2) & (np.arange(4) != EMPTY) & np.ones(SHAPE, bool)


def operands(rng, dtype, poison=1.0):
    x = rng.normal(size=SHAPE)
    x[1::2, :, EMPTY] *= poison
    scale, bias = rng.normal(size=(2, SHAPE[-1]))
    acc = oracles.accumulation(dtype)
    return jnp.asarray(x, dtype), jnp.asarray(scale, acc), jnp.asarray(bias, acc)


def norm(where, layout="last", **options):
    """golden_batch_norm of channels last, taken in a layout."""
    axis, there, back = LAYOUTS[layout]

    def f(x, scale, bias):
        moved = there(x)
        features = moved.shape[:1] + moved.shape[-1:] if layout == "apart" else scale.shape
        y, mean, var = golden_batch_norm(
            moved,
            scale.reshape(features),
            bias.reshape(features),
            axis=axis,
            where=there(jnp.broadcast_to(where, SHAPE)) if layout != "last" else where,
            **options,
        )
        return back(y), mean.reshape(-1), var.reshape(-1)

    return f


def loss(f, weights):
    def value(*operands):
        y, mean, var = f(*operands)
        y = (weights * jnp.sin(y)).sum()  # of all positions
        known = [jnp.where(jnp.isnan(s), 0, s) for s in (mean, var)]
        return y + sum(jnp.sin(s).sum() for s in known)

    return value


def others(value):
    """What there is of the other channels."""
    return np.delete(np.asarray(value), EMPTY, -1)


def assert_nothing(gradients):
    """Exact zeros in the empty channel, numbers in the others."""
    for gradient in gradients:
        gradient = oracles.real(gradient)
        np.testing.assert_array_equal(gradient[..., EMPTY], 0)
        assert np.isfinite(gradient).all()
        assert others(gradient).any()


def assert_values(results, bias, expected=None):
    y, *statistics = results
    np.testing.assert_array_equal(
        oracles.real(y[..., EMPTY]),
        np.broadcast_to(oracles.real(bias.astype(y.dtype))[EMPTY], y.shape[:-1]),
    )
    for s in statistics:
        np.testing.assert_array_equal(np.isnan(s), np.arange(4) == EMPTY)
    assert np.isfinite(others(y).astype("float64")).all()
    if expected is not None:
        battery.assert_same([others(r) for r in results], list(expected))


CASES = [("full", "last", "nan"), ("examples", "apart", "inf"), ("features", "first", "finite")]


@pytest.mark.parametrize(("mask", "layout", "poison"), CASES)
def test_values_and_gradients(mask, layout, poison, implementation, rng):
    """Both modes, first and second order, beside those of the other channels alone."""
    where = MASKS[mask](rng)
    values = operands(rng, "float64", POISONS[poison])
    weights = rng.normal(size=SHAPE)
    f = norm(where, layout, implementation=implementation)

    def rest(x, scale, bias):
        return golden_batch_norm(
            x, scale, bias, where=others(np.broadcast_to(where, SHAPE)), implementation="xla"
        )

    left = [jnp.asarray(others(v)) for v in values]
    assert_values(jax.jit(f)(*values), values[2], rest(*left))

    slopes = jax.grad(loss(f, weights), (0, 1, 2))
    expected = jax.grad(loss(rest, others(weights)), (0, 1, 2))
    along = tuple(jnp.cos(jnp.nan_to_num(v, posinf=0, neginf=0)) for v in values)
    left_along = tuple(jnp.asarray(others(v)) for v in along)

    def second(slopes):
        """Forward over reverse, and reverse over reverse."""

        def both(values, along):
            _, forward = jax.jvp(slopes, values, along)
            _, pull = jax.vjp(slopes, *values)
            return *forward, *pull(along)

        return jax.jit(both)

    got = (*jax.jit(slopes)(*values), *second(slopes)(values, along))
    assert_nothing(got)
    alone = (*expected(*left), *second(expected)(tuple(left), left_along))
    battery.assert_same([others(g) for g in got], list(alone))

    _, (d_y, d_mean, d_var) = jax.jit(lambda v, a: jax.jvp(f, v, a))(values, along)
    assert_nothing((d_y, d_mean, d_var))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(
    ("epsilon", "poison"), battery.thinned([(0.0, "nan"), (1e-5, "finite"), (1e-5, "inf")], 3)
)
def test_types(dtype, epsilon, poison, implementation, rng):
    """Without parameters too: y is then 0."""
    where = MASKS["full"](rng)
    x, scale, bias = operands(rng, dtype, POISONS[poison])
    f = norm(where, epsilon=epsilon, implementation=implementation)
    assert_values(f(x, scale, bias), bias)
    slopes = jax.grad(lambda *v: f(*v)[0].astype("float32").sum(), (0, 1, 2))
    for gradient in slopes(x, scale, bias):
        np.testing.assert_array_equal(oracles.real(gradient)[..., EMPTY], 0)
        assert np.isfinite(oracles.real(gradient)).all()
    y, _, _ = golden_batch_norm(x, where=where, epsilon=epsilon, implementation=implementation)
    np.testing.assert_array_equal(oracles.real(y)[..., EMPTY], 0)
    assert np.isfinite(oracles.real(y)).all()


def test_nothing_at_all(implementation, rng):
    """A batch of nothing but padding."""
    x, scale, bias = operands(rng, "float32", np.nan)
    f = functools.partial(golden_batch_norm, where=np.zeros((8, 1, 1), bool))
    y, mean, var = f(x, scale, bias, implementation=implementation)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, SHAPE))
    assert np.isnan(mean).all()
    assert np.isnan(var).all()
    slopes = jax.grad(lambda *v: f(*v, implementation=implementation)[0].sum(), (0, 1, 2))
    for gradient in slopes(x, scale, bias):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_nothing_on_any_shard(how, implementation, rng):
    """Statistics merged over a mapped axis: a shard of nothing, and a channel of nothing."""
    where = MASKS["full"](rng)
    where[4:6] = False  # a shard of four
    values = operands(rng, "float64", np.inf)
    weights = rng.normal(size=SHAPE)

    def f(x, scale, bias):
        def shard(x, where):
            return golden_batch_norm(
                x, scale, bias, where=where, axis_name="d", implementation=implementation
            )

        if how == "shard_map":
            mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
            specs = (P("d"), P("d")), (P("d"), P(), P())
            return jax.shard_map(shard, mesh=mesh, in_specs=specs[0], out_specs=specs[1])(
                x, jnp.asarray(where)
            )
        shards = [a.reshape(4, 2, *a.shape[1:]) for a in (x, jnp.asarray(where))]
        y, mean, var = jax.vmap(shard, axis_name="d")(*shards)
        return y.reshape(x.shape), mean[0], var[0]

    whole = norm(where, implementation="xla")
    assert_values(jax.jit(f)(*values), values[2], [others(r) for r in whole(*values)])
    got, expected = (jax.jit(jax.grad(loss(g, weights), (0, 1, 2)))(*values) for g in (f, whole))
    assert_nothing(got)
    battery.assert_same(got, expected)


@pytest.mark.parametrize("spec", [P("d"), P(None, None, "d")], ids=str)
def test_sharded(spec, implementation, rng):
    where = MASKS["full"](rng)
    values, weights = operands(rng, "float64", np.nan), rng.normal(size=SHAPE)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(values[0], NamedSharding(mesh, spec))
    f = norm(where, implementation=implementation)
    assert_values(jax.jit(f)(x, *values[1:]), values[2])
    slopes = jax.grad(loss(f, weights), (0, 1, 2))
    got = jax.jit(slopes)(x, *values[1:])
    assert_nothing(got)
    battery.assert_same(got, slopes(*values))

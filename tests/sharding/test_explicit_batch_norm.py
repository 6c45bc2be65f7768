"""Meshes with explicit axes: batch norms take every way to shard operands that plain jnp takes."""

import functools
import itertools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import mesh_of, summed

from syntonic_jax import golden_batch_norm, golden_batch_norm_inference, output_statistics

pytestmark = pytest.mark.usefixtures("x64")

SHAPE = (8, 4, 16)
AXES = [-1, 1, 0, (0, 2), (1, 2), (0, 1)]
# How x, the parameters and a mask are sharded; the last two in ways that x is not.
CASES = [
    (-1, P(None, None, None), P("m"), P(None, None, None)),
    (-1, P("m"), P("d"), P("m", "d")),
    (1, P(None, None, None), P(None), P(None, "m", "d")),
    (0, P(None, None, "m"), P(None), P(None, "d", "m")),
    ((1, 2), P(None, "m"), P("m", "d"), P("d", "m")),
    ((0, 1), P(None, "m"), P("d"), P(None, "m", "d")),
    ((0, 2), P("d", "m"), P("d"), P("d", "m")),
]


def features(axis) -> tuple[int, ...]:
    return tuple(sorted(a % 3 for a in ((axis,) if isinstance(axis, int) else axis)))


def reduced(axis) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a not in features(axis))


def statistics(x, axis, where=None):
    over = reduced(axis)
    mean = x.mean(over, where=where, keepdims=True)
    var = jnp.square(x - mean).mean(over, where=where, keepdims=True)
    return mean.squeeze(over), var.squeeze(over)


def plain_inference(x, mean, var, scale, bias, axis):
    mean, var, scale, bias = (jnp.expand_dims(p, reduced(axis)) for p in (mean, var, scale, bias))
    return scale * (x - mean) * jax.lax.rsqrt(var + 1e-5) + bias


def plain(x, scale, bias, where, axis):
    mean, var = statistics(x, axis, where)
    return plain_inference(x, mean, var, scale, bias, axis), mean, var


def operands_of(rng, axis):
    shape = tuple(SHAPE[a] for a in features(axis))
    x, mean, scale, bias = (rng.normal(size=s) for s in (SHAPE, shape, shape, shape))
    where = (rng.random(SHAPE) < 0.6) | (np.indices(SHAPE).sum(0) % 2 == 0)  # of all channels
    return map(jnp.asarray, (x, mean, 0.5 + rng.random(shape), scale, bias, where))


def results_of(f, operands):
    floating = [i for i, x in enumerate(operands) if x is not None and x.dtype != bool]
    values = jax.jit(f)(*operands)
    return values, jax.jit(jax.grad(summed(f), floating))(*operands)


def can(f, operands):
    """The results, or None where jnp itself cannot."""
    try:
        return results_of(f, operands)
    except Exception:  # jax has several for it
        return None


def check_way(rng, axis, rows, parameters, mask, implementation="xla") -> int:
    """How many of the functions plain jnp has for this way to shard their operands."""
    mesh = mesh_of(AxisType.Explicit)
    x, mean, var, scale, bias, where = operands_of(rng, axis)

    def put(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    options = {"axis": axis, "target_variance": "standard", "implementation": implementation}
    ours = functools.partial(golden_batch_norm, **options)
    formula = functools.partial(plain, axis=axis)
    placed = [put(p, parameters) for p in (scale, bias)]
    given = [put(p, parameters) for p in (mean, var)]
    x, where = put(x, rows), put(where, mask)
    pairs = [
        (ours, lambda *o: formula(*o, None), (x, *placed)),
        (lambda x, s, b, w: ours(x, s, b, where=w), formula, (x, *placed, where)),
        (
            functools.partial(golden_batch_norm_inference, **options),
            functools.partial(plain_inference, axis=axis),
            (x, *given, *placed),
        ),
        (lambda x: output_statistics(x, axis), lambda x: statistics(x, axis), (x,)),
    ]
    count = 0
    with jax.set_mesh(mesh):
        for f, g, operands in pairs:
            if (expected := can(g, operands)) is not None:
                got = results_of(f, operands)
                battery.assert_same(jax.device_get(got), jax.device_get(expected), 1e-9)
                count += 1
    return count


@pytest.mark.parametrize(("axis", "rows", "parameters", "mask"), battery.thinned(CASES, 3), ids=str)
def test_what_plain_jnp_takes(axis, rows, parameters, mask, implementation, rng):
    assert check_way(rng, axis, rows, parameters, mask, implementation) >= 3


def ways(rank):
    """All of them."""
    return [
        P(*names)
        for names in itertools.product((None, "d", "m"), repeat=rank)
        if len(set(names) - {None}) == sum(n is not None for n in names)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_any_way(axis, rng):
    """Of x, of the parameters and of the mask, three at random, others with another seed."""

    def some(rank):
        found = ways(rank)
        return [found[i] for i in rng.integers(len(found), size=3)]

    drawn = zip(some(3), some(len(features(axis))), some(3))
    assert sum(check_way(rng, axis, *specs) for specs in drawn)


@pytest.mark.parametrize("mask", [(8, 4, 1), (8, 1, 1), (8, 4, 16)], ids=str)
def test_a_mask_along_features_that_are_sharded(mask, implementation, rng):
    mesh = mesh_of(AxisType.Explicit)
    x, where = jnp.asarray(rng.normal(size=SHAPE)), jnp.asarray(rng.random(mask) < 0.7)
    where = where.at[0].set(True)
    f = functools.partial(golden_batch_norm, target_variance="standard")
    want = f(x, where=where), jax.grad(lambda x: jnp.sin(f(x, where=where)[0]).sum())(x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P(None, None, "m")))
        ours = functools.partial(f, where=where, implementation=implementation)
        got = ours(x), jax.grad(lambda x: jnp.sin(ours(x)[0]).sum())(x)
        battery.assert_same(jax.device_get(got), jax.device_get(want), 1e-9)

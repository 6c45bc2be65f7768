"""What the docs say of memory and traffic: of batch norms, beside the plain formula.

A vjp keeps x, the mask as it was given, and numbers of channels; also outside jit, where XLA drops
nothing. Over devices no more is gathered or permuted than by the plain formula, or each parameter
once: y stays where x is, where the plain formula spreads it over the devices of its parameters.
"""

import collections
import functools

import battery
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import collectives, mesh_of

from syntonic_jax import golden_batch_norm, golden_batch_norm_inference

SHAPE, CHANNELS = (16, 4, 32), 32


def plain(x, scale, bias, where=None):
    over = tuple(range(x.ndim - 1))
    mean = x.mean(over, where=where)
    var = jnp.square(x - mean).mean(over, where=where)
    return scale * (x - mean) * jax.lax.rsqrt(var + 1e-5) + bias, mean, var


def plain_inference(x, mean, var, scale, bias):
    return scale * (x - mean) * jax.lax.rsqrt(var + 1e-5) + bias


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, SHAPE, (16, 1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("outputs", ["y", "all"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_an_eager_vjp_keeps(dtype, outputs, mask, implementation):
    x, where = jnp.ones(SHAPE, dtype), None if mask is None else jnp.ones(mask, bool)
    parameters = [jnp.ones(CHANNELS)] * 2

    def f(*operands):
        results = golden_batch_norm(*operands, where=where, implementation=implementation)
        return results if outputs == "all" else results[0]

    _, pull = jax.vjp(f, x, *parameters)
    kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]
    assert sum(leaf is x for leaf in kept) <= 1
    rest = [leaf for leaf in kept if leaf is not x and leaf.size > CHANNELS]
    if mask == SHAPE:
        assert [leaf is where for leaf in rest] == [True]
    else:
        # In the number of axes of x: not where it was given.
        assert {(leaf.dtype, leaf.size) for leaf in rest} <= {(jnp.dtype(bool), 64)}


# --- traffic --------------------------------------------------------------------------------------

LAYOUTS = [  # of x and of the parameters
    (P("d"), P()),
    (P("d"), P("d")),
    (P("d"), P(("d", "m"))),
    (P("d"), P("m")),
    (P("d", "m"), P("d")),
    (P("d", None, "m"), P("m")),
    (P("d", None, "m"), P("d")),
    (P(None, None, "m"), P("d")),
    (P(), P("d")),
]


def traffic(f, *operands) -> collections.Counter:
    return collections.Counter(collectives(jax.jit(f).lower(*operands).compile()))


def both_ways(f):
    """f, and its gradients by all that is floating."""

    def gradients(*operands):
        floating = tuple(i for i, x in enumerate(operands) if x.dtype != bool)
        return jax.grad(lambda *xs: jnp.sin(jax.tree.leaves(f(*xs))[0]).sum(), floating)(*operands)

    return f, gradients


def assert_no_more(f, formula, operands, parameters):
    """Than the formula, or than to gather what is sharded of the parameters once."""
    sharded = [p for p in parameters if p.sharding.spec != P()]
    for g, h in zip(both_ways(f), both_ways(formula), strict=True):
        ours, theirs = traffic(g, *operands), traffic(h, *operands)
        for kind in ("all-gather", "collective-permute", "all-to-all"):
            once = len(sharded) if kind == "all-gather" else 0
            assert ours[kind] <= max(theirs[kind], once), (kind, ours, theirs)
        # In jnp one sum of each kind more: what rounding takes from the mean.
        assert ours["all-reduce"] <= theirs["all-reduce"] * 3 / 2, (ours, theirs)


def placed(mesh, shape, spec, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "parameters"), battery.thinned(LAYOUTS, 3), ids=str)
def test_collectives(rows, parameters, masked):
    mesh = mesh_of(AxisType.Auto)
    pair = [placed(mesh, (CHANNELS,), parameters)] * 2
    operands = [placed(mesh, SHAPE, rows), *pair]
    if masked:
        operands.append(placed(mesh, SHAPE, rows, bool))

    def f(x, scale, bias, where=None):
        return golden_batch_norm(x, scale, bias, where=where, implementation="xla")

    assert_no_more(f, plain, operands, pair)


def test_devices_meet_as_often_as_in_the_formula(installed_double):
    """By the kernels, whose statistics of parts are merged: for the mean, and for the variance."""
    mesh = mesh_of(AxisType.Auto)
    operands = [placed(mesh, SHAPE, P("d")), *[placed(mesh, (CHANNELS,), P())] * 2]
    f = functools.partial(golden_batch_norm, implementation="cuda")
    assert traffic(f, *operands)["all-reduce"] == traffic(plain, *operands)["all-reduce"] == 2


@pytest.mark.parametrize(("rows", "parameters"), battery.thinned(LAYOUTS, 4), ids=str)
def test_collectives_of_inference(rows, parameters):
    mesh = mesh_of(AxisType.Auto)
    four = [placed(mesh, (CHANNELS,), parameters)] * 4
    f = functools.partial(golden_batch_norm_inference, implementation="xla")
    assert_no_more(f, plain_inference, [placed(mesh, SHAPE, rows), *four], four)

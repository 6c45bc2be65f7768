"""On meshes with explicit axes an operation takes whatever its formula in jnp takes.

Of every operand every sharding there is, over meshes of one axis, of two, of one that few sizes
divide, and of one explicit and one automatic axis; where there are very many ways, some of them,
others with another seed. jax decides when it traces: what the formula accepts, with its
derivatives, under vmap or not, the operation must accept, and must leave its results where the
formula leaves them. What then runs, and what it computes, is tried for a few.
"""

import dataclasses
import functools
import itertools
import math

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from explicit_operations import OPERATIONS, SOME, layer_norm
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from syntonic_jax import GoldenArray, golden_layer_norm

MESHES = {
    "one axis": ((2,), "d", (AxisType.Explicit,)),
    "three devices": ((3,), "d", (AxisType.Explicit,)),
    "beside an automatic axis": ((2, 2), "da", (AxisType.Explicit, AxisType.Auto)),
    "two axes": ((2, 2), "dm", (AxisType.Explicit, AxisType.Explicit)),
}

# --- tracing --------------------------------------------------------------------------------------


def shardings(shape, names):
    """Every way to shard an array over some of these mesh axes."""
    for places in itertools.product((None, *range(len(shape))), repeat=len(names)):
        axes = [[n for n, place in zip(names, places) if place == i] for i in range(len(shape))]
        yield P(*(None if not a else a[0] if len(a) == 1 else tuple(a) for a in axes))


def divides(mesh, shape, spec):
    """Whether so many devices divide the sizes."""
    axes = [() if a is None else (a,) if isinstance(a, str) else a for a in spec]
    return all(n % math.prod(mesh.shape[a] for a in on) == 0 for n, on in zip(shape, axes))


MOST = 6  # ways to shard the operands of one operation that the formula takes


def assignments(operation, mesh, rng):
    """Operands sharded in every way, but for the names of the axes of a mesh: it has them in turn.

    What takes one of two axes only is for the mesh that has one only. In random order.
    """
    names = [n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == AxisType.Explicit]
    ways = [
        [spec for spec in shardings(shape, names) if divides(mesh, shape, spec)]
        for shape in operation.shapes
    ]
    found = []
    for specs in itertools.product(*ways):
        seen = list(dict.fromkeys(jax.tree.leaves([tuple(spec) for spec in specs])))
        if len(names) == 1 or seen == names:
            found.append(specs)
    return [found[i] for i in rng.permutation(len(found))]


def total(f):
    def value(*operands):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(*operands)))

    return value


def gradients(f, argnums):
    return jax.grad(total(f), argnums)


def along(f, argnums):
    """The derivative in the direction of the operands themselves."""

    def run(*operands):
        def of_some(*some):
            return f(
                *(some[argnums.index(i)] if i in argnums else x for i, x in enumerate(operands))
            )

        some = tuple(operands[i] for i in argnums)
        return jax.jvp(of_some, some, some)[1]

    return run


def second(f, argnums):
    return along(gradients(f, argnums), argnums)


TRANSFORMATIONS = {
    "value": lambda f, _: f,
    "gradients": gradients,
    "along": along,
    "second": second,
}


def placed(f, operands):
    """Where the results lie, or what jax raises."""
    try:
        return [y.sharding.spec for y in jax.make_jaxpr(f)(*operands).out_avals]
    except Exception as error:  # which kind it is depends on the version of jax
        return error


def faults(operation, mesh, rng, transformations, wrap=lambda f: f, lead=()):
    """In how many ways the formula takes its operands, and where the operation differs from it."""
    accepted, found = 0, []
    shaped = dataclasses.replace(operation, shapes=[lead + s for s in operation.shapes])
    with jax.sharding.use_abstract_mesh(mesh):
        for specs in assignments(shaped, mesh, rng):
            operands = [
                jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
                for shape, dtype, spec in zip(shaped.shapes, shaped.types, specs)
            ]
            if isinstance(placed(wrap(operation.formula), operands), Exception):
                continue
            if accepted == MOST:
                break
            accepted += 1
            for name in transformations:
                transformed = TRANSFORMATIONS[name]
                if name != "value" and not operation.argnums:
                    continue
                expected = placed(wrap(transformed(operation.formula, operation.argnums)), operands)
                if isinstance(expected, Exception):
                    continue
                f = wrap(transformed(operation.call, operation.argnums))
                if (got := placed(f, operands)) != expected:
                    found.append((name, specs, expected, got))
    return accepted, found


def each(operations):
    return pytest.mark.parametrize("operation", operations, ids=lambda o: o.label)


def abstract_mesh(name):
    sizes, names, types = MESHES[name]
    return AbstractMesh(sizes, tuple(names), axis_types=types)


@each(SOME)
def test_takes_what_the_formula_takes(operation, rng):
    accepted, found = faults(operation, abstract_mesh("one axis"), rng, ("value", "gradients"))
    assert accepted
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three devices", "beside an automatic axis"])
@each(OPERATIONS)
def test_other_meshes(operation, name, rng):
    accepted, found = faults(operation, abstract_mesh(name), rng, ("value", "gradients"))
    assert accepted
    assert not found


@pytest.mark.slow
@each(OPERATIONS)
def test_two_axes(operation, rng):
    """A parameter of few axes may leave no place for both."""
    assert not faults(operation, abstract_mesh("two axes"), rng, ("value", "gradients"))[1]


DIFFERENTIABLE = [o for o in OPERATIONS if o.argnums]


@pytest.mark.slow
@each(DIFFERENTIABLE)
def test_forward_mode_and_second_order(operation, rng):
    accepted, found = faults(operation, abstract_mesh("one axis"), rng, ("along", "second"))
    assert accepted
    assert not found


@pytest.mark.slow
@each(DIFFERENTIABLE)
def test_mapped(operation, rng):
    """Every operand mapped, along an axis that may be sharded as well."""
    mesh, names = abstract_mesh("one axis"), ("value", "gradients")
    accepted, found = faults(operation, mesh, rng, names, jax.vmap, (8,))
    assert accepted
    assert not found


# --- running --------------------------------------------------------------------------------------

RUN = [  # (axis, where x lies, where scale and bias do)
    ((1, 2), P(None, "d", None), P()),
    ((1, 2), P("d", None, "m"), P(None, "m")),
    ((0, 2), P("d", None, "m"), P("d", "m")),
    ((0, 1, 2), P(None, "d", "m"), P()),
    ((0, 2), P(), P("m", "d")),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("axis", "rows", "parameters"), RUN)
def test_layer_norm_over_several_axes(axis, rows, parameters, implementation, rng):
    shape = (8, 4, 16)
    x = jnp.asarray(rng.normal(size=shape))
    scale, bias = (jnp.asarray(rng.normal(size=[shape[a] for a in axis])) for _ in range(2))
    f = functools.partial(golden_layer_norm, axis=axis, implementation=implementation)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)

    def both(f):
        return jax.jit(lambda *operands: (f(*operands), gradients(f, (0, 1, 2))(*operands)))

    expected = both(functools.partial(layer_norm, axis=axis))(x, scale, bias)
    with jax.set_mesh(mesh):
        x, scale, bias = (
            jax.device_put(value, NamedSharding(mesh, spec))
            for value, spec in ((x, rows), (scale, parameters), (bias, parameters))
        )
        got = both(f)(x, scale, bias)
        for gradient, operand in zip(got[1], (x, scale, bias), strict=True):
            assert jax.typeof(gradient) == jax.typeof(operand)
    battery.assert_same(got, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_manual_axis_of_an_explicit_mesh(check_vma, implementation, rng):
    """Inside shard_map one axis is manual; the other is still explicit."""
    x = jnp.asarray(rng.normal(size=(8, 4, 16)))
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    f = functools.partial(golden_layer_norm, axis=(1, 2), implementation=implementation)

    def loss(f, x):
        return jnp.sum(jnp.sin(f(x)))

    expected = jax.grad(functools.partial(loss, functools.partial(layer_norm, axis=(1, 2))))(x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("d", None, "m")))
        shards = jax.shard_map(
            f, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}, check_vma=check_vma
        )
        got = jax.jit(jax.grad(functools.partial(loss, shards)))(x)
    battery.assert_same(got, expected)


@pytest.mark.usefixtures("x64")
def test_exact_sum_of_what_is_sharded():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        a = jax.device_put(jnp.arange(16).reshape(8, 2), NamedSharding(mesh, P("d")))
        for axis, expected in ((None, 120), (0, [56, 64])):
            total = jax.jit(lambda a, axis=axis: GoldenArray(a, -a).sum(axis))(a)
            np.testing.assert_array_equal(total.a, expected)
            np.testing.assert_array_equal(-total.b, expected)

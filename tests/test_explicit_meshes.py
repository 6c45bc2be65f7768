"""On meshes with explicit axes an operation takes whatever its formula in jnp takes.

Of every operand every sharding there is, over meshes of one axis, of two, of one that few sizes
divide, and of one explicit and one automatic axis. jax decides when it traces: what the formula
accepts, with its derivatives, under vmap or not, the operation must accept, and must leave its
results where the formula leaves them. What then runs, and what it computes, is tried for a few.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from syntonic_jax import (
    PHI_INV,
    GoldenArray,
    crystallize,
    golden_gelu,
    golden_layer_norm,
    lattice,
    phi_residual,
    phi_residual_layernorm,
    residual_component_norm,
    syntonic_cross_entropy,
    syntonic_log_softmax,
    syntonic_softmax,
)

MESHES = {
    "one axis": ((2,), "d", (AxisType.Explicit,)),
    "three devices": ((3,), "d", (AxisType.Explicit,)),
    "beside an automatic axis": ((2, 2), "da", (AxisType.Explicit, AxisType.Auto)),
    "two axes": ((2, 2), "dm", (AxisType.Explicit, AxisType.Explicit)),
}


@dataclasses.dataclass(frozen=True)
class Operation:
    label: str
    call: Callable[..., Any]  # of operands and, where there are two lowerings, implementation
    formula: Callable[..., Any]  # of the same operands
    shapes: Sequence[tuple[int, ...]]
    dtypes: str = ""  # f, i or b for each operand: all f

    @property
    def types(self) -> list[str]:
        names = {"f": "float32", "i": "int32", "b": "bool"}
        return [names[t] for t in self.dtypes or "f" * len(self.shapes)]

    @property
    def argnums(self) -> tuple[int, ...]:
        return tuple(i for i, t in enumerate(self.types) if t == "float32")


# --- the formulas ---------------------------------------------------------------------------------


def beside(x, axes):
    """The axes of an array that a parameter, which has `axes`, has not."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    return tuple(i for i in range(x.ndim) if i not in [a % x.ndim for a in axes])


def layer_norm(x, scale=None, bias=None, *, axis=-1):
    variance = jnp.square(x - x.mean(axis, keepdims=True)).mean(axis, keepdims=True)
    y = PHI_INV**0.5 * (x - x.mean(axis, keepdims=True)) * jax.lax.rsqrt(variance + 1e-5)
    if scale is not None:
        y = y * jnp.expand_dims(scale, beside(x, axis))
    return y if bias is None else y + jnp.expand_dims(bias, beside(x, axis))


def residual_norm(identity, residual, scale, bias):
    z = identity + PHI_INV * residual
    return layer_norm(z, scale / PHI_INV**0.5, bias), z


def weighted(x, norms=None, syntony=None, axis=-1):
    if norms is not None:
        return x - PHI_INV * jnp.expand_dims(norms, beside(x, axis))
    return x if syntony is None else x + jnp.log(jnp.maximum(syntony, 1e-10))


def entropy(x, labels, norms=None, *, axis):
    chosen = jax.nn.one_hot(labels, x.shape[axis], axis=axis, dtype=x.dtype)
    return -(chosen * jax.nn.log_softmax(weighted(x, norms, axis=axis), axis)).sum(axis)


# --- the operations -------------------------------------------------------------------------------

ROWS, SHAPE = (6, 4), (6, 4, 2)


def elementwise():
    for activation, formula in {
        None: lambda z: z,
        "relu": jax.nn.relu,
        "gelu": jax.nn.gelu,
    }.items():
        yield Operation(
            f"phi_residual {activation}",
            functools.partial(phi_residual, activation=activation),
            lambda i, r, formula=formula: formula(i + PHI_INV * r),
            [ROWS, ROWS],
        )
    yield Operation("golden_gelu", golden_gelu, lambda x: x * jax.nn.sigmoid(x), [ROWS])
    yield Operation("crystallize", crystallize, lambda x: x, [ROWS])
    yield Operation("snap_distance", lattice.snap_distance, jnp.abs, [ROWS])
    yield Operation("norm", residual_component_norm, lambda x: jnp.sqrt((x * x).sum()), [SHAPE])


def norms():
    call = functools.partial(phi_residual_layernorm, return_sum=True)
    shapes = [ROWS, ROWS, ROWS[1:], ROWS[1:]]
    yield Operation("phi_residual_layernorm", call, residual_norm, shapes)
    for count in (1, 2, 3):
        for axis in itertools.combinations(range(3), count):
            parameter = tuple(SHAPE[a] for a in axis)
            yield Operation(
                f"golden_layer_norm {axis}",
                functools.partial(golden_layer_norm, axis=axis),
                functools.partial(layer_norm, axis=axis),
                [SHAPE, parameter, parameter],
            )


def softmaxes():
    kinds = {"softmax": (syntonic_softmax, jax.nn.softmax)}
    kinds["log_softmax"] = (syntonic_log_softmax, jax.nn.log_softmax)
    for (name, (f, plain)), axis in itertools.product(kinds.items(), range(3)):

        def operation(label, call, formula, *shapes, dtypes="", name=name, axis=axis):
            return Operation(f"{name} {axis} {label}", call, formula, [SHAPE, *shapes], dtypes)

        f, plain = functools.partial(f, axis=axis), functools.partial(plain, axis=axis)
        yield operation(
            "mode_norms",
            lambda x, n, f=f, **options: f(x, mode_norms=n, **options),
            lambda x, n, plain=plain, axis=axis: plain(weighted(x, n, axis=axis)),
            (SHAPE[axis],),
        )
        for shape in (SHAPE, (6, 1, 2), (4, 1), SHAPE[2:], ()):
            yield operation(
                f"syntony {shape}",
                lambda x, s, f=f, **options: f(x, syntony=s, **options),
                lambda x, s, plain=plain: plain(weighted(x, syntony=s)),
                shape,
            )
            if shape:
                yield operation(
                    f"where {shape}",
                    lambda x, w, f=f, **options: f(x, where=w, **options),
                    lambda x, w, plain=plain: plain(x, where=w),
                    shape,
                    dtypes="fb",
                )
        yield operation(
            "scale",
            lambda x, n, s, f=f, **options: f(x, mode_norms=n, scale=s, **options),
            lambda x, n, s, plain=plain, axis=axis: plain(weighted(x, s * n, axis=axis)),
            (SHAPE[axis],),
            (),
        )
    for axis in range(2):
        yield Operation(
            f"cross_entropy {axis}",
            lambda x, labels, n, axis=axis, **options: syntonic_cross_entropy(
                x, labels, mode_norms=n, axis=axis, **options
            ),
            functools.partial(entropy, axis=axis),
            [ROWS, (ROWS[1 - axis],), (ROWS[axis],)],
            "fif",
        )


def exact():
    """Of integers a and b; results by leaves."""

    def ring(name, f, formula, operands=2, shapes=None):
        def call(*integers):
            return f(*(GoldenArray(a, b) for a, b in zip(integers[::2], integers[1::2])))

        shapes = [ROWS] * operands if shapes is None else shapes
        pairs = [s for s in shapes for _ in range(2)]
        return Operation(f"GoldenArray {name}", call, formula, pairs, "i" * len(pairs))

    def product(a, b, c, d, times=jnp.multiply):
        return times(a, c) + times(b, d), times(a, d) + times(b, c) + times(b, d)

    yield ring("+", lambda x, y: x + y, lambda a, b, c, d: (a + c, b + d))
    yield ring("-", lambda x, y: x - y, lambda a, b, c, d: (a - c, b - d))
    yield ring("*", lambda x, y: x * y, product)
    yield ring("<", lambda x, y: x < y, lambda a, b, c, d: a - c < b - d)
    yield ring("==", lambda x, y: x == y, lambda a, b, c, d: (a == c) & (b == d))
    matmul = functools.partial(product, times=jnp.matmul)
    yield ring("@", lambda x, y: x @ y, matmul, shapes=[ROWS, ROWS[::-1]])
    yield ring(
        "where",
        lambda x, y: lattice.where(x.a > 0, x, y),
        lambda a, b, c, d: (jnp.where(a > 0, a, c), jnp.where(a > 0, b, d)),
    )
    yield ring(
        "stack",
        lambda x, y: lattice.stack([x, y]),
        lambda a, b, c, d: (jnp.stack([a, c]), jnp.stack([b, d])),
    )
    yield ring("mul_phi", lambda x: x.mul_phi(), lambda a, b: (b, a + b), 1)
    yield ring("div_phi", lambda x: x.div_phi(), lambda a, b: (b - a, a), 1)
    yield ring("conjugate", lambda x: x.conjugate(), lambda a, b: (a + b, -b), 1)
    yield ring("neg", lambda x: -x, lambda a, b: (-a, -b), 1)
    yield ring("phi_power", lambda x: x.phi_power(3), lambda a, b: (a + b, b + a), 1)
    for name in ("norm", "trace", "sign", "to_float"):
        yield ring(name, lambda x, name=name: getattr(x, name)(), lambda a, b: a * b, 1)
    for axis in (None, 0, 1):
        yield ring(
            f"sum {axis}",
            lambda x, axis=axis: x.sum(axis),
            lambda a, b, axis=axis: (a.sum(axis), b.sum(axis)),
            1,
        )
    yield Operation(
        "GoldenArray.from_float",
        GoldenArray.from_float,
        lambda x: (jax.lax.stop_gradient(x),) * 2,
        [ROWS],
    )


OPERATIONS = [*elementwise(), *norms(), *softmaxes(), *exact()]
# Some of each kind; the others are slow tests.
SOME = [
    *elementwise(),
    *norms(),
    *battery.thinned(list(softmaxes()), 7),
    *battery.thinned(list(exact()), 7),
]

# --- tracing --------------------------------------------------------------------------------------


def shardings(shape, names):
    """Every way to shard an array over some of these mesh axes."""
    for places in itertools.product((None, *range(len(shape))), repeat=len(names)):
        axes = [[n for n, place in zip(names, places) if place == i] for i in range(len(shape))]
        yield P(*(None if not a else a[0] if len(a) == 1 else tuple(a) for a in axes))


def assignments(operation, mesh):
    """Operands sharded in every way, but for the names of the axes of a mesh: it has them in turn.

    What takes one of two axes only is for the mesh that has one only.
    """
    names = [n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == AxisType.Explicit]
    ways = [list(shardings(shape, names)) for shape in operation.shapes]
    for specs in itertools.product(*ways):
        seen = list(dict.fromkeys(jax.tree.leaves([tuple(spec) for spec in specs])))
        if len(names) == 1 or seen == names:
            yield specs


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


def faults(operation, mesh, transformations, wrap=lambda f: f, lead=()):
    """How often the formula was accepted, and where the operation differs from it."""
    accepted, found = 0, []
    shaped = dataclasses.replace(operation, shapes=[lead + s for s in operation.shapes])
    with jax.sharding.use_abstract_mesh(mesh):
        for specs in assignments(shaped, mesh):
            try:
                operands = [
                    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
                    for shape, dtype, spec in zip(shaped.shapes, shaped.types, specs)
                ]
            except ValueError:  # a size that the devices do not divide
                continue
            for name in transformations:
                transformed = TRANSFORMATIONS[name]
                if name != "value" and not operation.argnums:
                    continue
                expected = placed(wrap(transformed(operation.formula, operation.argnums)), operands)
                if isinstance(expected, Exception):
                    continue
                accepted += 1
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
def test_takes_what_the_formula_takes(operation):
    accepted, found = faults(operation, abstract_mesh("one axis"), ("value", "gradients"))
    assert accepted
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three devices", "beside an automatic axis"])
@each(OPERATIONS)
def test_other_meshes(operation, name):
    accepted, found = faults(operation, abstract_mesh(name), ("value", "gradients"))
    assert accepted
    assert not found


@pytest.mark.slow
@each(OPERATIONS)
def test_two_axes(operation):
    """A parameter of few axes may leave no place for both."""
    assert not faults(operation, abstract_mesh("two axes"), ("value", "gradients"))[1]


DIFFERENTIABLE = [o for o in OPERATIONS if o.argnums]


@pytest.mark.slow
@each(DIFFERENTIABLE)
def test_forward_mode_and_second_order(operation):
    accepted, found = faults(operation, abstract_mesh("one axis"), ("along", "second"))
    assert accepted
    assert not found


@pytest.mark.slow
@each(DIFFERENTIABLE)
def test_mapped(operation):
    """Every operand mapped, along an axis that may be sharded as well."""
    mesh, names = abstract_mesh("one axis"), ("value", "gradients")
    accepted, found = faults(operation, mesh, names, jax.vmap, (8,))
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

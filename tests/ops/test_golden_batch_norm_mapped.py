"""golden_batch_norm over mapped axes: the statistics of the whole, weighted by counts."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from syntonic_jax import golden_batch_norm

pytestmark = pytest.mark.usefixtures("x64")

DEVICES, SHAPE = 8, (24, 2, 5)  # three examples a shard
GROUPS = [[0, 3, 4, 6], [1, 2, 5, 7]]
HOWS = ("vmap", "pmap", "shard_map", "shard_map unchecked")
WHERES = ("everything", "unequal", "an example", "one shard")
hows = pytest.mark.parametrize("how", HOWS)


def mapped(how, f, x, *more):
    """f of eighths of x and of whatever follows it, each on its device, with the mapped axis "d".

    f returns one array that is split as x is, and some that are the same everywhere.
    """
    if how.startswith("shard_map"):
        mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
        # When checked, results known to be the same everywhere: P() would be refused otherwise.
        f = jax.shard_map(
            f,
            mesh=mesh,
            in_specs=P("d"),
            out_specs=(P("d"), P(), P()),
            check_vma=how == "shard_map",
        )
        return jax.jit(f)(x, *more)
    shards = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in (x, *more)]
    y, *same = {"vmap": jax.vmap, "pmap": jax.pmap}[how](f, axis_name="d")(*shards)
    return y.reshape(x.shape), *(a[0] for a in same)


def mapped_everywhere(how, f, x, *more):
    """Of results that differ between devices, those of all, along the first axis."""
    if how == "shard_map unchecked":
        mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
        f = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
        return jax.jit(f)(x, *more)
    shards = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in (x, *more)]
    return tuple(r.reshape(-1, *r.shape[2:]) for r in jax.pmap(f, axis_name="d")(*shards))


def where_of(kind, rng):
    """None, or which elements count: as many in each shard or not, and shards without any."""
    if kind == "everything":
        return np.ones(SHAPE, bool)
    where = rng.random(SHAPE) < 0.6
    where[3:6] = where[12:15] = False  # two shards are empty
    if kind == "an example":
        return np.broadcast_to(where[:, :1, :1], SHAPE)
    if kind == "one shard":
        where[:9], where[12:] = False, False
    where[9:11] = True  # but no channel
    return where


def operands(rng, offset=0.0):
    x = jnp.asarray(rng.normal(offset, size=SHAPE))
    return x, *(jnp.asarray(p) for p in rng.normal(size=(2, SHAPE[-1])))


def loss(f, weights):
    """Of y, mean and var, every element of y weighing differently."""

    def value(*operands):
        y, mean, var = f(*operands)
        return jnp.sum(weights * jnp.sin(y)) + jnp.sum(jnp.sin(mean) + jnp.cos(var))

    return value


def check(f, whole, operands, weights):
    """Equal results and gradients."""
    battery.assert_same(f(*operands), whole(*operands))
    got, expected = (jax.jit(jax.grad(loss(g, weights), (0, 1, 2))) for g in (f, whole))
    battery.assert_same(got(*operands), expected(*operands))


@pytest.mark.parametrize("kind", battery.thinned(WHERES))
@hows
def test_equals_the_whole(how, kind, implementation, rng):
    where, weights = where_of(kind, rng), rng.normal(size=SHAPE)
    norm = functools.partial(golden_batch_norm, epsilon=0.1, implementation=implementation)

    def f(x, scale, bias):
        def shard(x, where):
            where = None if kind == "everything" else where
            return norm(x, scale, bias, where=where, axis_name="d")

        return mapped(how, shard, x, jnp.asarray(where))

    whole = functools.partial(golden_batch_norm, where=where, epsilon=0.1, implementation="xla")
    check(f, whole, operands(rng), weights)


@hows
def test_channels_first(how, implementation, rng):
    x, scale, bias = operands(rng)
    scale, bias = scale[:2], bias[:2]
    norm = functools.partial(golden_batch_norm, axis=1, implementation=implementation)

    def f(x, scale, bias):
        return mapped(how, lambda x: norm(x, scale, bias, axis_name="d"), x)

    whole = functools.partial(golden_batch_norm, axis=1, implementation="xla")
    check(f, whole, (x, scale, bias), rng.normal(size=SHAPE))


@pytest.mark.parametrize("how", ["pmap", "shard_map unchecked"])  # jax has no others
@pytest.mark.parametrize("kind", battery.thinned(["unequal", "everything"]))
def test_groups(how, kind, implementation, rng):
    """The statistics of each group are those of its members alone."""
    where, weights = where_of(kind, rng), rng.normal(size=SHAPE)
    where[:6] = True  # each group has something
    members = [np.concatenate([np.arange(3 * i, 3 * i + 3) for i in group]) for group in GROUPS]
    member = np.concatenate(members)
    of_shard = np.argsort(np.concatenate(GROUPS)) // len(GROUPS[0])

    def split(x, scale, bias):
        def shard(x, where):
            y, mean, var = golden_batch_norm(
                *(x, scale, bias),
                where=None if kind == "everything" else where,
                axis_name="d",
                axis_index_groups=GROUPS,
                implementation=implementation,
            )
            return y, mean[None], var[None]

        return mapped_everywhere(how, shard, x, jnp.asarray(where))

    def whole(x, scale, bias):
        parts = [
            golden_batch_norm(x[rows], scale, bias, where=where[rows], implementation="xla")
            for rows in members
        ]
        y = jnp.concatenate([y for y, _, _ in parts])[np.argsort(member)]
        return y, *(jnp.stack(s)[of_shard] for s in list(zip(*parts))[1:])

    check(split, whole, operands(rng), weights)


def test_mean_far_above_deviation(implementation, rng):
    """In float32, with shards far from each other too: means are merged, not averages of squares.

    80 roundings of u = 6e-8 for each of the two levels of sums are 1e-5.
    """
    far = 1e4 + 5 * np.arange(DEVICES).reshape(-1, 1, 1)
    x = jnp.asarray(rng.normal(far, size=(DEVICES, 8, 5)), "float32")
    norm = functools.partial(
        golden_batch_norm,
        axis_name="d",
        target_variance="standard",
        epsilon=0.0,
        implementation=implementation,
    )
    y, mean, var = jax.vmap(norm, axis_name="d")(x)
    exact = np.asarray(x, np.float64).reshape(-1, 5)
    np.testing.assert_allclose(mean[0], exact.mean(0), rtol=1e-5 / 64)
    np.testing.assert_allclose(var[0], exact.var(0), rtol=1e-5)
    xhat = (exact - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(y.reshape(-1, 5), xhat, rtol=1e-5, atol=1e-5)


def test_more_elements_than_int32_counts(implementation):
    """Nothing is computed: the number of elements alone is too large for jax's default integer."""
    norm = functools.partial(golden_batch_norm, axis_name="d", implementation=implementation)

    def f(x):
        y, mean, var = jax.vmap(norm, axis_name="d")(x)
        return y.sum() + mean.sum() + var.sum()

    x = jax.ShapeDtypeStruct((2, 2**31 + 8, 1), "bfloat16")
    with jax.enable_x64(False):
        assert jax.eval_shape(jax.grad(f), x) == x


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types(dtype, implementation, rng):
    x = jnp.asarray(rng.normal(size=(DEVICES, 4, 3)), dtype)
    f = functools.partial(golden_batch_norm, axis_name="d", implementation=implementation)
    y, mean, var = jax.vmap(f, axis_name="d")(x)
    assert [r.dtype for r in (y, mean, var)] == [dtype, "float32", "float32"]


def test_several_axes(implementation, rng):
    """One name of two, and both, over which the inputs may or may not vary."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    values, weights = operands(rng), rng.normal(size=SHAPE)
    norm = functools.partial(golden_batch_norm, implementation=implementation)
    whole = functools.partial(golden_batch_norm, implementation="xla")
    for names, spec in ((("d", "m"), P(("d", "m"))), ("d", P("d")), (("m", "d"), P("d", "m"))):

        def f(x, scale, bias, names=names, spec=spec):
            shard = jax.shard_map(
                functools.partial(norm, axis_name=names),
                mesh=mesh,
                in_specs=(spec, P(), P()),
                out_specs=(spec, P(), P()),
            )
            return jax.jit(shard)(x, scale, bias)

        check(f, whole, values, weights)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_inside_shard_map(check_vma, implementation, rng):
    """Of the sum over shards of a loss of each, as training steps take it."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    values, weights = operands(rng), jnp.asarray(rng.normal(size=SHAPE))
    norm = functools.partial(golden_batch_norm, axis_name="d", implementation=implementation)

    def shard(x, scale, bias, weights):
        def local(x, scale, bias):
            return jnp.sum(weights * jnp.sin(norm(x, scale, bias)[0]))

        d_x, *slopes = jax.grad(local, (0, 1, 2))(x, scale, bias)
        if not check_vma:  # jax sums the gradients of what does not vary by itself
            slopes = [jax.lax.psum(s, "d") for s in slopes]
        return d_x, *slopes

    f = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(P("d"), P(), P(), P("d")),
        out_specs=(P("d"), P(), P()),
        check_vma=check_vma,
    )

    def whole(x, scale, bias):
        y, _, _ = golden_batch_norm(x, scale, bias, implementation="xla")
        return jnp.sum(weights * jnp.sin(y))

    battery.assert_same(jax.jit(f)(*values, weights), jax.grad(whole, (0, 1, 2))(*values))


def test_second_derivative(implementation, rng):
    values, weights = operands(rng), rng.normal(size=SHAPE)
    where = where_of("unequal", rng)

    def f(x, scale, bias):
        def shard(x, where):
            return golden_batch_norm(
                x, scale, bias, where=where, axis_name="d", implementation=implementation
            )

        return mapped("vmap", shard, x, jnp.asarray(where))

    def along(f):
        slopes = jax.grad(loss(f, weights), (0, 1, 2))
        return jax.jit(lambda *xs: jax.jvp(slopes, xs, tuple(map(jnp.cos, xs)))[1])

    whole = functools.partial(golden_batch_norm, where=where, implementation="xla")
    battery.assert_same(along(f)(*values), along(whole)(*values))


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_of_programs_that_map(masked, implementation, rng):
    """jax traces the rule of what a program contains late, where no axis has a name any more."""
    x = jnp.asarray(rng.normal(size=(2, 6, 3)))
    where = jnp.asarray(rng.random((6, 3)) < 0.8).at[:2].set(True) if masked else None

    def loss(x):
        def norm(x):
            options = {"axis_name": "i", "where": where, "implementation": implementation}
            return golden_batch_norm(x, **options)[0]

        return jnp.sum(jax.vmap(norm, axis_name="i")(x) ** 3)

    def looped(x):
        return jax.lax.scan(lambda carry, _: (carry + loss(x), None), 0.0, None, length=2)[0] / 2

    expected = jax.grad(loss)(x), jax.jvp(loss, (x,), (x,))[1], jax.hessian(loss)(x)
    for f in (jax.jit(loss), jax.checkpoint(loss), looped):
        jax.clear_caches()  # what was traced before hides it
        got = jax.grad(f)(x), jax.linearize(f, x)[1](x), jax.jacfwd(jax.grad(f))(x)
        battery.assert_same(got, expected)

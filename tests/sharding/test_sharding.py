"""Sharded over eight simulated devices: right results, and no collective that is not needed."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowered import custom_calls, dims
from sharded import (
    BATCH,
    CASES,
    ELEMENTWISE,
    FEATURE,
    LAYER_NORM,
    NORM,
    ROWWISE,
    WIDTH,
    Case,
    mesh_of,
    run,
    summed,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def case(request, implementation, rng):
    return Case(request.param, implementation, rng)


GELU = "phi_residual_gelu"


def every(*names):
    return pytest.mark.parametrize("case", names or list(CASES), indirect=True)


# --- NamedSharding under jit ----------------------------------------------------------------------


@every(*ROWWISE, GELU, NORM)
@pytest.mark.parametrize("spec", battery.thinned(BATCH), ids=str)
def test_batch_sharded(case, spec):
    """The one collective is the all-reduce of sums over rows."""
    operands = case.put(mesh_of(AxisType.Auto), spec)
    values, used = run(case.f, *operands)
    battery.assert_same(values, case.values)
    is_norm = case.values.shape == () if isinstance(case.values, jax.Array) else False
    assert set(used) == ({"all-reduce"} if is_norm else set())
    slopes, used = run(case.gradients, *operands)
    battery.assert_same(slopes, case.slopes)
    assert set(used) == ({"all-reduce"} if is_norm or not all(case.is_rows) else set())
    assert len(used) <= 2  # one a parameter, or one a mesh axis
    for x, of_rows in zip(slopes, case.is_rows, strict=True):
        expected = NamedSharding(mesh_of(AxisType.Auto), spec if of_rows else P())
        assert x.sharding.is_equivalent_to(expected, x.ndim)


@every(*ELEMENTWISE)
def test_elementwise_needs_no_collective(case):
    """However it is sharded: the features of an elementwise operation are a batch as well."""
    for spec in (P("d", None, "m"), P(None, "m", "d")):
        operands = case.put(mesh_of(AxisType.Auto), spec)
        for f, expected in ((case.f, case.values), (case.gradients, case.slopes)):
            results, used = run(f, *operands)
            battery.assert_same(results, expected)
            assert used == []


@every(NORM)
def test_a_norm_for_each_example_stays_with_it(case):
    (x,) = case.put(mesh_of(AxisType.Auto), P(("d", "m")))
    each = jax.vmap(jax.value_and_grad(case.f))
    results, used = run(each, x)
    assert used == []
    battery.assert_same(results, each(*case.operands))


@every(*ROWWISE, GELU, NORM)
@pytest.mark.parametrize("spec", battery.thinned(FEATURE), ids=str)
def test_feature_sharded(case, spec):
    operands = case.put(mesh_of(AxisType.Auto), spec, P("m"))
    battery.assert_same(jax.jit(case.f)(*operands), case.values)
    battery.assert_same(jax.jit(case.gradients)(*operands), case.slopes)


@pytest.mark.parametrize("shape", [(16, 32), (8, 1, 32), (2, 2, 8, 32)], ids=str)
def test_other_ranks(shape, implementation, rng):
    case = Case(LAYER_NORM, implementation, rng, shape)
    spec = P(*(None if n < 8 else ("d", "m") for n in shape[:-1]))
    operands = case.put(mesh_of(AxisType.Auto), spec)
    values, used = run(case.f, *operands)
    battery.assert_same(values, case.values)
    assert used == []
    slopes, used = run(case.gradients, *operands)
    battery.assert_same(slopes, case.slopes)
    assert set(used) == {"all-reduce"}


@every(LAYER_NORM)
def test_eager(case):
    operands = case.put(mesh_of(AxisType.Auto), P("d"))
    battery.assert_same(case.f(*operands), case.values)
    battery.assert_same(case.gradients(*operands), case.slopes)


@every(LAYER_NORM)
def test_vmap_scan_and_checkpoint(case):
    rows = case.put(mesh_of(AxisType.Auto), P("d"))
    examples = jax.vmap(case.gradients, (0, 0, None, None))
    slopes, used = run(examples, *rows)
    assert used == []  # gradients of each example stay with it
    battery.assert_same(slopes, examples(*case.operands))

    def deep(*operands):
        def body(carry, _):
            return jax.checkpoint(case.f)(carry, *operands[1:])[0], None

        return jnp.sum(jnp.sin(jax.lax.scan(body, operands[0], None, length=3)[0]))

    gradients = jax.grad(deep, case.argnums)
    battery.assert_same(jax.jit(gradients)(*rows), jax.jit(gradients)(*case.operands))


@every(LAYER_NORM)
def test_second_derivative(case):
    def along(*operands):
        return jax.jvp(case.gradients, operands, operands)[1]

    rows = case.put(mesh_of(AxisType.Auto), P("d", "m"))
    battery.assert_same(jax.jit(along)(*rows), jax.jit(along)(*case.operands))


def test_partial_sums(installed_double, rng):
    """On D devices: the leading dimensions, times gcd(n, D) of the last above one."""
    case = Case(LAYER_NORM, "cuda", rng)
    for spec, shape, partials in [
        (P("d"), (16, 4, 32), 16 * 4),
        (P("d"), (16, 1, 32), 8),
        (P("d"), (24, 32), 8),
        (P(None), (9, 6, 32), 9 * 2),
    ]:
        case = Case(LAYER_NORM, "cuda", rng, shape)
        operands = case.put(mesh_of(AxisType.Auto), spec)
        _, call = custom_calls(case.gradients, *operands, platform="cpu")
        assert np.prod(dims(call.results[2])) == partials * WIDTH
    _, call = custom_calls(case.gradients, *case.operands, platform="cpu")
    assert np.prod(dims(call.results[2])) == WIDTH


# --- explicit axes --------------------------------------------------------------------------------


@every()
@pytest.mark.parametrize(
    "spec", battery.thinned([P("d", "m"), P("d"), P("d", None, "m")], 3), ids=str
)
def test_explicit_mesh(case, spec):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        operands = case.put(mesh, spec)
        values = jax.jit(case.f)(*operands)
        slopes = jax.jit(case.gradients)(*operands)
        for x, operand in zip(slopes, operands, strict=True):
            assert jax.typeof(x) == jax.typeof(operand)
        for y in jax.tree.leaves(values):
            shared = [m == n for m, n in zip(y.shape, operands[0].shape)]
            axes = min(shared.index(False) if False in shared else y.ndim, len(spec))
            given = jax.typeof(operands[0]).sharding.spec
            assert jax.typeof(y).sharding.spec[:axes] == given[:axes]
        eager = case.f(*operands)
    battery.assert_same(values, case.values)
    battery.assert_same(eager, case.values)
    battery.assert_same(slopes, case.slopes)


@every(LAYER_NORM)
def test_explicit_vmap_with_a_parameter_for_each_example(case):
    mesh = mesh_of(AxisType.Explicit)
    gradients = jax.vmap(case.gradients, (0, 0, 0, None))
    x, r, scale, bias = case.operands
    scales = jnp.stack([scale + i for i in range(len(x))])
    expected = gradients(x, r, scales, bias)
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("d")))
        got = jax.jit(gradients)(put(x), put(r), put(scales), bias)
    battery.assert_same(got, expected)


# --- the older partitioner ------------------------------------------------------------------------


@every(*ROWWISE, GELU, NORM)
def test_gspmd(case, gspmd):
    operands = case.put(mesh_of(AxisType.Auto), P("d", "m"))
    values, used = run(case.f, *operands)
    battery.assert_same(values, case.values)
    assert "all-gather" not in used
    slopes, used = run(case.gradients, *operands)
    battery.assert_same(slopes, case.slopes)
    assert "all-gather" not in used


# --- shard_map ------------------------------------------------------------------------------------


@every(*ROWWISE, *ELEMENTWISE)  # the norm of a shard is no shard of the norm
@pytest.mark.parametrize("check_vma", battery.thinned([True, False]))
def test_shard_map(case, check_vma):
    """Differentiated from outside."""
    mesh = mesh_of(AxisType.Auto)
    rows = P("d", "m")
    f = jax.shard_map(
        case.f, mesh=mesh, in_specs=case.specs(rows), out_specs=rows, check_vma=check_vma
    )
    battery.assert_same(jax.jit(f)(*case.operands), case.values)
    slopes = jax.jit(jax.grad(summed(f), case.argnums))(*case.operands)
    battery.assert_same(slopes, case.slopes)


@every(*ROWWISE, GELU)
@pytest.mark.parametrize("check_vma", battery.thinned([True, False]))
def test_grad_inside_shard_map(case, check_vma):
    def shard(*operands):
        slopes = case.gradients(*operands)
        if check_vma:  # jax sums the gradients of what does not vary by itself
            return slopes
        return tuple(
            x if of_rows else jax.lax.psum(x, ("d", "m"))
            for x, of_rows in zip(slopes, case.is_rows, strict=True)
        )

    specs = case.specs(P("d", "m"))
    f = jax.shard_map(
        shard, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=specs, check_vma=check_vma
    )
    battery.assert_same(jax.jit(f)(*case.operands), case.slopes)


@every(*ROWWISE, GELU)
def test_partly_manual_shard_map(case):
    """Manual over one axis; over the other XLA partitions the call inside."""
    mesh = mesh_of(AxisType.Auto)
    f = jax.shard_map(
        case.f, mesh=mesh, axis_names={"d"}, in_specs=case.specs(P("d")), out_specs=P("d")
    )
    operands = case.put(mesh, P("d", "m"))
    values, used = run(f, *operands)
    battery.assert_same(values, case.values)
    assert used == []
    battery.assert_same(jax.jit(jax.grad(summed(f), case.argnums))(*operands), case.slopes)


@every(NORM)
def test_norm_of_shards(case):
    """What shard_map makes of the norm: one a shard, to be combined by the caller."""

    def whole(x):
        return jnp.sqrt(jax.lax.psum(jnp.square(case.f(x)), ("d", "m")))

    f = jax.shard_map(whole, mesh=mesh_of(AxisType.Auto), in_specs=P("d", "m"), out_specs=P())
    battery.assert_same(jax.jit(f)(*case.operands), case.values)
    battery.assert_same(jax.jit(jax.grad(summed(f), (0,)))(*case.operands), case.slopes)


@every()
def test_pmap(case):
    axes = tuple(0 if of_rows else None for of_rows in case.is_rows)
    operands = [
        x if axis is None else x.reshape(8, 2, *x.shape[1:])
        for x, axis in zip(case.operands, axes, strict=True)
    ]
    for f in (case.f, case.gradients):
        battery.assert_same(jax.pmap(f, in_axes=axes)(*operands), jax.vmap(f, axes)(*operands))

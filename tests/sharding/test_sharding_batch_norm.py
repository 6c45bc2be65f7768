"""Batch norms sharded over eight simulated devices: the statistics are those of the whole batch."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import AXES, CHANNELS, SHAPES, BatchNormCase, mesh_of, run, summed

from syntonic_jax import golden_batch_norm, golden_batch_norm_inference

pytestmark = pytest.mark.usefixtures("x64")

BATCH = [
    ("rows", P("d")),
    ("rows", P(("d", "m"))),
    ("last", P("d")),
    ("last", P("d", "m")),
    ("last", P(None, "m")),
    ("first", P(("d", "m"))),
    ("first", P("d", None, "m")),
    ("first", P(None, None, "m")),
]
FEATURES = [
    ("rows", P("d", "m")),
    ("last", P("d", None, "m")),
    ("last", P(None, None, ("d", "m"))),
    ("first", P("d", "m")),
    ("first", P(None, "m", "d")),
]


@pytest.fixture
def case(request, implementation, rng):
    return BatchNormCase(request.param, implementation, rng)


layouts = pytest.mark.parametrize("case", SHAPES, indirect=True)
batch_sharded = pytest.mark.parametrize(
    ("case", "spec"), battery.thinned(BATCH), indirect=["case"], ids=str
)
feature_sharded = pytest.mark.parametrize(
    ("case", "spec"), battery.thinned(FEATURES), indirect=["case"], ids=str
)


# --- NamedSharding under jit ----------------------------------------------------------------------


def moved_by(implementation, spec) -> set[str]:
    """The collectives there may be: the custom calls keep what is sharded along the first axis."""
    gathers = implementation == "cuda" and any(axis is not None for axis in spec[1:])
    return {"all-reduce", "all-gather"} if gathers else {"all-reduce"}


@batch_sharded
def test_batch_sharded(case, spec, implementation):
    """The only collectives are the all-reduces of sums over the batch; y stays where x is."""
    mesh = mesh_of(AxisType.Auto)
    operands = case.put(mesh, spec)
    for f, expected in ((case.f, case.values), (case.gradients, case.slopes)):
        results, used = run(f, *operands)
        battery.assert_same(results, expected)
        assert set(used) <= moved_by(implementation, spec)
        for x, s in zip(results, (spec, P(), P()), strict=True):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, s), x.ndim)


@feature_sharded
def test_feature_sharded(case, spec):
    operands = case.put(mesh_of(AxisType.Auto), spec, P("m"))
    battery.assert_same(jax.jit(case.f)(*operands), case.values)
    battery.assert_same(jax.jit(case.gradients)(*operands), case.slopes)


@pytest.mark.parametrize("layout", SHAPES)
def test_masked(layout, implementation, rng):
    """Devices with unequal counts, one of them with none."""
    where = rng.random(SHAPES[layout]) < 0.6
    where[:2], where[4:8] = True, False
    case = BatchNormCase(layout, implementation, rng, where=where)
    operands = case.put(mesh_of(AxisType.Auto), P("d"))
    for f, expected in ((case.f, case.values), (case.gradients, case.slopes)):
        results, used = run(f, *operands)
        battery.assert_same(results, expected)
        assert "all-gather" not in used


def test_mean_far_above_deviation(implementation, rng):
    """In float32, with a mean for each device too. 80 roundings of u = 6e-8 are 5e-6."""
    x = rng.normal(1e4, size=(64, 5)) + np.repeat(np.arange(8), 8)[:, None]
    x = jnp.asarray(x, "float32")
    exact = np.asarray(x, np.float64)
    put = jax.device_put(x, NamedSharding(mesh_of(AxisType.Auto), P(("d", "m"))))
    f = functools.partial(
        golden_batch_norm, target_variance="standard", epsilon=0.0, implementation=implementation
    )
    y, mean, var = jax.jit(f)(put)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-5 / 64)
    np.testing.assert_allclose(var, exact.var(0), rtol=1e-5)
    xhat = (exact - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(y, xhat, rtol=1e-5, atol=1e-5)


@layouts
def test_eager(case):
    operands = case.put(mesh_of(AxisType.Auto), P("d"))
    battery.assert_same(case.f(*operands), case.values)
    battery.assert_same(case.gradients(*operands), case.slopes)


def test_vmap_over_the_sharded_axis(implementation, rng):
    """A batch for each example: its statistics and gradients stay with it."""
    case = BatchNormCase("last", implementation, rng)
    examples = case.put(mesh_of(AxisType.Auto), P("d"))
    for f in (case.f, case.gradients):
        mapped = jax.vmap(f, (0, None, None))
        results, used = run(mapped, *examples)
        assert used == []
        battery.assert_same(results, mapped(*case.operands))


@layouts
def test_second_derivative(case):
    def along(*operands):
        return jax.jvp(case.gradients, operands, operands)[1]

    operands = case.put(mesh_of(AxisType.Auto), P("d"))
    battery.assert_same(jax.jit(along)(*operands), jax.jit(along)(*case.operands))


@layouts
def test_scan_and_checkpoint(case):
    def deep(*operands):
        def body(carry, _):
            return jax.checkpoint(case.f)(carry, *operands[1:])[0], None

        return jnp.sum(jnp.sin(jax.lax.scan(body, operands[0], None, length=3)[0]))

    gradients = jax.grad(deep, (0, 1, 2))
    operands = case.put(mesh_of(AxisType.Auto), P("d"))
    battery.assert_same(jax.jit(gradients)(*operands), jax.jit(gradients)(*case.operands))


@pytest.mark.parametrize("layout", SHAPES)
def test_inference_needs_no_collective(layout, implementation, rng):
    """Except for the gradients of parameters."""
    x = jnp.asarray(rng.normal(size=SHAPES[layout]))
    mean, var, scale, bias = jnp.asarray(rng.uniform(0.5, 1.5, size=(4, CHANNELS)))
    f = functools.partial(
        golden_batch_norm_inference, axis=AXES[layout], implementation=implementation
    )
    put = jax.device_put(x, NamedSharding(mesh_of(AxisType.Auto), P(("d", "m"))))
    for g in (f, jax.grad(summed(f))):
        y, used = run(g, put, mean, var, scale, bias)
        battery.assert_same(y, g(x, mean, var, scale, bias))
        assert used == []
    slopes = jax.grad(summed(f), (1, 2, 3, 4))
    got, used = run(slopes, put, mean, var, scale, bias)
    battery.assert_same(got, slopes(x, mean, var, scale, bias))
    assert set(used) == {"all-reduce"}


@batch_sharded
def test_gspmd(case, spec, implementation, gspmd):
    operands = case.put(mesh_of(AxisType.Auto), spec)
    for f, expected in ((case.f, case.values), (case.gradients, case.slopes)):
        results, used = run(f, *operands)
        battery.assert_same(results, expected)
        assert set(used) <= moved_by(implementation, spec)


# --- explicit axes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "spec"), battery.thinned([*BATCH, *FEATURES[::2]], 4), indirect=["case"], ids=str
)
def test_explicit_mesh(case, spec):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        operands = case.put(mesh, spec)
        values = jax.jit(case.f)(*operands)
        slopes = jax.jit(case.gradients)(*operands)
        for x, operand in zip(slopes, operands, strict=True):
            assert jax.typeof(x) == jax.typeof(operand)
        assert jax.typeof(values[0]).sharding == jax.typeof(operands[0]).sharding
        eager = case.f(*operands)
    battery.assert_same(values, case.values)
    battery.assert_same(eager, case.values)
    battery.assert_same(slopes, case.slopes)


# --- shard_map ------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", battery.thinned([True, False]))
@layouts
def test_shard_map_without_an_axis_name(case, check_vma):
    """Each device has the statistics of its own part, in no need of others."""
    x, scale, bias = case.operands
    f = jax.shard_map(
        lambda *operands: case.f(*operands)[0],
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P("d"), P(), P()),
        out_specs=P("d"),
        check_vma=check_vma,
    )

    def apart(x, scale, bias):
        return jnp.concatenate([case.f(part, scale, bias)[0] for part in jnp.split(x, 4)])

    battery.assert_same(jax.jit(f)(x, scale, bias), apart(x, scale, bias))
    got, expected = (jax.jit(jax.grad(summed(g), (0, 1, 2)))(x, scale, bias) for g in (f, apart))
    battery.assert_same(got, expected)


def test_partly_manual_shard_map(implementation, rng):
    """Manual over one axis, by name; over the other XLA partitions the sums inside."""
    case = BatchNormCase("last", implementation, rng)
    mesh = mesh_of(AxisType.Auto)
    f = jax.shard_map(
        functools.partial(case.f, axis_name="d"),
        mesh=mesh,
        axis_names={"d"},
        in_specs=(P("d"), P(), P()),
        out_specs=(P("d"), P(), P()),
    )
    operands = case.put(mesh, P(("d", "m")))
    values, used = run(f, *operands)
    battery.assert_same(values, case.values)
    assert set(used) == {"all-reduce"}
    battery.assert_same(jax.jit(jax.grad(summed(f), (0, 1, 2)))(*operands), case.slopes)

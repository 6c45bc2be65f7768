"""The GPUs of this machine, on a mesh; a machine with one runs the same programs over that one."""

import battery
import jax
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import CASES, LAYER_NORM, NORM, Case, run, summed
from sharded import BatchNormCase as BatchNorm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("x64")]

# Wide rows too: kernels have to ask every device for their shared memory, and for clusters.
SHAPES = (16, 4, 32), (16, 1, 4096)


def together():
    """As many as divide the arrays: a power of two."""
    gpus = jax.devices("gpu")
    return gpus[: 2 ** (len(gpus).bit_length() - 1)]


def mesh_of_gpus(kind=AxisType.Auto):
    return jax.make_mesh((len(together()),), ("d",), axis_types=(kind,), devices=together())


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_each_device_computes_the_same(name, dtype, rng):
    """To the last bit, whichever comes first."""
    operation = CASES[name]
    f = operation.using("cuda")

    @jax.jit
    def both(*operands):
        return f(*operands), jax.grad(summed(f), tuple(range(len(operands))))(*operands)

    for width in (33, 4096, 50257):
        operands = operation.operands(rng, dtype, lead=(5,), width=width)
        results = []
        for device in reversed(jax.devices("gpu")):
            results.append(jax.device_get(both(*jax.device_put(operands, device))))
        for other in results:
            jax.tree.map(np.testing.assert_array_equal, other, results[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sharded(name, shape, rng):
    """Over rows, and over features; with rows on each device no collective but for sums of them."""
    case = Case(name, "cuda", rng, shape)
    sums = name == NORM, name == NORM or not all(case.is_rows)
    several = len(together()) > 1
    operands = case.put(mesh_of_gpus(), P("d"))
    for f, expected, summing in zip((case.f, case.gradients), (case.values, case.slopes), sums):
        results, used = run(f, *operands)
        battery.assert_same(results, expected)
        assert set(used) == ({"all-reduce"} if summing and several else set())
    operands = case.put(mesh_of_gpus(), P(None, None, "d"), P("d"))
    battery.assert_same(jax.jit(case.f)(*operands), case.values)
    battery.assert_same(jax.jit(case.gradients)(*operands), case.slopes)


@pytest.mark.parametrize("name", [name for name in CASES if name != NORM])
def test_shard_map(name, rng):
    """The norm of a shard is no shard of the norm."""
    case = Case(name, "cuda", rng)
    f = jax.shard_map(
        case.f, mesh=mesh_of_gpus(), in_specs=case.specs(P("d")), out_specs=P("d"), check_vma=True
    )
    battery.assert_same(jax.jit(f)(*case.operands), case.values)
    battery.assert_same(jax.jit(jax.grad(summed(f), case.argnums))(*case.operands), case.slopes)


@pytest.mark.parametrize("name", CASES)
def test_explicit_mesh(name, rng):
    case = Case(name, "cuda", rng)
    mesh = mesh_of_gpus(AxisType.Explicit)
    with jax.set_mesh(mesh):
        operands = case.put(mesh, P("d"))
        values, slopes = jax.jit(case.f)(*operands), jax.jit(case.gradients)(*operands)
    battery.assert_same(values, case.values)
    battery.assert_same(slopes, case.slopes)


@pytest.mark.parametrize("layout", ["rows", "last", "first"])
def test_statistics_of_the_whole_batch(layout, rng):
    case = BatchNorm(layout, "cuda", rng)
    operands = case.put(mesh_of_gpus(), P("d"))
    values, _ = run(case.f, *operands)
    battery.assert_same(values, case.values)
    slopes, _ = run(case.gradients, *operands)
    battery.assert_same(slopes, case.slopes)


def test_pmap(rng):
    case = Case(LAYER_NORM, "cuda", rng)
    count = len(together())
    split = [
        x.reshape(count, -1, *x.shape[1:]) if of_rows else x
        for x, of_rows in zip(case.operands, case.is_rows)
    ]
    axes = tuple(0 if of_rows else None for of_rows in case.is_rows)
    values = jax.pmap(case.f, in_axes=axes, axis_name="d", devices=together())(*split)
    battery.assert_same([y.reshape(16, 4, 32) for y in values], list(case.values))

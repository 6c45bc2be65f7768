"""The kernels of cuda/ on the CPU, emulated, against the float64 oracle: every type, few shapes.

What only a GPU shows is in tests/gpu: clusters, background copies, large shapes.
"""

import double
import emulator
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from softmax_cases import FUNCTIONS, MODES, check, draw

from syntonic_jax import _partition, _primitive, crystallize

pytestmark = [
    pytest.mark.usefixtures("x64", "emulated"),
    pytest.mark.skipif(not emulator.compiler_works(), reason="fibers are those of Linux"),
]


@pytest.fixture(scope="module")
def emulated():
    """Has the custom calls of this module served by the emulated kernels."""
    double.install()  # has them emitted
    for name, stages in emulator.targets().items():
        jax.ffi.register_ffi_target(name + "_emulated", stages, platform="cpu")
        jax.ffi.register_ffi_target_as_batch_partitionable(name + "_emulated")
    call = _partition._call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_partition, "_call", lambda target, *a, **k: call(target + "_emulated", *a, **k))
        jax.clear_caches()
        yield
    jax.clear_caches()


SHAPES = [  # and the axis of the softmax
    ((3, 1), -1),
    ((20, 7), -1),
    ((9, 33), -1),
    ((5, 256), -1),
    ((3, 1000), -1),
    ((3, 1033), -1),
    ((2, 4096), -1),
    ((2, 5003), -1),
    ((2, 20000), -1),
    ((2, 60, 17), 1),
    ((2, 300, 24), 1),
    ((2, 9, 75), 1),
    ((3, 1, 7), 1),
    ((70, 40), 0),
    ((1, 4000, 9), 1),
]
names = pytest.mark.parametrize("name", FUNCTIONS)


def drawn(rng, name, shape, axis, dtype, mode):
    axis %= len(shape)
    rest = shape[:axis] + shape[axis + 1 :]
    given, options = draw(rng, shape, axis, dtype, mode), {"axis": axis}
    if name != "syntonic_cross_entropy":
        return given, options, jnp.asarray(rng.normal(size=shape), dtype)
    options["labels"] = jnp.asarray(rng.integers(0, shape[axis], size=rest), "int32")
    return given, options, jnp.asarray(rng.normal(size=rest), oracles.accumulation(dtype))


@names
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("mode", ["identity", "learned"])
def test_softmax(name, shape, axis, dtype, mode, rng):
    given, options, ct = drawn(rng, name, shape, axis, dtype, mode)
    check("cuda", name, given, ct, **options)


@names
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), [((9, 96), 1), ((5, 1033), 1), ((3, 40, 17), 1)], ids=str)
def test_softmax_of_what_is_not_masked(name, mode, shape, axis, rng):
    given, options, ct = drawn(rng, name, shape, axis, "bfloat16", mode)
    where = rng.random(shape) < 0.5
    where[0] = False
    check("cuda", name, given, ct, where=where, **options)


@pytest.mark.parametrize("precision", [1, 10, 100, 300, 5000])
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_crystallize(dtype, precision, rng):
    x = jnp.asarray(rng.normal(size=999) * rng.choice([1, 5, precision], 999), dtype)
    x = x.at[:4].set(jnp.asarray([0, jnp.inf, -jnp.inf, jnp.nan], dtype))
    ours, theirs = (crystallize(x, precision, implementation=i) for i in ("cuda", "xla"))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))

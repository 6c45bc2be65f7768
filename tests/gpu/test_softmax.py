"""The softmax kernels against the float64 oracle and XLA's result in the same type."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from softmax_cases import FUNCTIONS, MODES, check, draw

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("x64")]

SHAPES = [  # and the axis of the softmax
    ((5, 1), -1),
    ((1000, 7), -1),
    ((257, 31), -1),
    ((64, 32), -1),
    ((99, 33), -1),
    ((17, 256), -1),
    ((9, 1000), -1),
    ((6, 4096), -1),
    ((5, 5000), -1),
    ((4, 16384), -1),
    ((3, 50257), -1),
    ((3, 65536), -1),
    ((2, 131072), -1),
    ((2, 151936), -1),
    ((2, 300000), -1),
    ((2, 512, 17), 1),
    ((2, 4096, 64), 1),
    ((3, 9, 300), 1),
    ((5, 1, 7), 1),
    ((513, 40), 0),
]
names = pytest.mark.parametrize("name", FUNCTIONS)


def drawn(rng, name, shape, axis, dtype, mode):
    """Operands, options and a cotangent, which for a loss is one number a row."""
    axis %= len(shape)
    rest = shape[:axis] + shape[axis + 1 :]
    options = {"axis": axis}
    if name != "syntonic_cross_entropy":
        return (
            draw(rng, shape, axis, dtype, mode),
            options,
            jnp.asarray(rng.normal(size=shape), dtype),
        )
    options["labels"] = jnp.asarray(rng.integers(0, shape[axis], size=rest), "int32")
    ct = jnp.asarray(rng.normal(size=rest), oracles.accumulation(dtype))
    return draw(rng, shape, axis, dtype, mode), options, ct


@names
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_accuracy(name, shape, axis, dtype, rng):
    """With the classes weighted: the gradients of mode_norms are sums over rows."""
    given, options, ct = drawn(rng, name, shape, axis, dtype, "learned")
    check("cuda", name, given, ct, **options)


@names
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(33, 1000), (7, 4099), (3, 70001)], ids=str)
def test_masks(name, mode, shape, rng):
    given, options, ct = drawn(rng, name, shape, -1, "bfloat16", mode)
    where = rng.random(shape) < 0.5
    where[0] = False
    check("cuda", name, given, ct, where=where, **options)


@names
@pytest.mark.parametrize("shape", [(40, 768), (5, 50257), (4, 65536), (3, 40, 17)], ids=str)
def test_equals_jnp(name, shape, rng):
    """Both round once, from float32 numbers that differ by what the order of a sum leaves."""
    axis = 1
    given, options, ct = drawn(rng, name, shape, axis, "bfloat16", "learned")
    x, norms, scale = given["x"], given["mode_norms"], given["scale"]

    def run(implementation):
        def f(x, norms, scale):
            return FUNCTIONS[name](
                x, mode_norms=norms, scale=scale, implementation=implementation, **options
            )

        y, pull = jax.vjp(f, x, norms, scale)
        return y, *pull(ct)

    ours, theirs = jax.jit(run, static_argnums=0)("cuda"), jax.jit(run, static_argnums=0)("xla")
    for a, b in zip(ours, theirs, strict=True):
        a, b = oracles.real(a), oracles.real(b)
        assert np.linalg.norm(a - b) <= 2 * oracles.unit("bfloat16") * np.linalg.norm(b)


@names
def test_same_bits_every_time(name, rng):
    for shape, axis in (((700, 1000), 1), ((90, 50257), 1), ((9, 400, 33), 1)):
        given, options, ct = drawn(rng, name, shape, axis, "bfloat16", "learned")
        options["implementation"] = "cuda"

        x, norms, scale = given["x"], given["mode_norms"], given["scale"]

        @jax.jit
        def run(x, norms, scale, ct, options=options):
            def f(x, norms, scale):
                return FUNCTIONS[name](x, mode_norms=norms, scale=scale, **options)

            y, pull = jax.vjp(f, x, norms, scale)
            return y, *pull(ct)

        first = jax.tree.map(np.asarray, run(x, norms, scale, ct))
        for _ in range(20):
            jax.tree.map(np.testing.assert_array_equal, run(x, norms, scale, ct), first)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(rng):
    """Row numbers and offsets in 64 bits; the last rows are compared, which only they reach."""
    rows, width = 2_147_500, 1000
    row = jnp.asarray(rng.normal(size=(8, width)), "bfloat16")
    with jax.enable_x64(False):
        x = jnp.tile(row, (rows // 8 + 1, 1))[:rows]
        f = jax.jit(lambda x: FUNCTIONS["syntonic_softmax"](x, implementation="cuda"))
        np.testing.assert_array_equal(f(x)[-4:], f(x[-8:])[-4:])
        loss = jax.jit(
            jax.grad(
                lambda x, labels: FUNCTIONS["syntonic_cross_entropy"](
                    x, labels, implementation="cuda"
                ).sum()
            )
        )
        labels = jnp.arange(rows, dtype="int32") % width
        np.testing.assert_array_equal(loss(x, labels)[-4:], loss(x[-8:], labels[-8:])[-4:])

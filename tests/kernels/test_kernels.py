"""The kernels of cuda/ on the CPU, emulated, against the float64 oracle: every type, few shapes.

What only a GPU shows is in tests/gpu: clusters, background copies, large shapes.
"""

import functools

import batch_norm_check
import emulator
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from elementwise_range_check import ACTIVATIONS, check_activation, check_stores, check_sums
from norm_range_check import CASES, check_norm
from softmax_cases import FUNCTIONS, MODES, check, draw

from syntonic_jax import (
    crystallize,
    golden_batch_norm,
    golden_gelu,
    golden_layer_norm,
    phi_residual,
    residual_component_norm,
)

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.usefixtures("x64", "emulated"),
    pytest.mark.skipif(not emulator.available(), reason="fibers are those of Linux"),
]


SHAPES = [  # and the axis of the softmax
    ((3, 1), -1),
    ((20, 7), -1),
    ((9, 33), -1),
    ((5, 256), -1),
    ((3, 1000), -1),
    ((3, 1033), -1),
    ((2, 4096), -1),
    ((2, 5003), -1),
    ((2, 9001), -1),
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
@pytest.mark.parametrize(
    ("shape", "axis"), [((9, 96), 1), ((5, 1033), 1), ((3, 40, 17), 1)], ids=str
)
def test_softmax_of_what_is_not_masked(name, mode, shape, axis, rng):
    given, options, ct = drawn(rng, name, shape, axis, "bfloat16", mode)
    where = rng.random(shape) < 0.5
    where[0] = False
    check("cuda", name, given, ct, where=where, **options)


@names
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis", "masked"),
    [((40, 7), 1, True), ((40, 256), 1, False), ((30, 1033), 1, True), ((2, 40, 17), 1, True)],
    ids=str,
)
def test_softmax_of_infinities(name, shape, axis, dtype, masked, rng):
    """What is NaN, inf, −inf or a number in values and gradients is so from both lowerings."""
    given, options, ct = drawn(rng, name, shape, axis, dtype, "learned")
    values = rng.choice([np.inf, -np.inf, np.nan], size=shape)
    few = rng.random(shape) < 1 / shape[axis]
    given["x"] = jnp.where(few, jnp.asarray(values, dtype), given["x"])
    given["x"] = given["x"].at[0].set(-jnp.inf)
    given["mode_norms"] = given["mode_norms"].at[1].set(jnp.inf)
    if masked:
        options["where"] = jnp.asarray(rng.random(shape) < 0.7).at[1].set(False)

    def both(implementation):
        def f(given):
            rest = {k: v for k, v in given.items() if k != "x"}
            return FUNCTIONS[name](given["x"], **rest, **options, implementation=implementation)

        y, pull = jax.vjp(f, given)
        return y, pull(ct)[0]

    def kind(x):
        x = oracles.real(x)
        return np.where(np.isnan(x), "nan", np.where(np.isinf(x), np.sign(x).astype(str), "number"))

    for ours, theirs in zip(*map(jax.tree.leaves, map(both, ("cuda", "xla"))), strict=True):
        np.testing.assert_array_equal(kind(ours), kind(theirs))


@pytest.mark.parametrize("mode", ["identity", "learned"])
@pytest.mark.parametrize("width", [7, 256, 1033])
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_labels_out_of_use(dtype, width, mode, rng):
    """Rows that are not numbers leave nothing behind, and the others are as ever."""
    x = jnp.asarray(rng.normal(size=(6, width)), dtype)
    labels = np.array([1, -100, 0, -100, -1, -100])
    kept = jnp.asarray(labels) >= 0
    bad = jnp.asarray([0, jnp.nan, 0, -jnp.inf, 0, jnp.inf], dtype)[:, None]
    norms = jnp.abs(jnp.asarray(rng.normal(size=width), oracles.accumulation(dtype)))

    def both(x, labels, **options):
        def f(x, norms):
            given = {"mode_norms": norms} if mode == "learned" else {}
            f = functools.partial(FUNCTIONS["syntonic_cross_entropy"], implementation="cuda")
            return f(x, labels, **given, **options)

        loss, pull = jax.vjp(f, x, norms)
        return loss, *pull(jnp.where(kept, 1, 7).astype(loss.dtype))

    loss, dx, d_norms = both(jnp.where(kept[:, None], x, bad + x), labels, ignore_index=-100)
    np.testing.assert_array_equal(np.isnan(loss), labels == -1)
    np.testing.assert_array_equal(loss[labels == -100], 0)
    np.testing.assert_array_equal(oracles.real(dx)[~kept], 0)
    good, d_good, d_norms_good = both(x, np.where(kept, labels, -1))
    np.testing.assert_array_equal(loss[kept], good[kept])
    np.testing.assert_array_equal(dx[kept], d_good[kept])
    np.testing.assert_array_equal(d_norms, d_norms_good)


@pytest.mark.parametrize("precision", [1, 10, 100, 300, 1024, 5000])
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_crystallize(dtype, precision, rng):
    x = jnp.asarray(rng.normal(size=999) * rng.choice([1, 5, precision], 999), dtype)
    x = x.at[:4].set(jnp.asarray([0, jnp.inf, -jnp.inf, jnp.nan], dtype))
    ours, theirs = (crystallize(x, precision, implementation=i) for i in ("cuda", "xla"))
    # The kernel rounds twice where it adds in the type itself: a few values in a thousand show it.
    bound = oracles.ulp(theirs, dtype) if dtype in ("float32", "float64") else 0
    assert (np.abs(oracles.real(ours) - oracles.real(theirs)) <= bound).all()
    # Five of 999 are expected where most are, at 1024 in float32: six deviations more are not.
    assert np.count_nonzero(np.asarray(ours) != np.asarray(theirs)) <= 6 + 6 * 6**0.5


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_crystallize_to_float64(dtype, rng):
    """One rule: right to float64 whatever the data are, by the kernel too."""
    x = jnp.asarray(rng.normal(size=999) * rng.choice([1, 5, 100], 999), dtype)
    ours, theirs = (crystallize(x, dtype="float64", implementation=i) for i in ("cuda", "xla"))
    assert (np.abs(ours - theirs) <= oracles.ulp(theirs, "float64")).all()
    narrow = crystallize(x, dtype="float32", implementation="cuda")
    np.testing.assert_allclose(narrow, ours, rtol=2 * oracles.unit("float32"))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((70, 5), -1),
        ((600, 24), -1),
        ((5000, 200), -1),
        ((9, 7, 7, 3), -1),
        ((6, 5, 7, 9), 1),
        ((40, 2, 8, 8), 1),
        ((40, 12, 14, 14), 1),
        ((150, 16, 7, 7), 1),
        ((4, 5, 3, 2), 1),  # planes of whole pairs of numbers, and of no more
        ((5, 3, 7, 14), 1),
        (
            (5, 3, 48, 48),
            1,
        ),  # planes beyond a block: of whole packs, of halves in 16 bits and in 32
        ((6, 2, 34, 34), 1),
        ((4, 4, 30, 35), 1),
    ],
    ids=str,
)
def test_batch_norm(shape, axis, dtype, rng):
    acc, channels = oracles.accumulation(dtype), shape[axis]
    x, ct = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    scale, bias, *others = (jnp.asarray(rng.normal(size=channels), acc) for _ in range(4))
    parameters = {"scale": scale, "bias": bias}
    batch_norm_check.check("cuda", x, (ct, *others), parameters, axis=axis, flush=False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((300, 24), -1), ((40, 12, 14, 14), 1), ((5, 3, 48, 48), 1)], ids=str
)
def test_batch_norm_far_from_zero(shape, axis, dtype, rng):
    """Where what rounding took from the mean shows in y: it is in the shift."""
    x = jnp.asarray(1e4 + rng.normal(size=shape), dtype)
    ct, *others = (
        jnp.asarray(rng.normal(size=n), dtype) for n in (shape, shape[axis], shape[axis])
    )
    batch_norm_check.check("cuda", x, (ct, *others), {}, axis=axis, flush=False)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(("scale", "bias", "variance"), batch_norm_check.PARAMETERS[::2], ids=str)
@pytest.mark.parametrize("layout", ["last", "first", "long"])
def test_batch_norm_infinities(layout, scale, bias, variance, dtype):
    """Also where many threads have a part of a channel."""
    acc = oracles.accumulation(dtype)

    def f(x, scale, bias):
        norm = functools.partial(
            golden_batch_norm, target_variance=variance, dtype=acc, implementation="cuda"
        )
        if layout == "first":
            y, mean, var = norm(x.T.reshape(1, -1, 4, 2), scale, bias, axis=1)
            return y.reshape(x.shape[::-1]).T, mean, var
        return norm(x, scale, bias)

    copies = 100 if layout == "long" else 1
    batch_norm_check.check_infinities(f, dtype, scale, bias, variance, copies)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 7), -1),
        ((70, 5), -1),  # rows side by side make packs
        ((65, 264), -1),
        ((3, 40, 1, 1), 1),
        ((2, 3, 5), 1),  # rows of channels that make none, and wrap within a pack
        ((9, 4, 3), 1),
        ((3, 500, 2, 11), 1),
        ((2, 2, 90, 101), 1),  # channels on both sides of a stretch
        ((1, 1, 20011), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("mapped", [False, True])
def test_batch_norm_inference(shape, axis, dtype, mapped, rng):
    """Every way over memory; mapped, with parameters for each of three examples."""
    lead = (3,) if mapped else ()
    x = jnp.asarray(rng.normal(size=lead + shape), dtype)
    given = rng.normal(size=(4, *lead, shape[axis]))
    given[1] **= 2
    mean, var, *parameters = (jnp.asarray(g, oracles.accumulation(dtype)) for g in given)
    batch_norm_check.check_inference("cuda", x, (mean, var), parameters, axis=axis, epsilon=0.1)


@pytest.mark.parametrize(("shape", "axis"), [((65, 264), -1), ((3, 500, 2, 11), 1)], ids=str)
@pytest.mark.parametrize("out", oracles.DTYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batch_norm_inference_in_another_type(shape, axis, dtype, out, rng):
    x = jnp.asarray(rng.normal(size=shape), dtype)
    mean, scale, bias, var = (jnp.asarray(v, "float32") for v in rng.random((4, shape[axis])))
    batch_norm_check.check_inference(
        "cuda", x, (mean, 1 + var), (scale, bias), axis=axis, dtype=out
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("width", [5, 1024, 4097])
def test_numbers_whose_square_overflows(width, dtype):
    """Equal ones have no deviation; threads, lanes and members without any must not make one."""
    huge = jnp.asarray(1e200 if dtype == "float64" else 1e30, dtype)
    rows = jnp.full((3, width), huge)
    y = golden_layer_norm(rows, implementation="cuda")
    np.testing.assert_array_equal(oracles.real(y), np.zeros(rows.shape))
    y, mean, var = golden_batch_norm(rows, implementation="cuda")
    np.testing.assert_array_equal(oracles.real(y), np.zeros(rows.shape))
    np.testing.assert_array_equal(oracles.real(mean), np.full(width, oracles.real(huge)))
    np.testing.assert_array_equal(oracles.real(var), np.zeros(width))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_elementwise(dtype, rng):
    """As the jnp lowering has it, but for the last operation."""
    x, r, ct = (jnp.asarray(rng.normal(size=1003), dtype) for _ in range(3))
    for activation in (None, "relu", "gelu", "golden_gelu"):

        def both(implementation, activation=activation):
            def f(x, r):
                z = phi_residual(x, r, activation=activation, implementation=implementation)
                return z + golden_gelu(x, implementation=implementation)

            y, pull = jax.vjp(f, x, r)
            return y, *pull(ct)

        for ours, theirs in zip(both("cuda"), both("xla"), strict=True):
            ours, theirs = oracles.real(ours), oracles.real(theirs)
            size = (1 + np.abs(oracles.real(x)) + np.abs(oracles.real(r))) * (
                1 + np.abs(oracles.real(ct))
            )
            assert (np.abs(ours - theirs) <= 4 * oracles.unit(dtype) * size).all()


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("shape", [(1, 1003), (1, 40000), (5, 77), (3, 4096), (3, 4099), (70, 3)])
def test_residual_component_norm(shape, dtype, rng):
    """One norm of several workers, and many, of stretches that are whole packs and others."""
    acc, x = oracles.accumulation(dtype), jnp.asarray(rng.normal(size=shape), dtype)
    f = jax.value_and_grad(functools.partial(residual_component_norm, implementation="cuda"))
    for row, norm, dx in zip(x, *jax.vmap(f)(x)):
        oracles.assert_close(norm, oracles.residual_component_norm(row, acc=acc))
        oracles.assert_close(dx, oracles.residual_component_norm_vjp(row, 1, acc=acc), flush=True)


@pytest.mark.parametrize(("dtype", "values", "count"), CASES)
def test_residual_component_norm_of_any_size(dtype, values, count):
    check_norm(dtype, values, count, "phi", "cuda")


def test_residual_component_norm_of_several_workers():
    """Of which one has large numbers, and one nothing but small ones."""
    values = np.repeat([1.0, 1e-30, 1e30], 40000)
    check_norm("float32", values, 1, "phi", "cuda")
    check_norm("float32", values[:80000], 1, "phi", "cuda")


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_ends_of_the_range(dtype):
    for mode in oracles.MODES:
        check_sums(dtype, mode, "cuda")
    for name in ACTIVATIONS:
        check_activation(name, dtype, 0, "cuda")
        check_activation(name, dtype, 1, "cuda")


def test_rounds_to_infinity():
    check_stores("cuda")

"""golden_batch_norm against the oracle: values, statistics and their cotangents."""

import functools
import itertools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_norm
import pytest
from batch_norm_check import (
    LAYOUTS,
    channels_of,
    check,
    draw,
    draw_parameters,
    features_of,
    layouts,
)

from syntonic_jax import PHI_INV, GoldenNormMode, golden_batch_norm, output_statistics

pytestmark = pytest.mark.usefixtures("x64")

# --- types and shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@layouts
def test_accuracy(shape, axis, dtype, implementation, rng):
    parameters = draw_parameters(rng, shape, axis, oracles.accumulation(dtype))
    check(implementation, *draw(rng, shape, axis, dtype), parameters, axis=axis)


@pytest.mark.parametrize(("dtype", "out"), [*itertools.permutations(oracles.DTYPES, 2)])
def test_accuracy_with_another_output_type(dtype, out, implementation, rng):
    shape = (6, 4)
    parameters = draw_parameters(rng, shape, -1, dtype)
    check(implementation, *draw(rng, shape, -1, dtype, out), parameters)


@pytest.mark.parametrize("names", [(), ("scale",), ("bias",)], ids=lambda n: "-".join(n) or "none")
@pytest.mark.parametrize("dtype", battery.thinned(["bfloat16", "float32"]))
@layouts
def test_accuracy_without_some_parameters(shape, axis, names, dtype, implementation, rng):
    parameters = draw_parameters(rng, shape, axis, dtype, names)
    check(implementation, *draw(rng, shape, axis, dtype), parameters, axis=axis)


SHAPES = [
    ((1, 3), -1),  # nothing but the bias is left of one element
    ((1, 5, 1, 1), 1),
    ((64, 1), -1),
    ((5, 7, 7, 3), -1),
    ((5, 3, 7, 7), 1),
    ((3, 2048), -1),
    ((2, 2048, 2), 1),
    ((13, 11, 17, 19), -1),
    ((13, 11, 17, 19), 1),
    ((1009, 2), -1),
]


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_accuracy_of_odd_shapes(shape, axis, implementation, rng):
    parameters = draw_parameters(rng, shape, axis)
    check(implementation, *draw(rng, shape, axis, "float32"), parameters, axis=axis)


def test_one_element_a_channel(implementation, rng):
    x = jnp.asarray(rng.normal(1e4, size=(1, 6)), "float32")
    bias = jnp.asarray(rng.normal(size=6), "float32")
    y, mean, var = golden_batch_norm(x, None, bias, implementation=implementation)
    np.testing.assert_array_equal(y[0], bias)
    np.testing.assert_array_equal(mean, x[0])
    np.testing.assert_array_equal(var, np.zeros(6))


# --- far from zero --------------------------------------------------------------------------------


def test_mean_far_above_deviation(implementation, rng):
    """Mean 1e4, deviation 1, in float32: nothing is lost but what E[x**2] - E[x]**2 loses.

    The oracle's slack, for 64 elements: 80 roundings of u = 6e-8 are 5e-6 of a deviation.
    """
    shape = (64, 5)
    x, cotangents = draw(rng, shape, -1, "float32", mean=1e4)
    check(implementation, x, cotangents, draw_parameters(rng, shape, -1))
    y, mean, var = golden_batch_norm(
        x, target_variance="standard", epsilon=0.0, implementation=implementation
    )
    exact = oracles.real(x)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-5 / 64)
    np.testing.assert_allclose(var, exact.var(0), rtol=1e-5)
    xhat = (exact - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(y, xhat, rtol=1e-5, atol=1e-5)

    # Float32 numbers near 1e8 are multiples of 8, and so are their differences.
    x = np.asarray(x)
    naive = np.mean(x * x, 0) - np.mean(x, 0) ** 2
    np.testing.assert_array_equal(naive % 8, 0)
    assert np.all(np.abs(naive - exact.var(0)) > 0.1)


@pytest.mark.parametrize(("shape", "axis"), [((6, 4, 4, 3), -1), ((6, 3, 4, 4), 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_far_from_zero_in_other_layouts(shape, axis, masked, implementation, rng):
    x, cotangents = draw(rng, shape, axis, "float32", mean=1e4)
    where = rng.random(shape) < 0.7 if masked else None
    check(implementation, x, cotangents, draw_parameters(rng, shape, axis), axis=axis, where=where)


def test_constant_channels(implementation):
    x = jnp.full((6, 2), 1e4, "float32") + jnp.array([0, 0.1], "float32")
    ones = jnp.ones(2, "float32")
    check(implementation, x, (jnp.ones_like(x), ones, ones), {})


# --- variance -------------------------------------------------------------------------------------


def test_epsilon_is_a_float64(implementation, rng):
    # 0.1 as a float32 is off by 1.5e-8 relatively, which would show.
    x, cotangents = draw(rng, (9, 3), -1, "float64", deviation=0.1)
    for epsilon in (0.1, 1e-3, 0.0):
        check(implementation, x, cotangents, {}, epsilon=epsilon)


MODES = [
    ("golden", PHI_INV),
    ("standard", 1.0),
    (GoldenNormMode("golden"), PHI_INV),
    (GoldenNormMode("standard"), 1.0),
    (GoldenNormMode.custom(2.5), 2.5),
    (0.25, 0.25),
]


@pytest.mark.parametrize(("target", "variance"), MODES, ids=["g", "s", "G", "S", "C", "0.25"])
@layouts
def test_output_has_the_target_variance(shape, axis, target, variance, implementation, rng):
    x = jnp.asarray(rng.normal(3, 2, size=shape))
    y, _, _ = golden_batch_norm(
        x, axis=axis, target_variance=target, epsilon=0.0, implementation=implementation
    )
    mean, var = output_statistics(y, axis=axis)
    assert mean.shape == var.shape == channels_of(shape, axis)
    # Some dozens of roundings, of numbers of size 1.
    np.testing.assert_allclose(var, variance, rtol=1e-13)
    np.testing.assert_allclose(mean, 0, atol=1e-13)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@layouts
def test_output_statistics(shape, axis, dtype, rng):
    x = jnp.asarray(rng.normal(100, size=shape), dtype)
    acc = oracles.accumulation(dtype)
    found = output_statistics(x, axis=axis)
    expected = oracles_norm.batch_norm(x, features=features_of(axis), acc=acc)
    for got, name in zip(found, ("mean", "var")):
        assert got.dtype == acc
        oracles.assert_close(got, getattr(expected, name), name)


# --- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [(8, 3, 2, 4), (8, 1, 1, 1), (3, 1, 4), (8, 1, 2, 1), ()], ids=str)
@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES))
def test_where(mask, dtype, implementation, rng):
    shape = (8, 3, 2, 4)
    where = rng.random(mask) < 0.6
    if mask:
        where[:1] = True  # every channel has something
    else:
        where = np.asarray(True)
    x, cotangents = draw(rng, shape, -1, dtype)
    parameters = draw_parameters(rng, shape, -1, oracles.accumulation(dtype))
    check(implementation, x, cotangents, parameters, where=where)
    first = jnp.moveaxis(x, -1, 1), (jnp.moveaxis(cotangents[0], -1, 1), *cotangents[1:])
    where = np.moveaxis(np.broadcast_to(where, shape), -1, 1)
    check(implementation, *first, parameters, axis=1, where=where)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_masked_does_not_leak(poison, implementation, rng):
    """Neither into the statistics nor, where its y is not used, into any gradient."""
    shape = (9, 4)
    where = rng.random(shape) < 0.6
    where[:2] = True
    x, (ct_y, ct_mean, ct_var) = draw(rng, shape, -1, "float32")
    cotangents = jnp.where(where, ct_y, 0), ct_mean, ct_var
    parameters = draw_parameters(rng, shape, -1)
    parameters["scale"] = parameters["scale"].at[:2].set(jnp.array([0, -1], "float32"))

    @jax.jit
    def both(given, cotangents):
        def f(given):
            return golden_batch_norm(**given, where=where, implementation=implementation)

        results, pull = jax.vjp(f, given)
        return results, pull(cotangents)[0]

    (y, *statistics), gradients = both({"x": jnp.where(where, x, poison), **parameters}, cotangents)
    options = {"variance": oracles.PHI_INV, "where": where, "acc": "float32"}
    clean = jnp.where(where, x, 0)
    expected = oracles_norm.batch_norm(clean, *parameters.values(), **options)
    oracles.assert_close(
        y[where], oracles.Estimate(*(e[where] for e in expected.y)), "y", flush=True
    )
    # Normalised as all others are: the sign is that of the slope, and there may be none.
    like_all = np.broadcast_to(jnp.sign(parameters["scale"]) * poison, shape)
    np.testing.assert_array_equal(y[~where], like_all[~where])
    for got, name in zip(statistics, ("mean", "var")):
        oracles.assert_close(got, getattr(expected, name), name)
    pulled = oracles_norm.batch_norm_vjp(clean, *cotangents, parameters["scale"], **options)
    for name, got in gradients.items():
        oracles.assert_close(got, getattr(pulled, name), f"cotangent of {name}", flush=True)


def test_fully_masked_channel(implementation, rng):
    """It leaves the others as they are; itself it is in test_empty_batch_norm/channels.py."""
    shape, whole = (6, 2, 4), [0, 1, 3]
    where = np.broadcast_to(np.arange(4) != 2, shape)
    x, cotangents = draw(rng, shape, -1, "float32")
    parameters = draw_parameters(rng, shape, -1)
    check(implementation, x, cotangents, parameters, where=where, only=whole)


# --- numbers at the edges -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((5, 6), -1), ((5, 6, 2), 1)], ids=str)
def test_channels_that_are_not_finite_stay_alone(shape, axis, dtype, implementation, rng):
    x, cotangents = draw(rng, shape, axis, dtype)
    for channel, value in enumerate((np.nan, np.inf, -np.inf), start=1):
        x = x.at[channel, channel].set(value)
    f = functools.partial(golden_batch_norm, axis=axis, implementation=implementation)
    (y, mean, var), pull = jax.vjp(f, x)
    (gradient,) = pull(cotangents)
    for result in (y, gradient):
        channels = np.moveaxis(oracles.real(result), axis, 0)
        assert np.all(np.isnan(channels[1:4]))
        assert np.all(np.isfinite(channels[[0, 4, 5]]))
    assert np.all(np.isnan(var[1:4]))
    np.testing.assert_array_equal(np.isfinite(mean), [True, False, False, False, True, True])
    np.testing.assert_array_equal(np.isfinite(var), np.isfinite(mean))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_huge_and_subnormal(dtype, implementation):
    limits = oracles.info(dtype)
    largest, tiny = float(limits.max), float(limits.smallest_normal)
    pattern = np.array([1.0, -1.0, 0.25, 0.5])
    channels = np.stack([largest / 4 * pattern, tiny / 2 * pattern, 0 * pattern], -1)
    x = jnp.asarray(channels, dtype)
    y, _, _ = golden_batch_norm(x, target_variance="standard", implementation=implementation)
    y = oracles.real(y)
    acc = oracles.accumulation(dtype)
    # The square overflows in all types but float16: as in jnp the deviation is then infinite and y
    # is 0, unless the sums are kept in something wider still, and y is right.
    with np.errstate(over="ignore", invalid="ignore"):
        exact = oracles_norm.batch_norm(x, acc=acc).y.value
    tolerances = {"rtol": 8 * float(limits.eps), "atol": tiny / 1e-3}
    if not np.allclose(y[:, 0], exact[:, 0], **tolerances):
        assert np.dtype(dtype) != np.float16
        np.testing.assert_array_equal(y[:, 0], 0)
    np.testing.assert_allclose(y[:, 1], exact[:, 1], **tolerances)
    assert np.all(y[:, 2] == 0)


# --- vmap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_axis", [0, 1, -1])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS[:3], ids=str)
def test_vmap_with_groups(shape, axis, in_axis, implementation, rng):
    """Each example has statistics, gradients and a scale of its own; the bias is shared."""
    examples = [draw(rng, shape, axis, "float32") for _ in range(3)]
    scales = jnp.stack([draw_parameters(rng, shape, axis)["scale"] for _ in examples])
    bias = draw_parameters(rng, shape, axis)["bias"]
    xs = jnp.stack([x for x, _ in examples], in_axis)
    cotangents = jax.tree.map(lambda *c: jnp.stack(c), *(c for _, c in examples))

    def both(x, cotangents, scale, bias):
        f = functools.partial(golden_batch_norm, axis=axis, implementation=implementation)
        results, pull = jax.vjp(f, x, scale, bias)
        return results, pull(cotangents)

    f = jax.jit(jax.vmap(both, (in_axis, 0, 0, None)))
    results, gradients = f(xs, cotangents, scales, bias)
    options = {"features": (axis,), "variance": oracles.PHI_INV, "acc": "float32"}
    for i, (x, cts) in enumerate(examples):
        expected = oracles_norm.batch_norm(x, scales[i], bias, **options)
        pulled = oracles_norm.batch_norm_vjp(x, *cts, scales[i], **options)
        for got, estimate in zip((*results, *gradients), (*expected, *pulled), strict=True):
            oracles.assert_close(got[i], estimate)

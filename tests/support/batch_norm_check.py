"""golden_batch_norm beside its oracle, for the tests of its accuracy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_norm
import pytest

from syntonic_jax import golden_batch_norm, golden_batch_norm_inference

VARIANCES = {"golden": oracles.PHI_INV, "standard": 1.0}
LAYOUTS = [  # shape, feature axes
    ((9, 5), -1),
    ((4, 3, 2, 5), -1),
    ((4, 5, 3, 2), 1),
    ((3, 4, 2, 5), (3, 1)),
    ((7, 6), 0),
]
layouts = pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)


def features_of(axis) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


def channels_of(shape, axis) -> tuple[int, ...]:
    chosen = {a % len(shape) for a in features_of(axis)}
    return tuple(n for a, n in enumerate(shape) if a in chosen)


def check(
    implementation,
    x,
    cotangents,
    parameters,
    *,
    axis=-1,
    where=None,
    epsilon=1e-5,
    target_variance="golden",
    flush=True,
    only=(),
):
    """(y, mean, var) and all cotangents against the oracle; `only` these channels, if any."""
    dtype, out = x.dtype, cotangents[0].dtype
    acc = oracles.accumulation(dtype)
    given = {"x": x, **parameters}

    @jax.jit
    def both(given, cotangents):
        def call(given):
            return golden_batch_norm(
                **given,
                axis=axis,
                where=where,
                epsilon=epsilon,
                target_variance=target_variance,
                dtype=out,
                implementation=implementation,
            )

        results, pull = jax.vjp(call, given)
        return results, pull(cotangents)[0]

    results, gradients = both(given, cotangents)
    assert [r.dtype for r in results] == [out, acc, acc]
    for name, value in given.items():
        assert gradients[name].dtype == value.dtype

    options = {
        "features": features_of(axis),
        "epsilon": epsilon,
        "variance": VARIANCES.get(target_variance, target_variance),
        "where": where,
        "acc": acc,
    }
    expected = oracles_norm.batch_norm(
        x, parameters.get("scale"), parameters.get("bias"), **options
    )
    pulled = oracles_norm.batch_norm_vjp(x, *cotangents, parameters.get("scale"), **options)
    pairs = {name: (r, getattr(expected, name)) for r, name in zip(results, expected._fields)}
    pairs |= {f"cotangent of {name}": (gradients[name], getattr(pulled, name)) for name in given}
    for what, (actual, estimate) in pairs.items():
        if only:
            actual = actual[..., only]
            estimate = oracles.Estimate(*(e[..., only] for e in estimate))
        oracles.assert_close(actual, estimate, what, flush=flush)


def check_inference(
    implementation, x, statistics, parameters, *, axis=-1, epsilon=1e-5, dtype=None
):
    """y for mean and var, scale and bias: of one example, or each of a leading axis of them all."""
    f = functools.partial(
        golden_batch_norm_inference,
        axis=axis,
        epsilon=epsilon,
        dtype=dtype,
        implementation=implementation,
    )
    mapped = statistics[0].ndim - 1
    y = (jax.vmap(f) if mapped else f)(x, *statistics, *parameters)
    assert (y.dtype, y.shape) == (dtype or x.dtype, x.shape)

    channels = [1] * x.ndim
    channels[:mapped] = x.shape[:mapped]
    channels[axis % (x.ndim - mapped) + mapped] = -1
    mean, var, scale, bias = (
        oracles.real(numbers).reshape(channels) for numbers in (*statistics, *parameters)
    )
    slope = oracles.PHI_INV**0.5 * scale / np.sqrt(var + epsilon)
    numbers = oracles.real(x)
    # A root, a quotient, three products and two sums, of numbers no larger than these.
    size = np.abs(slope) * (np.abs(numbers) + np.abs(mean)) + np.abs(bias)
    slack = 8 * oracles.unit(oracles.accumulation(x.dtype)) * size
    oracles.assert_close(y, oracles.Estimate(slope * (numbers - mean) + bias, slack), flush=False)


def draw(rng, shape, axis, dtype, out=None, mean=0.0, deviation=1.0):
    """x and the cotangents of y, mean and var."""
    acc, channels = oracles.accumulation(dtype), channels_of(shape, axis)
    x = jnp.asarray(rng.normal(mean, deviation, size=shape), dtype)
    cotangents = jnp.asarray(rng.normal(size=shape), out or dtype)
    return x, (cotangents, *(jnp.asarray(c, acc) for c in rng.normal(size=(2, *channels))))


def draw_parameters(rng, shape, axis, dtype="float32", names=("scale", "bias")):
    return {name: jnp.asarray(rng.normal(size=channels_of(shape, axis)), dtype) for name in names}


# --- numbers at the ends of the range -------------------------------------------------------------


def ends_of_range(dtype) -> np.ndarray:
    """Channels [count, channels] whose sums or squares are infinite, or none.

    In whatever order: of both signs, numbers are small enough for sums of a hundred of them.
    """
    largest = float(oracles.info(dtype).max)
    pattern = np.array([1.0, -1.0, 0.25, 0.5, -0.75, 2.0, 0.0, 1.5])
    inf = np.inf
    infinite = [[inf], [-inf], [inf, -inf], [np.nan], [inf, inf], [1, 2, 3, inf], [1, 2, -inf]]
    channels = [np.concatenate([head, pattern[len(head) :]]) for head in infinite]
    channels += [largest * s * pattern for s in (1e-3, 1e-4)]  # squares
    channels += [np.full(8, s * largest) for s in (1, -1, 0.6)]  # sums
    channels += [largest / 128 * np.array([1, -1] * 4), pattern, 1e4 + pattern, np.full(8, 0.5)]
    return np.stack(channels, -1)


PARAMETERS = [  # scale, bias, target variance
    (1.0, 0.0, 1.0),
    (np.inf, 0.5, 1.0),
    (-np.inf, -0.5, 1.0),
    (0.0, 0.0, 1.0),
    (np.nan, 0.0, 1.0),
    (1.0, np.inf, 1.0),
    ("largest", 0.5, 16.0),
]


def plain(x, scale, bias, variance, statistics=None, epsilon=1e-5):
    """(y, mean, var) as the formula has them, one operation after the other, over all but the
    last axis."""
    wide = x.astype(oracles.accumulation(x.dtype))
    over = tuple(range(x.ndim - 1))
    mean, var = statistics or (wide.mean(over), jnp.square(wide - wide.mean(over)).mean(over))
    slope = np.sqrt(variance).item() / jnp.sqrt(var + epsilon) * scale
    return slope * (wide - mean) + bias, mean, var


def check_infinities(f, dtype, scale, bias, variance, copies=1):
    """f(x, scale, bias) with the entries that the formula has, infinite, none or finite."""
    acc = oracles.accumulation(dtype)
    x = jnp.tile(jnp.asarray(ends_of_range(dtype), dtype), (copies, 1))
    scale = float(oracles.info(acc).max) / 2 if scale == "largest" else scale
    scale, bias = (jnp.full(x.shape[-1], v, acc) for v in (scale, bias))
    expected = [oracles.real(e) for e in plain(x, scale, bias, variance)]
    got = [oracles.real(g.astype(acc)) for g in f(x, scale, bias)]
    # Two roundings an element of what is summed, which is no larger than this.
    slack = 4 * len(x) * oracles.unit(acc) * (1 + np.abs(oracles.real(x)).max(0, initial=0))
    for g, e, name in zip(got, expected, ("y", "mean", "var")):
        np.testing.assert_array_equal(np.isnan(g), np.isnan(e), name)
        np.testing.assert_array_equal(np.isinf(g), np.isinf(e), name)
        np.testing.assert_array_equal(g[np.isinf(e)], e[np.isinf(e)], name)
    finite = np.isfinite(expected[1])
    assert (np.abs(got[1][finite] - expected[1][finite]) <= slack[finite]).all()

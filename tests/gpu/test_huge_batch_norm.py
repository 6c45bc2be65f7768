"""golden_batch_norm of more than 2**31 elements."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from syntonic_jax import golden_batch_norm

pytestmark = pytest.mark.gpu

# Shape, feature axis, and how much of the first axis is added up at a time in float64.
HUGE = {"last": ((2_147_500, 1000), -1, 2500), "first": ((43_000, 1000, 50), 1, 100)}
HEAVY = 5  # examples at the end that weigh more than all others


@functools.partial(jax.jit, static_argnums=(0, 1))
def sums(step, f, arrays, *statistics):
    """Of f over all axes but the second, in float64, `step` entries of the first at a time."""
    shape = arrays[0].shape

    def add(i, total):
        parts = [jax.lax.dynamic_slice_in_dim(a, i * step, step) for a in arrays]
        values = f(*(part.astype("float64") for part in parts), *statistics)
        return total + values.sum((0, *range(2, len(shape))))

    return jax.lax.fori_loop(0, shape[0] // step, add, jnp.zeros(shape[1], "float64"))


def along_second(statistic, like):
    return statistic.reshape(1, -1, *(1,) * (like.ndim - 2))


def itself(x):
    return x


def squared_difference(x, mean):
    return (x - along_second(mean, x)) ** 2


def normalised(x, mean, rstd):
    return (x.astype("float64") - along_second(mean, x)) * along_second(rstd, x)


def with_normalised(ct, x, mean, rstd):
    return ct * normalised(x, mean, rstd)


@pytest.mark.slow
@pytest.mark.parametrize("layout", HUGE)
def test_more_than_2_to_the_31_elements(layout, x64):
    """Every element counts, the last as the first, and lands in its place.

    The last examples weigh so much that without them the variance would be 1 and not over 3. A
    kernel adds some thousand terms in one accumulator, and what these leave in a tree: an error
    below 4096 u of the terms' size.
    """
    shape, axis, step = HUGE[layout]
    count = np.prod(shape) // shape[1]
    high = 1.5 * (shape[0] / HEAVY) ** 0.5

    @jax.jit
    def draw(key):
        return jax.random.normal(key, shape, jnp.bfloat16).at[-HEAVY:].add(high)

    x, ct = map(draw, jax.random.split(jax.random.key(0)))
    scale, bias = (jnp.linspace(a, b, shape[1], dtype="float32") for a, b in ((0.5, 2), (-1, 1)))
    mean = sums(step, itself, (x,)) / count
    var = sums(step, squared_difference, (x,), mean) / count
    assert np.all(var > 3 * 0.9)
    rstd = 1 / np.sqrt(var + 1e-5)
    plain = sums(step, itself, (ct,))
    along = sums(step, with_normalised, (ct, x), mean, rstd)

    @jax.jit
    def forward_and_backward(x, ct, scale, bias):
        def f(x, scale, bias):
            y, mean, var = golden_batch_norm(x, scale, bias, axis=axis, implementation="cuda")
            return y, (mean, var)

        y, pull, statistics = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, statistics, pull(ct)

    y, found, (d_x, d_scale, d_bias) = forward_and_backward(x, ct, scale, bias)
    tolerance, root = 4096 * oracles.unit("float32"), oracles.PHI_INV**0.5
    np.testing.assert_allclose(found[0], mean, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found[1], var, rtol=tolerance)
    # Sums of so many terms, of size 1 and 3 on average.
    np.testing.assert_allclose(d_bias, plain, rtol=0, atol=tolerance * count)
    np.testing.assert_allclose(d_scale, root * along, rtol=0, atol=3 * tolerance * count)

    factor = along_second(root * scale.astype("float64"), x)
    for start in (0, shape[0] // 2 - HEAVY, shape[0] - 2 * HEAVY):
        part = slice(start, start + 2 * HEAVY)
        xhat = normalised(x[part], mean, rstd)
        assert_part(y[part], factor * xhat + along_second(bias, x), tolerance)
        across = (along_second(plain, x) + xhat * along_second(along, x)) / count
        exact = along_second(rstd, x) * factor * (ct[part].astype("float64") - across)
        assert_part(d_x[part], exact, tolerance)


def assert_part(actual, exact, tolerance):
    """One rounding to bfloat16, of numbers that err by a few times the tolerance."""
    exact = oracles.real(exact)
    oracles.assert_close(actual, oracles.Estimate(exact, 4 * tolerance * (1 + np.abs(exact))))

"""The layer norm of rows of any finite numbers is that of exponents without bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from layernorm_check import any_range, estimates_of_any_range, value_and_cotangents

from syntonic_jax import golden_layer_norm, phi_residual_layernorm

EPSILONS = [1e-5, 0.0]


def golden_and_cotangents(operands, cotangents, implementation, epsilon):
    def f(x, scale, bias):
        return golden_layer_norm(
            *(x, scale, bias),
            target_variance="standard",
            epsilon=epsilon,
            implementation=implementation,
        )

    rows, _, scale, bias = operands
    y, pull = jax.vjp(f, rows, scale, bias)
    return y, pull(cotangents[0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("epsilon", EPSILONS)
class TestAnyRange:
    def test_golden_layer_norm(self, epsilon, dtype, implementation, rng):
        operands, cotangents = any_range(rng, 24, dtype)
        exact = estimates_of_any_range(operands, cotangents, epsilon)
        y, (dx, d_scale, d_bias) = golden_and_cotangents(
            operands, cotangents, implementation, epsilon
        )
        found = {"y": y, "d_identity": dx, "d_scale": d_scale, "d_bias": d_bias}
        for name, actual in found.items():
            oracles.assert_close(actual, exact[name], name)

    def test_phi_residual_layernorm(self, epsilon, dtype, implementation, rng):
        operands, cotangents = any_range(rng, 24, dtype)
        exact = estimates_of_any_range(operands, cotangents, epsilon)
        (y, z), pulled = value_and_cotangents(
            operands, cotangents, implementation, (("epsilon", epsilon),)
        )
        np.testing.assert_array_equal(oracles.real(z), oracles.real(operands[0]))
        for (name, estimate), actual in zip(exact.items(), (y, *pulled), strict=True):
            oracles.assert_close(actual, estimate, name)

    def test_forward_mode(self, epsilon, dtype, rng):
        """Which is jnp: the tangent along the row itself, of which y does not change, and another.

        Without an epsilon y is the same for the multiple of a row, so that its tangent is zero.
        """
        (rows, *_), (along, _) = any_range(rng, 24, dtype)
        size = jnp.max(jnp.abs(rows), -1, keepdims=True)
        directions = [rows / 32, (size / 64 * jnp.tanh(along)).astype(dtype)]

        def f(x):
            return golden_layer_norm(x, epsilon=epsilon, target_variance="standard")

        acc = oracles.accumulation(dtype)
        exponents = np.frexp(np.maximum(oracles.real(size), np.sqrt(epsilon)))[1]
        z = oracles.exactly(np.ldexp(oracles.real(rows), -exponents))
        stats = oracles.row_statistics(z, np.ldexp(epsilon, -2 * exponents), acc)
        for direction in directions:
            _, dy = jax.jvp(f, (rows,), (direction,))
            dz = np.ldexp(oracles.real(direction), -exponents)
            mean, inner = (v.mean(-1, keepdims=True) for v in (dz, stats.xhat * dz))
            expected = stats.rstd * (dz - mean - stats.xhat * inner)
            # Each of the three terms errs by a sum of n and by xhat's error.
            terms = np.abs(dz) + np.abs(dz).mean(-1, keepdims=True)
            terms = terms + np.abs(stats.xhat) * np.abs(stats.xhat * dz).mean(-1, keepdims=True)
            slack = stats.rstd * terms * (oracles.STEPS + 24) * oracles.unit(acc)
            reach = np.abs(dz).mean(-1, keepdims=True) * (1 + np.abs(stats.xhat))
            slack = slack + stats.rstd * reach * stats.xhat_slack.max(-1, keepdims=True) * 2
            slack = slack + np.abs(expected) * stats.rstd_relative
            # What is flushed before the slope multiplies it, and after.
            tiny = float(oracles.info(acc).smallest_normal)
            slack = slack + 4 * tiny * (1 + np.ldexp(stats.rstd, -exponents))
            oracles.assert_close(dy, oracles.Estimate(expected, slack), "tangent of y")


def test_the_row_of_the_issue(implementation):
    x = jnp.array([[1e30, 2e30, 3e30, 4e30]], "float32")
    y, pull = jax.vjp(lambda x: golden_layer_norm(x, implementation=implementation), x)
    np.testing.assert_allclose(y[0], [-1.0547, -0.3516, 0.3516, 1.0547], atol=1e-4)
    # Of the size 1e-30, and zero along the row and along ones.
    (dx,) = pull(jnp.array([[1.0, 0.0, 0.0, 0.0]]))
    assert np.all(np.isfinite(dx))
    assert np.any(dx != 0)
    residual = jnp.zeros_like(x)
    y = phi_residual_layernorm(x, residual, implementation=implementation)
    np.testing.assert_allclose(y[0], [-1.3416, -0.4472, 0.4472, 1.3416], atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1.0, 3e4, 1e30, 3e38])
def test_equal_numbers_of_any_size(size, implementation):
    """They have no deviation: y is the bias, and the gradient that of ε alone."""
    x = jnp.full((2, 48), size, "float32")
    ct = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), "float32")
    bias = jnp.linspace(-1, 1, 48)

    def f(x):
        return golden_layer_norm(
            x, None, bias, target_variance="standard", implementation=implementation
        )

    y, pull = jax.vjp(f, x)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    (dx,) = pull(ct)
    expected = oracles.real(ct - ct.mean(-1, keepdims=True)) / np.sqrt(1e-5)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf])
def test_an_infinite_scale_gives_infinities(value, implementation):
    """scale · x̂ + bias, as the formula has it: infinite where x̂ is not 0."""
    x = jnp.array([[-1.0, 0.5, 0.25, 2.0]], "float32")
    scale = jnp.array([value, 1.0, value, value])
    y = golden_layer_norm(x, scale, jnp.zeros(4), implementation=implementation)
    assert np.all(np.isinf(y[0, [0, 2, 3]]))
    signs = np.sign(np.asarray(x - x.mean()))[0] * np.sign(np.asarray(scale))
    np.testing.assert_array_equal(np.sign(y[0]), signs)


def test_a_large_slope_keeps_y_finite(implementation):
    """scale · √t / deviation may be beyond the range where scale · √t · x̂ is not."""
    x = jnp.array([[1.0, 2.0, 3.0, 4.0]], "float32") * 1e-20
    scale = jnp.full(4, 1e30, "float32")
    y = golden_layer_norm(x, scale, epsilon=0.0, target_variance=4.0, implementation=implementation)
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25) * 2e30
    np.testing.assert_allclose(y[0], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_subnormal_and_zero_rows(dtype, implementation, x64):
    """Numbers below the normal range keep their small y, or are flushed, as XLA:CPU does."""
    tiny = float(oracles.info(dtype).smallest_normal)
    pattern = np.array([1.0, -1.0, 0.25, 0.5])
    x = jnp.asarray(np.stack([tiny / 2 * pattern, 0 * pattern]), dtype)
    exact = oracles.layernorm(oracles.exactly(x), acc=oracles.accumulation(dtype)).value
    for y in (
        golden_layer_norm(x, target_variance="standard", implementation=implementation),
        phi_residual_layernorm(x, jnp.zeros_like(x), implementation=implementation),
    ):
        y = oracles.real(y)
        if np.any(y[0] != 0):
            np.testing.assert_allclose(y[0], exact[0], rtol=8 * float(oracles.info(dtype).eps))
        assert np.all(y[1] == 0)


def test_an_epsilon_below_the_normal_numbers():
    """A CPU takes it for 0: equal numbers have the norm 0 all the same, and small ones theirs."""
    f = functools.partial(golden_layer_norm, implementation="xla")
    for epsilon in (1e-38, 1e-40, 1e-45):
        np.testing.assert_array_equal(f(jnp.ones((1, 3), "float32"), epsilon=epsilon), 0)
    y = f(jnp.asarray([[1e-20, 2e-20, 3e-20]], "float32"), epsilon=1e-38)
    np.testing.assert_allclose(y[0], [-0.0783544, 0, 0.0783544], rtol=1e-5, atol=1e-7)


def test_a_wide_row_with_one_number_far_off():
    """Its mean and deviation are far from the end of the range; their distance from it is not."""
    x = jnp.full((1, 8192), -(2.0**118), "float32").at[0, 0].set(3.4e38)
    f = functools.partial(golden_layer_norm, implementation="xla")
    y, pull = jax.vjp(f, x, jnp.ones(8192))
    dx, d_scale = pull(jnp.ones_like(y))
    np.testing.assert_allclose(d_scale, y[0], rtol=1e-6)
    assert np.isfinite(dx).all()

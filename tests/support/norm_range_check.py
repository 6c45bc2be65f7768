"""residual_component_norm where squares are out of range, for the tests of its kernels too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from syntonic_jax import PHI_INV, residual_component_norm

# Of the accumulation type: of each a square, or the sum of them, is out of its range, but no norm.
WIDE = {  # and how often
    "float32": [
        ([1e30, -2e30, 3e30], 1),
        ([1e-30, -2e-30, 3e-30], 1),
        ([2e38], 3),
        ([2e-38, 3e-38], 1),
        ([1e19], 1000),
        ([1e-19], 1000),
        ([1e-23], 1000),
        ([1e30, 1.0, 1e-30, 0.0], 1),
        ([1e18, 3e17], 5),
        ([1e-18, 3e-19, 1e-30], 5),
        ([1e-8, 1e-26], 1000),
        ([2e19, 1e-5], 2000),
    ],
    "float64": [
        ([1e200, -2e200, 3e200], 1),
        ([1e-200, -2e-200, 3e-200], 1),
        ([1e308], 2),
        ([1e-307], 3),
        ([1e154], 1000),
        ([1e-162], 1000),
        ([1e200, 1.0, 1e-200, 0.0], 1),
        ([1e-140, 1e-150], 5),
    ],
    "float16": [([6e4], 1000), ([6e-5], 3), ([2e-7], 1000)],
}
WIDE["bfloat16"] = WIDE["float32"]
CASES = [(dtype, *case) for dtype, cases in WIDE.items() for case in cases]


def numbers(dtype, values, count):
    return jnp.asarray(np.tile(values, count), dtype)


def exact(x):
    """‖x‖ and x / ‖x‖: NumPy's long double has squares for every float64."""
    x = np.asarray(oracles.real(x), np.longdouble)
    norm = np.sqrt(np.sum(np.square(x)))
    return norm, (x / norm).astype(np.float64)


def relative(x, acc):
    """n squares and sums, halved by the root, and some products: as of any other norm."""
    return (x.size / 2 + oracles.STEPS) * oracles.unit(acc)


def check_norm(dtype, values, count, mode, implementation):
    """The norm, its gradient, and its derivative along the numbers themselves."""
    acc, x = oracles.accumulation(dtype), numbers(dtype, values, count)
    f = functools.partial(residual_component_norm, mode=mode, implementation=implementation)
    c = {"phi": PHI_INV, "standard": 1.0}[mode]
    norm, slope = exact(x)
    if c * norm > float(oracles.info(acc).max):
        c = np.inf  # and the norm is infinite
    estimate = oracles.Estimate(np.float64(c * norm), np.float64(c * norm * relative(x, acc)))
    oracles.assert_close(f(x), estimate)
    if np.isinf(c):
        return
    bound = oracles.Estimate(c * slope, np.abs(c * slope) * relative(x, acc))
    oracles.assert_close(jax.grad(f)(x), bound, "gradient", flush=True)
    # The norm grows along itself as it is; terms of this sum below the normal range are dropped.
    dropped = estimate.slack + x.size * float(oracles.info(acc).smallest_normal)
    along = oracles.Estimate(estimate.value, dropped)
    oracles.assert_close(jax.jvp(f, (x,), (x,))[1], along, "along itself")

"""Elementwise operations at the ends of the range, for the tests of their kernels too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from syntonic_jax import PHI, golden_gelu, phi_residual, phi_residual_layernorm

INF, NAN = np.inf, np.nan
# Identity and residual, in units of the greatest number of the type.
SUMS = [
    (1, 0.5), (1, 0.25), (-1, -0.5), (0.9, 0.6), (0.6, 0.9), (1, 1), (-1, -1), (0.5, 0.49),
    (1, -1), (-0.7, 0.7), (0.3, -0.2), (1e-3, 2e-3), (0, 0),
    (INF, 1), (1, -INF), (INF, INF), (INF, -INF), (NAN, 1), (1, NAN),
]  # fmt: skip


def check_sums(dtype, mode, implementation):
    """The golden sum is what an unbounded exponent would give, rounded; and so is its tangent."""
    acc, largest = oracles.accumulation(dtype), float(oracles.info(dtype).max)
    i, r = (jnp.asarray([pair[k] * largest for pair in SUMS], dtype) for k in range(2))
    s, c = oracles.MODES[mode]
    wide = np.longdouble  # has room for the sum of any two float64s
    identity, residual = oracles.real(i).astype(wide), oracles.real(r).astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        z = wide(s) * (identity + wide(c) * residual)
        over = np.abs(z) >= wide(largest) * (1 + wide(oracles.unit(dtype)))
        z = np.where(over, np.sign(z) * INF, z).astype(np.float64)
        finite = np.isfinite(z)
        slack = 4 * oracles.unit(acc) * s * (np.abs(identity) + c * np.abs(residual))
    estimate = oracles.Estimate(z, np.where(finite, slack, 0).astype(np.float64))

    @jax.jit
    def run(i, r):
        f = functools.partial(phi_residual, mode=mode, implementation=implementation)
        rows = functools.partial(phi_residual_layernorm, mode=mode, implementation=implementation)
        z = rows(i[:, None], r[:, None], return_sum=True)[1][:, 0]
        return (*jax.jvp(f, (i, r), (i, r)), z)

    for found, what in zip(run(i, r), ("z", "along itself", "z of a layer norm"), strict=True):
        oracles.assert_close(found, estimate, f"{what}: {mode} of {dtype}")
        if c == 1:
            assert np.all(np.asarray(found)[(identity == -residual) & finite] == 0)


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "golden_gelu": lambda x: x * jax.nn.sigmoid(PHI * x),
}


def extremes(dtype):
    """Numbers whose squares or cubes overflow, and beyond."""
    largest = float(oracles.info(dtype).max)
    sizes = [largest, largest / 2, largest**0.5, 2 * largest**0.34, 2e3, 600.0]
    return jnp.asarray([*sizes, *(-x for x in sizes), INF, -INF, NAN], dtype)


def derivative(f, order):
    """Of a function of one number, for every number of an array."""
    for _ in range(order):
        f = jax.grad(f)
    return jax.jit(jax.vmap(f))


def check_activation(name, dtype, order, implementation):
    """Its limit wherever x is a number, and NaN where that is the plain formula's."""
    x = extremes(dtype)
    f = functools.partial(phi_residual, activation=name, implementation=implementation)
    forms = [lambda x: f(x, jnp.zeros_like(x))]
    if name == "golden_gelu":
        forms.append(functools.partial(golden_gelu, implementation=implementation))
    positive = oracles.real(x) > 0
    limit = np.where(positive, [oracles.real(x), np.ones(x.size), np.zeros(x.size)][order], 0)
    formula = oracles.real(derivative(ACTIVATIONS[name], order)(x))
    expected = np.where(np.isfinite(x), limit, formula)
    for form in forms:
        np.testing.assert_array_equal(oracles.real(derivative(form, order)(x)), expected)


def check_stores(implementation):
    """What a 16-bit type does not hold is infinite, from half a unit beyond its greatest number."""
    for dtype in ("float16", "bfloat16"):
        info = oracles.info(dtype)
        largest = float(info.max)
        half = largest * float(info.eps) / (2 - float(info.eps)) / 2  # of a unit in the last place
        x = jnp.asarray([largest, largest + 0.99 * half, largest + 1.01 * half], "float32")
        x = jnp.concatenate([x, -x])
        expected = oracles.real(x.astype(dtype))
        assert list(np.isinf(expected)) == [False, False, True] * 2
        options = {"dtype": dtype, "implementation": implementation}
        y = phi_residual(x, jnp.zeros_like(x), **options)
        np.testing.assert_array_equal(oracles.real(y), expected)
        y = golden_gelu(x, **options)
        np.testing.assert_array_equal(oracles.real(y), np.where(expected > 0, expected, 0))

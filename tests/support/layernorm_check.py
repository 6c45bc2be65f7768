"""phi_residual_layernorm beside its oracle, for the tests of its kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from syntonic_jax import phi_residual_layernorm


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def value_and_cotangents(operands, cotangents, implementation, options=()):
    """(y, z) and the cotangents of all operands."""

    def f(identity, residual, scale, bias):
        return phi_residual_layernorm(
            *(identity, residual, scale, bias),
            return_sum=True,
            implementation=implementation,
            **dict(options),
        )

    results, pull = jax.vjp(f, *operands)
    return results, pull(cotangents)


def draw(rng, shape, dtype, mean=0.0):
    """Operands and the cotangents of y and z; parameters are float32, or float64 beside float64."""
    acc = oracles.accumulation(dtype)
    branch = [jnp.asarray(rng.normal(mean, size=shape), dtype) for _ in range(2)]
    parameters = [jnp.asarray(rng.normal(size=shape[-1]), acc) for _ in range(2)]
    cotangents = tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    return (*branch, *parameters), cotangents


def estimates(operands, cotangents, z, mode="phi", epsilon=1e-5):
    """Of (z, y) and the cotangents of all operands, by name, given the sum that was stored."""
    identity, residual, scale, bias = operands
    acc, stored = oracles.accumulation(identity.dtype), oracles.exactly(z)
    options = {"epsilon": epsilon, "acc": acc}
    pulled = oracles.layernorm_vjp(stored, *cotangents, scale, mode=mode, **options)
    return {
        "z": oracles.stored_sum(identity, residual, mode, identity.dtype),
        "y": oracles.layernorm(stored, scale, bias, **options),
    } | {f"d_{name}": estimate for name, estimate in pulled._asdict().items()}


def any_range(rng, width, dtype):
    """Operands and cotangents whose rows are of every size that the type has, one size a row."""
    limits = oracles.info(dtype)
    least, most = (np.frexp(float(v))[1] for v in (limits.smallest_normal, limits.max))
    # Of a row near the largest numbers no sum is in the range, of others no square, or nothing.
    exponents = np.unique(np.linspace(least + 20, most, 9).astype(int))
    rows = rng.uniform(-1, 1, size=(len(exponents), width))
    rows = rows / np.abs(rows).max(-1, keepdims=True) * (1 - float(limits.eps))
    rows = jnp.asarray(np.ldexp(rows, exponents[:, None]), dtype)
    (_, _, *parameters), _ = draw(rng, (1, width), dtype)
    # No gradient of z beside that of y, which would hide small ones.
    cotangents = (jnp.asarray(rng.normal(size=rows.shape), dtype), jnp.zeros_like(rows))
    return (rows, jnp.zeros_like(rows), *parameters), cotangents


def estimates_of_any_range(operands, cotangents, epsilon):
    """`estimates` of rows beside residuals of zero, in units in which no square leaves the range.

    Of y and the cotangents by name. What is below the normal range may be flushed to zero: each of
    two products and two sums, before what is stored.
    """
    rows, _, scale, bias = operands
    acc, x = oracles.accumulation(rows.dtype), oracles.real(rows)
    sizes = np.maximum(np.abs(x).max(-1, keepdims=True), np.sqrt(epsilon))
    exponents = np.frexp(sizes)[1]
    options = {"epsilon": np.ldexp(epsilon, -2 * exponents), "acc": acc}
    z = oracles.exactly(np.ldexp(x, -exponents))
    pulled = oracles.layernorm_vjp(z, *cotangents, scale, **options)
    found = {"y": oracles.layernorm(z, scale, bias, **options)}
    for name, (value, slack) in pulled._asdict().items():
        if name in ("identity", "residual"):
            value, slack = (np.ldexp(v, -exponents) for v in (value, slack))
        found[f"d_{name}"] = oracles.Estimate(value, slack)
    return {
        name: oracles.Estimate(value, slack + 4 * float(oracles.info(acc).smallest_normal))
        for name, (value, slack) in found.items()
    }

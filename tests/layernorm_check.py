"""phi_residual_layernorm beside its oracle, for the tests of its kernels."""

import functools

import jax
import jax.numpy as jnp
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

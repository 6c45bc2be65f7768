"""The RMS norms beside their oracle, for the tests of their kernels too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_rms

from syntonic_jax import golden_rms_norm, phi_residual_rmsnorm

VARIANCES = {"golden": oracles.PHI_INV, "standard": 1.0}


def check(implementation, x, ct, scale=None, **options):
    """y and both cotangents of rows against the oracle."""

    @jax.jit
    def both(x, scale, ct):
        def call(x, scale):
            return golden_rms_norm(
                x, scale, **options, dtype=ct.dtype, implementation=implementation
            )

        y, pull = jax.vjp(call, x, scale)
        return y, *pull(ct)

    y, dx, d_scale = both(x, scale, ct)
    assert (y.dtype, dx.dtype) == (ct.dtype, x.dtype)
    target = options.get("target_variance", "golden")
    given = {
        "epsilon": options.get("epsilon", 1e-6),
        "offset": options.get("scale_offset", 0.0),
        "variance": VARIANCES.get(target, target),
        "acc": oracles.accumulation(x.dtype),
    }
    oracles.assert_close(y, oracles_rms.rms_norm(x, scale, **given), "y", flush=True)
    pulled = oracles_rms.rms_norm_vjp(x, ct, None, scale, **given)
    oracles.assert_close(dx, pulled["identity"], "cotangent of x", flush=True)
    if scale is not None:
        assert d_scale.dtype == scale.dtype
        oracles.assert_close(d_scale, pulled["scale"], "cotangent of scale", flush=True)


def draw(rng, shape, dtype, out=None, mean=0.0):
    x = jnp.asarray(rng.normal(mean, size=shape), dtype)
    ct = jnp.asarray(rng.normal(size=shape), out or dtype)
    return x, ct, jnp.asarray(rng.normal(size=shape[-1]), oracles.accumulation(dtype))


def check_any_range(implementation, width, dtype, rng):
    """Rows whose squares leave the range have the y of those that do not; so have gradients."""
    limits = oracles.info(dtype)
    least, most = (np.frexp(float(v))[1] for v in (limits.smallest_normal, limits.max))
    rows = rng.uniform(-1, 1, size=(1, width))
    rows = np.asarray(jnp.asarray(rows / np.abs(rows).max() * 0.99, dtype), "float64")
    ct = jnp.asarray(rng.normal(size=rows.shape), dtype)
    acc = oracles.accumulation(dtype)
    for exponent in np.linspace(least + 20, most, 7).astype(int):
        x = jnp.asarray(np.ldexp(rows, exponent), dtype)
        f = functools.partial(golden_rms_norm, epsilon=0.0, implementation=implementation)
        y, pull = jax.vjp(f, x)
        given = {"epsilon": 0.0, "variance": oracles.PHI_INV, "acc": acc}
        z = np.ldexp(oracles.real(x), -exponent)
        oracles.assert_close(y, oracles_rms.rms_norm(z, **given), f"y at 2**{exponent}")
        value, slack = oracles_rms.rms_norm_vjp(z, ct, **given)["identity"]
        scaled = oracles.Estimate(
            np.ldexp(value, -exponent),
            np.ldexp(slack, -exponent) + 4 * float(oracles.info(acc).smallest_normal),
        )
        oracles.assert_close(*pull(ct), scaled, f"gradient at 2**{exponent}", flush=True)


def check_residual(implementation, shape, dtype, mode, rng):
    """y, the sum and all cotangents of phi_residual_rmsnorm against the oracle."""
    x, ct, scale = draw(rng, shape, dtype)
    residual, ct_z, _ = draw(rng, shape, dtype)

    @jax.jit
    def both(x, residual, scale, ct, ct_z):
        def call(x, residual, scale):
            return phi_residual_rmsnorm(
                x, residual, scale, mode=mode, return_sum=True, implementation=implementation
            )

        results, pull = jax.vjp(call, x, residual, scale)
        return results, pull((ct, ct_z))

    (y, z), gradients = both(x, residual, scale, ct, ct_z)
    given = {"acc": oracles.accumulation(dtype)}
    oracles.assert_close(z, oracles.stored_sum(x, residual, mode, dtype), "z", flush=True)
    oracles.assert_close(y, oracles_rms.rms_norm(z, scale, **given), "y", flush=True)
    pulled = oracles_rms.rms_norm_vjp(z, ct, ct_z, scale, mode=mode, **given)
    for (name, estimate), actual in zip(pulled.items(), gradients, strict=True):
        oracles.assert_close(actual, estimate, f"cotangent of {name}", flush=True)

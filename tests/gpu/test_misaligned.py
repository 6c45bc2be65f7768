"""Pointers that no vector access allows: XLA may hand a call a slice of a larger buffer."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def shifted_targets():
    """The calls of the build whose kernels get pointers that are off by one element."""
    module = importlib.import_module("syntonic_jax._kernels_shifted")
    for name, stages in module.registrations().items():
        jax.ffi.register_ffi_target(f"{name}_shifted", stages, platform="CUDA")


def padded(array):
    """One more row; the data begin at the second element."""
    flat = jnp.zeros(((array.shape[0] + 1) * int(np.prod(array.shape[1:]))), array.dtype)
    flat = flat.at[1 : 1 + array.size].set(array.reshape(-1))
    return flat.reshape(array.shape[0] + 1, *array.shape[1:])


def unpadded(array, shape):
    return array.reshape(-1)[1 : 1 + int(np.prod(shape))].reshape(shape)


def shifted(name, names, operands, results, /, **attributes):
    """One call with pointers that are off by one element; results are (shape, dtype).

    `names` are those of the operands and of the results: "x scale -> y".
    """
    longer = [jax.ShapeDtypeStruct((shape[0] + 1, *shape[1:]), dtype) for shape, dtype in results]
    attributes = {
        k: np.float64(v) if isinstance(v, float) else np.int32(v) for k, v in attributes.items()
    }
    attributes |= dict(zip(("operands", "results"), names.split(" -> "), strict=True))
    call = jax.ffi.ffi_call(f"{name}_shifted", longer)
    out = jax.jit(lambda *arrays: call(*arrays, **attributes))(*map(padded, operands))
    return [unpadded(array, shape) for array, (shape, _) in zip(out, results)]


SANITIZED = functools.partial(pytest.param, marks=pytest.mark.sanitize)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", [7, 768, SANITIZED(1000), 8192, 40000, SANITIZED(140000)])
def test_misaligned_layernorm(width, dtype, rng, x64, shifted_targets):
    rows, acc = 5, oracles.accumulation(dtype)
    x, r, ct_y, ct_z = (jnp.asarray(rng.normal(size=(rows, width)), dtype) for _ in range(4))
    scale, bias = (jnp.asarray(rng.normal(size=(1, width)), acc) for _ in range(2))
    like = ((rows, width), dtype)
    y, z, statistics = shifted(
        "syntonic_phi_residual_layernorm",
        "identity residual scale bias -> y z statistics",
        (x, r, scale, bias),
        (like, like, ((rows, 3), acc)),
        sum_scale=1.0,
        residual_scale=oracles.PHI_INV,
        epsilon=1e-5,
        scale_factor=1.0,
    )
    oracles.assert_close(z, oracles.stored_sum(x, r, "phi", dtype), "z")
    exact = oracles.layernorm(oracles.exactly(z), scale, bias, acc=acc)
    oracles.assert_close(y, exact, "y")
    parameter = ((1, width), acc)
    *found, _ = shifted(
        "syntonic_phi_residual_layernorm_cotangent",
        "z statistics scale ct_y ct_z -> d_identity d_residual d_scale d_bias scratch",
        (z, statistics, scale, ct_y, ct_z),
        (like, like, parameter, parameter, ((4 * width,), acc)),
        identity_scale=1.0,
        residual_scale=oracles.PHI_INV,
        scale_factor=1.0,
    )
    exact = oracles.layernorm_vjp(oracles.exactly(z), ct_y, ct_z, scale, acc=acc)
    for (name, estimate), actual in zip(exact._asdict().items(), found):
        oracles.assert_close(actual.reshape(estimate.value.shape), estimate, name)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(
    "shape", [(9, 64, 1), SANITIZED((9, 33, 1)), (5, 6, 64), SANITIZED((5, 6, 49))]
)
def test_misaligned_channels(shape, dtype, rng, x64, shifted_targets):
    """Against sums in float64: the kernels' have a rounding for each number of a channel."""
    acc = oracles.accumulation(dtype)
    x, ct = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    exact, weight = oracles.real(x), oracles.real(ct)
    channels = shape[1]
    like = ((1, channels), acc)
    scale, bias = (jnp.asarray(rng.normal(size=(1, channels)), acc) for _ in range(2))
    mean, low, var, slope, shift, _ = shifted(
        "syntonic_golden_batch_norm_moments",
        "x scale bias -> mean low var slope shift scratch",
        (x, scale, bias),
        (like, like, like, like, like, ((64 * channels,), acc)),
        epsilon=1e-5,
        scale_factor=0.5,
    )
    expected = exact.mean((0, 2)), exact.var((0, 2))
    tolerance = 4 * exact[:, 0].size * oracles.unit(acc)
    found = oracles.real(mean) + oracles.real(low), oracles.real(var)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=tolerance)
    steepness = 0.5 * oracles.real(scale)[0] * (expected[1] + 1e-5) ** -0.5
    np.testing.assert_allclose(oracles.real(slope)[0], steepness, rtol=8 * tolerance)
    np.testing.assert_allclose(oracles.real(shift), oracles.real(bias), rtol=0, atol=tolerance)
    (y,) = shifted(
        "syntonic_golden_batch_norm_normalise",
        "x mean slope shift -> y",
        (x, mean, slope, shift),
        ((shape, x.dtype),),
    )
    a, b, m = (oracles.real(v)[0][:, None] for v in (slope, shift, mean))
    size = np.abs(a) * (np.abs(exact) + np.abs(m)) + np.abs(b)
    line = oracles.Estimate(a * (exact - m) + b, 4 * oracles.unit(acc) * size)
    oracles.assert_close(y, line, "y")
    total, product, _ = shifted(
        "syntonic_golden_batch_norm_sums",
        "x mean low ct -> sum product scratch",
        (x, mean, low, ct),
        (like, like, ((32 * channels,), acc)),
    )
    centred = exact - expected[0][:, None]
    size = np.abs(centred * weight).sum((0, 2)).max() + np.abs(weight).sum((0, 2)).max()
    for ours, theirs in ((total, weight), (product, centred * weight)):
        np.testing.assert_allclose(
            oracles.real(ours)[0], theirs.sum((0, 2)), rtol=0, atol=tolerance * size
        )


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_misaligned_elementwise(dtype, rng, x64, shifted_targets):
    acc = oracles.accumulation(dtype)
    x, r = (jnp.asarray(rng.normal(size=(3, 1000)), dtype) for _ in range(2))
    like = (x.shape, dtype)
    y, z = shifted(
        "syntonic_phi_residual",
        "identity residual -> y z",
        (x, r),
        (like, like),
        sum_scale=1.0,
        residual_scale=oracles.PHI_INV,
        activation=2,
    )
    oracles.assert_close(y, oracles.phi_residual(x, r, "phi", "gelu", acc=acc), "y")
    identity, residual = shifted(
        "syntonic_phi_residual_cotangent",
        "z ct_y -> d_identity d_residual",
        (z, r),
        (like, like),
        identity_scale=1.0,
        residual_scale=oracles.PHI_INV,
        activation=2,
    )
    exact = oracles.phi_residual_vjp(x, r, r, "phi", "gelu", acc=acc, stored=dtype)
    oracles.assert_close(identity, exact[0], "identity")
    oracles.assert_close(residual, exact[1], "residual")
    (y,) = shifted(
        "syntonic_phi_residual",
        "identity residual -> y",
        (x, r),
        (like,),
        sum_scale=1.0,
        residual_scale=oracles.PHI_INV,
        activation=0,
    )
    oracles.assert_close(y, oracles.phi_residual(x, r, "phi", acc=acc), "plain sum")
    identity, residual = shifted(
        "syntonic_phi_residual_cotangent",
        "ct_y -> d_identity d_residual",
        (r,),
        (like, like),
        identity_scale=1.0,
        residual_scale=oracles.PHI_INV,
        activation=0,
    )
    np.testing.assert_array_equal(np.asarray(identity), np.asarray(r))
    exact = oracles.phi_residual_vjp(x, r, r, "phi", acc=acc, stored=dtype)
    oracles.assert_close(residual, exact[1], "residual of a plain sum")
    (y,) = shifted("syntonic_golden_gelu", "x -> y", (x,), (like,))
    oracles.assert_close(y, oracles.golden_gelu(x, acc=acc), "golden_gelu")
    (dx,) = shifted("syntonic_golden_gelu_cotangent", "x ct_y -> d_x", (x, r), (like,))
    oracles.assert_close(dx, oracles.golden_gelu_vjp(x, r, acc=acc), "gradient of golden_gelu")
    (sums, _) = shifted(
        "syntonic_sum_of_squares", "x -> sums scratch", (x,), (((1, 3), acc), ((192,), acc))
    )
    norm = oracles.residual_component_norm(x, "standard", acc=acc)
    squared = oracles.Estimate(norm.value**2, 3 * norm.value * norm.slack)
    oracles.assert_close(sums[0, 1], squared, "sum of squares")
    np.testing.assert_array_equal(sums[0, ::2], 0)  # of what is too small or too large for it
    for parts in (1, 3):
        first, second = (jnp.asarray(rng.normal(size=parts), acc) for _ in range(2))
        (dx,) = shifted(
            "syntonic_sum_of_squares_cotangent", "x first second -> dx", (x, first, second), (like,)
        )
        factors = oracles.real(first) * oracles.real(second)
        slope = oracles.real(x).reshape(parts, -1) * factors[:, None]
        rounding = 2 * (oracles.unit(acc) + oracles.unit("float64"))  # two products there and here
        estimate = oracles.Estimate(slope, rounding * np.abs(slope))
        oracles.assert_close(dx.reshape(slope.shape), estimate, "gradient of the norm")

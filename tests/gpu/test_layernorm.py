"""The layer norm kernels against the float64 oracle and against XLA's result in the same type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from layernorm_check import any_range, draw, estimates, estimates_of_any_range, value_and_cotangents

from syntonic_jax import phi_residual_layernorm

pytestmark = pytest.mark.gpu

WIDTHS = (1, 7, 31, 32, 33, 200, 255, 768, 1000, 1024, 4096, 5000, 8192, 12288, 16384, 50257, 65536)
WIDEST = (131072, 262144, 600001)  # clusters at their limit, and rows read twice
TARGETS = {"bfloat16": "bfloat16", "float16": "float32", "float32": "bfloat16"}


def relative_error(actual, exact) -> float:
    return float(np.linalg.norm(oracles.real(actual) - exact) / np.linalg.norm(exact))


def check(operands, cotangents, dtype, mode="phi", epsilon=1e-5):
    """Within the oracle's bounds, and no further from it than XLA's result."""
    acc = oracles.accumulation(dtype)
    identity = operands[0]
    options = (("mode", mode), ("epsilon", epsilon))
    found = {}
    for implementation in ("cuda", "xla"):
        (y, z), grads = value_and_cotangents(operands, cotangents, implementation, options)
        exact = estimates(operands, cotangents, z, mode, epsilon)
        actual = dict(zip(exact, (z, y, *grads)))
        if implementation == "cuda":
            for name, estimate in exact.items():
                oracles.assert_close(actual[name], estimate, name)
        found[implementation] = {
            name: relative_error(actual[name], estimate.value)
            for name, estimate in exact.items()
            if np.any(estimate.value)
        }
    if identity.shape[-1] == 1:  # XLA simplifies what is left of such rows: x - x is 0
        return
    for name, error in found["cuda"].items():
        # Both round once, and which values lie near a tie is a matter of chance; so is what the
        # order of a sum leaves: along a row, where both add in parts, a rounding or two.
        noise = oracles.unit(np.asarray(actual[name]).dtype) / 4 + 2 * oracles.unit(acc)
        # Over few rows one worker adds after the other: n random numbers, whose k-th partial sum
        # is of size sqrt(k), leave u sqrt(n / 6) of theirs.
        if name in ("d_scale", "d_bias"):
            noise += (identity.shape[0] / 6) ** 0.5 * oracles.unit(acc)
        if acc == "float64":  # so do the sums of the oracle
            noise += (1 + identity.shape[-1] ** 0.5) * oracles.unit(acc)
        assert error <= 1.1 * found["xla"][name] + noise, (name, error, found["xla"][name])


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, dtype, rng, x64):
    rows = max(3, min(1000, 2**17 // width)) | 1  # odd: the last block is not full
    check(*draw(rng, (rows, width), dtype), dtype)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", WIDEST)
def test_widest(width, dtype, rng, x64):
    check(*draw(rng, (3, width), dtype), dtype)


@pytest.mark.parametrize("mode", oracles.MODES)
@pytest.mark.parametrize("width", [33, 1024, 16384])
def test_mean_far_above_deviation(width, mode, rng, x64):
    check(*draw(rng, (5, width), "float32", mean=1e4), "float32", mode)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", [33, 96, 4096])
def test_subnormal_rows_are_kept(width, dtype, rng, x64):
    """Neither z below the normal range, nor what is made of it, nor a gradient of its size."""
    acc, tiny = oracles.accumulation(dtype), float(oracles.info(dtype).smallest_normal)
    step = float(oracles.info(acc).smallest_subnormal)
    normal = [rng.normal(size=(5, width)) for _ in range(4)]
    x, r, ct_y, ct_z = (jnp.asarray(tiny / 8 * n, dtype) for n in normal)
    scale = jnp.asarray(rng.normal(size=width), acc)
    operands, cotangents = (x, r, scale, jnp.zeros_like(scale)), (ct_y, ct_z)
    (y, z), grads = value_and_cotangents(operands, cotangents, "cuda")
    exact = estimates(operands, cotangents, z)
    # Roundings that do not become smaller with the numbers: a few a step of the way, of which the
    # first are multiplied by the reciprocal of the deviation, 1 / sqrt(epsilon).
    steps = 16 * step / 1e-5**0.5 * float(jnp.max(1 + jnp.abs(scale)))
    for (name, estimate), actual in zip(exact.items(), (z, y, *grads), strict=True):
        slack = estimate.slack + (step if name == "z" else steps)
        if name in ("d_scale", "d_bias"):
            slack = slack + len(x) * steps
        oracles.assert_close(actual, oracles.Estimate(estimate.value, slack), name)
        if name not in ("d_scale",):  # the product of two subnormal numbers
            assert np.count_nonzero(oracles.real(actual)) > actual.size / 2, name


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
@pytest.mark.parametrize("width", [4, 33, 1000, 1033, 4096, 20001, 140000, 600000])
def test_rows_of_any_range(width, epsilon, dtype, rng, x64):
    operands, cotangents = any_range(rng, width, dtype)
    exact = estimates_of_any_range(operands, cotangents, epsilon)
    options = (("epsilon", epsilon),)
    (y, z), grads = value_and_cotangents(operands, cotangents, "cuda", options)
    np.testing.assert_array_equal(np.asarray(z), np.asarray(operands[0]))
    for (name, estimate), actual in zip(exact.items(), (y, *grads), strict=True):
        oracles.assert_close(actual, estimate, name)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        *((33, "float32"), (1024, "float32"), (131072, "float32")),
        *((1024, "bfloat16"), (33, "float16"), (1024, "float64")),
    ],
)
def test_poisoned_row_spoils_no_other(width, dtype, poison, rng, x64):
    operands, cotangents = draw(rng, (9, width), dtype)
    operands = (operands[0].at[4, width // 2].set(poison), *operands[1:])
    (y, _), grads = value_and_cotangents(operands, cotangents, "cuda")
    for rows in (y, *grads[:2]):
        finite = np.isfinite(rows).all(-1)
        assert not np.isfinite(rows[4]).any()
        assert finite.sum() == 8
    (_, _), expected = value_and_cotangents(operands, cotangents, "xla")
    for ours, theirs in zip(grads[2:], expected[2:]):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))


@functools.partial(jax.jit, static_argnums=(0, 1))
def typed_result(implementation, target, *operands):
    def f(*operands):
        return phi_residual_layernorm(*operands, dtype=target, implementation=implementation)

    y, pull = jax.vjp(f, *operands)
    return y, pull(y)


@pytest.mark.parametrize("width", [7, 96, 1000, 4096, 16384, 140001])
def test_types_of_y(width, rng):
    """y in another type than the data, forward and backward."""
    for dtype, target in TARGETS.items():
        operands, _ = draw(rng, (5, width), dtype)
        y, grads = typed_result("cuda", target, *operands)
        expected_y, expected = typed_result("xla", target, *operands)
        assert y.dtype == target
        tolerance = 4 * oracles.unit("bfloat16" if "bfloat16" in (dtype, target) else "float16")
        for ours, theirs in zip((y, *grads), (expected_y, *expected)):
            assert ours.dtype == theirs.dtype
            assert relative_error(ours, oracles.real(theirs)) < tolerance


@pytest.mark.parametrize("width", [31, 1024, 16384])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
def test_optional_operands_and_results(width, given, rng):
    """Every subset of scale and bias, and of the gradients that are asked for."""
    operands, (ct_y, _) = draw(rng, (9, width), "float32")
    branches, parameters = operands[:2], [p for p, g in zip(operands[2:], given) if g]
    names = [n for n, g in zip(("scale", "bias"), given) if g]

    def gradients(implementation, argnums):
        def loss(*operands):
            y = phi_residual_layernorm(
                *operands[:2],
                **dict(zip(names, operands[2:])),
                target_variance="golden",
                mode="phi_symmetric",
                implementation=implementation,
            )
            return jnp.sum(y * ct_y)

        return jax.jit(jax.grad(loss, argnums))(*branches, *parameters)

    count = 2 + len(parameters)
    for argnums in [tuple(range(count)), *((i,) for i in range(count)), (0, count - 1)]:
        for ours, theirs in zip(gradients("cuda", argnums), gradients("xla", argnums)):
            # The same sums in another order, in float32.
            assert relative_error(ours, oracles.real(theirs)) < 64 * oracles.unit("float32")


@pytest.mark.parametrize("width", [33, 768, 16384])
def test_batched_parameters(width, rng):
    """Groups: one scale an example, and per-example gradients of a shared bias."""
    operands, _ = draw(rng, (4, 6, width), "float32")
    scale = jnp.asarray(rng.normal(size=(4, width)), "float32")

    def loss(implementation, x, r, scale, bias):
        return jnp.sum(
            jnp.sin(phi_residual_layernorm(x, r, scale, bias, implementation=implementation))
        )

    def per_example(implementation):
        grad = jax.grad(functools.partial(loss, implementation), (0, 2, 3))
        batched = jax.vmap(grad, in_axes=(0, 0, 0, None))
        return jax.jit(batched)(*operands[:2], scale, operands[3])

    for ours, theirs in zip(per_example("cuda"), per_example("xla")):
        assert ours.shape == theirs.shape
        assert relative_error(ours, oracles.real(theirs)) < 64 * oracles.unit("float32")


@pytest.mark.parametrize("width", [96, 1000, 8192, 65536, 600001])
def test_same_bits_every_time(width, rng):
    """Twenty runs of forward and backward pass, the parameter gradients included."""
    operands, cotangents = draw(rng, (max(3, 2**21 // width), width), "bfloat16")
    first = value_and_cotangents(operands, cotangents, "cuda")
    for _ in range(20):
        again = value_and_cotangents(operands, cotangents, "cuda")
        jax.tree.map(np.testing.assert_array_equal, again, first)

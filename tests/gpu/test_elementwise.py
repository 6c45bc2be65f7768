"""The elementwise kernels and the sum of squares against the float64 oracle and XLA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from elementwise_range_check import ACTIVATIONS as FORMULAS
from elementwise_range_check import check_activation, check_stores, check_sums
from norm_range_check import CASES, check_norm

from syntonic_jax import golden_gelu, phi_residual, residual_component_norm

pytestmark = pytest.mark.gpu

ACTIVATIONS = (None, "relu", "gelu", "golden_gelu")
SHAPES = ((1,), (7, 33), (3, 4, 1000), (2**18 + 5,))
EXTREMES = (0.0, -0.0, 1e-40, -1e-40, 1e-3, 30.0, -30.0, 1e4, 1e30, -1e30, np.inf, -np.inf, np.nan)


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(f, options, operands):
    return jax.vjp(functools.partial(f, **dict(options)), *operands)


@jax.jit
def backward(pull, ct):
    return pull(ct)


def run(f, options, operands, ct):
    """In two programs, so that XLA too keeps in memory, and rounds, what it keeps."""
    y, pull = forward(f, options, operands)
    return y, backward(pull, ct.astype(y.dtype))


def both(f, operands, ct, **options):
    """Results and cotangents of the kernel and of XLA."""
    return [
        run(f, (*options.items(), ("implementation", implementation)), operands, ct)
        for implementation in ("cuda", "xla")
    ]


def assert_no_less_accurate(ours, theirs, estimate, dtype):
    """Than XLA, in the mean of a few thousand numbers; steps in another order round otherwise."""
    exact = estimate.value
    if exact.size < 1000:
        return
    errors = [np.linalg.norm(oracles.real(result) - exact) for result in (ours, theirs)]
    size = np.linalg.norm(exact)
    assert errors[0] <= 1.1 * errors[1] + 2 * oracles.unit(oracles.accumulation(dtype)) * size


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", oracles.MODES)
def test_phi_residual(mode, activation, dtype, rng, x64):
    acc = oracles.accumulation(dtype)
    for shape in SHAPES:
        identity, residual, ct = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
        (y, grads), (by_xla, grads_by_xla) = both(
            phi_residual, (identity, residual), ct, mode=mode, activation=activation
        )
        estimate = oracles.phi_residual(identity, residual, mode, activation, acc=acc)
        oracles.assert_close(y, estimate, "y")
        assert_no_less_accurate(y, by_xla, estimate, dtype)
        exact = oracles.phi_residual_vjp(
            identity, residual, ct, mode, activation, acc=acc, stored=dtype
        )
        for name, grad, theirs, estimate in zip(
            ("identity", "residual"), grads, grads_by_xla, exact, strict=True
        ):
            oracles.assert_close(grad, estimate, name)
            assert_no_less_accurate(grad, theirs, estimate, dtype)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_golden_gelu(dtype, rng, x64):
    acc = oracles.accumulation(dtype)
    for shape in SHAPES:
        x, ct = (jnp.asarray(rng.normal(0, 3, size=shape), dtype) for _ in range(2))
        (y, (dx,)), (by_xla, (dx_by_xla,)) = both(golden_gelu, (x,), ct)
        pulled = oracles.golden_gelu_vjp(x, ct, acc=acc)
        for ours, theirs, estimate, name in (
            (y, by_xla, oracles.golden_gelu(x, acc=acc), "y"),
            (dx, dx_by_xla, pulled, "dx"),
        ):
            oracles.assert_close(ours, estimate, name)
            assert_no_less_accurate(ours, theirs, estimate, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_extreme_values_as_in_jnp(dtype, activation):
    """Infinities and NaN where XLA has them, and finite values to a few units in the last place."""
    x = jnp.asarray(EXTREMES, dtype)
    pairs = jnp.repeat(x, x.size), jnp.tile(x, x.size)
    ours, theirs = both(phi_residual, pairs, jnp.ones_like(pairs[0]), activation=activation)
    tolerances = {"rtol": 8 * oracles.unit(dtype), "atol": 2.0**-126}
    np.testing.assert_allclose(oracles.real(ours[0]), oracles.real(theirs[0]), **tolerances)
    for a, b in zip(ours[1], theirs[1]):  # whose values depend on how z was rounded
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))

    operands = (x, jnp.zeros_like(x))
    ours, theirs = both(phi_residual, operands, jnp.ones_like(x), activation=activation)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        a, b = oracles.real(a), oracles.real(b)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        # XLA on a GPU may flush subnormal numbers in between, the kernels keep them.
        np.testing.assert_allclose(a, b, **tolerances)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_subnormal_numbers_are_kept(dtype, x64):
    """Nothing is replaced by 0 at any step, in results or gradients."""
    acc, tiny = oracles.accumulation(dtype), float(oracles.info(dtype).smallest_normal)
    step = float(oracles.info(acc).smallest_subnormal)

    def check(actual, estimate, what):
        """A few roundings, which do not become smaller with the numbers any more."""
        wider = oracles.Estimate(estimate.value, estimate.slack + 4 * step)
        oracles.assert_close(actual, wider, what)

    x = jnp.asarray(tiny * np.array([0.25, -0.5, 0.75, -0.875, 1.0, 3.0]), dtype)
    r = jnp.asarray(tiny * np.array([0.5, 0.25, -0.5, 0.5, -0.75, -0.25]), dtype)
    for mode, activation in itertools.product(oracles.MODES, ACTIVATIONS):
        options = {"mode": mode, "activation": activation, "implementation": "cuda"}
        y, grads = run(phi_residual, tuple(options.items()), (x, r), x)
        estimate = oracles.phi_residual(x, r, mode, activation, acc=acc)
        check(y, estimate, f"{mode} {activation}")
        exact = oracles.phi_residual_vjp(x, r, x, mode, activation, acc=acc, stored=dtype)
        for grad, estimate in zip(grads, exact):
            check(grad, estimate, f"gradient of {mode} {activation}")
    y, (dx,) = run(golden_gelu, (("implementation", "cuda"),), (x,), x)
    check(y, oracles.golden_gelu(x, acc=acc), "golden_gelu")
    check(dx, oracles.golden_gelu_vjp(x, x, acc=acc), "gradient of golden_gelu")


@pytest.mark.parametrize(
    ("dtype", "target"), [(d, t) for d in oracles.DTYPES for t in oracles.DTYPES]
)
def test_every_pair_of_types(dtype, target, rng, x64):
    identity, residual, ct = (jnp.asarray(rng.normal(size=1003), dtype) for _ in range(3))
    for activation in ACTIVATIONS:
        ours, theirs = both(
            phi_residual, (identity, residual), ct, activation=activation, dtype=target
        )
        assert ours[0].dtype == target
        # Two roundings to the coarser type, and the steps of both formulas.
        coarse = 4 * max(oracles.unit(dtype), oracles.unit(target))
        coarse += 2 * oracles.STEPS * oracles.unit(oracles.accumulation(dtype))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(oracles.real(a), oracles.real(b), rtol=coarse, atol=coarse)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_residual_component_norm(dtype, rng, x64):
    acc = oracles.accumulation(dtype)
    for shape in (*SHAPES, (2**22 + 1,)):
        x = jnp.asarray(rng.normal(size=shape), dtype)
        ct = jnp.asarray(rng.normal(), acc)
        (norm, (dx,)), (_, (expected,)) = both(residual_component_norm, (x,), ct)
        oracles.assert_close(norm, oracles.residual_component_norm(x, acc=acc))
        oracles.assert_close(dx, oracles.residual_component_norm_vjp(x, ct, acc=acc), flush=True)
        # Three roundings in each program, and norms that were summed up in different orders.
        np.testing.assert_allclose(
            oracles.real(dx),
            oracles.real(expected),
            rtol=4 * oracles.unit(dtype) + 12 * oracles.unit(acc),
            atol=oracles.ulp(0, dtype),  # below the normal range of float16
        )
    f = jax.value_and_grad(functools.partial(residual_component_norm, implementation="cuda"))
    for shape in ((5, 777), (3, 4096), (3, 4099), (600, 3)):  # whole packs, and not
        x = jnp.asarray(rng.normal(size=shape), dtype)
        for row, norm, dx in zip(x, *jax.jit(jax.vmap(f))(x)):
            oracles.assert_close(norm, oracles.residual_component_norm(row, acc=acc))
            exact = oracles.residual_component_norm_vjp(row, 1, acc=acc)
            oracles.assert_close(dx, exact, flush=True)


@pytest.mark.parametrize("implementation", ["cuda", "xla"])
@pytest.mark.parametrize(("dtype", "values", "count"), CASES)
def test_residual_component_norm_of_any_size(dtype, values, count, implementation, x64):
    check_norm(dtype, values, count, "phi", implementation)


@pytest.mark.parametrize("implementation", ["cuda", "xla"])
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_ends_of_the_range(dtype, implementation, x64):
    for mode in oracles.MODES:
        check_sums(dtype, mode, implementation)
    for name in FORMULAS:
        for order in range(3):
            check_activation(name, dtype, order, implementation)
    check_stores(implementation)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_same_bits_every_time(dtype, rng, x64):
    operands = tuple(jnp.asarray(rng.normal(size=2**20 + 3), dtype) for _ in range(2))
    cuda = (("implementation", "cuda"),)
    calls = [(phi_residual, (("activation", a), *cuda), operands) for a in ACTIVATIONS]
    calls += [(f, cuda, operands[:1]) for f in (golden_gelu, residual_component_norm)]
    for f, options, arguments in calls:
        ct = jnp.ones(()) if f is residual_component_norm else operands[1]
        first = run(f, options, arguments, ct)
        for _ in range(20):
            jax.tree.map(np.testing.assert_array_equal, run(f, options, arguments, ct), first)

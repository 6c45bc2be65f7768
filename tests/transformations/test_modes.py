"""Every operation in every type under jax's modes, in which it may do no more than in none."""

import contextlib
import functools
import inspect

import battery
import jax
import jax.numpy as jnp
import operations
import oracles
import pytest

import syntonic_jax
from syntonic_jax import _dispatch

OPERATIONS = operations.OPERATIONS


@contextlib.contextmanager
def every_mode():
    """What refuses promotion of types and ranks, NaN, and inner types that do not fit."""
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.enable_checks(True),
    ):
        yield


def run(operation, implementation, operands, **options):
    """Values, tangents and gradients, without arithmetic of the test that a mode would refuse."""
    f = operation.using(implementation, **options)
    values, pull = jax.vjp(f, *operands)
    return values, pull(values), jax.jvp(f, tuple(operands), tuple(operands))[1]


def assert_same(got, expected, dtype):
    """Up to roundings of the accumulation type, which may tip the one to the type itself."""
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        rounding = 64 * oracles.unit(oracles.accumulation(dtype)) + 2 * oracles.unit(e.dtype)
        battery.assert_same(g, e, rounding)


# float16 has ways of its own through the library, and 64-bit types are what must not come in.
CASES = [
    pytest.param(
        *(dtype, x64),
        id=f"{dtype}-{'x64' if x64 else 'x32'}",
        marks=[] if (dtype, x64) == ("float16", True) else pytest.mark.slow,
    )
    for dtype in oracles.DTYPES
    for x64 in (True, False)
    if x64 or dtype != "float64"
]


@pytest.mark.parametrize(("dtype", "x64"), CASES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.label)
def test_in_a_program(operation, dtype, x64, implementation, rng):
    """With parameters of the type and, in 16 bits, of float32, and results of another type."""
    options = {"dtype": "float32"} if operation.takes_dtype and not x64 else {}

    @jax.jit
    def program(*operands):
        return run(operation, implementation, operands, **options)

    with jax.enable_x64(x64):
        operands = operation.operands(rng, dtype)
        if not x64:
            operands = [
                x.astype(jnp.promote_types(x.dtype, "float32")) if kind != "rows" else x
                for x, kind in zip(operands, operation.kinds, strict=True)
            ]
        with every_mode(), jax.transfer_guard("disallow"):
            got = program(*operands)
        assert_same(got, program(*operands), dtype)


# Outside a program every operation in two cases, so that every case has operations of all kinds.
PAIRS = [
    pytest.param(
        operation,
        *CASES[(3 * i + j) % len(CASES)].values,
        id=f"{operation.label}-{CASES[(3 * i + j) % len(CASES)].id}",
        marks=[] if i % 3 == j == 0 else pytest.mark.slow,
    )
    for i, operation in enumerate(OPERATIONS)
    for j in range(2)
]


@pytest.mark.parametrize(("operation", "dtype", "x64"), PAIRS)
def test_eager(operation, dtype, x64, implementation, rng):
    with jax.enable_x64(x64):
        operands = operation.operands(rng, dtype)
        with every_mode():
            got = run(operation, implementation, operands)
        assert_same(got, run(operation, implementation, operands), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "dtype", "x64"), PAIRS)
def test_without_jit(operation, dtype, x64, implementation, rng):
    with jax.enable_x64(x64):
        operands = operation.operands(rng, dtype)
        with jax.disable_jit(), every_mode():
            got = run(operation, implementation, operands)
        assert_same(got, run(operation, implementation, operands), dtype)


def test_eager_calls_transfer_nothing(implementation):
    """Neither do their derivatives; what is given on the host is the caller's."""
    x, p = jnp.arange(12.0).reshape(3, 4), jnp.arange(1.0, 5.0)
    where, labels = x != 5, jnp.array([0, 1, 2])
    arrays = {"x": x, "identity": x, "residual": x}
    arrays |= dict.fromkeys(["mean", "var", "scale", "bias"], p)
    calls = {
        "golden_batch_norm": lambda f: f(x, p, p, where=where),
        "syntonic_softmax": lambda f: f(x, mode_norms=p, where=where),
        "syntonic_log_softmax": lambda f: f(x, syntony=x, where=where),
        "syntonic_cross_entropy": lambda f: f(x, labels, mode_norms=p),
    }
    for name in _dispatch.OPERATIONS - calls.keys() - {"output_statistics"}:
        names = inspect.signature(getattr(syntonic_jax, name)).parameters
        given = [arrays[n] for n in names if n in arrays]
        calls[name] = lambda f, given=given: f(*given)
    for name, call in calls.items():
        f = functools.partial(getattr(syntonic_jax, name), implementation=implementation)
        with jax.transfer_guard("disallow"):
            call(f)
            call(lambda first, *rest, f=f, **more: jax.vjp(lambda x: f(x, *rest, **more), first))
    with jax.transfer_guard("disallow"):
        syntonic_jax.output_statistics(x)

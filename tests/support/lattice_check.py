"""Comparison of floats with exact arithmetic, for the CPU and the GPU alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_lattice
from oracles_lattice import Fraction, Golden

from syntonic_jax import GoldenArray, ResonantTensor, phi_residual
from syntonic_jax.lattice import _crystallize

SIZE = 16  # elements of one comparison


def coefficients(x, precision, implementation):
    return _crystallize.coefficients("test", jnp.asarray(x), precision, implementation)


def assert_nearest(x, precision, a, b):
    for number, *point in zip(oracles.real(x), np.asarray(a), np.asarray(b), strict=True):
        expected = oracles_lattice.nearest(float(number), precision)
        assert tuple(map(int, point)) == expected, f"{number!r}, precision {precision}"


def check_every_precision(dtype, rng, most):
    """One program with a call of the handler for each: tracing as many searches takes minutes."""
    precisions = range(1, most + 1)
    numbers = [jnp.asarray(oracles_lattice.difficult(rng, p, dtype, 12)) for p in precisions]

    def of_handler(x, precision):
        integers = jax.ShapeDtypeStruct(x.shape, "int32")
        call = jax.ffi.ffi_call("syntonic_crystallize", (integers, integers))
        return call(x, precision=np.int32(precision), operands="x", results="a b")

    @jax.jit
    def search(numbers):
        return [of_handler(x, p) for p, x in zip(precisions, numbers)]

    for p, x, point in zip(precisions, numbers, search(numbers), strict=True):
        assert_nearest(x, p, *point)


@functools.partial(jax.jit, static_argnames=("mode", "activation", "implementation"))
def in_floats(identity, residual, mode, activation, implementation):
    return phi_residual(
        identity, residual, mode, activation=activation, implementation=implementation
    )


def check_phi_residual(coefficients, dtype, mode, activation, implementation):
    """The float operation on numbers of the lattice against the exact one.

    With u the relative error of a rounding in the accumulation type, the terms of the sum err by

    * how far the operands in floats are from the numbers of the lattice, which is measured,
    * 2u of residual/φ: the constant and the product ('phi'), or of z: the constant and the sum
      ('phi_symmetric'),
    * u of z where the result is of another type than the sum,

    and the result is rounded once more, to half a unit in its last place. relu moves nothing
    further away.
    """
    a, b, c, d = np.asarray(coefficients, "int32").reshape(4, -1)
    identity, residual = (ResonantTensor(GoldenArray(*ab)) for ab in ((a, b), (c, d)))
    exact = phi_residual(identity, residual, mode, activation=activation).lattice
    operands = [x.to_floats("float64").astype(dtype) for x in (identity, residual)]
    got = in_floats(*operands, mode, activation, implementation)
    assert got.dtype == dtype

    acc = oracles.accumulation(dtype)
    u = Fraction(oracles.unit(acc))
    inverse = oracles_lattice.PHI - 1
    numbers = [x.lattice for x in (identity, residual)]
    for i in range(len(a)):
        values = [Golden(int(x.a[i]), int(x.b[i])).value for x in (*numbers, exact)]
        given = [Fraction(float(x[i])) for x in operands]
        errors = [abs(f - v) for f, v in zip(given, values)]
        z = values[0] + values[1] * (inverse if mode == "phi" else 1)
        slack = errors[0] + errors[1] * (inverse if mode == "phi" else 1)
        slack += 2 * u * abs(given[1]) * inverse if mode == "phi" else 0
        if mode == "phi_symmetric":
            z *= inverse
            slack = slack * inverse + 2 * u * abs(z)
        slack += u * abs(z) if acc != dtype else 0
        slack *= 1 + 8 * u  # products of the errors above
        expected = values[2]
        relu = activation == "relu"
        # PHI is rounded, so that PHI² is not PHI + 1.
        assert abs(expected - (max(z, Fraction(0)) if relu else z)) < Fraction(1, 1 << 300)
        spacing = oracles.ulp(float(abs(z) + slack), dtype)
        error = abs(Fraction(float(got[i])) - expected)
        assert error <= slack + Fraction(float(spacing)) / 2, (
            f"{mode} {dtype}: {got[i]!r}, not {float(expected)!r}, of {numbers[0][i]} and "
            f"{numbers[1][i]}: off by {float(error):.3g}, allowed {float(slack):.3g} and half of "
            f"{float(spacing):.3g}"
        )

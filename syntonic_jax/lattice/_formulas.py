"""The operations of Z[φ] on coefficients, arrays of integers or `Wide` ones alike."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from ._overflow import Wide


def add(a, b, c, d):
    return a + c, b + d


def subtract(a, b, c, d):
    return a - c, b - d


def multiply(a, b, c, d):
    return a * c + b * d, a * d + b * c + b * d


def matmul(a, b, c, d):
    return a @ c + b @ d, a @ d + b @ c + b @ d


def negate(a, b):
    return -a, -b


def mul_phi(a, b):
    return b, a + b


def div_phi(a, b):
    return b - a, a


def conjugate(a, b):
    return a + b, -b


def norm(a, b):
    return (a * a + a * b - b * b,)


def trace(a, b):
    return (a + a + b,)


@functools.cache  # a static argument of jit: the same function for the same axes
def sum_over(axis, keepdims):
    def total(x):
        if isinstance(x, Wide):
            return x.sum(axis, keepdims)
        return jnp.sum(x, axis, dtype=x.dtype, keepdims=keepdims)  # else int32 would become int64

    def formula(a, b):
        return total(a), total(b)

    return formula


def power_of_phi(n: int) -> tuple[int, int]:
    """F(n−1) and F(n); F(−n) = (−1)^(n+1) F(n)."""
    f, g = 1, 0
    for _ in range(abs(n)):
        f, g = (g, f + g) if n > 0 else (g - f, f)
    return f, g

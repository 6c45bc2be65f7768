"""Z[φ] in Python's integers and fractions, and the nearest point by trying every b."""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import oracles

# To 400 bits: two different sums of the tests' numbers differ by more than 2^-250.
PHI = Fraction((1 << 400) + math.isqrt(5 << 800), 1 << 401)


class Golden(NamedTuple):
    """a + b φ with integers of any size."""

    a: int
    b: int

    def __add__(self, other):
        return Golden(self.a + other.a, self.b + other.b)

    def __neg__(self):
        return Golden(-self.a, -self.b)

    def __mul__(self, other):
        # φ² = φ + 1
        both = self.b * other.b
        return Golden(self.a * other.a + both, self.a * other.b + self.b * other.a + both)

    @property
    def value(self) -> Fraction:
        return self.a + self.b * PHI

    @property
    def sign(self) -> int:
        return (self.value > 0) - (self.value < 0)


def _order(x: float, a: int, b: int):
    """Nearest first, of equals the smaller |b|, then the smaller |a|."""
    return abs(Fraction(x) - Golden(a, b).value), abs(b), abs(a)


@functools.lru_cache(4)
def _multiples(precision: int):
    b = np.arange(-precision, precision + 1)
    return b, b * oracles.PHI


def nearest(x: float, precision: int) -> tuple[int, int]:
    """The coefficients of the nearest point: a filter in float64, then fractions."""
    if not math.isfinite(x):
        return 0, 0
    x = float(np.clip(x, -3 * precision - 3, 3 * precision + 3))  # the ends are 2.62 times as far
    b, multiples = _multiples(precision)
    rest = x - multiples
    a = np.clip(np.rint(rest), -precision, precision)
    distance = np.abs(rest - a)
    # Of a product, a difference, and the constant: roundings of numbers up to 5 times precision.
    error = 8 * (precision + 1) * float(np.finfo(np.float64).eps)
    close = np.flatnonzero(distance <= distance.min() + 2 * error)
    tried = [
        (int(a[i]) + other, int(b[i]))
        for i in close
        for other in (-1, 0, 1)
        if abs(int(a[i]) + other) <= precision
    ]
    return min(tried, key=lambda point: _order(x, *point))


def difficult(rng, precision: int, dtype, count: int) -> np.ndarray:
    """Numbers of a type: anywhere, lattice points, the middle between neighbours and next to it,
    exact ties, and the ends of the lattice.
    """
    end = precision * (1 + oracles.PHI)
    anywhere = np.concatenate([rng.uniform(-1.1 * end, 1.1 * end, count), rng.normal(size=count)])
    points = rng.integers(-precision, precision + 1, (2, count))
    ends = np.array(
        [end, end - 0.5, end + 0.5, precision * oracles.PHI, precision, precision + 0.5]
    )
    ends = np.concatenate([ends, [precision / oracles.PHI, 0.2 / precision, 0.0, 1e30, 1e-30]])
    halves = rng.integers(-precision, precision + 1, 4) + 0.5

    b, multiples = _multiples(precision)
    middles = []
    for x in anywhere[: len(anywhere) // 2 : 2]:
        rest = x - multiples
        a = np.clip(np.rint(rest), -precision, precision)
        one, two = np.argpartition(np.abs(rest - a), 1)[:2]
        middles.append((a[one] + a[two] + (b[one] + b[two]) * oracles.PHI) / 2)
    middles = np.asarray(middles).astype(dtype)
    largest = np.asarray(oracles.info(dtype).max, dtype)
    with np.errstate(over="ignore"):
        return np.concatenate(
            [
                np.concatenate([anywhere, points[0] + points[1] * oracles.PHI]).astype(dtype),
                np.concatenate([ends, -ends, halves]).astype(dtype),
                *(middles, np.nextafter(middles, largest), np.nextafter(middles, -largest)),
            ]
        )


def rounded(value: Fraction, dtype) -> float:
    """Once, to nearest even, in the normal range and below it."""
    limits = oracles.info(dtype)
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, limits.minexp) - limits.nmant)
    return float(round(value / unit) * unit)


def ulps(actual: float, value: Fraction, dtype) -> float:
    """How far a number is from the exact value, in units of its last place."""
    return float(abs(Fraction(float(actual)) - value) / Fraction(float(oracles.ulp(value, dtype))))

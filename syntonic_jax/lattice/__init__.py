"""Exact golden arithmetic: Z[φ], the numbers a + bφ with integers a and b.

φ² = φ + 1 and 1/φ = φ − 1, so that every phi residual is exact here. docs/exact-arithmetic.md has
the proofs and the ranges in which nothing overflows.
"""

from ._crystallize import crystallize, snap_distance
from .golden_array import GoldenArray, stack, where
from .resonant import ResonantPhase, ResonantTensor, syntony

__all__ = [
    "GoldenArray",
    "ResonantPhase",
    "ResonantTensor",
    "crystallize",
    "snap_distance",
    "stack",
    "syntony",
    "where",
]

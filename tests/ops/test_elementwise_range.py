"""Elementwise operations give, to the ends of the range, what an unbounded exponent would give."""

import oracles
import pytest
from elementwise_range_check import ACTIVATIONS, check_activation, check_stores, check_sums

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("mode", oracles.MODES)
def test_sum(dtype, mode, implementation):
    check_sums(dtype, mode, implementation)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, order, dtype, implementation):
    check_activation(name, dtype, order, implementation)


def test_rounds_to_infinity(implementation):
    check_stores(implementation)

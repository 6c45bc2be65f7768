"""The kernels of norms of rows, emulated, as test_kernels.py has the others."""

import emulator
import oracles
import pytest
import rms_check
from layernorm_check import any_range, draw, estimates, estimates_of_any_range, value_and_cotangents

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.usefixtures("x64", "emulated"),
    pytest.mark.skipif(not emulator.available(), reason="fibers are those of Linux"),
]


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (9, 33), (7, 768), (5, 1001), (3, 5000), (2, 20000)])
def test_layernorm(shape, dtype, rng):
    operands, cotangents = draw(rng, shape, dtype)
    (y, z), gradients = value_and_cotangents(operands, cotangents, "cuda")
    exact = estimates(operands, cotangents, z)
    for name, actual in zip(exact, (z, y, *gradients), strict=True):
        oracles.assert_close(actual, exact[name], name)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", [4, 33, 1000, 1033, 20000])
def test_layernorm_of_rows_of_any_range(width, dtype, rng):
    operands, cotangents = any_range(rng, width, dtype)
    exact = estimates_of_any_range(operands, cotangents, 0.0)
    (y, _), pulled = value_and_cotangents(operands, cotangents, "cuda", (("epsilon", 0.0),))
    for (name, estimate), actual in zip(exact.items(), (y, *pulled), strict=True):
        oracles.assert_close(actual, estimate, name)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (9, 33), (7, 768), (5, 1001), (3, 5000), (2, 20000)])
def test_rms_norm(shape, dtype, rng):
    x, ct, scale = rms_check.draw(rng, shape, dtype)
    rms_check.check("cuda", x, ct, scale)
    rms_check.check("cuda", x, ct)
    rms_check.check_residual("cuda", shape, dtype, "phi", rng)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("width", [4, 33, 1000, 1033, 20000])
def test_rms_norm_of_rows_of_any_range(width, dtype, rng):
    rms_check.check_any_range("cuda", width, dtype, rng)

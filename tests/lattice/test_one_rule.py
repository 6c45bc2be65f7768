"""One rule: the digits of a result hang on the types of its operands, not on the lowering.

What is computed in float32 is so by the kernel and by jnp, also where a float64 result or float64
parameters are asked for: an error below that of float32 would show that one of them goes further.
"""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import syntonic_jax as s

pytestmark = pytest.mark.usefixtures("x64")

WIDE = {"dtype": "float64"}
# On x, a second array r, a parameter p > 0, labels, and options; the type that all is computed in.
OPERATIONS = {
    "phi_residual": (lambda x, r, p, n, **k: s.phi_residual(x, r, **WIDE, **k), "float32"),
    "phi_residual of float64": (
        lambda x, r, p, n, **k: s.phi_residual(x, r.astype("float64"), **k),
        "float64",
    ),
    "phi_residual_layernorm": (
        lambda x, r, p, n, **k: s.phi_residual_layernorm(x, r, p, p, **WIDE, **k),
        "float32",
    ),
    "golden_gelu": (lambda x, r, p, n, **k: s.golden_gelu(x, **k), "float32"),
    "golden_layer_norm": (
        lambda x, r, p, n, **k: s.golden_layer_norm(x, p, p, **WIDE, **k),
        "float32",
    ),
    "golden_batch_norm": (
        lambda x, r, p, n, **k: s.golden_batch_norm(x, p, p, **WIDE, **k)[0],
        "float32",
    ),
    "golden_batch_norm_inference": (
        lambda x, r, p, n, **k: s.golden_batch_norm_inference(x, p, p, p, p, **WIDE, **k),
        "float32",
    ),
    "syntonic_softmax": (
        lambda x, r, p, n, **k: s.syntonic_softmax(x, syntony=p, scale=p[0], **WIDE, **k),
        "float32",
    ),
    "syntonic_log_softmax": (
        lambda x, r, p, n, **k: s.syntonic_log_softmax(x, mode_norms=p, scale=p[0], **WIDE, **k),
        "float32",
    ),
    "syntonic_cross_entropy": (
        lambda x, r, p, n, **k: s.syntonic_cross_entropy(x, n, mode_norms=p, scale=p[0], **k),
        "float32",
    ),
    "residual_component_norm": (
        lambda x, r, p, n, **k: s.residual_component_norm(r, **k),
        "float32",
    ),
    "crystallize": (lambda x, r, p, n, **k: s.crystallize(x, **WIDE, **k), "float64"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_both_lowerings_compute_in_one_type(name, implementation, rng):
    """A result errs by no more than some 64 roundings of numbers of its size, and by some."""
    operation, acc = OPERATIONS[name]
    x, r = (rng.normal(size=(2, 16, 24)) + 0.5).astype("float32")
    p, labels = rng.uniform(0.5, 2, 24), rng.integers(0, 24, 16)
    got = operation(*map(jnp.asarray, (x, r, p)), labels, implementation=implementation)
    wide = [jnp.asarray(a, "float64") for a in (x, r, p)]
    exact = oracles.real(operation(*wide, labels, implementation="xla"))
    error = np.abs(oracles.real(got) - exact).max() / np.abs(exact).max()
    assert error <= 64 * oracles.unit(acc)
    assert (error > 64 * oracles.unit("float64")) == (acc == "float32")

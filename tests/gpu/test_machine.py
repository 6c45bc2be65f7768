"""What only a real device shows: over 2**31 elements, slices of buffers, CUDA graphs."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import syntonic_jax
from syntonic_jax import (
    _dispatch,
    _extension,
    golden_gelu,
    phi_residual,
    phi_residual_layernorm,
    residual_component_norm,
)

pytestmark = pytest.mark.gpu


def test_none_selects_as_documented():
    """None emits the call for the layer norm and leaves elementwise work to XLA."""
    x = jnp.ones((4, 64))

    def program(f):
        return jax.jit(f).lower(x, x).compile().as_text()

    assert _extension.available(), _extension.reason()
    assert _dispatch.selected("phi_residual_layernorm", "cuda", "9.0") == "cuda"
    call = 'custom_call_target="syntonic_'
    assert call + "phi_residual_layernorm" in program(phi_residual_layernorm)
    assert call not in program(phi_residual)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """The last rows and those on either side of 2**31 and 2**32 bytes are what they are alone."""
    width = 8192
    rows = 2**31 // width + 37
    keys = jax.random.split(jax.random.key(0), 4)
    draw = jax.jit(lambda key: jax.random.normal(key, (rows, width), jnp.bfloat16))
    scale, bias = jnp.linspace(0.5, 2, width), jnp.linspace(-1, 1, width)

    @jax.jit
    def forward(identity, residual):
        return phi_residual_layernorm(
            identity, residual, scale, bias, return_sum=True, implementation="cuda"
        )

    @jax.jit
    def backward(identity, residual, ct):
        def f(identity, residual, scale, bias):
            return phi_residual_layernorm(identity, residual, scale, bias, implementation="cuda")

        return jax.vjp(f, identity, residual, scale, bias)[1](ct)

    identity, residual = draw(keys[0]), draw(keys[1])
    stretches = [slice(s, s + 5) for s in (0, 2**30 // width - 2, 2**31 // width - 2, rows - 5)]
    y, z = forward(identity, residual)
    for s in stretches:
        for whole, alone in zip((y, z), forward(identity[s], residual[s])):
            np.testing.assert_array_equal(np.asarray(whole[s]), np.asarray(alone))
    del y, z
    grads = backward(identity, residual, identity)
    for s in stretches:
        for whole, alone in zip(grads[:2], backward(identity[s], residual[s], identity[s])[:2]):
            np.testing.assert_array_equal(np.asarray(whole[s]), np.asarray(alone))
    expected = jax.jit(lambda ct: jnp.sum(ct, 0, dtype=jnp.float32))(identity)
    # Sums of `rows` normal numbers in float32: of size sqrt(rows), with errors to match.
    np.testing.assert_allclose(grads[3], expected, atol=rows * oracles.unit("float32"))
    del grads
    total = phi_residual(identity, residual, activation="relu", implementation="cuda")
    for s in stretches:
        alone = phi_residual(identity[s], residual[s], activation="relu", implementation="cuda")
        np.testing.assert_array_equal(np.asarray(total[s]), np.asarray(alone))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sum", "relu", "gelu", "norm"])
def test_more_than_2_to_the_31_elements_elementwise(name):
    """The gradients, of stretches at the end and on either side of 2**31 bytes and elements."""
    cuda = {"implementation": "cuda"}
    f, count = {
        "sum": (functools.partial(phi_residual, mode="phi_symmetric", **cuda), 2),
        "relu": (functools.partial(phi_residual, activation="relu", **cuda), 2),
        "gelu": (functools.partial(golden_gelu, **cuda), 1),
        "norm": (functools.partial(residual_component_norm, mode="standard", **cuda), 1),
    }[name]
    rows, width = 2**31 // 8192 + 37, 8192
    draw = jax.jit(lambda key: jax.random.normal(key, (rows, width), jnp.bfloat16))
    operands = [draw(key) for key in jax.random.split(jax.random.key(1), count)]
    ct = jnp.ones(()) if name == "norm" else operands[-1]

    @jax.jit
    def run(operands, ct):
        y, pull = jax.vjp(f, *operands)
        return y, pull(ct)

    y, grads = run(operands, ct)
    if name == "norm":  # sums of 2**31 squares, in two orders
        by_xla = jax.jit(functools.partial(f, implementation="xla"))(*operands)
        assert float(y) == pytest.approx(float(by_xla), rel=64 * oracles.unit("float32"))
    for start in (0, 2**30 // width - 2, 2**31 // width - 2, rows - 5):
        s = slice(start, start + 5)
        part = [x[s] for x in operands]
        if name == "norm":
            expected = part[0].astype("float32") / y
            np.testing.assert_allclose(
                oracles.real(grads[0][s]), oracles.real(expected), rtol=2 * oracles.unit("bfloat16")
            )
            continue
        alone = run(part, ct[s])
        for whole, of_part in zip((y, *grads), (alone[0], *alone[1]), strict=True):
            np.testing.assert_array_equal(np.asarray(whole[s]), np.asarray(of_part))


GRAPHS = {  # an operation eight times, and the calls that the gradient of its sum makes
    "row": ("phi_residual_layernorm(y, x, x[0], x[1], implementation='cuda')", 1024, 16),
    "cluster": ("phi_residual_layernorm(y, x, x[0], x[1], implementation='cuda')", 65536, 16),
    "channels": ("golden_batch_norm(y, x[0], implementation='cuda')[0] + x", 1024, 24),
    "sum": ("phi_residual(y, x, activation='gelu', implementation='cuda')", 1024, 16),
    "gelu": ("golden_gelu(y, implementation='cuda')", 1024, 16),
    "norm": ("y / residual_component_norm(y, implementation='cuda')", 1024, 16),
    "plain": ("phi_residual(y, x, 'phi_symmetric', implementation='cuda')", 1024, 16),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_calls_are_captured_in_cuda_graphs(name, tmp_path):
    """XLA records a chain of the calls into a command buffer: its thunk dump says so."""
    operation, width, calls = GRAPHS[name]
    flags = os.environ.get("XLA_FLAGS", "")
    script = f"""
        import jax, jax.numpy as jnp
        from syntonic_jax import *
        x = jax.random.normal(jax.random.key(0), (64, {width}))
        def f(x):
            y = x
            for _ in range(8):
                y = {operation}
            return (y * x).sum()
        g = jax.jit(jax.grad(f))
        for _ in range(4):
            x = x + 1e-3 * g(x)
        assert jnp.isfinite(x).all()
    """
    subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        check=True,
        env=os.environ
        | {
            "XLA_FLAGS": f"{flags} --xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        },
    )
    (thunks,) = tmp_path.glob("*jit_f.thunk_sequence_after_thunk_passes.txt")
    buffer, *inside = thunks.read_text().splitlines()
    assert "kCommandBuffer" in buffer
    # Indented: part of the buffer, outside which there is nothing.
    assert all(line.startswith("    ") for line in inside if line.strip())
    assert sum("kCustomCall" in line for line in inside) == calls


CUDA = {"implementation": "cuda"}
SLICED = {
    "sum": lambda x, r: phi_residual(x, r, **CUDA),
    "gelu": lambda x, r: golden_gelu(x, **CUDA),
    "norm": lambda x, r: x / residual_component_norm(r, **CUDA),
    "layernorm": lambda x, r: phi_residual_layernorm(x, r, x[0], x[1], **CUDA),
    "gradient": lambda x, r: jax.vjp(lambda x: phi_residual_layernorm(x, r, **CUDA), x)[1](r)[0],
}


@pytest.mark.parametrize("name", SLICED)
def test_operands_are_slices_of_a_buffer(name, rng):
    """XLA may hand a call parts of a buffer, and have it write into a part of another."""
    # Slices begin at multiples of 128 bytes, or XLA would hand out copies of them.
    buffer = jnp.asarray(rng.normal(size=(3, 64, 1000)), "float32")

    def of_slices(buffer, i):
        y = SLICED[name](jax.lax.dynamic_index_in_dim(buffer, i, keepdims=False), buffer[2])
        return jax.lax.dynamic_update_index_in_dim(buffer, y, i, 0)

    program = jax.jit(of_slices).lower(buffer, 0).compile()
    assert "dynamic-slice" in program.as_text()
    for i in range(2):
        ours = program(buffer, i)
        alone = jax.jit(SLICED[name])(buffer[i] + 0, buffer[2] + 0)
        tolerance = 64 * oracles.unit("float32")  # the programs around the call are others
        np.testing.assert_allclose(ours[i], alone, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(np.delete(ours, i, 0), np.delete(buffer, i, 0))


def test_report_names_this_device():
    report = subprocess.run(
        [sys.executable, "-P", "-m", "syntonic_jax"], check=True, capture_output=True, text=True
    ).stdout
    assert syntonic_jax.__version__ in report
    assert "phi_residual_layernorm" in report

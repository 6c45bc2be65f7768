"""What only a real device shows: over 2**31 elements, misaligned pointers, CUDA graphs."""

import functools
import importlib
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


@pytest.fixture(scope="module")
def shifted_targets():
    """The calls of the build whose kernels get pointers that are off by one element."""
    module = importlib.import_module("syntonic_jax._kernels_shifted")
    for name, stages in module.registrations().items():
        jax.ffi.register_ffi_target(f"{name}_shifted", stages, platform="CUDA")


def padded(array):
    """One more row; the data begin at the second element."""
    flat = jnp.zeros(((array.shape[0] + 1) * int(np.prod(array.shape[1:]))), array.dtype)
    flat = flat.at[1 : 1 + array.size].set(array.reshape(-1))
    return flat.reshape(array.shape[0] + 1, *array.shape[1:])


def unpadded(array, shape):
    return array.reshape(-1)[1 : 1 + int(np.prod(shape))].reshape(shape)


def shifted(name, names, operands, results, /, **attributes):
    """One call with pointers that are off by one element; results are (shape, dtype).

    `names` are those of the operands and of the results: "x scale -> y".
    """
    longer = [jax.ShapeDtypeStruct((shape[0] + 1, *shape[1:]), dtype) for shape, dtype in results]
    attributes = {
        k: np.float64(v) if isinstance(v, float) else np.int32(v) for k, v in attributes.items()
    }
    attributes |= dict(zip(("operands", "results"), names.split(" -> "), strict=True))
    call = jax.ffi.ffi_call(f"{name}_shifted", longer)
    out = jax.jit(lambda *arrays: call(*arrays, **attributes))(*map(padded, operands))
    return [unpadded(array, shape) for array, (shape, _) in zip(out, results)]


SANITIZED = functools.partial(pytest.param, marks=pytest.mark.sanitize)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", [7, 768, SANITIZED(1000), 8192, 40000, SANITIZED(140000)])
def test_misaligned_layernorm(width, dtype, rng, x64, shifted_targets):
    rows, acc = 5, oracles.accumulation(dtype)
    x, r, ct_y, ct_z = (jnp.asarray(rng.normal(size=(rows, width)), dtype) for _ in range(4))
    scale, bias = (jnp.asarray(rng.normal(size=(1, width)), acc) for _ in range(2))
    like = ((rows, width), dtype)
    y, z, statistics = shifted(
        "syntonic_phi_residual_layernorm",
        "identity residual scale bias -> y z statistics",
        (x, r, scale, bias),
        (like, like, ((rows, 3), acc)),
        sum_scale=1.0,
        residual_scale=oracles.PHI_INV,
        epsilon=1e-5,
        scale_factor=1.0,
    )
    oracles.assert_close(z, oracles.stored_sum(x, r, "phi", dtype), "z")
    exact = oracles.layernorm(oracles.exactly(z), scale, bias, acc=acc)
    oracles.assert_close(y, exact, "y")
    parameter = ((1, width), acc)
    *found, _ = shifted(
        "syntonic_phi_residual_layernorm_cotangent",
        "z statistics scale ct_y ct_z -> d_identity d_residual d_scale d_bias scratch",
        (z, statistics, scale, ct_y, ct_z),
        (like, like, parameter, parameter, ((4 * width,), acc)),
        identity_scale=1.0,
        residual_scale=oracles.PHI_INV,
        scale_factor=1.0,
    )
    exact = oracles.layernorm_vjp(oracles.exactly(z), ct_y, ct_z, scale, acc=acc)
    for (name, estimate), actual in zip(exact._asdict().items(), found):
        oracles.assert_close(actual.reshape(estimate.value.shape), estimate, name)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize(
    "shape", [(9, 64, 1), SANITIZED((9, 33, 1)), (5, 6, 64), SANITIZED((5, 6, 49))]
)
def test_misaligned_channels(shape, dtype, rng, x64, shifted_targets):
    """Against sums in float64: the kernels' have a rounding for each number of a channel."""
    acc = oracles.accumulation(dtype)
    x, ct = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    exact, weight = oracles.real(x), oracles.real(ct)
    channels = shape[1]
    like = ((1, channels), acc)
    scale, bias = (jnp.asarray(rng.normal(size=(1, channels)), acc) for _ in range(2))
    mean, low, var, slope, shift, _ = shifted(
        "syntonic_golden_batch_norm_moments",
        "x scale bias -> mean low var slope shift scratch",
        (x, scale, bias),
        (like, like, like, like, like, ((64 * channels,), acc)),
        epsilon=1e-5,
        scale_factor=0.5,
    )
    expected = exact.mean((0, 2)), exact.var((0, 2))
    tolerance = 4 * exact[:, 0].size * oracles.unit(acc)
    found = oracles.real(mean) + oracles.real(low), oracles.real(var)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=tolerance)
    steepness = 0.5 * oracles.real(scale)[0] * (expected[1] + 1e-5) ** -0.5
    np.testing.assert_allclose(oracles.real(slope)[0], steepness, rtol=8 * tolerance)
    np.testing.assert_allclose(oracles.real(shift), oracles.real(bias), rtol=0, atol=tolerance)
    (y,) = shifted(
        "syntonic_golden_batch_norm_normalise",
        "x mean slope shift -> y",
        (x, mean, slope, shift),
        ((shape, x.dtype),),
    )
    a, b, m = (oracles.real(v)[0][:, None] for v in (slope, shift, mean))
    size = np.abs(a) * (np.abs(exact) + np.abs(m)) + np.abs(b)
    line = oracles.Estimate(a * (exact - m) + b, 4 * oracles.unit(acc) * size)
    oracles.assert_close(y, line, "y")
    total, product, _ = shifted(
        "syntonic_golden_batch_norm_sums",
        "x mean low ct -> sum product scratch",
        (x, mean, low, ct),
        (like, like, ((32 * channels,), acc)),
    )
    centred = exact - expected[0][:, None]
    size = np.abs(centred * weight).sum((0, 2)).max() + np.abs(weight).sum((0, 2)).max()
    for ours, theirs in ((total, weight), (product, centred * weight)):
        np.testing.assert_allclose(
            oracles.real(ours)[0], theirs.sum((0, 2)), rtol=0, atol=tolerance * size
        )


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_misaligned_elementwise(dtype, rng, x64, shifted_targets):
    acc = oracles.accumulation(dtype)
    x, r = (jnp.asarray(rng.normal(size=(3, 1000)), dtype) for _ in range(2))
    like = (x.shape, dtype)
    y, z = shifted(
        "syntonic_phi_residual",
        "identity residual -> y z",
        (x, r),
        (like, like),
        sum_scale=1.0,
        residual_scale=oracles.PHI_INV,
        activation=2,
    )
    oracles.assert_close(y, oracles.phi_residual(x, r, "phi", "gelu", acc=acc), "y")
    identity, residual = shifted(
        "syntonic_phi_residual_cotangent",
        "saved ct -> d_identity d_residual",
        (z, r),
        (like, like),
        identity_scale=1.0,
        residual_scale=oracles.PHI_INV,
        activation=2,
    )
    exact = oracles.phi_residual_vjp(x, r, r, "phi", "gelu", acc=acc, stored=dtype)
    oracles.assert_close(identity, exact[0], "identity")
    oracles.assert_close(residual, exact[1], "residual")
    (y,) = shifted(
        "syntonic_phi_residual",
        "identity residual -> y",
        (x, r),
        (like,),
        sum_scale=1.0,
        residual_scale=oracles.PHI_INV,
        activation=0,
    )
    oracles.assert_close(y, oracles.phi_residual(x, r, "phi", acc=acc), "plain sum")
    identity, residual = shifted(
        "syntonic_phi_residual_cotangent",
        "ct -> d_identity d_residual",
        (r,),
        (like, like),
        identity_scale=1.0,
        residual_scale=oracles.PHI_INV,
        activation=0,
    )
    np.testing.assert_array_equal(np.asarray(identity), np.asarray(r))
    exact = oracles.phi_residual_vjp(x, r, r, "phi", acc=acc, stored=dtype)
    oracles.assert_close(residual, exact[1], "residual of a plain sum")
    (y,) = shifted("syntonic_golden_gelu", "x -> y", (x,), (like,))
    oracles.assert_close(y, oracles.golden_gelu(x, acc=acc), "golden_gelu")
    (dx,) = shifted("syntonic_golden_gelu_cotangent", "x ct_y -> d_x", (x, r), (like,))
    oracles.assert_close(dx, oracles.golden_gelu_vjp(x, r, acc=acc), "gradient of golden_gelu")
    (sums, _) = shifted(
        "syntonic_sum_of_squares", "x -> sums scratch", (x,), (((1, 3), acc), ((192,), acc))
    )
    norm = oracles.residual_component_norm(x, "standard", acc=acc)
    squared = oracles.Estimate(norm.value**2, 3 * norm.value * norm.slack)
    oracles.assert_close(sums[0, 1], squared, "sum of squares")
    np.testing.assert_array_equal(sums[0, ::2], 0)  # of what is too small or too large for it
    for parts in (1, 3):
        first, second = (jnp.asarray(rng.normal(size=parts), acc) for _ in range(2))
        (dx,) = shifted(
            "syntonic_sum_of_squares_cotangent", "x first second -> dx", (x, first, second), (like,)
        )
        factors = oracles.real(first) * oracles.real(second)
        slope = oracles.real(x).reshape(parts, -1) * factors[:, None]
        rounding = 2 * (oracles.unit(acc) + oracles.unit("float64"))  # two products there and here
        estimate = oracles.Estimate(slope, rounding * np.abs(slope))
        oracles.assert_close(dx.reshape(slope.shape), estimate, "gradient of the norm")


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

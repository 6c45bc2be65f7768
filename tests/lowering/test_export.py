"""jax.export: values and gradients written here, read and run in a fresh process."""

import functools
import itertools
import re

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import OURS, TARGETS
from fresh import run_fresh
from jax import export

from syntonic_jax import (
    crystallize,
    golden_batch_norm,
    golden_batch_norm_inference,
    golden_gelu,
    golden_layer_norm,
    phi_residual,
    phi_residual_gelu,
    phi_residual_layernorm,
    residual_component_norm,
    syntonic_cross_entropy,
    syntonic_log_softmax,
    syntonic_softmax,
)


def layernorm(implementation):
    return functools.partial(phi_residual_layernorm, return_sum=True, implementation=implementation)


def with_implementation(f):
    return lambda implementation: functools.partial(f, implementation=implementation)


def softmax(x, norms, scale, **options):
    return syntonic_softmax(x, mode_norms=norms, scale=scale, **options)


def log_softmax(x, weights, **options):
    weights = jnp.exp(weights)
    y = syntonic_log_softmax(x, syntony=weights, axis=1, where=x < 1, **options)
    return jnp.where(x < 1, y, 0)


def cross_entropy(x, norms, **options):
    labels = (x[..., 0] > 0).astype("int32")
    return syntonic_cross_entropy(x, labels, mode_norms=norms, **options)


# name: function of the implementation, shapes of its operands; b is not known at export
CALLS = {
    "layernorm": (layernorm, ["b, 4, 8", "b, 4, 8", "8", "8"]),
    "layernorm_for_each": (
        lambda implementation: jax.vmap(layernorm(implementation), (0, 0, 0, None)),
        ["b, 2, 8", "b, 2, 8", "b, 8", "8"],
    ),
    "sum": (with_implementation(phi_residual), ["b, 3", "b, 3"]),
    "gelu": (with_implementation(phi_residual_gelu), ["b, 3", "b, 3"]),
    "golden_gelu": (with_implementation(golden_gelu), ["b"]),
    "crystallize": (with_implementation(crystallize), ["b, 2"]),
    "norm": (with_implementation(residual_component_norm), ["b, 5"]),
    "batch_norm": (with_implementation(golden_batch_norm), ["b, 4, 3", "3", "3"]),
    "batch_norm_first": (
        with_implementation(functools.partial(golden_batch_norm, axis=1)),
        ["b, 3, 2, 2", "3", "3"],
    ),
    "batch_norm_inference": (
        with_implementation(golden_batch_norm_inference),
        ["b, 3", "3", "3", "3", "3"],
    ),
    "layer_norm": (with_implementation(golden_layer_norm), ["b, 2, 8", "8", "8"]),
    "layer_norm_axes": (
        with_implementation(functools.partial(golden_layer_norm, axis=(0, 2))),
        ["4, b, 2", "4, 2", "4, 2"],
    ),
    "softmax": (with_implementation(softmax), ["b, 2, 8", "8", ""]),
    "log_softmax": (with_implementation(log_softmax), ["b, 8, 3", "b, 8, 3"]),
    "cross_entropy": (with_implementation(cross_entropy), ["b, 8", "8"]),
}
SIZES = (3, 6)
# Two programs of one formula: some roundings of float32 in sums of up to 200 terms.
RTOL = 512 * float(np.finfo("float32").eps)


def total(f):
    return lambda *operands: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(*operands)))


def values_and_gradients(f, count):
    return lambda *operands: (f(*operands), jax.grad(total(f), tuple(range(count)))(*operands))


def exported(name, implementation, platforms, disabled_checks=()):
    """Of values with gradients, for a batch of any size."""
    make, shapes = CALLS[name]
    scope = export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), "float32")
        for shape in shapes
    ]
    f = jax.jit(values_and_gradients(make(implementation), len(shapes)))
    return export.export(f, platforms=platforms, disabled_checks=disabled_checks)(*specs)


def operands_of(name, size, rng):
    shapes = [eval(f"({shape},)" if shape else "()", {"b": size}) for shape in CALLS[name][1]]
    operands = [np.asarray(rng.normal(size=shape), "float32") for shape in shapes]
    if name == "batch_norm_inference":
        operands[2] = 0.5 + operands[2] ** 2  # a variance
    return operands


# Reads what lies in a folder, runs it, and writes what comes out beside it.
RUN = """
    import pathlib, sys
    import jax, numpy as np
    from jax import export

    {setup}
    for path in pathlib.Path({folder!r}).glob("*.export"):
        call = export.deserialize(bytearray(path.read_bytes())).call
        for given in path.parent.glob(path.stem + ".*.in.npz"):
            with np.load(given) as file:
                operands = [file[name] for name in file.files]
            results = call(*operands)
            # And through the derivative that was stored beside it.
            values = lambda *x: sum(y.sum() for y in jax.tree.leaves(call(*x)[0]))
            slopes = jax.grad(values, tuple(range(len(operands))))(*operands)
            np.savez(str(given).replace(".in.", ".out."), *jax.tree.leaves((results, slopes)))
    # jnp needs nothing of the library.
    assert {setup!r} or "syntonic_jax" not in sys.modules
"""


def check(name, given, result):
    """What the fresh process computed against the same in this one, without an export."""
    make, shapes = CALLS[name]
    f, argnums = make("xla"), tuple(range(len(shapes)))
    with np.load(given) as file:
        operands = [file[key] for key in file.files]
    with np.load(result) as file:
        got = [file[key] for key in file.files]

    def plain_sum(*x):
        return sum(y.sum() for y in jax.tree.leaves(f(*x)))

    expected = jax.jit(values_and_gradients(f, len(shapes)))(*operands)
    slopes = jax.jit(jax.grad(plain_sum, argnums))(*operands)
    expected = [np.asarray(x) for x in jax.tree.leaves((expected, slopes))]
    battery.assert_same(got, expected, RTOL)


def round_trip(implementation, platform, setup, folder, rng):
    for name in CALLS:
        written = exported(name, implementation, [platform], OURS if setup else ())
        (folder / f"{name}.export").write_bytes(written.serialize(vjp_order=1))
        for size in SIZES:
            np.savez(folder / f"{name}.{size}.in.npz", *operands_of(name, size, rng))
    run_fresh(RUN.format(setup=setup, folder=str(folder)))
    for name, size in itertools.product(CALLS, SIZES):
        check(name, folder / f"{name}.{size}.in.npz", folder / f"{name}.{size}.out.npz")


@pytest.mark.slow
def test_round_trip(implementation, tmp_path, rng):
    setup = "import double; double.install()" if implementation == "cuda" else ""
    round_trip(implementation, "cpu", setup, tmp_path, rng)


@pytest.mark.gpu
def test_round_trip_on_a_gpu(tmp_path, rng, monkeypatch):
    """The fresh process imports the library, which registers its kernels."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    round_trip("cuda", "cuda", "import syntonic_jax", tmp_path, rng)


@pytest.mark.parametrize("name", CALLS)
def test_for_cuda_from_a_machine_without_one(name):
    written = exported(name, "cuda", ["cuda"], OURS).serialize(vjp_order=1)
    read = export.deserialize(written)
    assert read.platforms == ("cuda",)
    targets = set(re.findall(r"stablehlo.custom_call @(syntonic_\w+)", read.mlir_module()))
    assert targets == {f"syntonic_{target}" for target in TARGETS[name]}
    with pytest.raises(ValueError, match="cuda"):
        read.call(*operands_of(name, 3, np.random.default_rng(0)))


def test_jax_asks_for_consent_to_custom_calls():
    with pytest.raises(ValueError, match="syntonic_phi_residual_layernorm"):
        exported("layernorm", "cuda", ["cuda"])


def test_one_export_for_both_platforms(rng):
    both = exported("layernorm", None, ["cpu", "cuda"])
    assert both.platforms == ("cpu", "cuda")
    operands = operands_of("layernorm", 3, rng)
    f = values_and_gradients(layernorm("xla"), 4)
    got = both.call(*operands)
    battery.assert_same(got, jax.jit(f)(*operands), RTOL)

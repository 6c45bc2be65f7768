"""jax.export: values and gradients written here, read and run in a fresh process."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import battery
import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
from exported import OURS
from fresh import run_fresh
from jax import export

from syntonic_jax import golden_batch_norm, golden_layer_norm, syntonic_log_softmax


def log_softmax(x, weights, **options):
    weights = jnp.exp(weights)
    y = syntonic_log_softmax(x, syntony=weights, axis=1, where=x < 1, **options)
    return jnp.where(x < 1, y, 0)


def layernorm_for_each(*operands, **options):
    layernorm = operations.FIRST["phi_residual_layernorm"].using(**options)
    return jax.vmap(layernorm, (0, 0, 0, None))(*operands)


class Program(NamedTuple):
    call: Callable[..., Any]
    shapes: list[str]  # of its operands; b is not known at export
    targets: tuple[str, ...]
    adjust: Callable[..., Any] = lambda *operands: operands


SHAPES = {"rows": "b, 2, 8", "weights": "b, 2, 8", "par": "8", "scalar": ""}
PROGRAMS = {
    o.label: Program(o.call, [SHAPES[kind] for kind in o.kinds], o.targets, o.adjust)
    for o in operations.FIRST.values()
    if o.name != "output_statistics"  # what it is made of is exported with golden_batch_norm
}
for label, call, shapes, of in [
    ("layernorm for each", layernorm_for_each, ["b, 2, 8", "b, 2, 8", "b, 8", "8"], None),
    ("batch norm, first axis", golden_batch_norm, ["b, 3, 2, 2", "3", "3"], {"axis": 1}),
    ("layer norm, axes", golden_layer_norm, ["4, b, 2", "4, 2", "4, 2"], {"axis": (0, 2)}),
    ("log softmax, axis", log_softmax, ["b, 8, 3", "b, 8, 3"], None),
]:
    name = "phi_residual_layernorm" if call is layernorm_for_each else call.__name__
    name = "syntonic_log_softmax" if call is log_softmax else name
    call = functools.partial(call, **(of or {}))
    PROGRAMS[label] = Program(call, shapes, operations.FIRST[name].targets)
SIZES = (3, 6)
# Two programs of one formula: some roundings of float32 in sums of up to 200 terms.
RTOL = 512 * float(np.finfo("float32").eps)


def total(f):
    return lambda *operands: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(*operands)))


def values_and_gradients(f, count):
    return lambda *operands: (f(*operands), jax.grad(total(f), tuple(range(count)))(*operands))


def exported(name, implementation, platforms, disabled_checks=()):
    """Of values with gradients, for a batch of any size."""
    call, shapes, *_ = PROGRAMS[name]
    scope = export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), "float32")
        for shape in shapes
    ]
    f = functools.partial(call, implementation=implementation)
    f = jax.jit(values_and_gradients(f, len(shapes)))
    return export.export(f, platforms=platforms, disabled_checks=disabled_checks)(*specs)


def operands_of(name, size, rng):
    _, texts, _, adjust = PROGRAMS[name]
    shapes = [eval(f"({shape},)" if shape else "()", {"b": size}) for shape in texts]
    operands = [np.asarray(rng.normal(size=shape), "float32") for shape in shapes]
    return [np.asarray(x) for x in adjust(*operands)]


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
    call, shapes, *_ = PROGRAMS[name]
    f = functools.partial(call, implementation="xla")
    argnums = tuple(range(len(shapes)))
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
    for name in PROGRAMS:
        written = exported(name, implementation, [platform], OURS if setup else ())
        (folder / f"{name}.export").write_bytes(written.serialize(vjp_order=1))
        for size in SIZES:
            np.savez(folder / f"{name}.{size}.in.npz", *operands_of(name, size, rng))
    run_fresh(RUN.format(setup=setup, folder=str(folder)))
    for name, size in itertools.product(PROGRAMS, SIZES):
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


@pytest.mark.parametrize("name", PROGRAMS)
def test_for_cuda_from_a_machine_without_one(name):
    written = exported(name, "cuda", ["cuda"], OURS).serialize(vjp_order=1)
    read = export.deserialize(written)
    assert read.platforms == ("cuda",)
    targets = set(re.findall(r"stablehlo.custom_call @(syntonic_\w+)", read.mlir_module()))
    assert targets == {f"syntonic_{target}" for target in PROGRAMS[name].targets}
    with pytest.raises(ValueError, match="cuda"):
        read.call(*operands_of(name, 3, np.random.default_rng(0)))


def test_jax_asks_for_consent_to_custom_calls():
    with pytest.raises(ValueError, match="syntonic_phi_residual_layernorm"):
        exported("phi_residual_layernorm", "cuda", ["cuda"])


def test_one_export_for_both_platforms(rng):
    both = exported("phi_residual_layernorm", None, ["cpu", "cuda"])
    assert both.platforms == ("cpu", "cuda")
    operands = operands_of("phi_residual_layernorm", 3, rng)
    f = operations.FIRST["phi_residual_layernorm"].using("xla")
    f = values_and_gradients(f, 4)
    got = both.call(*operands)
    battery.assert_same(got, jax.jit(f)(*operands), RTOL)

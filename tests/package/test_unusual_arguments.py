"""Unusual right calls: numbers and arrays that jnp takes are taken.

Each gives what the usual call gives, to the bit, and no warning. Of static arguments the traced
programs are compared: nothing is compiled for them.
"""

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from wrong_calls import CALLS, X

import syntonic_jax
from syntonic_jax import GoldenNormMode, PhiResidualMode

ONE = [np.int64(1), np.int32(1), np.uint8(1), np.array(1), np.array(1, "int16")]
ONE += [jnp.array(1), jnp.int32(1)]
AXES = [(1,), [1], range(1, 2), (np.int64(1),), [np.array(-1)], np.array([1])]
HALF = [np.float16(0.5), np.float32(0.5), np.float64(0.5), np.longdouble(0.5), np.array(0.5, "f4")]
HALF += [jnp.float32(0.5), jnp.array(0.5, "bfloat16"), ml_dtypes.bfloat16(0.5), np.array(0.5)]
TWO = [2, np.int32(2), np.uint8(2), np.float32(2), np.array(2), jnp.int32(2), jnp.float16(2)]
FLOAT32 = [
    "float32",
    np.str_("float32"),
    "f4",
    "single",
    jnp.float32,
    np.float32,
    np.dtype("f4"),
    np.dtype("<f4"),
]
FLOAT32 += [float, jnp.ones(1).dtype]  # Python's float is jax's default type
BFLOAT16 = ["bfloat16", jnp.bfloat16, ml_dtypes.bfloat16, np.dtype("bfloat16")]
HALVES = ["float16", "half", np.half, jnp.float16]

# Of each argument: a usual value, and unusual ones that mean the same.
SAME = {
    "mode": [("phi", [PhiResidualMode.PHI, PhiResidualMode("phi"), np.str_("phi")])],
    "activation": [("relu", [np.str_("relu")])],
    "implementation": [("xla", [np.str_("xla")])],
    "dtype": [("float32", FLOAT32), (jnp.bfloat16, BFLOAT16), (np.float16, HALVES)],
    "epsilon": [(0.5, HALF), (2.0, TWO), (0.0, [0, np.int64(0), -0.0])],
    "target_variance": [
        (0.5, [*HALF, GoldenNormMode.custom(0.5), GoldenNormMode.custom(np.float16(0.5))]),
        (2.0, [*TWO, GoldenNormMode.custom(np.int8(2)), GoldenNormMode.custom(jnp.array(2))]),
        ("golden", [GoldenNormMode("golden"), np.str_("golden")]),
        ("standard", [GoldenNormMode("standard"), 1, np.float32(1)]),
    ],
    "return_sum": [(True, [np.bool_(True)]), (False, [np.bool_(False)])],
    "axis": [(1, ONE)],
    "scale": [(0.5, HALF), (2.0, [*TWO[:4], jnp.float16(2)])],
    "where": [(np.ones(4, bool), [True, np.bool_(True), jnp.array(True), jnp.ones((3, 1), bool)])],
    "labels": [(jnp.array([0, 1, 3]), [np.array([0, 1, 3], t) for t in ("u1", "i2", "u4", "i8")])],
    "axis_index_groups": [(None, [[], [[0, 1]], np.array([[0, 1], [2, 3]]), (range(2), [2])])],
    "precision": [(3, [np.int64(3), np.uint8(3)])],
}
DATA = ("where", "scale", "labels")
NORMS = ("golden_layer_norm", "golden_batch_norm", "golden_batch_norm_inference")
NORMS = (*NORMS, "output_statistics")

CASES = [
    (function, right, argument, usual, unusual)
    for name, entries in CALLS.items()
    for function, right, wrong in entries
    for argument in wrong
    if argument in SAME and not (argument == "scale" and "softmax" not in name)
    for usual, unusual in SAME[argument] + [(1, AXES)] * (argument == "axis" and name in NORMS)
]


@pytest.mark.parametrize(
    ("function", "right", "argument", "usual", "unusual"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[2]}") for case in CASES],
)
def test_unusual_values(function, right, argument, usual, unusual):
    arrays = {k: v for k, v in right.items() if k != argument and isinstance(v, jax.Array)}
    others = {k: v for k, v in right.items() if k != argument and k not in arrays}

    def call(value):
        return lambda arrays: function(**arrays, **others, **{argument: value})

    if argument not in DATA:
        expected = str(jax.make_jaxpr(call(usual))(arrays))
        for value in unusual:
            assert str(jax.make_jaxpr(call(value))(arrays)) == expected, value
        return
    expected = jax.tree.leaves(call(usual)(arrays))
    for value in unusual:
        for g, e in zip(jax.tree.leaves(call(value)(arrays)), expected, strict=True):
            assert g.dtype == e.dtype, value
            np.testing.assert_array_equal(g, e, err_msg=repr(value))


def test_python_float_as_dtype_is_jax_default_without_a_warning():
    with jax.enable_x64(True):
        assert syntonic_jax.golden_gelu(X, dtype=float).dtype == jnp.float64
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert syntonic_jax.golden_gelu(X, dtype=float).dtype == jnp.float32


@pytest.mark.parametrize("target", [np.float32(2), np.float16(2), np.int64(2), jnp.array(2.0)])
def test_numbers_of_a_custom_mode(target):
    mode = GoldenNormMode.custom(target)
    assert (mode, type(mode.target_variance)) == (GoldenNormMode.custom(2.0), float)


@pytest.mark.parametrize("axis_name", ["batch", ["batch"], ("batch",), np.str_("batch"), []])
def test_names_of_mapped_axes(axis_name):
    def f(x):
        return syntonic_jax.golden_batch_norm(x, axis_name=axis_name)[1]

    means = jax.vmap(f, axis_name="batch")(jnp.stack([X, 2 * X]))
    assert bool((means[0] == means[1]).all()) == (axis_name != [])

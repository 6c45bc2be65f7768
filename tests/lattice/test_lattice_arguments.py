"""Kinds 10 and 11 on the lattice: what jnp takes is taken; a wrong argument is named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from syntonic_jax import GoldenArray, ResonantTensor
from syntonic_jax.lattice import snap_distance, stack, syntony, where

X = GoldenArray(np.arange(6, dtype="int32").reshape(2, 3), np.ones((2, 3), "int32"))
T = ResonantTensor(X)
OBJECTS = [
    "x",
    object(),
    np.array(["x"]),
    np.array([object()]),
    np.zeros(2, [("f", "i4")]),
    {},
    [1],
]
AXES = ["a", ["a"], 1.0, True, None, object(), np.array([0.5]), {0: 1}]
OPERATORS = ("+", "-", "*", "@", "==", "!=", "<", "<=", ">", ">=")


def operate(operator, x, y):
    return eval(f"x {operator} y", {"x": x, "y": y})


def same(x, y) -> bool:
    return bool((x == y).all())


# Function and argument as a message has them, the call, and values that it must not take.
WRONG = {
    **{
        f"GoldenArray {operator}: the other operand": (
            lambda y, operator=operator: operate(operator, X, y),
            [*OBJECTS, 1.0, np.ones(3), jnp.ones(3), True, None, np.bool_(True), 1j],
        )
        for operator in OPERATORS
    },
    "GoldenArray: a": (lambda a: GoldenArray(a, 1), [*OBJECTS, 1.0, None, True, jnp.ones(3)]),
    "GoldenArray: b": (lambda b: GoldenArray(1, b), [*OBJECTS, 1.0, None, True, jnp.ones(3)]),
    "GoldenArray.from_int: x": (GoldenArray.from_int, [*OBJECTS, 1.0, None, np.bool_(True)]),
    "GoldenArray.from_float: x": (GoldenArray.from_float, [*OBJECTS, 1, None, 1j]),
    "GoldenArray.to_float: dtype": (X.to_float, [[1], "x", np.array(1), {}, int, object()]),
    "GoldenArray.sum: axis": (
        X.sum,
        [*(a for a in AXES if a is not None), 2, -3, (0, 0), (0, "a")],
    ),
    "GoldenArray.sum: keepdims": (lambda k: X.sum(0, k), ["no", None, 1, np.array([True])]),
    "GoldenArray.reshape: shape": (
        X.reshape,
        ["a", 1.5, 5, (2, -3), (None, 3), [object()], (7, 0)],
    ),
    "GoldenArray.transpose: ax": (X.transpose, ["a", 1.0, 0, (0, 0), (0, 2), (0, None), (1, 0, 2)]),
    "GoldenArray.phi_power: n": (X.phi_power, ["a", 1.0, None, [1], 100, 10**30]),
    "stack: arrays": (stack, [3, None, [], [X, 1], [X, X[0]], "x"]),
    "stack: axis": (lambda axis: stack([X, X], axis), [*AXES, 3, -4]),
    "where: condition": (
        lambda c: where(c, X, X),
        [*OBJECTS, [True], 1, 0.0, None, np.ones((4, 3)) > 0],
    ),
    "where: .*y": (lambda y: where(True, X, y), [*OBJECTS, 1, None, stack([X[0]] * 4)]),
    "ResonantTensor: lattice": (ResonantTensor, [*OBJECTS, 1, None, jnp.ones(3, int)]),
    "ResonantTensor: precision": (
        lambda p: ResonantTensor(X, p),
        ["x", [1], 1.0, None, True, np.array("x"), 0, -1, 2**20 + 1, 10**30],
    ),
    "ResonantTensor.from_floats: x": (ResonantTensor.from_floats, [*OBJECTS, 1, None, 1j]),
    "ResonantTensor.from_floats: precision": (
        lambda p: ResonantTensor.from_floats(jnp.ones(3), p),
        ["x", [1], 1.0, None, np.array("x"), 0],
    ),
    "ResonantTensor.ones: shape": (ResonantTensor.ones, ["a", -1, (2, -1), 2.5, None, (object(),)]),
    "ResonantTensor.zeros: shape": (ResonantTensor.zeros, ["a", -1, 2.5, (None, 2), 10**30]),
    "ResonantTensor.flux: dtype": (T.flux, [[1], "x", np.array(1), int]),
    "ResonantTensor.to_floats: dtype": (T.to_floats, [[1], "x", np.array(1), int]),
    "ResonantTensor.with_values: values": (T.flux().with_values, [*OBJECTS, 1, None, jnp.ones(3)]),
    "syntony: x": (lambda x: syntony(x, jnp.ones(3)), [*OBJECTS, 1, None, 1j, jnp.ones(3, int)]),
    "syntony: mode_norms": (
        lambda norms: syntony(jnp.ones(3), norms),
        [*OBJECTS, 1, None, 1j, jnp.ones(4), jnp.ones((1, 3))],
    ),
    "snap_distance: x": (snap_distance, [*OBJECTS, 1, None, 1j]),
    "snap_distance: precision": (lambda p: snap_distance(1.0, p), ["x", [1], 1.0, None, 0]),
    "snap_distance: implementation": (
        lambda i: snap_distance(1.0, implementation=i),
        ["x", [1], 1, np.array("xla"), np.array(["xla", "cuda"]), {}],
    ),
    "GoldenArray.from_float: implementation": (
        lambda i: GoldenArray.from_float(1.0, implementation=i),
        ["x", [1], 1, np.array("xla"), np.array(["xla", "cuda"]), {}],
    ),
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments_are_named(argument):
    call, values = WRONG[argument]
    function, _, name = argument.rpartition(": ")
    for value in values:
        with pytest.raises((TypeError, ValueError)) as error:
            call(value)
        pattern = f"{re.escape(function)}: {name}"
        assert re.match(pattern, str(error.value)), (value, str(error.value))


@pytest.mark.parametrize("operator", OPERATORS)
def test_shapes_that_do_not_fit(operator):
    wrong = GoldenArray(np.ones((2, 2), "int32"), np.ones((2, 2), "int32"))
    for x, y in ((X, wrong), (X, np.ones((4, 2), "int32"))):
        message = rf"GoldenArray {re.escape(operator)}: the operands must have shapes.*\(2, 3\) and"
        with pytest.raises(ValueError, match=message):
            operate(operator, x, y)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda x, y: operate(operator, x, y))(x, y)
    if operator == "@":
        with pytest.raises(ValueError, match="GoldenArray @: the operands must have shapes"):
            X @ 3


def test_axes_of_every_integer_type():
    expected = X.sum(1)
    for axis in (1, np.int64(1), np.int8(1), np.uint8(1), np.array(1), jnp.int32(1), -1, (1,), [1]):
        assert same(X.sum(axis), expected)
        assert same(X.sum(axis=axis, keepdims=np.bool_(True)), expected[:, None])
    for axes in ((0, 1), [np.int64(1), np.int32(0)], np.array([0, 1]), (-1, 0)):
        assert same(X.sum(axes), X.sum())
    for axis in (np.int64(1), np.array(1), jnp.int32(1)):
        assert same(stack([X, X], axis), stack([X, X], 1))
    for axes in ((1, 0), [1, 0], (np.int64(1), np.int64(0)), np.array([1, 0]), None, (-1, 0)):
        assert same(X.transpose(axes), X.T)
    assert same(X.transpose(np.int64(1), jnp.int32(0)), X.T)
    for shape in ((3, 2), [3, np.int64(2)], (np.int32(3), -1)):
        assert same(X.reshape(shape), X.reshape(3, 2))
    assert same(X.phi_power(np.int64(3)), X.phi_power(3))
    assert same(X.phi_power(jnp.int32(3)), X.phi_power(3))


def test_precisions_of_every_integer_type():
    expected = ResonantTensor.from_floats(0.3, 7)
    for precision in (np.int64(7), np.uint8(7), np.array(7), jnp.int32(7)):
        tensor = ResonantTensor.from_floats(0.3, precision)
        assert (tensor.precision, type(tensor.precision)) == (7, int)
        assert same(tensor.lattice, expected.lattice)
        assert same(GoldenArray.from_float(0.3, precision), expected.lattice)
        assert snap_distance(0.3, precision) == snap_distance(0.3, 7)
    for shape in (3, np.int64(3), (3,), [3], np.array([3])):
        assert ResonantTensor.ones(shape).shape == (3,)


def test_traced_numbers_have_no_value_to_be_static():
    for f in (X.sum, X.phi_power, lambda n: snap_distance(1.0, n), lambda n: stack([X, X], n)):
        with pytest.raises(TypeError, match=r": (axis|n|precision) must be .*integer.*, got "):
            jax.jit(f)(1)


def test_conditions():
    condition = np.array([True, False, True])
    expected = where(condition, X, -X)
    assert same(where(jnp.asarray(condition), X, -X), expected)
    assert same(where(np.bool_(True), X, -X), X)
    assert same(jax.jit(where)(condition, X, -X), expected)


def test_matrices_and_shapes():
    matrix = np.array([[1, 2], [3, 4]]).view(np.matrix)
    x = GoldenArray(matrix, matrix)
    np.testing.assert_array_equal((x + matrix).a, 2 * np.asarray(matrix))
    np.testing.assert_array_equal(x.a, matrix)
    with pytest.raises(ValueError, match=r"GoldenArray\.reshape: shape does not fit"):
        x.reshape(3)
    for shape in (2**70, [2**62, 2**62]):
        with pytest.raises(ValueError, match=r"ResonantTensor\.ones: shape does not fit"):
            ResonantTensor.ones(shape)
    for shape in (True, [True]):
        with pytest.raises(TypeError, match=r"ResonantTensor\.zeros: shape must be of integers"):
            ResonantTensor.zeros(shape)
    with pytest.raises(TypeError, match="condition must be an array of booleans"):
        where(np.ma.array([True, False], mask=[0, 1]), x[0], x[1])

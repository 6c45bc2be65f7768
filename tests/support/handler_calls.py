"""Calls of every handler: one that is right, and what each must say of those that are not."""

import sys

import jax

from syntonic_jax import PhiResidualMode
from syntonic_jax._kernel_calls import Kernels
from syntonic_jax._operation import Operation

EXTRA = "extra"  # an operand or result that the call does not have


def floats(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


ROWS, VECTOR, PARAMETER = floats(6, 4), floats(6), floats(4)
INTEGERS = floats(6, 4, dtype="int32")
# Six rows of four channels in planes of five, reduced to three results for each channel.
PLANES, PARTS = floats(6, 4, 5), floats(3, 4)

# What is static of the declared operations; each takes what it knows.
PARAMS = {
    "mode": PhiResidualMode.PHI,
    "activation": "gelu",
    "epsilon": 1e-5,
    "scale_factor": 1.0,
    "trailing": 0,
    "ignored": -100,
    "dtype": "float32",
    "data_dtype": "float32",
}
KINDS = {"row": ROWS, "vector": VECTOR, "parameter": PARAMETER, "scalar": floats(1)}
NOT_FLOATING = {
    "mask": floats(6, 4, dtype="bool"),
    "labels": floats(6, dtype="int32"),
}


def calls_of(operation: Operation):
    """Of a declared operation: all its inputs and outputs, three parts of the sums over rows."""

    def array(value, prefix=""):
        array = NOT_FLOATING.get(value.name) or KINDS.get(value.kind)
        return prefix + value.name, array or floats(6, value.size)

    kernels = operation.kernels
    forward = (
        dict(map(array, operation.inputs)),
        dict(map(array, operation.outputs)),
        kernels.attributes(**PARAMS),
    )
    derivative = operation.derivative
    saved = dict(map(array, derivative.saved(**PARAMS)))
    cotangents = dict(array(value, "ct_") for value in derivative.outputs if not value.inner)
    gradients = dict(array(value, "d_") for value in derivative.inputs)
    sums = {f"d_{value.name}": PARTS for value in derivative.inputs if value.kind == "parameter"}
    # What the kernel takes at the least: of a few numbers for each part, or for each row beside it.
    scratch = floats(33 if operation.moved else 24)
    gradients |= sums | ({"scratch": scratch} if sums else {})
    backward = saved | cotangents, gradients, kernels.cotangent_attributes(**PARAMS)
    target = kernels.target or operation.name
    return {target: forward, f"{target}_cotangent": backward}


DECLARED = [
    value
    for name, module in list(sys.modules.items())
    if name.startswith("syntonic_jax.")
    for value in vars(module).values()
    if isinstance(value, Operation) and isinstance(value.kernels, Kernels)
]
# target: (operands, results, attributes) of a call that is right. The logarithm of a softmax comes
# behind the softmax, whose targets it has, with more arrays.
DERIVED = {
    target: call
    for operation in sorted(DECLARED, key=lambda operation: len(operation.outputs))
    for target, call in calls_of(operation).items()
}
CALLS = DERIVED | {
    "crystallize": ({"x": ROWS}, {"a": INTEGERS, "b": INTEGERS}, {"precision": 100}),
    "golden_batch_norm_moments": (
        {"x": PLANES, "scale": floats(1, 4), "bias": floats(1, 4)},
        {"mean": PARTS, "low": PARTS, "var": PARTS, "slope": PARTS, "shift": PARTS}
        | {"scratch": floats(48)},
        {"epsilon": 1e-5, "scale_factor": 1.0},
    ),
    "golden_batch_norm_sums": (
        {"x": PLANES, "mean": floats(1, 4), "low": floats(1, 4), "ct": PLANES},
        {"sum": PARTS, "product": PARTS, "scratch": floats(24)},
        {},
    ),
    "golden_batch_norm_normalise": (
        {"x": PLANES, "mean": PARTS, "slope": PARTS, "shift": PARTS},
        {"y": PLANES},
        {},
    ),
    "sum_of_squares": ({"x": ROWS}, {"sums": floats(3, 3), "scratch": floats(8)}, {}),
    "sum_of_squares_cotangent": (
        {"x": ROWS, "first": floats(3), "second": floats(3)},
        {"dx": ROWS},
        {},
    ),
}

SHAPE = r"must have the shape \(6, 4\) of {}, got \(4, 6\)"
HALF = floats(6, 4, dtype="float16")
HALF_SUMS = floats(3, 4, dtype="float16")
ALL_ROWS = ("identity", "residual", "y", "z", "ct_y", "ct_z", "d_identity", "d_residual")


# Of these any floating type will do.
FREE = {"x", "y", "ct_x", "ct_y"}


def wrong_arrays(target, operands, results, attributes):
    """Every array of a call in another shape and of another type; the message names it."""
    first = next(iter(operands))
    for name, array in (operands | results).items():
        half = floats(*array.shape, dtype="float16")
        if name not in NOT_FLOATING and name != first and name not in FREE:
            # Or the array of the wrong type gives the type, and another has the wrong one.
            wrong = f"({name} must be float32, got float16|must be float16, got float32)"
            yield target, {name: half}, wrong
        if name != "scratch":
            wrong = floats(*(n + 1 for n in array.shape), dtype=array.dtype)
            yield target, {name: wrong}, rf"syntonic_{target}: .*\b{name}\b"
    for name, value in attributes.items():
        if isinstance(value, float):
            yield target, {name: float("nan")}, f"attribute {name} must be finite, got nan"


# (target, what is changed, what the message says). None takes an entry away.
WRONG = [
    *(wrong for target, call in DERIVED.items() for wrong in wrong_arrays(target, *call)),
    ("phi_residual", {"residual": floats(4, 6)}, "residual " + SHAPE.format("identity")),
    ("phi_residual", {"residual": HALF}, "residual must be float32, got float16"),
    ("phi_residual", {"y": floats(4, 6)}, "y " + SHAPE.format("identity")),
    ("phi_residual", {"y": floats(6, 4, dtype="int32")}, "y must be float16, bfloat16, float32"),
    ("phi_residual", {"z": floats(24)}, r"z must have the shape \(6, 4\) of identity, got \(24,\)"),
    ("phi_residual", {"z": HALF}, "z must be float32, got float16"),
    ("phi_residual", {"identity": floats(6, 4, dtype="complex64")}, "identity must be float16"),
    ("phi_residual", {"residual": None}, "operand residual is missing"),
    ("phi_residual", {EXTRA: ROWS}, "takes no operand extra"),
    ("phi_residual", {"activation": 4}, r"attribute activation must lie in 0\.\.3, got 4"),
    ("phi_residual", {"activation": -1}, r"attribute activation must lie in 0\.\.3, got -1"),
    ("phi_residual", {"activation": 1.0}, "Wrong scalar data type: expected S32 but got F64"),
    ("phi_residual", {"sum_scale": float("nan")}, "attribute sum_scale must be finite, got nan"),
    ("phi_residual", {"residual_scale": float("inf")}, "residual_scale must be finite, got inf"),
    ("phi_residual", {"sum_scale": None}, "Wrong number of attributes: expected 5 but got 4"),
    ("phi_residual_cotangent", {"z": floats(4, 6)}, "z " + SHAPE.format("ct_y")),
    ("phi_residual_cotangent", {"z": HALF}, "z must be float32, got float16"),
    ("phi_residual_cotangent", {"z": HALF, "activation": 1}, "z must be float32"),
    ("phi_residual_cotangent", {"d_residual": HALF}, "d_residual must be float32, got float16"),
    ("phi_residual_cotangent", {"d_identity": floats(4, 6)}, "d_identity " + SHAPE.format("ct_y")),
    ("phi_residual_cotangent", {"d_residual": floats(4, 6)}, "d_residual " + SHAPE.format("ct_y")),
    ("phi_residual_cotangent", {"activation": 4}, r"activation must lie in 0\.\.3, got 4"),
    ("phi_residual_cotangent", {"activation": 0}, "takes no operand z"),  # nothing is saved
    ("phi_residual_cotangent", {"z": None}, "operand z is missing"),
    ("phi_residual_cotangent", {"identity_scale": float("nan")}, "identity_scale must be finite"),
    ("phi_residual_cotangent", {"residual_scale": float("nan")}, "residual_scale must be finite"),
    ("crystallize", {"a": floats(4, 6, dtype="int32")}, "a " + SHAPE.format("x")),
    ("crystallize", {"b": floats(4, 6, dtype="int32")}, "b " + SHAPE.format("x")),
    ("crystallize", {"a": ROWS}, "a must be int32"),
    ("crystallize", {"b": floats(6, 4, dtype="int64")}, "b must be int32"),
    ("crystallize", {"x": INTEGERS}, "x must be float16, bfloat16, float32 or float64"),
    ("crystallize", {"b": None}, "result b is missing"),
    ("crystallize", {EXTRA: ROWS}, "takes no operand extra"),
    ("crystallize", {"precision": 0}, r"attribute precision must lie in 1\.\.1048576, got 0"),
    ("crystallize", {"precision": 2**20 + 1}, r"precision must lie in 1\.\.1048576, got 1048577"),
    ("golden_gelu", {EXTRA: ROWS}, "takes no operand extra"),
    (
        "sum_of_squares",
        {"sums": floats(15)},
        "sums has 15 elements, not three for each of some parts",
    ),
    (
        "sum_of_squares",
        {"sums": floats(4)},
        "sums has 4 elements, not three for each of some parts",
    ),
    (
        "sum_of_squares",
        {"sums": floats(0)},
        "sums has 0 elements, not three for each of some parts",
    ),
    ("sum_of_squares", {"sums": floats(9, dtype="float64")}, "sums must be float32, got float64"),
    ("sum_of_squares", {"scratch": floats(8, dtype="bfloat16")}, "scratch must be float32"),
    ("sum_of_squares", {"scratch": None}, "result scratch is missing"),
    (
        "sum_of_squares_cotangent",
        {"first": floats(5), "second": floats(5)},
        "first has 5 elements, which do not divide",
    ),
    (
        "sum_of_squares_cotangent",
        {"first": floats(0), "second": floats(0)},
        "first has 0 elements, which do not divide",
    ),
    ("sum_of_squares_cotangent", {"second": floats(4)}, "second must have the shape .* of first"),
    (
        "sum_of_squares_cotangent",
        {"first": floats(3, dtype="float16")},
        "first must be float32, got",
    ),
    (
        "sum_of_squares_cotangent",
        {"second": floats(3, dtype="float64")},
        "second must be float32, got",
    ),
    ("sum_of_squares_cotangent", {"dx": floats(4, 6)}, "dx " + SHAPE.format("x")),
    ("sum_of_squares_cotangent", {"dx": HALF}, "dx must be float32, got float16"),
    ("sum_of_squares_cotangent", {EXTRA: ROWS}, "takes no operand extra"),
    ("phi_residual_layernorm", {"scale": floats(5)}, r"scale must have rows of 4 .*, got \(5,\)"),
    ("phi_residual_layernorm", {"scale": floats()}, r"scale must have rows, got \(\)"),
    ("phi_residual_layernorm", {"bias": floats(4, dtype="bfloat16")}, "bias must be float32"),
    (
        "phi_residual_layernorm",
        {"bias": floats(5, 4)},
        "bias has 5 rows, which do not divide the 6",
    ),
    ("phi_residual_layernorm", {"bias": floats(2, 4)}, "bias must have 1 rows, got 2"),
    (
        "phi_residual_layernorm",
        {"bias": floats(0, 4)},
        "bias has 0 rows, which do not divide the 6",
    ),
    ("phi_residual_layernorm", {"epsilon": -1e-5}, "attribute epsilon must not be negative"),
    ("phi_residual_layernorm", {"scale_factor": float("inf")}, "scale_factor must be finite"),
    (
        "phi_residual_layernorm",
        {"statistics": floats(6, 2)},
        r"statistics must have 18 elements, got \(6, 2\)",
    ),
    ("phi_residual_layernorm_cotangent", {"scale": floats(4, 4)}, "scale has 4 rows, which do not"),
    ("phi_residual_layernorm_cotangent", {"scale": floats(2, 4)}, "no multiple of the 2 rows of"),
    (
        "phi_residual_layernorm_cotangent",
        {"d_scale": floats(3, 8), "d_bias": floats(3, 8)},
        "d_sca",
    ),
    ("phi_residual_layernorm_cotangent", {"d_bias": floats(2, 4)}, "of d_scale, got "),
    (
        "phi_residual_layernorm_cotangent",
        {"d_scale": floats(4, 4), "d_bias": floats(4, 4)},
        "d_scale has 4 rows, which do not divide the 6 rows of z",
    ),
    ("phi_residual_layernorm_cotangent", {"scratch": floats(24, dtype="float64")}, "scratch must"),
    ("phi_residual_layernorm_cotangent", {"scratch": None}, "result scratch is missing"),
    ("phi_residual_layernorm_cotangent", {"statistics": VECTOR}, "must have 18 elements"),
    ("golden_layer_norm", {"scale": floats(5)}, r"scale must have rows of 4 .*, got \(5,\)"),
    ("golden_layer_norm", {"bias": floats(4, dtype="float16")}, "bias must be float32"),
    ("golden_layer_norm", {"epsilon": -1.0}, "attribute epsilon must not be negative"),
    ("golden_layer_norm", {"epsilon": float("inf")}, "attribute epsilon must be finite"),
    ("golden_layer_norm_cotangent", {"scale": floats(2, 4)}, "no multiple of the 2 rows of"),
    ("golden_layer_norm_cotangent", {"d_bias": floats(2, 4)}, "of d_scale, got "),
    (
        "golden_layer_norm_cotangent",
        {"d_scale": floats(4, 4), "d_bias": floats(4, 4)},
        "d_scale has 4 rows, which do not divide the 6 rows of x",
    ),
    ("golden_layer_norm_cotangent", {"scratch": None}, "result scratch is missing"),
    ("golden_layer_norm_cotangent", {"scale_factor": float("inf")}, "scale_factor must be"),
    ("golden_batch_norm_moments", {"x": floats(6, 3, 5)}, "x must have 4 channels before its last"),
    ("golden_batch_norm_moments", {"x": floats(4)}, "x must have 4 channels before its last"),
    ("golden_batch_norm_moments", {"x": floats(7, 4, 5)}, "mean has 3 rows, which do not divide"),
    ("golden_batch_norm_moments", {"x": floats(6, 4, 0)}, "x must have rows of at least one"),
    (
        "golden_batch_norm_moments",
        {"low": floats(4, 3)},
        r"low must have the shape \(3, 4\) of mean",
    ),
    ("golden_batch_norm_moments", {"var": floats(12)}, r"var must have the shape \(3, 4\) of mean"),
    ("golden_batch_norm_moments", {"slope": floats(2, 4)}, r"slope must have the shape \(3, 4\)"),
    ("golden_batch_norm_moments", {"scale": floats(2, 4)}, "scale has 2 rows, of which the 3 rows"),
    ("golden_batch_norm_moments", {"bias": floats(3, 4)}, r"bias must have the shape \(1, 4\)"),
    ("golden_batch_norm_moments", {"bias": HALF_SUMS}, "bias must be float32, got float16"),
    ("golden_batch_norm_moments", {"scale_factor": float("inf")}, "scale_factor must be finite"),
    ("golden_batch_norm_moments", {"var": HALF_SUMS}, "var must be float32, got float16"),
    ("golden_batch_norm_moments", {"scratch": floats(47)}, "scratch must have at least 48"),
    ("golden_batch_norm_moments", {"scratch": None}, "result scratch is missing"),
    ("golden_batch_norm_moments", {"epsilon": -1.0}, "attribute epsilon must not be negative"),
    ("golden_batch_norm_moments", {"epsilon": float("nan")}, "attribute epsilon must be finite"),
    ("golden_batch_norm_normalise", {"y": floats(6, 5, 4)}, r"y must have the shape \(6, 4, 5\)"),
    ("golden_batch_norm_normalise", {"y": floats(6, 4, 5, dtype="int32")}, "y must be float16"),
    ("golden_batch_norm_normalise", {"slope": floats(1, 4)}, r"slope must have the shape \(3, 4\)"),
    ("golden_batch_norm_normalise", {"shift": HALF_SUMS}, "shift must be float32, got float16"),
    ("golden_batch_norm_normalise", {"x": floats(6, 5, 4), "y": floats(6, 5, 4)}, "4 channels"),
    (
        "golden_batch_norm_normalise",
        {"mean": floats(4, 4), "slope": floats(4, 4), "shift": floats(4, 4)},
        "mean has 4 rows, which do not divide the 6 of x",
    ),
    ("golden_batch_norm_normalise", {"shift": None}, "operand shift is missing"),
    ("golden_batch_norm_sums", {"ct": floats(6, 5, 4)}, r"ct must have the shape \(6, 4, 5\) of x"),
    (
        "golden_batch_norm_sums",
        {"ct": floats(6, 4, 5, dtype="float16")},
        "ct must be float32, got float16",
    ),
    ("golden_batch_norm_sums", {"mean": floats(1, 5), "low": floats(1, 5)}, "rows of 4 elements"),
    ("golden_batch_norm_sums", {"low": floats(2, 4)}, r"low must have the shape \(1, 4\) of mean"),
    (
        "golden_batch_norm_sums",
        {"mean": floats(2, 4), "low": floats(2, 4)},
        "mean has 2 rows, of which the 3 rows of sum are no multiple",
    ),
    ("golden_batch_norm_sums", {"product": floats(4, 3)}, r"product must have the shape \(3, 4\)"),
    ("golden_batch_norm_sums", {"sum": HALF_SUMS}, "sum must be float32, got float16"),
    ("golden_batch_norm_sums", {"scratch": floats(23)}, "scratch must have at least 24"),
    (
        "softmax",
        {"x": floats(), "weights": floats(), "mask": floats(dtype="bool")},
        r"x must have rows, got \(\)",
    ),
    ("softmax", {"x": floats(6, 0), "weights": floats(6, 0)}, "mask must have the shape"),
    ("softmax", {"bias": floats(5)}, r"bias must have rows of 4 elements, got \(5,\)"),
    ("softmax", {"bias": floats(4, dtype="float16")}, "bias must be float32, got float16"),
    ("softmax", {"bias": floats(4, 4)}, "scale must have 4 elements"),
    ("softmax", {"bias": floats(4, 4), "scale": floats(4)}, "4 rows, which do not divide the 6"),
    ("softmax", {"scale": floats(1, dtype="float64")}, "scale must be float32, got float64"),
    ("softmax", {"weights": HALF}, "weights must be float32, got float16"),
    ("softmax", {"weights": floats(4, 6)}, "weights " + SHAPE.format("x")),
    ("softmax", {"mask": floats(4, 6, dtype="bool")}, "mask " + SHAPE.format("x")),
    ("softmax", {"mask": floats(6, 4, dtype="int8")}, "mask must be bool"),
    ("softmax", {"scale": None}, "operand scale is missing"),
    ("softmax", {"log_sum": None}, "result log_sum is missing"),
    ("softmax", {"max": None}, "has no result log_sum"),
    ("softmax", {"y": HALF}, "y must be float32, got float16"),
    ("softmax", {"y": floats(6, 5)}, r"y must have 24 elements, got \(6, 5\)"),
    ("softmax", {"max": floats(5)}, r"max must have 6 elements, got \(5,\)"),
    ("softmax", {"log_sum": floats(6, dtype="float16")}, "log_sum must be float32"),
    ("softmax", {"inner": 2}, r"inner must lie in 0\.\.1, got 2"),
    ("softmax", {"inner": 1}, r"bias must have rows of 6 elements, got \(4,\)"),
    ("softmax", {"log": 2}, r"log must lie in 0\.\.1, got 2"),
    ("softmax_cotangent", {"x": None}, "operand y is missing"),
    ("softmax_cotangent", {"x": None, "y": ROWS}, "takes no bias and no weights beside y"),
    ("softmax_cotangent", {"ct_y": floats(6, 5)}, "ct_y must have 24 elements"),
    ("softmax_cotangent", {"ct_y": HALF}, "ct_y must be float32, got float16"),
    ("softmax_cotangent", {"max": floats(7)}, "max must have 6 elements"),
    ("softmax_cotangent", {"d_z": HALF}, "d_z must be float32, got float16"),
    ("softmax_cotangent", {"d_bias": HALF_SUMS}, "d_bias must be float32, got float16"),
    ("softmax_cotangent", {"d_bias": floats(4, 4)}, "d_bias has 4 rows, which do not divide"),
    ("softmax_cotangent", {"scratch": floats(8)}, "scratch must have at least 9 elements"),
    ("softmax_cotangent", {"scratch": None}, "result scratch is missing"),
    ("cross_entropy", {"labels": floats(5, dtype="int32")}, "labels must have 6 elements"),
    ("cross_entropy", {"labels": floats(6)}, "labels must be int32"),
    ("cross_entropy", {"labels": floats(6, dtype="int64")}, "labels must be int32"),
    ("cross_entropy", {"loss": floats(6, dtype="float16")}, "loss must be float32"),
    ("cross_entropy", {"loss": floats(4)}, "loss must have 6 elements"),
    ("cross_entropy", {"ignored": 1}, r"ignored must lie in -2147483648\.\.0, got 1"),
    ("cross_entropy_cotangent", {"ct_loss": ROWS}, r"ct_loss must have 6 elements, got \(6, 4\)"),
    ("cross_entropy_cotangent", {"d_z": floats(6, 5)}, "d_z must have 24 elements"),
    ("cross_entropy_cotangent", {"d_bias": floats(2, 3)}, "d_bias must have rows of 4"),
    *(
        (target, dict.fromkeys(ALL_ROWS, shape), message)
        for target in ("phi_residual_layernorm", "phi_residual_layernorm_cotangent")
        for shape, message in [
            (floats(), r"must have rows, got \(\)"),
            (floats(6, 0), r"must have rows of at least one element, got \(6, 0\)"),
        ]
    ),
]

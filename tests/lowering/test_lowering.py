"""The CUDA lowering, read from StableHLO on a machine without a GPU, and what jaxprs keep."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from lowered import (
    PARAMETER,
    ROWS,
    WIDTH,
    batch,
    check_call,
    custom_calls,
    dims,
    gradients,
    kept,
    layernorm,
    number,
    primitives,
    stablehlo,
)

from syntonic_jax import (
    PHI_INV,
    GoldenArray,
    crystallize,
    golden_gelu,
    phi_residual,
    phi_residual_gelu,
    phi_residual_layernorm,
    phi_residual_relu,
    residual_component_norm,
)

# --- forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "code"), [(None, 0), ("relu", 1), ("gelu", 2), ("golden_gelu", 3)]
)
@pytest.mark.parametrize("mode", oracles.MODES)
def test_phi_residual(mode, activation, code):
    sum_scale, residual_scale = oracles.MODES[mode]
    (call,) = custom_calls(
        lambda x, r: phi_residual(x, r, mode, activation=activation, implementation="cuda"),
        ROWS,
        ROWS,
    )
    check_call(
        call,
        "syntonic_phi_residual",
        dict.fromkeys(["identity", "residual"], "6x4x8x1xbf16"),
        {"y": "6x4x8x1xbf16"},
        sum_scale=sum_scale,
        residual_scale=residual_scale,
        activation=code,
    )


@pytest.mark.parametrize("mode", oracles.MODES)
def test_phi_residual_layernorm(mode):
    sum_scale, residual_scale = oracles.MODES[mode]
    common = {"sum_scale": sum_scale, "residual_scale": residual_scale}
    f = functools.partial(layernorm, mode=mode)
    target, rows = "syntonic_phi_residual_layernorm", "6x4x8xbf16"

    # What is not asked for is not computed: y alone.
    (call,) = custom_calls(f, ROWS, ROWS)
    check_call(
        call, target, {"identity": rows, "residual": rows}, {"y": rows},
        **common, epsilon=1e-5, scale_factor=1.0,
    )  # fmt: skip
    (call,) = custom_calls(
        functools.partial(f, return_sum=True, epsilon=0.25, target_variance=4.0, dtype="float32"),
        ROWS,
        ROWS,
        PARAMETER,
        PARAMETER,
    )
    check_call(
        call, target,
        {"identity": rows, "residual": rows, "scale": "8xf32", "bias": "8xf32"},
        {"y": "6x4x8xf32", "z": rows},
        **common, epsilon=0.25, scale_factor=2.0,
    )  # fmt: skip
    (call,) = custom_calls(lambda x, r, b: f(x, r, None, b), ROWS, ROWS, PARAMETER)
    assert list(call.named("operands")) == ["identity", "residual", "bias"]


def test_golden_gelu():
    (call,) = custom_calls(functools.partial(golden_gelu, implementation="cuda"), ROWS)
    rows = "6x4x8x1xbf16"
    check_call(call, "syntonic_golden_gelu", {"x": rows}, {"y": rows})


def test_crystallize():
    f = functools.partial(crystallize, implementation="cuda")
    (call,) = custom_calls(f, ROWS)
    rows = "6x4x8x1xbf16"
    check_call(call, "syntonic_crystallize", {"x": rows}, {"y": rows}, precision=100)
    (call,) = custom_calls(functools.partial(f, precision=7, dtype="float32"), ROWS)
    check_call(call, "syntonic_crystallize", {"x": rows}, {"y": "6x4x8x1xf32"}, precision=7)
    # The coefficients instead of the value: one call for both.
    (call,) = custom_calls(lambda x: GoldenArray.from_float(x, 7, implementation="cuda"), ROWS)
    coefficients = dict.fromkeys(["a", "b"], "6x4x8x1xi32")
    check_call(call, "syntonic_crystallize", {"x": rows}, coefficients, precision=7)
    # Straight-through: the gradient is the cotangent.
    assert custom_calls(gradients(f, 0), ROWS)[1:] == []


def test_residual_component_norm():
    f = functools.partial(residual_component_norm, implementation="cuda")
    (call,) = custom_calls(f, ROWS)
    assert call.target == "syntonic_sum_of_squares"
    assert call.results[0] == "1x1x3xf32"  # one partial of three sums on one device


@pytest.mark.parametrize("epsilon", [0.1, 1 / 3, 1e-12])
def test_numbers_travel_as_float64(epsilon):
    (call,) = custom_calls(functools.partial(layernorm, epsilon=epsilon), ROWS, ROWS)
    assert number(call.attributes["epsilon"]) == pytest.approx(epsilon, rel=1e-15)
    (call,) = custom_calls(functools.partial(layernorm, target_variance="golden"), ROWS, ROWS)
    assert number(call.attributes["scale_factor"]) == pytest.approx(PHI_INV**0.5, rel=1e-15)


@pytest.mark.parametrize(
    "f", [layernorm, functools.partial(phi_residual_gelu, implementation="cuda")]
)
def test_typed_ffi(f):
    """The StableHLO text does not show the version of the calling convention; HLO does."""
    text = stablehlo(f, ROWS, ROWS, dialect="hlo")
    calls = [line for line in text.splitlines() if "custom_call_target" in line]
    assert len(calls) == 1
    assert 'custom_call_target="syntonic_' in calls[0]
    assert "api_version=API_VERSION_TYPED_FFI" in calls[0]


def test_nothing_is_launched_for_no_rows():
    rows = jax.ShapeDtypeStruct((3, 0, WIDTH), jnp.bfloat16)
    assert custom_calls(gradients(layernorm, 0, 1, 2), rows, rows, PARAMETER) == []
    for f, count in (
        (phi_residual, 2),
        (phi_residual_gelu, 2),
        (golden_gelu, 1),
        (crystallize, 1),
        (residual_component_norm, 1),
    ):
        f = functools.partial(f, implementation="cuda")
        assert custom_calls(gradients(f, 0), *[rows] * count) == []


# --- backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "code"), [("relu", 1), ("gelu", 2), ("golden_gelu", 3)])
def test_phi_residual_gradient(activation, code):
    def f(x, r, mode="phi"):
        return phi_residual(x, r, mode, activation=activation, implementation="cuda")

    rows = "6x4x8x1xbf16"
    forward, backward = custom_calls(gradients(f, 0, 1), ROWS, ROWS)
    assert forward.target == "syntonic_phi_residual"
    # relu needs y alone, the others z.
    assert forward.results == [rows] * (1 if activation == "relu" else 2)
    check_call(
        backward, "syntonic_phi_residual_cotangent",
        {"y" if activation == "relu" else "z": rows, "ct_y": rows},
        {"d_identity": rows, "d_residual": rows},
        identity_scale=1.0, residual_scale=PHI_INV, activation=code,
    )  # fmt: skip
    for argnum, name in enumerate(["d_identity", "d_residual"]):
        _, backward = custom_calls(gradients(f, argnum), ROWS, ROWS)
        assert backward.named("results") == {name: rows}
    # Equal gradients share a buffer.
    for mode in ("standard", "phi_symmetric"):
        _, backward = custom_calls(gradients(functools.partial(f, mode=mode), 0, 1), ROWS, ROWS)
        assert backward.results == [rows]


def test_plain_sum_gradient():
    """Nothing is saved, and a branch that is added as it is gets the cotangent itself."""

    def f(x, r, mode="phi", dtype=None):
        return phi_residual(x, r, mode, dtype=dtype, implementation="cuda")

    def backward(*argnums, **options):
        return custom_calls(gradients(functools.partial(f, **options), *argnums), ROWS, ROWS)

    one = "6x4x8x1xbf16"
    target, common = "syntonic_phi_residual_cotangent", {"activation": 0}
    common |= {"identity_scale": 1.0, "residual_scale": PHI_INV}
    for argnums in ((0, 1), (1,)):
        (call,) = backward(*argnums)
        check_call(call, target, {"ct_y": one}, {"d_residual": one}, **common)
    assert backward(0) == []
    assert backward(0, 1, mode="standard") == []
    # Equal gradients share a buffer.
    common["identity_scale"] = PHI_INV
    for argnums, name in (((0, 1), "d_identity"), ((0,), "d_identity"), ((1,), "d_residual")):
        (call,) = backward(*argnums, mode="phi_symmetric")
        check_call(call, target, {"ct_y": one}, {name: one}, **common)
    # A cotangent of another type is none of these gradients.
    wide = "6x4x8x1xf32"
    common["identity_scale"] = 1.0
    (call,) = backward(0, 1, dtype="float32")
    check_call(call, target, {"ct_y": wide}, {"d_identity": one, "d_residual": one}, **common)

    # Transposed by one operand: for that alone.
    def transposed(ct):
        of_identity = functools.partial(f, r=jnp.zeros(ROWS.shape, ROWS.dtype), dtype="float32")
        return jax.linear_transpose(of_identity, ROWS)(ct)

    call = custom_calls(transposed, jax.ShapeDtypeStruct(ROWS.shape, "float32"))[-1]
    check_call(call, target, {"ct_y": wide}, {"d_identity": one}, **common)


def test_residual_component_norm_gradient():
    f = functools.partial(residual_component_norm, implementation="cuda")
    forward, backward = custom_calls(gradients(f, 0), ROWS)
    assert forward.target == "syntonic_sum_of_squares"
    rows = "6x4x8x1xbf16"
    operands = {"x": rows, "first": "1xf32", "second": "1xf32"}
    check_call(backward, "syntonic_sum_of_squares_cotangent", operands, {"dx": rows})
    # For every example a norm of its own.
    forward, backward = custom_calls(jax.vmap(gradients(f, 0)), ROWS)
    assert forward.results[0] == "6x1x3xf32"
    assert backward.operands[1:] == ["6x1x1xf32", "6x1x1xf32"]


def test_golden_gelu_gradient():
    f = functools.partial(golden_gelu, implementation="cuda")
    calls = custom_calls(gradients(f, 0), ROWS)
    # The derivative reads x alone: the forward call is left to XLA to drop.
    assert [call.target for call in calls][-1] == "syntonic_golden_gelu_cotangent"
    rows = "6x4x8x1xbf16"
    operands = {"x": rows, "ct_y": rows}
    check_call(calls[-1], "syntonic_golden_gelu_cotangent", operands, {"d_x": rows})


@pytest.mark.parametrize("return_sum", [False, True])
def test_phi_residual_layernorm_gradient(return_sum):
    f = functools.partial(layernorm, return_sum=return_sum, target_variance=4.0)
    forward, backward = custom_calls(gradients(f, 0, 1, 2, 3), ROWS, ROWS, PARAMETER, PARAMETER)
    assert forward.target == "syntonic_phi_residual_layernorm"
    assert forward.results == ["6x4x8xbf16", "6x4x8xbf16", "6x4x3xf32"]
    assert list(forward.named("results")) == ["y", "z", "statistics"]
    rows, statistics = "1x1x24x8xbf16", "1x1x24x3xf32"
    results = backward.named("results")
    assert re.fullmatch(r"\d+xf32", results["scratch"])
    check_call(
        backward,
        "syntonic_phi_residual_layernorm_cotangent",
        {"z": rows, "statistics": statistics, "scale": "8xf32", "ct_y": rows}
        | ({"ct_z": rows} if return_sum else {}),
        {"d_identity": rows, "d_residual": rows}
        | {"d_scale": "1x1x8xf32", "d_bias": "1x1x8xf32"}  # one partial sum on one device
        | {"scratch": results["scratch"]},
        identity_scale=1.0,
        residual_scale=PHI_INV,
        scale_factor=2.0,
    )


def test_only_the_gradients_asked_for():
    f = functools.partial(layernorm, mode="standard")
    operands = ROWS, ROWS, PARAMETER, PARAMETER
    for argnums, results in [
        ((0,), ["d_identity"]),
        ((1,), ["d_residual"]),
        ((0, 1), ["d_identity"]),  # the gradients are equal
        ((2,), ["d_scale", "scratch"]),  # for sums over rows
        ((3,), ["d_bias", "scratch"]),
        ((0, 3), ["d_identity", "d_bias", "scratch"]),
    ]:
        _, backward = custom_calls(gradients(f, *argnums), *operands)
        assert list(backward.named("results")) == results


def test_kept_for_the_backward_pass():
    rows, statistics = ("bfloat16", (6, 4, WIDTH)), ("float32", (6, 4, 3))
    parameter = ("float32", (WIDTH,))
    assert kept(layernorm, ROWS, ROWS) == [rows, statistics]
    assert kept(layernorm, ROWS, ROWS, PARAMETER, PARAMETER) == [rows, statistics, parameter]
    for function in (phi_residual_relu, phi_residual_gelu):
        assert kept(function, ROWS, ROWS) == [rows]
    assert kept(golden_gelu, ROWS) == [rows]
    assert kept(phi_residual, ROWS, ROWS) == []


def test_gradient_is_one_forward_and_one_cotangent():
    operands = ROWS, ROWS, PARAMETER, PARAMETER
    stem = "phi_residual_layernorm"
    for f in (layernorm, phi_residual_layernorm):
        assert primitives(gradients(f, 0, 1, 2, 3), *operands) == [stem, stem + "_cotangent"]
    for f in (phi_residual_relu, phi_residual_gelu):
        expected = ["phi_residual", "phi_residual_cotangent"]
        assert primitives(gradients(f, 0, 1), ROWS, ROWS) == expected
    assert "golden_gelu_tangent" not in primitives(gradients(golden_gelu, 0), ROWS)
    assert primitives(gradients(phi_residual, 0, 1), ROWS, ROWS) == expected
    expected = ["residual_component_norm", "residual_component_norm_cotangent"]
    assert primitives(gradients(residual_component_norm, 0), ROWS) == expected


# --- batching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [(0, 0, None, None), (0, None, None, 0), (None, None, 0, 0)])
def test_vmap_is_one_call(mapped):
    operands = [ROWS, ROWS, PARAMETER, PARAMETER]
    operands = [batch(x) if axis == 0 else x for x, axis in zip(operands, mapped, strict=True)]
    (call,) = custom_calls(jax.vmap(layernorm, mapped), *operands)
    assert call.operands[0].endswith("x8xbf16")
    assert np.prod(dims(call.operands[0])) == 5 * 192
    forward, backward = custom_calls(jax.vmap(gradients(layernorm, 0, 1, 2, 3), mapped), *operands)
    assert forward.target + "_cotangent" == backward.target
    # A gradient of the parameters for each of the five examples.
    d_scale = backward.results[2]
    assert np.prod(dims(d_scale)) == 5 * WIDTH

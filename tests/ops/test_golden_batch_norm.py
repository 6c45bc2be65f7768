"""golden_batch_norm and its inference: transformations, types, what they refuse.

Their accuracy is in test_golden_batch_norm_accuracy.py and test_golden_batch_norm_inference.py,
mapped axes in test_golden_batch_norm_mapped.py.
"""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from battery import Operation

from syntonic_jax import (
    PHI_INV,
    GoldenNormMode,
    golden_batch_norm,
    golden_batch_norm_inference,
    golden_layer_norm,
    output_statistics,
    phi_residual_layernorm,
)

pytestmark = pytest.mark.usefixtures("x64")

EPSILON = 0.1  # large beside the variance, and not a float32
VARIANCES = {"golden": oracles.PHI_INV, "standard": 1.0, 2.5: 2.5}


def mask_of(shape):
    """Some of every row but the first, which is whole: no channel is without elements."""
    kept = 7 * np.arange(np.prod(shape, dtype=int)).reshape(shape) % 5 < 3
    kept[:1] = True
    return kept


def over_lead(x, values):
    return jnp.mean(x, tuple(range(x.ndim - 1)), where=values, keepdims=True)


def normalised(centred, var, scale, bias, variance):
    y = centred / jnp.sqrt(var + EPSILON) * np.sqrt(variance).item()
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def formula(x, scale=None, bias=None, *, masked, variance):
    """Over the last axis; where the layout is another, the call takes x there and y back."""
    kept = mask_of(x.shape) if masked else np.ones(x.shape, bool)
    mean = over_lead(x, kept)
    var = over_lead((x - mean) ** 2, kept)
    return normalised(x - mean, var, scale, bias, variance), mean.ravel(), var.ravel()


def inference_formula(x, mean, var, scale=None, bias=None, *, variance):
    return normalised(x - mean, var, scale, bias, variance)


# Layouts: rows [*lead, width] to an array of another layout, its feature axes, and y back.


def channels_first(x):
    return jnp.moveaxis(x, -1, min(1, x.ndim - 1))


def from_channels_first(y):
    return jnp.moveaxis(y, min(1, y.ndim - 1), -1)


def first_and_last(x):
    """Features along two axes that are not neighbours: [a, *lead, b], a * b = width."""
    width = x.shape[-1]
    a = 2 if width % 2 == 0 else 1
    return jnp.moveaxis(x.reshape(*x.shape[:-1], a, width // a), -2, 0)


def from_first_and_last(y):
    y = jnp.moveaxis(y, 0, -2)
    return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])


LAYOUTS = {
    "last": (lambda x: x, lambda x: -1, lambda y: y),
    "first": (channels_first, lambda x: min(1, x.ndim - 1), from_channels_first),
    "both": (first_and_last, lambda x: (-1, 0), from_first_and_last),
}


def laid_out(layout, f, x, parameters, **options):
    there, axis, back = LAYOUTS[layout]
    moved = there(x)
    shape = (moved.shape[0], moved.shape[-1]) if layout == "both" else x.shape[-1:]
    parameters = {name: value.reshape(shape) for name, value in parameters.items()}
    results = f(moved, **parameters, axis=axis(moved), epsilon=EPSILON, **options)
    if not isinstance(results, tuple):
        return back(results)
    y, *statistics = results
    for s in statistics:
        assert s.shape == shape
    return back(y), *(s.reshape(x.shape[-1:]) for s in statistics)


def operation(
    label,
    parameters=("scale", "bias"),
    layout="last",
    *,
    lead=(3,),
    target_variance="golden",
    masked=False,
    inference=False,
):
    """`parameters` names the operands that follow x."""

    def named(values):
        return dict(zip(parameters, values, strict=True))

    def call(x, *values, **more):
        if masked:
            more["where"] = LAYOUTS[layout][0](jnp.asarray(mask_of(x.shape)))
        f = golden_batch_norm_inference if inference else golden_batch_norm
        return laid_out(layout, f, x, named(values), target_variance=target_variance, **more)

    def reference(x, *values):
        variance = VARIANCES[target_variance]
        if inference:
            return inference_formula(x, **named(values), variance=variance)
        return formula(x, **named(values), masked=masked, variance=variance)

    def positive_variance(x, *values):
        return x, *(
            jnp.abs(v) + 0.25 if name == "var" else v
            for name, v in zip(parameters, values, strict=True)
        )

    return Operation(
        label,
        "golden_batch_norm_inference" if inference else "golden_batch_norm",
        call,
        reference,
        ("rows",) + ("par",) * len(parameters),
        # Statistics that are given make no NaN of infinities: one is put in. The gradients meet it
        # where they widen x.
        "golden_batch_norm_normalise|convert_element_type" if inference else "golden_batch_norm",
        lead=lead,
        along="nothing" if inference else "lead",
        statistics=0 if inference else 2,
        bad=(jnp.nan,) if inference else (-jnp.inf,),
        adjust=positive_variance,
    )


OPERATIONS = [
    operation("scale-bias"),
    operation("channels-last", (), lead=(2, 3, 2), target_variance=2.5),
    operation("channels-first", layout="first", lead=(2, 3, 2), target_variance="standard"),
    operation("masked", ("scale", "bias"), "first", lead=(3, 2), masked=True),
    operation("two-axes", ("scale",), "both", lead=(3, 2)),
    operation("inference", ("mean", "var", "scale"), inference=True),
    operation("inference-first", ("mean", "var", "bias"), "first", lead=(2, 3, 2), inference=True),
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS[2:3]
    variants = OPERATIONS[3:6:2]


class TestTypes(battery.Types):
    operations = OPERATIONS[1:2]
    variants = OPERATIONS[6:]


class TestBadInput(battery.BadInput):
    operations = OPERATIONS[::5]


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variance"), [("golden", PHI_INV), ("standard", 1.0)])
def test_modes(name, variance):
    mode = GoldenNormMode(name)
    assert (mode.target_variance, mode.scale_factor) == (variance, variance**0.5)
    custom = GoldenNormMode.custom(variance)
    assert (custom.target_variance, custom.scale_factor) == (variance, variance**0.5)
    assert GoldenNormMode.custom(0.25).scale_factor == 0.5


@pytest.mark.parametrize("name", ["silver", None, 1.0])
def test_unknown_mode(name):
    with pytest.raises(ValueError, match=rf"GoldenNormMode.*'golden'.*'standard'.*{name}"):
        GoldenNormMode(name)


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), float("inf"), "golden", None])
def test_custom_mode_that_is_not_positive(target):
    with pytest.raises(ValueError, match=rf"GoldenNormMode.*positive.*{target}"):
        GoldenNormMode.custom(target)


def test_modes_are_accepted_everywhere(implementation, rng):
    x = jnp.asarray(rng.normal(size=(5, 4)))
    functions = {
        "batch": golden_batch_norm,
        "inference": lambda x, **options: golden_batch_norm_inference(
            x, x[0], x[1] ** 2, **options
        ),
        "layer": golden_layer_norm,
        "residual": lambda x, **options: phi_residual_layernorm(x, x, **options),
    }
    for f in functions.values():
        f = functools.partial(f, x, implementation=implementation)
        for name in ("golden", "standard"):
            battery.assert_same(
                f(target_variance=GoldenNormMode(name)), f(target_variance=name), rtol=0
            )
        custom = GoldenNormMode.custom(2.5)
        battery.assert_same(f(target_variance=custom), f(target_variance=2.5), rtol=0)


# --- bad input ------------------------------------------------------------------------------------

X = jnp.ones((5, 3, 4))
MEAN, VAR = jnp.zeros(4), jnp.ones(4)


def inferred(x, *parameters, mean=MEAN, var=VAR, **options):
    return golden_batch_norm_inference(x, mean, var, *parameters, **options)


FUNCTIONS = {"golden_batch_norm": golden_batch_norm, "golden_batch_norm_inference": inferred}
both = pytest.mark.parametrize("name", FUNCTIONS)
PARAMETERS = [
    *((name, p) for name in FUNCTIONS for p in ("scale", "bias")),
    *(("golden_batch_norm_inference", p) for p in ("mean", "var")),
]


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
@pytest.mark.parametrize("shape", [(5,), (1,), (), (3, 4), (1, 1, 4)])
def test_parameter_shape(name, parameter, shape):
    pattern = rf"{name}: {parameter} .*\(4,\), got \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=pattern):
        FUNCTIONS[name](X, **{parameter: jnp.ones(shape)})


@both
def test_shape_of_parameters_of_two_axes(name):
    options = {"mean": jnp.ones((5, 4)), "var": jnp.ones((5, 4))} if "inference" in name else {}
    FUNCTIONS[name](X, jnp.ones((5, 4)), axis=(2, 0), **options)  # in increasing order
    with pytest.raises(ValueError, match=rf"{name}: scale .*\(5, 4\), got \(4, 5\)"):
        FUNCTIONS[name](X, jnp.ones((4, 5)), axis=(2, 0), **options)


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_parameter_that_is_not_floating(name, parameter):
    with pytest.raises(TypeError, match=rf"{name}: {parameter} .*got int32"):
        FUNCTIONS[name](X, **{parameter: jnp.ones(4, "int32")})


@both
@pytest.mark.parametrize("axis", [3, -4, (0, 3), (1, 1), (-1, 2), (0, -3)], ids=str)
def test_axes_that_are_not_distinct_axes_of_x(name, axis):
    got = str(axis).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"{name}: axis .*got {got}"):
        FUNCTIONS[name](X, axis=axis)


@both
@pytest.mark.parametrize("axis", [-1.0, True, "last", None, (0, 1.5)], ids=str)
def test_axes_that_are_no_integers(name, axis):
    FUNCTIONS[name](X, axis=-1)  # to jit's cache, -1 equals the first
    with pytest.raises(TypeError, match=rf"{name}: axis .*got"):
        FUNCTIONS[name](X, axis=axis)


@pytest.mark.parametrize(
    ("shape", "axis"), [((0, 4), -1), ((2, 0, 4), 2), ((4, 0), 0), ((4,), 0), ((2, 3), (0, 1))]
)
def test_nothing_to_reduce(shape, axis):
    x = jnp.ones(shape)
    for f in (golden_batch_norm, output_statistics):
        with pytest.raises(ValueError, match=rf"{f.__name__}: .*axis.*got"):
            f(x, axis=axis)


def test_no_features_and_empty_features(implementation):
    """All axes reduced are a batch of one channel; channels may be none."""
    f = functools.partial(golden_batch_norm, implementation=implementation)
    y, mean, var = f(jnp.arange(4.0), jnp.asarray(2.0), axis=(), target_variance=1, epsilon=0.0)
    assert mean.shape == var.shape == ()
    battery.assert_same((mean, var), (jnp.asarray(1.5), jnp.asarray(1.25)))
    battery.assert_same(y, 2 * (jnp.arange(4) - 1.5) / np.sqrt(1.25))
    y, mean, var = f(jnp.ones((3, 0)), jnp.ones(0))
    assert (y.shape, mean.shape, var.shape) == ((3, 0), (0,), (0,))


@both
@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), float("inf")])
def test_epsilon(name, epsilon):
    with pytest.raises(ValueError, match=rf"{name}: epsilon .*got {epsilon}"):
        FUNCTIONS[name](X, epsilon=epsilon)


@both
@pytest.mark.parametrize(
    "target", [0, -1.0, float("nan"), float("inf"), "silver", None, True, jnp.ones(2)], ids=str
)
def test_unknown_target_variance(name, target):
    pattern = rf"(?s){name}: target_variance .*'golden'.*'standard'.*positive.*got"
    with pytest.raises(ValueError, match=pattern):
        FUNCTIONS[name](X, target_variance=target)


@pytest.mark.parametrize("shape", [(2,), (5, 4), (5, 3, 1, 1), (1, 5, 3, 4), (0,)], ids=str)
def test_where_that_does_not_broadcast_to_x(shape):
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"golden_batch_norm: where .*\(5, 3, 4\).*\({got},?\)"):
        golden_batch_norm(X, where=jnp.ones(shape, bool))


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_where_that_is_not_boolean(dtype):
    with pytest.raises(TypeError, match=rf"golden_batch_norm: where .*bool.*got {dtype}"):
        golden_batch_norm(X, where=jnp.ones(X.shape, dtype))


@pytest.mark.parametrize("options", [{}, {"axis_index_groups": [[0, 1]]}], ids=["all", "groups"])
@pytest.mark.parametrize("axis_name", ["batch", ("batch", "model")], ids=str)
def test_axis_name_that_is_not_mapped(options, axis_name):
    f = functools.partial(golden_batch_norm, axis_name=axis_name, **options)
    for call in (f, jax.jit(f), jax.vmap(f, axis_name="other")):
        with pytest.raises(NameError, match=r"golden_batch_norm: axis_name .*'batch'"):
            call(X)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_output_statistics_of_what_is_not_floating(dtype):
    with pytest.raises(TypeError, match=rf"output_statistics: x .*got {dtype}"):
        output_statistics(jnp.ones((2, 3), dtype))


@pytest.mark.parametrize("groups", [5, (0, 1)])
def test_refused_index_groups(groups):
    with pytest.raises(TypeError, match=r"golden_batch_norm: axis_index_groups must be .*got"):
        golden_batch_norm(jnp.ones((5, 4)), axis_name="batch", axis_index_groups=groups)

"""The CUDA lowering of the golden norms, read from StableHLO, and what waits for their backward."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from fresh import run_fresh
from lowered import batch, custom_calls, dims, gradients, kept, number, stablehlo

from syntonic_jax import (
    PHI_INV,
    golden_batch_norm,
    golden_batch_norm_inference,
    golden_layer_norm,
)

CHANNELS = 8
LAYOUTS = {  # shape, feature axis
    "rows": ((24, CHANNELS), -1),
    "last": ((6, 4, 4, CHANNELS), -1),
    "first": ((6, CHANNELS, 4, 4), 1),
}
MOMENTS, SUMS = "syntonic_golden_batch_norm_moments", "syntonic_golden_batch_norm_sums"
NORMALISE = "syntonic_golden_batch_norm_normalise"
LAYER, LAYER_COTANGENT = "syntonic_golden_layer_norm", "syntonic_golden_layer_norm_cotangent"
PARAMETER = jax.ShapeDtypeStruct((CHANNELS,), jnp.float32)
ROWS = jax.ShapeDtypeStruct((6, 4, CHANNELS), jnp.bfloat16)

layouts = pytest.mark.parametrize("layout", LAYOUTS)
layer_norm = functools.partial(golden_layer_norm, implementation="cuda")


def batch_norm(layout, **options):
    """The function, and x."""
    shape, axis = LAYOUTS[layout]
    f = functools.partial(golden_batch_norm, axis=axis, implementation="cuda", **options)
    return f, jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def targets(f, *operands, **options) -> list[str]:
    return [call.target for call in custom_calls(f, *operands, **options)]


def elements(tensor_type: str) -> int:
    return math.prod(dims(tensor_type))


# --- batch norm -----------------------------------------------------------------------------------


@layouts
def test_batch_norm_is_two_calls(layout):
    """The first returns a few numbers a channel, of which the second makes y.

    Each reads x once, in its own layout and type.
    """
    f, x = batch_norm(layout)
    for operands in ((x,), (x, PARAMETER), (x, PARAMETER, PARAMETER)):
        call, second = custom_calls(f, *operands)
        assert (call.target, second.target) == (MOMENTS, NORMALISE)
        assert [elements(t) for t in call.operands if t.endswith("xbf16")] == [x.size]
        assert list(map(elements, second.operands)) == [x.size] + 3 * [CHANNELS]
        assert list(map(elements, second.results)) == [x.size]
        parameters = [elements(t) for t in call.operands if not t.endswith("xbf16")]
        assert parameters == [CHANNELS] * len(operands[1:])
        # One partial result on one device; scratch beside it is not of the size of x either.
        assert CHANNELS in map(elements, call.results)
        assert all(t.endswith("xf32") for t in call.results)


@layouts
def test_gradient_of_batch_norm_is_one_call_more(layout):
    """Without y, which it does not need."""
    f, x = batch_norm(layout)
    assert targets(gradients(f, 0), x) == [MOMENTS, SUMS]
    assert targets(gradients(f, 0, 1, 2), x, PARAMETER, PARAMETER) == [MOMENTS, SUMS]
    # Without the gradient of x as well: sums over the channels are all there is to compute.
    assert targets(gradients(f, 1, 2), x, PARAMETER, PARAMETER) == [MOMENTS, SUMS]
    *_, call = custom_calls(gradients(f, 0, 1, 2), x, PARAMETER, PARAMETER)
    assert [elements(t) for t in call.operands if t.endswith("xbf16")] == [x.size] * 2


@layouts
def test_nothing_is_transposed(layout):
    f, x = batch_norm(layout)
    for g in (f, gradients(f, 0, 1, 2)):
        assert "stablehlo.transpose" not in stablehlo(g, x, PARAMETER, PARAMETER)


@layouts
def test_kept_for_the_backward_pass(layout):
    """x, and numbers for each channel: nothing larger than x, and x once."""
    f, x = batch_norm(layout)
    for operands in ((x,), (x, PARAMETER, PARAMETER)):
        rows, *others = sorted(kept(f, *operands), key=lambda a: -math.prod(a[1]))
        assert rows == ("bfloat16", x.shape)
        assert others
        assert all(math.prod(shape) <= CHANNELS for _, shape in others)


@layouts
def test_gradient_with_a_mask_keeps_nothing_wider(layout):
    """Than x, in its own type, and masks."""
    f, x = batch_norm(layout)
    mask = jax.ShapeDtypeStruct(x.shape, bool)
    found = jax.eval_shape(lambda x, where: jax.vjp(lambda x: f(x, where=where), x)[1], x, mask)
    large = {str(a.dtype) for a in jax.tree.leaves(found) if a.size > CHANNELS}
    assert large == {"bfloat16", "bool"}


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("mapped", [(0, None, None), (0, 0, None), (0, 0, 0), (1, None, 0)])
def test_vmap_of_batch_norm_launches_no_more(layout, mapped):
    f, x = batch_norm(layout)
    operands = [
        a if axis is None else jax.ShapeDtypeStruct((*a.shape[:axis], 5, *a.shape[axis:]), a.dtype)
        for a, axis in zip((x, PARAMETER, PARAMETER), mapped, strict=True)
    ]
    call, second = custom_calls(jax.vmap(f, mapped), *operands)
    assert max(map(elements, call.operands)) == 5 * x.size
    assert 5 * CHANNELS in map(elements, call.results)
    assert list(map(elements, second.operands)) == [5 * x.size] + 3 * [5 * CHANNELS]
    found = targets(jax.vmap(gradients(f, 0, 1, 2), mapped), *operands)
    assert found == [MOMENTS, SUMS]


def test_inference_is_one_call():
    f = functools.partial(golden_batch_norm_inference, implementation="cuda")
    operands = ROWS, PARAMETER, PARAMETER, PARAMETER, PARAMETER
    (call,) = custom_calls(f, *operands)
    assert call.target == NORMALISE
    assert list(map(elements, call.operands)) == [ROWS.size] + 3 * [CHANNELS]
    text = stablehlo(f, *operands)
    assert "stablehlo.reduce" not in text
    assert "stablehlo.transpose" not in text
    large = [a for a in kept(f, *operands) if math.prod(a[1]) > CHANNELS]
    assert large == [("bfloat16", ROWS.shape)]


# --- layer norm -----------------------------------------------------------------------------------


def test_layer_norm_is_one_call():
    for operands in ((ROWS,), (ROWS, PARAMETER), (ROWS, PARAMETER, PARAMETER)):
        (call,) = custom_calls(layer_norm, *operands)
        assert call.target == LAYER
        assert call.operands == ["6x4x8xbf16"] + ["8xf32"] * (len(operands) - 1)
        assert call.results == ["6x4x8xbf16"]  # what is not asked for is not computed: y alone


def test_gradient_of_layer_norm_is_one_call_more():
    assert targets(gradients(layer_norm, 0), ROWS) == [LAYER, LAYER_COTANGENT]
    found = targets(gradients(layer_norm, 0, 1, 2), ROWS, PARAMETER, PARAMETER)
    assert found == [LAYER, LAYER_COTANGENT]


def test_kept_for_the_backward_pass_of_layer_norm():
    rows, statistics = ("bfloat16", (6, 4, CHANNELS)), ("float32", (6, 4, 3))
    assert kept(layer_norm, ROWS) == [rows, statistics]
    found = kept(layer_norm, ROWS, PARAMETER, PARAMETER)
    assert found == [rows, statistics, ("float32", (CHANNELS,))]


@pytest.mark.parametrize("axis", [(1, 2), (0, 1, 2)], ids=str)
def test_trailing_axes_are_one_row(axis):
    """No transpose where the reduced axes are the last ones."""
    f = functools.partial(layer_norm, axis=axis)
    parameter = jax.ShapeDtypeStruct([ROWS.shape[a] for a in axis], jnp.float32)
    assert targets(f, ROWS, parameter) == [LAYER]
    text = stablehlo(gradients(f, 0, 1), ROWS, parameter)
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize("mapped", [(0, None), (0, 0), (None, 0)])
def test_vmap_of_layer_norm_is_one_call(mapped):
    operands = [
        batch(a) if axis == 0 else a for a, axis in zip((ROWS, PARAMETER), mapped, strict=True)
    ]
    (call,) = custom_calls(jax.vmap(layer_norm, mapped), *operands)
    assert elements(call.operands[0]) == 5 * ROWS.size
    found = targets(jax.vmap(gradients(layer_norm, 0, 1), mapped), *operands)
    assert found == [LAYER, LAYER_COTANGENT]


# --- both -----------------------------------------------------------------------------------------

BOTH = {"golden_batch_norm": golden_batch_norm, "golden_layer_norm": golden_layer_norm}
both = pytest.mark.parametrize("name", BOTH)


@both
@pytest.mark.parametrize("epsilon", [0.1, 1 / 3, 1e-12])
def test_numbers_travel_as_float64(name, epsilon):
    f = functools.partial(BOTH[name], epsilon=epsilon, implementation="cuda")
    call, *_ = custom_calls(f, ROWS)
    for attribute, expected in (("epsilon", epsilon), ("scale_factor", PHI_INV**0.5)):
        assert number(call.attributes[attribute]) == pytest.approx(expected, rel=1e-15)


@both
def test_typed_ffi(name):
    text = stablehlo(functools.partial(BOTH[name], implementation="cuda"), ROWS, dialect="hlo")
    calls = [line for line in text.splitlines() if "custom_call_target" in line]
    assert len(calls) == (2 if name == "golden_batch_norm" else 1)
    for call in calls:
        assert f'custom_call_target="syntonic_{name}' in call
        assert "api_version=API_VERSION_TYPED_FFI" in call


def test_nothing_is_launched_for_no_elements():
    rows = jax.ShapeDtypeStruct((3, 0, CHANNELS), jnp.bfloat16)
    assert custom_calls(gradients(layer_norm, 0, 1), rows, PARAMETER) == []
    none = jax.ShapeDtypeStruct((3, 0), jnp.bfloat16)
    f = functools.partial(golden_batch_norm, implementation="cuda")
    assert custom_calls(gradients(f, 0), none) == []


@both
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_no_kernel_is_asked_for(name, implementation):
    f = functools.partial(BOTH[name], implementation=implementation)
    for platform in ("cpu", "cuda"):  # None: nothing is known of a GPU that is not there
        assert custom_calls(gradients(f, 0, 1), ROWS, PARAMETER, platform=platform) == []


@both
@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms(name, platform):
    assert custom_calls(BOTH[name], ROWS, platform=platform) == []
    f = functools.partial(BOTH[name], implementation="cuda")
    with pytest.raises(ValueError, match=rf"{name}.*'cuda'.*{platform}"):
        custom_calls(f, ROWS, platform=platform)


def test_cuda_on_a_cpu_names_the_remedy():
    """In a fresh process, as the double may serve platform cpu in this one."""
    run_fresh("""
        import functools
        import jax, jax.numpy as jnp, syntonic_jax
        x = jnp.ones((2, 4))
        inference = functools.partial(
            syntonic_jax.golden_batch_norm_inference, mean=jnp.zeros(4), var=jnp.ones(4)
        )
        for name, function in (
            ("golden_batch_norm", syntonic_jax.golden_batch_norm),
            ("golden_batch_norm_inference", inference),
            ("golden_layer_norm", syntonic_jax.golden_layer_norm),
        ):
            function = functools.partial(function, implementation="cuda")
            jax.eval_shape(function, x)  # tracing is fine
            for call in (function, jax.jit(function)):
                try:
                    call(x)
                except ValueError as error:
                    text = str(error)
                    assert name in text and "implementation='cuda'" in text, text
                    assert "cpu" in text and "implementation=None" in text, text
                else:
                    raise SystemExit(f"{name} ran")
    """)


@layouts
def test_partial_moments_on_several_devices(layout, installed_double):
    """Each device merges none but its own: as many partial results as there are devices."""
    f, x = batch_norm(layout)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    x = jax.ShapeDtypeStruct((24, *x.shape[1:]), x.dtype)
    x = jax.device_put(jnp.zeros(x.shape, x.dtype), jax.sharding.NamedSharding(mesh, spec))
    call, _ = custom_calls(f, x, platform="cpu")
    assert 8 * CHANNELS in map(elements, call.results)

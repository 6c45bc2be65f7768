"""golden_rms_norm, over any axes."""

import functools
import itertools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from battery import Operation
from jax.test_util import check_grads
from rms_check import VARIANCES, check, check_any_range, draw

from syntonic_jax import GoldenNormMode, golden_rms_norm

pytestmark = pytest.mark.usefixtures("x64")


def operation(label, names, axis, target_variance, offset=0.0, lead=(3,)):
    """Rows along `axis` of an array whose last axis was moved there."""

    def call(x, *values, **options):
        y = golden_rms_norm(
            jnp.moveaxis(x, -1, axis),
            *values,
            axis=axis,
            epsilon=0.1,  # large beside the mean square, and not a float32
            target_variance=target_variance,
            scale_offset=offset,
            **options,
        )
        return jnp.moveaxis(y, axis, -1)

    def reference(x, scale=None):
        y = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1)
        y = y * np.sqrt(VARIANCES.get(target_variance, target_variance)).item()
        return y if scale is None else y * (offset + scale)

    return Operation(
        label,
        "golden_rms_norm",
        call,
        reference,
        ("rows",) + ("par",) * len(names),
        "golden_rms_norm",
        lead=lead,
        bad=(-jnp.inf,),
    )


OPERATIONS = [
    operation("scale", ("scale",), -1, "golden"),
    operation("bare", (), -1, 2.5, lead=(2, 2)),
    operation("other-axis-offset", ("scale",), 0, "standard", offset=1.0, lead=(2, 2)),
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS[:1]
    variants = OPERATIONS[2:]


class TestTypes(battery.Types):
    operations = OPERATIONS[2:]


class TestBadInput(battery.BadInput):
    operations = OPERATIONS[:1]


@pytest.mark.slow
def test_third_derivative(installed_double, rng):
    (x,) = OPERATIONS[1].operands(rng, lead=(), width=3)
    f = jax.jit(functools.partial(golden_rms_norm, epsilon=0.1, implementation="cuda"))
    check_grads(f, (x,), order=3, modes=("fwd", "rev"), eps=1e-4, atol=1e-4, rtol=1e-4)


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("shape", [(5, 33), (4, 6, 5), (3, 1), (2, 1000), (200, 7)], ids=str)
def test_accuracy(shape, dtype, implementation, rng):
    check(implementation, *draw(rng, shape, dtype))


@pytest.mark.parametrize(("dtype", "out"), [*itertools.permutations(oracles.DTYPES, 2)])
def test_accuracy_with_another_output_type(dtype, out, implementation, rng):
    check(implementation, *draw(rng, (3, 16), dtype, out))


@pytest.mark.parametrize("dtype", battery.thinned(["bfloat16", "float32"]))
@pytest.mark.parametrize(
    "options",
    [
        {"scale_offset": 1.0},
        {"scale_offset": -0.25, "target_variance": 2.5},
        {"target_variance": "standard", "epsilon": 1e-3},
        {"epsilon": 0.0},
    ],
    ids=str,
)
def test_accuracy_with_options(options, dtype, implementation, rng):
    x, ct, scale = draw(rng, (4, 12), dtype, mean=2.0)
    check(implementation, x, ct, scale, **options)
    check(implementation, x, ct, **options)


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (2, 1, 0)], ids=str)
def test_any_axes_are_the_last_ones_of_what_is_moved(axis, implementation, rng):
    x = jnp.asarray(rng.normal(size=(3, 4, 5)))
    axes = sorted(a % 3 for a in np.atleast_1d(axis))
    scale = jnp.asarray(rng.normal(size=[x.shape[a] for a in axes]))
    y = golden_rms_norm(x, scale, axis=axis, implementation=implementation)
    last = tuple(range(3 - len(axes), 3))
    rows = jnp.moveaxis(x, axes, last).reshape(
        *(n for i, n in enumerate(x.shape) if i not in axes), -1
    )
    moved = golden_rms_norm(rows, scale.reshape(-1), implementation=implementation)
    back = jnp.moveaxis(y, axes, last).reshape(moved.shape)
    battery.assert_same(back, moved)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_rows_of_any_size(dtype, implementation, rng):
    check_any_range(implementation, 40, dtype, rng)


def test_what_the_specification_names(implementation):
    x = jnp.array([1e30, 2e30, 3e30, 4e30], "float32")
    y = golden_rms_norm(x, implementation=implementation)
    np.testing.assert_allclose(y, [0.28706, 0.57412, 0.86119, 1.14825], rtol=1e-5)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_rows_that_are_not_finite_stay_alone(dtype, implementation, rng):
    """An infinite number makes its own place NaN and the others 0, as x / √∞ is."""
    x, ct, _ = draw(rng, (5, 8), dtype)
    x = x.at[1, 3].set(np.nan).at[2, 0].set(np.inf)
    y, pull = jax.vjp(functools.partial(golden_rms_norm, implementation=implementation), x)
    (dx,) = pull(ct)
    assert np.all(np.isnan(y[1]))
    np.testing.assert_array_equal(np.isnan(oracles.real(y[2])), np.arange(8) == 0)
    np.testing.assert_array_equal(y[2, 1:], 0)
    for rows in (y, dx):
        assert np.all(np.isfinite(rows[jnp.array([0, 3, 4])]))


@pytest.mark.parametrize("target", ["golden", "standard", 2.5, GoldenNormMode.custom(3.0)], ids=str)
def test_output_has_the_target_mean_square(target, implementation, rng):
    x = jnp.asarray(rng.normal(3, 2, size=(3, 50)))
    y = golden_rms_norm(x, target_variance=target, epsilon=0.0, implementation=implementation)
    expected = target.target_variance if isinstance(target, GoldenNormMode) else target
    expected = VARIANCES.get(expected, expected)
    np.testing.assert_allclose(jnp.mean(y**2, -1), expected, rtol=1e-13)


def test_zeros_stay_zeros(implementation):
    """ε is what they are divided by."""
    x = jnp.zeros((2, 6), "float32")
    y, pull = jax.vjp(functools.partial(golden_rms_norm, implementation=implementation), x)
    np.testing.assert_array_equal(y, 0)
    (dx,) = pull(jnp.ones_like(x))
    np.testing.assert_allclose(dx, np.sqrt(oracles.PHI_INV / 1e-6), rtol=1e-6)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (1,), (), (3, 4)])
def test_scale_shape(shape):
    with pytest.raises(ValueError, match=r"golden_rms_norm: scale .*\(4,\), got"):
        golden_rms_norm(jnp.ones((3, 4)), jnp.ones(shape))


@pytest.mark.parametrize("offset", [None, "1", jnp.ones(2), True, [1.0]], ids=str)
def test_offset_that_is_no_number(offset):
    with pytest.raises(TypeError, match=r"golden_rms_norm: scale_offset .*number.*got"):
        golden_rms_norm(jnp.ones(4), scale_offset=offset)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), -float("inf")])
def test_offset_that_is_not_finite(offset):
    with pytest.raises(ValueError, match=rf"golden_rms_norm: scale_offset .*got {offset}"):
        golden_rms_norm(jnp.ones(4), scale_offset=offset)

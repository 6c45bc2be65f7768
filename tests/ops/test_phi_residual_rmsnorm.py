"""phi_residual_rmsnorm: the RMS norm of golden_rms_norm, of a residual sum."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import rms_check
from battery import Operation

from syntonic_jax import PhiResidualMode, golden_rms_norm, phi_residual, phi_residual_rmsnorm

pytestmark = pytest.mark.usefixtures("x64")


def operation(label, names, mode="phi", return_sum=True, offset=0.0, lead=(3,)):
    s, c = oracles.MODES[mode]

    def call(identity, residual, *values, **options):
        return phi_residual_rmsnorm(
            *(identity, residual, *values),
            mode=mode,
            epsilon=0.1,  # large beside the mean square, and not a float32
            scale_offset=offset,
            return_sum=return_sum,
            **options,
        )

    def reference(identity, residual, scale=None):
        z = s * (identity + c * residual)
        y = z / jnp.sqrt(jnp.mean(z**2, -1, keepdims=True) + 0.1)
        y = y if scale is None else y * (offset + scale)
        return (y, z) if return_sum else y

    return Operation(
        label,
        "phi_residual_rmsnorm",
        call,
        reference,
        ("rows", "rows") + ("par",) * len(names),
        "phi_residual_rmsnorm",
        lead=lead,
    )


OPERATIONS = [
    operation("scale", ("scale",)),
    operation("bare-y", (), mode="standard", return_sum=False, lead=(2, 2)),
    operation("symmetric-offset", ("scale",), mode="phi_symmetric", offset=1.0),
]


class TestTransformations(battery.Transformations):
    operations = OPERATIONS[:1]
    variants = OPERATIONS[1:]


class TestTypes(battery.Types):
    operations = OPERATIONS[1:2]


class TestBadInput(battery.BadInput):
    operations = OPERATIONS[:1]


@pytest.mark.parametrize("mode", oracles.MODES)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("shape", [(5, 33), (4, 6, 5), (2, 1000)], ids=str)
def test_accuracy(shape, dtype, mode, implementation, rng):
    rms_check.check_residual(implementation, shape, dtype, mode, rng)


@pytest.mark.parametrize("mode", [*oracles.MODES, PhiResidualMode.PHI])
def test_is_the_norm_of_the_sum_that_it_returns(mode, implementation, rng):
    """Bit by bit the same z as phi_residual's, and y its RMS norm."""
    x, r = (jnp.asarray(rng.normal(size=(4, 12)), "bfloat16") for _ in range(2))
    scale = jnp.asarray(rng.normal(size=12), "float32")
    options = {"implementation": implementation}
    y, z = phi_residual_rmsnorm(x, r, scale, mode=mode, return_sum=True, **options)
    np.testing.assert_array_equal(oracles.real(z), oracles.real(phi_residual(x, r, mode)))
    same = golden_rms_norm(z, scale, target_variance="standard", **options)
    np.testing.assert_allclose(
        oracles.real(y), oracles.real(same), rtol=2 * oracles.unit("bfloat16")
    )


def test_gradients_that_nobody_asked_for_are_not_computed(implementation, rng):
    """Of one branch, with and without a cotangent of the sum."""
    x, r = (jnp.asarray(rng.normal(size=(3, 8))) for _ in range(2))
    f = functools.partial(phi_residual_rmsnorm, implementation=implementation)
    whole = jax.grad(lambda x, r: jnp.sum(jnp.sin(f(x, r))), (0, 1))(x, r)
    for i in range(2):
        one = jax.grad(lambda x, r: jnp.sum(jnp.sin(f(x, r))), i)(x, r)
        battery.assert_same(one, whole[i])


@pytest.mark.parametrize("shape", [(5,), (1,), (), (3, 4)])
def test_scale_shape(shape):
    x = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"phi_residual_rmsnorm: scale .*\(4,\), got"):
        phi_residual_rmsnorm(x, x, jnp.ones(shape))


@pytest.mark.parametrize("offset", [None, "1", jnp.ones(2), True], ids=str)
def test_offset_that_is_no_number(offset):
    with pytest.raises(TypeError, match=r"phi_residual_rmsnorm: scale_offset .*number.*got"):
        phi_residual_rmsnorm(jnp.ones(4), jnp.ones(4), scale_offset=offset)

"""Infinities as the formula has them: of batch norms, from both lowerings.

Which entries of y, mean and var are NaN, which are infinite, and of which sign, is what plain jnp
has of mean, squares, slope and y one after the other.
"""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from batch_norm_check import PARAMETERS, check_infinities, ends_of_range, plain
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from syntonic_jax import golden_batch_norm, golden_batch_norm_inference, output_statistics

pytestmark = pytest.mark.usefixtures("x64")
dtypes = pytest.mark.parametrize("dtype", oracles.DTYPES)


def wide(f):
    """y in the accumulation type: what is beyond a 16-bit type is another matter."""
    return lambda x, *more, **options: f(x, *more, dtype=oracles.accumulation(x.dtype), **options)


@dtypes
@pytest.mark.parametrize(("scale", "bias", "variance"), PARAMETERS, ids=str)
def test_values(dtype, scale, bias, variance, implementation):
    f = functools.partial(
        wide(golden_batch_norm), target_variance=variance, implementation=implementation
    )
    check_infinities(f, dtype, scale, bias, variance)


@pytest.mark.parametrize("dtype", battery.thinned(["float32", "bfloat16"]))
@pytest.mark.parametrize(("scale", "bias", "variance"), PARAMETERS[::3], ids=str)
@pytest.mark.parametrize("how", ["first", "masked", "axis_name", "sharded"])
def test_values_in_other_ways(how, dtype, scale, bias, variance, implementation):
    """Channels first, under a mask that hides nothing, merged over a mapped axis or devices."""
    norm = functools.partial(
        wide(golden_batch_norm), target_variance=variance, implementation=implementation
    )

    def f(x, scale, bias):
        if how == "first":
            y, mean, var = norm(x.T.reshape(1, -1, 4, 2), scale, bias, axis=1)
            return y.reshape(x.shape[::-1]).T, mean, var
        if how == "masked":
            return norm(x, scale, bias, where=np.ones((len(x), 1), bool))
        if how == "sharded":
            mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
            return jax.jit(norm)(jax.device_put(x, NamedSharding(mesh, P("d"))), scale, bias)
        shard = functools.partial(norm, scale=scale, bias=bias, axis_name="d")
        y, mean, var = jax.vmap(shard, axis_name="d")(x.reshape(4, 2, -1))
        return y.reshape(x.shape), mean[0], var[0]

    check_infinities(f, dtype, scale, bias, variance)


@dtypes
def test_output_statistics(dtype):
    x = jnp.asarray(ends_of_range(dtype), dtype)

    def f(x, scale, bias):
        return plain(x, scale, bias, 1.0)[0], *output_statistics(x)

    check_infinities(f, dtype, 1.0, 0.0, 1.0)
    assert np.isinf(np.asarray(output_statistics(x)[0], "float64")).any()


@dtypes
@pytest.mark.parametrize(("scale", "bias", "variance"), battery.thinned(PARAMETERS, 3), ids=str)
@pytest.mark.parametrize("statistics", [(0.5, 1.0), (np.inf, 1.0), (0.5, np.inf), (np.nan, 0.0)])
def test_inference(dtype, scale, bias, variance, statistics, implementation):
    acc = oracles.accumulation(dtype)
    x = jnp.asarray(ends_of_range(dtype), dtype)
    scale = float(oracles.info(acc).max) / 2 if scale == "largest" else scale
    scale, bias, mean, var = (jnp.full(x.shape[-1], v, acc) for v in (scale, bias, *statistics))
    y = golden_batch_norm_inference(
        *(x, mean, var, scale, bias),
        target_variance=variance,
        dtype=acc,
        implementation=implementation,
    )
    expected = plain(x, scale, bias, variance, (mean, var))[0]
    np.testing.assert_allclose(y, expected, rtol=8 * oracles.unit(acc), atol=0)

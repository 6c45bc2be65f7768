"""Running statistics of 16-bit data: of float32 in every framework, whatever the policy.

In bfloat16 a decay of 0.999 is 1, and in float16 a variance above 65504 infinite.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import oracles
import pytest
from batch_norm_contract import running
from flax import nnx
from layer_contract import described, normal
from norm_layers import BATCH_NORMS, KEY

from syntonic_jax.nn.haiku import GoldenBatchNorm
from syntonic_jax.nn.nnx import GoldenBatchNorm as NnxBatchNorm

SHAPE = (64, 4)
# Standard deviations: the square of the first is beyond float16, that of the last below its
# smallest number. Epsilon is to be small beside them.
NARROW = np.float32(0.999)
CASES = [(300.0, 0.9), (300.0, 0.999), (1.0, 0.99), (1.0, NARROW), (1e-2, 0.999), (1e-4, 0.99)]
EPSILON = 1e-12


UNFORCED = {"force_float32_reductions": False, "param_dtype": "float16"}
LAYERS = {
    **BATCH_NORMS,
    "linen-unforced": functools.partial(BATCH_NORMS["linen"], **UNFORCED),
}


@pytest.fixture(params=LAYERS)
def framework(request):
    return request.param


def data(rng, dtype, spread):
    return normal(rng, *SHAPE, dtype=dtype, spread=spread)


def averages(framework, x, decay, steps):
    """Mean and variance after updates with the same x, in float64."""
    x = oracles.real(x)
    kept = 0.0 if framework == "haiku" else decay**steps  # Haiku takes the debt away
    start = np.zeros(SHAPE[1]), np.ones(SHAPE[1])
    return [kept * a + (1 - kept) * b for a, b in zip(start, (x.mean(0), x.var(0)), strict=True)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("spread", "decay"), CASES)
def test_statistics_are_those_of_float64(rng, framework, dtype, decay, spread):
    x = data(rng, dtype, spread)
    norm = LAYERS[framework](False, x, momentum=decay, epsilon=EPSILON)
    variables = norm.init()
    parameters, statistics = variables
    steps = 1 if framework == "haiku" else 0  # Haiku's init has made one
    for _ in range(3):
        y, statistics = norm.apply(parameters, statistics, x)
        steps += 1
    assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} <= {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    # 1 - decay of a float32 decay is off by half a unit of 1: 2**-25, and is at least 0.001. As
    # much comes from a few roundings of each of four updates.
    units = 8 * 2.0**-24
    means, variances = averages(framework, x, float(decay), steps)
    mean, var = (value.reshape(-1) for value in running(statistics, x, (1,)))
    scale = np.sqrt(variances)
    np.testing.assert_allclose(mean, means, rtol=1e3 * units, atol=float(spread) * units)
    np.testing.assert_allclose(var, variances, rtol=1e3 * units)
    evaluated, after = norm.apply(parameters, statistics, x, train=False)
    assert described(after) == described(statistics)
    assert evaluated.dtype == y.dtype
    want = (oracles.real(x) - means) / scale * np.sqrt(0.6180339887498949)
    np.testing.assert_allclose(
        oracles.real(evaluated), want, rtol=oracles.unit(str(y.dtype)) + 1e3 * units, atol=1e-3
    )
    if framework == "haiku":  # the averages are those of the batch
        np.testing.assert_allclose(
            oracles.real(y), oracles.real(evaluated), rtol=4 * oracles.unit(dtype), atol=1e-3
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_checkpoints_of_sixteen_bits_load(rng, framework, dtype):
    """Evaluated as they are; the first update makes them float32 and loses nothing of them."""
    x = data(rng, dtype, 1.0)
    norm = LAYERS[framework](False, x, momentum=0.999)
    parameters, statistics = norm.init()
    if framework == "haiku":  # after ten updates of which the average is left
        statistics = hk.data_structures.map(
            lambda module, name, value: jnp.full_like(value, 9) if name == "counter" else value,
            statistics,
        )
    held = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        statistics,
    )
    y, after = norm.apply(parameters, held, x, train=False)
    assert described(after) == described(held)
    mean, var = running(held, x, (1,))
    want = (oracles.real(x) - mean) / np.sqrt(var + 1e-5) * np.sqrt(0.6180339887498949)
    np.testing.assert_allclose(
        oracles.real(y), want, rtol=2 * oracles.unit(str(y.dtype)), atol=1e-4
    )
    wide = jax.tree.map(lambda leaf: leaf.astype("float32") if leaf.dtype == dtype else leaf, held)
    (_, got), (_, expected) = (norm.apply(parameters, s, x) for s in (held, wide))
    assert described(got) == described(expected)
    assert jnp.dtype("float32") in {leaf.dtype for leaf in jax.tree.leaves(got)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ours_load_into_the_frameworks(rng, framework, dtype):
    x = data(rng, dtype, 1.0)
    options = {"momentum": 0.9}
    ours = LAYERS[framework](False, x, target_variance="standard", **options)
    parameters, statistics = ours.init()
    for _ in range(2):
        _, statistics = ours.apply(parameters, statistics, x)
    want, _ = ours.apply(parameters, statistics, x, train=False)
    got, _ = LAYERS[framework](True, x, **options).apply(parameters, statistics, x, train=False)
    assert got.dtype == want.dtype
    # Haiku rounds the statistics and every step to the type of x, Linen to that of parameters.
    narrow = {"haiku": dtype, "linen-unforced": "float16"}
    unit = 8 * oracles.unit(narrow.get(framework, "float32"))
    np.testing.assert_allclose(oracles.real(got), oracles.real(want), rtol=unit, atol=4 * unit)


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
@pytest.mark.parametrize("on", ["layer", "network"])
def test_mixed_precision_of_haiku(rng, compute, on):
    """A policy casts what a module reads, its state included: not the averages."""

    class Network(hk.Module):
        def __call__(self, x, train):
            return GoldenBatchNorm(True, True, 0.999, EPSILON, name="norm")(x, train)

    x = data(rng, "float32", 300.0)
    function = hk.transform_with_state(lambda x, train: Network(name="n")(x, train))
    policy = jmp.get_policy(f"params=float32,compute={compute},output={compute}")
    cls = {"layer": GoldenBatchNorm, "network": Network}[on]
    with hk.mixed_precision.push_policy(cls, policy):
        parameters, state = function.init(KEY, x, True)
        for _ in range(3):
            y, state = function.apply(parameters, state, None, x, True)
        evaluated, after = function.apply(parameters, state, None, x, False)
    assert described(after) == described(state)
    assert (y.dtype, evaluated.dtype) == (compute, compute)
    mean, var = (value.reshape(-1) for value in running(state, x, (1,)))
    rounded = oracles.real(x.astype(compute))  # what the layer was given
    np.testing.assert_allclose(var, rounded.var(0), rtol=1e-4)
    np.testing.assert_allclose(mean, rounded.mean(0), atol=1e-4 * 300)
    # Each is rounded once; the averages are off by 1e-4.
    unit = 2 * oracles.unit(compute) + 1e-4
    np.testing.assert_allclose(oracles.real(evaluated), oracles.real(y), rtol=unit, atol=unit)


@pytest.mark.parametrize("around", ["nothing", "remat", "scan"])
def test_getters_of_haiku(rng, around):
    """A user's own that narrows all state; the layer is called twice, and sees its first update."""
    x = data(rng, "bfloat16", 1.0)

    def getter(next_getter, value, context):
        return next_getter(value.astype(jnp.bfloat16))

    def network(x, train, narrowed):
        norm = GoldenBatchNorm(True, True, 0.999, name="norm")

        def step(x):
            if not narrowed:
                return norm(x, train)
            with hk.custom_getter(getter, params=False, state=True):
                return norm(x, train)

        x = step(x)
        if around == "scan":
            return hk.scan(lambda carry, _: (step(carry), None), x, None, length=1)[0]
        return (hk.remat(step) if around == "remat" else step)(x)

    results = []
    for narrowed in (False, True):
        function = hk.transform_with_state(lambda x, train, n=narrowed: network(x, train, n))
        parameters, state = function.init(KEY, x, True)
        for _ in range(2):
            _, state = function.apply(parameters, state, None, x, True)
        results.append((described(state), function.apply(parameters, state, None, x, False)[0]))
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_a_function_that_promotes_in_nnx(rng):
    """It may round x and the parameters; the running statistics stay what they are."""

    def narrow(arrays, *, dtype=None):
        return tuple(None if a is None else a.astype(jnp.float16) for a in arrays)

    x = data(rng, "float16", 300.0)
    norm = NnxBatchNorm(
        SHAPE[1], momentum=0.0, epsilon=EPSILON, promote_dtype=narrow, rngs=nnx.Rngs(0)
    )
    y = norm(x)
    evaluated = norm(x, use_running_average=True)
    assert y.dtype == evaluated.dtype == jnp.float16
    np.testing.assert_allclose(norm.var[...], oracles.real(x).var(0), rtol=1e-5)
    unit = 2 * oracles.unit("float16")
    np.testing.assert_allclose(oracles.real(evaluated), oracles.real(y), rtol=unit, atol=1e-5)

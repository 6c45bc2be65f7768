"""GoldenRMSNorm and PhiResidualRMSNorm of every framework, beside the framework's own RMSNorm."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen, nnx
from layer_contract import described, randomised

import syntonic_jax.nn
from syntonic_jax import PHI_INV, golden_rms_norm, phi_residual, phi_residual_rmsnorm

FRAMEWORKS = ("nnx", "linen", "haiku")
MODULES = {"nnx": nnx, "linen": linen, "haiku": hk}
WIDTH = 24


class Built(NamedTuple):
    parameters: Any
    apply: Callable[..., Any]  # (parameters, *arrays, **options of the call)


def build(framework, name, arrays, *, width=WIDTH, **options) -> Built:
    """A layer of ours by its name, or the framework's RMSNorm."""
    module = MODULES[framework] if name == "RMSNorm" else getattr(syntonic_jax.nn, framework)
    layer = getattr(module, name)
    if framework == "nnx":
        graph, state = nnx.split(layer(width, rngs=nnx.Rngs(0), **options))
        return Built(state, lambda state, *xs, **more: nnx.merge(graph, state)(*xs, **more))
    if framework == "linen":
        made = layer(**options)
        variables = made.init(jax.random.key(0), *arrays)
        return Built(variables, made.apply)
    names = {"epsilon": "eps", "use_scale": "create_scale"}
    options = {names.get(k, k): v for k, v in options.items()}
    called = "rms_norm"  # parameters are found by the name of the module
    made = hk.transform(lambda *xs: layer(options.pop("axis", -1), name=called, **options)(*xs))
    parameters = made.init(jax.random.key(0), *arrays)
    return Built(parameters, lambda parameters, *xs: made.apply(parameters, None, *xs))


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.normal(size=shape), dtype)


def values_and_gradients(built, parameters, x):
    def loss(parameters, x):
        y = built.apply(parameters, x)
        return jnp.sum(jnp.sin(y.astype("float32"))), y

    (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, x)
    return y, gradients


def assert_close(got, expected, width=WIDTH):
    """Two programs of one formula in float32: sums of `width` terms, and some products."""
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (g.shape, g.dtype) == (e.shape, e.dtype)
        e = oracles.real(e)
        slack = 4 * (width + oracles.STEPS) * oracles.unit("float32") + 2 * oracles.unit(g.dtype)
        bound = slack * max(1.0, np.abs(e).max(initial=0))
        np.testing.assert_allclose(oracles.real(g), e, rtol=0, atol=bound)


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"epsilon": 0.25}], ids=str)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_is_the_frameworks_own(framework, options, rng):
    """The same state, whichever wrote it, and the same values and gradients of it."""
    x = normal(rng, 5, WIDTH)
    theirs = build(framework, "RMSNorm", [x], **options)
    ours = build(framework, "GoldenRMSNorm", [x], target_variance="standard", **options)
    assert described(ours.parameters) == described(theirs.parameters)
    parameters = randomised(theirs.parameters, rng)
    got, expected = (values_and_gradients(b, parameters, x) for b in (ours, theirs))
    assert_close(got, expected)


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.25}], ids=str)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_residual_is_the_frameworks_own_of_the_sum(framework, options, rng):
    x, r = normal(rng, 5, WIDTH), normal(rng, 5, WIDTH)
    theirs = build(framework, "RMSNorm", [x], **options)
    ours = build(framework, "PhiResidualRMSNorm", [x, r], return_sum=True, **options)
    assert described(ours.parameters) == described(theirs.parameters)
    parameters = randomised(theirs.parameters, rng)
    y, z = ours.apply(parameters, x, r)
    np.testing.assert_array_equal(z, phi_residual(x, r))
    assert_close(y, theirs.apply(parameters, z))
    alone = build(framework, "PhiResidualRMSNorm", [x, r], mode="standard", **options)
    assert_close(alone.apply(parameters, x, r), theirs.apply(parameters, x + r))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_dtype_of_the_result_is_that_of_the_framework(framework, dtype, rng):
    x = normal(rng, 3, WIDTH, dtype=dtype)
    theirs = build(framework, "RMSNorm", [x])
    ours = build(framework, "GoldenRMSNorm", [x], target_variance="standard")
    both = build(framework, "PhiResidualRMSNorm", [x, x])
    expected = theirs.apply(theirs.parameters, x).dtype
    assert described(ours.parameters) == described(theirs.parameters)
    assert ours.apply(ours.parameters, x).dtype == expected
    assert both.apply(both.parameters, x, x).dtype == expected
    if framework != "haiku":
        options = {"dtype": jnp.dtype(dtype)}
        for name, arrays in (("GoldenRMSNorm", [x]), ("PhiResidualRMSNorm", [x, x])):
            built = build(framework, name, arrays, **options)
            assert built.apply(built.parameters, *arrays).dtype == dtype


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_options_of_the_operation_arrive(framework, rng):
    x = normal(rng, 3, WIDTH)
    options = {"target_variance": 2.5, "scale_offset": 1.0, "epsilon": 1e-3}
    scale = normal(rng, WIDTH)

    def with_scale(parameters):
        return jax.tree.map(lambda _: scale, parameters)

    built = build(framework, "GoldenRMSNorm", [x], **options)
    assert_close(built.apply(with_scale(built.parameters), x), golden_rms_norm(x, scale, **options))
    built = build(framework, "PhiResidualRMSNorm", [x, x], mode="phi_symmetric", **options)
    expected = phi_residual_rmsnorm(x, x, scale, mode="phi_symmetric", **options)
    assert_close(built.apply(with_scale(built.parameters), x, x), expected)
    default = build(framework, "GoldenRMSNorm", [x], use_scale=False, epsilon=0.0)
    y = default.apply(default.parameters, x)
    np.testing.assert_allclose(jnp.mean(y**2, -1), PHI_INV, rtol=1e-5)


@pytest.mark.parametrize(
    ("reduced", "features"), [(1, 1), ((1, 2), (1, 2)), ((0, 2), 2), ((1, 2), 0)], ids=str
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_any_axes(framework, reduced, features, rng):
    x = normal(rng, 3, 4, 5)
    names = ("axis", "param_axis") if framework == "haiku" else ("reduction_axes", "feature_axes")
    options = dict(zip(names, (reduced, features)))
    width = int(np.prod([x.shape[a] for a in np.atleast_1d(features)]))
    if framework == "haiku":  # transform calls the function twice
        given = dict(options)
        layers = []
        for layer in (hk.RMSNorm, syntonic_jax.nn.haiku.GoldenRMSNorm):
            more = {} if layer is hk.RMSNorm else {"target_variance": "standard"}
            axis, where = given["axis"], given["param_axis"]
            make = functools.partial(layer, axis, param_axis=where, name="rms_norm", **more)
            made = hk.transform(lambda x, make=make: make()(x))
            parameters = made.init(jax.random.key(0), x)
            layers.append(Built(parameters, lambda p, x, made=made: made.apply(p, None, x)))
        theirs, ours = layers
    else:
        theirs = build(framework, "RMSNorm", [x], width=width, **options)
        options["target_variance"] = "standard"
        ours = build(framework, "GoldenRMSNorm", [x], width=width, **options)
    assert described(ours.parameters) == described(theirs.parameters)
    parameters = randomised(theirs.parameters, rng)
    got, expected = (values_and_gradients(b, parameters, x) for b in (ours, theirs))
    assert_close(got, expected, x.size)


FLAX = ("nnx", "linen")


@pytest.mark.parametrize("framework", FLAX)
def test_a_mask_leaves_entries_out(framework, rng):
    x = normal(rng, 4, WIDTH)
    mask = jnp.asarray(rng.random(x.shape) < 0.6).at[2].set(False).at[3].set(True)
    built = build(framework, "GoldenRMSNorm", [x], target_variance="standard")
    y = built.apply(built.parameters, x, mask=mask)
    for row in (0, 1, 3):
        mean_square = np.mean(oracles.real(x[row][mask[row]]) ** 2)
        expected = oracles.real(x[row]) / np.sqrt(mean_square + 1e-6)
        np.testing.assert_allclose(y[row], expected, rtol=WIDTH * oracles.unit("float32"))
    np.testing.assert_array_equal(y[2], 0)

    def loss(parameters, x):
        return jnp.sum(jnp.sin(built.apply(parameters, x, mask=mask)))

    gradients = jax.grad(loss, (0, 1))(built.parameters, x.at[2].set(jnp.nan))
    np.testing.assert_array_equal(gradients[1][2], 0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))

    def others(x):
        y = built.apply(built.parameters, x, mask=mask.at[0, 0].set(False))
        return jnp.sum(jnp.sin(y[0, 1:]))

    under = [jax.grad(others)(x.at[0, 0].set(value)) for value in (jnp.inf, 7.0)]
    np.testing.assert_array_equal(*under)


@pytest.mark.parametrize("framework", FLAX)
def test_rows_that_go_on_along_a_mapped_axis(framework, rng):
    """And of unequal counts: each is weighted by its own."""
    x = normal(rng, 4, WIDTH)
    whole = build(framework, "GoldenRMSNorm", [x], use_scale=False)
    parts = build(framework, "GoldenRMSNorm", [x], use_scale=False, axis_name="d")
    cut = x.reshape(4, 2, WIDTH // 2).swapaxes(0, 1)

    def joined(y):
        return y.swapaxes(0, 1).reshape(x.shape)

    y = jax.vmap(functools.partial(parts.apply, parts.parameters), axis_name="d")(cut)
    assert_close(joined(y), whole.apply(whole.parameters, x))
    mask = jnp.asarray(rng.random(x.shape) < 0.5).at[0, : WIDTH // 2].set(False)
    of_parts = mask.reshape(4, 2, WIDTH // 2).swapaxes(0, 1)
    apply = jax.vmap(lambda x, m: parts.apply(parts.parameters, x, mask=m), axis_name="d")
    assert_close(joined(apply(cut, of_parts)), whole.apply(whole.parameters, x, mask=mask))


@pytest.mark.parametrize("framework", FLAX)
def test_masked_rows_of_any_size(framework, rng):
    x = normal(rng, 3, WIDTH)
    mask = jnp.asarray(rng.random(x.shape) < 0.6).at[:, 0].set(True)
    built = build(framework, "GoldenRMSNorm", [x], epsilon=0.0)
    expected = built.apply(built.parameters, x, mask=mask)
    for size in (2.0**100, 2.0**-100):
        assert_close(built.apply(built.parameters, size * x, mask=mask), expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["GoldenRMSNorm", "PhiResidualRMSNorm"])
def test_wrong_arguments_are_named(framework, name, rng):
    x = normal(rng, 3, WIDTH)
    arrays = [x] * (2 if name == "PhiResidualRMSNorm" else 1)

    def call(arrays=arrays, **options):
        built = build(framework, name, arrays, **options)
        return built.apply(built.parameters, *arrays)

    with pytest.raises(TypeError, match=rf"(?i){name}|rms_?norm.*scale_offset"):
        call(scale_offset="1")
    flag = "create_scale" if framework == "haiku" else "use_scale"
    with pytest.raises(TypeError, match=rf"{name}: {flag} must be True or False"):
        call(use_scale="no")
    with pytest.raises(TypeError, match=rf"{name}.*float16.*got int32"):
        call([x.astype("int32")] * len(arrays))
    with pytest.raises(ValueError, match="target_variance"):
        call(target_variance=-1.0)
    if name == "PhiResidualRMSNorm":
        with pytest.raises(ValueError, match=rf"{name}: mode"):
            call(mode="golden")
        with pytest.raises(TypeError, match=rf"{name}: return_sum"):
            call(return_sum="yes")


def test_what_haiku_cannot_mean_is_refused():
    layers = syntonic_jax.nn.haiku
    for layer, options, pattern in [
        (layers.PhiResidualRMSNorm, {"axis": 0}, "axis must be -1"),
        (layers.PhiResidualRMSNorm, {"axis": -1, "param_axis": 0}, "param_axis must be -1"),
        (layers.GoldenRMSNorm, {"axis": -1, "create_scale": False, "scale_init": jnp.ones}, "init"),
        (layers.GoldenRMSNorm, {"axis": -1, "eps": -1.0}, "eps"),
    ]:
        made = hk.transform(lambda layer=layer, options=options: layer(**options) and None)
        with pytest.raises(ValueError, match=pattern):
            made.init(jax.random.key(0))

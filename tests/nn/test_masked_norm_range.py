"""Layer norms under a mask have the range of those without; debug_nans finds nothing there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from norm_layers import BATCH_NORMS, LAYER_NORMS

MASKED = ("nnx", "linen")  # Haiku's norms have no mask
WIDTH = 6


@pytest.mark.parametrize("framework", MASKED)
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_rows_of_any_size(framework, epsilon, dtype, rng, x64):
    """Of what the mask leaves; a number that it hides may be of any size."""
    top = jnp.finfo(dtype).maxexp
    powers = [0, top - 3, top // 2, 20] + ([-top // 2, 8 - top] if epsilon == 0 else [])
    rows = rng.normal(size=(len(powers), WIDTH)) + 0.5
    mask = np.ones(rows.shape, bool)
    mask[:, 1] = False
    x = jnp.asarray(np.ldexp(rows, np.array(powers)[:, None]), dtype)
    x = x.at[:, 1].set(jnp.finfo(dtype).max)
    norm = LAYER_NORMS[framework](False, x, epsilon=epsilon)
    variables = norm.init()
    apply = functools.partial(norm.apply, *variables, mask=mask)
    y = np.asarray(apply(x)[0], np.longdouble)
    exact = np.where(mask, np.asarray(x, np.longdouble), 0)
    mean = exact.sum(-1, keepdims=True) / (WIDTH - 1)
    deviations = np.where(mask, exact - mean, 0)
    var = np.square(deviations).sum(-1, keepdims=True) / (WIDTH - 1)
    golden = (np.sqrt(np.longdouble(5)) - 1) / 2
    expected = np.sqrt(golden) * deviations / np.sqrt(var + np.longdouble(epsilon))
    # A mean, two roundings of a difference and of a product, and that of y.
    wide = jnp.promote_types(dtype, "float32")
    unit = float(jnp.finfo(dtype).eps) + 16 * float(jnp.finfo(wide).eps)
    np.testing.assert_allclose(np.where(mask, y, 0), expected, rtol=0, atol=3 * unit)
    slopes = jax.grad(lambda x: jnp.sum(jnp.sin(apply(x)[0]).at[:, 1].set(0)))(x)
    assert np.isfinite(np.asarray(slopes, np.float64)).all()


@pytest.mark.parametrize("framework", MASKED)
def test_nothing_under_the_mask_is_no_nan(framework):
    """Neither a row of padding nor a whole batch of it."""
    x = jnp.ones((3, WIDTH))
    with jax.debug_nans(True):
        for norms, mask in (
            (LAYER_NORMS, jnp.array([[True], [True], [False]])),
            (BATCH_NORMS, jnp.zeros((3, 1), bool)),
        ):
            norm = norms[framework](False, x)
            y, _ = norm.apply(*norm.init(), x, mask=mask)
            np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("norms", [BATCH_NORMS, LAYER_NORMS], ids=["batch", "layer"])
@pytest.mark.parametrize("mask", [(4, 4, 8), (4, 4, 1), (4, 1, 1)], ids=str)
def test_on_explicit_meshes(norms, mask, rng):
    """Statistics, masks and data sharded each in its own way. (nnx refuses it without a mask.)"""
    x = jnp.asarray(rng.normal(size=(4, 4, 8)), "float32")
    where = jnp.asarray(rng.random(mask) < 0.8).at[0].set(True)
    norm = norms["linen"](False, x, **({"reduction_axes": 0} if norms is LAYER_NORMS else {}))
    variables = norm.init()
    want, statistics = norm.apply(*variables, x, mask=where)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("a", None, "b")))
        got, merged = norm.apply(*variables, x, mask=where)
        slopes = jax.grad(lambda x: jnp.sin(norm.apply(*variables, x, mask=where)[0]).sum())(x)
    for a, b in zip(jax.tree.leaves((got, merged)), jax.tree.leaves((want, statistics))):
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * 2.0**-24)
    assert np.isfinite(slopes).all()

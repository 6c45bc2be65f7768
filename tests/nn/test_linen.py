"""The Flax Linen layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from jax.sharding import PartitionSpec
from layer_contract import (
    WIDTH,
    FlaxLayerNormContract,
    Layer,
    PhiResidualContract,
    normal,
)

from syntonic_jax.nn.linen import PhiResidual, PhiResidualLayerNorm


class TestPhiResidualLayerNorm(FlaxLayerNormContract):
    def build(self, theirs, arrays, **options):
        if theirs:
            # The default there loses a mean far from zero; ours never does.
            options = {"use_fast_variance": False, **options}
        layer = (nn.LayerNorm if theirs else PhiResidualLayerNorm)(**options)
        return Layer(lambda: layer.init(jax.random.key(0), *arrays), layer.apply)

    def test_keeps_the_partitioning_of_its_parameters(self, rng):
        init = nn.with_partitioning(nn.initializers.ones, ("model",))
        norm, arrays = PhiResidualLayerNorm(scale_init=init), self.arrays(rng)
        variables = norm.init(jax.random.key(0), *arrays)
        assert nn.get_partition_spec(variables)["params"]["scale"] == PartitionSpec("model")
        got = norm.apply(variables, *arrays)
        np.testing.assert_array_equal(got, norm.apply(nn.unbox(variables), *arrays))

    def test_options_of_layer_norm_that_cannot_hold_are_refused(self):
        for option in ({"reduction_axes": -2}, {"axis_name": "batch"}, {"use_fast_variance": True}):
            with pytest.raises(TypeError, match=next(iter(option))):
                PhiResidualLayerNorm(**option)

    def test_another_width_is_refused(self, rng):
        wide = tuple(normal(rng, 2, WIDTH + 1) for _ in range(2))
        norm = self.ours(wide)
        with pytest.raises(errors.ScopeParamShapeError, match="scale"):
            norm.apply(norm.init(), *self.arrays(rng))


class TestPhiResidual(PhiResidualContract):
    def build(self, x, mode="phi", **options):
        dense = nn.Dense(WIDTH)
        layer = PhiResidual(dense, mode, **options)
        return (
            Layer(lambda: layer.init(jax.random.key(0), x), layer.apply),
            lambda variables, x: dense.apply({"params": variables["params"]["module"]}, x),
        )

    def around(self, function, x, *args, options=None, **kwargs):
        return PhiResidual(function, **(options or {})).apply({}, x, *args, **kwargs)


class Block(nn.Module):
    """A pre-norm block that carries the sum: what a user builds from the layers."""

    @nn.compact
    def __call__(self, carry, _=None):
        identity, residual = carry
        y, z = PhiResidualLayerNorm(return_sum=True)(identity, residual)
        return (z, PhiResidual(nn.Dense(WIDTH), activation="gelu")(y)), None


def stacked(block, depth):
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)()


def close(got, want, steps):
    """Fused otherwise, the same sums: a few roundings of numbers of the size of the result."""
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=steps * WIDTH * 2.0**-20 * scale)


def test_under_scan(rng):
    depth, carry = 3, (normal(rng, 4, WIDTH), normal(rng, 4, WIDTH))
    variables = stacked(Block, depth).init(jax.random.key(0), carry)
    scale = variables["params"]["PhiResidualLayerNorm_0"]["scale"]
    assert scale.shape == (depth, WIDTH)
    got, _ = stacked(Block, depth).apply(variables, carry)
    want = carry
    for i in range(depth):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        want, _ = Block().apply(layer, want)
    close(got[0], want[0], depth)
    close(got[1], want[1], depth)


def test_gradients_under_remat_and_scan(rng):
    depth, carry = 3, (normal(rng, 4, WIDTH), normal(rng, 4, WIDTH))
    plain, saving = stacked(Block, depth), stacked(nn.remat(Block), depth)
    variables = plain.init(jax.random.key(0), carry)

    def loss(variables, network):
        (z, residual), _ = network.apply(variables, carry)
        return jnp.sum(z * residual)

    want = jax.jit(jax.grad(lambda v: loss(v, plain)))(variables)
    got = jax.jit(jax.grad(lambda v: loss(v, saving)))(variables)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0
        close(a, b, depth)


class InCompact(nn.Module):
    """PhiResidual around a dense layer, both made in one method."""

    own: bool  # whether the dense layer is left to PhiResidual

    @nn.compact
    def __call__(self, x):
        return PhiResidual(nn.Dense(WIDTH, **({"parent": None} if self.own else {})))(x)


class InSetup(nn.Module):
    def setup(self):
        self.block = PhiResidual(nn.Dense(WIDTH))

    def __call__(self, x):
        return self.block(x)


@pytest.mark.parametrize(
    ("module", "path"),
    [
        (PhiResidual(nn.Dense(WIDTH)), ("module",)),
        (InSetup(), ("block", "module")),
        (InCompact(own=True), ("PhiResidual_0", "module")),
        (InCompact(own=False), ("Dense_0",)),
    ],
)
def test_where_the_variables_of_a_block_stand(rng, module, path):
    """What the docstring says of it; the values are the same everywhere."""
    x, dense = normal(rng, 2, WIDTH), nn.Dense(WIDTH)
    variables = dense.init(jax.random.key(0), x)
    held = variables["params"]
    for name in reversed(path):
        held = {name: held}
    want = PhiResidual(lambda x: dense.apply(variables, x)).apply({}, x)
    made = module.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, held)
    np.testing.assert_array_equal(module.apply({"params": held}, x), want)

"""The Flax NNX layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from layer_contract import (
    WIDTH,
    FlaxLayerNormContract,
    Layer,
    PhiResidualContract,
    normal,
)

from syntonic_jax.nn.nnx import PhiResidual, PhiResidualLayerNorm


class TestPhiResidualLayerNorm(FlaxLayerNormContract):
    def build(self, theirs, arrays, **options):
        if theirs:
            # The default there loses a mean far from zero; ours never does.
            options = {"use_fast_variance": False, **options}
        layer = nnx.LayerNorm if theirs else PhiResidualLayerNorm
        graph, state = nnx.split(layer(arrays[0].shape[-1], rngs=nnx.Rngs(0), **options))
        return Layer(lambda: state, lambda state, *arrays: nnx.merge(graph, state)(*arrays))

    def test_keeps_the_sharding_of_its_parameters(self):
        mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        metadata = {"out_sharding": ("model",)}
        with jax.set_mesh(mesh):
            layers = [
                layer(WIDTH, rngs=nnx.Rngs(0), scale_metadata=metadata)
                for layer in (PhiResidualLayerNorm, nnx.LayerNorm)
            ]
        specs = [nnx.get_partition_spec(nnx.state(layer)) for layer in layers]
        assert jax.tree.leaves(specs[0]["scale"]) == [PartitionSpec("model")]
        assert jax.tree.leaves(specs[0]) == jax.tree.leaves(specs[1])

    def test_options_of_layer_norm_that_cannot_hold_are_refused(self):
        for option in ({"reduction_axes": -2}, {"axis_name": "batch"}, {"use_fast_variance": True}):
            with pytest.raises(TypeError, match=next(iter(option))):
                PhiResidualLayerNorm(WIDTH, rngs=nnx.Rngs(0), **option)

    def test_another_width_is_refused(self, rng):
        norm = PhiResidualLayerNorm(WIDTH + 1, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"(?s)scale.*\(24,\).*\(25,\)"):
            norm(*self.arrays(rng))


class TestPhiResidual(PhiResidualContract):
    def build(self, x, mode="phi", **options):
        layer = PhiResidual(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), mode, **options)
        graph, state = nnx.split(layer)
        return (
            Layer(lambda: state, lambda state, x: nnx.merge(graph, state)(x)),
            lambda state, x: nnx.merge(graph, state).module(x),
        )

    def around(self, function, x, *args, options=None, **kwargs):
        return PhiResidual(function, **(options or {}))(x, *args, **kwargs)

    def test_state_stands_under_module(self):
        layer = PhiResidual(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
        assert set(nnx.to_flat_state(nnx.state(layer)).paths) == {
            ("module", "kernel"),
            ("module", "bias"),
        }


class Network(nnx.Module):
    """Two blocks: what a user builds from the layers."""

    def __init__(self, rngs):
        self.block = PhiResidual(nnx.Linear(WIDTH, WIDTH, rngs=rngs), activation="golden_gelu")
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = PhiResidualLayerNorm(WIDTH, return_sum=True, rngs=rngs)

    def __call__(self, x):
        x = self.block(x)
        return self.norm(x, self.linear(x))


def test_network_under_nnx_jit_and_value_and_grad(rng):
    network, x = Network(nnx.Rngs(0)), normal(rng, 4, WIDTH)
    want = network(x)
    for got, expected in zip(nnx.jit(lambda n, x: n(x))(network, x), want, strict=True):
        # Fused otherwise, the same sums: a few roundings of numbers of the size of y.
        np.testing.assert_allclose(got, expected, rtol=0, atol=WIDTH * 2.0**-20)

    def loss(network):
        y, z = network(x)
        return jnp.sum(y * y) + jnp.sum(z)

    _, gradients = nnx.jit(nnx.value_and_grad(loss))(network)
    assert jax.tree.structure(gradients) == jax.tree.structure(nnx.state(network, nnx.Param))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_network_survives_split_merge_and_clone(rng):
    network, x = Network(nnx.Rngs(0)), normal(rng, 4, WIDTH)
    graph, state = nnx.split(network)
    for copy in (nnx.merge(graph, state), nnx.clone(network)):
        np.testing.assert_array_equal(copy(x)[0], network(x)[0])
    doubled = jax.tree.map(lambda leaf: 2 * leaf, state["norm"]["scale"])
    state["norm"]["scale"] = doubled
    np.testing.assert_array_equal(nnx.merge(graph, state)(x)[0], 2 * network(x)[0])


def test_layers_stacked_under_vmap_and_scan(rng):
    """The way deep networks are built: parameters with a leading axis, one traced block."""
    depth, x = 3, normal(rng, 4, WIDTH)

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return Network(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scanned(network, x):
        return network(x)[1]

    networks = stack(nnx.Rngs(0))
    want, (graph, state) = x, nnx.split(networks)
    for i in range(depth):
        want = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(want)[1]
    np.testing.assert_allclose(
        scanned(networks, x), want, rtol=0, atol=depth * WIDTH * 2.0**-20 * np.abs(want).max()
    )

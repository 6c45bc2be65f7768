"""The normalisation layers of Flax NNX."""

import jax
import jax.numpy as jnp
import norm_layers
import numpy as np
import pytest
from batch_norm_contract import FlaxBatchNormContract
from flax import nnx
from jax.sharding import AxisType
from layer_contract import described, normal
from norm_contract import (
    CHANNELS,
    FlaxLayerNormContract,
    assert_same_arguments,
)
from training_contract import CLASSES, MOMENTUM, WIDTHS, TrainingContract
from training_contract import Network as ConvolutionalNetwork

from syntonic_jax.nn.nnx import GoldenBatchNorm, GoldenLayerNorm


class TestGoldenBatchNorm(FlaxBatchNormContract):
    build = staticmethod(norm_layers.nnx_batch_norm)

    def test_arguments_are_those_of_batch_norm(self):
        assert_same_arguments(GoldenBatchNorm.__init__, nnx.BatchNorm.__init__)
        assert_same_arguments(GoldenBatchNorm.__call__, nnx.BatchNorm.__call__, extra=())

    def test_attributes_are_those_of_batch_norm(self):
        ours, theirs = (n(3, rngs=nnx.Rngs(0)) for n in (GoldenBatchNorm, nnx.BatchNorm))
        extra = {"target_variance", "implementation"}
        assert set(vars(ours)) == set(vars(theirs)) | extra

    def test_train_and_eval(self, rng):
        x = self.data(rng)
        norm = GoldenBatchNorm(CHANNELS, use_running_average=None, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="GoldenBatchNorm: use_running_average must be set"):
            norm(x)
        norm.train()
        before = described(nnx.state(norm))
        y = norm(x)
        after = described(nnx.state(norm))
        assert before != after
        norm.eval()
        assert not np.array_equal(norm(x), y)
        assert described(nnx.state(norm)) == after
        np.testing.assert_array_equal(norm(x, use_running_average=False), y)
        assert described(nnx.state(norm)) != after

    @pytest.mark.skipif(not hasattr(nnx, "view"), reason="this flax has no views")
    def test_view(self, rng):
        x, norm = self.data(rng), GoldenBatchNorm(CHANNELS, rngs=nnx.Rngs(0))
        norm(x)
        view = nnx.view(norm, use_running_average=True)
        assert (norm.use_running_average, view.use_running_average) == (False, True)
        np.testing.assert_array_equal(view(x), norm(x, use_running_average=True))

    def test_under_jit_and_grad(self, rng):
        """The layer is updated in the transformation and holds arrays after it, not tracers."""
        x, norm = self.data(rng), GoldenBatchNorm(CHANNELS, rngs=nnx.Rngs(0))
        other = nnx.clone(norm)

        @nnx.jit
        def step(norm, x):
            return nnx.grad(lambda norm, x: jnp.sum(jnp.sin(norm(x))))(norm, x)

        gradients = step(norm, x)
        assert set(nnx.to_flat_state(gradients).paths) == {("scale",), ("bias",)}
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
        other(x)
        for got, want in zip(*(jax.tree.leaves(nnx.state(n)) for n in (norm, other)), strict=True):
            # Fused otherwise, the same sums of 240 numbers.
            np.testing.assert_allclose(got, want, rtol=0, atol=256 * 2.0**-23 * np.abs(want).max())

    def test_running_statistics_have_no_gradient(self, rng):
        """As in nnx.BatchNorm; the gradient of the output is that through its own statistics."""

        def running(norm):
            def f(x):
                copy = nnx.clone(norm)
                copy(x)
                return jnp.sum(copy.mean[...])

            return jax.grad(f)(self.data(rng))

        for layer in (GoldenBatchNorm, nnx.BatchNorm):
            np.testing.assert_array_equal(running(layer(CHANNELS, rngs=nnx.Rngs(0))), 0.0)

    def test_statistics_stay_float32(self, rng, x64):
        """Without the warning that nnx.BatchNorm has there."""
        x = self.data(rng, "float64")
        norm = self.ours(x)
        _, statistics = norm.apply(*norm.init(), x)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(statistics)} == {"float32"}

    def test_another_promotion(self, rng):
        """A function of the user's: what it returns is used, x and statistics too."""

        def halved(arrays, *, dtype):
            return tuple(None if a is None else jnp.asarray(a / 2, "bfloat16") for a in arrays)

        x = self.data(rng) + 4
        norms = [f(x, promote_dtype=halved) for f in (self.standard, self.theirs)]
        parameters, statistics = self.trained(x, rng)
        for train in (True, False):
            (y, _), (want, _) = (n.apply(parameters, statistics, x, train) for n in norms)
            assert y.dtype == want.dtype == jnp.bfloat16
            # Theirs rounds each of about 5 steps to bfloat16 in evaluation, with terms below 64.
            np.testing.assert_allclose(
                y.astype("float32"), want.astype("float32"), rtol=0, atol=5 * 64 * 2.0**-9
            )

    def test_another_width_is_refused(self, rng):
        norm = GoldenBatchNorm(CHANNELS + 1, rngs=nnx.Rngs(0))
        for average in (True, False):
            with pytest.raises(ValueError, match=r"GoldenBatchNorm: x .*\(7,\).*\(6,\)"):
                norm(self.data(rng), average)

    def test_keeps_the_sharding_of_its_parameters(self):
        assert_same_shardings(GoldenBatchNorm, nnx.BatchNorm)


class TestGoldenLayerNorm(FlaxLayerNormContract):
    build = staticmethod(norm_layers.nnx_layer_norm)

    def test_arguments_are_those_of_layer_norm(self):
        assert_same_arguments(GoldenLayerNorm.__init__, nnx.LayerNorm.__init__)
        assert_same_arguments(GoldenLayerNorm.__call__, nnx.LayerNorm.__call__, extra=())

    def test_attributes_are_those_of_layer_norm(self):
        ours, theirs = (n(3, rngs=nnx.Rngs(0)) for n in (GoldenLayerNorm, nnx.LayerNorm))
        assert set(vars(ours)) == set(vars(theirs)) | {"target_variance", "implementation"}

    def test_another_width_is_refused(self, rng):
        norm = GoldenLayerNorm(CHANNELS + 1, rngs=nnx.Rngs(0))
        message = r"GoldenLayerNorm: scale must have shape \(6,\), got \(7,\)"
        with pytest.raises(ValueError, match=message):
            norm(self.data(rng))

    def test_keeps_the_sharding_of_its_parameters(self):
        assert_same_shardings(GoldenLayerNorm, nnx.LayerNorm)


def assert_same_shardings(*layers):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    metadata = {"out_sharding": ("model",)}
    with jax.set_mesh(mesh):
        made = [
            layer(8, rngs=nnx.Rngs(0), scale_metadata=metadata, bias_metadata=metadata)
            for layer in layers
        ]
    ours, theirs = (nnx.get_partition_spec(nnx.state(layer)) for layer in made)
    assert jax.tree.leaves(ours["scale"]) == [jax.sharding.PartitionSpec("model")]
    assert jax.tree.leaves(ours) == jax.tree.leaves(theirs)


class Network(nnx.Module):
    """What a user writes who puts ours where theirs were."""

    def __init__(self, golden, rngs):
        options = {"target_variance": "standard"} if golden else {"use_fast_variance": False}
        self.linear = nnx.Linear(5, 6, rngs=rngs)
        self.batch = (GoldenBatchNorm if golden else nnx.BatchNorm)(6, rngs=rngs, **options)
        self.layer = (GoldenLayerNorm if golden else nnx.LayerNorm)(6, rngs=rngs, **options)

    def __call__(self, x):
        return self.layer(self.batch(self.linear(x)))


def test_states_load_both_ways(rng):
    x = normal(rng, 8, 5)
    ours, theirs = (Network(golden, nnx.Rngs(seed)) for golden, seed in ((True, 1), (False, 2)))
    for source, target in ((theirs, ours), (ours, theirs)):
        source(x)
        nnx.update(target, nnx.state(source))
        assert described(nnx.state(target)) == described(nnx.state(source))
        for network in (ours, theirs):
            network.eval()
        # The second norm divides the roundings of the first by the deviation of 6 numbers.
        np.testing.assert_allclose(ours(x), theirs(x), rtol=0, atol=1e-3)
        for network in (ours, theirs):
            network.train()


class Convolutional(nnx.Module):
    """The network of the training contract."""

    def __init__(self, theirs, dtype, options, rngs):
        norm, made = nnx.BatchNorm if theirs else GoldenBatchNorm, {"param_dtype": dtype}
        self.convolutions, self.norms = nnx.List(), nnx.List()
        for i, width in enumerate(WIDTHS):
            sizes = (WIDTHS[i - 1] if i else 1), width, (3, 3)
            self.convolutions.append(
                nnx.Conv(*sizes, strides=1 + i, use_bias=False, rngs=rngs, **made)
            )
            self.norms.append(norm(width, momentum=MOMENTUM, rngs=rngs, **made, **options))
        self.dense = nnx.Linear(16 * width, CLASSES, rngs=rngs, **made)

    def __call__(self, x):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.gelu(norm(convolution(x)))
        return self.dense(x.reshape(len(x), -1))


class TestTraining(TrainingContract):
    def network(self, theirs, dtype, **options):
        if theirs:
            options = {"use_fast_variance": False}
        made = Convolutional(theirs, dtype, options, nnx.Rngs(0))
        graph, *variables = nnx.split(made, nnx.Param, nnx.BatchStat)

        def apply(parameters, statistics, x, train):
            statistics = jax.tree.map(lambda leaf: leaf, statistics)
            network = nnx.merge(graph, parameters, statistics)
            network.train() if train else network.eval()
            return network(x), nnx.state(network, nnx.BatchStat)

        return ConvolutionalNetwork(lambda x: tuple(variables), apply)

"""The normalisation layers of Flax Linen."""

import jax
import jax.numpy as jnp
import norm_layers
import numpy as np
import pytest
from batch_norm_contract import FlaxBatchNormContract
from flax import errors
from flax import linen as nn
from jax.sharding import PartitionSpec
from layer_contract import described, normal
from norm_contract import SHAPE, FlaxLayerNormContract, assert_same_arguments, widened
from training_contract import CLASSES, MOMENTUM, WIDTHS, TrainingContract
from training_contract import Network as ConvolutionalNetwork

from syntonic_jax.nn.linen import GoldenBatchNorm, GoldenLayerNorm

KEY = jax.random.key(0)


class TestGoldenBatchNorm(FlaxBatchNormContract):
    build = staticmethod(norm_layers.linen_batch_norm)

    def test_arguments_are_those_of_batch_norm(self):
        assert_same_arguments(GoldenBatchNorm, nn.BatchNorm, ignored=("parent", "name"))
        assert_same_arguments(GoldenBatchNorm.__call__, nn.BatchNorm.__call__, extra=())

    def test_initialisation_leaves_the_statistics_and_needs_no_mapped_axis(self, rng):
        """x has neither mean 0 nor variance 1."""
        x = 2 * self.data(rng) + 3
        for groups in (None, [[0, 1], [2, 3]]):
            options = {"axis_name": "nowhere", "axis_index_groups": groups}
            norms = self.ours(x, **options), self.theirs(x, **options)
            assert described(norms[0].init()) == described(norms[1].init())
        norm = self.ours(x, axis_name="nowhere")
        with pytest.raises(NameError, match="nowhere"):
            norm.apply(*norm.init(), x)

    def test_several_feature_axes(self, rng):
        x = self.data(rng)
        norms = self.standard(x, axis=(3, 1)), self.theirs(x, axis=(3, 1))
        parameters, statistics = norms[1].init()
        assert described(norms[0].init()) == described((parameters, statistics))
        assert statistics["mean"].shape == (SHAPE[1], SHAPE[3])
        ours, theirs = (norm.apply(parameters, statistics, x) for norm in norms)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            # 48 numbers a feature, and no more than a few roundings of y.
            np.testing.assert_allclose(a, b, rtol=0, atol=64 * 2.0**-23 * np.max(np.abs(b)))

    @pytest.mark.parametrize("data", ["float16", "float32"])
    @pytest.mark.parametrize("param_dtype", ["float16", "bfloat16", "float32"])
    def test_without_force_float32_reductions(self, rng, data, param_dtype):
        """Parameters and y have the dtypes of theirs; statistics are not kept in 16 bits."""
        x = self.data(rng, data)
        options = {"force_float32_reductions": False, "param_dtype": param_dtype}
        norms = self.ours(x, **options), self.theirs(x, **options)
        (parameters, statistics), (theirs, loaded) = (norm.init() for norm in norms)
        assert described(parameters) == described(theirs)
        assert described(statistics) == described(jax.tree.map(widened, loaded))
        for train in (True, False):
            (y, after), (want, _) = (norm.apply(theirs, loaded, x, train) for norm in norms)
            assert y.dtype == want.dtype
            assert {a.dtype for a in jax.tree.leaves(after)} == {
                jnp.dtype("float32") if train else jnp.dtype(param_dtype)
            }

    def test_statistics_loaded_in_bfloat16_become_float32(self, rng):
        x = self.data(rng, "bfloat16")
        norms = self.ours(x), self.theirs(x)
        parameters, statistics = norms[1].init()
        statistics = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), statistics)
        got, want = (norm.apply(parameters, statistics, x)[1] for norm in norms)
        assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)
        assert got["mean"].dtype == jnp.float32

    def test_statistics_of_float64_have_the_dtype_of_theirs(self, rng, x64):
        for data, dtype in (("float64", None), ("float64", "float32"), ("float32", "float64")):
            x = self.data(rng, data)
            norms = self.ours(x, dtype=dtype), self.theirs(x, dtype=dtype)
            got, want = (norm.apply(*norms[1].init(), x) for norm in norms)
            assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)

    def test_the_call_or_the_constructor_says_which_statistics(self, rng):
        x = self.data(rng)
        variables = GoldenBatchNorm().init(KEY, x, use_running_average=True)
        with pytest.raises(ValueError, match="use_running_average"):
            GoldenBatchNorm().apply(variables, x)
        y = GoldenBatchNorm(use_running_average=True).apply(variables, x)
        again = GoldenBatchNorm().apply(variables, x, use_running_average=True)
        np.testing.assert_array_equal(y, again)

    def test_immutable_statistics_are_an_error_of_flax(self, rng):
        x = self.data(rng)
        norm = GoldenBatchNorm(use_running_average=False)
        with pytest.raises(errors.ModifyScopeVariableError, match="batch_stats"):
            norm.apply(norm.init(KEY, x), x)

    def test_another_width_is_refused(self, rng):
        x, norm = self.data(rng), GoldenBatchNorm(use_running_average=True)
        with pytest.raises(errors.ScopeParamShapeError, match="scale"):
            norm.apply(norm.init(KEY, x[..., 1:]), x)

    def test_an_axis_that_is_not_there_is_refused(self, rng):
        for axis in (4, (-1, 3), -5):
            with pytest.raises(ValueError, match="GoldenBatchNorm: axis must be distinct axes"):
                GoldenBatchNorm(axis=axis, use_running_average=False).init(KEY, self.data(rng))

    def test_keeps_the_partitioning_of_its_parameters(self, rng):
        init = nn.with_partitioning(nn.initializers.ones, ("model",))
        norm, x = GoldenBatchNorm(scale_init=init, use_running_average=True), self.data(rng)
        variables = norm.init(KEY, x)
        assert nn.get_partition_spec(variables)["params"]["scale"] == PartitionSpec("model")
        np.testing.assert_array_equal(norm.apply(variables, x), norm.apply(nn.unbox(variables), x))


class TestGoldenLayerNorm(FlaxLayerNormContract):
    build = staticmethod(norm_layers.linen_layer_norm)

    def test_arguments_are_those_of_layer_norm(self):
        assert_same_arguments(GoldenLayerNorm, nn.LayerNorm, ignored=("parent", "name"))
        assert_same_arguments(GoldenLayerNorm.__call__, nn.LayerNorm.__call__, extra=())

    def test_initialisation_needs_no_mapped_axis(self, rng):
        """linen.LayerNorm's does."""
        x = self.data(rng)
        norm = self.ours(x, axis_name="nowhere")
        assert described(norm.init()) == described(self.ours(x).init())
        with pytest.raises(NameError, match="nowhere"):
            norm.apply(*norm.init(), x)

    def test_another_width_is_refused(self, rng):
        x, norm = self.data(rng), GoldenLayerNorm()
        with pytest.raises(errors.ScopeParamShapeError, match="scale"):
            norm.apply(norm.init(KEY, x[..., 1:]), x)


class Network(nn.Module):
    """What a user writes who has checkpoints of a network with Flax's own layers."""

    golden: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6)(x)
        if self.golden:
            standard = {"target_variance": "standard"}
            x = GoldenBatchNorm(not train, **standard, name="BatchNorm_0")(x)
            return GoldenLayerNorm(**standard, name="LayerNorm_0")(x)
        x = nn.BatchNorm(not train, use_fast_variance=False)(x)
        return nn.LayerNorm(use_fast_variance=False)(x)


def test_checkpoints_load_under_the_names_of_flax(rng):
    x = normal(rng, 8, 5)
    ours, theirs = (Network(golden) for golden in (True, False))
    variables = theirs.init(KEY, x, True)
    assert described(ours.init(KEY, x, True)) == described(variables)
    for train in (True, False):
        got, want = (
            n.apply(variables, x, train, mutable=["batch_stats"])[0] for n in (ours, theirs)
        )
        # The second norm divides the roundings of the first by the deviation of 6 numbers.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)


def test_automatic_names_are_those_of_the_classes(rng):
    class Automatic(nn.Module):
        @nn.compact
        def __call__(self, x):
            return GoldenLayerNorm()(GoldenBatchNorm(True)(x))

    variables = Automatic().init(KEY, jnp.ones((2, 3)))
    assert sorted(variables["params"]) == ["GoldenBatchNorm_0", "GoldenLayerNorm_0"]


class Convolutional(nn.Module):
    """The network of the training contract."""

    theirs: bool
    dtype: str
    options: dict

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm if self.theirs else GoldenBatchNorm
        made = {"dtype": self.dtype, "param_dtype": self.dtype}
        for i, width in enumerate(WIDTHS):
            x = nn.Conv(width, (3, 3), strides=1 + i, use_bias=False, **made)(x)
            options = {"use_running_average": not train, "momentum": MOMENTUM, **made}
            x = nn.gelu(norm(**options, **self.options, name=f"BatchNorm_{i}")(x))
        return nn.Dense(CLASSES, **made)(x.reshape(len(x), -1))


class TestTraining(TrainingContract):
    def network(self, theirs, dtype, **options):
        if theirs:
            options = {"use_fast_variance": False}
        network = Convolutional(theirs, dtype, options)

        def apply(parameters, statistics, x, train):
            variables = {"params": parameters, "batch_stats": statistics}
            logits, new = network.apply(variables, x, train, mutable=["batch_stats"])
            return logits, new["batch_stats"]

        return ConvolutionalNetwork(lambda x: norm_layers.split(network.init(KEY, x, True)), apply)

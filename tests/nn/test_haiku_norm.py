"""The normalisation layers of Haiku."""

import haiku as hk
import jax
import jax.numpy as jnp
import norm_layers
import numpy as np
import oracles
import pytest
from batch_norm_contract import BatchNormContract, evaluated, running
from layer_contract import described, normal, randomised
from norm_contract import (
    SHAPE,
    LayerNormContract,
    assert_same_arguments,
    normalised,
    scaled,
)
from training_contract import CLASSES, MOMENTUM, WIDTHS, TrainingContract
from training_contract import Network as ConvolutionalNetwork

from syntonic_jax.nn.haiku import GoldenBatchNorm, GoldenLayerNorm

KEY = jax.random.key(0)


class TestGoldenBatchNorm(BatchNormContract):
    epsilon_is_called = "eps"
    fast = True
    random_init = staticmethod(hk.initializers.RandomNormal())

    build = staticmethod(norm_layers.haiku_batch_norm)

    def assert_same_variables(self, x, ours, theirs, reduced=BatchNormContract.reduced):
        """Haiku starts the averages at the statistics of the first batch: up to roundings."""
        assert described(ours[0]) == described(theirs[0])
        stats = normalised(x, reduced, epsilon=self.epsilon, fast=True)
        self.assert_same_statistics(ours[1], theirs[1], stats)

    def test_arguments_are_those_of_batch_norm(self):
        assert_same_arguments(GoldenBatchNorm, hk.BatchNorm)
        assert_same_arguments(GoldenBatchNorm.__call__, hk.BatchNorm.__call__, extra=())

    def test_attributes_are_those_of_batch_norm(self):
        def names(x):
            return [set(vars(n(True, True, 0.9))) for n in (GoldenBatchNorm, hk.BatchNorm)]

        (ours, theirs), _ = hk.transform(names).apply({}, None, 0), None
        assert ours == theirs | {"target_variance", "implementation"}

    @pytest.mark.parametrize(
        "options",
        [
            {"data_format": "channels_first"},
            {"data_format": "NCHW"},
            {"data_format": "NHWC"},
            {"axis": [0]},
            {"axis": [0, 1]},
            {"axis": (0, 1, 2, 3)},
            {"axis": [2], "data_format": "NCHW"},
            {"axis": [0, -3, -2]},  # parameters of shape (1, 5, 3, 6) there
            {"axis": (-1, 0)},
        ],
    )
    def test_axes_and_formats(self, rng, options):
        x = self.data(rng)
        norms = self.standard(x, **options), self.theirs(x, **options)
        parameters, statistics = norms[1].init()
        channels = 1 if options.get("data_format", "N...C")[:2] in ("NC", "ch") else 3
        reduced = options.get("axis", [a for a in range(4) if a != channels])
        reduced = tuple(a % 4 for a in reduced)
        self.assert_same_variables(x, norms[0].init(), (parameters, statistics), reduced)
        parameters = randomised(parameters, rng)
        values = parameters["norm"]
        for norm, fast in zip(norms, (False, True), strict=True):
            stats = normalised(x, reduced, epsilon=self.epsilon, fast=fast)
            y, _ = norm.apply(parameters, statistics, x)
            oracles.assert_close(y, scaled(stats.xhat, values["scale"], values["offset"]))
        (_, got), (_, want) = (norm.apply(parameters, statistics, x) for norm in norms)
        self.assert_same_statistics(got, want, stats)
        features = [a for a in range(4) if a not in reduced]
        mean, var = running(got, x, features)
        kept = evaluated(x, mean, var, values["scale"], values["offset"], self.epsilon)
        for norm in norms:
            oracles.assert_close(norm.apply(parameters, got, x, train=False)[0], kept)

    def test_local_statistics_in_a_test(self, rng):
        x = self.data(rng)
        parameters, statistics = self.trained(x, rng)
        norm = self.standard(x)
        trained, _ = norm.apply(parameters, statistics, x)
        y, after = norm.apply(parameters, statistics, x, train=False, test_local_stats=True)
        np.testing.assert_array_equal(y, trained)
        assert described(after) == described(statistics)
        _, want = norm.apply(parameters, statistics, x, test_local_stats=True)
        assert described(want) == described(norm.apply(parameters, statistics, x)[1])

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("shape", [(), (6,), (1, 1, 1, 6), (16, 1, 1, 6), (5, 3, 1), SHAPE])
    def test_parameters_passed_at_call_time(self, rng, shape, train):
        """Any shape that broadcasts, as for conditional normalisation."""
        x, scale, offset = self.data(rng), normal(rng, *shape), normal(rng, *shape)
        options = {"use_scale": False, "use_bias": False}
        _, statistics = self.trained(x, rng)
        ours, theirs = self.standard(x, **options), self.theirs(x, **options)
        call = {"train": train, "scale": scale, "offset": offset}
        y, after = ours.apply({}, statistics, x, **call)
        want, expected = theirs.apply({}, statistics, x, **call)
        stats = normalised(x, self.reduced, epsilon=self.epsilon, fast=True)
        if train:
            oracles.assert_close(y, scaled(stats.xhat, scale, offset))
        else:
            mean, var = running(statistics, x, self.features)
            kept = evaluated(x, mean, var, scale, offset, self.epsilon)
            oracles.assert_close(y, kept, "ours")
            oracles.assert_close(want, kept, "theirs")
        self.assert_same_statistics(after, expected, stats)

    def test_bfloat16_is_rounded_once(self, rng):
        """hk.BatchNorm rounds every step to bfloat16; the layer only y."""
        x = self.data(rng, "bfloat16")
        norm = self.standard(x)
        parameters, statistics = norm.init()
        parameters = randomised(parameters, rng)
        want, stats = self.expected(x, parameters)
        y, statistics = norm.apply(parameters, statistics, x)
        oracles.assert_close(y, want)
        average = statistics["norm/~/mean_ema"]["average"]
        assert average.dtype == jnp.float32
        # Multiplied by 1 - decay and divided by 1 - decay**1.
        rtol, atol = 4 * oracles.unit("float32"), stats.mean.slack.max()
        np.testing.assert_allclose(oracles.real(average), stats.mean.value, rtol=rtol, atol=atol)

    def test_evaluation_before_training_is_an_error_of_haiku(self, rng):
        x = self.data(rng)
        for layer in (GoldenBatchNorm, hk.BatchNorm):
            function = hk.transform_with_state(lambda x, n=layer: n(True, True, 0.9)(x, False))
            with pytest.raises(ValueError, match="average"):
                function.init(KEY, x)

    def test_bad_arguments_are_refused(self, rng):
        x, vector = self.data(rng), normal(rng, 6)

        def refused(message, *call, **options):
            norm = hk.transform_with_state(
                lambda x, *call: GoldenBatchNorm(
                    **{**norm_layers.CREATE, "decay_rate": 0.9, **options}
                )(x, True, False, *call)
            )
            with pytest.raises(ValueError, match=f"GoldenBatchNorm: {message}"):
                norm.init(KEY, x, *call)

        refused("scale_init given with create_scale=False", create_scale=False, scale_init=jnp.ones)
        refused(
            "offset_init given with create_offset=False", create_offset=False, offset_init=jnp.ones
        )
        refused("scale passed with create_scale=True", vector)
        refused("offset passed with create_offset=True", None, vector)
        refused(
            r"scale must broadcast to \(16, 5, 3, 6\), got \(1, 1, 1, 5\)",
            vector[:5],
            create_scale=False,
        )
        refused("cross_replica_axis_index_groups given", cross_replica_axis_index_groups=[[0]])
        refused("axis must be distinct axes of x", axis=[4])
        refused("axis must be distinct axes of x", axis=[0, -4])
        with pytest.raises(TypeError, match="GoldenBatchNorm: data_format must be a string"):
            hk.transform(lambda: GoldenBatchNorm(True, True, 0.9, data_format=["NC"])).init(KEY)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Unable to extract channel"):
            hk.transform(lambda: GoldenBatchNorm(True, True, 0.9, data_format="CN")).init(KEY)


class TestGoldenLayerNorm(LayerNormContract):
    epsilon_is_called = "eps"
    epsilon = 1e-5
    random_init = staticmethod(hk.initializers.RandomNormal())

    build = staticmethod(norm_layers.haiku_layer_norm)

    def test_arguments_are_those_of_layer_norm(self):
        assert_same_arguments(GoldenLayerNorm, hk.LayerNorm)
        assert_same_arguments(GoldenLayerNorm.__call__, hk.LayerNorm.__call__, extra=())

    @pytest.mark.parametrize(
        ("axis", "param_axis"),
        [
            (slice(1, None), None),
            (slice(1, -1), -1),
            (slice(2, None), 1),
            ([1, 2], slice(1, 3)),
            (slice(-2, None), slice(-2, None)),
        ],
    )
    def test_slices(self, rng, axis, param_axis):
        x, axes = self.data(rng), {"axis": axis, "param_axis": param_axis}
        norms = self.standard(x, **axes), self.theirs(x, **axes)
        parameters, _ = norms[1].init()
        assert described(norms[0].init()[0]) == described(parameters)
        parameters = randomised(parameters, rng)
        reduced = tuple(range(4)[axis]) if isinstance(axis, slice) else tuple(axis)
        stats = normalised(x, reduced, epsilon=self.epsilon)
        want = scaled(stats.xhat, parameters["norm"]["scale"], parameters["norm"]["offset"])
        for norm in norms:
            oracles.assert_close(norm.apply(parameters, {}, x)[0], want)

    @pytest.mark.parametrize("shape", [(), (6,), (5, 1, 6), (16, 1, 1, 1), SHAPE])
    def test_parameters_passed_at_call_time(self, rng, shape):
        x, scale, offset = self.data(rng), normal(rng, *shape), normal(rng, *shape)
        options = {"use_scale": False, "use_bias": False}
        stats = normalised(x, (3,), epsilon=self.epsilon)
        for norm in (self.standard(x, **options), self.theirs(x, **options)):
            y, _ = norm.apply({}, {}, x, scale=scale, offset=offset)
            oracles.assert_close(y, scaled(stats.xhat, scale, offset))

    def test_fast_variance_has_no_effect(self, rng):
        x = self.data(rng)
        norms = self.ours(x, use_fast_variance=True), self.ours(x)
        ours, again = (norm.apply(*norm.init(), x)[0] for norm in norms)
        np.testing.assert_array_equal(ours, again)

    def test_bad_arguments_are_refused(self, rng):
        x, vector = self.data(rng), normal(rng, 6)
        with pytest.raises(ValueError, match="GoldenLayerNorm: scale passed with"):
            self.ours(x).apply({}, {}, x, scale=vector)
        with pytest.raises(ValueError, match="GoldenLayerNorm: scale_init given with"):
            self.ours(x, use_scale=False, scale_init=jnp.ones).init()
        with pytest.raises(
            ValueError, match=r"GoldenLayerNorm: offset must broadcast to.*\(1, 1, 1, 5"
        ):
            self.ours(x, use_bias=False).apply(*self.ours(x).init(), x, offset=vector[1:])
        with pytest.raises(ValueError, match="GoldenLayerNorm: param_axis must be distinct axes"):
            self.ours(x, param_axis=5).init()


def network(golden):
    def function(x, train):
        x = hk.Linear(6)(x)
        if golden:
            standard = {"target_variance": "standard"}
            x = GoldenBatchNorm(True, True, 0.9, **standard, name="batch_norm")(x, train)
            return GoldenLayerNorm(-1, True, True, **standard, name="layer_norm")(x)
        return hk.LayerNorm(-1, True, True)(hk.BatchNorm(True, True, 0.9)(x, train))

    return hk.transform_with_state(function)


def test_checkpoints_load_under_the_names_of_haiku(rng):
    x = normal(rng, 8, 5)
    ours, theirs = network(True), network(False)
    parameters, state = theirs.init(KEY, x, True)
    got = ours.init(KEY, x, True)
    assert described(got[0]) == described(parameters)
    assert jax.tree.map(jnp.shape, got[1]) == jax.tree.map(jnp.shape, state)
    _, state = theirs.apply(parameters, state, None, x, True)
    for train in (True, False):
        got, want = (n.apply(parameters, state, None, x, train)[0] for n in (ours, theirs))
        # The second norm divides the roundings of the first by the deviation of 6 numbers.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)


class TestTraining(TrainingContract):
    def network(self, theirs, dtype, **options):
        norm = hk.BatchNorm if theirs else GoldenBatchNorm

        def network(x, train):
            for i, width in enumerate(WIDTHS):
                x = hk.Conv2D(width, 3, stride=1 + i, with_bias=False)(x)
                x = jax.nn.gelu(norm(True, True, MOMENTUM, name="norm", **options)(x, train))
            return hk.Linear(CLASSES)(x.reshape(len(x), -1))

        function = hk.transform_with_state(network)
        return ConvolutionalNetwork(
            lambda x: function.init(KEY, x, True),
            lambda parameters, state, x, train: function.apply(parameters, state, None, x, train),
        )

"""What the batch norms of every framework must show beside `norm_contract.NormContract`."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layer_contract import described, normal, randomised
from norm_contract import DEVICES, SHAPE, NormContract, normalised, scaled, spread_along
from oracles import Estimate

from syntonic_jax import PHI_INV


def running(statistics, x, axes):
    """The running mean and variance of a tree of statistics; Haiku has them as averages."""
    shape = [n if a in axes else 1 for a, n in enumerate(np.shape(x))]
    leaves = {
        jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(statistics)
    }
    kept = {path: v for path, v in leaves.items() if "hidden" not in path and v.ndim > 0}
    return [
        oracles.real(next(v for path, v in kept.items() if name in path)).reshape(shape)
        for name in ("mean", "var")
    ]


def evaluated(x, mean, var, scale, bias, epsilon) -> Estimate:
    """y of running statistics: every term of it is rounded a few times."""
    x, scale, bias = map(oracles.real, (x, scale, bias))
    factor = scale / np.sqrt(var + epsilon)
    terms = np.abs(factor) * (np.abs(x) + np.abs(mean)) + np.abs(bias)
    slack = oracles.STEPS * oracles.unit("float32") * terms
    return Estimate((x - mean) * factor + bias, slack)


def on_devices(how, f, x):
    """f of eighths of x, each on its device, with the mapped axis "d": y as a whole, statistics."""
    if how == "shard_map":
        mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
        # check_vma: the statistics are known to be the same everywhere, or P() would be refused.
        specs = {"in_specs": P("d"), "out_specs": (P("d"), P()), "check_vma": True}
        return jax.jit(jax.shard_map(f, mesh=mesh, **specs))(x)
    shards = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), x)
    mapping = {"vmap": jax.vmap, "pmap": jax.pmap}[how]
    y, statistics = mapping(f, axis_name="d")(shards)
    for leaf in jax.tree.leaves(statistics):
        if isinstance(leaf, jax.core.Tracer):
            continue
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return y.reshape(-1, *y.shape[2:]), jax.tree.map(lambda leaf: leaf[0], statistics)


class BatchNormContract(NormContract):
    """GoldenBatchNorm beside the framework's BatchNorm, channels last."""

    reduced, features = (0, 1, 2), (3,)
    epsilon = 1e-5
    momentum = 0.75

    def trained(self, x, rng, **options):
        """Parameters and statistics of theirs, as some training would leave them."""
        norm = self.theirs(x, momentum=self.momentum, **options)
        parameters, statistics = norm.init()
        for _ in range(2):
            _, statistics = norm.apply(parameters, statistics, self.data(rng, x.dtype))
        return randomised(parameters, rng), statistics

    def assert_same_statistics(self, got, want, stats):
        """The new statistics enter with a weight of at most 1; a few roundings follow."""
        assert jax.tree.structure(got) == jax.tree.structure(want)
        slack = sum(np.max(estimate.slack) for estimate in (stats.mean, stats.var))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), path
            atol = 2 * slack + oracles.STEPS * oracles.unit("float32") * np.max(np.abs(b))
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))

    def test_statistics_are_the_frameworks(self, rng, implementation):
        x = self.data(rng)
        parameters, statistics = self.trained(x, rng)
        options = {"momentum": self.momentum}
        ours = self.ours(x, implementation=implementation, **options)
        _, got = ours.apply(parameters, statistics, x)
        _, want = self.theirs(x, **options).apply(parameters, statistics, x)
        _, stats = self.expected(x, parameters, fast=self.fast)
        self.assert_same_statistics(got, want, stats)
        assert all(np.any(a != b) for a, b in self.pairs(got, statistics))

    def pairs(self, *trees):
        return zip(*map(jax.tree.leaves, trees), strict=True)

    def evaluated(self, x, parameters, statistics):
        mean, var = running(statistics, x, self.features)
        scale, bias = spread_along(parameters, x, self.features)
        return evaluated(x, mean, var, scale, bias, self.epsilon)

    def test_evaluation_is_the_frameworks(self, rng, implementation):
        x = self.data(rng, spread=1e-3)
        parameters, statistics = self.trained(x, rng)
        want = self.evaluated(x, parameters, statistics)
        for norm in (self.standard(x, implementation=implementation), self.theirs(x)):
            y, after = norm.apply(parameters, statistics, x, train=False)
            oracles.assert_close(y, want)
            assert described(after) == described(statistics)

    def test_evaluation_has_the_target_variance(self, rng):
        x = self.data(rng)
        _, statistics = self.trained(x, rng)
        golden, standard = (
            norm.apply(norm.init()[0], statistics, x, train=False)[0]
            for norm in (self.ours(x), self.standard(x))
        )
        rtol = oracles.STEPS * oracles.unit("float32")
        np.testing.assert_allclose(golden, np.sqrt(PHI_INV) * standard, rtol=rtol)

    def test_our_statistics_load_into_the_frameworks(self, rng):
        x = self.data(rng)
        ours = self.standard(x)
        parameters, statistics = ours.init()
        _, statistics = ours.apply(parameters, statistics, x)
        y, _ = self.theirs(x).apply(parameters, statistics, x, train=False)
        oracles.assert_close(y, self.evaluated(x, parameters, statistics))

    @pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
    def test_mapped_axis(self, rng, how):
        """Eighths of the batch have the statistics of the whole, as in the framework."""
        x = self.data(rng)
        parameters, statistics = self.trained(x, rng)
        want, stats = self.expected(x, parameters, fast=self.fast)
        _, whole = self.theirs(x).apply(parameters, statistics, x)
        for norm in (self.standard(x, axis_name="d"), self.theirs(x, axis_name="d")):
            y, after = on_devices(how, lambda x, n=norm: n.apply(parameters, statistics, x), x)
            oracles.assert_close(y, want)
            self.assert_same_statistics(after, whole, stats)

    @pytest.mark.parametrize("how", ["vmap", "shard_map"])
    def test_gradients_over_a_mapped_axis(self, rng, how):
        """A loss of the whole batch, of which each device sees an eighth, in float64."""
        with jax.enable_x64(True):
            x, weights = self.data(rng, "float64"), normal(rng, *SHAPE, dtype="float64")
            norms = self.ours(x), self.ours(x, axis_name="d")
            parameters, statistics = norms[0].init()
            parameters = randomised(parameters, rng)

            def whole(parameters, x):
                return jnp.sum(weights * norms[0].apply(parameters, statistics, x)[0])

            def cut(parameters, x):
                f = lambda x: norms[1].apply(parameters, statistics, x)  # noqa: E731
                return jnp.sum(weights * on_devices(how, f, x)[0])

            for got, want in self.pairs(
                *(jax.jit(jax.grad(f, (0, 1)))(parameters, x) for f in (cut, whole))
            ):
                # The same sums in another order: n roundings of terms of that size.
                atol = x.size * oracles.unit("float64") * np.max(np.abs(want))
                np.testing.assert_allclose(got, want, rtol=0, atol=atol)

    def test_groups_of_a_mapped_axis(self, rng):
        x, groups = self.data(rng), [[0, 1, 2, 3], [4, 5, 6, 7]]
        parameters, statistics = self.trained(x, rng)
        norm = self.standard(x, axis_name="d", axis_index_groups=groups)
        f = jax.pmap(lambda x: norm.apply(parameters, statistics, x)[0], axis_name="d")
        y = f(x.reshape(DEVICES, -1, *SHAPE[1:])).reshape(SHAPE)
        for half in np.split(np.arange(len(x)), 2):
            oracles.assert_close(y[half], self.expected(x[half], parameters)[0])

    def test_nothing_to_reduce_is_refused(self, rng):
        self.refuses(jnp.zeros((0, *SHAPE[1:])), ValueError, "(?s)golden_batch_norm")


class FlaxBatchNormContract(BatchNormContract):
    """What NNX and Linen have in common."""

    def test_a_mask_that_does_not_fit_is_refused(self, rng):
        message = r"GoldenBatchNorm: mask must broadcast to the shape .* of x, got \(5,\)"
        self.refuses(self.data(rng), ValueError, message, {"mask": jnp.ones(5, bool)})

    @pytest.mark.parametrize("train", [True, False])
    def test_other_features_are_refused_without_parameters_too(self, rng, train):
        x = self.data(rng)
        norm = self.ours(x, use_scale=False, use_bias=False)
        message = r"GoldenBatchNorm: x must have features of shape \(6,\), .*got \(5,\)"
        with pytest.raises(ValueError, match=message):
            norm.apply(*norm.init(), x[..., :5], train=train)

    def test_another_feature_axis(self, rng):
        x = jnp.moveaxis(self.data(rng), 3, 1)
        norms = self.standard(x, axis=1), self.theirs(x, axis=1)
        parameters, statistics = norms[1].init()
        parameters = randomised(parameters, rng)
        stats = normalised(x, (0, 2, 3), epsilon=self.epsilon)
        want = scaled(stats.xhat, *spread_along(parameters, x, (1,)))
        (y, got), (theirs, expected) = (n.apply(parameters, statistics, x) for n in norms)
        oracles.assert_close(y, want, "ours")
        oracles.assert_close(theirs, want, "theirs")
        self.assert_same_statistics(got, expected, stats)

    @pytest.mark.parametrize("shape", [(16, 1, 1, 1), (16, 5, 3, 1), SHAPE])
    def test_mask(self, rng, shape):
        x, mask = self.data(rng), rng.random(shape) < 0.6
        mask[:2] = [[[[True]]], [[[False]]]]  # neither all nor nothing
        parameters, statistics = self.trained(x, rng)
        want, stats = self.expected(x, parameters, keep=mask)
        outputs = [
            norm.apply(parameters, statistics, x, mask=mask)
            for norm in (self.standard(x), self.theirs(x))
        ]
        for y, _ in outputs:
            oracles.assert_close(y, want)
        self.assert_same_statistics(outputs[0][1], outputs[1][1], stats)

    @pytest.mark.parametrize("how", ["vmap", "shard_map"])
    def test_unequal_counts_over_a_mapped_axis(self, rng, how):
        """Weighted by counts, one of them 0; the framework would average means, and get NaN."""
        x = self.data(rng)
        mask = (np.arange(16) % 5 < 3)[:, None, None, None] & (rng.random(SHAPE) < 0.7)
        mask[4:6], mask[0] = False, True
        parameters, statistics = self.trained(x, rng)
        norms = self.standard(x, axis_name="d"), self.theirs(x, axis_name="d")
        want, stats = self.expected(x, parameters, keep=mask)
        (y, got), (theirs, _) = (
            on_devices(
                how, lambda a, n=n: n.apply(parameters, statistics, a[0], mask=a[1]), (x, mask)
            )
            for n in norms
        )
        oracles.assert_close(y, want)
        _, whole = self.theirs(x).apply(parameters, statistics, x, mask=mask)
        self.assert_same_statistics(got, whole, stats)
        assert np.isnan(theirs).all()

    def test_fast_variance_has_no_effect(self, rng):
        """Where E[x**2] - E[x]**2 is lost."""
        x = self.data(rng) + 1e4
        results = []
        for fast in (False, True):
            norm = self.standard(x, use_fast_variance=fast)
            results.append(norm.apply(*norm.init(), x))
        (y, got), (again, same) = results
        np.testing.assert_array_equal(y, again)
        assert described(got) == described(same)
        theirs = self.theirs(x, use_fast_variance=True)
        lost, _ = theirs.apply(*theirs.init(), x)
        assert np.max(np.abs(np.var(oracles.real(lost), self.reduced) - 1)) > 0.1

    @pytest.mark.parametrize("param_dtype", ["float16", "float32"])
    @pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
    @pytest.mark.parametrize("train", [True, False])
    def test_dtype_arguments(self, rng, param_dtype, dtype, train):
        x = self.data(rng, "bfloat16")
        options = {"dtype": dtype, "param_dtype": param_dtype}
        ours, theirs = self.ours(x, **options), self.theirs(x, **options)
        assert described(ours.init()) == described(theirs.init())
        got, want = (norm.apply(*theirs.init(), x, train) for norm in (ours, theirs))
        assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)

    def test_only_y_is_rounded(self, rng):
        """To `dtype`; theirs rounds x and, in NNX, the running statistics too."""
        x = self.data(rng) + 100
        parameters, statistics = self.trained(x, rng)
        wide, narrow = self.standard(x), self.standard(x, dtype="bfloat16")
        for train in (True, False):
            (y, got), (want, expected) = (
                norm.apply(parameters, statistics, x, train) for norm in (narrow, wide)
            )
            np.testing.assert_array_equal(y, want.astype("bfloat16"))
            assert described(got) == described(expected)

    def test_float64(self, rng, x64):
        """Of float64 data and of float32 data with float64 parameters."""
        for data, held in (("float64", "float32"), ("float32", "float64")):
            x = self.data(rng, data)
            parameters, statistics = self.theirs(x).init()
            parameters = jax.tree.map(lambda p, t=held: p.astype(t), randomised(parameters, rng))
            y, _ = self.standard(x).apply(parameters, statistics, x)
            stats = normalised(x, self.reduced, epsilon=self.epsilon, acc="float64")
            scale, bias = spread_along(parameters, x, self.features)
            assert y.dtype == "float64"
            oracles.assert_close(y, scaled(stats.xhat, scale, bias, acc="float64"))

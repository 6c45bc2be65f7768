"""What the normalisation layers of every framework must show, written once.

That of the batch norms alone is in `batch_norm_contract.py`, training in `training_contract.py`.

`tests/nn/test_<framework>_norm.py` subclasses the contracts and says in `build` how a layer, ours
or the framework's own ("theirs"), is built there. Arguments are named as Flax names them.

Both are compared with one oracle, `normalised`, whose slack says how far each may be from it.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from layer_contract import by_name, described, randomised
from norm_layers import Norm
from oracles import Estimate

from syntonic_jax import PHI_INV

SHAPE, CHANNELS = (16, 5, 3, 6), 6  # channels last
DEVICES = 8
VARIANCES = [("golden", PHI_INV), ("standard", 1.0), (0.25, 0.25)]


class Normalised(NamedTuple):
    xhat: Estimate
    mean: Estimate
    var: Estimate


def normalised(x, reduced, *, epsilon, keep=None, fast=False, acc="float32") -> Normalised:
    """(x - mean) / sqrt(var + epsilon), with the statistics of the entries that are kept.

    As in oracles.row_statistics: mean errs by dm = (n + 1) u mean|x|; the variance around it
    relatively by (n + 4) u, and by dm**2. With `fast` it is E[x**2] - mean**2, and errs by
    (n + 4) u E[x**2] + 2 |mean| dm + dm**2. rstd errs relatively by half of what var + epsilon
    does, and a few roundings.
    """
    x, u = oracles.real(x), oracles.unit(acc)
    kept = np.broadcast_to(True if keep is None else keep, x.shape)
    n = kept.sum(reduced, keepdims=True)

    def mean_of(values):
        return np.where(kept, values, 0.0).sum(reduced, keepdims=True) / n

    mean = mean_of(x)
    dm = (n + 1) * u * mean_of(np.abs(x))
    var = mean_of((x - mean) ** 2)
    dv = (n + 4) * u * var + dm**2
    if fast:
        dv = (n + 4) * u * mean_of(x**2) + 2 * np.abs(mean) * dm + dm**2
    rstd = 1 / np.sqrt(var + epsilon)
    xhat = (x - mean) * rstd
    slack = rstd * dm + np.abs(xhat) * (dv * rstd**2 / 2 + oracles.STEPS * u)
    return Normalised(Estimate(xhat, slack), Estimate(mean, dm), Estimate(var, dv))


def scaled(xhat: Estimate, scale=1.0, bias=0.0, variance=1.0, acc="float32") -> Estimate:
    """scale * sqrt(variance) * xhat + bias."""
    scale, bias = np.sqrt(variance) * oracles.real(scale), oracles.real(bias)
    y = scale * xhat.value
    slack = np.abs(scale) * xhat.slack + 4 * oracles.unit(acc) * (np.abs(y) + np.abs(bias))
    return Estimate(y + bias, slack)


def spread_along(tree, x, axes):
    """scale and bias of a tree of parameters, in shapes that broadcast to that of x."""
    shape = [n if a in axes else 1 for a, n in enumerate(np.shape(x))]
    values = by_name(tree)
    bias = values.get("bias", values.get("offset"))
    return values["scale"].reshape(shape), bias.reshape(shape)


def widened(leaf):
    """A statistic in float32 at least, and a counter as it is."""
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def assert_same_arguments(ours, theirs, extra=("target_variance", "implementation"), ignored=()):
    """Constructor or call: the framework's arguments, in order, kind and default, then ours."""
    ours, theirs = (dict(inspect.signature(f).parameters) for f in (ours, theirs))
    for name in ignored:
        ours.pop(name), theirs.pop(name)
    assert list(ours) == [*theirs, *extra]
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name


class NormContract:
    """What batch and layer norm have in common."""

    reduced: tuple[int, ...]  # of x
    features: tuple[int, ...]
    epsilon: float  # the framework's default
    random_init: Any = staticmethod(jax.nn.initializers.normal(1.0))
    fast = False  # whether theirs has no other variance than E[x**2] - E[x]**2
    epsilon_is_called = "epsilon"

    def build(self, theirs: bool, x, **options) -> Norm:
        """Our layer, or the framework's, for arrays like x."""
        raise NotImplementedError

    def ours(self, x, **options):
        return self.build(False, x, **options)

    def standard(self, x, **options):
        return self.build(False, x, target_variance="standard", **options)

    def theirs(self, x, **options):
        return self.build(True, x, **options)

    def data(self, rng, dtype="float32", spread=1.0, shape=SHAPE):
        """Channels with means of their own."""
        means = rng.normal(size=shape[-1])
        return jnp.asarray(spread * (rng.normal(size=shape) + means), dtype)

    def expected(self, x, parameters, *, fast=False, variance=1.0, keep=None):
        stats = normalised(x, self.reduced, epsilon=self.epsilon, keep=keep, fast=fast)
        scale, bias = spread_along(parameters, x, self.features)
        return scaled(stats.xhat, scale, bias, variance), stats

    def assert_same_variables(self, x, ours, theirs):
        assert described(ours) == described(theirs)

    @pytest.mark.parametrize("use_scale", [True, False])
    @pytest.mark.parametrize("use_bias", [True, False])
    def test_variables_are_the_frameworks(self, rng, use_scale, use_bias):
        x = self.data(rng)
        options = {"use_scale": use_scale, "use_bias": use_bias}
        ours, theirs = (f(x, **options).init() for f in (self.ours, self.theirs))
        self.assert_same_variables(x, ours, theirs)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert len(jax.tree.leaves(ours[0])) == use_scale + use_bias

    def test_initialisers_draw_what_the_frameworks_draw(self, rng):
        x, init = self.data(rng), self.random_init
        options = {"scale_init": init, "bias_init": init}
        ours, theirs = (f(x, **options).init() for f in (self.ours, self.theirs))
        self.assert_same_variables(x, ours, theirs)
        scale, bias = jax.tree.leaves(ours[0])
        assert not np.array_equal(scale, bias)

    def test_output_is_the_frameworks(self, rng, implementation):
        """A checkpoint of theirs, loaded into ours.

        Channels vary by 1e-3, so that an epsilon that is not the framework's would be seen.
        """
        x = self.data(rng, spread=1e-3)
        theirs, ours = self.theirs(x), self.standard(x, implementation=implementation)
        parameters, statistics = theirs.init()
        parameters = randomised(parameters, rng)
        y, _ = ours.apply(parameters, statistics, x)
        oracles.assert_close(y, self.expected(x, parameters)[0], "ours")
        y, _ = theirs.apply(parameters, statistics, x)
        oracles.assert_close(y, self.expected(x, parameters, fast=self.fast)[0], "theirs")

    def assert_variance(self, y, variance, want, stats):
        """But for the part that epsilon takes; an error of y by e moves its deviation by e."""
        var = stats.var.value.squeeze(self.reduced)
        got, whole = np.std(oracles.real(y), self.reduced), np.sqrt(variance)
        error = np.max(want.slack + oracles.ulp(y, y.dtype))
        np.testing.assert_allclose(
            got, whole * np.sqrt(var / (var + self.epsilon)), rtol=0, atol=error
        )

    @pytest.mark.parametrize(("target", "variance"), VARIANCES)
    def test_target_variance(self, rng, target, variance):
        x = self.data(rng)
        norm = self.ours(x, target_variance=target)
        parameters, statistics = norm.init()
        y, _ = norm.apply(parameters, statistics, x)
        want, stats = self.expected(x, parameters, variance=variance)
        oracles.assert_close(y, want)
        self.assert_variance(y, variance, want, stats)
        if target == "golden":
            default, _ = self.ours(x).apply(parameters, statistics, x)
            np.testing.assert_array_equal(default, y)

    @pytest.mark.parametrize("data", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("held", ["bfloat16", "float32"])
    @pytest.mark.parametrize("train", [True, False])
    def test_result_dtypes_are_the_frameworks(self, rng, data, held, train):
        """`held` is what the parameters are kept in, whatever the layer made them."""
        x = self.data(rng, data)
        theirs = self.theirs(x)
        parameters, statistics = theirs.init()
        parameters = jax.tree.map(lambda leaf: leaf.astype(held), parameters)
        _, statistics = theirs.apply(parameters, statistics, x)  # Haiku has none before
        want, got = (
            norm.apply(parameters, statistics, x, train) for norm in (theirs, self.ours(x))
        )
        if train:  # Haiku's are of 16 bits; ours are not, after an update
            want = (want[0], jax.tree.map(widened, want[1]))
        assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)

    def test_far_from_zero(self, rng):
        """Float32 channels of mean 1e4: two-pass statistics have no digits to lose there."""
        x = self.data(rng) + 1e4
        norm = self.standard(x)
        variables = norm.init()
        y, _ = norm.apply(*variables, x)
        want, stats = self.expected(x, variables[0])
        oracles.assert_close(y, want)
        self.assert_variance(y, 1.0, want, stats)

    def refuses(self, x, error, message, call=None, **options):
        variables = self.theirs(jnp.zeros(SHAPE)).init()
        with pytest.raises(error, match=message):
            self.ours(x, **options).apply(*variables, x, **(call or {}))

    def test_integers_are_refused(self, rng):
        self.refuses(
            self.data(rng).astype("int32"), TypeError, "(?i)golden_?(batch|layer)_?norm: .*int32"
        )

    def test_unknown_implementation_is_refused(self, rng):
        message = "implementation must be .*got 'triton'"
        self.refuses(self.data(rng), ValueError, message, implementation="triton")

    def test_bad_epsilon_is_refused(self, rng):
        message = f"{self.epsilon_is_called} must be finite and not negative, got -1e-06"
        self.refuses(self.data(rng), ValueError, message, epsilon=-1e-6)

    @pytest.mark.parametrize("target", ["gold", 0.0, -1.0])
    def test_bad_target_variance_is_refused(self, rng, target):
        message = f"target_variance must be .*got {target!r}"
        self.refuses(self.data(rng), ValueError, message, target_variance=target)


class LayerNormContract(NormContract):
    """GoldenLayerNorm beside the framework's LayerNorm, over the last axis."""

    reduced, features = (3,), (3,)

    def axes(self, reduced, features):
        """The options by which the framework is told of these axes."""
        return {"reduction_axes": reduced, "feature_axes": features}

    @pytest.mark.parametrize(
        ("reduced", "features"),
        [
            (-1, -1),
            (2, 2),
            ((1, 2, 3), -1),
            (-1, 1),
            ((1, 2), (-1,)),
            ((1, 3), (1, 3)),
            (3, (2, 3)),
        ],
    )
    def test_other_axes(self, rng, reduced, features):
        x, axes = self.data(rng), self.axes(reduced, features)
        norms = self.standard(x, **axes), self.theirs(x, **axes)
        parameters, statistics = norms[1].init()
        assert described(norms[0].init()[0]) == described(parameters)
        parameters = randomised(parameters, rng)
        reduced, features = (tuple(np.atleast_1d(a) % 4) for a in (reduced, features))
        stats = normalised(x, reduced, epsilon=self.epsilon)
        want = scaled(stats.xhat, *spread_along(parameters, x, features))
        for norm in norms:
            y, _ = norm.apply(parameters, statistics, x)
            oracles.assert_close(y, want)

    def test_bfloat16_is_rounded_once_whatever_the_axes(self, rng):
        x = self.data(rng, "bfloat16")
        norm = self.standard(x, **self.axes((1, 2), -1))
        parameters, statistics = norm.init()
        parameters = jax.tree.map(lambda p: p.astype("bfloat16"), randomised(parameters, rng))
        y, _ = norm.apply(parameters, statistics, x)
        stats = normalised(x, (1, 2), epsilon=self.epsilon)
        oracles.assert_close(y, scaled(stats.xhat, *spread_along(parameters, x, (3,))))

    def test_an_axis_that_is_not_there_is_refused(self, rng):
        for reduced, named in ((4, "4"), ((-1, 3), r"\(-1, 3\)"), (-5, "-5")):
            message = f"(GoldenLayerNorm: .*axis|axes must be distinct axes of x).*got {named}"
            self.refuses(self.data(rng), ValueError, message, **self.axes(reduced, -1))

    def test_nothing_to_reduce_is_refused(self, rng):
        x = jnp.zeros((16, 0, SHAPE[-1]))
        self.refuses(x, ValueError, "(?s)golden_layer_norm", **self.axes(1, -1))


class FlaxLayerNormContract(LayerNormContract):
    """What NNX and Linen have in common."""

    epsilon = 1e-6

    def test_a_mask_that_does_not_fit_is_refused(self, rng):
        message = r"GoldenLayerNorm: mask must broadcast to the shape .* of x, got \(5,\)"
        self.refuses(self.data(rng), ValueError, message, {"mask": jnp.ones(5, bool)})

    @pytest.mark.parametrize("shape", [(16, 1, 1, 6), (6,), SHAPE])
    def test_mask(self, rng, shape):
        x, mask = self.data(rng), rng.random(shape) < 0.6
        mask[..., :2] = [True, False]  # neither all nor nothing
        norms = self.standard(x), self.theirs(x)
        parameters, statistics = norms[1].init()
        parameters = randomised(parameters, rng)
        want, _ = self.expected(x, parameters, keep=mask)
        for norm in norms:
            y, _ = norm.apply(parameters, statistics, x, mask=mask)
            oracles.assert_close(y, want)

    def test_mapped_axis(self, rng):
        """Examples cut into eighths: statistics over the pieces, parameters for each place."""
        x = self.data(rng, shape=(4, DEVICES, 3, 6))
        axes = {"reduction_axes": (1, 2), "feature_axes": -1}
        norms = [f(x[:, 0], axis_name="d", **axes) for f in (self.standard, self.theirs)]
        parameters, statistics = self.theirs(x[:, 0], **axes).init()
        parameters = randomised(parameters, rng)
        stats = normalised(x, (1, 2, 3), epsilon=self.epsilon)
        want = scaled(stats.xhat, *spread_along(parameters, x, (3,)))
        for norm in norms:
            f = jax.vmap(
                lambda x, n=norm: n.apply(parameters, statistics, x)[0], 1, 1, axis_name="d"
            )
            oracles.assert_close(f(x), want)

    @pytest.mark.parametrize("param_dtype", ["float16", "float32"])
    @pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
    def test_dtype_arguments(self, rng, param_dtype, dtype):
        x = self.data(rng, "bfloat16")
        options = {"dtype": dtype, "param_dtype": param_dtype}
        ours, theirs = self.ours(x, **options), self.theirs(x, **options)
        assert described(ours.init()) == described(theirs.init())
        got, want = (norm.apply(*theirs.init(), x)[0].dtype for norm in (ours, theirs))
        assert got == want
